"""Changes as a report: what moved most by which measure, in tables, bars and heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from smidgen.studies.experiments.change_measures import MEASURES, TITLES
from smidgen.studies.experiments.model_components import TERMS, Key, stack_names
from smidgen.studies.experiments.parameter_changes import Changes
from smidgen.studies.reports.number_format import Format, brief
from smidgen.studies.reports.report import Report
from smidgen.studies.reports.sections import Bars, Cell, Column, HeatMap, Lines, Number, Section, Table, Text

NORM_WORDS = ("LN", "norm")
SHOWN_LAYERS = 2  # from so many layers on, a course over the layers is worth a picture
TOP = 15
TWO_PLACES = Format(0, 2, "")


def change_report(result: Changes, command: str = "") -> Report:
    """Tables and pictures of all four measures, with what they cannot tell."""
    return Report(
        title=f"Where fine-tuning changes {short_name(result.model)}",
        summary=list(_summary(result)),
        sections=list(_sections(result)),
        facts=_facts(result),
        command=command,
        data=result.to_json(),
    )


def short_name(model: str) -> str:
    """The last word of a model's path or id."""
    return model.rstrip("/").rpartition("/")[2] or model


def norm_groups(labels: Sequence[str]) -> dict[str, str]:
    """Component -> "norms" or "all others", norms first."""
    norms = [label for label in labels if label.endswith(NORM_WORDS)]
    return dict.fromkeys(norms, "norms") | dict.fromkeys([n for n in labels if n not in norms], "all others")


def spans_powers(values: Sequence[Sequence[float | None]]) -> bool:
    """Whether numbers above 0 differ by more than a factor of ten, so that colours should follow the logarithm."""
    known = [v for line in values for v in line if v is not None and not math.isnan(v)]
    return bool(known) and min(known) > 0 and max(known) > 10 * min(known)


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Spearman's rank correlation of two rankings of the same names, nan for fewer than three of them."""
    both = [name for name in first if name in second]
    n = len(both)
    if n < 3:
        return math.nan
    other = [name for name in second if name in both]
    return 1 - 6 * sum((i - other.index(name)) ** 2 for i, name in enumerate(both)) / (n * (n * n - 1))


def _summary(result: Changes) -> Iterator[str]:
    """What was found, in sentences."""
    absolute, relative = result.ranking("absolute"), result.ranking("relative")
    first = absolute[0]
    cells = result.table("absolute")
    text = f"By mean absolute change the {first} moves most ({brief(cells[first,].mean)} per value)."
    lead = cells[first,].mean - cells[absolute[1],].mean if len(absolute) > 1 else math.inf
    if lead < cells[first,].spread:
        text += f" Its lead over the {absolute[1]} is smaller than the spread."
    if relative and relative[0] == first:
        text += " It is first relative to the size of its pretrained values, too."
    elif first in relative:
        place = relative.index(first) + 1
        text += f" Relative to the size of the pretrained values it is number {place} of {len(relative)}, and the "
        text += f"{relative[0]} is first."
    rho = agreement(absolute, relative)
    if not math.isnan(rho):
        text += f" The two rankings of the components correlate at {TWO_PLACES.show(rho)} (Spearman)."
    yield text
    yield result.caveat


def _facts(result: Changes) -> dict[str, str]:
    tasks = list(dict.fromkeys(run.task for run in result.runs if run.task))
    seeds = sorted({run.seed for run in result.runs})
    values = {"Model": short_name(result.model), "Trained": result.recipe, "Tasks": ", ".join(tasks)}
    values |= {"Seeds": ", ".join(map(str, seeds)) if tasks else "", "Runs": str(len(result.runs))}
    return {**{k: v for k, v in values.items() if v}, "Tensors compared": f"{len(result.parts):,}"}


def _sections(result: Changes) -> Iterator[Section]:
    """The sections of the report, in order."""
    yield _by_component(result)
    yield _ranks(result)
    for measure in ("absolute", "relative"):
        yield _bars(result, measure)
    yield _by_term(result)
    layers = {part.layer for part in result.parts if part.layer is not None}
    for measure in ("absolute", "relative", "rms") if layers else ():
        yield _heat(result, measure)
    if len(layers) >= SHOWN_LAYERS:
        yield _courses(result)
    yield _tensors(result)
    if any(run.task for run in result.runs):
        yield _runs(result)
    yield _method(result)


def _spread(result: Changes) -> str:
    tasks = len({run.task for run in result.runs})
    if tasks > 1:
        return f"± is the standard deviation between the means of the {tasks} tasks."
    return f"± is the standard deviation between {len(result.runs)} seeds." if len(result.runs) > 1 else ""


def _title(measure: str) -> str:
    return TITLES[measure][0].upper() + TITLES[measure][1:]


def _columns(*first: str) -> list[Column]:
    rest = [Column(TITLES[m], best="max", percent=m == "relative") for m in MEASURES]
    return [*map(Column, first), *rest]


def _cells(result: Changes, by: Sequence[str]) -> dict[Key, list[Cell]]:
    """Key -> the four measures, each a mean with its spread."""
    tables = [result.table(measure, by) for measure in MEASURES]
    return {key: [(table[key].mean, table[key].spread) for table in tables] for key in tables[0]}


def _by_component(result: Changes) -> Table:
    rows = [(key[0], *cells) for key, cells in _cells(result, ("component",)).items()]
    note = f"Weights, gains and biases together; the mean over a component's tensors. {_spread(result)}"
    return Table("Change by component", _columns("component"), rows, note.strip())


