"""The library's own rules, in the order in which sites are looked for."""

from __future__ import annotations

from smidgen.planning.rules.attention import KeyValueRules
from smidgen.planning.rules.blocks import BlockRules, StackRules
from smidgen.planning.rules.inputs import InputRules
from smidgen.planning.rules.modules import ModuleRules
from smidgen.planning.rules.shared import SharedRules
from smidgen.planning.rules.sublayers import SublayerRules
from smidgen.planning.rules.weights import WeightRules
from smidgen.planning.site_rules import all_rules, register_rules

for _rules in (
    SublayerRules(),
    KeyValueRules(),
    ModuleRules(),
    WeightRules(),
    InputRules(),
    BlockRules(),
    StackRules(),
    SharedRules(),
):
    register_rules(_rules)

__all__ = ["all_rules"]
