"""Ports: one for each type of site, one that is a user's own, capabilities that are whole."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, PlanError, SmidgenError
from smidgen.methods.base import Method
from smidgen.methods.capabilities import CAPABILITIES, EditsOutput, functions_of
from smidgen.methods.token_map import TokenMap
from smidgen.planning.site_rules import RULES, rules_of
from smidgen.ports.attachment_record import trained_parameters
from smidgen.ports.base import PORTS, Port, forget_port, port_of
from smidgen.ports.builtin_ports import BUILTIN
from smidgen.ports.edit import Edits, drop_edits, edits_at
from smidgen.recipe.recipe import Term
from smidgen.sites.site import InputSite, LinearSite, NormSite, OwnerSite, Site
from smidgen.testing.cases import shake
from tests import helpers as h


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(Term, "registry", dict(Term.registry))


def types_of(cls=Site):
    for part in cls.__subclasses__():
        if part.__module__.startswith("smidgen."):
            yield part
            yield from types_of(part)


def test_every_type_of_site_has_a_port_and_rules():
    for cls in types_of():
        site = cls("")
        assert isinstance(port_of(site), type(rules_of(site))), cls


def test_ports_are_registered_once():
    for port in BUILTIN:
        with pytest.raises(SmidgenError, match=r"have a port already, \w+Port; give .* a type of its own"):
            sm.register_port(port)
    assert set(PORTS) == set(RULES)


# A port of one's own: logits


@dataclass(frozen=True)
class LogitSite(Site):
    """What a model gives."""

    count: int = 0
    kind: ClassVar[str] = "logits"


@runtime_checkable
class EditsLogits(Protocol):
    def logits(self, p, y): ...


class LogitPort(Port):
    """One hook at the model's own head."""

    sites = (LogitSite,)
    capabilities = (EditsLogits,)

    def find(self, model, found):
        outputs = [site for site in found if isinstance(site, LinearSite) and site.path == "classifier"]
        return [LogitSite(site.path, count=site.width_out) for site in outputs]

    def check(self, model, row):
        if edits_at(model.get_submodule(row.site.path)):
            raise AttachError("something stands there already")

    def place(self, model, site, key, edit):
        module = model.get_submodule(site.path)
        if not edits_at(module):
            module.add_module("edits", Edits())
            module._edit_handles = [module.register_forward_hook(edit_logits)]
        module.edits[key] = edit
        return []

    def remove(self, model, site):
        drop_edits(model.get_submodule(site.path))


def edit_logits(module, args, output):
    for edit in module.edits.values():
        output = edit.method.logits(edit.tensors(), output) if edit.enabled else output
    return output


def temperature():
    @dataclass(frozen=True)
    class Temperature(Method[LogitSite]):
        """Divide the logits by a learned temperature (Guo et al. 2017, arXiv:1706.04599, section 4.2)."""

        def acts(self, site):
            return isinstance(site, LogitSite)

        def init(self, site):
            return {"s": torch.zeros(())}

        def logits(self, p, y):
            return y * torch.exp(-p["s"])

    return Temperature()


@pytest.fixture
def port():
    found = LogitPort()
    sm.register_port(found)
    yield found
    forget_port(found)
    assert LogitSite not in PORTS
    assert LogitSite not in RULES


def test_a_port_of_ones_own(port, tmp_path):
    model, method = h.bert(), temperature()
    plain = h.logits(model)
    with h.untouched(model):
        sm.attach(model, sm.parse("LN()") + method)
        assert torch.equal(h.logits(model), plain)
        shake([p for n, p in trained_parameters(model).items() if n.endswith(".s")], 0.5)
        (s,) = (p.detach().clone() for n, p in trained_parameters(model).items() if n.endswith(".s"))
        assert torch.allclose(h.logits(model), plain * torch.exp(-s))
        with sm.disabled(model):
            assert torch.equal(h.logits(model), plain)
        sm.Delta.of(model).save(tmp_path)
        sm.detach(model)
    with sm.attached(model, sm.Delta.load(tmp_path)):
        assert torch.allclose(h.logits(model), plain * torch.exp(-s))


def test_it_can_be_registered_once(port):
    with pytest.raises(SmidgenError, match="LogitSite have a port already, LogitPort"):
        sm.register_port(LogitPort())


def test_without_its_port_nothing_is_found():
    with pytest.raises(PlanError, match="matches no site"):
        sm.plan(h.bert(), temperature())


# Capabilities


def test_a_method_that_acts_where_nothing_would_is_refused():
    @dataclass(frozen=True)
    class Lost(Method[InputSite]):
        """It says that it acts at the input, and adds no tokens."""

        def acts(self, site):
            return isinstance(site, InputSite)

        def init(self, site):
            return {"t": torch.zeros(2)}

        def after(self, p, x, y, site):
            return y

    with pytest.raises(PlanError, match=r"acts at .*\(input\), where tokens\(\) would act, and defines none"):
        sm.plan(h.bert(), Lost())


