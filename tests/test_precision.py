"""dtype "auto": measured, said, and the same again when a run goes on."""

import json

import pytest
import torch

from smidgen.cli import options
from smidgen.common.errors import ModelError
from smidgen.inference import fastest_dtype as precision
from smidgen.inference.loading import load
from tests import helpers as h


def timed(monkeypatch, seconds):
    """Products take so long, by dtype."""
    monkeypatch.setattr(precision, "_seconds", lambda pair: seconds[pair[0].dtype])


@pytest.mark.parametrize(
    ("low", "dtype"),
    [(0.5, torch.bfloat16), (0.9, torch.float32), (2.0, torch.float32)],
    ids=["faster", "little", "slow"],
)
def test_the_faster_is_taken_where_it_is_worth_it(monkeypatch, low, dtype):
    timed(monkeypatch, {torch.float32: 1.0, torch.bfloat16: low})
    found = precision.fastest()
    assert found.dtype == dtype
    assert found.gain == pytest.approx(1 / low)
    assert f"1/{1 / low:.2f}" in str(found)


def test_a_real_measurement_takes_one_of_both():
    assert precision.fastest().dtype in (torch.float32, torch.bfloat16)


def test_a_device_without_it_computes_in_float32_and_says_so(monkeypatch):
    def refuse(dtype, device):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(precision, "_pair", refuse)
    assert precision.fastest().dtype == torch.float32
    assert str(precision.fastest()) == "float32: this device has no bfloat16"


def test_load_takes_auto(monkeypatch, tmp_path):
    h.bert().save_pretrained(tmp_path)
    h.tokenizer().save_pretrained(tmp_path)
    timed(monkeypatch, {torch.float32: 1.0, torch.bfloat16: 0.5})
    assert load(tmp_path, dtype="auto")[0].dtype == torch.bfloat16
    with pytest.raises(ModelError, match="dtype 'half' is not one of auto, float32"):
        load(tmp_path, dtype="half")


@pytest.mark.parametrize("name", ["run.json", "search.json"])
def test_a_run_that_goes_on_keeps_its_dtype(monkeypatch, tmp_path, capsys, name):
    timed(monkeypatch, {torch.float32: 1.0, torch.bfloat16: 0.5})
    assert options.dtype_of("float64", tmp_path) == "float64"
    assert options.dtype_of("auto", tmp_path) == "bfloat16"
    assert "bfloat16" in capsys.readouterr().err
    (tmp_path / name).write_text(json.dumps({"asked": {"dtype": "float32"}}))
    assert options.dtype_of("auto", tmp_path) == "float32"
