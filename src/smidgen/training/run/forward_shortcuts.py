"""What a forward pass stands in: where it starts, which rows of the last block it computes, how dropout is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from smidgen.common.errors import TrainError
from smidgen.data.kinds.base import Collate
from smidgen.efficiency.fast_dropout import FastDropout
from smidgen.efficiency.first_token.last_block import FirstRow
from smidgen.efficiency.prefix_cache.cache import PrefixCache
from smidgen.efficiency.prefix_cache.equivalence_check import batch_of, check_logits, few_examples, few_places
from smidgen.efficiency.prefix_cache.recorded_pass import in_eval_mode, result_of
from smidgen.efficiency.prefix_cache.token_layout import Rows
from smidgen.ports.attachment_record import attachment
from smidgen.training.run.prefix_cache_policy import ON, Conditions, kept_prefix
from smidgen.training.run.settings import Settings


@dataclass(frozen=True, eq=False)
class Shortcut:
    """What is left out of the forward passes over one split.

    Attributes:
        cache: hidden states at the lowest edit, one set per row of the split.
        row: the last block for the first token alone.
        fast_dropout: masks are drawn by `FastDropout`.
    """

    cache: PrefixCache | None = None
    row: FirstRow | None = None
    fast_dropout: bool = False

    @contextmanager
    def __call__(self, places: Sequence[int], batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, `model(**batch)` computes what is needed and no more. `places`: numbers of the batch's rows."""
        with ExitStack() as stack:
            if self.fast_dropout:
                stack.enter_context(FastDropout())
            rowwise = self.cache is not None and self.row is not None and self.cache.ends_rowwise
            if self.cache is not None:
                length = batch["input_ids"].shape[1] if "input_ids" in batch else self.cache.longest(places)
                states = self.cache.first(places) if rowwise else self.cache.batch(places, length)
                stack.enter_context(self.cache.feeding(states, length))
            if self.row is not None and not rowwise:
                stack.enter_context(self.row.reading())
            yield


def shortcuts(
    model: nn.Module,
    splits: Sequence[Rows],
    given: Conditions,
    before: Mapping[str, str | None],
    unsteered: str | None = None,
) -> tuple[list[Shortcut], dict[str, str]]:
    """A shortcut for each split, and for "cache" and "rows" whether they are on, or why not.

    Args:
        before: what came of it at the first start of a run that is resumed: it is done, or not done, again.
        unsteered: why the kind of task has neither; None if it may.

    Raises:
        TrainError: something is insisted on and cannot be had; says why.
    """
    settings, shared = given.settings, given.shared
    fast = settings.fast_dropout and not settings.recompute  # what is computed again runs outside of any mode
    if unsteered is not None:
        insisted = [f"{name}=True" for name in ("cache", "only_read") if getattr(settings, name)]
        if insisted:
            raise TrainError(f"{insisted[0]}, but {unsteered}; leave it out")
        return [Shortcut(fast_dropout=fast) for _ in splits], {"cache": unsteered, "rows": unsteered}
    caches, cached = kept_prefix(model, splits, given, before.get("cache"))
    find = partial(_first_row, model, splits[0], given, before.get("rows"), caches[0])
    same = (str(attachment(model).plan.recipe), settings.pooling, settings.only_read, before.get("rows"))
    row, read = find() if shared is None else shared.once(same, find)
    made = [Shortcut(cache, row, fast) for cache in caches]
    return made, {"cache": cached, "rows": read}


def _first_row(
    model: nn.Module, rows: Rows, given: Conditions, before: str | None, cache: PrefixCache | None
) -> tuple[FirstRow | None, str]:
    """The shortcut that computes the last block for the first token alone, and "on", or None and why not."""
    settings, collate = given.settings, given.collate
    if settings.only_read is False:
        return None, "off"
    if before not in (None, ON):
        return None, str(before)
    try:
        row = FirstRow.of(model, few_examples(model, rows, collate))
        if cache is not None:
            _check(model, rows, collate, Shortcut(cache, row))
    except TrainError as error:
        return None, _declined(str(error), settings, before)
    return row, ON


def _declined(reason: str, settings: Settings, before: str | None) -> str:
    if before == ON:
        raise TrainError(f"the run began with one row of the last block, and now {reason}; start it anew")
    if settings.only_read:
        raise TrainError(f"only_read=True, but {reason}; leave it out")
    return reason


def _check(model: nn.Module, rows: Rows, collate: Collate, shortcut: Shortcut) -> None:
    """Both together, on a few examples."""
    places = few_places(rows)
    batch = batch_of(model, rows, collate, places)
    with in_eval_mode(model):
        wanted = result_of(model(**batch))[0]
        with shortcut(places, batch):
            found = result_of(model(**batch))[0]
    check_logits(found, wanted, "logits from one row and a kept prefix")