def test_half_a_capability_is_an_error_where_it_is_defined():
    with pytest.raises(TypeError, match=r"Half defines due\(\) and lacks event\(\), grown\(\); see Grows"):
        type("Half", (Method,), {"__doc__": "Grow.", "__module__": __name__, "due": lambda self, step, total: True})


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: c.__name__)
def test_some_method_has_each_capability_or_a_probe_does(capability):
    shipped = [cls for cls in Term.registry.values() if issubclass(cls, Method)]
    probed = {"EditsStates", "ShortensText", "RunsBeside"}
    assert functions_of(capability)
    assert (
        any(all(hasattr(cls, f) for f in functions_of(capability)) for cls in shipped) or capability.__name__ in probed
    )


def test_what_a_method_does_not_define_it_does_not_have():
    assert not isinstance(sm.LN(), EditsOutput)
    assert isinstance(sm.LoRA(), EditsOutput)
    assert isinstance(rules_of(NormSite("x")), type(rules_of(OwnerSite("x"))))


# Edits of hidden states


def shift(width=0):
    @dataclass(frozen=True)
    class Shift(Method):
        """Add a vector to the hidden states of tokens that are no padding."""

        def acts(self, site):
            return site.kind == "block" and site.layer == 0

        def init(self, site):
            return {"t": torch.zeros(site.width)}

        def states(self, p, x, tokens, site):
            assert tokens.lengths.tolist() == [7, 5, 7]
            return x + torch.where(tokens.text[..., None], p["t"], 0)[..., : x.shape[-1] - width]

    return Shift()


@pytest.mark.parametrize("build", [h.bert, h.causal, lambda: h.causal("gpt2")])
def test_states_of_a_block_are_edited(build):
    model = build()
    seen = {}
    sm.attach(model, shift())
    (row,) = model._smidgen.plan.entries
    block = model.get_submodule(row.site.path)
    shake([p for n, p in trained_parameters(model).items() if n.endswith(".t")], 1.0)
    handles = [
        block.register_forward_hook(
            lambda m, a, o: seen.update(before=o[0] if isinstance(o, tuple) else o), prepend=True
        ),
        block.register_forward_hook(lambda m, a, o: seen.update(after=o[0] if isinstance(o, tuple) else o)),
    ]
    h.logits(model)
    (t,) = (p.detach() for n, p in trained_parameters(model).items() if n.endswith(".t"))
    for b in range(3):
        for i in range(7):
            text = bool(h.ids()["attention_mask"][b, i])
            wanted = seen["before"][b, i] + (t if text else 0)
            assert torch.allclose(seen["after"][b, i], wanted, atol=1e-6)
    for handle in handles:
        handle.remove()


def test_states_of_another_shape_are_refused():
    model = sm.attach(h.bert(), shift(width=1))
    with pytest.raises((AttachError, RuntimeError)):
        h.logits(model)


def test_a_mask_of_another_form_is_refused():
    model = sm.attach(h.bert(), shift())
    with pytest.raises(AttachError, match=r"need an attention mask \(batch, tokens\), found one of \(3, 1, 7, 7\)"):
        model(h.ids()["input_ids"], attention_mask=torch.ones(3, 1, 7, 7))


# The index map, by hand


def test_the_index_map():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    whole = TokenMap.whole(torch.zeros(2, 5, 3), mask)
    assert not whole.shortened
    assert whole.lengths.tolist() == [5, 3]
    places = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 0, 1, 2]])
    once = whole.shorten(places, 3)
    assert once.kept.tolist() == [[0, 1, 3], [2, 3, 4]], "text speaks for a place, if it has any"
    assert once.lengths.tolist() == [3, 3]
    twice = once.shorten(torch.tensor([[0, 0, 1], [0, 1, 1]]), 2)
    assert twice.where.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert twice.kept.tolist() == [[0, 3], [2, 3]]
    states = torch.randn(2, 2, 4)
    for b in range(2):
        for t in range(5):
            assert torch.equal(twice.spread(states)[b, t], states[b, twice.where[b, t]])
    x = torch.randn(1, 4, 5, 5)
    picked = twice.pick(twice.pick(x, -1), -2)
    for b in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(picked[b, :, i, j], x[0, :, twice.kept[b, i], twice.kept[b, j]])


@pytest.mark.parametrize(
    ("places", "count", "said"),
    [
        (torch.zeros(2, 4, dtype=torch.long), 1, "there are places"),
        (torch.full((2, 5), 3), 2, "lie between 0 and 1, found 3"),
        (torch.zeros(2, 5, dtype=torch.long), 2, "left without a token"),
    ],
)
def test_an_index_map_that_does_not_fit(places, count, said):
    with pytest.raises(ValueError, match=said):
        TokenMap.whole(torch.zeros(2, 5, 3)).shorten(places, count)


def test_a_mask_of_other_tokens():
    with pytest.raises(ValueError, match="the attention mask is"):
        TokenMap.whole(torch.zeros(2, 5, 3), torch.ones(2, 6))
