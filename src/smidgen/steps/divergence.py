"""What to try where a loss or a gradient is not finite."""

from __future__ import annotations

import torch
from torch import nn

from smidgen.common.wrappers import bare
from smidgen.ports.attachment_record import attachment


def remedy(model: nn.Module, mixed: str | None = None) -> str:
    """What would work: another dtype where the model computes in float16, a lower rate, other data.

    Args:
        mixed: the precision that Accelerate computes in, as it names it ("fp16"); None to ask torch's autocast.
    """
    usual = "try a lower lr, or look at the data of this step"
    if attachment(bare(model)).dtype == torch.float16:
        return f"the base is in float16, whose largest number is 65504: load it in bfloat16 or float32, else {usual}"
    kinds = {parameter.device.type for parameter in model.parameters()}
    autocast = any(torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) == torch.float16 for k in kinds)
    if mixed == "fp16" or autocast:
        return f"autocast computes in float16, whose largest number is 65504: choose bfloat16 or none, else {usual}"
    return usual
