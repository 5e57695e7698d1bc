"""The HTTP server: OpenAI's forms, errors with their statuses, adding and taking away, keys and limits."""

import json
import logging
import threading
import time

import pytest

import smidgen as sm
from smidgen.common.errors import WriteError
from smidgen.serving.errors import ServingError
from tests import helpers as h
from tests.test_mixed_layouts import trained
from tests.test_serving import RECIPES, TASK, TEXTS, saved, server

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from smidgen.serving.http.app import create_app
from smidgen.serving.http.options import HttpOptions, check_host, read_keys

pytestmark = pytest.mark.filterwarnings("ignore:.*httpx.*:DeprecationWarning")
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def classifiers():
    model = h.bert()
    return model, {f"d{i}": trained(model, r, i).with_info(task=TASK) for i, r in enumerate(RECIPES)}


@pytest.fixture
def client(classifiers, tmp_path):
    model, deltas = classifiers
    with TestClient(create_app(server(model, saved(tmp_path, deltas)))) as found:
        yield found


@pytest.fixture
def writer():
    model = h.causal("llama")
    tokenizer = h.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    found = sm.Server(model, processor=tokenizer)
    task = {"kind": "causal-lm", "text": ["text"]}
    found.add("tuned", trained(model, "LN()").with_info(task=task))
    with TestClient(create_app(found)) as client:
        yield client, found


def files(delta, folder):
    delta.save(folder)
    return {name: (folder / name).read_bytes() for name in ("delta.json", "delta.safetensors")}


def failed(answer, status, said):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert said in error["message"]


