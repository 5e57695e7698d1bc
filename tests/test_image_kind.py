"""Classification of images: sources, bad input, and that all commands work on a tiny ViT."""

from __future__ import annotations

import gzip
import io
import json
import sys
import warnings
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import smidgen as sm
from smidgen.cli.commands import main
from smidgen.common.errors import DataError
from smidgen.data.media.image_reading import check_header, open_image
from smidgen.data.media.media_file import MediaFile
from smidgen.importance.fisher_information import attached_fisher
from smidgen.importance.sample import Sample
from smidgen.inference.prediction import read_texts
from tests import helpers as h
from tests import media


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return media.pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def task(folder):
    return sm.Task.load(folder)


def counts(task):
    return {name: len(rows) for name, rows in task.splits.items()}


def loaded(value, count=2):
    """Pixels of the first examples of a task's train split."""
    rows = value.encode(media.image_processor(), "train")
    return value.collator(media.image_processor())(list(rows)[:count])


def test_a_folder_of_splits_of_classes(task):
    assert (task.kind, task.text, task.label, task.metric) == ("image-classification", ("image",), "label", "accuracy")
    assert task.labels == ("blue", "green", "red")
    assert counts(task) == {"train": 24, "validation": 12, "test": 12}
    batch = loaded(task)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 0]
    wanted = (media.picture("blue", 0).astype(float) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(batch["pixel_values"][0].permute(1, 2, 0).numpy(), wanted, atol=1e-6)


def test_a_folder_of_classes_is_split_by_the_seed(tmp_path):
    media.pictures(tmp_path, train=20, splits=())
    tasks = [sm.Task.load(tmp_path, seed=seed) for seed in (0, 0, 1)]
    assert counts(tasks[0]) == {"train": 49, "validation": 5, "test": 6}
    assert tasks[0].fingerprint == tasks[1].fingerprint != tasks[2].fingerprint
    assert "a tenth" in tasks[0].notes["test"]
    assert {row["label"] for row in tasks[0].splits["test"]} == {0, 1, 2}


def test_equal_images_stay_in_one_split(tmp_path):
    media.pictures(tmp_path, train=12, splits=())
    for place in tmp_path.iterdir():
        for n in range(6):
            (place / f"copy{n}.png").write_bytes((place / "0.png").read_bytes())
    found = sm.Task.load(tmp_path)
    first = MediaFile.of(str(tmp_path / "blue" / "0.png")).digest()
    splits = [{MediaFile.of(cell).digest() for cell in rows["image"][:]} for rows in found.splits.values()]
    assert sum(first in split for split in splits) == 1
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]


def test_an_archive_is_read_like_the_folder(folder, task, tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"all/{file.relative_to(folder)}")
    found = sm.Task.load(tmp_path / "pictures.zip")
    assert found.fingerprint == task.fingerprint


def arrays():
    labels = [label for label in media.COLOURS for _ in range(6)]
    return np.stack([media.picture(label, i) for i, label in enumerate(labels)]), labels


def test_arrays_files_and_mnist_hold_the_same_images(tmp_path):
    images, names = arrays()
    ids = np.array([list(media.COLOURS).index(name) for name in names])
    np.savez(tmp_path / "plain.npz", images=images, labels=ids, classes=np.array(list(media.COLOURS)))
    plain = sm.Task.load(tmp_path / "plain.npz", validation=0)
    assert (plain.labels, counts(plain)) == (("blue", "green", "red"), {"train": 18})
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file, "PNG")
    blob = b"".join(file.getvalue() for file in files)
    ends = np.cumsum([0, *(len(file.getvalue()) for file in files)])
    more = {"label": ids, "is_test": np.arange(len(ids)) % 3 == 0, "classes": np.array(list(media.COLOURS))}
    np.savez(tmp_path / "packed.npz", blob=np.frombuffer(blob, np.uint8), offsets=ends, **more)
    packed = sm.Task.load(tmp_path / "packed.npz", validation=0)
    assert counts(packed) == {"train": 12, "test": 6}
    np.testing.assert_array_equal(loaded(packed)["pixel_values"], loaded(plain, 3)["pixel_values"][1:])
    grey = images[..., 0]
    for name, values in (("images-idx3", grey), ("labels-idx1", ids.astype(np.uint8))):
        head = b"\0\0\x08" + bytes([values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    mnist = sm.Task.load(tmp_path, validation=0)
    assert mnist.labels == ("0", "1", "2")
    assert loaded(mnist)["pixel_values"].shape == (2, 3, 8, 8)


def test_columns_of_datasets(tmp_path):
    images, names = arrays()
    rows = {"picture": [Image.fromarray(image) for image in images], "label": names}
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=list(media.COLOURS))})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    found = sm.Task.load(tmp_path, validation=0)
    assert (found.kind, found.text, found.labels) == ("image-classification", ("picture",), tuple(media.COLOURS))
    pixels = found.collator(media.image_processor())(list(found.encode(media.image_processor(), "train"))[:1])
    wanted = (images[0].astype(float) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels["pixel_values"][0].permute(1, 2, 0).numpy(), wanted, atol=1e-6)


