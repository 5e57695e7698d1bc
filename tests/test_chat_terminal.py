"""`smidgen chat`: turns of a person and of a pipe, commands, Ctrl-C and Ctrl-D, the base beside the delta, mistakes."""

from __future__ import annotations

import io
import json

import pytest
import torch

import smidgen as sm
from smidgen.cli.chat_terminal import Terminal
from smidgen.cli.commands import main
from smidgen.serving.errors import ServingError
from tests import chats as c
from tests import helpers as h

GREEDY = sm.Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model's folder, and a run that makes it say something else."""
    folder = tmp_path_factory.mktemp("chat")
    c.model().save_pretrained(folder / "model")
    c.tokenizer().save_pretrained(folder / "model")
    h.jsonl(folder / "chats.jsonl", c.rows(24))
    options = [
        "--kind",
        "chat",
        "--data",
        str(folder / "chats.jsonl"),
        "--lr",
        "0.3",
        "--epochs",
        "1",
        "--samples",
        "2",
    ]
    line = ["tune", "--model", str(folder / "model"), *options, "--max-new-tokens", "8", "--out", str(folder / "run")]
    assert main(line) == 0
    return folder


@pytest.fixture(scope="module")
def server(trained):
    model, tokenizer = sm.load(trained / "model", delta=sm.Delta.load(trained / "run"))
    with sm.Server(model, processor=tokenizer) as found:
        found.add("delta", trained / "run")
        yield found


def typed(monkeypatch, *lines):
    """A person who types lines, then Ctrl-D; an exception is Ctrl-C and the like."""
    left = list(lines)

    def read(prompt):
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    stdin = io.StringIO()
    stdin.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("builtins.input", read)


