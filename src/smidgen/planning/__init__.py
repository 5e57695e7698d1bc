"""A recipe resolved on a model before anything is touched: entries, shapes, counts, compatibility."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
