"""Question answering: the part of a text that answers a question."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, List, Value
from numpy.typing import NDArray
from torch import Tensor, nn

from smidgen.common.errors import DataError
from smidgen.data.columns import COUNTED, Columns, check_text_types
from smidgen.data.encoded import Cells, Encoded, Example
from smidgen.data.kinds.base import Answer, Batch, Collate, Outputs, Pair, Question, TaskKind, named_columns
from smidgen.data.labels import LabelPlace, Labels
from smidgen.data.processor import Processor, tokenizer_in
from smidgen.data.readers import Raw, decode
from smidgen.data.spans import EXACT_MATCH, SPAN_F1
from smidgen.data.text.collate import Collator
from smidgen.data.text.encoding import Part, encode_chunks, text_length
from smidgen.data.text.windows import TENSORS, Window, windows_of

LONGEST = 30  # tokens of an answer
Spans = Sequence[tuple[int, int] | None]  # of each token of a text, in characters; None outside of the context


class RightAnswers(TypedDict):
    """The right answers to a question, and where each begins in its context."""

    text: list[str]
    answer_start: list[int]


@dataclass
class SpanOutput:
    """logits: (B, 2, T), of an answer's first and last token, lowest at padding; loss: None without labels."""

    logits: Tensor
    loss: Tensor | None


@dataclass(frozen=True)
class SpanAnswer:
    """What a model answers from one window of a row.

    Attributes:
        row: number of the row.
        text: the most probable span; "" if the window has nothing of the text.
        score: sum of both ends' logits, by which the windows of a row are compared.
    """

    row: int
    text: str
    score: float


