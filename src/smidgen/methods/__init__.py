"""One file per method. Importing this package fills the registry; there is no list to edit.

Other packages add methods by an entry point in the group `smidgen.methods` that names a module.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _entry in entry_points(group="smidgen.methods"):
    _entry.load()
