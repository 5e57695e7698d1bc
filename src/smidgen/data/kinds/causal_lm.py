"""Causal language modelling: running text, prompt and completion, or conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from smidgen.data.columns import TARGETS, Columns, check_text_types, known_columns, only_column
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Answer, Collate, Outputs, Pair, Question, TaskKind, generated
from smidgen.data.labels import IGNORED, LabelPlace
from smidgen.data.metrics import LOSS, PERPLEXITY, Metric
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.text.causal_lm import Message, language
from smidgen.data.text.collate import Collator
from smidgen.data.text.encoding import text_length

CHAT = ("messages",)
FORMS = (("prompt", "completion"), CHAT)


class CausalLM(TaskKind):
    """Text that a model goes on with; see `smidgen.data.text.causal_lm`. Labels are the ids, shifted by the model."""

    name = "causal-lm"
    model_class = "AutoModelForCausalLM"
    metrics: ClassVar[tuple[Metric, ...]] = (PERPLEXITY, LOSS)
    usual = ("perplexity", "loss")
    labels_at = LabelPlace.NEXT
    uncountable = "a vocabulary's continuations"
    many_per_row = True
    reads_prose = True
    unpackable = None
    label_dtype = None

    def claims(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns | None:
        """Prompt and completion, or messages, and no column that could be a label."""
        there = rows.column_names
        found = [form for form in FORMS if set(form) <= set(there)]
        if text or label or known_columns(there, TARGETS) or len(found) != 1:
            return None
        return self.columns(rows, found[0], None)

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """One column of text, two of prompt and completion, or messages."""
        there = rows.column_names
        forms = [form for form in (*FORMS, ("text",)) if set(form) <= set(there)]
        found = tuple(text) if text else only_column(forms, there, "text")
        if found != CHAT:
            check_text_types(rows, self.name, found)
        return Columns(self.name, found, None)

    def width(self, labels: Sequence[str]) -> int | None:
        """The vocabulary is the model's."""
        return None

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Blocks of running text; prompt and completion, or conversations, cut on the right."""
        tokenizer = tokenizer_in(processor, self.name)
        length = text_length(tokenizer, max_length)
        examples, truncated, dropped = language(rows, tokenizer, tuple(text), length)
        return Encoded(examples, length, truncated, dropped)

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Pads to the longest; a missing padding token is the end token, masked anyway."""
        return Collator.of(
            tokenizer_in(processor, self.name), self.label_dtype, multiple=multiple, model=model, masked=True
        )

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Summed negative log-likelihood, and number of predicted tokens; logits (B, T, V)."""
        if labels is None:
            return [(row, None) for row in outputs.logits.argmax(-1).tolist()]
        shifted, targets = self.aligned(outputs.logits, labels)
        nll = F.cross_entropy(shifted.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
        return list(zip(nll.tolist(), (targets != IGNORED).sum(1).tolist(), strict=True))

    def asked(self, columns: Sequence[str]) -> tuple[str, ...]:
        """Of prompt and completion, the prompt."""
        return tuple(columns[:1])

    def cell_type(self, columns: Sequence[str]) -> type:
        """Conversations are lists of messages."""
        return list if tuple(columns) == CHAT else str

    def answers(self, question: Question) -> list[Answer]:
        """Greedy continuations, one text at a time; of a conversation, what the assistant says next or said last."""
        chat = question.columns == CHAT
        return [_continued(question, text, chat) for text in question.inputs]


def _continued(question: Question, text: str | list[Message], chat: bool) -> Answer:
    tokenizer = tokenizer_in(question.processor, CausalLM.name)
    said = text if isinstance(text, list) else [{"role": "user", "content": text}]
    turn = [{k: v for k, v in message.items() if v is not None} for message in said]  # None: of another message
    turn = turn[:-1] if len(turn) > 1 and turn[-1].get("role") == "assistant" else turn
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) if chat else text
    batch = tokenizer(cast(str, prompt), return_tensors="pt", add_special_tokens=not chat)
    ids = generated(question.model, batch, question.max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    answer = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answer(text if isinstance(text, str) else str(turn[-1].get("content", "")), answer)
