"""Selection: what was kept, as indices; loading it never needs data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smidgen.common.atomic_files import write_files
from smidgen.common.errors import DeltaError
from smidgen.delta.fingerprint import Fingerprint
from smidgen.planning.entry import Shape
from smidgen.recipe.recipe import Recipe

FILE = "selection.safetensors"


FIELDS = {"recipe", "base", "shapes", "info"}


@dataclass(frozen=True, eq=False)
class Selection:
    """What a narrowed recipe keeps on one base.

    Attributes:
        recipe: with its Select.
        indices: saved name -> (k,) int64, ascending, into the flattened tensor; for every tensor that was narrowed.
        shapes: saved name -> shape of the whole tensor.
        base: fingerprint of the model that it was chosen on.
        info: task, examples, ...: plain data.
    """

    recipe: Recipe
    indices: Mapping[str, Tensor]
    shapes: Mapping[str, Shape]
    base: Fingerprint
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Number of values kept."""
        return sum(len(index) for index in self.indices.values())

    @property
    def candidates(self) -> int:
        """Number of values that it was chosen from."""
        return sum(prod(shape) for shape in self.shapes.values())

    def mask(self, name: str) -> Tensor:
        """True where a value of the tensor is kept, in the tensor's shape."""
        flat = torch.zeros(prod(self.shapes[name]), dtype=torch.bool)
        flat[self.indices[name]] = True
        return flat.view(self.shapes[name])

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what is kept, to tell selections apart."""
        found = hashlib.sha256()
        for name, index in sorted(self.indices.items()):
            found.update(f"{name}{index.tolist()}".encode())
        return found.hexdigest()

    def shuffled(self, seed: int) -> Selection:
        """As many values of each tensor at random places: a control that keeps the choice of tensors."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.randperm(prod(self.shapes[name]), generator=generator)[: len(index)].sort().values
            for name, index in self.indices.items()
        }
        return replace(self, indices=drawn, info={**self.info, "shuffled": seed})

    def overlap(self, other: Selection) -> float:
        """Values kept by both over values kept by the smaller of the two.

        Raises:
            DeltaError: the two are of different recipes or models.
        """
        if dict(self.shapes) != dict(other.shapes):
            raise DeltaError(
                f"cannot compare selections of {self.recipe.whole} and {other.recipe.whole}: other tensors"
            )
        both = sum(int((self.mask(name) & other.mask(name)).sum()) for name in self.indices)
        return both / max(1, min(self.kept, other.kept))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write selection.safetensors into a folder; returns the folder. Raises DeltaError if that is impossible."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        meta = {"recipe": self.recipe.to_json(), "base": self.base.to_json(), "shapes": shapes, "info": dict(self.info)}
        tensors = {name: index.to(torch.int32) for name, index in self.indices.items()}
        return write_files(Path(folder), {FILE: save(tensors, {"smidgen": json.dumps(meta)})})

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Selection:
        """Read what `save` wrote: a folder, or the file itself. Raises DeltaError, naming what is wrong."""
        path = Path(source)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise DeltaError(f"no selection at {source}: {path.name} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {})["smidgen"])
                indices = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if any(index.dtype != torch.int32 for index in indices.values()):
                raise TypeError("indices that are not whole numbers of 32 bits")
            indices = {name: index.long() for name, index in indices.items()}
            if set(meta) != FIELDS:
                raise KeyError(f"fields {sorted(set(meta) ^ FIELDS)}")
            shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
            found = cls(Recipe.from_json(meta["recipe"]), indices, shapes, Fingerprint(**meta["base"]), meta["info"])
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DeltaError(f"{path} is no selection, or damaged ({error})") from None
        if set(shapes) != set(indices):
            raise DeltaError(f"{path} is damaged: indices and shapes name different tensors")
        return found

    def __repr__(self) -> str:
        return f"Selection({self.recipe}: {self.kept:,} of {self.candidates:,} values)"