def test_paths_in_a_table(folder, tmp_path):
    paths = [(str(p), p.parent.name) for p in sorted((folder / "train").rglob("*.png"))]
    h.jsonl(tmp_path / "rows.jsonl", [{"file": path, "label": label} for path, label in paths])
    found = sm.Task.load(tmp_path / "rows.jsonl", kind="image-classification", text="file", validation=0)
    assert counts(found) == {"train": 24}
    assert torch.equal(loaded(found)["pixel_values"], loaded(sm.Task.load(folder))["pixel_values"])


def test_a_model_of_one_channel_gets_grey_images(task):
    model = media.vit(num_channels=1)
    rows = list(task.encode(media.image_processor(), "train"))[:2]
    grey = media.image_processor(image_mean=[0.5], image_std=[0.5])
    batch = task.collator(grey, model=model)(rows)
    assert batch["pixel_values"].shape == (2, 1, 8, 8)
    assert model(**batch).logits.shape == (2, 3)
    with pytest.raises(DataError, match="ViTImageProcessorPil takes no images of 1 channel: mean must have 1 element"):
        task.collator(media.image_processor(), model=model)(rows)
    with pytest.raises(DataError, match="1, 3 or 4 channels, the model takes 2"):
        task.collator(grey, model=media.vit(num_channels=2))


def broken(folder, name, content):
    (folder / "train" / "red" / name).write_bytes(content)
    return folder


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    place = broken(media.pictures(tmp_path / "a"), "torn.png", b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*torn\.png: no image format.*mend or remove it"):
        sm.Task.load(place)
    whole = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)).save(whole, "PNG")
    cut = sm.Task.load(broken(media.pictures(tmp_path / "b"), "cut.png", whole.getvalue()[:4000]))
    rows = cut.encode(media.image_processor(), "train")
    with pytest.raises(DataError, match=r"cannot read the image .*cut\.png: .*trunc") as caught:
        cut.collator(media.image_processor())(list(rows))
    assert "\n" not in str(caught.value)


def test_other_files_are_said(tmp_path):
    place = broken(media.pictures(tmp_path), "notes.txt", b"hello")
    assert "1 file" in sm.Task.load(place).notes
    assert "notes.txt" in sm.Task.load(place).notes["1 file"]


def test_files_without_a_class_are_refused(tmp_path):
    Image.fromarray(media.picture("red", 0)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no class can be told of .*a\.png: images lie in a folder for each class"):
        sm.Task.load(tmp_path)


@pytest.mark.parametrize("name", ["classification", "causal-lm"])
def test_another_kind_does_not_read_images(folder, name):
    with pytest.raises(DataError):
        sm.Task.load(folder, kind=name)


def test_a_tokenizer_reads_no_images_and_a_length_cuts_none(task):
    with pytest.raises(DataError, match="image-classification task reads images, which .*TokenizersBackend|Tokenizer"):
        task.encode(h.tokenizer(), "train")
    with pytest.raises(DataError, match="images have no tokens to cut: leave out max_length=8"):
        task.encode(media.image_processor(), "train", max_length=8)


def test_images_of_another_size_than_the_models_are_refused(task):
    with pytest.raises(DataError, match=r"takes no pixel_values \(12, 3, 16, 16\), which its processor makes"):
        sm.evaluate(media.vit(), task, processor=media.image_processor(16))


@pytest.mark.parametrize("read", [check_header, open_image])
def test_pillow_is_asked_for_where_it_lacks(folder, monkeypatch, read):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"images are read with Pillow: pip install 'smidgen\[image\]'"):
        read(MediaFile.of(folder / "test" / "red" / "0.png"))


@pytest.mark.parametrize("recipe", ["LN()", "LoRA(rank=2)", "Head()", "LN(layers='top:1')"])
def test_fit_learns_and_the_delta_gives_the_same_again(task, recipe, tmp_path):
    model, processor = media.vit(), media.image_processor()
    options = {"processor": processor, "epochs": 4, "lr": 0.02, "head_lr": 0.02, "batch_size": 8, "progress": False}
    with h.untouched(model):
        delta = sm.fit(model, recipe, task, out=tmp_path, **options)
    found = sm.evaluate(model, task, delta=delta, processor=processor)
    assert found.value > 0.8
    assert list(found.values) == ["accuracy", "f1_macro"]
    again = sm.evaluate(model, task, delta=sm.Delta.load(tmp_path), processor=processor)
    assert again.predictions == found.predictions
    assert delta.info["task"]["kind"] == "image-classification"
    assert delta.info["settings"]["max_length"] is None