def _ranks(result: Changes) -> Table:
    ranked = [result.ranking(measure) for measure in MEASURES]
    longest = max(map(len, ranked))
    rows: list[Sequence[Cell]]
    rows = [(i + 1, *(names[i] if i < len(names) else "–" for names in ranked)) for i in range(longest)]
    note = "A component without a number (relative: all its pretrained values are zero) is left out of that ranking."
    return Table("Rankings side by side", [Column("rank"), *(Column(TITLES[m]) for m in MEASURES)], rows, note)


def _bars(result: Changes, measure: str) -> Bars:
    cells = {key[0]: cell for key, cell in result.table(measure).items()}
    labels = result.ranking(measure)
    values, spreads = [cells[n].mean for n in labels], [cells[n].spread for n in labels]
    title, percent = f"{_title(measure)}, largest first", measure == "relative"
    return Bars(title, labels, values, spreads, MEASURES[measure], percent, norm_groups(labels), _spread(result))


def _by_term(result: Changes) -> Table:
    found = _cells(result, ("component", "term"))
    order = sorted(found, key=lambda key: (result.components.index(key[0]), TERMS.index(key[1])))
    rows = [(name, term, *found[name, term]) for name, term in order]
    note = "A tensor of tiny pretrained values, such as a key's bias, has a large relative change after any training."
    return Table("Weights, gains and biases apart", _columns("component", "term"), rows, f"{note} {_spread(result)}")


def _heat(result: Changes, measure: str) -> HeatMap:
    cells = result.table(measure, ("component", "stack", "layer"))
    names = stack_names(result.parts)
    places = sorted({key[1:] for key in cells if key[2] is not None}, key=lambda p: (list(names).index(p[0]), p[1]))
    rows = [name for name in result.components if any(key[0] == name and key[2] is not None for key in cells)]
    values = [[cells[row, *place].mean if (row, *place) in cells else None for place in places] for row in rows]
    columns, groups = [str(layer) for _, layer in places], [names[stack] for stack, _ in places]
    title, percent = f"{_title(measure)} by layer", measure == "relative"
    unit, log = MEASURES[measure], spans_powers(values)
    return HeatMap(title, rows, columns, values, unit, "layer, from the input", log, percent, groups)


def _courses(result: Changes) -> Lines:
    """The norms' and the four most changed other components' absolute change over the first stack's layers."""
    stack = next(part.stack for part in result.parts if part.layer is not None)
    cells = result.table("absolute", ("component", "stack", "layer"))
    inside = [name for name in result.ranking("absolute") if any(k[:2] == (name, stack) for k in cells)]
    norms = [name for name in inside if name.endswith(NORM_WORDS)]
    chosen = [name for name in inside if name in (norms + [n for n in inside if n not in norms][:4])[:6]]
    layers = sorted({key[2] for key in cells if key[1] == stack})
    series: dict[str, tuple[list[Number], list[Number]]] = {}
    for name in chosen:
        found = [cells.get((name, stack, layer)) for layer in layers]
        series[name] = ([c.mean if c else None for c in found], [c.spread if c else None for c in found])
    where = stack_names(result.parts)[stack]
    across = f"layer of the {where}" if where else "layer, from the input"
    return Lines("Absolute change over the layers", layers, series, across, MEASURES["absolute"], note=_spread(result))


def _tensors(result: Changes) -> Table:
    """The tensors whose values moved most on average."""
    tables = [result.table(measure, ("name", "component")) for measure in ("absolute", "relative")]
    largest = sorted(tables[0], key=lambda key: -tables[0][key].mean)[:TOP]
    rows = [(key[0], key[1], *(table[key].mean for table in tables)) for key in largest]
    columns = [
        Column("tensor"),
        Column("component"),
        Column("absolute change"),
        Column("relative change", percent=True),
    ]
    return Table("The tensors that moved most, by absolute change", columns, rows)


def _runs(result: Changes) -> Table:
    scores = list(dict.fromkeys(name for run in result.runs for name in run.info.get("scores") or {}))
    columns = [Column("task"), Column("seed"), Column("best epoch"), Column("steps"), Column("Σ lr")]
    rows = []
    for run in result.runs:
        info, found = run.info, run.info.get("scores") or {}
        known = (info.get("best_epoch"), info.get("steps"), info.get("lr_steps"))
        rows.append((run.task, run.seed, *known, *(found.get(name) for name in scores)))
    note = "Σ lr runs over the steps up to the best epoch, whose state is the one that was measured."
    return Table("Runs", [*columns, *map(Column, scores)], rows, note)


def _method(result: Changes) -> Text:
    formulas = "; ".join(f"{TITLES[m]}: {formula}" for m, formula in MEASURES.items())
    return Text("How it was measured", (
        f"{formulas}. θ₀ is the pretrained tensor and θ the fine-tuned one. Each tensor gives one number; a cell is "
        "the plain mean of its tensors' numbers, then of a task's seeds, then of the tasks. Relative change is not "
        "defined for a tensor of zeros, and change per Σ lr where the learning rates are not known.",
        "Under Adam, change per Σ lr is about 1 where every gradient had one sign and near 0 where the signs "
        "alternated. The head is left out: it starts at random values and has a learning rate of its own.",
    ))  # fmt: skip
