"""Reports: nothing is loaded from outside, every number is on the page, pictures are pictures, writing is whole."""

from __future__ import annotations

import builtins
import copy
import json
import math
import os
import re
import struct
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from smidgen.common.errors import DeltaError
from smidgen.common.json_numbers import plain, restored
from smidgen.studies.reports.charts import colour, png, share_chart, svg
from smidgen.studies.reports.column_layout import shown_columns
from smidgen.studies.reports.errors import ReportError
from smidgen.studies.reports.number_format import Format, brief
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import Bars, Column, HeatMap, Lines, Table, Text

NAN = math.nan
TABLE = Table(
    "Numbers",
    [Column("name"), Column("small", best="max"), Column("share", best="min", percent=True), Column("count")],
    [("one <b>", (3.21e-5, 4e-6), 0.5, 12_345_678), ("two", (1.5e-5, NAN), 0.25, 7), ("three", NAN, None, 0)],
    note="as given",
)
HEAT = HeatMap("Heat", ["a", "b"], ["0", "1", "2"], [[0.001, 0.01, NAN], [0.1, 1.0, None]], "unit", "layer", log=True)
BARS = Bars("Bars", ["a LN", "b"], [2.0, NAN], [0.5, None], "unit", groups={"a LN": "norms", "b": "others"})
LINES = Lines("Lines", [0, 1, 2], {"s": ([1.0, 2.0, 3.0], [0.1, 0.2, NAN]), "t": ([3.0, None, 1.0], [])}, "x", "y")
SECTIONS = [Text("Words", ["A & B", "C"]), TABLE, HEAT, BARS, LINES]


def report(**change):
    fields = {"title": "A <title>", "summary": ["Found."], "sections": SECTIONS, "facts": {"Model": "m"}}
    return Report(**{**fields, "command": "smidgen analyze changes --out 'a b'", **change})


class Page(HTMLParser):
    """Tags with their attributes, text, and whether tags close in order."""

    VOID = {"meta", "link", "br", "wbr", "img", "hr", "path", "use", "circle"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def outside(text):
    """What a page would load from elsewhere."""
    found = [v for _, a in Page(text).tags for k, v in a.items() if k.endswith(("href", "src", "srcset", "action"))]
    found = [link for link in found if not link.startswith("#")]
    return found + re.findall(r"@import[^;]*|url\((?!#)[^)]*\)|https?://[^\s\"'<]+|<script", text)


def test_the_page_needs_nothing_else():
    text = report().html()
    assert outside(text) == []
    page = Page(text)
    assert page.open == []
    assert "color-scheme" in text
    assert any(tag == "meta" and attributes.get("name") == "viewport" for tag, attributes in page.tags)


@pytest.mark.parametrize(
    "line",
    ["<img src='a.png'>", "<link href='https://x.y/z.css'>", "<style>@import 'x';</style>",
     "<p style='background:url(x.png)'></p>", "<script>1</script>"],
)  # fmt: skip
def test_a_page_that_loads_would_be_seen(line):
    assert outside(report().html().replace("</main>", f"{line}</main>"))


def test_every_number_of_a_table_is_on_the_page():
    page = " ".join(Page(report(sections=[TABLE]).html()).text)
    words = [cell.text for column in shown_columns(TABLE) for cell in column.cells]
    assert words == ["one <b>", "two", "three", "3.21", "1.50", "–", "50.0", "25.0", "–", "12,345,678", "7", "0"]
    assert [word for word in words if word not in page] == []
    for part in ("×10⁻⁵", "%", "± 0.40", "as given"):
        assert part in page
    heat = " ".join(Page(report(sections=[HEAT]).html()).text)
    assert [n for n in ("0.001", "0.010", "0.100", "1.000", "unit", "logarithmic") if n not in heat] == []


def test_columns_of_a_group_share_a_head():
    heat = HeatMap("Heat", ["a"], ["0", "1", "0"], [[1.0, 2.0, 3.0]], groups=["encoder", "encoder", "decoder"])
    heads = re.findall(r'colspan="(\d)">(\w+)<', report(sections=[heat]).html())
    assert heads == [("2", "encoder"), ("1", "decoder")]
    assert png(heat)[:4] == b"\x89PNG"


def test_the_best_numbers_are_marked():
    small, share = shown_columns(TABLE)[1:3]
    assert [cell.best for cell in small.cells] == [True, False, False]
    assert [cell.best for cell in share.cells] == [False, True, False]
    assert report(sections=[TABLE]).html().count('class="n best"') == 2


def test_words_are_escaped():
    text = report(sections=[*SECTIONS, Bars("<i>x</i>", ["<u>"], [1.0])]).html()
    assert "A &lt;title&gt;" in text
    assert "one &lt;b&gt;" in text
    assert not re.search(r"<(b|i|u|title)>[^<]*<.?b|<i>|<u>", text)


def test_contents_for_long_reports_only():
    assert "<nav" in report().html()
    assert "<nav" not in report(sections=SECTIONS[:4]).html()
    twice = report(sections=[TABLE, TABLE]).html()
    ids = re.findall(r' id="([^"]+)"', twice)
    assert len(ids) == len(set(ids))


def test_ids_and_references_of_charts_agree():
    text = report(sections=[BARS, LINES, copy.deepcopy(LINES)]).html()
    ids = re.findall(r'\bid="([^"]+)"', text)
    used = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert len(used) > 10
    assert set(used) <= set(ids)
    assert len(ids) == len(set(ids)), "two elements share an id"


def test_charts_take_the_colours_of_the_page():
    text = svg(BARS)
    assert "var(--ink)" in text
    assert "var(--s0)" in text
    assert "#0102" not in text
    assert "#0103" not in text
    defined = set(re.findall(r"(--\w+):", report().html()))
    assert set(re.findall(r"var\((--\w+)\)", report().html())) <= defined


def test_the_footer_says_what_made_it():
    text = report().html()
    assert "smidgen analyze changes --out &#39;a b&#39;" in text
    assert re.search(r"smidgen \d.*torch \d.*transformers \d.*Python 3", text)
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text)


