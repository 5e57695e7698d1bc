"""What a module that owns parameters is: norm, linear map, convolution, embedding; its widths, where they lie."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from smidgen.sites.module_probe import Affine, affine, is_plain_map
from smidgen.sites.quantised.maps import storage_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
# Tables by distance or position, and what a router adds to choose experts (outside of the loss): biases by name alone.
NO_BIASES = {"relative", "position", "correction", "expert"}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation without running statistics; it may have no parameters (OLMo 1)."""
    if isinstance(module, NORMS):
        return True
    name = type(module).__name__.lower()
    if "norm" not in name:
        return False
    running = "batchnorm" in name or "instancenorm" in name or hasattr(module, "running_mean")
    # MoonshineStreaming's norms have a child that normalises and owns nothing
    whole = all(next(child.parameters(), None) is None for child in module.children())
    shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
    return whole and not running and all(len(s) == 1 or _by_head(module) for s in shapes)


def _by_head(module: nn.Module) -> bool:
    """Whether a norm has a gain for each head, (heads, head_dim), and normalises each head by itself."""
    form = affine(module)
    return form is not None and form.normalises


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


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map of a weight of its own, and nothing else.

    Not so: a subclass whose forward does something else (the routers of Llama 4 and PhiMoE), one whose weight is made
    of other tensors, and the last map of nn.MultiheadAttention, which reads its weight and does not call it.
    """
    if not isinstance(module, nn.Linear | Conv1D) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return "weight" in module._parameters and (storage_of(module) is not None or is_plain_map(module))


def is_table(module: nn.Module) -> bool:
    """Whether a module gives the rows of its weight and does nothing else: no scale (Gemma), no limit to their norm."""
    return type(module).forward is nn.Embedding.forward and module.max_norm is None and "weight" in module._parameters


def kind_of(module: nn.Module) -> str:
    """One of "norm" (one or two tensors of one size, by channel or by head and channel), "linear", "conv",
    "embedding" and "other"."""
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
    if 1 <= len(shapes) <= 2 and len(set(shapes)) == 1 and is_norm(module):
        # a LayerNorm over several axes has no channels of its own
        over: Sequence[int] = getattr(module, "normalized_shape", (0,))
        if len(shapes[0]) == 1 or (len(shapes[0]) == 2 and len(over) == 1 and _by_head(module)):
            return "norm"
    if is_linear(module):
        return "linear"
    if is_conv(module):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is added to what a map gives, or to what attention compares.

    `bias`, `q_bias` (DeBERTa), `r_w_bias` (XLNet), `gate_up_proj_bias` (experts), `pos_bias_u` (conformers), `bias_k`.
    """
    *front, last = name.split("_")
    named = "bias" in (last, *front[:1]) or (len(last) == 1 and front[-1:] == ["bias"])
    return named and not NO_BIASES & {*front, last}


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
    return shape[-1] if kind == "norm" else shape[0], shape[-1]


def norm_form(module: nn.Module) -> Affine | None:
    """How a norm's output follows from its gain and bias, if it is gain times something plus bias."""
    if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return Affine(-1, 0.0, True)
    return Affine(1, 0.0, True) if type(module).forward is nn.GroupNorm.forward else affine(module)


def channel_axis(module: nn.Module) -> int:
    """The axis of a module's input and output that has their widths: the last one, but for maps of channels."""
    if is_conv(module):
        return -len(module.kernel_size) - 1  # type: ignore[arg-type]
    if is_norm(module) and (form := norm_form(module)):
        return form.axis
    first = isinstance(module, nn.GroupNorm) or getattr(module, "data_format", "") == "channels_first"
    return 1 if first else -1


REVERSIBLE = ("ReformerEncoder",)


def reversible_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> each module that computes its blocks in one autograd function, and again on the way back."""
    return {path: m for path, m in model.named_modules() if any(c.__name__ in REVERSIBLE for c in type(m).__mro__)}
