"""One optimiser step: objectives, parameter groups, micro-batches, growth, gradient checks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
