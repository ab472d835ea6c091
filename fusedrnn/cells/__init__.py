"""The cells, one file for each family; the native library lists the same ones in the same order."""

from fusedrnn.cells.cell import Cell, by_key
from fusedrnn.cells.gru import GRU, GRU_RESET_BEFORE, gru
from fusedrnn.cells.lstm import LSTM, LSTM_COUPLED, LSTM_COUPLED_PEEPHOLE, LSTM_PEEPHOLE, lstm
from fusedrnn.cells.rnn import RNN_RELU, RNN_TANH

# Those of torch.nn, which every backend runs, come first.
PLAIN: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, LSTM, GRU)}
CELLS: dict[str, Cell] = PLAIN | {
    cell.name: cell
    for cell in (LSTM_PEEPHOLE, LSTM_COUPLED, LSTM_COUPLED_PEEPHOLE, GRU_RESET_BEFORE)
}

__all__ = [
    "CELLS",
    "GRU",
    "GRU_RESET_BEFORE",
    "LSTM",
    "LSTM_COUPLED",
    "LSTM_COUPLED_PEEPHOLE",
    "LSTM_PEEPHOLE",
    "PLAIN",
    "RNN_RELU",
    "RNN_TANH",
    "Cell",
    "by_key",
    "gru",
    "lstm",
]
