"""The head: what the checkpoint lacked and what the class declares for its task. Outside the recipe, always trained.

Pooling is a field of the head. Where it differs from the class's own reading, one hook on the base model puts the
pooled vector at every position, so that whichever token the class reads, it reads the pooled one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from inspect import signature

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from smidgen.common.errors import AttachError
from smidgen.common.wrappers import is_plain
from smidgen.sites.module_kinds import kind_of, widths
from smidgen.sites.new_tensors import is_noted, models_in, new_names
from smidgen.sites.roles import within

POOLINGS = ("first", "mean", "last")


FIRST = frozenset(
    [
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "mpnet",
        "distilbert",
        "albert",
        "deberta",
        "deberta-v2",
        "modernbert",
        "vit",
        "deit",
    ]
)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the head's parameters, in the model's order; empty for a causal LM or a plain encoder.

    What the checkpoint lacked, anywhere, and what the class has for its task; of a model from `smidgen.load` that
    had this already, the layers as wide as the labels. In a module of one's own around a model of transformers, all
    parameters outside that model too.
    """
    return head_parts(model)[0]


def head_parts(model: nn.Module) -> tuple[tuple[str, ...], frozenset[str]]:
    """`head_names`, and which of these are there for the task, not just new in the base."""
    inner, names, new = models_in(model), _names(model), set(new_names(model) or ())
    task = {name for name in names if inner and not any(within(name, path) for path in inner)}
    for path, part in inner.items():
        start = f"{path}." if path else ""
        task |= {start + name for name in _for_task(part, {name.removeprefix(start) for name in new})}
    return tuple(name for name in names if name in task or name in new), frozenset(task)


def _for_task(model: PreTrainedModel, new: set[str]) -> set[str]:
    own, parameters = set(class_names(model)), dict(model.named_parameters())
    labels = getattr(model.config, "num_labels", 0)
    wide = {name for name in own if parameters[name].shape[:1] == (labels,)}
    return own if not is_noted(model) else (new & own) | wide or own


def class_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of what a class has for its task beside the base model; empty without a task, or if that is its output
    embedding."""
    if model.get_output_embeddings() is not None or is_plain(model):
        return ()
    base, names = model.base_model is not model, _names(model)
    start = f"{model.base_model_prefix}." if base else ""
    outside = tuple(name for name in names if base and not name.startswith(start))
    if outside or "For" not in type(model).__name__:
        return outside
    plain = _plain_names(model)  # no base model, or the head in it
    more = [name for name in names if plain is None or name.removeprefix(start) not in plain]
    wide = [name for name in more if _is_output(model, name)]
    if plain is None or not wide:
        return tuple(wide)
    tops = {_whole_in(set(more), names, name) for name in wide} if base else {""}
    return tuple(name for name in more if any(within(name, top) for top in tops))


def _plain_names(model: PreTrainedModel) -> set[str] | None:
    """Names of the parameters of the class without a task for the same configuration; None if there is none."""
    config = copy.deepcopy(model.config)
    try:
        with torch.device("meta"):
            return {name for name, _ in AutoModel.from_config(config, trust_remote_code=False).named_parameters()}
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError, ImportError):
        return None


def _is_output(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a map with one output for each label."""
    module = model.get_submodule(name.rpartition(".")[0])
    return kind_of(module) in ("linear", "conv") and widths(module)[1] == getattr(model.config, "num_labels", 0)


def _whole_in(wanted: set[str], names: Iterable[str], name: str) -> str:
    """Path of the largest module around a parameter of which all parameters are wanted."""
    path = name
    while (outer := path.rpartition(".")[0]) and all(n in wanted for n in names if within(n, outer)):
        path = outer
    return path


def _names(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_parameters() if ".edits." not in f".{n}" and ".subsets." not in f".{n}"]


def own_pooling(model: nn.Module) -> str | None:
    """Which token the class itself reads, where that is known: "first" or "last"."""
    config: PreTrainedConfig | None = getattr(model, "config", None)
    if config is None:
        return None
    if config.model_type in FIRST and getattr(config, "classifier_pooling", "cls") == "cls":
        return "first"
    return "last" if isinstance(getattr(model, "score", None), nn.Linear) else None


def reads_end(model: nn.Module) -> bool:
    """Whether a head reads the last place of each row, padding or not (XLNet), so that texts have to end there."""
    return any(getattr(module, "summary_type", None) == "last" for module in model.modules())


def takes_positions(model: nn.Module) -> bool:
    """Whether positions of a text can be given that begin at 0: not where they are counted from a padding id on."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None)
    words = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    return "position_ids" in signature(model.forward).parameters and all(table is words for table in tables)


def check_pooling(model: nn.Module, pooling: str | None) -> str | None:
    """`pooling`, or None where it is what the class does anyway.

    Raises:
        AttachError: no such pooling, or a model without a head that reads one vector.
    """
    if pooling is None:
        return None
    if pooling not in POOLINGS:
        raise AttachError(f"pooling={pooling!r} is not one of {', '.join(POOLINGS)}")
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise AttachError(f"pooling needs a model for sequence classification, not {type(model).__name__}")
    return None if pooling == own_pooling(model) else pooling


def unused_under(model: nn.Module, pooling: str | None) -> tuple[str, ...]:
    """Names of parameters that a pooling leaves without effect: the base model's own pooler."""
    if pooling is None or not isinstance(model, PreTrainedModel):
        return ()
    prefix = f"{model.base_model_prefix}.pooler."
    return tuple(name for name, _ in model.named_parameters() if name.startswith(prefix))
