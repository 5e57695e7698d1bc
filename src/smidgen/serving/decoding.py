"""Continuous batching: texts of a causal LM that grow together, a token a step; new ones join, finished ones leave.

transformers' own continuous batching puts the tokens of all texts into one row, where an edit could not tell whose
token is whose. Here each text has a row. The cache is one tensor for each layer, padded on the left: a text that joins
gets its keys and values in a pass of its own, and is padded to the others' length, or they to its.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from smidgen.ports.forward_state import mixed
from smidgen.serving.errors import ServingError
from smidgen.serving.sampling import Sampler, Sampling
from smidgen.serving.served_model import ServedModel
from smidgen.serving.tenants import Tenant
from smidgen.serving.text_stream import TextStream


@dataclass(frozen=True)
class Completion:
    """A text that was written.

    Attributes:
        text: without the stop string.
        reason: "stop" at a stop string or an end token, "length" at max_tokens or the model's limit.
        prompt_tokens, tokens: numbers of tokens read and written.
    """

    text: str
    reason: str
    prompt_tokens: int
    tokens: int


class Pieces(Protocol):
    """Where a text is put as it is written."""

    def put(self, piece: str | None, /) -> None:
        """One more piece; None behind the last one."""


@dataclass(eq=False)
class Generation:
    """A text that is being written.

    Attributes:
        ids: of the prompt.
        future: of the whole; a failed one holds the error.
        pieces: where text is put as it comes, then None.
        abandoned: nobody waits for it any more.
    """

    model: ServedModel
    tenant: Tenant | None
    ids: list[int]
    sampling: Sampling
    future: Future[Completion] = field(default_factory=Future)
    pieces: Pieces = field(default_factory=queue.SimpleQueue[str | None])
    abandoned: bool = False

    def __post_init__(self) -> None:
        tokenizer: Any = self.model.processor
        self.sampler, self.text = Sampler(self.sampling), TextStream(tokenizer, self.sampling.stop)
        self.written: list[int] = []

    @property
    def group(self) -> tuple[int, int]:
        """Texts of one group can be written together."""
        return (id(self.model), 0 if self.tenant is None else self.tenant.prompt)

    @property
    def order(self) -> str:
        """Rows of one layout stand together."""
        return "" if self.tenant is None else self.tenant.order

    def take(self, logits: Tensor, ends: frozenset[int], room: int) -> bool:
        """Add the next token of logits (V,); whether the text is finished.

        Args:
            ends: ids that end a text.
            room: how many tokens the model has positions for.
        """
        token = self.sampler(logits)
        if token in ends:
            return self._finish("stop")
        self.written.append(token)
        piece, stopped = self.text.add(token)
        if piece:
            self.pieces.put(piece)
        if stopped:
            return self._finish("stop")
        if len(self.written) >= self.sampling.max_tokens or len(self.ids) + len(self.written) >= room:
            return self._finish("length")
        return False

    def _finish(self, reason: str) -> bool:
        rest = self.text.end()
        if rest:
            self.pieces.put(rest)
        self.pieces.put(None)
        self.future.set_result(Completion(self.text.whole, reason, len(self.ids), len(self.written)))
        return True

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self.future.set_exception(error)
        self.pieces.put(None)

    def stream(self) -> Iterator[str]:
        """The text, piece by piece. Raises the error that ended it, if one did."""
        assert isinstance(self.pieces, queue.SimpleQueue)
        while (piece := self.pieces.get()) is not None:
            yield piece
        self.future.result()


class Decoding:
    """The texts of one model that are being written, in the rows of one batch."""

    def __init__(self, model: ServedModel) -> None:
        self.model, self.texts = model, list[Generation]()
        self.cache: Any = DynamicCache()  # keys and values (B, H, S, h) of each layer
        self.mask = torch.zeros(0, 0, dtype=torch.long)  # (B, text's part of S)
        self.last = torch.zeros(0, dtype=torch.long)  # (B,) the newest token of each, not in the cache yet
        self.ends, self.room = end_tokens(model), position_room(model)

    def __len__(self) -> int:
        return len(self.texts)

    def join(self, texts: Sequence[Generation]) -> None:
        """Read the prompts of new texts and let them stand with the others; errors go to the new texts alone."""
        texts = sorted(texts, key=lambda text: text.order)
        try:
            self._join(texts)
        except Exception as error:  # told to whoever asked; the others go on
            if len(texts) == 1:
                texts[0].fail(error)
                return
            for text in texts:
                self.join([text])

    def _join(self, texts: Sequence[Generation]) -> None:
        longest = max(len(text.ids) for text in texts)
        ids = torch.tensor([[0] * (longest - len(text.ids)) + text.ids for text in texts])
        mask = torch.tensor([[0] * (longest - len(text.ids)) + [1] * len(text.ids) for text in texts])
        fresh = Decoding(self.model)
        fresh.texts, fresh.mask = list(texts), mask.to(self.model.device)
        logits = fresh._forward(ids.to(self.model.device))
        fresh._take(logits)
        self._beside(fresh)

    def _beside(self, fresh: Decoding) -> None:
        """Take over another's rows, and put all in the order of their layouts."""
        if not fresh.texts:
            return
        if not self.texts:
            self.cache, self.mask, self.last, self.texts = fresh.cache, fresh.mask, fresh.last, fresh.texts
            return
        width = max(self.mask.shape[1], fresh.mask.shape[1])
        mine, theirs = width - self.mask.shape[1], width - fresh.mask.shape[1]
        for layer, other in zip(layers_of(self.cache), layers_of(fresh.cache), strict=True):
            layer.keys = _joined(layer.keys, mine, other.keys, theirs)
            layer.values = _joined(layer.values, mine, other.values, theirs)
        self.mask = torch.cat([F.pad(self.mask, (mine, 0)), F.pad(fresh.mask, (theirs, 0))])
        self.last = torch.cat([self.last, fresh.last])
        self.texts = self.texts + fresh.texts
        self._keep(sorted(range(len(self.texts)), key=lambda i: self.texts[i].order))

    def step(self) -> None:
        """One more token for each text."""
        gone = [i for i, text in enumerate(self.texts) if text.abandoned]
        if gone:
            for i in gone:
                self.texts[i].fail(ServingError("whoever asked for the text has gone"))
            self._keep([i for i in range(len(self.texts)) if i not in gone])
            if not self.texts:
                return
        self.mask = F.pad(self.mask, (0, 1), value=1)
        try:
            self._take(self._forward(self.last[:, None]))
        except Exception as error:  # told to whoever asked; the engine goes on
            for text in self.texts:
                if not text.future.done():
                    text.fail(error)
            self._keep([])

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits (B, V) behind some more tokens (B, n), whose keys and values join the cache."""
        model = self.model
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given: dict[str, object] = {"input_ids": ids, "attention_mask": self.mask, "past_key_values": self.cache}
        if model.takes_positions:
            given["position_ids"] = positions
        with model.lock, torch.inference_mode(), mixed(model.mix([text.tenant for text in self.texts])):
            begin = time.perf_counter()
            outputs = model.model(**given, use_cache=True, logits_to_keep=1)
            model.forward_seconds += time.perf_counter() - begin
        self.cache = getattr(outputs, "past_key_values", None)
        layers_of(self.cache)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _take(self, logits: Tensor) -> None:
        """Choose each text's next token; those that are finished, or failed, leave."""
        going, tokens = [], []
        for i, (text, row) in enumerate(zip(self.texts, logits.float().cpu(), strict=True)):
            try:
                finished = text.take(row, self.ends, self.room)
            except Exception as error:  # such as logits that are not finite: of this text alone
                text.fail(error)
                continue
            if not finished:
                going.append(i)
                tokens.append(text.written[-1])
        self._keep(going)
        self.last = torch.tensor(tokens, dtype=torch.long, device=self.mask.device)

    def _keep(self, rows: Sequence[int]) -> None:
        """Some rows alone, in an order; columns in front that are padding to all of them go."""
        if list(rows) == list(range(len(self.texts))):
            return
        self.texts = [self.texts[i] for i in rows]
        if not rows:
            self.cache, self.mask, self.last = DynamicCache(), self.mask[:0, :0], self.last[:0]
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        empty = int((self.mask.sum(0) > 0).long().argmax())
        self.mask = self.mask[:, empty:]
        for layer in layers_of(self.cache):
            layer.keys, layer.values = layer.keys[index][:, :, empty:], layer.values[index][:, :, empty:]
        self.last = self.last[index] if len(self.last) else self.last


