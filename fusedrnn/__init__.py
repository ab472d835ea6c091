"""fusedrnn: recurrent layers for PyTorch, fused over all time steps, forward and backward."""

from fusedrnn import diagnostics, functional, init, reference
from fusedrnn._version import __version__
from fusedrnn.backends import backend, list_backends
from fusedrnn.cell_modules import GRUCell, LSTMCell, RNNCell
from fusedrnn.cells import Cell
from fusedrnn.conv import ConvLSTM
from fusedrnn.convert import convert, patch, to_torch
from fusedrnn.explanation import Explanation, explain
from fusedrnn.modules import GRU, LSTM, RNN
from fusedrnn.recurrence import RecurrenceFunction
from fusedrnn.recurrent import Recurrent
from fusedrnn.sequences import tbptt

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "ConvLSTM",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "RecurrenceFunction",
    "Recurrent",
    "__version__",
    "backend",
    "convert",
    "diagnostics",
    "explain",
    "functional",
    "init",
    "list_backends",
    "patch",
    "reference",
    "tbptt",
    "to_torch",
]
