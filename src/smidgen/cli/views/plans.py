"""What a plan looks like in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from smidgen.cli.views.results import facts, number, table
from smidgen.common.byte_sizes import format_bytes

if TYPE_CHECKING:
    from smidgen.planning.entry import Entry
    from smidgen.planning.plans import Plan
    from smidgen.training.memory.card_sizes import DeviceFit


def plan_view(result: Plan, every: bool = False) -> RenderableType:
    """A plan: its sites grouped by place in the block (or every tensor), its sums, its costs."""
    if every:
        tensors = [(name, _shape(shape)) for entry in result.entries for name, shape in entry.names()]
        sites = table(("tensor", "shape"), tensors)
    else:
        sites = table(("method", "place", "role", "#sites", "tensors", "#values"), _grouped(result.entries))
        sites.columns[1].no_wrap = True  # names of tensors break between words, paths do not
    sums = {
        "trains": f"{result.trained:,} of {result.pretrained:,} values ({result.share:.4%})",
        "of these": _later(result) if result.pending else None,
        "head": f"{result.head_values:,} values, always trained, counted apart" if result.head else "none",
        "never read": f"{', '.join(result.unread)} (left out)" if result.unread else None,
        "pooling": result.pooling or result.reads,
        "file": format_bytes(result.file_bytes) + (" before choosing" if result.pending else ""),
        "lowest edit": f"{result.lowest} (no gradient below)",
        "left out": "\n".join(_left_out(result)) or None,
        **{name.replace("_", " "): text for name, text in _costs(result.costs or {})},
    }
    title = Text(f"{result.recipe} on {result.model}", style="bold")
    return Group(title, sites, facts({k: v for k, v in sums.items() if v is not None}))


def fit_line(row: DeviceFit) -> str:
    """One recipe, as it is counted."""
    return f"{row.recipe}, {row.dtype}: {row.why or format_bytes(row.peak_bytes or 0)}"


def fits_view(model: str, rows: Sequence[DeviceFit], batch_size: int, length: int | None) -> RenderableType:
    """Peak memory of a step for each recipe and dtype, and the smallest card that holds it."""
    from smidgen.training.memory.card_sizes import CARDS
    from smidgen.training.memory.estimate import TOKENS

    cells = [
        (
            row.recipe,
            row.dtype,
            f"{row.trained:,}" if row.trained else "–",
            "–" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            row.why or ("none of these" if row.card is None else f"{row.card} GB"),
        )
        for row in rows
    ]
    title = Text(f"{model}: a training step of {batch_size} x {length or TOKENS} tokens", style="bold")
    foot = Text(
        f"smallest card of {', '.join(map(str, CARDS))} GB that holds the tensors of a step (attention by SDPA, AdamW "
        "with float32 masters) and 1 GiB beside them",
        style="dim",
    )
    return Group(title, table(("recipe", "dtype", "#trained", "#peak memory", "card"), cells), foot)


def _left_out(result: Plan) -> Iterator[str]:
    """One line for each reason; the method's name where there are several."""
    several = len(result.recipe) > 1
    for gap in result.left_out:
        yield f"{gap.method.partition('(')[0]}: {gap}" if several else str(gap)


def _later(result: Plan) -> str:
    """What a selection that needs data will leave."""
    return "; ".join(f"what {span.by} keeps, chosen on data in training" for span in result.recipe.narrowed)


def _grouped(entries: Sequence[Entry]) -> Iterator[tuple[object, ...]]:
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        place = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", entry.site.name)
        tensors = ", ".join(f"{term} {_shape(shape)}" for term, shape in entry.terms) or _uses(entry)
        key = (str(entry.method), place or "(shared)", " ".join(sorted(entry.site.roles - {"block"})), tensors)
        groups.setdefault(key, []).append(entry)
    for (method, place, roles, tensors), members in groups.items():
        short = method if len(method) <= 20 else f"{type(members[0].method).__name__}(...)"  # whole in the title
        yield short, _in_lines(place), roles, len(members), tensors, sum(entry.values for entry in members)


def _uses(entry: Entry) -> str:
    """What stands for tensors where a site has none of its own."""
    return f"shared, at {', '.join(symbol for symbol, _ in entry.shared_indices)}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape) or "1"


def _costs(costs: Mapping[str, float | str]) -> Iterator[tuple[str, str]]:
    for key, value in costs.items():
        if key == "unknown":
            yield "memory", f"not estimated ({value})"
        elif key.endswith("_bytes") and isinstance(value, int | float):
            yield f"{key[:-6]} memory", format_bytes(value)
        elif "flops" in key and isinstance(value, int | float):
            yield key, f"{value / 1e6:,.1f} M"
        else:
            yield key, number(value)


def _in_lines(place: str, width: int = 48) -> str:
    """A long path broken behind a dot, not within a name."""
    if len(place) <= width:
        return place
    at = place.rfind(".", 0, width) + 1 or width
    return f"{place[:at]}\n  {_in_lines(place[at:], width - 2)}"
