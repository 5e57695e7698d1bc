"""Classification of sounds: sources, rates, bad input, and that all commands work on a tiny wav2vec2 and AST."""

from __future__ import annotations

import io
import json
import sys
import zipfile

import datasets
import numpy as np
import pytest
import torch

import smidgen as sm
from smidgen.cli.commands import main
from smidgen.common.errors import DataError
from smidgen.data.media.media_file import MediaFile
from smidgen.data.media.sound_reading import ResampledWarning, as_wav, read_sound, resampled, sound_header
from smidgen.importance.fisher_information import attached_fisher
from tests import helpers as h
from tests import media

soundfile = pytest.importorskip("soundfile")
MODELS = {"wav2vec2": media.wav2vec2, "ast": media.ast}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return media.tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def task(folder):
    return sm.Task.load(folder)


def counts(task):
    return {name: len(rows) for name, rows in task.splits.items()}


def options(extractor, **more):
    return {
        "processor": extractor,
        "epochs": 2,
        "lr": 0.01,
        "head_lr": 0.02,
        "batch_size": 8,
        "progress": False,
        **more,
    }


def test_a_folder_of_splits_of_classes(task):
    assert (task.kind, task.text, task.label, task.metric) == ("audio-classification", ("audio",), "label", "accuracy")
    assert (task.labels, counts(task)) == (("high", "low", "middle"), {"train": 24, "validation": 12, "test": 12})


def test_names_that_begin_with_the_class_in_a_folder_or_an_archive(tmp_path):
    media.tones(tmp_path / "flat", train=20, splits=())
    found = sm.Task.load(tmp_path / "flat")
    assert (found.labels, counts(found)) == (("high", "low", "middle"), {"train": 49, "validation": 5, "test": 6})
    assert found.notes["label"] == "is what stands before the first _ of a file's name"
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted((tmp_path / "flat").iterdir()):
            archive.write(file, file.name)
    assert sm.Task.load(tmp_path / "all.zip").fingerprint == found.fingerprint


def test_a_column_of_sounds(folder, tmp_path):
    files = sorted((folder / "train").rglob("*.wav"))
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    rows = {"sound": cells, "label": [file.parent.name for file in files]}
    plain = datasets.Dataset.from_dict(rows)
    plain.cast_column("sound", datasets.Audio(decode=False)).to_parquet(tmp_path / "train.parquet")
    found = sm.Task.load(tmp_path, validation=0)
    assert (found.kind, found.text, counts(found)) == ("audio-classification", ("sound",), {"train": 24})


def test_channels_are_averaged_and_values_kept():
    values = np.stack([media.tone("low", 0), media.tone("high", 0)], 1)
    file = MediaFile("both", as_wav(values, media.RATE))
    assert sound_header(file) == (len(values), media.RATE)
    np.testing.assert_allclose(read_sound(file, media.RATE), values.mean(1), atol=1e-6)


def test_resampling_keeps_a_tone_and_its_length():
    for rate in (8000, 11025, 2000):
        time = np.arange(rate) / rate
        found = resampled(np.sin(2 * np.pi * 150 * time).astype(np.float32), rate, media.RATE)
        wanted = np.sin(2 * np.pi * 150 * np.arange(media.RATE) / media.RATE)
        assert len(found) == media.RATE
        np.testing.assert_allclose(found[500:-500], wanted[500:-500], atol=0.01)
    wrong = np.sin(2 * np.pi * 150 * np.arange(8000) / 8000)[: media.RATE]  # read as if it were at the model's rate
    assert np.abs(wrong[500:-500] - wanted[500:-500]).max() > 1


def test_another_rate_is_resampled_and_said(tmp_path):
    task = sm.Task.load(media.tones(tmp_path, rate=8000))
    _, extractor = media.wav2vec2()
    with pytest.warns(ResampledWarning, match="of 24 sounds 24 at 8,000 Hz are resampled to the model's 4,000 Hz"):
        rows = task.encode(extractor, "train")
    batch = task.collator(extractor)([rows[0]])
    assert batch["input_values"].shape == (1, rows.lengths[0])
    assert rows.lengths[0] == 400


def test_batches_are_padded_and_masked(task):
    _, extractor = media.wav2vec2()
    rows = task.encode(extractor, "train")
    batch = task.collator(extractor)([rows[0], rows[5]])
    assert batch["input_values"].shape == batch["attention_mask"].shape == (2, max(rows.lengths[0], rows.lengths[5]))
    assert batch["attention_mask"].sum(1).tolist() == [rows.lengths[0], rows.lengths[5]]
    _, extractor = media.ast()
    assert task.collator(extractor)([rows[0], rows[5]])["input_values"].shape == (2, 24, 16)


