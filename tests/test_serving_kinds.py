"""Every kind of task from a server, in Python and over HTTP: as the delta alone says; what is not served is refused."""

import base64
import math
import re

import pytest
import transformers as T

import smidgen as sm
from smidgen.common.errors import AttachError, DataError
from smidgen.data.kinds.base import TaskKind
from smidgen.serving.errors import ServingError, UnknownDeltaError
from tests import helpers as h
from tests import media
from tests.test_mixed_layouts import trained
from tests.test_pair_kinds import asked, scored
from tests.test_text_kinds import masking, plain, questions, t5, written

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from smidgen.serving.http.app import create_app

pytestmark = pytest.mark.filterwarnings("ignore:.*httpx.*:DeprecationWarning")
RECIPES = ["LN()", "LoRA(rank=2)"]
LONG = " ".join(["the film and the plot"] * 9)  # more than one window of 32 tokens


def numbered(count, start=0):
    return [{"text": row["text"], "label": i % 5 + 0.5} for i, row in enumerate(h.rows(count, start))]


def tagged(count, start=0):
    rows = [row["text"].split() for row in h.rows(count, start)]
    return [{"tokens": row, "tags": ["B-x" if i % 2 else "O" for i in range(len(row))]} for row in rows]


def judged(count, start=0):
    rows = h.rows(count, start)
    return [{"premise": row["text"], "hypothesis": "the film", "label": row["label"]} for row in rows]


TEXTS = ["the film was good", "awful", "it is a very poor plot and so is the film"]
OTHERS = ["the plot was fine", "good film", "so"]
TEXT_KINDS = {  # rows of a task, inputs, second inputs
    "classification": (h.rows, TEXTS, None),
    "classification of two": (judged, TEXTS, OTHERS),
    "regression": (numbered, TEXTS, None),
    "tokens": (tagged, [*TEXTS[:2], TEXTS[2].split()], None),
    "pairs": (scored, TEXTS, OTHERS),
    "retrieval": (asked, TEXTS, OTHERS),
    "span-qa": (questions, ["the film was", "was it", "the film"], [TEXTS[2], LONG, TEXTS[0]]),
}
FILE_KINDS = ["image-classification", "audio-classification"]
UNSERVED = ["masked-lm", "seq2seq"]


def test_no_kind_is_left_out():
    known = {name for name, kind in TaskKind.registry.items() if type(kind).__module__.startswith("smidgen.")}
    tested = {name.removesuffix(" of two") for name in TEXT_KINDS} | {*FILE_KINDS, *UNSERVED}
    own = {"causal-lm", "chat"}  # which have tests of their own, in test_serving, test_http and test_chat_terminal
    assert tested | own == known


def value(answer):
    """An answer without its probabilities."""
    return answer["answer"] if isinstance(answer, dict) else answer.answer


def odds(answer):
    return answer["probabilities"] if isinstance(answer, dict) else answer.probabilities


