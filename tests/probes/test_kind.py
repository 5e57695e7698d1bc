"""A kind of task of one's own is added by registration only: nothing in the library knows it, and everything works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import smidgen as sm
from smidgen.cli.commands import main
from smidgen.data.kinds.base import TaskKind
from smidgen.data.metrics import METRICS
from smidgen.importance.fisher_information import attached_fisher
from tests import helpers as h
from tests import media
from tests.probes.own_image_kind import ERROR_RATE, PortablePixmaps

SOURCE = Path(sm.__file__).parent


# Defining the class has registered it; other files count the kinds that are shipped.
KIND, METRIC = TaskKind.registry.pop(PortablePixmaps.name), METRICS.pop(ERROR_RATE.name)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(TaskKind.registry, PortablePixmaps.name, KIND)
    monkeypatch.setitem(METRICS, ERROR_RATE.name, METRIC)


@pytest.fixture
def folder(tmp_path):
    place = media.pictures(tmp_path / "pictures")
    for file in sorted(place.rglob("*.png")):
        label, number = file.parent.name, int(file.stem)
        split = ("train", "validation", "test").index(file.parents[1].name)
        pixels = media.picture(label, 1000 * split + 100 * list(media.COLOURS).index(label) + number)
        file.with_suffix(".ppm").write_bytes(b"P6 8 8 255\n" + pixels.tobytes())
        file.unlink()
    return place


@pytest.fixture
def task(folder):
    return sm.Task.load(folder, kind="portable-pixmaps")


OPTIONS = {"epochs": 4, "lr": 0.02, "head_lr": 0.02, "batch_size": 8, "progress": False}


def test_nothing_in_the_library_knows_it():
    for path in SOURCE.rglob("*.py*"):
        if path.suffix in (".py", ".pyi"):
            text = path.read_text()
            assert not any(word in text for word in ("portable-pixmaps", "PortablePixmaps", "error_rate")), path


def test_its_own_reading_comes_first(folder):
    task = sm.Task.load(folder)  # .ppm files are images of the shipped kind, too
    assert (task.kind, task.metric) == ("portable-pixmaps", "error_rate")


def test_fit_evaluate_predict(folder, task, tmp_path):
    model, processor = media.vit(), media.image_processor()
    with h.untouched(model):
        delta = sm.fit(model, "LN()", task, processor=processor, out=tmp_path / "run", **OPTIONS)
    found = sm.evaluate(model, task, delta=sm.Delta.load(tmp_path / "run"), processor=processor)
    assert list(found.values) == ["error_rate", "accuracy"]
    assert found.value < 0.2
    assert found.better == -found.value
    assert ERROR_RATE.function([0, 1], [0, 0]) == 0.5
    files = [str(folder / "test" / label / "0.ppm") for label in media.COLOURS]
    assert [row.answer for row in sm.predict(model, files, delta=delta, processor=processor)] == list(media.COLOURS)


def test_it_is_what_the_shipped_kind_computes(folder, task):
    other = sm.Task.load(folder, kind="image-classification")
    options = {"processor": media.image_processor(), **OPTIONS}
    own, shipped = (sm.fit(media.vit(), "LN()", each, **options) for each in (task, other))
    h.same(own, shipped)


def test_search_fisher_select_and_the_prefix_cache(task, tmp_path):
    model, processor = media.vit(), media.image_processor()
    sm.fit(model, "LN(layers='top:1')", task, processor=processor, out=tmp_path / "run", **OPTIONS)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]["cache"] == "on"
    found = sm.search(model, "LN()", task, lr=[0.01], processor=processor, epochs=1, progress=False)
    assert found.trials[0].error is None
    delta = sm.fit(model, "LN() | Select('fisher', keep=0.25)", task, processor=processor, **OPTIONS)
    assert delta.trained == 40
    with sm.attached(model, "LN()"):
        many, one = (attached_fisher(model, task, 6, processor=processor, batch_size=size) for size in (6, 1))
    for name, value in many.items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-10)


def test_the_commands(folder, tmp_path, capsys):
    base, out = str(media.saved_vit(tmp_path / "vit")), str(tmp_path / "run")
    line = ["tune", "--model", base, "--data", str(folder), "--kind", "portable-pixmaps", "--out", out, "--json"]
    assert main([*line, "--epochs", "1"]) == 0, capsys.readouterr().err
    assert "validation error_rate" in json.loads(capsys.readouterr().out)["scores"]
