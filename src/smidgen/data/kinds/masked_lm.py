"""Masked language modelling: tokens that are hidden in a text."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from smidgen.common.errors import DataError
from smidgen.data.columns import Columns, check_text_types, find_texts
from smidgen.data.encoded import Encoded, Example
from smidgen.data.kinds.base import Answer, Collate, Outputs, Pair, Question, TaskKind
from smidgen.data.labels import IGNORED, LabelPlace
from smidgen.data.metrics import LOSS, PERPLEXITY
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.text.collate import Collator
from smidgen.data.text.encoding import text_length

SHARE, MASKED, REPLACED = 0.15, 0.8, 0.1
SHOWN = 5


class MaskedLM(TaskKind):
    """Tokens hidden in a text, told from those around them (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Of 15 % of a text's tokens, eight tenths are masked, one tenth is replaced by any token, one stays. Which ones
    follows from the text alone, so that a batch is the same whenever it is read. A long text is cut into blocks.
    """

    name = "masked-lm"
    model_class = "AutoModelForMaskedLM"
    metrics = (PERPLEXITY, LOSS)
    usual = ("perplexity", "loss")
    labels_at = LabelPlace.POSITION
    label_dtype = None
    uncountable = "a vocabulary's tokens"
    many_per_row = True
    reads_prose = True
    unpackable = "models that fill in tokens look both ways and take a row for one text"

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """One column of text."""
        found = tuple(text) if text else find_texts(rows, None)
        check_text_types(rows, self.name, found, most=1)
        return Columns(self.name, found, None)

    def width(self, labels: Sequence[str]) -> int | None:
        """The vocabulary is the model's."""
        return None

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Blocks of each text between the tokenizer's special tokens. Raises DataError if there is no mask token."""
        tokenizer = tokenizer_in(processor, self.name)
        if tokenizer.mask_token_id is None:
            raise DataError(f"masked-lm needs a mask token, which {type(tokenizer).__name__} has not")
        if not tokenizer.is_fast:
            raise DataError(
                f"masked-lm needs a fast tokenizer, which cuts blocks; {type(tokenizer).__name__} is not one"
            )
        length = text_length(tokenizer, max_length)
        texts = rows[text[0]][:]
        blocks = tokenizer(texts, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        examples = [_hidden(block, tokenizer) for block in blocks]
        if not examples:
            raise DataError("the texts have no tokens to learn from")
        return Encoded(examples, length)

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Pads to the longest."""
        return Collator.of(tokenizer_in(processor, self.name), None, multiple=multiple, model=model)

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Summed negative log-likelihood, and number of hidden tokens; logits (B, T, V)."""
        return likelihood_pairs(outputs.logits, labels)

    def answers(self, question: Question) -> list[Answer]:
        """A text with its masks filled in, and the most probable tokens of the first one."""
        return [_filled(question, str(text)) for text in question.inputs]


def likelihood_pairs(logits: Tensor, labels: Tensor | None) -> Sequence[Pair]:
    """(summed negative log-likelihood, number of labels) of each example; logits (B, T, V), labels (B, T)."""
    if labels is None:
        return [(row, None) for row in logits.argmax(-1).tolist()]
    nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
    return list(zip(nll.tolist(), (labels != IGNORED).sum(1).tolist(), strict=True))


def _hidden(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    """An example of which some tokens are hidden, at least one; chosen by its ids alone."""
    values = np.array(ids)
    random = np.random.RandomState(zlib.crc32(values.astype("<i8").tobytes()))
    special = np.isin(values, tokenizer.all_special_ids)
    places = np.flatnonzero(~special) if not special.all() else np.arange(len(values))
    chosen = random.choice(places, max(1, round(SHARE * len(places))), replace=False)
    labels = np.full(len(values), IGNORED)
    labels[chosen] = values[chosen]
    draw, others = random.random_sample(len(chosen)), random.randint(0, len(tokenizer), len(chosen))
    changed = np.where(draw < MASKED + REPLACED, others, values[chosen])
    values[chosen] = np.where(draw < MASKED, tokenizer.mask_token_id, changed)
    return {"input_ids": values.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}


def _filled(question: Question, text: str) -> Answer:
    """A text with its most probable tokens at the masks, and the probabilities of the best few at the first one."""
    tokenizer = tokenizer_in(question.processor, MaskedLM.name)
    batch = tokenizer(text, return_tensors="pt").to(next(question.model.parameters()).device)
    masked = batch["input_ids"][0] == tokenizer.mask_token_id
    if not masked.any():
        raise DataError(f"{text[:40]!r} has no {tokenizer.mask_token} to fill in")
    with torch.inference_mode():
        logits = question.model.eval()(**batch).logits[0, masked].float()
    ids = batch["input_ids"][0].clone()
    ids[masked] = logits.argmax(-1)
    top = logits[0].softmax(-1).topk(min(SHOWN, logits.shape[-1]))
    odds = {
        str(tokenizer.decode([i])).strip(): p for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    }
    return Answer(text, tokenizer.decode(ids, skip_special_tokens=True), odds)
