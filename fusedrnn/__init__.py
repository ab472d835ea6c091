"""fusedrnn: recurrent layers for PyTorch, fused over all time steps, forward and backward."""

from fusedrnn import functional, reference
from fusedrnn._version import __version__
from fusedrnn.backends import backend, list_backends
from fusedrnn.cell_modules import GRUCell, LSTMCell, RNNCell
from fusedrnn.modules import GRU, LSTM, RNN
from fusedrnn.recurrence import RecurrenceFunction

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "RecurrenceFunction",
    "__version__",
    "backend",
    "functional",
    "list_backends",
    "reference",
]