class Lines(logging.Handler):
    """What a logger says."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(logging.Formatter().format(record))


@pytest.fixture
def lines():
    handler, names = Lines(), ("smidgen.requests", "smidgen.serving")
    for name in names:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    yield handler.lines
    for name in names:
        logging.getLogger(name).removeHandler(handler)


def test_predictions_are_those_of_the_delta_alone(client, classifiers):
    model, deltas = classifiers
    for name, delta in deltas.items():
        answer = client.post("/v1/predict", json={"model": name, "inputs": TEXTS}).json()
        wanted = sm.predict(model, TEXTS, delta=delta, tokenizer=h.tokenizer())
        for one, other in zip(answer["answers"], wanted, strict=True):
            assert one["answer"] == other.answer
            assert one["probabilities"] == pytest.approx(other.probabilities, abs=1e-5)


def test_embeddings(client):
    answer = client.post("/v1/embeddings", json={"model": "d0", "input": TEXTS}).json()
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    assert all(sum(x * x for x in one["embedding"]) == pytest.approx(1, abs=1e-5) for one in answer["data"])
    other = client.post("/v1/embeddings", json={"model": "base", "input": TEXTS[0]}).json()
    assert other["data"][0]["embedding"] != answer["data"][0]["embedding"]


def test_names_and_cards(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["base", *(f"d{i}" for i in range(5))]
    page = client.get("/v1/deltas", params={"limit": 2}).json()
    assert [card["name"] for card in page["data"]] == ["d0", "d1"]
    assert (page["total"], page["next"]) == (5, "d1")
    rest = client.get("/v1/deltas", params={"after": "d1"}).json()
    assert [card["name"] for card in rest["data"]] == ["d2", "d3", "d4"]
    card = client.get("/v1/deltas/d1").json()
    assert card["recipe"] == "LoRA(rank=2)"
    assert not card["loaded"]  # known from its JSON
    assert (card["trained"], card["head"]) == (256, 34)
    failed(client.get("/v1/deltas/d9"), 404, "did you mean")
    failed(client.get("/v1/models/d9"), 404, "no delta is called")


def test_adding_replacing_and_taking_away(client, classifiers, tmp_path):
    model, _ = classifiers
    one, other = (trained(model, "LN()", seed).with_info(task=TASK) for seed in (11, 12))
    ask = {"model": "new", "inputs": ["good"]}
    failed(client.post("/v1/predict", json=ask), 404, "no delta is called 'new'")
    assert client.put("/v1/deltas/new", files=files(one, tmp_path / "x1")).status_code == 201
    first = client.post("/v1/predict", json=ask).json()
    assert client.put("/v1/deltas/new", files=files(other, tmp_path / "x2")).status_code == 201
    second = client.post("/v1/predict", json=ask).json()
    assert first != second
    foreign = trained(h.bert(seed=4), "LN()").with_info(task=TASK)
    failed(client.put("/v1/deltas/new", files=files(foreign, tmp_path / "x3")), 422, "another checkpoint")
    broken = {**files(one, tmp_path / "x4"), "delta.safetensors": b"\xff" * 8 + b"{}" * 50}
    failed(client.put("/v1/deltas/new", files=broken), 422, "corrupt or truncated")
    assert str(tmp_path) not in client.put("/v1/deltas/new", files=broken).text
    failed(client.put("/v1/deltas/new", files={"delta.json": b"{}"}), 422, "delta.safetensors")
    full = trained(model, "Full()").with_info(task=TASK)
    failed(client.put("/v1/deltas/new", files=files(full, tmp_path / "x5")), 422, "trained in place")
    assert client.post("/v1/predict", json=ask).json() == second
    assert client.delete("/v1/deltas/new").status_code == 204
    failed(client.post("/v1/predict", json=ask), 404, "no delta is called 'new'")
    failed(client.delete("/v1/deltas/new"), 404, "no delta is called 'new'")


def test_a_header_that_claims_terabytes(client, classifiers, tmp_path):
    model, _ = classifiers
    given = files(trained(model, "LN()").with_info(task=TASK), tmp_path / "x")
    record = json.loads(given["delta.json"])
    name = next(iter(record["tensors"]))
    record["tensors"][name]["shape"] = [2**40]
    header = json.dumps({name: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    values = len(header).to_bytes(8, "little") + header
    huge = {"delta.json": json.dumps(record).encode(), "delta.safetensors": values}
    failed(client.put("/v1/deltas/new", files=huge), 422, "delta.safetensors")


@pytest.mark.parametrize("name", ["%2e%2e%2fup", "a%00b", "x" * 290, ".hidden", "base", "a b"])
def test_names_that_are_none(client, classifiers, tmp_path, name):
    model, _ = classifiers
    given = files(trained(model, "LN()").with_info(task=TASK), tmp_path / "x")
    answer = client.put(f"/v1/deltas/{name}", files=given)
    assert answer.status_code in (404, 422), answer.text
    assert "error" in answer.json()
    assert client.put(f"/v1/deltas/{'x' * 301}", files=given).status_code == 422


def test_a_full_disk(client, classifiers, tmp_path, monkeypatch):
    def full(self, name, delta):
        raise WriteError("cannot write: no space left on device")

    model, _ = classifiers
    monkeypatch.setattr("smidgen.serving.delta_store.DeltaStore.save", full)
    given = files(trained(model, "LN()").with_info(task=TASK), tmp_path / "x")
    failed(client.put("/v1/deltas/new", files=given), 507, "no space left")
    failed(client.get("/v1/deltas/new"), 404, "no delta")


BAD = {
    "no JSON": (b"{", 400, "no JSON"),
    "no model": (b'{"inputs": ["x"]}', 422, "model"),
    "another field": (b'{"model": "d0", "inputs": ["x"], "more": 1}', 422, "more"),
    "nothing": (b'{"model": "d0", "inputs": []}', 422, "inputs"),
    "pairs": (b'{"model": "d0", "inputs": ["x"], "pairs": ["y"]}', 422, "takes 1 text"),
    "too many": (json.dumps({"model": "d0", "inputs": ["x"] * 300}).encode(), 422, "at most 256"),
    "too long": (json.dumps({"model": "d0", "inputs": ["x" * 200_000]}).encode(), 422, "200000 characters"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(client, name):
    body, status, said = BAD[name]
    failed(client.post("/v1/predict", content=body, headers={"content-type": "application/json"}), status, said)


def test_keys(classifiers):
    model, deltas = classifiers
    found = server(model)
    found.add("d0", deltas["d0"])
    with TestClient(create_app(found, HttpOptions(keys=frozenset({KEY})))) as client:
        body = {"model": "d0", "inputs": ["good"]}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer é"}):
            headers = {k: v.encode("latin-1") for k, v in headers.items()}
            failed(client.post("/v1/predict", json=body, headers=headers), 401, "give a key")
        assert client.post("/v1/predict", json=body, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
        assert client.get("/readyz").json()["needs_key"]
        failed(client.get("/metrics"), 401, "give a key")


def test_key_files_and_addresses(tmp_path):
    file = tmp_path / "keys"
    for text, said in (("", "no key"), ("short\n", "fewer than 16"), ("# none\n", "no key")):
        file.write_text(text)
        with pytest.raises(ServingError, match=said):
            read_keys(file)
    file.write_text(f"# ours\n{KEY}\n\n{KEY[::-1]}\n")
    assert read_keys(file) == {KEY, KEY[::-1]}
    with pytest.raises(ServingError, match="cannot be read"):
        read_keys(tmp_path / "none")
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, ())
    for host in ("0.0.0.0", "::", "example.org", "10.0.0.1"):
        check_host(host, [KEY])
        with pytest.raises(ServingError, match="api-key-file"):
            check_host(host, ())


def test_bodies_that_are_too_large(classifiers):
    model, _ = classifiers
    with TestClient(create_app(server(model), HttpOptions(body=1000))) as client:
        failed(client.post("/v1/predict", content=b"x" * 2000), 413, "larger than 1000")

        def pieces():
            for _ in range(20):
                yield b"x" * 100

        failed(client.post("/v1/predict", content=pieces()), 413, "larger than 1000")


def test_a_full_queue_and_a_server_that_stops(classifiers):
    model, deltas = classifiers
    found = server(model, limits=sm.Limits(queue=2))
    found.add("d0", deltas["d0"])
    with TestClient(create_app(found)) as client:
        answer = client.post("/v1/predict", json={"model": "d0", "inputs": TEXTS})
        failed(answer, 429, "at most 2 may")
        assert answer.headers["Retry-After"] == "1"
        found.close()
        failed(client.post("/v1/predict", json={"model": "d0", "inputs": ["good"]}), 503, "stopping")
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
    with TestClient(create_app(server(model), HttpOptions(requests=0))) as client:
        failed(client.get("/v1/models"), 429, "come again")


def test_a_fault_of_the_server_is_one_line_and_in_the_log(classifiers, monkeypatch, lines):
    model, _ = classifiers

    def fails(self, *args, **kwargs):
        raise RuntimeError("secret path")

    monkeypatch.setattr(sm.Server, "predict", fails)
    with TestClient(create_app(server(model)), raise_server_exceptions=False) as client:
        answer = client.post("/v1/predict", json={"model": "base", "inputs": ["good"]})
    failed(answer, 500, "the server failed (RuntimeError)")
    assert "secret" not in answer.text
    assert any("secret path" in line for line in lines)


def test_ids_log_and_metrics(client, lines):
    answer = client.post("/v1/predict", json={"model": "d0", "inputs": ["good"]}, headers={"X-Request-ID": "mine-1"})
    assert answer.headers["X-Request-ID"] == "mine-1"
    assert len(client.get("/healthz", headers={"X-Request-ID": "no\x7fgood"}).headers["X-Request-ID"]) == 32
    line = json.loads(next(line for line in lines if "mine-1" in line))
    assert line["status"] == 200
    assert line["delta"] == "d0"
    assert line["ms"] > 0
    numbers = client.get("/metrics").text
    assert 'smidgen_requests_total{route="/v1/predict",status="200"} 1.0' in numbers
    assert "smidgen_deltas 5.0" in numbers
    assert "smidgen_rows 1.0" in numbers


# OpenAI's forms


def test_completions(writer):
    client, found = writer
    body = {"model": "tuned", "prompt": "the film", "max_tokens": 8, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()
    wanted = found.generate("tuned", "the film", sm.Sampling(max_tokens=8))
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (wanted.text, wanted.reason)
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": wanted.tokens,
        "total_tokens": 4 + wanted.tokens,
    }
    assert client.post("/v1/completions", json={**body, "model": "base"}).json()["choices"] != answer["choices"]


def events(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_streams(writer):
    client, found = writer
    wanted = found.generate("tuned", "the film", sm.Sampling(max_tokens=8))
    body = {"model": "tuned", "prompt": "the film", "max_tokens": 8, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    *parts, last, counted, end = events(client.post("/v1/completions", json=body))
    assert end == "[DONE]"
    assert "".join(part["choices"][0]["text"] for part in parts) == wanted.text
    assert last["choices"][0]["finish_reason"] == wanted.reason
    assert counted["usage"]["completion_tokens"] == wanted.tokens
    said = {"messages": [{"role": "user", "content": "the film"}], "model": "tuned", "max_tokens": 8, "temperature": 0}
    whole = client.post("/v1/chat/completions", json=said).json()["choices"][0]["message"]
    first, *parts, last, end = events(client.post("/v1/chat/completions", json={**said, "stream": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == whole["content"]


@pytest.mark.parametrize(
    ("option", "status"),
    [({"n": 2}, 422), ({"logprobs": 3}, 422), ({"tools": [{}]}, 422), ({"best_of": 1}, 200), ({"n": 1}, 200),
     ({"user": "me"}, 200), ({"frequency_penalty": 0.5}, 422), ({"temperature": 3}, 422), ({"stop": [""]}, 422),
     ({"prompt": ""}, 422), ({"frequency_penalty": 0.0}, 200), ({"logprobs": False}, 200),
     ({"prompt": "the " * 100}, 422), ({"model": "tune"}, 404)],
)  # fmt: skip
def test_options_are_heeded_or_refused_by_name(writer, option, status):
    client, _ = writer
    answer = client.post("/v1/completions", json={"model": "tuned", "prompt": "the film", "max_tokens": 2, **option})
    assert answer.status_code == status, answer.text
    if status == 422:
        failed(answer, 422, next(iter(option)))


def test_a_classifier_writes_nothing(client):
    failed(client.post("/v1/completions", json={"model": "d0", "prompt": "the"}), 422, "writes no text")
    failed(client.post("/v1/chat/completions", json={"model": "d0", "messages": []}), 422, "messages")


# A real process' server


@pytest.fixture
def live(writer):
    """A uvicorn on a free port."""
    import socket

    import uvicorn

    _, found = writer
    listening = socket.create_server(("127.0.0.1", 0))
    process = uvicorn.Server(uvicorn.Config(create_app(found), log_level="warning"))
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not process.started and time.monotonic() < end:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", found
    process.should_exit = True
    thread.join(30)


def test_openais_client(live):
    openai = pytest.importorskip("openai")
    url, found = live
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["base", "tuned"]
        wanted = found.generate("tuned", "the film", sm.Sampling(max_tokens=8))
        options = {"model": "tuned", "max_tokens": 8, "temperature": 0}
        assert client.completions.create(prompt="the film", **options).choices[0].text == wanted.text
        parts = client.completions.create(prompt="the film", stream=True, **options)
        assert "".join(part.choices[0].text for part in parts) == wanted.text
        messages = [{"role": "user", "content": "the film"}]
        whole = client.chat.completions.create(messages=messages, **options).choices[0].message.content
        parts = client.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
        assert len(client.embeddings.create(model="tuned", input=["the film"]).data[0].embedding) == 16
        with pytest.raises(openai.NotFoundError, match="did you mean 'tuned'"):
            client.completions.create(prompt="x", model="tune")


def test_a_client_that_goes_away_frees_its_row(live):
    import httpx

    url, found = live
    body = {"model": "tuned", "prompt": "the", "max_tokens": 30, "temperature": 2, "seed": 1, "stream": True}
    with httpx.Client() as client, client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    end = time.monotonic() + 20
    while found.engine.writing and time.monotonic() < end:
        time.sleep(0.01)
    assert not found.engine.writing


def test_the_openapi_document_is_heeded(writer):
    """Answers to made-up requests, good and bad, have the statuses and forms that the document names."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi.checks import positive_data_acceptance  # no schema says what a delta's bytes are

    client, _ = writer
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 12
    some = settings(
        max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @some
            @given(case=operation.as_strategy(generation_mode=mode))
            def call(case):
                case.call_and_validate(excluded_checks=[positive_data_acceptance] if case.method == "PUT" else [])

            try:
                call()
            except Unsatisfiable:  # nothing can be wrong with a request that has no parts
                assert not operation.body
                assert mode is schemathesis.GenerationMode.NEGATIVE
