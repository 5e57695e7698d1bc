"""A tiny Llama as a GGUF file in llama.cpp's layout; as a script, in the place of llama.cpp's converter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "!", "ab"]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()


def place(name):
    """Name in the file."""
    path = name.removesuffix(".weight")
    if path in OUTSIDE:
        return f"{OUTSIDE[path]}.weight"
    _, _, layer, part = path.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def turned(name, values, config):
    """Queries and keys by pairs of a rotation, one row at a time."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    half = len(values) // heads // 2
    rows = [2 * half * h + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return values[rows]


def write(model, path, matrices="F32"):
    """`matrices`: type of all of those whose rows suit it."""
    c, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word.startswith("<") else 1 for word in WORDS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, parameter in model.named_parameters():
        values = turned(name, parameter.detach().float().numpy(), c)
        fits = values.ndim > 1 and (matrices != "Q8_0" or values.shape[-1] % 32 == 0)
        kind = gguf.GGMLQuantizationType[matrices if fits else "F32"]
        packed = values if kind.name == "F32" else gguf.quants.quantize(values, kind)
        writer.add_tensor(place(name), np.ascontiguousarray(packed), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--outfile")
    parser.add_argument("--outtype")
    given = parser.parse_args()
    if given.outtype == "bf16":
        sys.exit("INFO: looking\nValueError: no bf16 today")
    write(LlamaForCausalLM.from_pretrained(given.folder), given.outfile, given.outtype.upper())
