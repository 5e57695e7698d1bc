"""The classes of one base, a classifier, a tagger, a causal LM; what they have in common is in memory once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from threading import RLock
from typing import Any, cast

import transformers
from transformers import PreTrainedModel

from smidgen.common.wrappers import bare
from smidgen.data.kinds.base import TaskKind, kind_named
from smidgen.data.processor import Processor
from smidgen.delta.delta import Delta
from smidgen.inference.loading import load
from smidgen.inference.processors import processor_of
from smidgen.ports.in_place.shared_parameters import share_parameters
from smidgen.serving.errors import ServingError
from smidgen.serving.served_model import ServedModel


class ModelPool:
    """Gives for each kind of task the base in the class that it needs; loaded when it is first needed.

    Args:
        model: the base in one class.
        processor: its tokenizer or other processor; None for that of the model's name.
    """

    def __init__(self, model: PreTrainedModel, processor: Processor | None = None) -> None:
        self.model, self._lock = bare(model), RLock()
        self.first = ServedModel(self.model, processor_of(self.model) if processor is None else processor)
        self._served: dict[str, ServedModel] = {type(self.model).__name__: self.first}

    @cached_property
    def own_kind(self) -> TaskKind:
        """The kind of task of the class that the base came in; of several, the first that is registered."""
        for kind in TaskKind.registry.values():
            if type(self.model) in classes_for(self.model, kind):
                return kind
        return kind_named("classification")

    def of(self, kind: TaskKind, delta: Delta | None = None) -> ServedModel:
        """The base for a kind of task.

        Args:
            delta: whose head shapes a class that is loaded; None takes what is there.

        Raises:
            ServingError: the base has no class for it, or does not say where it came from.
        """
        with self._lock:
            name = class_for(self.model, kind)
            if name not in self._served:
                self._served[name] = self._loaded(kind, name, delta)
            return self._served[name]

    def _loaded(self, kind: TaskKind, name: str, delta: Delta | None) -> ServedModel:
        """The base in a class that is not there yet, by its name."""
        source = getattr(self.model.config, "_name_or_path", "")
        if delta is None or not source:
            raise ServingError(
                f"a {kind.name} task needs the base as {name}, and it is a {type(self.model).__name__} that "
                "does not say where it came from; load it with smidgen.load"
            )
        dtype = next(self.model.parameters()).dtype
        model, processor = load(source, delta=delta, dtype=dtype)
        share_parameters(self.model, model)
        return ServedModel(model.to(cast(Any, self.model.device)), processor)

    @property
    def served(self) -> Mapping[str, ServedModel]:
        """Class name -> model."""
        return dict(self._served)

    def close(self) -> None:
        """Take everything off."""
        for served in self._served.values():
            served.close()


def classes_for(model: PreTrainedModel, kind: TaskKind) -> tuple[type, ...]:
    """The classes of transformers that a kind of task takes of a model's type, the usual one first."""
    auto: Any = getattr(transformers, kind.model_class)
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None:
        return (auto,)
    found = mapping.get(type(model.config), ())
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def class_for(model: PreTrainedModel, kind: TaskKind) -> str:
    """Name of the class that a kind of task takes of a model's type; the model's own if it fits.

    Raises:
        ServingError: transformers has none.
    """
    classes = classes_for(model, kind)
    if not classes:
        raise ServingError(
            f"transformers has no {kind.model_class} for {type(model.config).__name__}: {kind.name} tasks of this base "
            "are not served"
        )
    return (type(model) if type(model) in classes else classes[0]).__name__
