"""Tiny models, a tiny tokenizer and tiny tasks, built on the spot; nothing is downloaded."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from smidgen.data.task import Task
from smidgen.testing.cases import shake

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "fine", "great", "bad", "poor", "awful", "film", "plot",
    "was", "the", "and", "a", "very", "so", "it", "is",
]  # fmt: skip
KINDS = {"pos": ("good", "fine", "great"), "neg": ("bad", "poor", "awful")}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
BASE = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 40}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "vocab_size": len(WORDS), **TOKENS}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": len(WORDS)}
CONFIGS = {
    "bert": lambda **o: T.BertConfig(**BASE, **o),
    "roberta": lambda **o: T.RobertaConfig(**BASE, **TOKENS, **o),
    "deberta-v2": lambda **o: T.DebertaV2Config(**BASE, pooler_hidden_size=16, **o),
    "distilbert": lambda **o: T.DistilBertConfig(**DISTIL, max_position_embeddings=40, **o),
    "albert": lambda **o: T.AlbertConfig(**BASE, embedding_size=8, **o),
    "llama": lambda **o: T.LlamaConfig(**BASE, **TOKENS, num_key_value_heads=1, **o),
    "gpt2": lambda **o: T.GPT2Config(**GPT, **o),
}


def build(kind, cls="AutoModelForSequenceClassification", seed=0, shaken=0.3, **options):
    """A tiny model in eval mode, with shaken values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(T, cls).from_config(CONFIGS[kind](**options)).eval()
    shake(model.parameters(), shaken)
    return model


def bert(dropout=0.0, seed=0, shaken=0.3, **options):
    """A tiny BERT for classification."""
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return build("bert", seed=seed, shaken=shaken, **drop, **options)


def causal(kind="llama", seed=0, **options):
    """A tiny causal LM."""
    return build(kind, "AutoModelForCausalLM", seed=seed, **options)


def ids(rows=3, length=7, mask=True):
    """Token ids, the last two of row 1 padded."""
    tokens = torch.randint(4, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(2))
    kept = torch.ones_like(tokens)
    if mask:
        kept[1, 5:], tokens[1, 5:] = 0, 0
    return {"input_ids": tokens, "attention_mask": kept}


def logits(model, **inputs):
    """In eval mode, without gradient; mode restored."""
    training = {module: module.training for module in model.modules()}
    with torch.no_grad():
        found = model.eval()(**(inputs or ids())).logits
    for module, mode in training.items():
        module.training = mode
    return found


def tokenizer():
    """One token a word, [CLS] and [SEP] around."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"]
    return T.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="[SEP]", model_max_length=32, model_input_names=inputs, **names
    )


def rows(count, start=0):
    """Texts whose label is told by one word."""
    made = []
    for i in range(start, start + count):
        label = ("pos", "neg")[i % 2]
        words = ["the", "film", "was", KINDS[label][i % 3], WORDS[10 + i % 10], WORDS[10 + i // 10 % 10]]
        made.append({"text": " ".join(words[: 4 + i % 3]), "label": label})
    return made


def jsonl(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def task(folder, train=32, held=12, make=rows, **options):
    """A task in a folder of jsonl files."""
    jsonl(folder / "train.jsonl", make(train))
    jsonl(folder / "validation.jsonl", make(held, 100))
    jsonl(folder / "test.jsonl", make(held, 200))
    return Task.load(folder, **options)


@contextmanager
def untouched(model):
    """Assert that a model is the same, object for object and bit for bit, after the block."""

    def state():
        named = model.named_parameters(remove_duplicate=False)
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
        modes = {n: m.training for n, m in model.named_modules()}
        flags = {n: (id(p), p.requires_grad, p.grad is None) for n, p in named}
        return list(model.state_dict()), hooks, attributes, modes, flags

    before, values = state(), {n: t.clone() for n, t in model.state_dict().items()}
    yield
    for old, new in zip(before, state(), strict=True):
        assert old == new, difference(old, new)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def difference(old, new):
    """The first few entries that differ."""
    if not isinstance(old, dict):
        return f"{old} became {new}"
    return {n: (old.get(n), new.get(n)) for n in [*old, *new] if old.get(n) != new.get(n)}


def same(a, b):
    """Two deltas, or two dicts of tensors, bit for bit."""
    a, b = (dict(getattr(x, "tensors", x)) for x in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), f"{name} differs by {(tensor - b[name]).abs().max():.3g}"


def twin(model):
    return copy.deepcopy(model)


def script(path, text, *args, **env):
    """Start a Python script in a process group of its own, able to import this file."""
    path.write_text(text)
    root = Path(__file__).parent
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    found |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=found, cwd=path.parent,
    )  # fmt: skip


def peft_adapter(base, config, folder):
    """Save an adapter of HF PEFT's with random values; gives PEFT's model, made of a copy."""
    import peft

    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.4 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    return tuned
