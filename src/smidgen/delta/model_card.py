"""The README card that is saved beside a delta."""

from __future__ import annotations

from smidgen.delta.mergeable import folds
from smidgen.delta.saved_form import DeltaForm
from smidgen.recipe.recipe import Recipe

TEMPLATE = """---
library_name: smidgen
base_model: {base}
tags: [smidgen, peft]
---

# {recipe}

{trained:,} trained values and a head of {head:,}, for `{base}` (fingerprint `{content}`, taken in {dtype}).

{metrics}```python
import smidgen as sm

delta = sm.Delta.load("path/to/this/folder")
{load}
with sm.attached(model, delta):
    ...
{merge}
```
"""
LOAD = 'model, tokenizer = sm.load("{base}", delta=delta)'
UNNAMED = "model = ...  # the base, with a head of the same shape; its fingerprint is checked"
MERGE = "merged = sm.merge(model, delta)  # a plain {architecture} model"
KEPT = "# stays attached: not all of it can be folded into weights"


def card_text(recipe: Recipe, trained: int, head: int, meta: DeltaForm) -> str:
    """The card of a delta, in Markdown with the hub's front matter. meta: the content of delta.json."""
    base = meta["base"]
    rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in meta["info"].get("scores", {}).items())
    return TEMPLATE.format(
        base=base["name"] or "unnamed",
        recipe=recipe,
        trained=trained,
        head=head,
        content=base["content"],
        dtype=base["dtype"],
        metrics=f"| metric | value |\n|---|---|\n{rows}\n" if rows else "",
        load=LOAD.format(base=base["name"]) if base["name"] else UNNAMED,
        merge=MERGE.format(architecture=base["architecture"]) if folds(recipe, meta["pooling"]) else KEPT,
    )
