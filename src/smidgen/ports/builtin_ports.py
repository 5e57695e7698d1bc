"""The library's own ports, made known."""

from __future__ import annotations

from smidgen.ports.attention_port import AttentionPort
from smidgen.ports.base import Port, port_of, register_port
from smidgen.ports.block_port import BlockPort
from smidgen.ports.module_port import ModulePort
from smidgen.ports.prompts.prompt_port import PromptPort
from smidgen.ports.shared_port import SharedPort
from smidgen.ports.side_network_port import SideNetworkPort
from smidgen.ports.sublayer_port import SublayerPort
from smidgen.ports.weight_port import WeightPort

BUILTIN: tuple[Port, ...] = (
    ModulePort(),
    SublayerPort(),
    AttentionPort(),
    PromptPort(),
    BlockPort(),
    SideNetworkPort(),
    WeightPort(),
    SharedPort(),
)

for _port in BUILTIN:
    register_port(_port)

__all__ = ["BUILTIN", "port_of"]
