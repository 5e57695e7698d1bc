"""A recipe on a tiny model, to be checked: in float64, with shaken biases and gains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from smidgen.common.errors import PlanError
from smidgen.delta.attaching import attach
from smidgen.planning.resolution import resolve
from smidgen.ports.attachment_record import trained_parameters
from smidgen.recipe.recipe import Recipe, Term, as_recipe
from smidgen.steps.optimizer_groups import optimizer

Check = Callable[["Case"], None]
CHECKS: dict[str, Check] = {}
SLOW = {("compiled_sees_attach_and_detach", "t5")}  # tracing an encoder-decoder takes half a minute


def check(function: Check) -> Check:
    """Register a check under its function's name."""
    CHECKS[function.__name__] = function
    return function


@dataclass
class Case:
    """A recipe, a fresh model and inputs for it."""

    recipe: Recipe
    model: nn.Module
    inputs: dict[str, Tensor]
    seed: int = 0
    base: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.base = self.run()

    def run(self, model: nn.Module | None = None) -> Tensor:
        """Logits without gradient, in eval mode."""
        model = self.model if model is None else model
        with torch.no_grad():
            logits: Tensor = model.eval()(**self.inputs).logits
            return logits

    def attach(self, perturb: float = 0.0) -> nn.Module:
        """Attach; with `perturb`, add noise to every trained tensor."""
        attach(self.model, self.recipe, seed=self.seed)
        if perturb:
            shake(trained_parameters(self.model).values(), perturb)
        return self.model

    def loss(self, logits: Tensor | None = None) -> Tensor:
        """A scalar that depends on every logit, the model's own or those given, with fixed random weights."""
        logits = (self.model(**self.inputs).logits if logits is None else logits).double()
        assert logits.requires_grad, "the output depends on nothing that is trained: no function of the method uses it"
        return (logits * torch.randn(logits.shape, dtype=torch.float64, generator=_generator(3))).sum()

    def step(self, steps: int, lr: float) -> None:
        """AdamW steps on `loss`."""
        self.model.train()
        adam = optimizer(self.model, lr=lr, head_lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            self.loss().backward()
            adam.step()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shake(parameters: Iterable[Tensor], scale: float = 0.1, seed: int = 1) -> None:
    """Add Gaussian noise in place."""
    generator = _generator(seed)
    with torch.no_grad():
        for p in parameters:
            p += scale * torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)


def _bert() -> nn.Module:
    """A tiny BERT with random values."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=61,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 3
    return BertForSequenceClassification(config)


def _llama() -> nn.Module:
    """A tiny Llama with random values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=61,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    """A tiny GPT-2 with random values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        vocab_size=61,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    """A tiny T5 with random values."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=61,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": _bert, "llama": _llama, "gpt2": _gpt2, "t5": _t5}


@cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().double()
    shake(model.parameters())
    return model


def tiny(name: str) -> nn.Module:
    """A fresh copy of a tiny shaken float64 model: "bert", "llama", "gpt2" or "t5"."""
    return copy.deepcopy(_built(name))


def inputs_for(name: str) -> dict[str, Tensor]:
    """Token ids (3, 7) with padding in one row; decoder ids too where the model has a decoder of its own."""
    ids = torch.randint(3, 61, (3, 7), generator=_generator(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": ids[:, :5]} if name == "t5" else inputs


def case(recipe: str | Term | Recipe, model: str = "bert") -> Case:
    """A fresh case on one of the tiny models."""
    return Case(as_recipe(recipe), tiny(model), inputs_for(model))


def applies(recipe: str | Term | Recipe, model: str) -> bool:
    """Whether the recipe has anything to do on the model (BitFit has not on one without biases)."""
    try:
        resolve(_built(model), recipe)
    except PlanError:
        return False
    return True