class SpanQA(TaskKind):
    """A question, a text, and the part of the text that answers it, as in SQuAD: columns question, context, answers.

        loss = -(log p(first) + log p(last)) / 2           Devlin et al. 2018, arXiv:1810.04805, section 4.2

    over all tokens that are no padding. A text that is too long is read in windows that overlap, each an example; where
    a window has not got the whole answer, both ends are the first token's. A row's answer is that of the window whose
    sum of logits is the highest.
    """

    name = "span-qa"
    model_class = "AutoModelForQuestionAnswering"
    metrics = (SPAN_F1, EXACT_MATCH)
    usual = ("span_f1", "exact_match")
    labels_at = LabelPlace.POSITION
    uncountable = "pairs of ends"
    unsteered = "an answer has two ends, which the model takes under names of its own"
    unpackable = "an answer is told from all tokens of its row"
    many_per_row = True

    def read(self, path: Path, seed: int) -> Raw | None:
        """SQuAD's own .json: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}."""
        if path.suffix.lower() != ".json" or not path.is_file():
            return None
        with path.open("rb") as file:
            if b'"paragraphs"' not in file.read(4096):
                return None
        rows: Cells = {"question": [], "context": [], "answers": []}
        for article in json.loads(decode(path))["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    rows["question"].append(asked["question"])
                    rows["context"].append(paragraph["context"])
                    said = asked["answers"]
                    texts, starts = [a["text"] for a in said], [a["answer_start"] for a in said]
                    rows["answers"].append({"text": texts, "answer_start": starts})
        return Raw(path.stem, {"train": Dataset.from_dict(rows)})

    def columns(self, rows: Dataset, text: Sequence[str] | None, label: str | None) -> Columns:
        """question, context and answers, unless others are named."""
        found, label = tuple(text or ("question", "context")), label or "answers"
        missing = [name for name in (*found, label) if name not in rows.column_names]
        if missing:
            raise DataError(f"span-qa needs a column {missing[0]!r}; the columns are {', '.join(rows.column_names)}")
        check_text_types(rows, self.name, found)
        return Columns(self.name, found, label)

    def label_ids(self, rows: Dataset, split: str, columns: Columns, labels: Labels) -> Sequence[object]:
        """{"text": [...], "answer_start": [...]} in characters. Raises DataError if one does not stand there."""
        contexts = rows[columns.text[1]][:]
        found = []
        for i, (value, context) in enumerate(zip(rows[str(columns.label)][:], contexts, strict=True)):
            if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
                raise DataError(
                    f"{split} row {i}: answers must be {{text, answer_start}}, found {str(value)[:40]}{COUNTED}"
                )
            for said, at in zip(value["text"], value["answer_start"], strict=True):
                if context[at : at + len(said)] != said:
                    raise DataError(f"{split} row {i}: {said[:40]!r} does not stand at {at} of its context{COUNTED}")
            found.append({"text": list(value["text"]), "answer_start": list(value["answer_start"])})
        return found

    def label_feature(self) -> object:
        """Texts and places."""
        return {"text": List(Value("string")), "answer_start": List(Value("int64"))}

    def width(self, labels: Sequence[str]) -> int | None:
        """As many values as tokens."""
        return None

    def encode(
        self, rows: Dataset, processor: Processor, text: Sequence[str], label: str | None, max_length: int | None
    ) -> Encoded:
        """Question and text, in windows of the text; labels are the numbers of the answer's first and last token."""
        tokenizer = tokenizer_in(processor, self.name)
        if not tokenizer.is_fast:
            raise DataError(
                f"span-qa needs a fast tokenizer, which knows places; {type(tokenizer).__name__} is not one"
            )
        length, numbers = text_length(tokenizer, max_length), itertools.count()

        def encode(cells: Cells) -> Part:
            questions, contexts = cells[text[0]], cells[text[1]]
            examples = list[Example]()
            for i, parts in enumerate(windows_of(tokenizer, questions, contexts, length)):
                row = {"context": contexts[i], "row": next(numbers)}
                for part in parts:
                    example = {**part.inputs, **row, "spans": part.spans}
                    if label is not None:
                        answers = cells[label][i]
                        example |= {"labels": _ends(answers, part), "answers": answers["text"]}
                    examples.append(example)
            return examples, 0, 0

        return encode_chunks(rows, length, encode)

    def collator(self, processor: Processor, multiple: int = 1, model: nn.Module | None = None) -> Collate:
        """Pads to the longest; labels (B, 2)."""
        pad = Collator.of(tokenizer_in(processor, self.name), self.label_dtype, multiple=multiple, model=model)

        def collate(examples: list[Example]) -> Batch:
            keys = [key for key in (*TENSORS, "labels") if key in examples[0]]
            return pad([{key: example[key] for key in keys} for example in examples])

        return collate

    def model_inputs(self, batch: Mapping[str, Tensor]) -> Batch:
        """Without labels."""
        return self.parted(batch)[0]

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> SpanOutput:
        """Both ends side by side, lowest at padding, and the loss."""
        inputs, labels = self.parted(batch)
        found = model(**inputs)
        logits = torch.stack([found.start_logits, found.end_logits], 1)  # (B, 2, T)
        padding = (inputs["attention_mask"] == 0)[:, None]
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return SpanOutput(logits, loss)

    def pairs(self, outputs: Outputs, labels: Tensor | None, names: Sequence[str]) -> Sequence[Pair]:
        """Logits (2, T); `told` makes text of them."""
        return [(row, None) for row in outputs.logits.cpu().numpy()]

    def told(self, pair: Pair, example: Mapping[str, object]) -> Pair:
        """The window's `SpanAnswer`, and the right answers."""
        return _said(cast(NDArray[np.float32], pair[0]), example), example.get("answers")

    def by_row(self, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """The text of each row's best window, and the right answers."""
        said = _best(cast(Sequence[SpanAnswer], [found for found, _ in pairs]))
        right = {cast(SpanAnswer, found).row: answers for found, answers in pairs}
        return [(each.text, right[row]) for row, each in said.items()]

    def answers(self, question: Question) -> list[Answer]:
        """The part of each second text that answers the first."""
        columns = named_columns(question)
        rows = Dataset.from_dict(columns)
        encoded = self.encode(rows, question.processor, tuple(columns), None, question.max_length)
        logits = [row.cpu().numpy() for row, _ in question.run(columns)]
        said = _best([_said(row, example) for row, example in zip(logits, encoded, strict=True)])
        return [Answer(str(asked), said[row].text) for row, asked in enumerate(question.inputs)]


def _best(answers: Sequence[SpanAnswer]) -> dict[int, SpanAnswer]:
    """Row -> its answer with the highest score, in the order of the rows; of equal ones the first."""
    found = dict[int, SpanAnswer]()
    for answer in answers:
        if answer.row not in found or answer.score > found[answer.row].score:
            found[answer.row] = answer
    return {row: found[row] for row in sorted(found)}


def _ends(answers: RightAnswers, window: Window) -> list[int]:
    """Numbers of the first and the last token of the first answer; 0 and 0 if it is cut off, or there is none."""
    if not answers["text"]:
        return [0, 0]
    spans, begin = window.spans, answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    covered = [i for i, span in enumerate(spans) if span is not None and span[0] < end and span[1] > begin]
    if not covered or begin < window.begin or (spans[covered[-1]] or (0, 0))[1] < end:
        return [0, 0]
    return [covered[0], covered[-1]]


def _said(logits: NDArray[np.float32], example: Mapping[str, object]) -> SpanAnswer:
    """The text between the most probable pair of ends within the window, at most 30 tokens long. logits: (2, T)."""
    spans, row = cast(Spans, example["spans"]), cast(int, example["row"])
    context, places = str(example["context"]), [i for i, span in enumerate(spans) if span is not None]
    inside = [span for span in spans if span is not None]
    if not inside:
        return SpanAnswer(row, "", -np.inf)
    scores = logits[0][places][:, None] + logits[1][places][None]  # first, last
    allowed = np.triu(np.ones_like(scores)) - np.triu(np.ones_like(scores), LONGEST)
    first, last = map(int, np.unravel_index(np.where(allowed > 0, scores, -np.inf).argmax(), scores.shape))
    return SpanAnswer(row, context[inside[first][0] : inside[last][1]], float(scores[first, last]))
