"""Clients that are slow or go away: others are answered meanwhile, and nothing is left behind at the time limit."""

import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time

import pytest
import torch
import transformers as T

import smidgen as sm
from tests import helpers as h
from tests.test_http import lines as lines
from tests.test_mixed_layouts import trained

pytest.importorskip("fastapi")
import uvicorn

from smidgen.serving import engine as engine_module
from smidgen.serving import forward_batches
from smidgen.serving.http.options import HttpOptions
from smidgen.serving.http.uvicorn_process import uvicorn_config

LIMIT = 1.0  # seconds of patience
LATE = LIMIT + 1.5  # by then it has ended
TOKENS = 6000
ENDLESS = {"model": "tuned", "prompt": "the film", "max_tokens": TOKENS, "temperature": 0}


def endless():
    """A causal LM, and a tokenizer without an end token: a text is as long as is asked for."""
    config = T.LlamaConfig(**{**h.BASE, "max_position_embeddings": TOKENS + 100}, num_key_value_heads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.LlamaForCausalLM(config).eval()
    tokenizer = h.tokenizer()
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    return model, tokenizer


class Live:
    """A running server, and what it holds."""

    def __init__(self, process, server, port):
        self.process, self.server, self.port = process, server, port
        self.looking = http.client.HTTPConnection("127.0.0.1", port, timeout=30)  # open all the time

    def connect(self, buffer=None):
        """A socket; one with a small buffer makes the server feel at once that nothing is read."""
        found = socket.socket()
        if buffer is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        found.settimeout(30)
        found.connect(("127.0.0.1", self.port))
        return found

    def ask(self, path="/v1/completions", **body):
        """Status and content of an answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            sent = json.dumps(body) if body else None
            connection.request("POST" if body else "GET", path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def number(self, name):
        """One of the numbers for Prometheus."""
        self.looking.request("GET", "/metrics")
        return float(re.search(rf"^smidgen_{name} (.*)$", self.looking.getresponse().read().decode(), re.MULTILINE)[1])

    def serves(self, connection):
        """Whether the server still holds a client's connection; of an answer in one piece the request ends before."""
        port = connection.getsockname()[1]
        return any(
            each.client is not None and each.client[1] == port for each in list(self.process.server_state.connections)
        )

    def held(self):
        """Requests, texts, rows, connections and files that are open, this look at them left out."""
        numbers = [self.number("requests_open") - 1, self.number("writing"), self.number("waiting")]
        return [*numbers, len(self.process.server_state.connections), len(os.listdir("/proc/self/fd"))]

    def free(self, before, seconds=LATE):
        """Waits until as much is held as was; how long that took."""
        begin = time.monotonic()
        while (now := self.held()) != before:
            assert time.monotonic() - begin < seconds, f"{now} are held, before it were {before}"
            time.sleep(0.02)
        return time.monotonic() - begin


@pytest.fixture
def live():
    model, tokenizer = endless()
    server = sm.Server(model, processor=tokenizer)
    server.add("tuned", trained(model, "LN()").with_info(task={"kind": "causal-lm", "text": ["text"]}))
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    process = uvicorn.Server(uvicorn_config(server, HttpOptions(client_timeout=LIMIT)))
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    found = Live(process, server, listening.getsockname()[1])
    found.ask(model="tuned", prompt="the", max_tokens=2)  # threads that stay are there
    found.number("rows")
    end = time.monotonic() + 10
    while len(process.server_state.connections) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    yield found
    found.looking.close()
    process.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def head(length, path="/v1/completions", **more):
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in more.items()), "", ""]).encode()


