"""Server: a base and a bank of deltas, asked from Python; HTTP stands on top of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.common.errors import DataError, nearest
from smidgen.data.encoded import Cells
from smidgen.data.kinds.base import Question, TaskKind, kind_named
from smidgen.data.processor import Processor
from smidgen.delta.delta import Delta
from smidgen.inference.prediction import Prediction
from smidgen.serving.bank import Bank
from smidgen.serving.decoding import Completion, Generation, Pieces, check_writing, encode_prompt
from smidgen.serving.delta_store import BASE
from smidgen.serving.engine import Engine, Limits
from smidgen.serving.errors import ServingError, UnknownDeltaError
from smidgen.serving.model_pool import ModelPool
from smidgen.serving.requests import Request, Wanted
from smidgen.serving.sampling import Sampling
from smidgen.serving.served_model import ServedModel
from smidgen.serving.tenants import Profile, Tenant

CAUSAL_LM, HEADLESS = "AutoModelForCausalLM", "AutoModel"


class Server:
    """Answers for many deltas of one base; any number of threads may ask. Close it, or use it in `with`.

    Rows of one batch have different deltas, and the untouched base is one more ("base"). A delta that rows cannot share
    a batch with is refused when it is added, or first loaded.

    Args:
        model: the base, which stays untouched; in a class that some of the deltas need. Others are loaded by its name.
        bank: the deltas, or the place where they lie; None to add them by `add`.
        processor: the model's tokenizer or other processor; None for that of its name.
        limits: how requests are put together.

    Raises:
        AttachError: something is attached to the model.
        ServingError: the place is no folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bank: Bank | str | os.PathLike[str] | None = None,
        *,
        processor: Processor | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.bank = bank if isinstance(bank, Bank) else Bank(bank)
        self.models = ModelPool(model, processor)
        self.engine = Engine(limits)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer what has been taken, then stop. A second call does nothing."""
        self.engine.close()
        self.models.close()

    # Deltas

    def add(self, name: str, delta: Delta | str | os.PathLike[str]) -> Profile:
        """Add a delta, or its folder or hub id, or put it in the place of one of the same name.

        Requests that are under way are answered by the old one.

        Raises:
            ServingError: it is no name for a delta, or its kind of task is not served.
            DeltaError, AttachError: it does not fit the base, or cannot be mixed; what was there stays.
        """
        found = delta if isinstance(delta, Delta) else Delta.load(delta)
        return self.bank.put(name, found, self._make).profile

    def remove(self, name: str) -> None:
        """Take a delta away, with its file if the bank has a folder. Raises UnknownDeltaError if there is none."""
        self.bank.remove(name)

    def profile(self, name: str) -> Profile:
        """What is known of a delta; loads it. Raises as `Bank.tenant` does."""
        return self.bank.tenant(name, self._make).profile

    def describe(self, name: str) -> Profile:
        """What is known of a delta, from its JSON if it is not in memory.

        Raises:
            UnknownDeltaError: no delta has this name.
            DeltaError: its JSON is damaged.
        """
        found, store = self.bank.peek(name), self.bank.store
        if found is not None:
            return found.profile
        if name not in self.bank or store is None:
            raise UnknownDeltaError(f"no delta is called {name!r}{nearest(name, self.bank)}")
        return Profile.of_record(store.record(name))

    def _make(self, name: str, delta: Delta) -> Tenant:
        """A delta as a tenant of the base in the class that its kind of task takes."""
        kind = Profile.of(delta).task_kind
        if delta.info.get("task") is None:
            own = self.models.first
            if type(own.plain).__name__ == delta.info.get("model_class", type(own.plain).__name__):
                return own.tenant(name, delta)
        model = self.models.of(kind, delta)
        if kind.model_class == CAUSAL_LM and not model.writes:
            check_writing(model)
            model.writes = True
        return model.tenant(name, delta)

    def _found(self, name: str | None) -> tuple[Tenant | None, TaskKind, ServedModel]:
        if name is None or name == BASE:
            return None, self._own_kind(), self.models.first
        tenant = self.bank.tenant(name, self._make)
        if tenant.profile.kind is None:
            return tenant, self._own_kind(), self.models.first
        kind = tenant.profile.task_kind
        return tenant, kind, self.models.of(kind)

    def _own_kind(self) -> TaskKind:
        """The kind of task of the class that the base came in; of several, the first that is registered."""
        model = self.models.first.plain
        for kind in TaskKind.registry.values():
            mapping: Any = getattr(_auto(kind), "_model_mapping", None)
            found = None if mapping is None else mapping.get(type(model.config), None)
            classes = found if isinstance(found, tuple | list) else (found,)
            if type(model) in classes:
                return kind
        return kind_named("classification")

    # Questions

    def predict(
        self,
        name: str | None,
        texts: Sequence[object],
        *,
        pairs: Sequence[object] | None = None,
        max_new_tokens: int = 64,
        timeout: float | None = None,
    ) -> list[Prediction]:
        """What a delta's model says about inputs, as `smidgen.predict` does alone.

        Args:
            name: of the delta; None or "base" for the untouched base.
            texts: strings, for tokens also lists of words; images and sounds as their kinds take them.
            pairs: the second text of each, for tasks of two.
            timeout: seconds to wait.

        Raises:
            UnknownDeltaError, QueueFullError, ClosedError: see there.
            DataError: no inputs, or one where the task takes two.
            TimeoutError: it took longer.
        """
        tenant, kind, model = self._found(name)
        if kind.model_class == CAUSAL_LM:
            return [self._continued(tenant, model, text, max_new_tokens, timeout) for text in texts]
        if tenant is None and kind.model_class == HEADLESS:
            raise ServingError(
                f"the base, a {type(model.plain).__name__}, has no head: name a delta, or ask for embeddings"
            )
        profile = tenant.profile if tenant is not None else _base_profile(model, kind)
        _check(texts, pairs, len(kind.asked(profile.columns)))

        def run(columns: Cells) -> list[tuple[Tensor, Tensor | None]]:
            requests = self._requests(tenant, kind, model, profile, columns, "logits")
            return self._computed(requests, timeout)

        seconds = None if pairs is None else list(pairs)
        names, limit = profile.labels, profile.max_length
        question = Question(
            list(texts), seconds, profile.columns, names, run, model.plain, model.processor, max_new_tokens, limit
        )
        answers = kind.answers(question)
        _check_finite(answers)
        each = zip(answers, seconds or [None] * len(answers), strict=True)
        return [Prediction(a.text, a.answer, None if pair is None else str(pair), a.probabilities) for a, pair in each]

    def embed(self, name: str | None, texts: Sequence[str], *, timeout: float | None = None) -> Tensor:
        """The mean of the last hidden states over each text's tokens, of length 1, as `pairs` tasks compare: (n, d).

        Raises as `predict` does.
        """
        tenant, _, model = self._found(name)
        kind = kind_named("classification")
        profile = tenant.profile if tenant is not None else _base_profile(model, kind)
        requests = self._requests(tenant, kind, model, profile, {"text": list(texts)}, "vector")
        return torch.stack([vector for vector, _ in self._computed(requests, timeout)])

    def generate(
        self, name: str | None, prompt: str, sampling: Sampling | None = None, *, timeout: float | None = None
    ) -> Completion:
        """Write on from a prompt. Raises as `predict` does, and ServingError for an empty or too long prompt."""
        return self.begin(name, prompt, sampling).future.result(timeout)

    def stream(self, name: str | None, prompt: str, sampling: Sampling | None = None) -> Iterator[str]:
        """The same, piece by piece."""
        return self.begin(name, prompt, sampling).stream()

    def begin(
        self,
        name: str | None,
        prompt: str | Sequence[object],
        sampling: Sampling | None = None,
        *,
        pieces: Pieces | None = None,
    ) -> Generation:
        """Let a text be written, and give it to wait for.

        Args:
            prompt: a text, or messages of a chat.
            pieces: where pieces of text are put as they come, and None behind the last one; by default a queue.
        """
        tenant, kind, model = self._found(name)
        if kind.model_class != CAUSAL_LM:
            raise ServingError(f"{name or BASE!r} answers {kind.name} tasks and writes no text; use predict")
        text = Generation(model, tenant, _ids(model, prompt), sampling or Sampling())
        if pieces is not None:
            text.pieces = pieces
        self.engine.write(text)
        return text

    def _continued(
        self, tenant: Tenant | None, model: ServedModel, text: object, count: int, timeout: float | None
    ) -> Prediction:
        one = Generation(model, tenant, _ids(model, text), Sampling(max_tokens=count))
        self.engine.write(one)
        return Prediction(str(text), one.future.result(timeout).text)

    def _requests(
        self,
        tenant: Tenant | None,
        kind: TaskKind,
        model: ServedModel,
        profile: Profile,
        columns: Cells,
        wanted: Wanted,
    ) -> list[Request]:
        """A request for each row of some columns, encoded as the kind does."""
        names = tuple(name for name in columns if name != "labels")
        label = "labels" if "labels" in columns else None
        encoded = kind.encode(_rows(kind, columns), model.processor, names, label, profile.max_length)
        own_head = wanted == "logits" and tenant is not None and bool(profile.labels)
        width = kind.width(profile.labels) if own_head else None
        one = Request(model, tenant, kind, {}, wanted, width, 0)
        return [_for(one, example, kind.length(example)) for example in encoded]

    def _computed(self, requests: Sequence[Request], timeout: float | None) -> list[tuple[Tensor, Tensor | None]]:
        self.engine.submit(requests)
        return [request.future.result(timeout) for request in requests]


def _ids(model: ServedModel, prompt: object) -> list[int]:
    """Ids of a text, or of messages, which bring their own special tokens."""
    if isinstance(prompt, list | tuple):
        return encode_prompt(model, render_chat(model, prompt), special=False)
    return encode_prompt(model, str(prompt))


def render_chat(model: ServedModel, messages: Sequence[object]) -> str:
    """Messages as the model's template writes them. Raises ServingError if it has none."""
    tokenizer: Any = model.processor
    if getattr(tokenizer, "chat_template", None) is None:
        raise ServingError("the model's tokenizer has no chat template; ask for a completion instead")
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template says to messages that it does not know
        raise ServingError(f"the model's chat template refuses the messages: {error}") from None
    return text


