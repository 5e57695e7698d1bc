"""What a module that owns parameters is: norm, linear map, convolution, embedding; its widths, where they lie."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation without running statistics; it may have no parameters (OLMo 1)."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        return True
    name = type(module).__name__.lower()
    running = "batchnorm" in name or "instancenorm" in name or hasattr(module, "running_mean")
    leaf = next(module.children(), None) is None
    shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
    return "norm" in name and leaf and not running and all(len(s) == 1 for s in shapes)


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution that is linear in a weight of its own.

    Not so: one whose weight is made of other tensors (weight norm) or in a forward of its own (weight
    standardisation), and a transposed one, whose rows are its inputs. Nor is a causal depthwise Conv1d: Mamba's
    mixers, and others like them, read its weight and do not call it.
    """
    if not isinstance(module, CONVOLUTIONS) or "weight" not in module._parameters:
        return False
    own = any(type(module).forward is cls.forward for cls in CONVOLUTIONS)
    depthwise = isinstance(module, nn.Conv1d) and 1 < module.groups == module.in_channels
    return own and not (depthwise and module.padding == (module.kernel_size[0] - 1,) != (0,))


def kind_of(module: nn.Module) -> str:
    """One of "norm" (one or two vectors of one size), "linear", "conv", "embedding" and "other"."""
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
    if is_norm(module) and 1 <= len(shapes) <= 2 and len(set(shapes)) == 1 and len(shapes[0]) == 1:
        return "norm"
    # nn.MultiheadAttention reads its out_proj's weight without calling it, so no hook on it ever fires
    if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return "linear"
    if is_conv(module):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


def widths(module: nn.Module) -> tuple[int, int]:
    """(input, output) of a linear map or convolution, (size, size) of a norm, (rows, width) of an embedding, else
    (0, 0)."""
    kind = kind_of(module)
    if kind == "other":
        return 0, 0
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels, module.out_channels
    shape = next(tuple(p.shape) for p in module.parameters(recurse=False))
    return shape[0], shape[-1]


def channel_axis(module: nn.Module) -> int:
    """The axis of a module's input and output that has their widths: the last one, but for maps of channels."""
    if is_conv(module):
        return -len(module.kernel_size) - 1  # type: ignore[arg-type]
    first = isinstance(module, nn.GroupNorm) or getattr(module, "data_format", "") == "channels_first"
    return 1 if first else -1