def _joined(mine: Tensor, pad_mine: int, theirs: Tensor, pad_theirs: int) -> Tensor:
    """Two caches (B, H, S, h), each padded in front by so many places, as rows of one."""
    return torch.cat([F.pad(mine, (0, 0, pad_mine, 0)), F.pad(theirs, (0, 0, pad_theirs, 0))])


def check_writing(model: ServedModel) -> None:
    """Raises ServingError, or what the model says, if it cannot write texts side by side. Two tokens are written."""
    text = Generation(model, None, [1], Sampling(max_tokens=2))
    decoding = Decoding(model)
    decoding.ends = frozenset()
    decoding.join([text])
    while decoding.texts:
        decoding.step()
    text.future.result()


def layers_of(cache: object) -> list[Any]:
    """Layers of a cache, with keys and values each.

    Raises:
        ServingError: the model keeps something else of a text, such as the state of a recurrence.
    """
    layers = list(getattr(cache, "layers", ()))
    if not layers or not all(isinstance(layer, DynamicLayer) and layer.keys is not None for layer in layers):
        raise ServingError(
            "the model does not keep all keys and values of a text, layer by layer, but such as the state of a "
            "recurrence: its texts cannot be written side by side; use smidgen.predict"
        )
    return layers


def end_tokens(model: ServedModel) -> frozenset[int]:
    """Ids at which a text ends."""
    tokenizer: Any = model.processor
    config: object = getattr(model.plain, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return frozenset(i for i in (*ids, getattr(tokenizer, "eos_token_id", None)) if i is not None)


def position_room(model: ServedModel) -> int:
    """How many tokens a text may have, read and written."""
    config: object = model.plain.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else 2**31


def encode_prompt(model: ServedModel, text: str, special: bool = True) -> list[int]:
    """Ids of a prompt. Raises ServingError if it is empty, or leaves no room to write."""
    tokenizer = model.processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ServingError(f"{type(model.plain).__name__} has no tokenizer, so it writes no text")
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise ServingError("the prompt is empty; give at least a word")
    room = position_room(model)
    if len(ids) >= room:
        raise ServingError(f"the prompt has {len(ids)} tokens, and the model has {room} positions for the whole text")
    return ids
