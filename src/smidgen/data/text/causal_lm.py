"""Texts for causal language models: running text in blocks, prompt and completion, conversations.

The labels are the input ids themselves, as causal models shift them; what is not to be learned is -100.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import cast

from datasets import Dataset
from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from smidgen.common.errors import DataError
from smidgen.data.encoded import Example
from smidgen.data.labels import IGNORED
from smidgen.data.text.encoding import Part

Pair = tuple[list[int], list[int]]
Message = dict[str, str]
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def language(rows: Dataset, tokenizer: PreTrainedTokenizerBase, text: tuple[str, ...], length: int) -> Part:
    """Examples of at most `length` tokens, the number cut, and the number dropped as no label was left.

    One column of text: documents joined by the end token and cut into blocks without overlap; a last block of
    one token is left out. Two columns: prompt and completion, tokenized apart, only completion and end token
    learned. "messages": by the tokenizer's chat template, only what the assistant says, with what ends its
    turn, is learned. The two latter are cut on the right.

    Raises:
        DataError: the tokenizer lacks an end token or a chat template, or cannot show where the assistant
            speaks; nothing is left to learn.
    """
    if text == ("messages",):
        return _cut(conversation_tokens(rows["messages"][:], tokenizer), length)
    if len(text) == 2:
        return _cut(_completions(rows[text[0]][:], rows[text[1]][:], tokenizer), length)
    stream = _stream(rows[text[0]][:], tokenizer)
    blocks = [stream[i : i + length] for i in range(0, len(stream), length)]
    kept = [_example(block, list(block)) for block in blocks if len(block) > 1]
    if not kept:
        raise DataError(f"the texts have {len(stream)} tokens in all; at least 2 are needed to learn from")
    return kept, 0, 0


def _example(ids: list[int], labels: list[int]) -> Example:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _cut(pairs: Iterable[Pair], length: int) -> Part:
    """Examples cut to `length` tokens, how many were cut, and how many were left out with no label in what remained."""
    examples, truncated, dropped = [], 0, 0
    for ids, labels in pairs:
        truncated += len(ids) > length
        # A first token is never predicted, so its label teaches nothing.
        if all(value == IGNORED for value in labels[1:length]):
            dropped += 1
        else:
            examples.append(_example(ids[:length], labels[:length]))
    if not examples:
        raise DataError(f"nothing to learn is left in any of {dropped} examples cut to max_length={length}; "
                        "raise it, or check that there are completions or assistant turns")  # fmt: skip
    return examples, truncated, dropped


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token, if the tokenizer itself puts one before a text."""
    own, bos = tokenizer("")["input_ids"], tokenizer.bos_token_id
    return [bos] if bos is not None and own[:1] == [bos] else []


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end token; set tokenizer.eos_token")
    return end


def _stream(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    start, stream = _start(tokenizer), list[int]()
    for i, ids in enumerate(_ids(texts, tokenizer)):
        stream += [*([_end(tokenizer)] if i else []), *start, *ids]
    return stream


def _completions(prompts: list[str], completions: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[Pair]:
    start, end = _start(tokenizer), _end(tokenizer)
    for asked, said in zip(_ids(prompts, tokenizer), _ids(completions, tokenizer), strict=True):
        before, after = [*start, *asked], [*said, end]
        yield before + after, [IGNORED] * len(before) + after


def conversation_tokens(rows: list[list[Message]], tokenizer: PreTrainedTokenizerBase) -> Iterable[Pair]:
    """Token ids and labels of each conversation by the chat template; labels of assistant turns alone count.

    Raises:
        DataError: the tokenizer lacks a chat template, the template refuses a conversation or rewrites earlier turns.
    """
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, which messages need; use the model's chat version, put a "
                        "chat_template.jinja beside the tokenizer, or give the data as prompt and completion with "
                        "kind='causal-lm'")  # fmt: skip
    if not tokenizer.is_fast:
        raise DataError(f"messages need a fast tokenizer; {type(tokenizer).__name__} is not one")
    marked = _GENERATION.search(tokenizer.get_chat_template()) is not None
    for number, row in enumerate(rows):
        # datasets fills fields that only some messages have with None.
        messages = [{key: value for key, value in message.items() if value is not None} for message in row or []]
        if not messages or not all("role" in message for message in messages):
            raise DataError(f"messages of row {number} must be a list of {{role, content}}, found {str(row)[:80]}")
        try:
            yield (_marked if marked else _by_prefix)(messages, tokenizer, number)
        except TemplateError as error:
            raise DataError(f"the chat template refuses row {number}: {' '.join(str(error).split())}") from error


def _marked(messages: list[Message], tokenizer: PreTrainedTokenizerBase, number: int) -> Pair:
    """Assistant turns as the template itself marks them."""
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    out = cast(BatchEncoding, marked)
    ids, mask = list(out["input_ids"]), out["assistant_masks"]
    return ids, [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]


def _by_prefix(messages: list[Message], tokenizer: PreTrainedTokenizerBase, number: int) -> Pair:
    """Assistant turns as what rendering one more message adds, checked to be nothing but an addition."""
    whole = _render(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(messages[:i], tokenizer, add_generation_prompt=True) if i else ""
            after = _render(messages[: i + 1], tokenizer)
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(f"the chat template rewrites earlier turns at message {i} of row {number}, "
                                "so that what the assistant says cannot be told; mark it in the template by "
                                "{% generation %}")  # fmt: skip
            spans.append((len(before), len(after)))
    out = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], _within(out["input_ids"], out["offset_mapping"], spans)


def _within(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Token ids that begin within a span of characters, -100 for the others."""
    pairs = zip(ids, offsets, strict=True)
    return [token if any(a <= at < b for a, b in spans) and end > at else IGNORED for token, (at, end) in pairs]


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return str(text)
