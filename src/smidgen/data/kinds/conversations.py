"""Chat: conversations, of which a causal language model learns what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from pyarrow import ArrowException
from torch import nn

from smidgen.common.errors import DataError
from smidgen.data.columns import TARGETS, Columns, known_columns
from smidgen.data.encoded import Column, Encoded, tokens_of
from smidgen.data.kinds.base import Batch, generated
from smidgen.data.kinds.causal_lm import CHAT, CausalLM
from smidgen.data.metrics import LOSS, PERPLEXITY
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.readers import FORMATS, read_rows
from smidgen.data.text.causal_lm import conversation_tokens
from smidgen.data.text.chat_forms import CLAIMED, FORMS, chat_columns, fitting_forms, read_conversations
from smidgen.data.text.chat_turns import answer_spans, whole_turns
from smidgen.data.text.encoding import text_length
from smidgen.data.text.final_answers import FINAL_ANSWER


class Chat(CausalLM):
    """Conversations by the tokenizer's chat template, of which what the assistant says is learned.

    The columns of a source may have any form of `smidgen.data.text.chat_forms`; a task has one, "messages".
    """

    name = "chat"
    written = (FINAL_ANSWER,)
    metrics = (PERPLEXITY, LOSS, *written)
    usual = ("perplexity", "loss")
    reads_prose = False
    converses = True
    samples = 4

    def claims(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns | None:
        """Forms that nothing but a conversation has, and no column that could be a label."""
        found = fitting_forms(rows.column_names, CLAIMED)
        if text or label or known_columns(rows.column_names, TARGETS) or len(found) != 1:
            return None
        return self.columns(rows, found[0], None)

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """One column, "messages", made of those of the source. Raises DataError if a label is given."""
        if label is not None:
            raise DataError(f"a {self.name} task has no label column: leave out label={label!r}")
        return Columns(self.name, CHAT, None, source=chat_columns(rows, text))

    def inputs(self, rows: Dataset, split: str, columns: Columns) -> Dataset:
        """The conversations, read and checked. Raises DataError if one is none."""
        found = read_conversations(rows, columns.source, split)
        try:
            return Dataset.from_dict({CHAT[0]: found})
        except (ArrowException, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"fields of {split}'s turns beside role and content differ in type ({reason})") from error

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Conversations as the template writes them, cut where an answer ends.

        Raises:
            DataError: the tokenizer has no template, or the template refuses a conversation.
        """
        tokenizer = tokenizer_in(processor, self.name)
        length = text_length(tokenizer, max_length)
        examples, truncated, dropped = whole_turns(conversation_tokens(rows[CHAT[0]][:], tokenizer), length)
        return Encoded(examples, length, truncated, dropped)

    def right_texts(self, example: Mapping[str, object], processor: Processor) -> list[str]:
        """What the assistant says last."""
        begin, end = answer_spans(tokens_of(example, "labels"))[-1]
        ids = list(tokens_of(example)[begin:end])
        return [str(tokenizer_in(processor, self.name).decode(ids, skip_special_tokens=True)).strip()]

    def asked_text(self, example: Mapping[str, object], processor: Processor) -> str:
        """All that stands before that, with the template's own words."""
        begin, _ = answer_spans(tokens_of(example, "labels"))[-1]
        ids = list(tokens_of(example)[:begin])
        return str(tokenizer_in(processor, self.name).decode(ids, skip_special_tokens=True)).strip()

    def write(self, model: nn.Module, batch: Batch, processor: Processor, max_new_tokens: int) -> list[str]:
        """The last answer of each conversation, written greedily from what stands before it."""
        tokenizer = tokenizer_in(processor, self.name)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist(), strict=True)
        prompts = [_before_the_last(ids, mask, labels) for ids, mask, labels in rows]
        width = max(map(len, prompts))
        padded = [[pad] * (width - len(ids)) + ids for ids in prompts]
        masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        left = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}
        ids = generated(model, left, max_new_tokens, pad_token_id=pad)
        texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def read_inputs(self, path: Path) -> Column | None:
        """Conversations in any form but "messages", which is read as rows are."""
        if FORMATS.get(path.suffix.lower(), "text") in ("text", "tagged") or not path.is_file():
            return None
        rows, _ = read_rows(path)
        if CHAT[0] in rows.column_names or not fitting_forms(rows.column_names, FORMS):
            return None
        return read_conversations(rows, chat_columns(rows, None), path.name)


def _before_the_last(ids: Sequence[int], mask: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Ids before the last answer, padding apart."""
    begin, _ = answer_spans(labels)[-1]
    return [token for token, seen in zip(ids[:begin], mask, strict=False) if seen]
