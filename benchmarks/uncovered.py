"""What a recipe's words would cover on a model and its plan does not, found without the library's own sites.

By class names and names of parameters alone, so that both can be wrong in different ways: norms, biases, and the
attention modules and feed-forward modules of every block. A module of convolutions alone is no attention, one with a
single map no feed-forward network, and the attention to another sequence is a part of its own for adapters.
"""

import re

from torch import nn

NORM = re.compile(r"norm", re.IGNORECASE)
ATTENTION = re.compile(r"(attention|attn)", re.IGNORECASE)
FEED = re.compile(r"(mlp|feedforward|ffn|experts|feed_forward)$", re.IGNORECASE)
NOT_A_BLOCK = re.compile(
    r"(output|norm|embedding|mask|pool|lora|rotary|router|bias|gate|act|pruner|selfoutput)", re.IGNORECASE
)
CROSS = re.compile(r"cross|enc_?dec|x_attn", re.IGNORECASE)
BIAS = re.compile(r"(^|[._])bias$")


def uncovered(model, plan):
    """One line that names what is left out, or an empty text."""
    return "; ".join(_short(what, names, total) for what, names, total in left_by(model, plan))


def unnamed(model, plan):
    """Those of the modules that are left out of which the plan says nothing: neither of them nor of one around or in
    them. Paths without numbers."""
    said = [*plan.unread, *(place for gap in plan.left_out for place in gap.places)]
    said = [_plain(place).removesuffix(".*") for place in said]
    missing = dict.fromkeys(_plain(name) for _, names, _ in left_by(model, plan) for name in names)
    return [path for path in missing if not any(_near(path, place) for place in said)]


def _near(path, place):
    return f"{path}.".startswith(f"{place}.") or f"{place}.".startswith(f"{path}.")


def left_by(model, plan):
    """(what, names of modules or tensors that are left out, how many there are) of each method and kind of part."""
    found = []
    for index, method in enumerate(plan.recipe):
        name = type(method).__name__
        entries = [entry for entry in plan.entries if entry.index == index]
        whole = model if method.stack is None else Inside(model, method.stack)
        found += WORDS.get(name, _nothing)(whole, entries, {name for name, _ in plan.head})
    return found


class Inside:
    """The modules and parameters of a model that lie in the stacks which a method is kept to."""

    def __init__(self, model, stack):
        self.model, self.stacks = model, (stack,) if isinstance(stack, str) else stack

    def holds(self, path):
        return any(f".{path}.".find(f".{stack}.") >= 0 for stack in self.stacks)

    def named_modules(self):
        return ((path, module) for path, module in self.model.named_modules() if self.holds(path))

    def named_parameters(self):
        return ((name, p) for name, p in self.model.named_parameters() if self.holds(name.rpartition(".")[0]))

    def get_parameter(self, name):
        return self.model.get_parameter(name)


def _nothing(model, entries, head):
    return []


def _plain(name):
    return re.sub(r"(^|[._])[0-9]+(?=[.]|$)", r"\1*", name)


def _short(what, names, total):
    shown = dict.fromkeys(map(_plain, names))
    return f"{len(names)} of {total} {what}: {', '.join(list(shown)[:3])}"


def _left_of(model, wanted, entries, head, what):
    """Parameters of a kind that no entry trains and that are not the head's."""
    trained = {id(model.get_parameter(name)) for entry in entries if not entry.added for name, _ in entry.names()}
    left = [name for name, p in wanted if id(p) not in trained and name not in head and name.split(".")[0] != "lm_head"]
    return [(what, left, len(wanted))] if left else []


def _norms(model, entries, head):
    inside = [
        (f"{path}.{term}".lstrip("."), parameter)
        for path, module in model.named_modules()
        if NORM.search(type(module).__name__) and not isinstance(module, nn.Embedding)
        for term, parameter in module.named_parameters(recurse=False)
    ]
    return _left_of(model, inside, entries, head, "norm tensors")


def _biases(model, entries, head):
    named = [(name, p) for name, p in model.named_parameters() if BIAS.search(name)]
    wanted = [(name, p) for name, p in named if p.ndim == 1 or "expert" in name]
    return _left_of(model, wanted, entries, head, "biases")


def _holds(module, pattern):
    """Whether a module has the weights that its class's name promises."""
    if pattern is FEED:
        weights = [p for p in module.parameters() if p.ndim > 1]
        return len(weights) > 1 or any(p.ndim == 3 for p in weights)  # of experts, stacked
    return any(p.ndim in (2, 3) for p in module.parameters())


def _modules(model, pattern):
    """Paths of modules of such a class that hold weights and no further module of such a class."""
    found = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if pattern.search(name) and not NOT_A_BLOCK.search(name) and _holds(module, pattern):
            found[path] = module
    return [p for p in found if p and not any(q != p and q.startswith(p + ".") for q in found)]


def _touched(entries):
    return {entry.site.path for entry in entries}


def _left(model, entries, head, pattern, what, around=0, leave=None):
    """Modules of a kind in which no edit stands; `around` counts the levels above that count as the module's own.
    Those of the head are trained whole, paths with `leave` in them are not asked for."""
    paths, edited, left = _modules(model, pattern), _touched(entries), []
    paths = [path for path in paths if leave is None or not leave.search(path)]
    kept = [name for name, _ in model.named_parameters() if name not in head]
    paths = [path for path in paths if any(name.startswith(path + ".") for name in kept)]
    for path in paths:
        top = path.rsplit(".", around)[0] if around and path.count(".") >= around else path
        if not any(e == top or e.startswith(top + ".") or (path.startswith(e + ".") and e) for e in edited):
            left.append(path)
    return [(what, left, len(paths))] if left else []


def _attentions(model, entries, head):
    return _left(model, entries, head, ATTENTION, "attention modules")


def _both(model, entries, head):
    """Of an adapter at its usual sites, which are not the attention to another sequence."""
    attentions = _left(model, entries, head, ATTENTION, "attention modules", 1, CROSS)
    return attentions + _left(model, entries, head, FEED, "feed-forward modules", 1)


def _feeds_too(model, entries, head):
    return _attentions(model, entries, head) + _left(model, entries, head, FEED, "feed-forward modules")


WORDS = {
    "LN": _norms,
    "BitFit": _biases,
    "LoRA": _attentions,
    "DoRA": _attentions,
    "Prefix": _attentions,
    "IA3": _feeds_too,
    "SSF": _feeds_too,
    "Adapter": _both,
    "Compacter": _both,
}
