"""What docs/peers.toml says of a method, as cells of a table."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("peers.toml")
NAMES = {"peft": "HF PEFT", "adapters": "adapters", "opendelta": "OpenDelta", "elsewhere": "elsewhere", "note": "note"}
FIELDS = {*NAMES, "peft_field"}


@cache
def facts() -> dict[str, Any]:
    """The whole file: `versions`, `method`, `recipe`."""
    return tomllib.loads(FACTS.read_text())


def of(kind: str, name: str) -> dict[str, str] | None:
    """The row of a "method" or "recipe"; None if nobody looked.

    Raises:
        ValueError: the row has a field that is not in the file's heading.
    """
    row = facts()[kind].get(name)
    if unknown := set(row or ()) - FIELDS:
        raise ValueError(f"{FACTS.name}: {kind}.{name} has {sorted(unknown)}; known are {sorted(FIELDS)}")
    return row


def heads() -> list[str]:
    """Names of the columns, with versions where one was read."""
    versions = facts()["versions"]
    return [f"{text} {versions[key]}" if key in versions else text for key, text in NAMES.items()]


def cells(kind: str, name: str) -> list[str]:
    """One cell for each column; a dash where the library does not have it."""
    row = of(kind, name)
    if row is None:
        return ["not looked up", *[""] * (len(NAMES) - 1)]
    plain = {**row, "peft": _peft(row)}
    return [plain.get(key) or ("" if key in ("elsewhere", "note") else "-") for key in NAMES]


def _peft(row: dict[str, str]) -> str:
    """The type, with the switch that makes it this method."""
    name, field = row.get("peft", ""), row.get("peft_field")
    return f"{name}, `{field}`" if field else name
