"""Tune a smidgen of a pretrained model: find the few parameters that matter, train only those, ship kilobytes.

The public names and nothing else. They are loaded when first used, so that `import smidgen` is quick.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from smidgen.version import __version__

if TYPE_CHECKING:
    from smidgen.arithmetic import Sum, average, dare, ties
    from smidgen.attach import attach, attached, detach, disabled, print_trainable_parameters
    from smidgen.data import Task
    from smidgen.delta import Delta
    from smidgen.deltas import Deltas
    from smidgen.doctor import Diagnosis, doctor
    from smidgen.errors import SmidgenError
    from smidgen.estimate import plan
    from smidgen.evaluate import evaluate
    from smidgen.merge import RoundingWarning, merge
    from smidgen.method import Method
    from smidgen.methods.adapter import Adapter
    from smidgen.methods.bitfit import BitFit
    from smidgen.methods.compacter import Compacter
    from smidgen.methods.dora import DoRA
    from smidgen.methods.full import Full
    from smidgen.methods.head import Head
    from smidgen.methods.ia3 import IA3
    from smidgen.methods.ln import LN
    from smidgen.methods.lofit import LoFiT
    from smidgen.methods.lora import LoRA
    from smidgen.methods.mos import MoS
    from smidgen.methods.pissa import PiSSA
    from smidgen.methods.prefix import Prefix
    from smidgen.methods.prompt_tuning import PromptTuning
    from smidgen.methods.ssf import SSF
    from smidgen.methods.triadapt import TriAdaptLoRA
    from smidgen.models import load
    from smidgen.objective import Objective, StayClose, TaskLoss
    from smidgen.optim import optimizer, parameter_groups
    from smidgen.penalties import penalty
    from smidgen.plan import Plan
    from smidgen.predict import Prediction, predict
    from smidgen.recipe import Recipe, parse
    from smidgen.room import largest_batch, parse_bytes
    from smidgen.scores.fisher import fisher, mean_gradients
    from smidgen.search import SearchWarning, search
    from smidgen.select import score, select, selection_of
    from smidgen.selection.budget import SelectionWarning
    from smidgen.selection.chosen import Selection
    from smidgen.selection.combine import combine
    from smidgen.selection.term import Select
    from smidgen.sites import Site, find_sites
    from smidgen.speed.recompute import recomputing
    from smidgen.train import fit
    from smidgen.trainer import TrainerCallback
    from smidgen.trials import Search, Trial
    from smidgen.untie import UntiedWarning

_HOMES = {
    "arithmetic": ("Sum", "average", "dare", "ties"),
    "attach": ("attach", "attached", "detach", "disabled", "print_trainable_parameters"),
    "data": ("Task",),
    "delta": ("Delta",),
    "deltas": ("Deltas",),
    "doctor": ("Diagnosis", "doctor"),
    "errors": ("SmidgenError",),
    "events": ("after_step",),
    "estimate": ("plan",),
    "evaluate": ("evaluate",),
    "merge": ("RoundingWarning", "merge"),
    "method": ("Method",),
    "models": ("load",),
    "objective": ("Objective", "StayClose", "TaskLoss"),
    "optim": ("optimizer", "parameter_groups"),
    "penalties": ("penalty",),
    "plan": ("Plan",),
    "predict": ("Prediction", "predict"),
    "recipe": ("Recipe", "parse"),
    "room": ("largest_batch", "parse_bytes"),
    "scores.fisher": ("fisher", "mean_gradients"),
    "search": ("SearchWarning", "search"),
    "select": ("score", "select", "selection_of"),
    "selection.budget": ("SelectionWarning",),
    "selection.chosen": ("Selection",),
    "selection.combine": ("combine",),
    "selection.term": ("Select",),
    "sites": ("Site", "find_sites"),
    "speed.recompute": ("recomputing",),
    "train": ("fit",),
    "trainer": ("TrainerCallback",),
    "trials": ("Search", "Trial"),
    "untie": ("UntiedWarning",),
}

_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IA3", "LN", "SSF", "Adapter", "BitFit", "Compacter", "DoRA", "Full", "Head", "LoFiT", "LoRA", "MoS", "PiSSA",
    "Prefix", "PromptTuning", "TriAdaptLoRA", "__version__", *_HOME,
]  # fmt: skip


class _Package(ModuleType):
    """A package whose submodules do not hide the functions of the same name (attach, merge, evaluate, plan)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME and not name[:1].isupper():  # `from smidgen import cli` asks here before it imports the module
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("smidgen.methods")
    if name in _HOME:
        value = getattr(import_module(f"smidgen.{_HOME[name]}"), name)
    else:  # a method, by the name that it is registered under
        from smidgen.recipe import Term

        if name not in Term.registry:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = Term.registry[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
