"""Loading a base whose linear maps are stored in 4 or 8 bits: the schemes by name, and the packages that have them."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from smidgen.common.errors import ModelError, nearest
from smidgen.sites.new_tensors import keep_note
from smidgen.sites.quantised.maps import quantised_maps
from smidgen.sites.quantised.torchao_storage import GROUP
from smidgen.sites.task_head import head_names

NONE = "none"


@dataclass(frozen=True)
class Scheme:
    """One way to store linear maps.

    Attributes:
        package: that quantises and computes.
        config: dtype of the base and names of modules that stay as they are -> configuration of transformers.
        about: for people.
    """

    package: str
    config: Callable[[torch.dtype, list[str]], Any]
    about: str


def _four_bit(kind: str, double: bool) -> Callable[[torch.dtype, list[str]], Any]:
    """Products in the dtype of the base."""

    def config(dtype: torch.dtype, kept: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )

    return config


def _eight_bit(dtype: torch.dtype, kept: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)


def _torchao(bits: int) -> Callable[[torch.dtype, list[str]], Any]:
    """The packed form of 4 bits needs a GPU's kernels; the other has the same codes."""

    def config(dtype: torch.dtype, kept: list[str]) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup
        from transformers import TorchAoConfig

        kind = (
            Int8WeightOnlyConfig()
            if bits == 8
            else IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=PerGroup(GROUP))
        )
        return TorchAoConfig(kind, modules_to_not_convert=kept)

    return config


SCHEMES = {
    "nf4": Scheme("bitsandbytes", _four_bit("nf4", False), "normal floats of 4 bits"),
    "nf4-double": Scheme("bitsandbytes", _four_bit("nf4", True), "the same, scales quantised again"),
    "fp4": Scheme("bitsandbytes", _four_bit("fp4", False), "floats of 4 bits"),
    "fp4-double": Scheme("bitsandbytes", _four_bit("fp4", True), "the same, scales quantised again"),
    "int8": Scheme("bitsandbytes", _eight_bit, "LLM.int8(): inputs in 8 bits too"),
    "torchao-int8": Scheme("torchao", _torchao(8), "weight-only, a scale for each row"),
    "torchao-int4": Scheme("torchao", _torchao(4), f"weight-only, a scale for {GROUP} values"),
}


def scheme_named(name: str | None) -> Scheme | None:
    """The scheme of a name; None for "none", "" or None.

    Raises:
        ModelError: no such scheme, or its package is not installed.
    """
    if name in (None, "", NONE):
        return None
    if not isinstance(name, str) or name not in SCHEMES:
        raise ModelError(
            f"quantize={name!r} is not one of {NONE}, {', '.join(SCHEMES)}{nearest(str(name), SCHEMES)}; a base in "
            "another form is loaded with transformers and given to smidgen.attach"
        )
    scheme = SCHEMES[name]
    need(scheme.package, f"quantize={name!r}")
    return scheme


def need(package: str, what: str) -> None:
    """Import a package of quantised maps without its notes. Raises ModelError if it is not installed."""
    if package in sys.modules:
        return
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{what} needs {package}, which is not installed: pip install 'smidgen[quant]'")
    with quiet_imports():
        if package == "torchao":
            import torchao.quantization  # noqa: F401
        else:
            import bitsandbytes  # noqa: F401


STORED = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}  # as a checkpoint says -> package
UNKNOWN = ("gptq", "awq")


def check_stored_form(folder: str, options: Mapping[str, object], scheme: Scheme | None) -> None:
    """Import what a checkpoint that is stored in few bits needs.

    Raises:
        ModelError: it is stored in a form that nothing can be attached to, or another one is asked for on top.
    """
    if "gguf_file" in options:
        return
    stored = getattr(_config(folder, options), "quantization_config", None) or {}
    method = str(stored.get("quant_method", "")).lower() if isinstance(stored, dict) else ""
    if method in UNKNOWN:
        raise ModelError(
            f"{folder} is stored by {method.upper()}, which nothing can be attached to here; take the checkpoint that "
            f"it was made of, with quantize='nf4' (or {', '.join(name for name in SCHEMES if name != 'nf4')})"
        )
    if method and scheme is not None:
        raise ModelError(f"{folder} is stored by {method} already; leave quantize= out")
    if method in STORED:
        need(STORED[method], folder)


def _config(folder: str, options: Mapping[str, object]) -> PreTrainedConfig:
    known = {"revision": options["revision"]} if "revision" in options else {}
    found: PreTrainedConfig = AutoConfig.from_pretrained(folder, **known)
    return found


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Both packages tell of kernels that they lack, and use what torch deprecates, while they are imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def kept_modules(skeleton: nn.Module) -> list[str]:
    """Paths of the linear maps of a model without content that stay in real numbers: the head, and output layers."""
    owners = {name.rpartition(".")[0] for name in head_names(skeleton)}
    found = [path for path, module in skeleton.named_modules() if path in owners and isinstance(module, nn.Linear)]
    if isinstance(skeleton, PreTrainedModel) and skeleton.get_output_embeddings() is not None:
        output = skeleton.get_output_embeddings()
        found += [path for path, module in skeleton.named_modules() if module is output]
    return found


def quantised_copy(plain: PreTrainedModel, scheme: Scheme, dtype: torch.dtype) -> PreTrainedModel:
    """A model that is in memory, its maps quantised by transformers as it does with what it loads."""
    model: Any = type(plain).from_pretrained(
        None,
        config=plain.config,
        state_dict=plain.state_dict(),
        quantization_config=scheme.config(dtype, kept_modules(plain)),
        dtype=dtype,
    )
    keep_note(plain, model)
    model._smidgen_tokens = getattr(plain, "_smidgen_tokens", None)
    return settled(model)


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """Let passes in eval mode leave the stored values alone, also with nothing attached."""
    for _, module, storage in quantised_maps(model):
        storage.hold(module)
    return model
