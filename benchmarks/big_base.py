"""A base of 8 GB in sharded safetensors: what loading, fingerprint, attaching and a training step hold and take.

python benchmarks/big_base.py [--layers 17] [--folder DIR]

A Llama of random bfloat16 values (4,096 wide, 17 layers: 7.9 GB) is written once, a file for each two layers. A process
of its own then loads it, tells its content, and trains two steps of `LN(layers='top:2')` on 2 x 128 tokens, plain, with
`recompute`, and with `max_memory`. `peak` is the largest resident set of the process; pages of the files that are
mapped count in it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import describe, write
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import smidgen as sm
from smidgen.delta.fingerprint import Fingerprint

GIB = 2**30
RECIPE = "LN(layers='top:2')"
VARIANTS = {"plain": {}, "recompute": {"recompute": True}, "max_memory": {"max_memory": "9GB"}}


def config(layers):
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def make(folder, layers):
    """The base, shard by shard, so that no more than one of them is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config(layers).save_pretrained(folder)
    tokenizer(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config(layers)).named_parameters()}
    groups = {}
    for name, shape in shapes.items():
        layer = int(name.split(".")[2]) // 2 if name.startswith("model.layers.") else "rest"
        groups.setdefault(layer, {})[name] = shape
    where, total = {}, 0
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def resident():
    """Resident set now and at its peak, GiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0]: int(words[1]) * 1024 for words in lines if words and words[0] in ("VmRSS:", "VmHWM:")}
    return tuple(round(found[key] / GIB, 2) for key in ("VmRSS:", "VmHWM:"))


def tokenizer(folder):
    """A word a token, as many as the texts have."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(1000)}}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def texts(folder, count, length):
    """Texts of random words, as a task."""
    draw = random.Random(0)
    rows = [{"text": " ".join(f"w{draw.randrange(1000)}" for _ in range(length - 1))} for _ in range(count)]
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sm.Task.load(str(file), kind="causal-lm", text="text", validation=2)


def child(folder, variant):
    """One process: seconds of each part, and the resident set after it and at its peak, as JSON."""
    found = {}

    def timed(name, call):
        start = time.perf_counter()
        result = call()
        rss, peak = resident()
        found[name] = {"seconds": round(time.perf_counter() - start, 2), "rss_gib": rss, "peak_gib": peak}
        return result

    timed("imports", lambda: torch.zeros(1))
    model, processor = timed("load", lambda: sm.load(folder, dtype="bfloat16"))
    timed("fingerprint", lambda: Fingerprint.of(model, ()))
    timed("attach", lambda: sm.detach(sm.attach(model, RECIPE) and model))
    task = texts(Path(folder), 4 + 2, 128)
    options = {"epochs": 1, "batch_size": 2, "max_length": 128, "progress": False, **VARIANTS[variant]}
    timed("two steps", lambda: sm.fit(model, RECIPE, task, processor=processor, **options))
    size = sum(p.nbytes for p in model.parameters())
    print(json.dumps({"variant": variant, "base_gib": round(size / GIB, 2), "parts": found}))


def read_speed(folder):
    """GB/s at which the files are read once more, from the page cache where they fit."""
    start, total = time.perf_counter(), 0
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while block := stream.read(2**24):
                total += len(block)
    return round(total / 1e9 / (time.perf_counter() - start), 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--folder", help="where the base lies, or is written; by default a temporary folder")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "big_base.json"))
    parser.add_argument("--child", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.folder, options.child)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        if not (folder / "model.safetensors.index.json").is_file():
            make(folder, options.layers)
        runs = []
        for variant in VARIANTS:
            typed = [sys.executable, __file__, "--folder", str(folder), "--child", variant]
            done = subprocess.run(typed, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(runs[-1]), flush=True)
        command = f"python benchmarks/big_base.py --layers {options.layers}"
        write(options.out, {"command": command, **describe(), "read_gb_per_s": read_speed(folder), "runs": runs})


if __name__ == "__main__":
    main()
