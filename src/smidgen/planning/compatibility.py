"""Why a recipe does not fit a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from smidgen.common.errors import PlanError
from smidgen.methods.base import Method, renewed
from smidgen.methods.capabilities import Grows, ReadsWeight, StartsFromOriginal
from smidgen.planning.advice import Advice
from smidgen.planning.entry import Entry
from smidgen.planning.site_rules import rules_for
from smidgen.recipe.recipe import Recipe
from smidgen.sites.discovery import roles_found, shares_layers
from smidgen.sites.module_calls import without_gradient
from smidgen.sites.module_kinds import is_norm
from smidgen.sites.new_tensors import resized
from smidgen.sites.quantised.maps import quantised_maps
from smidgen.sites.roles import within
from smidgen.sites.site import ROLES, InputSite, NormSite, Site
from smidgen.sites.sublayers import UNKNOWN
from smidgen.sites.targeting import LINEAR_ROLES

# A norm in every place at once: what a method does with norms.
_NORM = NormSite(
    "norm",
    frozenset(ROLES),
    (("weight", (1,)), ("bias", (1,))),
    width_in=1,
    width_out=1,
    gain="weight",
    bias="bias",
)


def no_match(method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
    """What to say of a method that matches no site."""
    name = type(model).__name__
    roles = ", ".join(roles_found(sites)) or "none"
    if any(method.trains(site) for site in sites):
        return f"{method} is left with nothing: the head or another term trains it, or the pooling gives it no effect"
    text = f"{method} matches no site of {name}; roles found: {roles}"
    text += _of_norms(method, model, sites)
    text += "".join(rules.unmatched(method, model, sites) for rules in rules_for(method))
    shut = [p for p in without_gradient(model) if any(True for _ in model.get_submodule(p).parameters())]
    if shut:
        text += f"; no gradient passes through {shut[0] or 'its forward'}, which stands under torch.no_grad"
    if not any(site.roles & set(LINEAR_ROLES) for site in sites):
        text += f"; {UNKNOWN}"
    if stacked := [site.path for site in sites if is_stacked(model, site)]:
        text += _of_stacked(method, model, sites, stacked[0])
    return text


def _of_stacked(method: Method, model: nn.Module, sites: Sequence[Site], path: str) -> str:
    """What a module holds several weights in one parameter for, and what acts at those of experts."""
    if re.search("attention|attn", type(model.get_submodule(path)).__name__, re.IGNORECASE):
        return f"; {path} holds weights with an axis of heads, no maps of two axes"
    advice = Advice(method, sites).for_module(path)
    said = f"; {path} holds weights of several experts stacked in one parameter, whose inputs and outputs no hook sees"
    return f"{said}; {advice}" if advice else said


def _of_norms(method: Method, model: nn.Module, sites: Sequence[Site]) -> str:
    """What a method that trains or scales norms, or biases, would need and this model has not."""
    all_layers: dict[str, None] = {"layers": None} if hasattr(method, "layers") else {}
    anywhere = replace(method, **all_layers)
    trained, norms = set(anywhere.trains(_NORM)), [site for site in sites if isinstance(site, NormSite)]
    text = ""
    if (trained or anywhere.acts(_NORM)) and not norms:
        if any(is_norm(m) and not type(m).__module__.startswith("torch.nn.utils") for m in model.modules()):
            text = "; its norms have no parameters, so there is no gain or bias to tune"
        elif any(hasattr(module, "running_mean") for module in model.modules()):
            text = "; its norms are BatchNorms, whose statistics run, and no others"
        else:
            text = "; it has no norms"
    if trained == {_NORM.bias} and not any(site.biases for site in sites):
        text += "; none of its maps and norms has a bias" + (": LN() trains gains" if norms else "")
    return text


def is_stacked(model: nn.Module, site: Site) -> bool:
    """Whether a site holds several matrices in one parameter. A convolution's weight has three axes too, also where it
    is made of parts that lie in modules below it (weight norm)."""
    parents = [site.path.rsplit(".", i)[0] for i in range(site.path.count(".") + 1)]
    convolution = any(hasattr(model.get_submodule(path), "kernel_size") for path in parents)
    return not convolution and any(len(shape) == 3 and shape[0] > 1 for _, shape in site.terms)


def refuse_unsupported(model: nn.Module, recipe: Recipe) -> None:
    """Raises PlanError unless the model is one that can be edited, and has layers to name if some are named."""
    if not isinstance(model, nn.Module):
        raise PlanError(f"the model is of type {type(model).__name__}, {model!r:.40}; smidgen.load gives one")
    _refuse_unknown_storage(model)
    named = [term for term in recipe if getattr(term, "layers", None) is not None]
    if named and shares_layers(model):
        raise PlanError(
            f"{named[0]}: {type(model).__name__} uses the same layers at every depth, so layers= cannot pick some; "
            "leave it out"
        )


WORKS = "load it in float32, bfloat16 or float16, or with smidgen.load(..., quantize='nf4') and the like"


def _refuse_unknown_storage(model: nn.Module) -> None:
    """Raises PlanError for values that are stored in few bits in a way that is not known."""
    known = {id(module._parameters["weight"]) for _, module, _ in quantised_maps(model)}
    if getattr(model, "is_quantized", False) and not known:
        by = _quantiser(model)
        raise PlanError(f"{type(model).__name__} is quantised{f' by {by}, unknown here' if by else ''}; {WORKS}")
    for name, parameter in model.named_parameters():
        if id(parameter) not in known and not (parameter.is_floating_point() and parameter.element_size() > 1):
            raise PlanError(
                f"{type(model).__name__} is quantised in a way unknown here: {name} holds {str(parameter.dtype)[6:]} "
                f"values of {type(parameter).__name__}; {WORKS}"
            )


def _quantiser(model: nn.Module) -> str:
    """What transformers calls the method that a model is quantised by; "" if it does not say."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or "")


