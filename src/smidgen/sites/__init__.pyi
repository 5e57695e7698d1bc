from .discovery import find_sites as find_sites
from .site import Site as Site
