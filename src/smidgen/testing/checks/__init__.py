"""The conformance checks. Importing this package fills `smidgen.testing.cases.CHECKS`."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