class _Rows(dict[str, list[Any]]):
    """Columns in place of a Dataset: kinds of text read them chunk by chunk and ask for no more."""

    def __len__(self) -> int:
        return len(next(iter(self.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return {name: values[key] for name, values in self.items()}
        return super().__getitem__(key)


def _rows(kind: TaskKind, columns: Cells) -> Dataset:
    """The columns as `encode` reads them."""
    found: Any = _Rows(columns) if kind.processor_class == TaskKind.processor_class else Dataset.from_dict(columns)
    return found


def _for(one: Request, example: Any, length: int) -> Request:
    """A request like another, of an example of its own."""
    return replace(one, example=example, length=length, future=Future())


def _auto(kind: TaskKind) -> object:
    """The class of transformers that a kind of task loads."""
    return getattr(transformers, kind.model_class, None)


def _base_profile(model: ServedModel, kind: TaskKind) -> Profile:
    names = getattr(model.plain.config, "id2label", None) or {}
    labels = tuple(str(names[i]) for i in sorted(names))
    return Profile("", kind.name, ("text",), labels, None, {}, 0, 0)


def _check(texts: Sequence[object], pairs: Sequence[object] | None, wanted: int) -> None:
    if not texts:
        raise DataError("there are no inputs to predict")
    if (pairs is not None) != (wanted == 2):
        hint = "give the second ones as well" if wanted == 2 else "leave out the second ones"
        raise DataError(f"the delta's task takes {wanted} text{'s' * (wanted > 1)} each; {hint}")
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"{len(texts)} texts and {len(pairs)} pairs: they go together one by one")


def _check_finite(answers: Sequence[Any]) -> None:
    """Raises ServingError where a model says NaN."""
    for answer in answers:
        numbers = [*answer.probabilities.values(), *([answer.answer] if isinstance(answer.answer, float) else [])]
        if any(number != number or number in (float("inf"), float("-inf")) for number in numbers):
            raise ServingError("the model's outputs are not finite (NaN): the delta, or the base, is damaged")
