"""Cutting rows into splits: by label, by a seed, and never the same text on both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from smidgen.common.errors import DataError


def group(keys: Iterable[Iterable[str]]) -> list[int]:
    """Group number of each row; rows that share a key, case and white space apart, are in one group."""
    owner: dict[str, int] = {}
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for row, own in enumerate(keys):
        parent.append(row)
        for key in own:
            parent[root(row)] = root(owner.setdefault(" ".join(key.casefold().split()), row))
    return [root(i) for i in range(len(parent))]


def cut(labels: Sequence[object] | None, groups: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers (kept, held out), each in order; about `share` of the rows of every label is held out.

    Groups are never parted, and a label's last group is kept. Shuffling is by the seed alone.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for row, number in enumerate(groups):
        members[number].append(row)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for rows in members.values():
        strata[str(labels[rows[0]]) if labels is not None else ""].append(rows)
    # RandomState's stream is frozen across numpy versions, default_rng's is not.
    random, held, seen = np.random.RandomState(seed), set[int](), 0
    for stratum in (strata[key] for key in sorted(strata)):
        seen += sum(map(len, stratum))
        for index in random.permutation(len(stratum))[1:]:
            if len(held) < max(1, round(share * seen)):
                held.update(stratum[index])
    return [i for i in range(len(groups)) if i not in held], sorted(held)


def share_of(wanted: float, rows: int) -> float:
    """A wanted share, or an absolute number of rows, as a share of the rows.

    Raises:
        DataError: it is not a share below 1 or a number below the number of rows.
    """
    share = wanted / rows if isinstance(wanted, int) else wanted
    if isinstance(wanted, bool) or not 0 <= share < 1:
        raise DataError(f"validation={wanted} must be a share below 1.0, or a number of the {rows} training rows")
    return share


def hold_out(
    keys: Sequence[Sequence[str]], labels: Sequence[object] | None, wanted: float, seed: int
) -> tuple[list[int], list[int]]:
    """Cut a validation split off the training rows. keys: the texts of each row.

    Raises:
        DataError: `wanted` makes no sense, or the rows are too few or too alike to be cut.
    """
    groups = group(["\n".join(texts)] for texts in keys)
    kept, held = cut(labels, groups, share_of(wanted, len(keys)), seed)
    if not held:
        raise DataError(f"train has {len(keys)} rows, too few to cut a validation split of distinct texts "
                        "with every label left in train; add rows, or give a folder with a file for each split "
                        "(or validation=0 for train alone)")  # fmt: skip
    return kept, held


def first(rows: int, limit: int, seed: int, *, shuffle: bool = True) -> list[int]:
    """Numbers of the first `limit` rows after a shuffle by the seed; all of them if there are fewer.

    Raises:
        DataError: the limit is below 1.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise DataError(f"limit must be a whole number of at least 1, found {limit!r}")
    order = np.random.RandomState(seed).permutation(rows) if shuffle else np.arange(rows)
    return list(map(int, order[:limit]))
