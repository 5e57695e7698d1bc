"""Head(), LN(), BitFit(), LoRA() and Full() on one task: mean and spread over seeds, as JSON and a table.

python benchmarks/arms.py --data ../shared/data/glue/sst2 --limit 4000 --epochs 2 --split validation
python benchmarks/arms.py --data bbc-news --limit 1500 --epochs 3 --split test --max-length 128
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from environment import describe, write

import smidgen as sm

ARMS = [
    ("Head()", None),
    ("Head()", "mean"),
    ("LN()", None),
    ("LN()", "mean"),
    ("BitFit()", None),
    ("LoRA()", None),
    ("Full()", None),
]


def one(arm, pooling, task, options, seed):
    model, tokenizer = sm.load(options.model, task=task, seed=seed)
    begin = time.perf_counter()
    delta = sm.fit(
        model,
        arm,
        task,
        seed=seed,
        pooling=pooling,
        epochs=options.epochs,
        max_length=options.max_length,
        tokenizer=tokenizer,
        progress=False,
        **({"head_lr": options.head_lr} if options.head_lr else {}),
    )
    seconds = time.perf_counter() - begin
    scores = sm.evaluate(model, task, delta=delta, split=options.split, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        size = (delta.save(folder) / "delta.safetensors").stat().st_size
    return {"seed": seed, "score": scores.value, "seconds": seconds, "bytes": size, "values": delta.trained}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", default="bbc-news")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=None)
    parser.add_argument("--head-lr", type=float, default=None)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=None, help="only arms whose spelling contains this")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    task, about = sm.Task.load(options.data, limit=options.limit), describe()
    results = []
    for arm, pooling in ARMS:
        if options.arms and options.arms not in arm:
            continue
        runs = [one(arm, pooling, task, options, seed) for seed in range(options.seeds)]
        values = [run["score"] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        results.append({"arm": arm, "pooling": pooling or "first (own)", "mean": statistics.mean(values), "sd": spread})
        results[-1] |= {"seconds": statistics.median(run["seconds"] for run in runs), "runs": runs}
        print(
            f"{arm:10} {pooling or 'own':5} {task.metric} {statistics.mean(values):.4f} +- {spread:.4f}  "
            f"{runs[0]['values']:>10,} values {runs[0]['bytes']:>12,} bytes {results[-1]['seconds']:6.1f} s",
            flush=True,
        )
    if options.out:
        write(Path(options.out), {"options": vars(options), "metric": task.metric, "arms": results, **about})


if __name__ == "__main__":
    main()
