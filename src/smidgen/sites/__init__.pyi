from .discovery import find_sites as find_sites
from .quantised.originals import note_originals as note_originals
from .site import Site as Site
