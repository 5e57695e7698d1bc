"""One file per method, in families by what they touch. Importing this package fills the registry: no list to edit.

Other packages add methods by an entry point in the group `smidgen.methods` that names a module.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
for _entry in entry_points(group="smidgen.methods"):
    _entry.load()
