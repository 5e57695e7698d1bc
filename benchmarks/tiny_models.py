"""A tiny random model of any type that transformers has, with an input that it accepts; nothing is downloaded.

Every tensor is shaken: the zeros and ones of fresh models hide half the mathematics.
"""

import copy
import re
from dataclasses import dataclass

import torch
import transformers as T
from tiny_configs import SIZES, configure, parts
from tiny_inputs import NotBuiltError, accepted, line, tensors
from transformers.models.auto import configuration_auto, modeling_auto

TASKS = {
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "video": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Pair:
    """A model type and one of its classes."""

    type: str
    cls: str
    task: str

    def __str__(self):
        return f"{self.type}/{self.cls}"


def pairs():
    """Every type with its LM class (or its plain one where it has no other) and its classes for a task."""
    owners = {}
    for task, mapping in TASKS.items():
        for kind, names in getattr(modeling_auto, mapping).items():
            owners.setdefault(names if isinstance(names, str) else names[0], {})[kind] = task
    chosen = {}
    for name, kinds in owners.items():
        near = [k for k in kinds if name.lower().startswith(re.sub(r"[^a-z0-9]", "", k))]
        kind = max(near, key=len, default=next(iter(kinds)))
        chosen.setdefault(kind, {})[kinds[kind]] = name
    found, known = [], set(dir(T))  # a look at T.name itself would import every model
    for kind in configuration_auto.CONFIG_MAPPING_NAMES:
        mine = chosen.get(kind, {})
        # a decoder alone never runs its cross-attention
        left_out = {"causal-lm"} if mine.keys() & {"masked-lm", "seq2seq", "speech"} else set()
        left_out |= {"base"} if mine.keys() - {"base"} else set()
        found += [Pair(kind, name, task) for task, name in mine.items() if task not in left_out and name in known]
    return found


LIMIT = 4_000_000  # values; a model that is larger was not shrunk


def build(pair, sizes):
    """A tiny shaken model in eval mode."""
    cls = getattr(T, pair.cls)
    config = configure(pair.type, pair.task, sizes)
    if not isinstance(config, cls.config_class):
        config = next((part for part in parts(config) if isinstance(part, cls.config_class)), config)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > LIMIT:
        raise NotBuiltError(f"not shrunk: {count:,} values")
    torch.manual_seed(0)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tiny(pair):
    """Model, inputs and outputs of a pair. Raises NotBuiltError with the reason."""
    first = None
    for sizes in SIZES:
        try:
            model = build(pair, sizes)
            inputs, output = accepted(model, pair.task)
            if not tensors(output):
                raise NotBuiltError("its output holds no tensor")
            if not all(torch.isfinite(t).all() for t in tensors(output)):
                raise NotBuiltError("its output is not finite")
            return model, inputs, output
        except Exception as error:
            first = first or error
    raise first if isinstance(first, NotBuiltError) else NotBuiltError(line(first))
