"""What hidden states belong to: the base below the cut, the cut and the examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.delta.fingerprint import Fingerprint
from smidgen.efficiency.prefix_cache.cut_point import Cut
from smidgen.efficiency.prefix_cache.token_layout import Rows
from smidgen.methods.base import renewed
from smidgen.planning.frozen_modules import frozen_prefix
from smidgen.planning.plans import Plan

# of a configuration, what says nothing of hidden states
_IDLE = ("_name_or_path", "architectures", "id2label", "label2id", "problem_type", "transformers_version")
_LABELS = ("labels", "label", "label_ids")


def key(model: nn.Module, plan: Plan, rows: Rows, cut: Cut | None = None) -> str:
    """A digest of the tensors below the cut, the configuration, the place of the cut and all inputs.

    What is trained, the head and the labels are left out: they may change. Without a cut, as it is not known before
    its first filling, the digest is of the whole base and of everything that is edited.
    """
    return keys(model, plan, [rows], cut)[0]


def keys(model: nn.Module, plan: Plan, splits: Sequence[Rows], cut: Cut | None = None) -> list[str]:
    """The `key` of each split; the base, which is nearly all of it, is read once."""
    base = _base(model, plan, cut)
    found = []
    for rows in splits:
        digest = base.copy()
        for i in range(len(rows)):
            row = rows[i]
            for name in sorted(row):
                if name not in _LABELS:
                    digest.update(name.encode() + _bytes(row[name]))
        found.append(digest.hexdigest()[:32])
    return found


def _base(model: nn.Module, plan: Plan, cut: Cut | None) -> hashlib._Hash:
    """The digest before any inputs."""
    digest = hashlib.sha256()
    own = (*(name for name, _ in plan.head), *renewed(plan.recipe, model))
    base = Fingerprint.of(model, {*own, *(_above(cut) if cut else ())})
    config = getattr(model, "config", None)
    settings = {k: v for k, v in getattr(config, "to_dict", dict)().items() if k not in _IDLE}
    place = cut.place if cut else sorted(entry.site.path for entry in plan.entries)
    said = [base.architecture, base.structure, base.content, base.dtype, place, settings]
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for module in frozen_prefix(model, plan):
        for name, buffer in module.named_buffers():
            digest.update(name.encode() + _bytes(buffer))
    return digest


def _above(cut: Cut) -> list[str]:
    """Names of the parameters of the blocks above the cut, without those of modules that stand still."""
    below = {id(parameter) for module in cut.inner for parameter in module.parameters()}
    above = {id(p) for block in cut.blocks[cut.index :] for p in block.parameters()} - below
    return [name for name, p in cut.model.named_parameters(remove_duplicate=False) if id(p) in above]


def _bytes(value: object) -> bytes:
    if isinstance(value, Tensor):
        head, data = f"{tuple(value.shape)}{value.dtype}", value.detach().cpu().contiguous().reshape(-1)
        return head.encode() + data.view(torch.uint8).numpy().tobytes()
    if hasattr(value, "read_bytes"):  # a file: an image, a sound
        return bytes(value.read_bytes())
    array = np.asarray(value)
    return f"{array.shape}{array.dtype}".encode() + array.tobytes()
