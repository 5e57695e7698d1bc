"""A server under load: 2,000 requests from 32 connections while deltas come, go and change, each answer checked."""

import collections
import http.client
import itertools
import json
import random
import socket
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

import smidgen as sm
from tests import helpers as h
from tests.test_http import files
from tests.test_mixed_layouts import trained
from tests.test_serving import RECIPES, TASK, TEXTS, apart, saved, server

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
import httpx
import uvicorn

from smidgen.serving.http.app import create_app

REQUESTS, CONNECTIONS = 2000, 32


def alone(model, delta):
    return sm.predict(model, TEXTS, delta=delta, tokenizer=h.tokenizer())


@pytest.fixture
def world(tmp_path):
    """The address, name -> answers that are right, and the two files of each delta that is put."""
    model = h.bert()
    steady = {f"d{i}": trained(model, recipe, i).with_info(task=TASK) for i, recipe in enumerate(RECIPES)}
    versions = [
        trained(model, recipe, seed).with_info(task=TASK) for recipe, seed in (("LN()", 21), ("LoRA(rank=2)", 22))
    ]
    right = {name: [alone(model, delta)] for name, delta in steady.items()}
    right["swapped"] = right["passing"] = [alone(model, delta) for delta in versions]
    assert apart(*right["swapped"]) > 1e-4
    given = [files(delta, tmp_path / f"v{i}") for i, delta in enumerate(versions)]
    found = server(model, saved(tmp_path / "all", steady))
    found.add("swapped", versions[0])
    listening = socket.create_server(("127.0.0.1", 0))
    process = uvicorn.Server(uvicorn.Config(create_app(found), log_level="warning"))
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield listening.getsockname()[1], right, given
    process.should_exit = True
    thread.join(60)


@pytest.fixture(scope="module")
def benchmark_load():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield pytest.importorskip("serving_load")
    finally:
        sys.path.remove(folder)


def test_the_benchmark_tells_contents_and_times_apart(benchmark_load):
    """benchmarks/serving_load.py takes an answer of the content of its time, and the one before within its window."""
    wanted = [{"so": {"yes": 0.1 * i, "no": 1 - 0.1 * i}} for i in range(3)]
    name = benchmark_load.Name("removed", [{}] * 3, wanted)

    def said(content, begin, end):
        status, answers = (404, None) if content is None else (200, [{"probabilities": wanted[content]["so"]}])
        return benchmark_load.verdict(name, ["so"], status, answers, begin, end)

    assert [said(i, 0, 1)[0] for i in (0, 1, 2, None)] == ["right", "wrong", "wrong", "wrong"]
    name.history.begin(2, 10.0)
    assert [said(i, 9, 11) for i in (0, 2)] == [("right", True)] * 2  # it is under way
    assert [said(i, 8, 9)[0] for i in (0, 2)] == ["right", "wrong"]
    name.history.end(12.0)
    name.history.begin(None, 20.0)
    name.history.end(22.0)
    name.history.begin(1, 30.0)
    name.history.end(32.0)
    times = {
        (11.5, 11.6): {0, 2},
        (12.1, 19): {2},
        (19, 21): {2, None},
        (23, 29): {None},
        (31, 33): {None, 1},
        (33, 40): {1},
    }
    for between, right in times.items():
        assert {i for i in (0, 1, 2, None) if said(i, *between)[0] == "right"} == right, between
    assert benchmark_load.verdict(name, ["so"], 500, None, 33, 40) == ("refused", False)
    near = [{"probabilities": {"yes": 0.1 + 2e-4, "no": 0.9 - 2e-4}}]
    assert benchmark_load.verdict(name, ["so"], 200, near, 33, 40)[0] == "wrong"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_none_is_lost_and_none_is_anothers(world):
    port, right, given = world
    numbers, counts, lock, done = itertools.count(), collections.Counter(), threading.Lock(), threading.Event()

    def verdict(name, status, content):
        """Which of the right answers it is, or what is wrong with it; only what comes and goes may be missing."""
        if status == 404 and name == "passing":
            return "passing is not there"
        if status != 200:
            return f"{name}: {status} {content}"
        told = [sm.Prediction(text, one["answer"], None, one["probabilities"])
                for text, one in zip(TEXTS, content["answers"], strict=True)]  # fmt: skip
        fitting = [i for i, wanted in enumerate(right[name]) if apart(told, wanted) < 1e-5]
        return f"{name} {fitting[0]}" if fitting else f"{name}: another's answer"

    def keep_asking(seed):
        draw = random.Random(seed)
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            while next(numbers) < REQUESTS:
                name = draw.choice(sorted(right))
                body = json.dumps({"model": name, "inputs": TEXTS})
                try:
                    connection.request("POST", "/v1/predict", body, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    said = verdict(name, answer.status, json.loads(answer.read()))
                except (OSError, http.client.HTTPException) as error:
                    said = f"{name}: lost, {error!r}"
                    connection.close()
                with lock:
                    counts[said] += 1

    def keep_changing():
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            for turn in itertools.count():
                if done.is_set():
                    return
                statuses = [client.put(f"/v1/deltas/{name}", files=given[turn % 2]).status_code
                            for name in ("swapped", "passing")]  # fmt: skip
                time.sleep(0.02)
                statuses.append(client.delete("/v1/deltas/passing").status_code)
                with lock:
                    counts[f"changes {statuses}"] += 1

    threads = [threading.Thread(target=keep_asking, args=(seed,), daemon=True) for seed in range(CONNECTIONS)]
    changing = threading.Thread(target=keep_changing, daemon=True)
    for thread in (changing, *threads):
        thread.start()
    for thread in threads:
        thread.join(240)
    done.set()
    changing.join(60)
    changes = {said: count for said, count in counts.items() if said.startswith("changes")}
    assert set(changes) == {"changes [201, 201, 204]"}
    asked = counts - collections.Counter(changes)
    good = {f"d{i} 0" for i in range(len(RECIPES))} | {"swapped 0", "swapped 1", "passing 0", "passing 1"}
    assert set(asked) <= good | {"passing is not there"}
    assert set(asked) >= good - {"passing 0", "passing 1"}  # both versions were seen, each whole
    assert sum(asked.values()) == REQUESTS
