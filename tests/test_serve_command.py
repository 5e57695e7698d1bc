"""`smidgen serve` as a process: where it listens, how it ends, its log and keys, mistakes; the page in a browser."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

import smidgen as sm
from tests import helpers as h
from tests.test_mixed_layouts import trained

pytest.importorskip("fastapi")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base in a folder, and a folder with two deltas of it."""
    folder = tmp_path_factory.mktemp("serve")
    h.build("bert", "AutoModel").save_pretrained(folder / "base")
    h.tokenizer().save_pretrained(folder / "base")
    task = h.task(folder / "data")
    model, _ = sm.load(folder / "base", task=task)
    for i, recipe in enumerate(["LN()", "LoRA(rank=2)"]):
        info = {"task": {"kind": "classification", "text": ["text"]}}
        trained(model, recipe, i).with_info(**info).save(folder / "deltas" / f"d{i}")
    return folder


@contextmanager
def serving(world, *more, model=None):
    """A running server: process, address, lines of its log so far."""
    command = [sys.executable, "-m", "smidgen.cli", "serve", "--model", model or str(world / "base"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--deltas", str(world / "deltas"), *more], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    lines = [process.stderr.readline()]
    reading = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reading.start()
    try:
        yield process, lines[0].split()[0], lines
    finally:
        process.kill()
        process.wait(30)
        reading.join(30)
        process.stderr.close()


def ask(url, name="d0", key=None, number=None):
    body = json.dumps({"model": name, "inputs": ["the film was good"]}).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    headers |= {"X-Request-ID": number} if number else {}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/predict", body, headers), timeout=60) as answer:
        return json.load(answer)


def alive(url):
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                return answer.status
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_sigterm_under_load_answers_what_was_taken(world):
    with serving(world) as (process, url, lines):
        assert "2 deltas" in lines[0]
        assert alive(url) == 200
        assert ask(url, "d0") != ask(url, "d1")
        told, refused, stop = [], [], threading.Event()

        def work():
            while not stop.is_set():
                try:
                    told.append(ask(url)["answers"][0]["answer"])
                except urllib.error.HTTPError as error:
                    refused.append(error.code)
                    error.close()
                    return
                except OSError:  # it listens no more
                    refused.append("closed")
                    return

        threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        stop.set()
        for thread in threads:
            thread.join(60)
    assert status == 0
    assert told
    assert set(refused) <= {503, "closed"}
    logged = [json.loads(line) for line in lines[1:] if line.startswith("{")]
    answered = [line for line in logged if line["route"] == "/v1/predict" and line["status"] == 200]
    assert len(answered) == len(told) + 2  # each that was taken was answered, and came
    assert not [line for line in lines if "Traceback" in line]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(world, stop):
    """Whoever supervises it sees status 0, not a process that a signal has killed."""
    with serving(world) as (process, url, lines):
        assert alive(url) == 200
        process.send_signal(stop)
        assert process.wait(60) == 0
    assert not [line for line in lines if "Traceback" in line]


def test_each_key_lets_in_and_each_request_has_a_line(world, tmp_path):
    keys = ("0123456789abcdef", "fedcba9876543210")
    (tmp_path / "keys").write_text("\n".join(keys))
    with serving(world, "--api-key-file", str(tmp_path / "keys")) as (process, url, lines):
        for i, key in enumerate(keys):
            assert ask(url, key=key, number=f"r{i}")
        with pytest.raises(urllib.error.HTTPError, match="401") as wrong:
            ask(url, key=keys[0].upper(), number="r2")
        wrong.value.close()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    logged = {line["id"]: line for line in map(json.loads, lines[1:])}
    assert {name: (line["status"], line["delta"], line["rows"]) for name, line in logged.items()} == {
        "r0": (200, "d0", 1),
        "r1": (200, "d0", 1),
        "r2": (401, None, 0),
    }
    assert not any(key in line for key in keys for line in lines)


def test_a_missing_package_is_named_with_what_installs_it(world):
    arguments = ["smidgen", "serve", "--model", str(world / "base"), "--deltas", str(world / "deltas")]
    hidden = (f"import sys; sys.modules['fastapi'] = None; sys.argv = {arguments!r}; "
              "from smidgen.cli.commands import main; sys.exit(main())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'smidgen[serve]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--deltas", "nowhere"], "nowhere is no folder"),
        (["--deltas", ".", "--host", "0.0.0.0"], "give --api-key-file"),
        (["--deltas", ".", "--max-memory", "lots"], "no size of memory"),
        (["--deltas", ".", "--api-key-file", "none"], "cannot be read"),
        (["--deltas", "what://ever"], "cannot be opened"),
    ],
)
def test_mistakes_are_one_line(world, options, said):
    command = [sys.executable, "-m", "smidgen.cli", "serve", "--model", str(world / "base"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken(world):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "smidgen.cli", "serve", "--model", str(world / "base"), "--port", str(port)]
        command += ["--deltas", str(world / "deltas")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"cannot listen at 127.0.0.1:{port}" in done.stderr


def test_the_page_in_a_browser(world, tmp_path):
    """Two deltas side by side with their probabilities, by keyboard, with a key, on a narrow screen."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    key = "a key of at least sixteen"
    (tmp_path / "keys").write_text(key + "\n")
    with serving(world, "--api-key-file", str(tmp_path / "keys")) as (_, url, _), playwright.sync_playwright() as p:
        alive(url)
        chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 360, "height": 700})
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.fill("#secret", key)
        page.click("#enter")
        page.wait_for_selector("#ask-d0")
        page.check("#ask-d0")
        page.focus("#ask-d1")
        page.keyboard.press("Space")
        page.uncheck("#ask-base")
        page.fill("#text", "the film was good")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("document.querySelectorAll('#answers .odds').length == 2")
        shown = [card.inner_text() for card in page.query_selector_all("#answers article")]
        wide = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        chromium.close()
        for name, text in zip(("d0", "d1"), shown, strict=True):
            answer = ask(url, name, key)["answers"][0]
            assert name in text
            assert answer["answer"] in text
            assert f"{100 * max(answer['probabilities'].values()):.1f} %" in text
        assert wide  # nothing makes the page scroll sideways
        assert not faults
