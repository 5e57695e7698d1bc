"""One file per kind of task. Importing this package fills the registry: no list to edit.

Other packages add kinds by an entry point in the group `smidgen.kinds` that names a module.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
for _entry in entry_points(group="smidgen.kinds"):
    _entry.load()