def piped(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def alone(trained, messages, delta):
    """What a model writes greedily by transformers' own generate."""
    model, tokenizer = sm.load(trained / "model", delta=sm.Delta.load(trained / "run"))
    if delta:
        sm.attach(model, sm.Delta.load(trained / "run"))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


# A session


def test_answers_are_those_of_generate_turn_by_turn(trained, server):
    session, said = sm.ChatSession(server, "delta", GREEDY, system="Be brief."), []
    for delta, text in (("delta", "what is 3?"), (None, "why"), ("delta", "ok")):
        session.delta = delta
        said.append("".join(session.say(text)))
        assert said[-1] == alone(trained, [*session.turns[:-2], {"role": "user", "content": text}], delta)
    assert [turn["role"] for turn in session.turns] == ["system", *["user", "assistant"] * 3]
    assert [turn["content"] for turn in session.turns[2::2]] == said
    assert said[0] != alone(trained, session.turns[:2], None), "the delta and the base say the same"
    session.reset()
    assert session.turns == [{"role": "system", "content": "Be brief."}]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(server):
    session = sm.ChatSession(server, "delta", sm.Sampling(max_tokens=200))
    pieces = session.say("what is 3?")
    first = next(pieces)
    pieces.close()
    assert session.turns[-1] == {"role": "assistant", "content": first}
    assert session.done is None


def test_a_conversation_that_has_no_room_stays_as_it_was(server):
    session = sm.ChatSession(server, "delta", GREEDY)
    "".join(session.say("hi"))
    before = list(session.turns)
    with pytest.raises(ServingError, match="the model has 512 positions for the whole text"):
        "".join(session.say("word " * 400))
    assert session.turns == before


def test_a_model_without_a_template_is_refused_before_the_first_turn(tmp_path):
    with (
        sm.Server(c.model(), processor=c.tokenizer(None)) as server,
        pytest.raises(ServingError, match="no chat templ"),
    ):
        sm.ChatSession(server)


def test_what_writes_no_text_is_refused_before_the_first_turn():
    with sm.Server(h.bert(), processor=h.tokenizer()) as server, pytest.raises(ServingError, match="writes no text"):
        sm.ChatSession(server)


# A person


def test_commands_of_a_person(monkeypatch, capsys, server):
    session = sm.ChatSession(server, "delta", GREEDY)
    lines = ["", "hi", "/base", "hi", "/nothing here", "/help", "/reset", "/exit", "never read"]
    typed(monkeypatch, *lines)
    Terminal(session, "delta", "LN()").run()
    out, err = capsys.readouterr()
    assert out.startswith("LN()> ")
    assert "\nbase> " in out
    told = [line for line in err.splitlines() if "was cut" not in line]
    assert told == [
        "LN(): /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves",
        "base answers from here on",
        "error: no command is called '/nothing'; there are /reset, /base, /help, /exit",
        "/reset: forgets what was said",
        "/base: changes between the delta and its base",
        "/help: says this",
        "/exit: leaves, as Ctrl-D does",
        "what was said is forgotten",
    ]
    assert session.turns == []


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(monkeypatch, capsys, server):
    session = sm.ChatSession(server, "delta", GREEDY)
    say = session.say

    def stopped(text):
        pieces = say(text)
        yield next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    session.say = stopped
    typed(monkeypatch, KeyboardInterrupt(), "hi")
    Terminal(session, "delta", "LN()").run()
    out, err = capsys.readouterr()
    assert err.splitlines()[1:] == ["Ctrl-D or /exit leaves", "stopped"]
    assert len(session.turns) == 2
    assert out.endswith("\n")


def test_an_error_leaves_a_person_in_the_conversation(monkeypatch, capsys, server):
    typed(monkeypatch, "word " * 400, "hi")
    session = sm.ChatSession(server, "delta", GREEDY)
    Terminal(session, "delta", "LN()").run()
    assert "error: the prompt has" in capsys.readouterr().err
    assert session.turns[0] == {"role": "user", "content": "hi"}


def test_a_terminal_gets_no_control_sequences(monkeypatch, capsys, server):
    typed(monkeypatch, "hi")
    session = sm.ChatSession(server, "delta", GREEDY)
    session.say = lambda text: (piece for piece in ["a\x1b[2J", "b\r\n\tc"])
    Terminal(session, "delta", "LN()").run()
    assert capsys.readouterr().out == "LN()> a\ufffd[2Jb\ufffd\n\tc\n\n"


# The command


OPTIONS = ["--temperature", "0", "--max-new-tokens", "8"]


def test_lines_of_a_pipe_are_turns(monkeypatch, capsys, trained):
    piped(monkeypatch, "what is 3?\nwhy\n")
    assert main(["chat", "--delta", str(trained / "run"), *OPTIONS]) == 0
    out = capsys.readouterr().out
    turns = [{"role": "user", "content": "what is 3?"}]
    first = alone(trained, turns, "delta")
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "why"}]
    assert out == f"{first}\n{alone(trained, turns, 'delta')}\n"


def test_json_has_the_turns(monkeypatch, capsys, trained):
    piped(monkeypatch, "hi\n")
    assert main(["chat", "--delta", str(trained / "run"), "--base-only", "--json", "--system", "S", *OPTIONS]) == 0
    found = json.loads(capsys.readouterr().out)
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    assert found["base_only"] is True
    assert found["turns"] == [*turns, {"role": "assistant", "content": alone(trained, turns, None)}]


