"""Server: a base and a bank of deltas, asked from Python; HTTP stands on top of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smidgen.common.errors import nearest
from smidgen.data.encoded import Cells
from smidgen.data.kinds.base import Question, TaskKind, kind_named
from smidgen.data.kinds.media_kind import MediaClassification
from smidgen.data.processor import Processor
from smidgen.delta.delta import Delta
from smidgen.inference.prediction import Prediction, answers_to, check_texts, encode_inputs
from smidgen.inference.task_record import TaskRecord
from smidgen.serving.bank import Bank
from smidgen.serving.decoding import Completion, Generation, Pieces, check_writing, encode_prompt
from smidgen.serving.delta_store import BASE
from smidgen.serving.engine import Engine, Limits
from smidgen.serving.errors import ServingError, UnknownDeltaError
from smidgen.serving.model_pool import ModelPool
from smidgen.serving.requests import Request, Wanted
from smidgen.serving.sampling import Sampling
from smidgen.serving.served_kinds import NoModel, check_served
from smidgen.serving.served_model import ServedModel
from smidgen.serving.tenants import Profile, Tenant

Found = TypeVar("Found")
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

    def describe(self, name: str) -> Profile:
        """What is known of a delta, from its JSON if it is not in memory.

        Raises:
            UnknownDeltaError: no delta has this name.
            DeltaError: its JSON is damaged.
        """
        self.bank.look(name)
        found, store = self.bank.peek(name), self.bank.store
        if found is not None:
            return found.profile
        if name not in self.bank or store is None:
            raise UnknownDeltaError(f"no delta is called {name!r}{nearest(name, self.bank)}")
        return Profile.of_record(store.record(name))

    def _make(self, name: str, delta: Delta) -> Tenant:
        """A delta as a tenant of the base in the class that its kind of task takes."""
        task = TaskRecord.of(delta.info)
        check_served(task.task_kind)
        kind, model = self._placed(task, delta)
        if kind.model_class == CAUSAL_LM and not model.writes:
            check_writing(model)
            model.writes = True
        return model.tenant(name, delta)

    def _placed(self, task: TaskRecord, delta: Delta | None = None) -> tuple[TaskKind, ServedModel]:
        """The kind of a recorded task, and the base in its class; of no task the base as it came."""
        if task.kind is None:
            return self.models.own_kind, self.models.first
        return task.task_kind, self.models.of(task.task_kind, delta)

    def _asked(self, name: str | None) -> Recipient:
        """Whom a question is for. Raises as `Bank.tenant` does."""
        if name is None or name == BASE:
            model, kind = self.models.first, self.models.own_kind
            return Recipient(None, TaskRecord(kind.name, ("text",), None), _base_labels(model), kind, model)
        tenant = self.bank.tenant(name, self._make)
        kind, model = self._placed(tenant.profile.task)
        return Recipient(tenant, replace(tenant.profile.task, kind=kind.name), tenant.profile.labels, kind, model)

    # Questions

    def reads_files(self, name: str | None) -> bool:
        """Whether a delta's inputs are images or sounds. Raises UnknownDeltaError if there is none of that name."""
        return isinstance(self._asked(name).kind, MediaClassification)

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
        asked = self._asked(name)
        check_texts(texts, pairs, asked.task.asked)
        if asked.kind.model_class == CAUSAL_LM:
            return self._written(asked, texts, Sampling(max_tokens=max_new_tokens), timeout)
        if asked.tenant is None and asked.kind.model_class == HEADLESS:
            raise ServingError(
                f"the base, a {type(asked.model.plain).__name__}, has no head: name a delta, or ask for embeddings"
            )

        check_served(asked.kind)

        def run(columns: Cells) -> list[tuple[Tensor, Tensor | None]]:
            return self._computed(asked.requests(columns, "logits"), timeout)

        question = Question(
            list(texts), None if pairs is None else list(pairs), asked.task.columns, asked.labels, run,
            cast(PreTrainedModel, NoModel(asked.kind)), asked.model.processor, max_new_tokens, asked.task.max_length,
        )  # fmt: skip
        found = answers_to(asked.kind, question)
        _check_finite(found)
        return found

    def embed(self, name: str | None, texts: Sequence[str], *, timeout: float | None = None) -> Tensor:
        """The mean of the last hidden states over each text's tokens, of length 1, as `pairs` tasks compare: (n, d).

        Raises as `predict` does.
        """
        asked = self._asked(name)
        text = kind_named("classification")  # one text, whatever the task takes
        plain = replace(asked, kind=text, task=replace(asked.task, kind=text.name, columns=("text",)))
        requests = plain.requests({"text": list(texts)}, "vector")
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
        return self._begin(self._writer(name), prompt, sampling or Sampling(), pieces)

    def check_chat(self, name: str | None) -> None:
        """Raises as `begin` does for messages: nothing writes texts there, or its tokenizer has no chat template."""
        render_chat(self._writer(name).model, [{"role": "user", "content": "hello"}])

    def _writer(self, name: str | None) -> Recipient:
        """Whom a text is asked of. Raises ServingError if it writes none."""
        asked = self._asked(name)
        if asked.kind.model_class != CAUSAL_LM:
            raise ServingError(f"{name or BASE!r} answers {asked.kind.name} tasks and writes no text; use predict")
        return asked

    def _written(
        self, asked: Recipient, prompts: Sequence[object], sampling: Sampling, timeout: float | None
    ) -> list[Prediction]:
        """Continuations of several prompts, side by side."""
        begun = list[Generation]()
        try:
            begun += (self._begin(asked, prompt, sampling) for prompt in prompts)
            done = _results([text.future for text in begun], timeout)
        finally:
            for text in begun:
                text.abandoned = True  # of one that is done it says nothing
        return [Prediction(str(prompt), one.text) for prompt, one in zip(prompts, done, strict=True)]

    def _begin(self, asked: Recipient, prompt: object, sampling: Sampling, pieces: Pieces | None = None) -> Generation:
        """Let the engine write on from a text, or from messages."""
        text = Generation(asked.model, asked.tenant, _ids(asked.model, prompt), sampling)
        if pieces is not None:
            text.pieces = pieces
        self.engine.write(text)
        return text

    def _computed(self, requests: Sequence[Request], timeout: float | None) -> list[tuple[Tensor, Tensor | None]]:
        self.engine.submit(requests)
        return _results([request.future for request in requests], timeout)


