"""The grammar of recipes: terms, sums, narrowing; one spelling for Python, files and the command line."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
