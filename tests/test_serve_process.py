"""How the process of `smidgen serve` ends, its log, its keys, and what it says when a package is missing."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing, contextmanager

import pytest

from tests import helpers as h
from tests.test_mixed_layouts import trained
from tests.test_serving import TASK, TEXTS

pytest.importorskip("fastapi")
pytestmark = pytest.mark.timeout(180)
KEYS = ("0123456789abcdef", "fedcba9876543210")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command for a base with one delta, and keys."""
    folder = tmp_path_factory.mktemp("serve")
    model = h.bert()
    model.save_pretrained(folder / "base")
    h.tokenizer().save_pretrained(folder / "base")
    trained(model, "LN()").with_info(task=TASK).save(folder / "deltas" / "one")
    (folder / "keys").write_text("\n".join(KEYS))
    options = {"--model": "base", "--deltas": "deltas", "--api-key-file": "keys"}
    placed = [part for name, file in options.items() for part in (name, str(folder / file))]
    return [sys.executable, "-m", "smidgen.cli", "serve", "--port", "0", *placed]


@contextmanager
def serving(command):
    """The process, its port, and the lines that it says."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
    lines = [process.stderr.readline()]
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    try:
        assert lines[0].startswith("http://127.0.0.1:"), lines
        yield process, int(lines[0].split()[0].rsplit(":", 1)[1]), lines
    finally:
        process.kill()
        process.wait(30)
        reader.join(30)
        process.stderr.close()


def ask(port, method, path, body=None, **headers):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        answer.read()
        return answer.status


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(command, stop):
    """Whoever supervises it sees status 0, not a process that a signal has killed."""
    with serving(command) as (process, port, lines):
        assert ask(port, "GET", "/healthz") == 200
        process.send_signal(stop)
        assert process.wait(60) == 0
    assert not [line for line in lines if "Traceback" in line]


def test_each_key_lets_in_and_each_request_has_a_line(command):
    with serving(command) as (process, port, lines):
        body = {"model": "one", "inputs": TEXTS}
        statuses = [ask(port, "POST", "/v1/predict", body, Authorization=f"Bearer {key}", **{"X-Request-ID": f"r{i}"})
                    for i, key in enumerate((*KEYS, KEYS[0].upper()))]  # fmt: skip
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert statuses == [200, 200, 401]
    logged = {line["id"]: line for line in map(json.loads, lines[1:])}
    assert {name: (line["status"], line["delta"], line["rows"]) for name, line in logged.items()} == {
        "r0": (200, "one", len(TEXTS)),
        "r1": (200, "one", len(TEXTS)),
        "r2": (401, None, 0),
    }
    assert not any(key in line for key in KEYS for line in lines)


def test_a_missing_package_is_named_with_what_installs_it(command):
    hidden = (f"import sys; sys.modules['fastapi'] = None; sys.argv = {['smidgen', *command[3:]]!r}; "
              "from smidgen.cli.commands import main; sys.exit(main())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'smidgen[serve]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
