"""Tune a smidgen of a pretrained model: find the few parameters that matter, train only those, ship kilobytes.

The public names, loaded when first used, so that `import smidgen` is quick. `__init__.pyi` lists them: it is made from
the packages' own tables of contents by `python docs/gen_public.py`.
"""

import lazy_loader

from smidgen.common.log_notes import quiet_logs
from smidgen.common.version import __version__

quiet_logs()

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]