def refuse_quantised(model: nn.Module, entries: Sequence[Entry]) -> None:
    """Raises PlanError if a method trains a quantised weight itself: codes take no gradient."""
    schemes = {f"{path}.weight": storage.scheme(module) for path, module, storage in quantised_maps(model)}
    for entry in entries:
        for term, _ in entry.terms if not entry.added else ():
            if scheme := schemes.get(entry.name(term)):
                raise PlanError(
                    f"{entry.method} trains {entry.name(term)}, which is stored in {scheme}: codes take no gradient; "
                    "LN(), BitFit() and methods that add tensors (LoRA, IA3, SSF, Adapter, ...) do, or load the base "
                    "without quantize="
                )


def refuse_part(recipe: Recipe, index: int, method: Method) -> None:
    """Raises PlanError if a term is narrowed of which no part can be kept."""
    by = next((span.by for span in recipe.narrowed if span.start <= index < span.stop), None)
    if by is None:
        return
    if method.settled() != method:
        raise PlanError(f"{method} saves {method.settled()}, so no part of it can be kept; leave out the Select")
    if isinstance(method, Grows):
        raise PlanError(f"{method} grows while it trains, so no part of it can be kept; leave out the Select")
    if why := by.refuses(method):
        raise PlanError(why)


def refuse_twice(entries: Sequence[Entry], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises PlanError if two terms train one tensor."""
    owner: dict[int, tuple[Entry, str]] = {}
    for entry in entries:
        for name, _ in entry.names() if not entry.added else ():
            other, first = owner.setdefault(id(parameters[name]), (entry, name))
            if other.index != entry.index:
                raise PlanError(
                    f"{first} would be trained twice: by {other.method} and by {entry.method}; leave one out"
                )


def refuse_two_starts(entries: Sequence[Entry]) -> None:
    """Raises PlanError if two terms start at what the quantisation of one map lost: they would make up for it twice."""
    first: dict[str, Entry] = {}
    for entry in entries:
        if isinstance(entry.method, StartsFromOriginal):
            other = first.setdefault(entry.site.name, entry)
            if other is not entry:
                raise PlanError(
                    f"{other.method} and {entry.method} both start at what was lost at {entry.site.name}; leave one out"
                )


def refuse_headless(model: nn.Module, recipe: Recipe, entries: Sequence[Entry], head: Sequence[str]) -> None:
    """Raises PlanError if nothing is trained, or if a class that is made for labels has no layer that gives them."""
    name = type(model).__name__
    named = "name it, as in LN() + Full(target='classifier')"
    if not entries and not head:
        raise PlanError(
            f"{recipe} trains nothing: no head is found in {name}; load a class with one (smidgen.load(name, task)), "
            f"or {named}"
        )
    labels = getattr(getattr(model, "config", None), "num_labels", 0)
    inner = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    if (
        not head
        and labels
        and re.search(r"For\w*Classification$", name)
        and not renewed(recipe, model)
        and all(part.get_output_embeddings() is None for part in inner)
    ):
        raise PlanError(
            f"{name} is made for labels, but none of its layers is known to be its head, which would stay as it is; "
            f"{named}"
        )


def refuse_resized(model: nn.Module, recipe: Recipe) -> None:
    """Raises PlanError if rows of added tokens, drawn anew in every process, would be neither trained nor saved."""
    saved = set(renewed(recipe, model))
    wrong = [name for name in resized(model) if name not in saved]
    if wrong:
        names = tuple(name.removesuffix(".weight") for name in wrong)
        raise PlanError(
            f"{wrong[0]} has rows of tokens that were added after loading and are in no checkpoint, so a delta would "
            f"not fit in a new process: save the resized model (save_pretrained) and load it from there, or train it "
            f"whole: + Full(target={names if len(names) > 1 else names[0]!r})"
        )


# transformers' classes of attention that give zeros without a kernel -> the variable of their file that holds it
KERNELS = {"MraSelfAttention": "mra_cuda_kernel"}


def refuse_without_kernel(model: nn.Module, entries: Sequence[Entry]) -> None:
    """Raises PlanError if all that a term adds lies in attentions that give zeros here, or acts through them alone."""
    without = {path: kernel for path, m in model.named_modules() if (kernel := _missing_kernel(m))}
    if not without:
        return
    path, kernel = next(iter(without.items()))
    for index in dict.fromkeys(entry.index for entry in entries):
        here = [entry for entry in entries if entry.index == index]
        inside = all(any(within(entry.site.path, other) for other in without) for entry in here)
        if all(entry.added for entry in here) and (inside or all(isinstance(entry.site, InputSite) for entry in here)):
            raise PlanError(
                f"{here[0].method}: {type(model.get_submodule(path)).__name__} gives zeros without its CUDA kernel "
                f"({kernel} is not loaded), so nothing that is added there has an effect; load the model on a CUDA "
                "device with the kernels package, or tune other parts (LN, BitFit)"
            )


def _missing_kernel(module: nn.Module) -> str:
    name = KERNELS.get(type(module).__name__, "")
    return name if name and getattr(sys.modules[type(module).__module__], name, None) is None else ""


def refuse_unfoldable(entries: Sequence[Entry]) -> None:
    """Raises PlanError if a method reads a weight of which an edit before it cannot become a part."""
    for entry in entries:
        if not isinstance(entry.method, ReadsWeight):
            continue
        for other in entries:
            below = other.added and other.site.path == entry.site.path and other.index < entry.index
            if below and (why := other.method.unmergeable(other.site)):
                raise PlanError(
                    f"{entry.method} reads the weight at {entry.site.name}, where {other.method} cannot be folded in "
                    f"({why}); write {entry.method} first"
                )
