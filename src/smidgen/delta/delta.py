"""Delta: the trained result, as safetensors, JSON and a card. Kilobytes; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smidgen.common.atomic_files import read_json, write_files
from smidgen.common.dtypes import master_dtype
from smidgen.common.errors import DeltaError
from smidgen.common.finite_values import not_finite
from smidgen.common.version import __version__
from smidgen.common.wrappers import bare
from smidgen.delta import model_card
from smidgen.delta.arithmetic.sums import Operand
from smidgen.delta.content_hash import tensor_bytes
from smidgen.delta.fingerprint import Fingerprint
from smidgen.delta.saved_form import FIELDS, DeltaForm, TensorForm
from smidgen.methods.base import renewed
from smidgen.planning.resolution import resolve
from smidgen.planning.saved_layout import is_value, pack_indices, packed_shapes, unpack_indices
from smidgen.ports.attachment_record import attachment, check_masters
from smidgen.recipe.recipe import Recipe, Term

FORMAT_VERSION = 1
TENSORS, META, CARD = "delta.safetensors", "delta.json", "README.md"


@dataclass(frozen=True, eq=False)
class Delta(Operand):
    """A trained recipe: whole trained values (not differences), so that loading is bit-exact.

    Attributes:
        recipe: what was trained.
        tensors: saved name -> float32 tensor (float64 on a float64 base), head included. Where a selection left k
            values of a tensor: (k,), with `<name>.indices` (k,) int32 into the flattened tensor, and
            `<name>.start` if the rest of it was drawn at random.
        base: fingerprint of the model that it belongs to.
        head: names of the head's tensors among `tensors`.
        pooling: None for the class's own.
        labels: label names in id order, () if there are none.
        info: task, metrics, hyper-parameters: plain data.
    """

    recipe: Recipe
    tensors: Mapping[str, Tensor]
    base: Fingerprint
    head: tuple[str, ...] = ()
    pooling: str | None = None
    labels: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, **info: object) -> Delta:
        """What is attached to the model now, copied, for one's own training loop or Trainer.

        Raises:
            AttachError: nothing is attached, or the model was changed while something was.
        """
        record, model = attachment(model), bare(model)
        check_masters(model)
        record.check_held()
        everything = [*record.results(), *record.fixed(model)]
        if record.result != record.plan.recipe:
            info = {"trained_as": str(record.plan.recipe), **info}
        head = tuple(name for name, _ in record.plan.head)
        base = Fingerprint.of(model, (*head, *renewed(record.plan.recipe, model)))
        tensors = {name: p.detach().cpu().clone() for name, p in everything}
        config = getattr(model, "config", None)
        labels = _labels(config) if head else ()
        return cls(
            record.result,
            tensors,
            base,
            head,
            record.plan.pooling,
            labels,
            _info(model, info),
        )

    @classmethod
    def between(cls, base: nn.Module, tuned: nn.Module, recipe: str | Term | Recipe, **info: object) -> Delta:
        """What a recipe would have trained, read from a base and a fine-tuned checkpoint of it.

        Raises:
            DeltaError: the recipe adds tensors or has a Select, or the two models differ in names or shapes.
        """
        base, tuned = bare(base), bare(tuned)
        plan = resolve(base, recipe)
        if plan.pending:
            raise DeltaError(f"{plan.recipe} keeps a part, which two checkpoints do not tell; use {plan.recipe.whole}")
        added = next((entry for entry in plan.entries if entry.added), None)
        if added is not None:
            raise DeltaError(f"{added.method} adds tensors, which two checkpoints do not tell; use LN, BitFit or Full")
        found = {n: p.detach() for n, p in tuned.named_parameters(remove_duplicate=False)}
        wrong = [n for n, shape in plan.shapes.items() if n not in found or tuple(found[n].shape) != shape]
        if wrong:
            raise DeltaError(f"the tuned model does not match the base: {wrong[0]} is missing or of another shape")
        tensors = {n: found[n].to(device="cpu", dtype=master_dtype(found[n].dtype), copy=True) for n in plan.shapes}
        head = tuple(name for name, _ in plan.head)
        labels = _labels(getattr(tuned, "config", None)) if head else ()
        held = (*head, *renewed(plan.recipe, base))
        return cls(plan.recipe, tensors, Fingerprint.of(base, held), head, None, labels, _info(tuned, info))

    @property
    def trained(self) -> int:
        """Number of trained values, head apart."""
        return sum(t.numel() for name, t in self.tensors.items() if name not in self.head and is_value(name))

    @property
    def head_values(self) -> int:
        """Number of values of the head."""
        return sum(self.tensors[name].numel() for name in self.head)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of recipe, base, pooling and all values, to tell deltas apart."""
        said = [self.recipe.to_json(), self.base.to_json(), list(self.head), self.pooling, list(self.labels)]
        found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(tensor_bytes(tensor, tensor.dtype))
        return found.hexdigest()

    def with_info(self, **info: object) -> Delta:
        """The same delta with more recorded about it."""
        return replace(self, info={**self.info, **info})

    def to_json(self) -> DeltaForm:
        """Everything but the values."""
        return {
            "format_version": FORMAT_VERSION,
            "smidgen_version": __version__,
            "recipe": self.recipe.to_json(),
            "base": self.base.to_json(),
            "head": list(self.head),
            "pooling": self.pooling,
            "labels": list(self.labels),
            "info": dict(self.info),
            "tensors": {n: {"dtype": str(t.dtype)[6:], "shape": list(t.shape)} for n, t in self.tensors.items()},
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write delta.safetensors, delta.json and a card; each file appears whole or not at all.

        Raises:
            DeltaError: a value is not finite, the folder cannot be written, or the disk is full.
        """
        if found := not_finite(self.tensors):
            raise DeltaError(
                f"the delta is not saved: {found}; its training diverged, train again with a lower learning rate"
            )
        meta = self.to_json()
        data = {
            TENSORS: save({n: t.contiguous() for n, t in sorted(pack_indices(self.tensors).items())}),
            META: json.dumps(meta, indent=1, sort_keys=True, ensure_ascii=False).encode(),
            CARD: model_card.card_text(self.recipe, self.trained, self.head_values, meta).encode(),
        }
        return write_files(Path(folder), data)

    @classmethod
    def load(cls, source: str | os.PathLike[str], revision: str | None = None) -> Delta:
        """Read a folder, or a hub id. Strict: wrong, missing or extra keys, names, dtypes and shapes are errors, and so
        are values that are not finite.

        Raises:
            DeltaError: naming the file and what is wrong with it.
        """
        folder = _folder(source, revision)
        meta = _meta(folder / META)
        try:
            tensors = _tensors(folder / TENSORS, meta["tensors"])
            recipe, base = Recipe.from_json(meta["recipe"]), Fingerprint(**meta["base"])
            head, labels = tuple(meta["head"]), tuple(meta["labels"])
        except (TypeError, AttributeError, KeyError, IndexError) as error:
            raise DeltaError(f"{folder / META} is damaged: {error}") from None
        if found := not_finite(tensors):
            raise DeltaError(f"{folder / TENSORS}: {found}; its training diverged, or the file is damaged")
        if not set(head) <= set(tensors):
            raise DeltaError(
                f"{folder / META} names head tensors that the file lacks: {sorted(set(head) - set(tensors))}"
            )
        return cls(recipe, tensors, base, head, meta["pooling"], labels, meta["info"])

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the three files to a model repository on the hub, created if need be; returns its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload smidgen delta")
        return str(url)

    def __repr__(self) -> str:
        name = self.base.name or self.base.architecture
        return f"Delta({self.recipe} on {name}: {self.trained:,} values, head {self.head_values:,})"


def _info(model: nn.Module, info: Mapping[str, object]) -> dict[str, object]:
    return {"model_class": type(model).__name__, **info}


def _labels(config: object) -> tuple[str, ...]:
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names[i]) for i in sorted(names))


def _folder(source: str | os.PathLike[str], revision: str | None) -> Path:
    """A delta's folder, on the disk or downloaded from the hub."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / META).is_file():
            raise DeltaError(f"{folder} holds no delta: {META} is missing (found: {_listing(folder)})")
        return folder
    text = os.fspath(source)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise DeltaError(f"no delta at {text}: not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=[TENSORS, META, CARD]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DeltaError(f"{text} is neither a folder nor a delta on the hub ({type(error).__name__})") from None


def _listing(folder: Path) -> str:
    try:
        return ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    except OSError:  # it went meanwhile
        return "nothing"


def _meta(path: Path) -> DeltaForm:
    meta = read_json(path)
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise DeltaError(f"{path} has format_version {version}; this smidgen reads {FORMAT_VERSION}")
    if set(meta) != FIELDS:
        wrong = [f"unexpected {k}" for k in sorted(set(meta) - FIELDS)]
        wrong += [f"missing {k}" for k in sorted(FIELDS - set(meta))]
        raise DeltaError(f"{path}: {', '.join(wrong)}")
    return cast(DeltaForm, meta)


def _tensors(path: Path, wanted: Mapping[str, TensorForm]) -> dict[str, Tensor]:
    """Names, dtypes and shapes are compared with the JSON before anything is allocated."""
    if not path.is_file():
        raise DeltaError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(spec["shape"]) for name, spec in wanted.items()}
            names, expected = set(file.keys()), packed_shapes(shapes)
            if names != set(expected):
                raise DeltaError(f"{path} and {META} disagree on {', '.join(sorted(names ^ set(expected))[:3])}")
            for name, shape in expected.items():
                if tuple(file.get_slice(name).get_shape()) != shape:
                    raise DeltaError(f"{path}: {name} does not have the shape {list(shape)} that {META} says")
            tensors = unpack_indices({name: file.get_tensor(name) for name in expected}, shapes)
    except SafetensorError as error:
        raise DeltaError(f"{path} is corrupt or truncated ({error})") from None
    for name, tensor in tensors.items():
        if str(tensor.dtype)[6:] != wanted[name]["dtype"]:
            raise DeltaError(f"{path}: {name} is {tensor.dtype}, not {wanted[name]['dtype']}")
    return tensors
