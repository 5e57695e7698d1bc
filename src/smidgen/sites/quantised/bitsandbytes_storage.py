"""bitsandbytes: `Linear4bit` (nf4 and fp4, the scales of blocks perhaps quantised again) and `Linear8bitLt`."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.common.errors import AttachError
from smidgen.sites.quantised.storage import Parts, WeightStorage

PACKED = (
    "this 4-bit base has been run in eval mode on a CPU with AVX512-BF16, where bitsandbytes rounds its scales to "
    "bfloat16 for good, so it is not the base of the file any more: load it again (smidgen.load keeps it from that)"
)


def _package() -> Any:
    """bitsandbytes if somebody has imported it: no module is of its classes before."""
    return sys.modules.get("bitsandbytes")


def _is_a(module: nn.Module, name: str) -> bool:
    package = _package()
    layers = getattr(package, "nn", None)
    return layers is not None and isinstance(module, getattr(layers, name))


class FourBit(WeightStorage):
    """A code of 4 bits for each value and a scale for each block of 64, say; "-double" where scales have codes too."""

    def holds(self, module: nn.Module) -> bool:
        """Quantised already: before that its weight is one of real numbers."""
        return _is_a(module, "Linear4bit") and self._state(module) is not None

    def scheme(self, module: nn.Module) -> str:
        """nf4, nf4-double, fp4 or fp4-double."""
        state = self._state(module)
        return f"{state.quant_type}{'-double' if state.nested else ''}"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the state of the quantisation has it; the codes stand in one column."""
        rows, columns = self._state(module).shape
        return int(rows), int(columns)

    def parts(self, module: nn.Module) -> Parts:
        """Codes, scales and the table of the 16 values; of scales with codes, theirs as well."""
        self.check(module)
        return _four_bit_parts(self._weight(module).data, self._state(module))

    def dequantised(self, module: nn.Module) -> Tensor:
        """In the dtype of the weight that was quantised."""
        self.check(module)
        found: Tensor = _package().functional.dequantize_4bit(self._weight(module).data, self._state(module))
        return found.view(self.shape(module))

    def quantised(self, weight: Tensor, scheme: str) -> Parts | None:
        """In blocks of 64, as `smidgen.load` has them."""
        kind, _, double = scheme.partition("-")
        if kind not in ("nf4", "fp4"):
            return None
        codes, state = _package().functional.quantize_4bit(
            weight.contiguous(), compress_statistics=double == "double", quant_type=kind
        )
        return _four_bit_parts(codes, state)

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """By the package's own quantiser, with the block size and type that stand there."""
        self.check(module)
        old, stored = self._state(module), self._weight(module)
        codes, state = _package().functional.quantize_4bit(
            weight.detach().to(stored.device, old.dtype).contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
            quant_storage=stored.dtype,
        )
        stored.data = codes
        stored.quant_state = state
        module.quant_state = state

    def share(self, module: nn.Module, memo: dict[int, object]) -> None:
        """Codes and the state of the quantisation."""
        memo[id(self._weight(module))] = copy.copy(self._weight(module))
        memo[id(self._state(module))] = self._state(module)

    def bias_dtype(self, module: nn.Module) -> torch.dtype | None:
        """That of its products."""
        dtype = module.compute_dtype
        return dtype if isinstance(dtype, torch.dtype) else None

    def check(self, module: nn.Module) -> None:
        """Raises AttachError if a kernel has rearranged the codes, which rounds the scales for good."""
        if getattr(self._state(module), "packing_format_for_cpu", False):
            raise AttachError(PACKED)

    def hold(self, module: nn.Module) -> object:
        """On a CPU with AVX512-BF16, an eval pass would rearrange the codes for a kernel that has no gradient."""
        before = getattr(module, "support_avx512bf16_for_cpu", None)
        if before:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return before

    def release(self, module: nn.Module, held: object) -> None:
        """The kernel may be used again."""
        if held:
            module.support_avx512bf16_for_cpu = held  # type: ignore[assignment]

    def _weight(self, module: nn.Module) -> Any:
        return module._parameters["weight"]

    def _state(self, module: nn.Module) -> Any:
        state = getattr(self._weight(module), "quant_state", None)
        return getattr(module, "quant_state", None) if state is None else state


def _four_bit_parts(codes: Tensor, state: Any) -> Parts:
    found = {"codes": codes, "absmax": state.absmax, "table": state.code}
    if state.nested:
        inner = state.state2
        found |= {"scale_absmax": inner.absmax, "scale_table": inner.code, "offset": state.offset.reshape(1)}
    return found


class EightBit(WeightStorage):
    """LLM.int8(): whole numbers of 8 bits and a scale for each row; what enters is rounded to 8 bits as well."""

    keeps_input = True

    def holds(self, module: nn.Module) -> bool:
        """Quantised already."""
        weight = module._parameters.get("weight")
        return _is_a(module, "Linear8bitLt") and weight is not None and weight.dtype == torch.int8

    def scheme(self, module: nn.Module) -> str:
        """int8."""
        return "int8"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As stored."""
        rows, columns = self._codes(module).shape
        return rows, columns

    def parts(self, module: nn.Module) -> Parts:
        """Codes and the largest absolute value of each row."""
        return {"codes": self._codes(module), "absmax": self._scales(module)}

    def dequantised(self, module: nn.Module) -> Tensor:
        """Codes times scales over 127, in float32."""
        return self._codes(module).float() * (self._scales(module).float() / 127)[:, None]

    def quantised(self, weight: Tensor, scheme: str) -> Parts | None:
        """Through float16, as the package does it."""
        if scheme != "int8":
            return None
        codes, scales, _ = _package().functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return {"codes": codes, "absmax": scales}

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """By the package's own quantiser, from float16 as there."""
        codes, scales, _ = _package().functional.int8_vectorwise_quant(
            weight.detach().to(self._codes(module).device, torch.float16).contiguous()
        )
        stored, state = self._weight(module), self._held_state(module)
        stored.data, stored.CB, stored.SCB = codes, codes, scales
        state.CB = state.SCB = None

    def share(self, module: nn.Module, memo: dict[int, object]) -> None:
        """Codes and scales, on the weight or, after a first pass, in the module's state."""
        weight, state = self._weight(module), self._held_state(module)
        own = {"requires_grad": False, "has_fp16_weights": False, "CB": weight.CB, "SCB": weight.SCB}
        memo[id(weight)] = type(weight)(weight.data, **own)
        memo |= {id(part): part for part in (state.CB, state.SCB) if part is not None}

    def _weight(self, module: nn.Module) -> Any:
        return module._parameters["weight"]

    def _held_state(self, module: nn.Module) -> Any:
        return module.state

    def _codes(self, module: nn.Module) -> Tensor:
        codes: Tensor = self._weight(module).data
        return codes

    def _scales(self, module: nn.Module) -> Tensor:
        """The first forward pass moves them from the weight to the module."""
        scales = getattr(self._weight(module), "SCB", None)
        found: Tensor = self._held_state(module).SCB if scales is None else scales
        return found