def all_of(connection):
    """What comes until the server closes; nothing if it cut the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            found += piece
    return found


SLOW = {
    "nothing at all": b"",
    "half of a line": b"POST /v1/compl",
    "headers that do not end": b"GET /v1/models HTTP/1.1\r\nHost: x\r\n",
    "no body": head(100),
    "half a body": head(100) + b'{"model": "tuned"',
    "chunks that do not end": head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"2\r\n{}\r\n",
    "a body where none is read": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
def test_a_request_that_does_not_end(live, sent):
    before, begin = live.held(), time.monotonic()
    with live.connect() as connection:
        connection.sendall(sent)
        for _ in range(3):
            assert live.ask(model="tuned", prompt="the", max_tokens=2)[0] == 200
        said = all_of(connection)
        assert LIMIT - 0.1 < time.monotonic() - begin < LATE
        if b"models" in sent and b"9" in sent:
            assert said.startswith(b"HTTP/1.1 200")  # it was answered, and is closed all the same
        else:
            status, body = said.split(b"\r\n", 1)[0], said.rpartition(b"\r\n\r\n")[2]
            assert status.startswith(b"HTTP/1.1 408")
            assert json.loads(body)["error"]["message"] == "the request was not here within 1 seconds"
    live.free(before)


def test_bodies_that_come_byte_by_byte(live):
    """The limit is of the whole request: a byte now and then does not keep it open."""
    before, threads = live.held(), threading.active_count()
    body = json.dumps(ENDLESS).encode()
    clients = [live.connect() for _ in range(20)]
    begin = time.monotonic()
    for connection in clients:
        connection.sendall(head(len(body)))
    ended = 0
    for byte in body:
        for connection in clients:
            with contextlib.suppress(ConnectionError):
                connection.sendall(bytes([byte]))
        assert live.ask(model="tuned", prompt="the", max_tokens=2)[0] == 200
        ended += 1
        if time.monotonic() - begin > LATE:
            break
        time.sleep(0.05)
    assert ended < len(body)
    for connection in clients:
        said = all_of(connection)
        assert not said or said.startswith(b"HTTP/1.1 408")
        connection.close()
    live.free(before)
    assert threading.active_count() <= threads + 1


def test_one_that_is_slow_within_the_limit_is_answered(live):
    body = json.dumps({"model": "tuned", "prompt": "the", "max_tokens": 2}).encode()
    with live.connect() as connection:
        connection.sendall(head(len(body), Connection="close"))
        for byte in body:
            connection.sendall(bytes([byte]))
            time.sleep(0.5 * LIMIT / len(body))
        assert all_of(connection).startswith(b"HTTP/1.1 200")


def test_a_connection_at_rest_stays(live):
    """Between two requests a client may be silent for longer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)) as connection:
        for _ in range(2):
            connection.request("GET", "/v1/models")
            assert connection.getresponse().read()
            held = connection.sock
            time.sleep(1.5 * LIMIT)
        assert connection.sock is held


def test_an_answer_that_takes_its_time_is_the_servers_affair(live, monkeypatch):
    real = forward_batches.compute

    def slow(requests):
        time.sleep(1.5 * LIMIT)
        return real(requests)

    monkeypatch.setattr(engine_module, "compute", slow)
    assert live.ask("/v1/embeddings", model="tuned", input=["the film"])[0] == 200


READERS = {"a stream": ("/v1/completions", {**ENDLESS, "stream": True}),
           "a whole answer": ("/v1/embeddings", {"model": "tuned", "input": ["the film"] * 256})}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("pace", [0, 1])
def test_one_that_does_not_read_or_hardly(live, name, pace):
    """It is cut off, the text that is written for it ends, and what it was not sent is forgotten."""
    path, body = READERS[name]
    before, threads, sent = live.held(), threading.active_count(), json.dumps(body).encode()
    with live.connect(buffer=2048) as connection:
        connection.sendall(head(len(sent), path) + sent)
        begin = time.monotonic()
        while not live.serves(connection):
            assert time.monotonic() - begin < 10
        while live.serves(connection):
            assert live.ask(model="tuned", prompt="the", max_tokens=2)[0] == 200
            assert time.monotonic() - begin < 15
            if pace:
                connection.recv(pace)
            time.sleep(0.02)
        live.free([*before[:-1], before[-1] + 1])  # the client's own socket is still open
        assert LIMIT - 0.1 < time.monotonic() - begin < 6 * LATE  # what fits into the system's buffers comes first
    live.free(before)
    assert threading.active_count() <= threads + 1


def test_one_that_reads_with_rests_gets_all(live):
    path, body = READERS["a whole answer"]
    sent, found, rests = json.dumps(body).encode(), b"", 4
    with live.connect(buffer=2048) as connection:
        connection.sendall(head(len(sent), path, Connection="close") + sent)
        for _ in range(rests):
            found += connection.recv(1000)
            time.sleep(0.5 * LIMIT / rests)
        found += all_of(connection)
    assert len(json.loads(found.partition(b"\r\n\r\n")[2])["data"]) == 256


@pytest.mark.parametrize("stream", [True, False])
def test_one_that_goes_away(live, stream):
    """Its text is written no further, whether it is a stream or not, and nothing waits for the time limit."""
    before, sent = live.held(), json.dumps({**ENDLESS, "stream": stream}).encode()
    with live.connect() as connection:
        connection.sendall(head(len(sent)) + sent)
        end = time.monotonic() + 20
        while not live.number("writing"):
            assert time.monotonic() < end
        if stream:
            assert connection.recv(10)
    assert live.free(before) < LIMIT
    assert live.number("tokens") < TOKENS


def test_the_log_tells_who_was_late_from_who_went(live, lines):
    for close in (False, True):
        with live.connect() as connection:
            connection.sendall(SLOW["half a body"])
            if not close:
                all_of(connection)
    with live.connect() as connection:
        sent = json.dumps(ENDLESS).encode()
        connection.sendall(head(len(sent)) + sent)
        while not live.number("writing"):
            time.sleep(0.01)
    end = time.monotonic() + 10
    while (told := [json.loads(line)["status"] for line in lines if "completions" in line]) != [408, 499, 499]:
        assert time.monotonic() < end, told
        time.sleep(0.02)


def test_one_that_goes_away_within_its_body(live):
    before = live.held()
    for sent in SLOW.values():
        with live.connect() as connection:
            connection.sendall(sent)
            time.sleep(0.05)
    assert live.free(before) < LIMIT
