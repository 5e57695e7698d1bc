"""A kind of task of one's own: images in PPM files, a folder for each class, read without any library for images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from smidgen import TaskKind
from smidgen.data.columns import Columns
from smidgen.data.encoded import Encoded
from smidgen.data.kinds.base import Answer
from smidgen.data.labels import class_ids, named_labels
from smidgen.data.metrics import ACCURACY, Metric
from smidgen.data.processor import image_processor_in
from smidgen.data.readers import Raw


def error_rate(predictions, references):
    """Share of wrong labels."""
    return float(np.mean(np.not_equal(predictions, references)))


ERROR_RATE = Metric("error_rate", error_rate, higher_is_better=False)


def read_ppm(path):
    """(H, W, 3) bytes of a binary PPM file: P6, width, height, 255, the pixels."""
    head, _, pixels = Path(path).read_bytes().partition(b" 255\n")
    form, width, height = head.split()
    assert form == b"P6", path
    return np.frombuffer(pixels, np.uint8).reshape(int(height), int(width), 3)


class PortablePixmaps(TaskKind):
    """Images in folder/<split>/<class>/<name>.ppm, one of several labels."""

    name = "portable-pixmaps"
    model_class = "AutoModelForImageClassification"
    processor_class = "AutoImageProcessor"
    metrics = (ERROR_RATE, ACCURACY)
    usual = ("error_rate", "accuracy")
    stratified = True

    def read(self, path, seed):
        splits = {}
        for file in sorted(path.glob("*/*/*.ppm")) if path.is_dir() else ():
            rows = splits.setdefault(file.parent.parent.name, {"file": [], "label": []})
            rows["file"].append(str(file))
            rows["label"].append(file.parent.name)
        return Raw(path.name, {name: Dataset.from_dict(rows) for name, rows in splits.items()}) if splits else None

    def columns(self, rows, text, label):
        return Columns(self.name, ("file",), "label")

    def label_set(self, rows, columns):
        return named_labels(rows, columns)

    def label_ids(self, rows, split, columns, labels):
        return class_ids(rows, split, columns, labels)

    def digest(self, row):
        return json.dumps([row["label"], read_ppm(row["file"]).tolist()]).encode()

    def encode(self, rows, processor, text, label, max_length):
        image_processor_in(processor, self.name)
        examples = [{"image": read_ppm(file)} for file in rows[text[0]][:]]
        if label is not None:
            examples = [{**e, "labels": value} for e, value in zip(examples, rows[label][:], strict=True)]
        return Encoded(examples, None, lengths=[1] * len(examples))

    def collator(self, processor, multiple=1, model=None):
        def collate(examples):
            images = [torch.tensor(example["image"]).permute(2, 0, 1) for example in examples]
            batch = dict(processor(images=images, return_tensors="pt", input_data_format="channels_first"))
            if "labels" in examples[0]:
                batch["labels"] = torch.tensor([example["labels"] for example in examples])
            return batch

        return collate

    def length(self, example):
        return 1

    def pairs(self, outputs, labels, names):
        predicted = outputs.logits.argmax(-1).tolist()
        return list(zip(predicted, [None] * len(predicted) if labels is None else labels.tolist(), strict=True))

    def answers(self, question):
        rows = question.run({"file": question.inputs})
        return [Answer(f, question.names[int(row.argmax())]) for f, (row, _) in zip(question.inputs, rows, strict=True)]
