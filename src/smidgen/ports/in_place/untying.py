"""Tied weights that a merge takes apart: what is folded into one module must not change another."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from smidgen.sites.site import module_at


class UntiedWarning(UserWarning):
    """Merging gave a weight that shared its tensor with another (tied embeddings) values of its own."""


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Make each of these parameters one of its module's own, where modules beside it share it.

    The configuration says so afterwards (`tie_word_embeddings`), unless other weights stay tied by it. transformers
    from 5 on loads both values in either case, as they differ.

    Warns:
        UntiedWarning: what was tied to what, and what the configuration says.
    """
    for name in names:
        path, _, term = name.rpartition(".")
        module, parameter = module_at(model, path), model.get_parameter(name)
        others = [
            f"{other}.{key}"
            for other, part in model.named_modules(remove_duplicate=False)
            for key, p in part._parameters.items()
            if p is parameter and part is not module
        ]
        if others:
            module._parameters[term] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            warnings.warn(
                f"merging unties {name} from {', '.join(others)}: the merged model has {parameter.numel():,} values "
                f"more; {_unset(model)}",
                UntiedWarning,
                stacklevel=3,
            )


def _unset(model: nn.Module) -> str:
    """Say in the configuration that nothing is tied, where nothing else is; what was done, in words."""
    if not isinstance(model, PreTrainedModel):
        return "tie no weights of it again"
    still = [
        (a, b)
        for a, b in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if model.get_parameter_or_buffer(a) is model.get_parameter_or_buffer(b)
    ]
    if still:
        return "its config.tie_word_embeddings stays, for other weights: transformers below 5 would tie it again"
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return "its config.tie_word_embeddings is False"
