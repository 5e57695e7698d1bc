"""The trained result: attach, merge, save, add up, switch; HF PEFT files; which base it belongs to."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
