"""What a target names that is no linear map is refused in one line that says what it is, or named in the plan."""

import pytest
import torch
import transformers as T
from torch import nn

from smidgen.common.errors import PlanError
from smidgen.planning import gaps
from smidgen.planning.resolution import resolve
from tests import helpers as h
from tests import odd_models
from tests.test_gaps import Attending, Convolving, both, experts, found


def convolving():
    return T.ViTModel(T.ViTConfig(**h.SIZES, image_size=8, patch_size=4), add_pooling_layer=False)


EMBEDDING, CONVOLUTION, STACKED = "an embedding", "a convolution", "several weights stacked in one parameter"
ATTENTION, OWN = "nn.MultiheadAttention", "a forward of its own"
WRONG = {
    "embedding": (h.bert, "word_embeddings", EMBEDDING),
    "embedding, whole path": (h.causal, "model.embed_tokens", EMBEDDING),
    "convolution": (convolving, "projection", CONVOLUTION),
    "torch's attention": (lambda: both(lambda: Attending(nn.MultiheadAttention(16, 2))), "attn", ATTENTION),
    "its last map": (lambda: both(lambda: Attending(nn.MultiheadAttention(16, 2))), "out_proj", OWN),
    "experts": (lambda: experts("qwen3_moe"), "mlp.experts", STACKED),
    "a parameter of experts": (lambda: experts("qwen3_moe"), "gate_up_proj", STACKED),
    "router": (lambda: odd_models.build("llama4"), "router", OWN),
    "read, never called": (lambda: odd_models.build("mamba"), "dt_proj", OWN),
    "norm": (h.causal, "input_layernorm", "a norm"),
}


METHODS = ("LoRA", "DoRA", "PiSSA", "MoS", "SSF", "IA3")
PAIRS = [(m, n) for m in METHODS for n in WRONG if (m, WRONG[n][2]) not in (("LoRA", EMBEDDING), ("LoRA", CONVOLUTION))]
# those two are in test_tables and test_convolutions


@pytest.mark.parametrize(("method", "name"), PAIRS, ids=str)
def test_it_is_refused_for_what_it_is(method, name):
    make, target, what = WRONG[name]
    with torch.device("meta"):
        model = make()
    with pytest.raises(PlanError) as caught:
        resolve(model, f"{method}(target='{target}')")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{method}: target names {target!r}, which is no linear map but ")
    assert what in text
    assert text.endswith(f"Full(target={target!r}) trains it whole")
    assert resolve(model, f"Full(target='{target}')").trained


def test_a_module_that_holds_some():
    with pytest.raises(
        PlanError, match=r"no linear map but a module that holds some; name k_proj, o_proj, q_proj, v_proj$"
    ):
        resolve(h.causal(), "LoRA(rank=1, target='self_attn')")


def test_exclude_says_no_more_than_what_it_is():
    with pytest.raises(
        PlanError, match=r"exclude names 'embed_tokens', which is no linear map but an embedding \(.*\)$"
    ):
        resolve(h.causal(), "LoRA(rank=1, exclude='embed_tokens')")


class Dense(Convolving):
    """A block with a convolution that is called as BERT's maps are."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Conv1d(16, 16, 1)


def test_one_name_of_a_map_and_of_something_else():
    """The maps are reached, the other is named."""
    assert found(both(Dense), "DoRA(rank=1, target='dense')") == [(("tower.*.dense",), 3, gaps.NAMED)]