def test_files(tmp_path):
    folder = report().write(tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == [
        "bars.png",
        "heat.png",
        "lines.png",
        "report.html",
        "report.json",
    ]
    for name in ("bars.png", "heat.png", "lines.png"):
        width, height = size(folder / name)
        assert width > 1000
        assert height > 100
    data = json.loads((folder / "report.json").read_text())
    assert data == json.loads(json.dumps(report().to_json(), allow_nan=False))
    assert data["sections"][1]["rows"][0] == ["one <b>", [3.21e-5, 4e-6], 0.5, 12_345_678]
    assert data["sections"][2]["values"][0] == [0.001, 0.01, None]
    assert [s["kind"] for s in data["sections"]] == ["text", "table", "heat map", "bars", "lines"]


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_the_same_report_gives_the_same_files(tmp_path):
    first, second = (report().write(tmp_path / name) for name in "ab")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_pictures_show_their_numbers():
    other = Bars("Bars", ["a LN", "b"], [2.0, 1.0], [0.5, None], "unit")
    assert png(BARS) != png(other)
    assert svg(BARS) != svg(other)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DeltaError, match="cannot write to .*Permission denied"):
        report().write(tmp_path / "out")


def test_a_folder_that_cannot_be_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DeltaError, match="cannot write to"):
        report().write(tmp_path / "file")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(DeltaError, match="cannot write to .*Permission denied"):
        report().write(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, package):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ReportError, match=r"pip install 'smidgen\[report\]'"):
        report().write(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_sections_that_do_not_fit_together():
    wrong = [
        lambda: Table("t", [Column("a")], [(1, 2)]),
        lambda: HeatMap("t", ["a"], ["b"], [[1.0, 2.0]]),
        lambda: HeatMap("t", ["a"], ["b"], []),
        lambda: HeatMap("t", ["a"], ["b", "c"], [[1.0, 2.0]], groups=["x"]),
        lambda: Bars("t", ["a"], [1.0, 2.0]),
        lambda: Bars("t", ["a"], [1.0], [1.0, 2.0]),
        lambda: Lines("t", [0, 1], {"s": ([1.0], [])}),
    ]
    for build in wrong:
        with pytest.raises(ReportError, match="'t' does not fit together"):
            build()


def test_cells_are_readable_everywhere():
    """Contrast of at least 4.5 to 1 on every colour of the scale (WCAG AA)."""

    def light(code):
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    levels = []
    for step in range(101):
        back, ink = (light(code) for code in colour(step / 100))
        assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) >= 4.5
        levels.append(back)
    assert all(b > a - 1e-3 for a, b in pairwise(levels)), "darker must mean less"


def test_places_on_the_colour_scale():
    assert share_chart([[1.0, 10.0, 100.0], [NAN, None, 1.0]], log=True) == [
        [0, pytest.approx(0.5), 1],
        [None, None, 0],
    ]
    assert share_chart([[0.0, 5.0, 10.0]], log=False) == [[0, 0.5, 1]]
    assert share_chart([[0.0, 1.0, 10.0]], log=True) == [[None, 0, 1]]
    assert share_chart([[2.0, 2.0]], log=False) == [[0, 0]]


@pytest.mark.parametrize(
    ("values", "shown", "unit"),
    [
        ([3.21e-5, 1.5e-5, NAN], ["3.21", "1.50", "–"], "×10⁻⁵"),
        ([5.0, 0.04], ["5.000", "0.040"], ""),
        ([1, 2_000_000], ["1", "2,000,000"], ""),
        ([-0.5, 0.25], ["−0.500", "0.250"], ""),
        ([1e-9, 1.0], ["1.00×10⁻⁹", "1.00"], ""),
        ([0.0, 0.0], ["0", "0"], ""),
        ([123456.0, 500000.0], ["1.23", "5.00"], "×10⁵"),
        ([], [], ""),
    ],
)
def test_numbers_of_a_column(values, shown, unit):
    style = Format.of(values)
    assert [style.show(v) for v in values] == shown
    assert style.unit == unit


def test_numbers_alone_and_as_json():
    assert [brief(x) for x in (0.03123, 3.1e-5, 12480, 2.0)] == ["0.0312", "3.10×10⁻⁵", "12,480", "2.00"]
    assert plain({"a": (1.0, NAN, math.inf), 2: "x"}) == {"a": [1.0, None, None], "2": "x"}
    assert math.isnan(restored(None))
    assert restored(1.5) == 1.5


def test_the_template_ships():
    assert files("smidgen.studies.reports").joinpath("report.html.jinja").is_file()
    listed = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"smidgen.studies.reports" = ["*.jinja"]' in listed
