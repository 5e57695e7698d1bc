"""Results of several recipes on one model, a row of a batch each.

Nothing of a result stands on the model: of each layout (a recipe on this model) there are edits without values, which
take those of their rows from the pass (`Mix`). So a result is added and removed by whoever makes the passes, and the
model is touched, and compiled again, for a new layout only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smidgen.common.errors import AttachError
from smidgen.common.wrappers import bare
from smidgen.planning.entry import Entry
from smidgen.planning.plans import Plan
from smidgen.ports.attachment_record import MIXTURE, refuse_attached
from smidgen.ports.builtin_ports import port_of
from smidgen.ports.by_row.heads import head_by_row, pool_by_row
from smidgen.ports.by_row.in_place_terms import InPlace, NeutralTerms, why_not_in_place
from smidgen.ports.edit import Edit
from smidgen.ports.forward_state import RESULTS, Mix, close_pass, open_pass
from smidgen.sites.site import module_at


def why_no_rows(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Method -> why rows of one batch cannot have different results of it; empty if they can."""
    found: dict[str, str] = {}
    for entry in plan.entries:
        why = _of_edit(entry) if entry.added else why_not_in_place(entry)
        if why:
            found.setdefault(str(entry.method), why)
    for name, _ in plan.head:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(module) is not nn.Linear:
            found.setdefault("the head", f"{type(module).__name__} at {name} is no plain linear map")
    return found


def _of_edit(entry: Entry) -> str | None:
    if entry.owns_shared or entry.sites:
        return "its sites share tensors"
    if entry.subsets or entry.kept or entry.shared_indices:
        return "a file holds more than its trained tensors, such as indices or a start"
    if entry.method.settled() != entry.method:
        return "it is saved as another method"
    return port_of(entry.site).why_no_rows(_valueless(entry))


def _valueless(entry: Entry) -> Edit:
    """An edit whose tensors come row by row: its own have no values."""
    tensors = {symbol: torch.empty(shape, device="meta") for symbol, shape in entry.terms}
    edit = port_of(entry.site).edit(entry.method, entry.site, tensors)
    edit.saved_as = entry.name("")
    return edit


class Mixture:
    """A model that rows of different results go through, in eval mode.

    Use `with mixed(mix): model(**batch)`. The model's Parameter objects come back by `close`.

    Raises:
        AttachError: something is attached to the model.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_attached(model)
        self.model = bare(model)
        self._plans: dict[str, Plan] = {}
        self._terms: dict[str, NeutralTerms] = {}
        self._heads: dict[str, RemovableHandle] = {}
        self._handles: list[RemovableHandle] = []
        self._training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._handles += [
            self.model.register_forward_pre_hook(open_pass, prepend=True),
            self.model.register_forward_hook(close_pass, always_call=True),
        ]
        self._base: object = getattr(self.model, "base_model", None)
        if self._base is not None:
            self._handles.append(self._base.register_forward_hook(pool_by_row, with_kwargs=True))
        self.model.__dict__[MIXTURE] = self

    def add(self, layout: str, plan: Plan) -> None:
        """Make place for results of a plan, under a name of letters and digits.

        Raises:
            AttachError: a method has no form by row, or a place cannot be edited; nothing is changed then.
        """
        if why := why_no_rows(self.model, plan):
            listed = "; ".join(f"{method}: {reason}" for method, reason in why.items())
            raise AttachError(f"rows of one batch cannot have different results of this recipe: {listed}")
        self._plans[layout] = plan
        try:
            self._place(layout, plan)
        except Exception:
            self.remove(layout)
            raise
        torch.compiler.reset()

    def _place(self, layout: str, plan: Plan) -> None:
        """Puts a layout's edits on their modules, and neutral terms and heads where none stand yet."""
        for entry in plan.entries:
            site = entry.site
            if entry.added:
                edit = _valueless(entry)
                self._handles += port_of(site).place_layout(self.model, site, layout, entry.key, edit)
            elif site.path not in self._terms:
                assert isinstance(site, InPlace)  # or `why_no_rows` has said so
                terms = NeutralTerms(self.model, site)
                terms.place()
                self._terms[site.path] = terms
        for name, _ in plan.head:
            path = name.rpartition(".")[0]
            if path not in self._heads:
                hook = partial(head_by_row, path)
                self._heads[path] = module_at(self.model, path).register_forward_hook(hook, prepend=True)

    def remove(self, layout: str) -> None:
        """Take a layout off: its edits, and the neutral terms and hooks that no other one needs."""
        plan = self._plans.pop(layout, None)
        for entry in plan.entries if plan is not None else ():
            if entry.added:
                port_of(entry.site).remove_layout(self.model, entry.site, layout)
        plans = self._plans.values()
        terms = {entry.site.path for other in plans for entry in other.entries if not entry.added}
        heads = {name.rpartition(".")[0] for other in plans for name, _ in other.head}
        for path in self._terms.keys() - terms:
            self._terms.pop(path).remove()
        for path in self._heads.keys() - heads:
            self._heads.pop(path).remove()

    def choose_by(self, results: Callable[[Tensor], Mix]) -> None:
        """Let `rows_from(index)` say which results rows (B,) have, instead of `mixed`."""
        self.model.__dict__[RESULTS] = results

    def close(self) -> None:
        """Take everything off: the model is as it was, with its very Parameter objects."""
        for layout in list(self._plans):
            self.remove(layout)
        for handle in self._handles:
            handle.remove()
        for module in self._training:
            module.training = True
        self._handles = []
        for name in (MIXTURE, RESULTS):
            self.model.__dict__.pop(name, None)
        torch.compiler.reset()
