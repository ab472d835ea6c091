"""The cells, one file each; the native library lists the same ones in the same order."""

from fusedrnn.cells.cell import Cell, by_key
from fusedrnn.cells.gru import GRU
from fusedrnn.cells.lstm import LSTM
from fusedrnn.cells.rnn import RNN_RELU, RNN_TANH

CELLS: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, LSTM, GRU)}

__all__ = ["CELLS", "GRU", "LSTM", "RNN_RELU", "RNN_TANH", "Cell", "by_key"]
