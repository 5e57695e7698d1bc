"""Notes of packages that store weights in few bits, which nobody can act on and which would stand in every output.

transformers imports torchao and bitsandbytes wherever they are installed, whether or not a model is quantised.
"""

from __future__ import annotations

import logging

# logger -> how its notes begin: of kernels that are missing, of what torch would not do, of a cast in each call
NOTES = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "%s is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


def quiet_logs() -> None:
    """Leave these notes out, and no others."""
    for logger, start in NOTES.items():
        logging.getLogger(logger).addFilter(Beginning(start))


class Beginning(logging.Filter):
    """Lets through what does not begin so."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        return not str(record.msg).startswith(self.start)
