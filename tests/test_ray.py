"""Two replicas on a real Ray of this machine: one is killed under load, and the other answers."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

import smidgen as sm
from tests import helpers as h
from tests.test_mixed_layouts import trained

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.timeout(700), pytest.mark.filterwarnings("ignore")]


def ask(url, name):
    body = json.dumps({"model": name, "inputs": ["the film was good"]}).encode()
    request = urllib.request.Request(f"{url}/v1/predict", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["answers"][0]["probabilities"]


def test_a_replica_that_dies_under_load(tmp_path):
    from smidgen.serving.http.options import HttpOptions
    from smidgen.serving.http.ray_replicas import ReplicaOptions, serve_on_ray

    h.build("bert", "AutoModel").save_pretrained(tmp_path / "base")
    h.tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = sm.load(tmp_path / "base", task=h.task(tmp_path / "data"))
    wanted = {}
    for i, recipe in enumerate(["LN()", "LoRA(rank=2)"]):
        delta = trained(model, recipe, i).with_info(task={"kind": "classification", "text": ["text"]})
        delta.save(tmp_path / "deltas" / f"d{i}")
        (one,) = sm.predict(model, ["the film was good"], delta=delta, tokenizer=tokenizer)
        wanted[f"d{i}"] = pytest.approx(dict(one.probabilities), abs=1e-5)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ReplicaOptions(str(tmp_path / "base"), str(tmp_path / "deltas"), http=HttpOptions(requests=64), cores=0.1)
    stop, ready = threading.Event(), threading.Event()
    run = threading.Thread(
        target=serve_on_ray,
        args=(options, 2, "127.0.0.1", port, None, lambda where: ready.set(), stop),
        daemon=True,
    )
    run.start()
    assert ready.wait(400)
    url, right, wrong, lost, done = f"http://127.0.0.1:{port}", [], [], [], threading.Event()
    try:
        assert all(ask(url, name) == wanted[name] for name in wanted)

        def work(seed):
            i = seed
            while not done.is_set():
                name, i = f"d{i % 2}", i + 1
                try:
                    (right if ask(url, name) == wanted[name] else wrong).append(name)
                except (urllib.error.HTTPError, OSError) as error:
                    lost.append(str(error))
                    time.sleep(0.05)

        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        before = len(right)
        actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if "smidgen#smidgen" in a["name"]]
        assert len(actors) == 2
        ray.kill(ray.get_actor(actors[0]["name"], namespace=actors[0]["namespace"]))
        time.sleep(8)
        after = len(right)
        done.set()
        for thread in threads:
            thread.join(90)
        assert before > 10
        assert after > before + 10  # the other one answers meanwhile
        assert not wrong
        assert len(lost) <= 8  # those that the dead one had taken
    finally:
        stop.set()
        run.join(90)
