"""A study behind a URL: what lies there is what a folder holds, and another machine goes on with it."""

import json
from pathlib import Path

import fsspec
import pytest

from smidgen.common.errors import StudyError, WriteError
from smidgen.studies.comparison.comparing import compare, reopened
from smidgen.studies.comparison.run_store import RESULT
from smidgen.studies.reports.comparison import write_report
from smidgen.studies.study_place import StudyPlace
from tests.test_cli import bert as saved_bert
from tests.test_cli import call
from tests.test_comparison import data, study  # noqa: F401

NAME = "memory://studies/films"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place") / "base"
    saved_bert(folder)
    return str(folder)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that moves to another machine, whose working copies are its own."""

    def move(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    move("first")
    yield move
    fs = fsspec.filesystem("memory")
    if fs.exists("/studies"):
        fs.rm("/studies", recursive=True)


def small(base, data):  # noqa: F811
    return study(base, data, seeds=[0], arms={"LN": "LN()", "head": "Head()"})


def there(url=NAME):
    fs, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).strip("/"): fs.cat_file(path) for path in fs.find(root)}


def test_what_lies_at_a_url_is_what_a_folder_holds(base, data, machine, tmp_path):  # noqa: F811
    found = compare(small(base, data), NAME)
    write_report(found)
    local = {
        p.relative_to(found.store.path).as_posix(): p.read_bytes() for p in found.store.path.rglob("*") if p.is_file()
    }
    assert there() == local
    assert {"study.json", "report.html", "results.csv"} <= local.keys()
    alone = compare(small(base, data), tmp_path / "folder")
    assert [r.test for r in alone.results] == [r.test for r in found.results]
    assert [r.test for r in reopened(NAME).results] == [r.test for r in found.results]


def test_another_machine_goes_on_with_the_runs_that_are_left(base, data, machine, monkeypatch):  # noqa: F811
    whole = compare(small(base, data), "memory://studies/whole")

    def stops(result):
        if len(list(fsspec.filesystem("memory").glob(f"/studies/films/runs/*/{RESULT}"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(small(base, data), NAME, told=stops)
    before = {name: content for name, content in there().items() if name.endswith(RESULT)}
    assert len(before) == 2
    machine("second")
    again = compare(small(base, data), NAME)
    assert [r.test for r in again.results] == [r.test for r in whole.results]
    seconds = {json.loads(c)["key"]: json.loads(c)["costs"]["seconds"] for c in before.values()}
    assert {r.key: r.costs["seconds"] for r in again.results if r.key in seconds} == seconds  # not made again


def test_what_was_kept_and_not_sent_is_sent_by_the_next_call(base, data, machine, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr(StudyPlace, "send", lambda self, names: None)
        compare(small(base, data), NAME)
    fs = fsspec.filesystem("memory")
    fs.makedirs("/studies/films", exist_ok=True)
    fs.pipe_file("/studies/films/study.json", b'{"format": 1, "study": {}}')
    compare(small(base, data), NAME)
    assert len([name for name in there() if name.endswith(RESULT)]) == 4


def test_a_url_that_was_emptied_begins_anew(base, data, machine, monkeypatch):  # noqa: F811
    first = compare(small(base, data), NAME)
    fsspec.filesystem("memory").rm("/studies/films", recursive=True)
    assert first.store.path.is_dir()
    second = compare(small(base, data), NAME)
    assert [r.costs["seconds"] for r in second.results] != [r.costs["seconds"] for r in first.results]


def test_a_url_that_cannot_be_written_is_one_line(machine, monkeypatch):
    place = StudyPlace(NAME)
    place.folder.mkdir(parents=True)
    (place.folder / "study.json").write_text("{}")
    monkeypatch.setattr(type(place._remote), "put_file", lambda *a, **k: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(WriteError, match=f"cannot write to {NAME}: no"):
        place.send(["study.json"])
    with pytest.raises(StudyError, match="holds no study; smidgen compare makes one"):
        reopened(NAME)


def test_the_command_takes_a_url(base, data, machine, tmp_path):  # noqa: F811
    url = (tmp_path / "there").as_uri()
    typed = ["--model", base, "--data", data, "--seed", 0, "--trials", 1, "--epochs", 1, "--max-length", 16]
    done = call("compare", "--recipe", "LN()", *typed, "--out", url)
    assert done.code == 0, done.err
    assert Path(tmp_path / "there" / "report.html").is_file()
    assert f"{url}/report.html" in done.out.replace("\n", "")
    assert call("report", url).code == 0
    wrong = call("compare", *typed[:4], "--out", url, "--budget", "1min")
    assert wrong.code == 2
    assert "with --budget it is a folder of this machine" in wrong.err.replace("\n", " ")
