"""Sequence to sequence: a text and the one that is to be written from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from datasets import Dataset
from torch import Tensor, nn

from smidgen.data.columns import Columns, check_text_types, only_column
from smidgen.data.encoded import CellRows, Cells, Encoded, Example
from smidgen.data.kinds.base import (
    Answer,
    Batch,
    Collate,
    Outputs,
    Pair,
    Question,
    TaskKind,
    generated,
    written_texts,
)
from smidgen.data.kinds.masked_lm import likelihood_pairs
from smidgen.data.labels import LabelPlace
from smidgen.data.metrics import LOSS, PERPLEXITY
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.text.collate import Collator
from smidgen.data.text.encoding import Part, as_examples, encode_chunks, text_length
from smidgen.data.text_metrics import BLEU, CHRF, ROUGE

TENSORS = ("input_ids", "attention_mask", "token_type_ids", "labels")
KNOWN = (("source", "target"), ("prompt", "completion"), ("document", "summary"), ("article", "highlights"))


class Seq2Seq(TaskKind):
    """A text and the one that is to be written from it, such as a translation or a summary; for encoder-decoders.

    Perplexity and loss are of the wanted text, token by token; BLEU, chrF and ROUGE of what the model writes itself.
    """

    name = "seq2seq"
    model_class = "AutoModelForSeq2SeqLM"
    written = (BLEU, CHRF, *ROUGE)
    metrics = (PERPLEXITY, LOSS, *written)
    usual = ("perplexity", "loss")
    labels_at = LabelPlace.POSITION
    label_dtype = None
    uncountable = "a vocabulary's continuations"
    plain_cells = True
    unpackable = "an encoder takes a row for one text"

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """Two columns of text: what is read, and what is to be written."""
        there = rows.column_names
        found = tuple(text) if text else only_column([p for p in KNOWN if set(p) <= set(there)], there, "text")
        check_text_types(rows, self.name, found)
        if len(found) != 2:
            found = only_column([], there, "text")
        return Columns(self.name, found, None)

    def width(self, labels: Sequence[str]) -> int | None:
        """The vocabulary is the model's."""
        return None

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Token ids of what is read, and of what is to be written as labels, each cut on the right.

        Beside the labels, `right_texts` has what is to be written as it stands in the data.
        """
        tokenizer = tokenizer_in(processor, self.name)
        length = text_length(tokenizer, max_length)

        def encode(cells: Cells) -> Part:
            long = sum(len(ids) > length for ids in tokenizer(cells[text[0]], verbose=False)["input_ids"])
            examples = as_examples(tokenizer(cells[text[0]], truncation=True, max_length=length))
            if len(text) == 2:
                wanted = tokenizer(text_target=cells[text[1]], truncation=True, max_length=length)["input_ids"]
                given = zip(examples, wanted, cells[text[1]], strict=True)
                examples = [{**e, "labels": ids, "right_texts": [right]} for e, ids, right in given]
            return examples, long, 0

        return encode_chunks(rows, length, encode)

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Pads both; a model's decoder gets the labels, shifted as it shifts them."""
        pad = Collator.of(tokenizer_in(processor, self.name), None, multiple=multiple, model=model)
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)

        def collate(examples: list[Example]) -> Batch:
            keys = [key for key in TENSORS if key in examples[0]]
            batch = pad([{key: example[key] for key in keys} for example in examples])
            if shift is not None and "labels" in batch:
                labels = batch["labels"].to(next(model.parameters()).device) if model is not None else batch["labels"]
                batch["decoder_input_ids"] = shift(labels=labels).cpu()
            return batch

        return collate

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Summed negative log-likelihood, and number of tokens to write; logits (B, T, V)."""
        return likelihood_pairs(outputs.logits, labels)

    def write(self, model: nn.Module, batch: Batch, processor: Processor, max_new_tokens: int) -> list[str]:
        """Greedily, or by as many beams as the model's own generation config says."""
        ids = generated(model, batch, max_new_tokens)
        return list(tokenizer_in(processor, self.name).batch_decode(ids, skip_special_tokens=True))

    def asked(self, columns: Sequence[str]) -> tuple[str, ...]:
        """What is read."""
        return tuple(columns[:1])

    def answers(self, question: Question) -> list[Answer]:
        """What `write` gives."""
        rows = cast(Dataset, CellRows({"text": question.inputs}))
        encoded = self.encode(rows, question.processor, ("text",), None, question.max_length)
        new, size = question.max_new_tokens, question.batch_size
        found = written_texts(self, question.model, encoded, question.processor, size, new)
        return [Answer(str(text), said) for text, said in zip(question.inputs, found, strict=True)]