def test_a_sound_that_cannot_be_read_is_named(tmp_path):
    media.tones(tmp_path)
    (tmp_path / "train" / "low" / "torn.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(DataError, match=r"cannot read the sound .*torn\.wav: .*; mend or remove it") as caught:
        sm.Task.load(tmp_path)
    assert "\n" not in str(caught.value)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0, np.float32), media.RATE, format="WAV")
    (tmp_path / "train" / "low" / "torn.wav").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"the sound .*torn\.wav is empty"):
        sm.Task.load(tmp_path)


def test_soundfile_is_asked_for_where_it_lacks(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(DataError, match=r"sounds are read with soundfile: pip install 'smidgen\[audio\]'"):
        sm.Task.load(folder)


def test_a_processor_that_reads_no_sounds_is_refused(task):
    for processor in (h.tokenizer(), media.image_processor()):
        with pytest.raises(DataError, match="an? audio-classification task reads sounds, which .* does not"):
            task.encode(processor, "train")


@pytest.mark.parametrize("name", MODELS)
def test_fit_evaluate_and_predict(folder, task, name, tmp_path):
    model, extractor = MODELS[name]()
    sm.evaluate(model, task, processor=extractor)  # transformers puts hooks on at the first call
    with h.untouched(model):
        delta = sm.fit(model, "Full()", task, out=tmp_path, **options(extractor, epochs=12, lr=0.01, head_lr=0.01))
    found = sm.evaluate(model, task, delta=sm.Delta.load(tmp_path), processor=extractor)
    assert found.value > 0.5
    path = folder / "test" / "low" / "0.wav"
    values = soundfile.read(path, dtype="float32")
    rows = sm.predict(model, [str(path), path.read_bytes(), values], delta=delta, processor=extractor)
    assert len({row.label for row in rows}) == 1
    assert rows[0].text == str(path)


def test_the_prefix_cache_is_used_where_it_is_exact_and_refused_in_a_line_where_not(task, tmp_path):
    model, extractor = media.ast()
    sm.fit(model, "LN(layers='top:1')", task, out=tmp_path / "ast", **options(extractor))
    assert json.loads((tmp_path / "ast" / "run.json").read_text())["chosen"]["cache"] == "on"
    model, extractor = media.wav2vec2()
    sm.fit(model, "LN(layers='top:1')", task, out=tmp_path / "wav2vec2", **options(extractor))
    why = json.loads((tmp_path / "wav2vec2" / "run.json").read_text())["chosen"]["cache"]
    assert why != "on"
    assert "\n" not in why


@pytest.mark.parametrize("name", MODELS)
def test_fisher_is_that_of_one_example_at_a_time(task, name):
    model, extractor = MODELS[name]()
    with sm.attached(model, "LN()"):
        many, one = (attached_fisher(model, task, 6, processor=extractor, batch_size=size) for size in (3, 1))
    for key, value in many.items():
        torch.testing.assert_close(value, one[key], rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_select_search_and_plan(task, name):
    model, extractor = MODELS[name]()
    delta = sm.fit(model, "LN() | Select('fisher', keep=0.25)", task, **options(extractor, epochs=1))
    assert delta.trained == round(0.25 * sm.plan(model, "LN()").trained)
    assert sm.plan(model, "LN()").costs["forward_flops_per_example"] > 0
    found = sm.search(model, "Head()", task, lr=[0.02], processor=extractor, epochs=1, progress=False)
    assert found.trials[0].error is None


def test_batches_of_sounds_fit_into_a_limit_of_memory(folder, task, tmp_path):
    model, extractor = media.wav2vec2()
    longest = max(task.encode(extractor, "train").lengths)
    limit = sm.plan(model, "LN()", batch_size=2, length=longest).costs["peak_bytes"]
    assert limit < sm.plan(model, "LN()", batch_size=4, length=longest).costs["peak_bytes"]
    sm.fit(model, "LN()", task, out=tmp_path, **options(extractor, epochs=1, max_memory=limit))
    assert json.loads((tmp_path / "run.json").read_text())["chosen"]["rows_at_once"] == 2


def test_the_commands(folder, tmp_path, capsys):
    model, extractor = media.ast()
    model.save_pretrained(tmp_path / "ast")
    extractor.save_pretrained(tmp_path / "ast")
    base, out = str(tmp_path / "ast"), str(tmp_path / "run")

    def run(*line):
        assert main([*line, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    trained = run("tune", "--model", base, "--data", str(folder), "--out", out, "--epochs", "1")
    assert "validation accuracy" in trained["scores"]
    assert run("evaluate", "--delta", out, "--data", str(folder))["metric"] == "accuracy"
    rows = run("predict", "--delta", out, "--file", str(folder / "test" / "low"))["predictions"]
    assert [row["answer"] in media.TONES for row in rows] == [True] * 4