@pytest.mark.parametrize("recipe", ["LN(layers='top:1')", "LoRA(rank=2, layers='top:1')"])
def test_the_prefix_cache_gives_what_a_plain_run_gives(task, recipe, tmp_path):
    processor = media.image_processor()
    options = {"processor": processor, "epochs": 2, "lr": 0.01, "batch_size": 8, "progress": False}
    runs = [sm.fit(media.vit(), recipe, task, out=tmp_path / str(c), cache=c, **options) for c in (True, False)]
    assert json.loads((tmp_path / "True" / "run.json").read_text())["chosen"]["cache"] == "on"
    for name, tensor in runs[0].tensors.items():
        torch.testing.assert_close(tensor, runs[1].tensors[name], rtol=1e-3, atol=1e-4)


def test_micro_batches_give_the_whole_batchs_gradient(task):
    options = {"processor": media.image_processor(), "epochs": 1, "lr": 0.01, "batch_size": 8, "progress": False}
    whole = sm.fit(media.vit(), "LN()", task, **options)
    cut = sm.fit(media.vit(), "LN()", task, max_memory="120KB", **options)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(cut.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_search_tries_rates(task):
    options, said = {"processor": media.image_processor(), "epochs": 3, "progress": False}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.SearchWarning)
        found = sm.search(media.vit(), "LN(layers='top:1')", task, lr=[0.001, 0.01, 0.1], say=said.append, **options)
    assert len(found.trials) == len(said) == 3
    assert all(trial.error is None for trial in found.trials)


@pytest.mark.parametrize("kind", ["empirical", "true", "expected"])
def test_fisher_is_that_of_one_example_at_a_time(task, kind):
    model, processor = media.vit().double(), media.image_processor()

    def double(batch):
        return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

    sample = Sample.of_task(task, processor, "train", 6, model=model)
    sample = Sample(sample.kind, sample.examples, lambda e: double(task.collator(processor)(e)), sample.numbers)
    with sm.attached(model, "LN()"):
        many, one = (attached_fisher(model, sample, kind=kind, batch_size=size) for size in (4, 1))
    assert many.looped == ()
    for name, value in many.items():
        torch.testing.assert_close(value, one[name], rtol=1e-6, atol=1e-12)
    assert float(sum(value.sum() for value in many.values())) > 0


def test_select_keeps_a_part(task):
    options = {"processor": media.image_processor(), "epochs": 1, "progress": False}
    delta = sm.fit(media.vit(), "LN() | Select('fisher', keep=0.25)", task, **options)
    assert delta.trained == round(0.25 * sm.plan(media.vit(), "LN()").trained)


def test_plan_estimates_without_a_task():
    costs = sm.plan(media.vit(), "LN()", batch_size=4).costs
    assert costs["batch_size"] == 4
    assert costs["forward_flops_per_example"] > 0


def test_predict_takes_paths_bytes_arrays_and_pictures(folder, task):
    model, processor = media.vit(), media.image_processor()
    options = {"processor": processor, "epochs": 4, "lr": 0.02, "head_lr": 0.02, "batch_size": 8, "progress": False}
    delta = sm.fit(model, "LN()", task, **options)
    path = folder / "test" / "red" / "0.png"
    forms = [str(path), path, path.read_bytes(), np.asarray(Image.open(path)), Image.open(path)]
    rows = sm.predict(model, forms, delta=delta, processor=processor)
    assert [row.label for row in rows] == ["red"] * 5
    assert all(row.probabilities == pytest.approx(rows[0].probabilities) for row in rows)
    assert rows[0].text == str(path)
    assert read_texts(folder / "test" / "red", delta)[0] == [
        str(folder / "test" / "red" / f"{n}.png") for n in range(4)
    ]
    with pytest.raises(DataError, match=r"cannot read /no/such\.png: No such file"):
        sm.predict(model, ["/no/such.png"], delta=delta, processor=processor)
    with pytest.raises(DataError, match="image 0 is int; expected a path"):
        sm.predict(model, [3], delta=delta, processor=processor)


def test_the_commands(folder, tmp_path, capsys):
    model, out = str(media.saved_vit(tmp_path / "vit")), str(tmp_path / "run")

    def run(*line):
        assert main([*line, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    assert run("plan", "--model", model, "--recipe", "LN()")["trained"] == 5 * 32
    trained = run("tune", "--model", model, "--data", str(folder), "--out", out, "--epochs", "1")
    assert "validation accuracy" in trained["scores"]
    assert run("evaluate", "--delta", out, "--data", str(folder))["metric"] == "accuracy"
    image = str(folder / "test" / "red" / "0.png")
    assert run("predict", "--delta", out, "--file", image)["predictions"][0]["answer"] in media.COLOURS
    mass = run("analyze", "fisher", "--model", model, "--data", str(folder), "--out", str(tmp_path / "mass"),
               "--task-kind", "image-classification")  # fmt: skip
    assert mass
    assert main(["tune", "--model", model, "--data", str(folder), "--out", str(tmp_path / "x"), "--kind", "img"]) == 2
    assert "error: unknown kind 'img'; there are " in capsys.readouterr().err
