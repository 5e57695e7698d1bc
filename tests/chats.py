"""A tokenizer that knows chats, a tiny model for it, and conversations; nothing is downloaded."""

from __future__ import annotations

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from smidgen.testing.cases import shake
from tests import helpers as h

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
TURN = "'<|im_start|>' + message['role'] + '\n'"
# SmolLM2's own template with another default, and the same with the marks that trl needs
PLAIN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp"
    "<|im_end|>\n' }}{% endif %}{{ " + TURN + " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ " + TURN + " + message['content'] + '<|im_end|>\n' }}",
    "{{ " + TURN + " }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}",
)


def tokenizer(template=PLAIN):
    """Bytes, ChatML's marks as special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    core.train_from_iterator(["the film was good and the plot was bad"] * 20, trainer)
    names = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    made = T.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=256, **names)
    made.chat_template = template
    return made


def model(seed=0, shaken=0.3, **options):
    """A tiny Llama with positions for long conversations."""
    sizes = {**h.SIZES, "vocab_size": 300, "max_position_embeddings": 512, "num_key_value_heads": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = T.LlamaForCausalLM(T.LlamaConfig(**sizes, **ids, **options)).eval()
    shake(made.parameters(), shaken)
    return made


def turns(*said, system=None):
    """Turns of the user and the assistant in turn."""
    found = [] if system is None else [{"role": "system", "content": system}]
    return found + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def rows(count, start=0):
    """Conversations of one, two or three exchanges, some with a system message."""
    made = []
    for i in range(start, start + count):
        said = [f"what is {i}?", f"{i} is {('bad', 'good')[i % 2]}", "why", "the plot\nwas so", "ok ", "fine."]
        made.append({"messages": turns(*said[: 2 + 2 * (i % 3)], system="Be brief." if i % 4 == 0 else None)})
    return made
