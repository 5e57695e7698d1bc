"""Chat tuning of SmolLM2: packed rows against padded batches, and smidgen against TRL's SFTTrainer with PEFT's LoRA.

python benchmarks/chat.py --data ../shared/data/lm/alpaca_seed_tasks.jsonl --out benchmarks/results/chat.json

All arms learn the same conversations, on the assistant's turns alone, in one process, and take turns: repeats of one
epoch each, every other one backwards. Counted are the conversations' own tokens, not padding, per second of training
steps (forward, backward, optimiser), without loading, encoding and validation; the first step of an epoch, which warms
up, is left out with its tokens. Medians over repeats; ratios are of runs of one repeat, which lie next to each other.
Batches of TRL are padded to the longest row (its default), or packed by best fit with `packing=True`.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from contextlib import contextmanager

import torch
from environment import describe, write

import smidgen as sm
from smidgen.training.run.loop import Loop

TRL = "trl LoRA, padded"
ARMS = {  # recipe of smidgen or None for TRL, and how batches are made
    "smidgen LN(), padded": ("LN()", "shuffle"),
    "smidgen LN(), by length": ("LN()", "length"),
    "smidgen LN(), packed": ("LN()", "pack"),
    "smidgen LoRA(rank=8), padded": ("LoRA(rank=8)", "shuffle"),
    "smidgen LoRA(rank=8), packed": ("LoRA(rank=8)", "pack"),
    TRL: (None, "shuffle"),
}
RATIOS = {
    "LN(): packed / padded": ("smidgen LN(), packed", "smidgen LN(), padded"),
    "LoRA: packed / padded": ("smidgen LoRA(rank=8), packed", "smidgen LoRA(rank=8), padded"),
    "LN() padded / TRL LoRA padded": ("smidgen LN(), padded", TRL),
    "LoRA padded / TRL LoRA padded": ("smidgen LoRA(rank=8), padded", TRL),
    "LN() packed / TRL LoRA padded": ("smidgen LN(), packed", TRL),
}


class Steps:
    """Seconds and own tokens of each training step."""

    def __init__(self):
        self.seconds, self.tokens, self.computed = [], [], []

    def add(self, seconds, labels, own):
        self.seconds.append(seconds)
        self.tokens.append(own)
        self.computed.append(labels.numel())

    @property
    def speed(self):
        return sum(self.tokens[1:]) / sum(self.seconds[1:])

    @property
    def padding(self):
        return 1 - sum(self.tokens) / sum(self.computed)


@contextmanager
def timed_steps(lengths):
    """Steps of `fit` within a block. lengths: own tokens of each example, by its number."""
    steps, step = Steps(), Loop._step

    def timed(loop, places, batch):
        begin = time.perf_counter()
        step(loop, places, batch)
        flat = [p for place in places for p in (place if isinstance(place, list) else [place])]
        steps.add(time.perf_counter() - begin, batch["labels"], sum(lengths[place] for place in flat))

    Loop._step = timed
    try:
        yield steps
    finally:
        Loop._step = step


def with_fit(model, tokenizer, task, recipe, batching, options):
    """Steps of an epoch of `fit`; packed rows hold as many tokens as a padded batch has places on average."""
    lengths = task.encode(tokenizer, "train", max_length=options.max_length).lengths
    size = options.batch_size
    if batching == "pack":
        size = max(1, round(options.batch_size * statistics.mean(lengths) / options.max_length))
    settings = {"epochs": 1, "batch_size": size, "max_length": options.max_length, "batching": batching}
    with timed_steps(lengths) as steps:
        sm.fit(model, recipe, task, tokenizer=tokenizer, cache=False, progress=False, seed=0, **settings)
    return steps


def with_trl(model, tokenizer, task, options):
    """Steps of an epoch of SFTTrainer on a model that has PEFT's LoRA; a template with marks, as it needs one."""
    import trl
    from transformers import TrainerCallback

    steps = Steps()

    class Timed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            labels, own = seen.pop(0)  # the loader is a batch ahead of what is trained on
            steps.add(time.perf_counter() - self.begin, labels, own)

    seen = []
    config = {"max_length": options.max_length, "per_device_train_batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            folder, num_train_epochs=1, assistant_only_loss=True, use_cpu=not torch.cuda.is_available(), bf16=False,
            report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", learning_rate=1e-3,
            gradient_checkpointing=False, seed=0, **config,
        )  # fmt: skip
        made = trl.SFTTrainer(
            model, args=args, train_dataset=task.splits["train"], processing_class=tokenizer, callbacks=[Timed()]
        )
        collate = made.data_collator

        def counted(rows):
            batch = collate(rows)
            own = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["labels"].numel()
            seen.append((batch["labels"], own))
            return batch

        made.data_collator = counted
        made.train()
    return steps


def peft_model(model):
    """PEFT's LoRA of the same rank at the same places: query and value."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def marked(tokenizer):
    """SmolLM2's template with what the assistant says marked, for TRL."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    body = "{{ message['content'] + '<|im_end|>\n' }}"
    marks = "{% if message['role'] == 'assistant' %}{% generation %}BODY{% endgeneration %}{% else %}BODY{% endif %}"
    found = copy.deepcopy(tokenizer)
    found.chat_template = tokenizer.chat_template.replace(
        turn, "{{'<|im_start|>' + message['role'] + '\n'}}" + marks.replace("BODY", body)
    )
    assert found.chat_template != tokenizer.chat_template
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=48, help="conversations of an epoch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=None, help="keep so many of the model's first blocks")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--arms", default="", help="only arms whose name contains one of these, by commas")
    parser.add_argument("--out", default="benchmarks/results/chat.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    task = sm.Task.load(options.data, kind="chat", limit={"train": options.limit, "validation": 2})
    model, tokenizer = sm.load("smollm2", task=task, dtype=options.dtype)
    if options.blocks:
        model.model.layers = model.model.layers[: options.blocks]
        model.config.num_hidden_layers = options.blocks
    arms = [name for name in ARMS if any(part in name for part in options.arms.split(","))]
    other = peft_model(copy.deepcopy(model)) if TRL in arms else None
    own = sm.plan(model, "LoRA(rank=8)").trained
    runs = {arm: [] for arm in arms}
    about = describe()
    for repeat in range(options.repeats):
        for arm in arms[:: -1 if repeat % 2 else 1]:
            recipe, batching = ARMS[arm]
            if recipe is None:
                steps = with_trl(other, marked(tokenizer), task, options)
            else:
                steps = with_fit(model, tokenizer, task, recipe, batching, options)
            runs[arm].append({"tokens_per_second": steps.speed, "padding": steps.padding, "steps": len(steps.seconds)})
            print(f"  {repeat + 1} {arm}: {steps.speed:.0f} tokens/s, padding {steps.padding:.2f}", flush=True)
    ratios = {}
    for name, (one, two) in RATIOS.items():
        if one in arms and two in arms:
            each = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs[one], runs[two], strict=True)]
            ratios[name] = {"median": statistics.median(each), "range": [min(each), max(each)]}
            print(f"{name}: {ratios[name]['median']:.2f} ({min(each):.2f} to {max(each):.2f})")
    theirs = sum(p.numel() for p in other.parameters() if p.requires_grad) if other else None
    values = {"smidgen LoRA(rank=8)": own, TRL: theirs}
    write(options.out, {"options": {k: v for k, v in vars(options).items() if k != "out"}, **about,
                        "trained values": values, "ratios": ratios, "runs": runs})  # fmt: skip


if __name__ == "__main__":
    main()