def test_a_base_alone_can_be_talked_with(monkeypatch, capsys, trained):
    piped(monkeypatch, "hi\n/base\n")
    assert main(["chat", "--model", str(trained / "model"), *OPTIONS]) == 0
    out, err = capsys.readouterr()
    assert out == alone(trained, [{"role": "user", "content": "hi"}], None) + "\n"
    assert "there is the base alone; begin with --delta to compare" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --delta, the folder of a run, or --model for a base alone"),
        (["--delta", "nowhere"], "nowhere"),
        (["--delta", "RUN", "--temperature", "-1"], "temperature"),
        (["--delta", "RUN", "--top-p", "0"], "--top-p 0.0: above 0, at most 1"),
        (["--model", "BERT"], "answers classification tasks and writes no text"),
    ],
)
def test_mistakes_are_one_line_and_end_with_2(monkeypatch, capsys, trained, options, said):
    if "BERT" in options:
        h.bert().save_pretrained(trained / "bert")
        h.tokenizer().save_pretrained(trained / "bert")
    names = {"RUN": str(trained / "run"), "BERT": str(trained / "bert")}
    piped(monkeypatch, "hi\n")
    assert main(["chat", *(names.get(word, word) for word in options)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.splitlines()[-1].startswith("error: ")


def test_a_chat_file_that_is_wrong_is_one_line(capsys, tmp_path, trained):
    bad = h.jsonl(
        tmp_path / "bad.jsonl", [{"messages": c.turns("a", "b")}, {"messages": [{"role": "user", "content": ""}]}]
    )
    line = [
        "tune",
        "--model",
        str(trained / "model"),
        "--kind",
        "chat",
        "--data",
        str(bad),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(line) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "error: train row 1, turn 0 (user) is empty; fill the turn, or drop the row (rows are counted from 0)"
    ]
    h.jsonl(tmp_path / "good.jsonl", c.rows(20))
    plain = tmp_path / "plain"
    c.model().save_pretrained(plain)
    c.tokenizer(None).save_pretrained(plain)
    line[2], line[6] = str(plain), str(tmp_path / "good.jsonl")
    assert main(line) == 2
    assert "error: the tokenizer has no chat template" in capsys.readouterr().err


def test_a_base_alone_is_scored(capsys, trained):
    line = ["--data", str(trained / "chats.jsonl"), "--kind", "chat", "--split", "validation", "--json"]
    assert main(["evaluate", "--model", str(trained / "model"), *line]) == 0
    base = json.loads(capsys.readouterr().out)
    assert base["delta"] is None
    before = json.loads((trained / "run" / "report.json").read_text())["data"]["before"]
    assert base["scores"]["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert main(["evaluate", "--delta", str(trained / "run"), *line]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["loss"] != pytest.approx(base["scores"]["loss"], abs=1e-3)


def test_a_base_with_a_random_head_is_not_scored(capsys, tmp_path):
    h.bert().base_model.save_pretrained(tmp_path / "bert")
    h.tokenizer().save_pretrained(tmp_path / "bert")
    h.task(tmp_path / "data")
    assert main(["evaluate", "--model", str(tmp_path / "bert"), "--data", str(tmp_path / "data")]) == 2
    assert "has no head for classification but a random one" in capsys.readouterr().err


# The report of a run


def test_a_run_reports_what_is_written_before_and_after(trained):
    text = (trained / "run" / "report.md").read_text()
    samples = json.loads((trained / "run" / "report.json").read_text())["data"]["samples"]
    assert text.startswith("# LN() on chats\n")
    assert len(samples) == 2
    assert "| before | " in text
    assert "| 1 | " in text
    for sample in samples:
        assert set(sample) == {"asked", "right", "before", "after"}
        assert sample["before"] != sample["after"]
        for quoted in sample.values():
            assert quoted in text
    assert "white-space: pre-wrap" in (trained / "run" / "report.html").read_text()


def test_samples_are_what_each_of_the_two_writes(trained):
    delta = sm.Delta.load(trained / "run")
    task = sm.Task.load(trained / "chats.jsonl", kind="chat")
    model, tokenizer = sm.load(trained / "model", task=task)
    found = sm.write_samples(model, task, delta, count=3, processor=tokenizer, max_new_tokens=8)
    rows = task.splits["validation"]["messages"][:3]
    for messages, sample in zip(rows, found, strict=True):
        assert sample.right == messages[-1]["content"].strip()
        assert sample.before == alone(trained, messages[:-1], None).strip()
        assert sample.after == alone(trained, messages[:-1], "delta").strip()


def test_a_kind_that_writes_nothing_has_no_samples(tmp_path):
    task = h.task(tmp_path)
    model = h.bert()
    delta = sm.fit(model, "LN()", task, tokenizer=h.tokenizer(), epochs=1, progress=False)
    with pytest.raises(sm.DataError, match="has its model write nothing"):
        sm.write_samples(model, task, delta, processor=h.tokenizer())


def test_fences_are_longer_than_those_within():
    from smidgen.studies.reports.markdown_report import markdown
    from smidgen.studies.reports.report import Report
    from smidgen.studies.reports.sections import Quotes

    said = "see\n````python\n# no head\n````"
    text = markdown(Report("R", [], [Quotes("Q", {"after": said})]))
    assert f"`````text\n{said}\n`````" in text
