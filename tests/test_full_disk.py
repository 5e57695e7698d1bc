"""A disk that fills while a delta is put: 507 and one line; the old delta stays and answers, the new one is nowhere."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import smidgen as sm
from smidgen.common.errors import WriteError
from smidgen.delta.delta import META, TENSORS
from tests import helpers as h
from tests.test_mixed_layouts import trained
from tests.test_serve_command import alive, ask, serving
from tests.test_serving import TASK, TEXTS, apart, server

pytest.importorskip("fastapi")
FULL = os.strerror(errno.ENOSPC)
SMALL, LARGE = "LN()", "LoRA(rank=16, target='linear')"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a small delta among those served, and a small and a large one to put."""
    folder = tmp_path_factory.mktemp("full")
    h.build("bert", "AutoModel").save_pretrained(folder / "base")
    h.tokenizer().save_pretrained(folder / "base")
    model, _ = sm.load(folder / "base", task=h.task(folder / "data"))
    for name, recipe in (("deltas/d0", SMALL), ("small", SMALL), ("large", LARGE)):
        trained(model, recipe, len(name)).with_info(task=TASK).save(folder / name)
    return folder


def put(url, name, folder, padding=0):
    """Status and answer of a delta that is put; a field that nobody reads makes the request larger."""
    mark = uuid.uuid4().hex
    parts = [(file, (folder / file).read_bytes()) for file in (META, TENSORS)] + [("more", b"x" * padding)] * bool(
        padding
    )
    lines = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{file}"; filename="{file}"\r\n\r\n'.encode() + content
        for file, content in parts
    ]
    body = b"\r\n".join([*lines, f"--{mark}--\r\n".encode()])
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    request = urllib.request.Request(f"{url}/v1/deltas/{name}", body, headers, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_refused(url, world, deltas, said, padding=0):
    """Putting the large delta fails under an old name and under a new one, and changes nothing."""
    before, answer = files(deltas), ask(url)
    for name in ("d0", "new"):
        status, error = put(url, name, world / "large", padding)
        assert (status, error["code"], error["type"]) == (507, "not_saved", "server_error")
        assert error["message"] == said
        assert ask(url) == answer
        assert files(deltas) == before
        assert sorted(path.name for path in deltas.iterdir()) == ["d0"]
    with pytest.raises(urllib.error.HTTPError, match="404") as missing:
        ask(url, "new")
    missing.value.close()


def check_taken(url, world, deltas):
    """A small delta finds room and answers."""
    answer = ask(url)
    assert put(url, "d0", world / "small")[0] == 201
    assert ask(url) != answer
    assert (deltas / "d0" / TENSORS).read_bytes() == (world / "small" / TENSORS).read_bytes()


@pytest.mark.timeout(180)
def test_a_file_system_that_is_full(world, tmp_path):
    """A tmpfs that holds the small delta twice, and the large one in no part of it."""
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    size = sum(path.stat().st_size for path in (world / "large").iterdir())
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(deltas)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        shutil.copytree(world / "deltas" / "d0", deltas / "d0")
        (tmp_path / "base").symlink_to(world / "base")
        with serving(tmp_path) as (_, url, lines):
            alive(url)
            check_refused(url, world, deltas, f"cannot write to {deltas}: {FULL}")
            check_taken(url, world, deltas)
        assert not [line for line in lines if "Traceback" in line]
    finally:
        subprocess.run(["umount", "-l", str(deltas)], check=True)


@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
@pytest.mark.parametrize("padding", [0, 2 * 2**20])
def test_a_server_that_may_write_no_large_file(world, tmp_path, padding):
    """Not even what was sent can be kept for a moment, be it a part of it or, of a large request, all as it comes."""
    deltas = tmp_path / "deltas"
    shutil.copytree(world / "deltas", deltas)
    (tmp_path / "base").symlink_to(world / "base")
    with serving(tmp_path) as (process, url, lines):
        alive(url)
        size = (world / "large" / TENSORS).stat().st_size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        check_refused(url, world, deltas, f"the server cannot write: {os.strerror(errno.EFBIG)}", padding)
        check_taken(url, world, deltas)
    assert not [line for line in lines if "Traceback" in line]


class Quota(MemoryFileSystem):
    """A place with little room: what does not fit is cut off, and the write fails."""

    protocol, store, pseudo_dirs = "quota", {}, [""]
    room, stubborn = 0, False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("quota://").strip("/") if path.strip("/") else ""

    def put_file(self, lpath, rpath, callback=None, **options):
        content, rpath = Path(lpath).read_bytes(), self._strip_protocol(rpath)
        held = sum(len(file.getbuffer()) for name, file in self.store.items() if name != rpath)
        fits = max(self.room - held, 0)
        self.pipe_file(rpath, content[:fits])
        if fits < len(content):
            type(self).room = 0 if self.stubborn else self.room
            raise OSError(errno.ENOSPC, FULL)


@pytest.fixture
def quota():
    fsspec.register_implementation("quota", Quota, clobber=True)
    Quota.store.clear()
    Quota.pseudo_dirs[:] = [""]
    Quota.room, Quota.stubborn = 10**9, False
    Quota().makedirs("/tenants")
    return Quota


def contents(quota):
    return {name: bytes(file.getbuffer()) for name, file in quota.store.items()}


@pytest.mark.parametrize("short", [1, 500, 2000, 4000, 10_000])
def test_a_place_at_a_url_that_is_full(quota, short):
    """Wherever the write ends: in the values, the card or the JSON."""
    model = h.bert()
    old, small, large = (trained(model, r, i).with_info(task=TASK) for i, r in enumerate((SMALL, SMALL, LARGE)))
    with server(model, sm.Bank("quota://tenants", recheck=0)) as served:
        for name in ("a", "b"):
            served.add(name, old)
        before, wanted, one = contents(quota), served.predict("a", TEXTS), sum(map(len, contents(quota).values())) // 2
        served.add("new", large)
        needed = sum(map(len, contents(quota).values())) - 2 * one
        served.remove("new")
        for name, taken in (("new", 2 * one), ("a", one)):
            quota.room = taken + needed - short
            with pytest.raises(WriteError, match=f"^cannot write to quota://tenants: {FULL}$"):
                served.add(name, large)
            assert contents(quota) == before
            assert apart(served.predict("a", TEXTS), wanted) < 1e-6
            assert served.bank.names() == ["a", "b"]
        quota.room = 2 * one + 100
        served.add("a", small)
        assert apart(served.predict("a", TEXTS), wanted) > 1e-4
    assert sm.Bank("quota://tenants").store.load("b").digest == old.digest


def test_what_cannot_be_put_back_is_said(quota):
    model = h.bert()
    old, large = (trained(model, r, i).with_info(task=TASK) for i, r in enumerate((SMALL, LARGE)))
    with server(model, "quota://tenants") as served:
        served.add("a", old)
        quota.room, quota.stubborn = sum(map(len, contents(quota).values())), True
        with pytest.raises(WriteError, match=f"{FULL}; and what was there could not be put back"):
            served.add("a", large)


def test_nobody_reads_a_delta_while_it_is_put_back(quota, monkeypatch):
    """Answers come from memory while the place holds a part of the new one."""
    model = h.bert()
    old, large = (trained(model, r, i).with_info(task=TASK) for i, r in enumerate((SMALL, LARGE)))
    with server(model, sm.Bank("quota://tenants", recheck=0)) as served:
        served.add("a", old)
        wanted, found = served.predict("a", TEXTS), []
        quota.room, real = sum(map(len, contents(quota).values())) + 10, Quota.put_file

        def asking(self, *args, **options):
            try:
                real(self, *args, **options)
            finally:
                found.append(served.predict("a", TEXTS))

        monkeypatch.setattr(Quota, "put_file", asking)
        loads = served.bank.loads
        with pytest.raises(WriteError):
            served.add("a", large)
        assert len(found) >= 4
        assert all(apart(one, wanted) < 1e-6 for one in (*found, served.predict("a", TEXTS)))
        assert served.bank.loads == loads
