"""The README card that is saved beside a delta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEMPLATE = """---
library_name: smidgen
base_model: {base}
tags: [smidgen, peft, layernorm]
---

# {recipe}

{trained:,} trained values and a head of {head:,}, for `{base}` (fingerprint `{content}`, taken in {dtype}).

{metrics}
```python
import smidgen as sm

delta = sm.Delta.load("path/to/this/folder")
model, tokenizer = sm.load("{base}", delta=delta)
with sm.attached(model, delta):
    ...
merged = sm.merge(model, delta)  # a plain {architecture} model
```
"""


def text(recipe: str, trained: int, head: int, meta: Mapping[str, Any]) -> str:
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
        architecture=base["architecture"],
        metrics=f"| metric | value |\n|---|---|\n{rows}\n" if rows else "",
    )
