"""Every command on tiny models: what it prints, its JSON, and what a mistake looks like."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import smidgen as sm
from smidgen.cli.commands import main
from smidgen.training.run.run_folder import RunFolder

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "fine", "great", "bad", "poor", "awful", "film", "plot",
    "was", "the", "and", "a", "very", "so", "it", "is",
]  # fmt: skip
COMMANDS = ["demo", "plan", "tune", "evaluate", "predict", "merge", "inspect", "convert"]
TEXTS = {"pos": ("good", "fine", "great"), "neg": ("bad", "poor", "awful")}


@dataclass
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


def call(*args: object) -> Said:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Said(code, out.getvalue(), err.getvalue())


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", model_max_length=32, **names)


def bert(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.3, **sizes)
    model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    made = []
    for i in range(start, start + count):
        label = ("pos", "neg")[i % 2]
        word = TEXTS[label][i % 3]
        made.append({"text": f"{word} {word} {WORDS[10 + i % 10]} {WORDS[10 + i // 10 % 10]} {word}", "label": label})
    return made


@dataclass
class World:
    """A base, data, and a delta trained by the command line."""

    root: Path
    said: Said

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def delta(self) -> Path:
        return self.root / "run"

    @property
    def tune(self) -> list[object]:
        files = ["--model", self.base, "--data", self.data, "--out", self.delta]
        return ["tune", *files, "--epochs", 4, "--lr", 0.01, "--head-lr", 0.03, "--batch-size", 4]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"), Said(0, "", ""))
    bert(made.base)
    for split, count, start in (("train", 64, 0), ("validation", 16, 64), ("test", 16, 80)):
        jsonl(made.data / f"{split}.jsonl", rows(count, start))
    made.said = call(*made.tune)
    return made


def test_help_is_quick_and_version(world: World) -> None:
    alone = call()
    assert alone.code == 0
    assert all(name in alone.out for name in COMMANDS)
    assert call("--version").out == f"smidgen {sm.__version__}\n"
    code = "import sys, smidgen.cli.commands as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_tune_prints_scores_files_and_what_next(world: World) -> None:
    said = world.said
    assert said.code == 0, said.err
    for part in ("LN() finished", "validation accuracy", "delta.safetensors", "smidgen evaluate --delta"):
        assert part in said.out
    assert "64 train, 16 validation, 16 test" in said.err
    assert sm.Delta.load(world.delta).labels == ("neg", "pos")


def test_tune_again_is_already_finished(world: World) -> None:
    before = {p: p.stat().st_mtime_ns for p in world.delta.iterdir()}
    said = call(*world.tune, "--json")
    assert said.json["already_finished"] is True
    assert said.json["files"]["delta.safetensors"] < 60_000
    assert "validation accuracy" in said.json["scores"]
    assert "already finished" in call(*world.tune).out
    assert before == {p: p.stat().st_mtime_ns for p in world.delta.iterdir()}


def test_an_interrupted_run_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*world.tune[:5], "--out", tmp_path / "run", *world.tune[7:]]
    log = RunFolder.log

    def stop(self: RunFolder, entry: Any) -> None:
        log(self, entry)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", stop)
        said = call(*command)
    assert said.code == 130
    assert said.out == ""
    assert said.err.splitlines()[-1] == "stopped at step 10; the same command goes on from there"
    assert call(*command, "--json").json["already_finished"] is False
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps.count(10) == 1
    assert call(*command, "--json").json["already_finished"] is True


def test_plan(world: World) -> None:
    said = call(
        "plan",
        "--model",
        world.base,
        "--data",
        world.data,
        "--recipe",
        "LN() + LoRA(rank=2)",
        "--max-length",
        16,
    )
    assert said.code == 0, said.err
    for part in (
        "encoder.layer.*.output.LayerNorm",
        "weight 16",
        "lowest edit",
        "counted apart",
        "peak memory",
    ):
        assert part in said.out
    every = call("plan", "--model", world.base, "--all")
    assert "encoder.layer.1.output.LayerNorm.bias" in every.out
    report = call("plan", "--model", world.base, "--json").json
    assert report["trained"] == 5 * 32
    assert report["head"] == 0


def test_evaluate(world: World) -> None:
    said = call("evaluate", "--delta", world.delta, "--data", world.data)
    assert said.code == 0, said.err
    assert "16 examples" in said.out
    report = call("evaluate", "--delta", world.delta, "--data", world.data, "--limit", 8, "--json").json
    assert report["examples"] == 8
    assert 0 <= report["scores"]["accuracy"] <= 1
    assert call("evaluate", "--delta", world.delta, "--data", world.data, "--split", "validation").code == 0


def test_evaluate_refuses_other_labels(world: World, tmp_path: Path) -> None:
    other = [{**row, "label": row["label"].replace("neg", "zzz")} for row in rows(16)]
    for split in ("train", "test"):
        jsonl(tmp_path / "data" / f"{split}.jsonl", other)
    said = call("evaluate", "--delta", world.delta, "--data", tmp_path / "data")
    assert said.code == 2
    assert "zzz" in said.err


def test_evaluate_agrees_with_the_run(world: World) -> None:
    saved = sm.Delta.load(world.delta).info["scores"]["validation accuracy"]
    assert saved > 0.6
    options = ["--data", world.data, "--split", "validation", "--json"]
    assert call("evaluate", "--delta", world.delta, *options).json["scores"]["accuracy"] == saved


def test_predict(world: World, tmp_path: Path) -> None:
    said = call("predict", "--delta", world.delta, "--text", "the film was good", "--text", "so awful")
    assert said.code == 0, said.err
    assert "the film was good" in said.out
    listed = tmp_path / "texts.txt"
    listed.write_text("the film was good\n\nso awful\n")
    columns = jsonl(tmp_path / "texts.jsonl", [{"text": "the film was good", "id": 1}, {"text": "so awful"}])
    ask = ["predict", "--delta", world.delta, "--json", "--file"]
    first, second = call(*ask, listed).json, call(*ask, columns).json
    assert first == second
    for row in first["predictions"]:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["answer"] == max(row["probabilities"], key=row["probabilities"].get)


SAID = ["the film was good, so good", "so awful"]
FILES = {
    "a.csv": 'id,text\n1,"the film was good, so good"\n2,so awful\n',
    "bom.csv": '\ufeffid,text\n1,"the film was good, so good"\n2,so awful\n',
    "semicolons.csv": "id;text\n1;the film was good, so good\n2;so awful\n",
    "one.csv": 'text\n"the film was good, so good"\nso awful\n',
    "a.tsv": "text\tid\r\nthe film was good, so good\t1\r\nso awful\t2\r\n",
    "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in SAID),
    "bom.jsonl": "\ufeff" + "".join(json.dumps({"text": text}) + "\n" for text in SAID),
    "a.json": json.dumps([{"text": text, "id": 1} for text in SAID]),
    "lines.txt": "\ufeffthe film was good, so good\r\n\r\nso awful\r\n",
    "lines": "the film was good, so good\n\nso awful",
}


@pytest.mark.parametrize("name", FILES)
def test_predict_reads_files_as_training_does(world: World, tmp_path: Path, name: str) -> None:
    """A header is no text, nor is a byte order mark a part of one."""
    (tmp_path / name).write_bytes(FILES[name].encode())
    said = call("predict", "--delta", world.delta, "--json", "--file", tmp_path / name)
    assert [row["text"] for row in said.json["predictions"]] == SAID
    noted = [line for line in said.err.splitlines() if line.startswith("note:")]
    assert noted == (["note: semicolons.csv parts its columns by a semicolon"] if "semi" in name else [])


def test_predict_keeps_a_text_whole_at_odd_characters(world: World, tmp_path: Path) -> None:
    texts = ["good \u2028 film", "bad \x0c \x85 film"]
    jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    (tmp_path / "raw.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts[:1]))
    (tmp_path / "a.txt").write_text("\n".join(texts))
    ask = ["predict", "--delta", world.delta, "--json", "--file"]
    for name, expected in (("a.jsonl", texts), ("raw.jsonl", texts[:1]), ("a.txt", texts)):
        assert [row["text"] for row in call(*ask, tmp_path / name).json["predictions"]] == expected


@pytest.mark.parametrize("command", ["tune", "search"])
def test_both_splits_of_training_can_be_limited(world: World, tmp_path: Path, command: str) -> None:
    typed = [command, *world.tune[1:5], "--out", tmp_path / "run", "--epochs", 1]
    more = ["--lr", 0.01] if command == "search" else []
    said = call(*typed, *more, "--limit", 8, "--limit-validation", 5)
    assert said.code == 0, said.err
    assert "8 train, 5 validation, 16 test" in said.err
    assert call(*typed, "--limit-validation", 0).code == 2


def test_predict_tags_words_of_a_file(world: World, tmp_path: Path) -> None:
    """The words of a file of tags are those that training saw, white space in them or not."""
    lines = "the O\nfilm B-X\n\nwas O\ngood O\n\n" * 8
    (tmp_path / "train.txt").write_text(lines)
    files = ["--model", world.base, "--data", tmp_path / "train.txt", "--out", tmp_path / "run", "--epochs", 1]
    said = call("tune", *files, "--metric", "token_accuracy")
    assert said.code == 0, said.err
    assert "train.txt is read as a word and its tags on each line" in said.err
    jsonl(tmp_path / "a.jsonl", [{"tokens": ["the", "film"]}, {"tokens": ["very good", "film", "a"]}])
    ask = ["predict", "--delta", tmp_path / "run", "--json", "--file"]
    found = call(*ask, tmp_path / "a.jsonl").json["predictions"]
    assert [len(row["answer"]) for row in found] == [2, 3]
    assert found[0]["text"] == "the film"
    assert [len(row["answer"]) for row in call(*ask, tmp_path / "train.txt").json["predictions"]] == [2, 2] * 8
    (tmp_path / "lines.txt").write_text("the film was\n")
    assert [len(row["answer"]) for row in call(*ask, tmp_path / "lines.txt").json["predictions"]] == [3]


def test_merge_gives_a_plain_model(world: World, tmp_path: Path) -> None:
    said = call("merge", "--delta", world.delta, "--out", tmp_path / "merged", "--json")
    assert said.json["class"] == "BertForSequenceClassification"
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    delta = sm.Delta.load(world.delta)
    model, tok = sm.load(world.base, delta=delta)
    batch = tok("the film was good", return_tensors="pt")
    with sm.attached(model, delta), torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_merge_tells_of_rounding_in_one_line(world: World, tmp_path: Path) -> None:
    said = call("merge", "--delta", world.delta, "--out", tmp_path / "merged", "--dtype", "bfloat16")
    assert said.code == 0, said.err
    lines = [line for line in said.err.splitlines() if line.startswith("note:")]
    assert len(lines) == 1
    assert "rounded" in lines[0]
    assert "model.safetensors" in said.out


def test_inspect(world: World) -> None:
    said = call("inspect", world.delta)
    assert said.code == 0, said.err
    for part in ("LN()", "neg, pos", "validation accuracy", "delta.safetensors", "fingerprint"):
        assert part in said.out
    report = call("inspect", world.delta, "--json").json
    assert report["trained"] == 5 * 32
    assert report["base"]["name"] == str(world.base)


def test_convert_to_peft_and_back(world: World, tmp_path: Path) -> None:
    said = call("convert", world.delta, tmp_path / "peft", "--to", "peft")
    assert said.code == 0, said.err
    assert "adapter_config.json" in said.out
    options = ["--model", world.base, "--data", world.data, "--json"]
    report = call("convert", tmp_path / "peft", tmp_path / "back", "--to", "smidgen", *options).json
    assert "delta.json" in report["files"]
    ours, theirs = sm.Delta.load(tmp_path / "back"), sm.Delta.load(world.delta)
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


def test_two_texts(tmp_path: Path) -> None:
    bert(tmp_path / "base")
    made = [{"premise": r["text"], "hypothesis": "it is good", "label": r["label"]} for r in rows(40)]
    data = jsonl(tmp_path / "pairs.jsonl", made)
    columns = ["--text", "premise", "--text", "hypothesis", "--label", "label"]
    files = ["--model", tmp_path / "base", "--data", data, "--out", tmp_path / "run"]
    said = call("tune", *files, "--epochs", 1, *columns)
    assert said.code == 0, said.err
    ask = ["predict", "--delta", tmp_path / "run", "--text", "the film was good"]
    assert call(*ask, "--pair", "it is good", "--json").json["predictions"][0]["pair"] == "it is good"
    alone = call(*ask)
    assert alone.code == 2
    assert "takes 2 texts; give --pair, or a --file with both columns" in alone.err


def _following(said: Said) -> list[list[str]]:
    """The commands that a run prints as the next ones, read as a shell does."""
    lines = said.out[said.out.index("next:") + 5 :].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip()]


def test_the_next_commands_run_as_they_are_printed(tmp_path: Path) -> None:
    """With a space in every name, columns that no one could guess, and no test split."""
    bert(tmp_path / "a base")
    made = [{"my text": r["text"], "that text": "it is", "its label": float(i % 2)} for i, r in enumerate(rows(40))]
    data = jsonl(tmp_path / "my data.jsonl", made)
    columns = ["--text", "my text", "--text", "that text", "--label", "its label", "--kind", "classification"]
    files = ["--model", tmp_path / "a base", "--data", data, "--out", tmp_path / "a run"]
    said = call("tune", *files, "--epochs", 1, *columns, "--metric", "f1")
    assert said.code == 0, said.err
    commands = _following(said)
    assert [command[0] for command in commands] == ["evaluate", "predict", "merge"]
    for command in commands:
        done = call(*command)
        assert done.code == 0, (command, done.err)
    assert "f1" in call(*commands[0], "--json").json["scores"]
    assert (tmp_path / "a run-merged" / "model.safetensors").exists()


def test_the_next_commands_name_no_more_than_was_given(world: World) -> None:
    run = ["--delta", str(world.delta)]
    assert _following(world.said) == [
        ["evaluate", *run, "--data", str(world.data)], ["predict", *run, "--text", "a text"],
        ["merge", *run, "--out", f"{world.delta}-merged"],
    ]  # fmt: skip


def test_causal_lm_continues(tmp_path: Path) -> None:
    llama(tmp_path / "base")
    data = jsonl(tmp_path / "lm.jsonl", [{"text": r["text"]} for r in rows(80)])
    options = ["--model", tmp_path / "base", "--data", data, "--kind", "causal-lm", "--max-length", 16]
    said = call("tune", *options, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 8)
    assert said.code == 0, said.err
    assert "validation perplexity" in said.out
    ask = ["predict", "--delta", tmp_path / "run", "--text", "the film", "--max-new-tokens", 4, "--json"]
    assert isinstance(call(*ask).json["predictions"][0]["answer"], str)


def _broken(world: World, folder: Path, change: Any) -> Path:
    shutil.copytree(world.delta, folder)
    change(folder)
    return folder


def _truncate(folder: Path) -> None:
    path = folder / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _scramble(folder: Path) -> None:
    path = folder / "delta.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def _add_key(folder: Path) -> None:
    meta = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps({**meta, "extra": 1}))


def _tune(world: World, **change: object) -> list[object]:
    options = {"model": world.base, "data": world.data, "out": "new", "epochs": 1, **change}
    return ["tune", *(part for key, value in options.items() for part in (f"--{key}", value))]


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MISTAKES: dict[str, tuple[Any, str]] = {
    "unknown model": (lambda w, t: _tune(w, model="no-such-model"), "cannot load the model 'no-such-model'"),
    "no such folder": (lambda w, t: _tune(w, model="./nowhere"), "no model at ./nowhere"),
    "misspelt method": (lambda w, t: _tune(w, recipe="LoRa(rnak=8)"), "did you mean 'LoRA'?"),
    "misspelt field": (lambda w, t: _tune(w, recipe="LoRA(rnak=8)"), "did you mean 'rank'?"),
    "unreadable recipe": (lambda w, t: _tune(w, recipe="LN("), "cannot read the recipe"),
    "no site": (lambda w, t: _tune(w, recipe="LN(which='qk')"), "matches no site"),
    "no site, plan": (
        lambda w, t: ["plan", "--model", w.base, "--recipe", "LN(which='qk')"],
        "matches no site",
    ),
    "missing data": (lambda w, t: _tune(w, data="nowhere.jsonl"), "not found: nowhere.jsonl"),
    "unknown data": (lambda w, t: _tune(w, data="bbc-new"), "did you mean 'bbc-news'?"),
    "empty data": (lambda w, t: _tune(w, data=jsonl(t / "empty.jsonl", [])), "empty"),
    "one label": (lambda w, t: _tune(w, data=jsonl(t / "one.jsonl", rows(40)[::2])), "label"),
    "unknown text column": (lambda w, t: _tune(w, text="txet"), "txet"),
    "unknown label column": (lambda w, t: _tune(w, label="lable"), "lable"),
    "unknown metric": (lambda w, t: _tune(w, metric="acuracy"), "did you mean 'accuracy'?"),
    "unknown kind": (lambda w, t: _tune(w, kind="classify"), "classify"),
    "unknown pooling": (lambda w, t: _tune(w, pooling="max"), "--pooling max"),
    "unknown dtype": (lambda w, t: _tune(w, dtype="float8"), "--dtype"),
    "lr below zero": (lambda w, t: _tune(w, lr=-1), "must be above 0"),
    "no epochs": (lambda w, t: _tune(w, epochs=0), "--epochs"),
    "another run": (lambda w, t: _tune(w, out=w.delta, seed=7), "holds another run"),
    "folder in use": (lambda w, t: _tune(w, out=w.data), "not empty"),
    "out is a file": (lambda w, t: _tune(w, out=w.data / "train.jsonl"), "is a file"),
    "missing option": (lambda w, t: ["tune", "--model", w.base], "Missing option"),
    "unknown option": (lambda w, t: _tune(w, epoch=1), "--epoch"),
    "unknown command": (lambda w, t: ["tun"], "No such command"),
    "truncated file": (lambda w, t: ["inspect", _broken(w, t / "d", _truncate)], "delta.safetensors"),
    "corrupt file": (lambda w, t: ["inspect", _broken(w, t / "d", _scramble)], "corrupt or truncated"),
    "extra key": (lambda w, t: ["inspect", _broken(w, t / "d", _add_key)], "unexpected extra"),
    "no delta": (lambda w, t: ["inspect", w.data], "holds no delta"),
    "no folder": (lambda w, t: ["inspect", "./nowhere"], "no delta at"),
    "another base": (
        lambda w, t: ["predict", "--delta", w.delta, "--model", bert(t / "other", 1), "--text", "good"],
        "other values",
    ),
    "another base, merge": (
        lambda w, t: ["merge", "--delta", w.delta, "--model", bert(t / "other", 1), "--out", "new"],
        "other values",
    ),
    "another class of base": (
        lambda w, t: ["predict", "--delta", w.delta, "--model", llama(t / "other"), "--text", "good"],
        "llama",
    ),
    "merge over files": (lambda w, t: ["merge", "--delta", w.delta, "--out", w.data], "not empty"),
    "no such split": (
        lambda w, t: ["evaluate", "--delta", w.delta, "--data", w.data, "--split", "tset"],
        "did you mean 'test'?",
    ),
    "nothing to predict": (
        lambda w, t: ["predict", "--delta", w.delta],
        "no texts to predict; give --text or --file",
    ),
    "a pair too much": (
        lambda w, t: ["predict", "--delta", w.delta, "--text", "a", "--pair", "b"],
        "takes 1 text; leave out --pair",
    ),
    "text without its column": (
        lambda w, t: ["predict", "--delta", w.delta, "--file", _file(t / "a.csv", "body,id\ngood,1\n")],
        "has no column 'text', which the delta's task reads; its columns are body, id",
    ),
    "empty text": (
        lambda w, t: ["predict", "--delta", w.delta, "--file", _file(t / "a.csv", "text,id\ngood,1\n,2\n")],
        "a.csv row 1: column 'text' is empty",
    ),
    "text of another type": (
        lambda w, t: ["predict", "--delta", w.delta, "--file", _file(t / "a.jsonl", '{"text": 5}\n')],
        "a.jsonl row 0: column 'text' is '5', not a text",
    ),
    "uneven rows to predict": (
        lambda w, t: ["predict", "--delta", w.delta, "--file", _file(t / "a.csv", "text,id\ngood,1\nso, so,2\n")],
        "a.csv line 3 has 3 fields, the header 2",
    ),
    "text and file": (
        lambda w, t: ["predict", "--delta", w.delta, "--text", "a", "--file", _file(t / "a.txt", "good\n")],
        "give --file, or --text and --pair, not both",
    ),
    "no such texts": (lambda w, t: ["predict", "--delta", w.delta, "--file", "nowhere.txt"], "cannot read"),
    "adapter without model": (lambda w, t: ["convert", w.data, "new", "--to", "smidgen"], "give --model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    build, expected = MISTAKES[case]
    args = build(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = _tree(world.root, tmp_path)
    said = call(*args)
    assert said.code == 2, said.err
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert said.err.splitlines()[-1] == errors[0]
    assert expected in errors[0]
    assert "Traceback" not in said.err
    assert _tree(world.root, tmp_path) == before


def _tree(*roots: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}


def test_debug_shows_the_traceback(world: World) -> None:
    with pytest.raises(sm.SmidgenError, match="holds no delta"):
        main(["inspect", str(world.data), "--debug"])


def test_a_bug_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smidgen.cli.views.results.inspected", lambda *_: 1 / 0)
    said = call("inspect", world.delta)
    assert said.code == 1
    assert said.err.startswith("error: ZeroDivisionError")
    assert "--debug" in said.err
