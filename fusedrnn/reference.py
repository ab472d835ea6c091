"""The oracle: the same functions as :mod:`fusedrnn.functional`, in plain PyTorch.

Every backend is tested against these; they are themselves tested against torch.nn and gradcheck.
"""

from __future__ import annotations

from functools import partial

from fusedrnn import functional

__all__ = ["gru", "lstm", "rnn"]

lstm = partial(functional.lstm, backend="reference")
gru = partial(functional.gru, backend="reference")
rnn = partial(functional.rnn, backend="reference")