@dataclass(frozen=True)
class Recipient:
    """Whom a question is for.

    Attributes:
        tenant: None for the untouched base.
        task: what its inputs are like; `kind` is named in any case.
        labels: names in id order.
        model: whose rows the inputs become.
    """

    tenant: Tenant | None
    task: TaskRecord
    labels: tuple[str, ...]
    kind: TaskKind
    model: ServedModel

    def requests(self, columns: Cells, wanted: Wanted) -> list[Request]:
        """A request for each row of some columns, encoded as the kind does."""
        own_head = wanted == "logits" and self.tenant is not None and bool(self.labels)
        width = self.kind.width(self.labels) if own_head else None
        return [
            Request(self.model, self.tenant, self.kind, example, wanted, width, self.kind.length(example))
            for example in encode_inputs(columns, self.task, self.model.processor)
        ]


def _results(futures: Sequence[Future[Found]], timeout: float | None) -> list[Found]:
    """What some futures hold, within a time for all; those that nobody waits for any more are not computed.

    Raises:
        TimeoutError: it took longer; or the first of their errors.
    """
    waiting = wait(futures, timeout, FIRST_EXCEPTION).not_done
    for future in waiting:
        future.cancel()
    for future in futures:
        if future not in waiting:
            future.result()
    if waiting:
        raise TimeoutError(f"no answer within {timeout} seconds")
    return [future.result() for future in futures]


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


def _base_labels(model: ServedModel) -> tuple[str, ...]:
    """Label names of a base, in id order."""
    names = getattr(model.plain.config, "id2label", None) or {}
    return tuple(str(names[i]) for i in sorted(names))


def _check_finite(answers: Sequence[Prediction]) -> None:
    """Raises ServingError where a model says NaN."""
    for answer in answers:
        numbers = [*answer.probabilities.values(), *([answer.answer] if isinstance(answer.answer, float) else [])]
        if any(number != number or number in (float("inf"), float("-inf")) for number in numbers):
            raise ServingError("the model's outputs are not finite (NaN): the delta, or the base, is damaged")
