"""Deprecated: the former place of what `smidgen.planning.entry` says of saved names."""

from smidgen.planning.entry import INDICES as INDICES
from smidgen.planning.entry import START as START
from smidgen.planning.entry import Shape as Shape
