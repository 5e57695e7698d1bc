"""The ways a model is touched, and the record of it. Hooks live here and in `efficiency`, nowhere else."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
