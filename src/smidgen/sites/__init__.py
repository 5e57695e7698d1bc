"""What a model is made of and where it can be tuned: norms, linear maps, attention, input, head."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