def same(found, wanted):
    """Whether answers are those, numbers within rounding."""
    return len(found) == len(wanted) and all(
        (
            math.isclose(value(one), value(other), abs_tol=1e-4)
            if isinstance(value(other), float)
            else value(one) == value(other)
        )
        and odds(one).keys() == odds(other).keys()
        and all(math.isclose(odds(one)[k], p, abs_tol=1e-4) for k, p in odds(other).items())
        for one, other in zip(found, wanted, strict=True)
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A server of one encoder with two deltas of each kind, and what each says alone."""
    folder = tmp_path_factory.mktemp("kinds")
    h.build("bert", "AutoModel").save_pretrained(folder / "base")
    h.tokenizer().save_pretrained(folder / "base")
    base, tokenizer = sm.load(folder / "base")
    wanted = {}
    with sm.Server(base, processor=tokenizer) as server:
        for name, (make, inputs, seconds) in TEXT_KINDS.items():
            options = {} if "classification" in name else {"kind": name}
            task = h.task(folder / name, make=make, **options)
            assert task.kind == name.removesuffix(" of two")
            for seed, recipe in enumerate(RECIPES):
                model, _ = sm.load(folder / "base", task=task)
                info = {"task": {"kind": task.kind, "text": list(task.text)}}
                delta = trained(model, recipe, seed).with_info(**info)
                wanted[name, seed] = sm.predict(model, inputs, delta=delta, tokenizer=tokenizer, pairs=seconds)
                server.add(f"{name.replace(' ', '-')}{seed}", delta)
        with TestClient(create_app(server)) as client:
            yield server, client, wanted


@pytest.mark.parametrize("seed", range(len(RECIPES)))
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_texts_are_answered_as_by_the_delta_alone(texts, kind, seed):
    server, client, wanted = texts
    _, inputs, seconds = TEXT_KINDS[kind]
    name, right = f"{kind.replace(' ', '-')}{seed}", wanted[kind, seed]
    assert not same(right, wanted[kind, 1 - seed])  # the two can be told apart
    assert same(server.predict(name, inputs, pairs=seconds), right)
    answer = client.post("/v1/predict", json={"model": name, "inputs": inputs, "pairs": seconds})
    assert answer.status_code == 200, answer.text
    assert same(answer.json()["answers"], right)


@pytest.fixture(
    scope="module", params=[("image-classification", "vit"), ("audio-classification", "wav2vec2")], ids=lambda p: p[1]
)
def files(request, tmp_path_factory):
    """A server for images or sounds, files, and what each delta says of them alone."""
    kind, name = request.param
    folder = tmp_path_factory.mktemp(name)
    if kind == "audio-classification":
        pytest.importorskip("soundfile")
        model, processor = getattr(media, name)()
        paths = sorted(media.tones(folder).rglob("*.wav"))[:20:4]
    else:
        model, processor = media.vit(), media.image_processor()
        paths = sorted(media.pictures(folder).rglob("*.png"))[:20:4]
    given = [str(path) for path in paths]
    wanted = {}
    with sm.Server(model, processor=processor) as server:
        for seed, recipe in enumerate(RECIPES):
            delta = trained(model, recipe, seed).with_info(task={"kind": kind, "text": [kind.split("-")[0]]})
            wanted[f"d{seed}"] = sm.predict(model, given, delta=delta, processor=processor)
            server.add(f"d{seed}", delta)
        with TestClient(create_app(server)) as client:
            yield server, client, paths, wanted


def test_files_are_answered_as_by_the_delta_alone(files):
    """In Python by path or content, over HTTP by content."""
    server, client, paths, wanted = files
    assert not same(wanted["d0"], wanted["d1"])
    sent = [f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in paths]
    for name, right in wanted.items():
        assert same(server.predict(name, [str(path) for path in paths]), right)
        assert same(server.predict(name, [path.read_bytes() for path in paths]), right)
        answer = client.post("/v1/predict", json={"model": name, "inputs": sent})
        assert answer.status_code == 200, answer.text
        assert same(answer.json()["answers"], right)


def test_a_head_that_rows_cannot_share_is_refused_when_it_is_added():
    """AST's begins with a norm."""
    pytest.importorskip("soundfile")
    model, extractor = media.ast()
    delta = trained(model, "LN()").with_info(task={"kind": "audio-classification", "text": ["audio"]})
    with sm.Server(model, processor=extractor) as server:
        with pytest.raises(AttachError, match="LayerNorm at classifier.layernorm.weight is no plain linear map"):
            server.add("x", delta)
        assert not server.bank.names()


def test_over_http_nobody_reads_the_servers_files(files):
    _, client, paths, _ = files
    for model in ("d0", "base"):
        for given in (str(paths[0]), "/etc/passwd", paths[0].name, "data:;base64,%%%", "data:text/plain,x", ["a"]):
            answer = client.post("/v1/predict", json={"model": model, "inputs": [given]})
            assert answer.status_code == 422, answer.text
            assert "data:;base64," in answer.json()["error"]["message"]
    answer = client.post("/v1/predict", json={"model": "d0", "inputs": ["data:;base64,bm9uZQ=="]})
    assert answer.status_code == 422  # it is content, of nothing that can be read
    assert re.search("(image|audio) 0", answer.json()["error"]["message"])


def test_a_text_that_looks_like_a_file_is_a_text(texts):
    _, client, _ = texts
    answer = client.post("/v1/predict", json={"model": "classification0", "inputs": ["data:;base64,bm9uZQ=="]})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", UNSERVED)
def test_what_is_not_served_is_refused_by_name_when_it_is_added(kind, tmp_path):
    """Its answers are more than rows of outputs, and would be the base's."""
    masked = kind == "masked-lm"
    model = h.build("bert", "AutoModelForMaskedLM") if masked else t5()
    task = h.task(tmp_path / "data", make=plain if masked else written, kind=kind)
    delta = trained(model, "LN()").with_info(task={"kind": kind, "text": list(task.text)})
    delta.save(tmp_path / "deltas" / "there")
    with sm.Server(model, tmp_path / "deltas", processor=masking()) as server:
        for asking in (
            lambda: server.add("x", delta),
            lambda: server.predict("there", ["the [UNK] was good"]),
            lambda: server.predict("base", ["the [UNK] was good"]),
        ):
            with pytest.raises(ServingError, match=rf"{kind} tasks are not served.*smidgen\.predict"):
                asking()
        with pytest.raises(UnknownDeltaError):
            server.predict("x", ["the"])


def test_a_kind_of_ones_own_that_calls_the_model_is_refused_when_it_is_asked():
    """It would get the base's answer."""

    class Shouting(type(TaskKind.registry["classification"])):
        """Classification by a call of the model."""

        name = "shouting"

        def answers(self, question):
            """Of the model itself."""
            return question.model(**question.processor(list(question.inputs), return_tensors="pt"))

    try:
        model = h.bert()
        delta = trained(model, "LN()").with_info(task={"kind": "shouting", "text": ["text"]})
        with sm.Server(model, processor=h.tokenizer()) as server:
            server.add("x", delta)
            with pytest.raises(ServingError, match="shouting tasks are not served"):
                server.predict("x", ["good"])
    finally:
        del TaskKind.registry["shouting"]


def test_a_class_that_the_base_has_not_is_named():
    model = T.MambaModel(T.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1)).eval()
    delta = trained(model, "LN()").with_info(task={"kind": "span-qa", "text": ["question", "context"]})
    with sm.Server(model, processor=h.tokenizer()) as server, pytest.raises(ServingError, match="span-qa tasks"):
        server.add("x", delta)


@pytest.mark.parametrize(("kind", "pairs"), [("pairs0", None), ("span-qa0", None), ("tokens0", OTHERS)])
def test_the_number_of_texts_is_checked(texts, kind, pairs):
    server, client, _ = texts
    with pytest.raises(DataError, match="takes [12] text"):
        server.predict(kind, TEXTS, pairs=pairs)
    assert client.post("/v1/predict", json={"model": kind, "inputs": TEXTS, "pairs": pairs}).status_code == 422
