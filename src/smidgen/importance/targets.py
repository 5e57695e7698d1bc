"""What an attached model trains, head apart, sorted by the rule that gives its per-example gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from smidgen.importance.per_example_rules import RULES, Call, Rule, Tensors, general
from smidgen.ports.attachment_record import attachment
from smidgen.ports.edit import Edit
from smidgen.sites.module_kinds import kind_of
from smidgen.sites.site import SharedSite


@dataclass(frozen=True, eq=False)
class Target:
    """Trained tensors that stand in the same modules under the same terms, and the rule for them.

    Attributes:
        names: term -> saved name.
        tensors: term -> the trained tensor.
        modules: those that own the tensors; several if they are tied.
        rule: of `smidgen.importance.per_example_rules`.
    """

    names: Mapping[str, str]
    tensors: Mapping[str, nn.Parameter]
    modules: tuple[nn.Module, ...]
    rule: Rule

    def squares(self, calls: Sequence[Call], limit: int) -> Tensors:
        """Saved name -> sum over a batch's examples of the squared gradient."""
        p = {term: tensor.detach() for term, tensor in self.tensors.items()}
        return {self.names[term]: value for term, value in self.rule(p, calls, limit).items()}


def tensors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Saved name -> tensor of everything that an attached model trains but the head."""
    record = attachment(model)
    head = {name for name, _ in record.plan.head}
    return {name: tensor for name, tensor in record.trained() if name not in head}


def find_targets(model: nn.Module) -> tuple[list[Target], list[str]]:
    """The targets, and the names of tensors that no rule serves: shared by sites, or tied between modules of
    different kinds."""
    owners = _owners(model)
    groups: dict[tuple[int, ...], list[tuple[str, str, nn.Parameter]]] = {}
    modules: dict[tuple[int, ...], tuple[nn.Module, ...]] = {}
    rest: list[str] = []
    for name, tensor in tensors_of(model).items():
        found = owners.get(id(tensor), [])
        shared = any(isinstance(module, Edit) and isinstance(module.site, SharedSite) for module, _ in found)
        rules = {_rule(module) for module, _ in found}
        terms = {term for _, term in found}
        if shared or len(rules) != 1 or len(terms) != 1:
            rest.append(name)
            continue
        key = tuple(id(module) for module, _ in found)
        modules[key] = tuple(module for module, _ in found)
        groups.setdefault(key, []).append((terms.pop(), name, tensor))
    return [_target(modules[key], group) for key, group in groups.items()], rest


def _target(modules: tuple[nn.Module, ...], group: Iterable[tuple[str, str, nn.Parameter]]) -> Target:
    rows = list(group)
    names = {term: name for term, name, _ in rows}
    return Target(names, {term: tensor for term, _, tensor in rows}, modules, _rule(modules[0]))


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Identity of a tensor -> the modules in which it stands, and its term there."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for term, tensor in module._parameters.items():
            owners.setdefault(id(tensor), []).append((module, term))
    return owners


def _rule(module: nn.Module) -> Rule:
    return general if isinstance(module, Edit) else RULES.get(kind_of(module), general)


def masters(targets: Iterable[Target]) -> dict[str, Tensor]:
    """Saved name -> trained tensor of some targets."""
    return {name: target.tensors[term] for target in targets for term, name in target.names.items()}
