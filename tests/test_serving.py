"""Server, bank and engine: any number of threads ask for any deltas, and each gets its own delta's answer."""

import threading
import time

import pytest
import torch

import smidgen as sm
from smidgen.common.errors import AttachError, DataError, DeltaError
from smidgen.serving import engine as engine_module
from smidgen.serving import forward_batches
from smidgen.serving.errors import ClosedError, QueueFullError, ServingError, UnknownDeltaError
from smidgen.serving.text_stream import TextStream
from tests import helpers as h
from tests.test_mixed_layouts import trained

TASK = {"kind": "classification", "text": ["text"]}
RECIPES = ["LN()", "LoRA(rank=2)", "Prefix(length=2)", "PromptTuning(length=2)", "LN() | Select('random', keep=0.2)"]
TEXTS = ["the film was good", "good", "the the film"]


@pytest.fixture
def deltas():
    model = h.bert()
    return model, {f"d{i}": trained(model, r, i).with_info(task=TASK) for i, r in enumerate(RECIPES)}


def server(model, bank=None, **options):
    return sm.Server(model, bank, processor=h.tokenizer(), **options)


def saved(folder, deltas):
    for name, delta in deltas.items():
        delta.save(folder / name)
    return folder


def apart(one, other):
    return max(abs(a.probabilities[k] - b.probabilities[k]) for a, b in zip(one, other, strict=True)
               for k in a.probabilities)  # fmt: skip


def test_each_delta_answers_as_alone(deltas):
    model, deltas = deltas
    with h.untouched(model), server(model) as served:
        for name, delta in deltas.items():
            served.add(name, delta)
        found = {name: served.predict(name, TEXTS) for name in deltas}
        base = served.predict(None, TEXTS)
        for name, delta in deltas.items():
            wanted = sm.predict(model, TEXTS, delta=delta, tokenizer=h.tokenizer())
            assert apart(found[name], wanted) < 1e-5
            assert apart(found[name], base) > 1e-4


def test_threads_get_their_own_answers_while_deltas_come_and_go(deltas):
    model, deltas = deltas
    wanted = {n: sm.predict(model, TEXTS, delta=d, tokenizer=h.tokenizer()) for n, d in deltas.items()}
    wrong, counted, done = [], [0], threading.Event()
    limits = sm.Limits(batch=8, wait=0.002)
    with server(model, limits=limits) as served:
        for name, delta in deltas.items():
            served.add(name, delta)

        def ask(seed):
            names = sorted(deltas)
            for i in range(30):
                name = names[(seed + i) % len(names)]
                if apart(served.predict(name, TEXTS), wanted[name]) > 1e-5:
                    wrong.append(name)
                counted[0] += 1

        def change():
            while not done.is_set():
                served.add("other", deltas["d0"])
                served.add("d1", deltas["d1"])
                served.remove("other")

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        changing = threading.Thread(target=change)
        for thread in (changing, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        changing.join()
        counts = served.engine.counts
    assert not wrong
    assert counted == [180]
    assert counts.rows == 180 * 3
    assert counts.passes < counts.rows  # rows shared passes


def test_the_model_given_is_free_for_other_things(deltas):
    model, deltas = deltas
    with server(model) as served:
        served.add("d0", deltas["d0"])
        wanted = served.predict("d0", TEXTS)
        with h.untouched(model):
            served.add("d1", deltas["d1"])
            assert all(parameter.requires_grad for parameter in model.parameters())
        with sm.attached(model, deltas["d1"]):
            assert apart(served.predict("d0", TEXTS), wanted) < 1e-6
            served.add("d2", deltas["d2"])


def test_a_replaced_delta_answers_by_its_new_values_alone(deltas):
    model, deltas = deltas
    with server(model) as served:
        served.add("x", deltas["d0"])
        one = served.predict("x", TEXTS)
        served.add("x", deltas["d1"])
        assert apart(served.predict("x", TEXTS), one) > 1e-4
        with pytest.raises(DeltaError, match="base|fingerprint"):
            served.add("x", trained(h.bert(seed=5), "LN()").with_info(task=TASK))
        with pytest.raises(AttachError, match="trained in place"):
            served.add("x", trained(model, "Full()").with_info(task=TASK))
        wanted = sm.predict(model, TEXTS, delta=deltas["d1"], tokenizer=h.tokenizer())
        assert apart(served.predict("x", TEXTS), wanted) < 1e-5


def test_the_bank_loads_on_first_use_and_keeps_within_its_memory(deltas, tmp_path):
    model, deltas = deltas
    bank = sm.Bank(saved(tmp_path, deltas), max_memory="2KB")
    assert list(bank) == sorted(deltas)
    assert bank.loaded == 0
    with server(model, bank) as served:
        first = {name: served.predict(name, TEXTS) for name in deltas}
        again = {name: served.predict(name, TEXTS) for name in deltas}
        assert bank.nbytes <= 2000
        assert bank.loads > len(deltas)
        assert bank.dropped == bank.loads - bank.loaded
    assert all(apart(first[name], again[name]) < 1e-6 for name in deltas)


def test_the_bank_sees_what_comes_and_goes_in_its_folder(deltas, tmp_path):
    model, deltas = deltas
    with server(model, saved(tmp_path, {"a": deltas["d0"]})) as served:
        served.add("b", deltas["d1"])
        assert (tmp_path / "b" / "delta.json").is_file()
        deltas["d2"].save(tmp_path / "c")
        served.bank.refresh()
        assert list(served.bank) == ["a", "b", "c"]
        served.remove("a")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
        with pytest.raises(UnknownDeltaError, match="no delta is called 'a'"):
            served.predict("a", TEXTS)


def test_two_banks_on_one_folder_see_what_the_other_does(deltas, tmp_path):
    model, deltas = deltas
    one, other = (sm.Bank(saved(tmp_path, {"a": deltas["d0"]}), recheck=0) for _ in range(2))
    with server(model, one) as first, server(model, other) as second:
        was = second.predict("a", TEXTS)
        first.add("b", deltas["d1"])
        assert apart(second.predict("b", TEXTS), first.predict("b", TEXTS)) < 1e-6
        first.add("a", deltas["d2"])
        assert apart(second.predict("a", TEXTS), first.predict("a", TEXTS)) < 1e-6
        assert apart(second.predict("a", TEXTS), was) > 1e-4
        assert second.bank.names() == ["a", "b"]
        first.remove("a")
        with pytest.raises(UnknownDeltaError):
            second.predict("a", TEXTS)
        assert second.bank.names() == ["b"]
        first.add("c", deltas["d1"])
        assert second.describe("c").recipe == "LoRA(rank=2)"
        second.remove("c")
        with pytest.raises(UnknownDeltaError):
            first.describe("c")
        loads = other.loads
        second.predict("b", TEXTS)
        assert other.loads == loads  # what did not change is not read again


def test_of_writers_of_one_name_memory_and_file_have_the_same(deltas, tmp_path):
    model, deltas = deltas
    with server(model, saved(tmp_path, {"a": deltas["d0"]})) as served:
        store, save = served.bank.store, served.bank.store.save

        def late(name, delta):
            save(name, delta)
            time.sleep(0.01 if delta is deltas["d1"] else 0)  # who saves first is in memory last

        store.save = late
        for _ in range(10):
            both = [threading.Thread(target=served.add, args=("a", deltas[n])) for n in ("d1", "d2")]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join()
            assert served.describe("a").recipe == str(store.load("a").recipe)


def test_deltas_at_a_url(deltas, tmp_path):
    import fsspec

    model, deltas = deltas
    memory = fsspec.filesystem("memory")
    memory.put(f"{saved(tmp_path, {'a': deltas['d0']})}/", "memory://tenants/", recursive=True)
    with server(model, "memory://tenants") as served:
        served.add("b", deltas["d1"])
        assert list(served.bank) == ["a", "b"]
        assert apart(served.predict("a", TEXTS), served.predict("b", TEXTS)) > 1e-4
        assert sm.Bank("memory://tenants").store.load("b").digest == deltas["d1"].digest
        served.remove("a")
    assert list(sm.Bank("memory://tenants")) == ["b"]


def test_a_save_that_fails_leaves_the_old_delta(deltas, tmp_path, monkeypatch):
    model, deltas = deltas
    with server(model, saved(tmp_path, {"a": deltas["d0"]})) as served:
        before = served.predict("a", TEXTS)

        def full(self, folder):
            raise DeltaError("no space left on the device")

        monkeypatch.setattr(sm.Delta, "save", full)
        with pytest.raises(DeltaError, match="no space"):
            served.add("a", deltas["d1"])
        assert apart(served.predict("a", TEXTS), before) < 1e-6
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a\0b", "x" * 300, "", "base", ".hidden", "a/b", 3])
def test_names_that_are_none(deltas, name):
    model, deltas = deltas
    with server(model) as served, pytest.raises(ServingError, match="no name for a delta|untouched base"):
        served.add(name, deltas["d0"])


def test_bad_questions(deltas):
    model, deltas = deltas
    with server(model) as served:
        served.add("d0", deltas["d0"])
        with pytest.raises(UnknownDeltaError, match="did you mean 'd0'"):
            served.predict("d1", TEXTS)
        with pytest.raises(DataError, match="no texts to predict"):
            served.predict("d0", [])
        with pytest.raises(DataError, match="takes 1 text"):
            served.predict("d0", TEXTS, pairs=TEXTS)
        with pytest.raises(ServingError, match="writes no text"):
            served.generate("d0", "the")
    with pytest.raises(ClosedError, match="stopping"):
        served.predict("d0", TEXTS)


def test_a_full_queue_refuses_and_closing_answers_what_was_taken(deltas, monkeypatch):
    model, deltas = deltas
    real, free, taken = forward_batches.compute, threading.Event(), threading.Event()

    def slow(requests):
        taken.set()
        free.wait()
        return real(requests)

    monkeypatch.setattr(engine_module, "compute", slow)
    served = server(model, limits=sm.Limits(batch=1, queue=4, wait=0))
    served.add("d0", deltas["d0"])
    found = []

    def ask():
        found.append(served.predict("d0", ["the"]))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    closing = threading.Thread(target=served.close, daemon=True)
    try:
        for thread in threads:
            thread.start()
        assert taken.wait(30)
        end = time.monotonic() + 30
        while served.engine.waiting < 3 and time.monotonic() < end:
            time.sleep(0.001)
        with pytest.raises(QueueFullError, match="at most 4 may"):
            served.predict("d0", TEXTS)
        closing.start()
    finally:
        free.set()
    for thread in (*threads, closing):
        thread.join(30)
    assert len(found) == 4


def test_whoever_waits_no_longer_is_not_computed(deltas, monkeypatch):
    model, deltas = deltas
    real, free, rows = forward_batches.compute, threading.Event(), []

    def slow(requests):
        free.wait(30)
        rows.extend(requests)
        return real(requests)

    monkeypatch.setattr(engine_module, "compute", slow)
    with server(model, limits=sm.Limits(batch=1, wait=0)) as served:
        served.add("d0", deltas["d0"])
        try:
            with pytest.raises(TimeoutError, match=r"within 0\.1 seconds"):
                served.predict("d0", TEXTS, timeout=0.1)
        finally:
            free.set()
        assert served.predict("d0", ["good"])
    assert len(rows) == 2  # the one that was under way, and the one behind


def test_a_delta_of_no_task_is_of_the_class_that_the_base_came_in(deltas):
    model, _ = deltas
    plain = trained(model, "LN()", 3)
    assert "task" not in plain.info
    with server(model) as served:
        served.add("plain", plain)
        wanted = sm.predict(model, TEXTS, delta=plain, tokenizer=h.tokenizer())
        assert apart(served.predict("plain", TEXTS), wanted) < 1e-5
        assert list(served.models.served) == ["BertForSequenceClassification"]


def test_one_bad_row_does_not_spoil_the_others(deltas, monkeypatch):
    model, deltas = deltas
    real = forward_batches.compute

    def picky(requests):
        if any(len(request.example["input_ids"]) > 5 for request in requests):
            raise RuntimeError("too long for me")
        return real(requests)

    monkeypatch.setattr(engine_module, "compute", picky)
    with server(model, limits=sm.Limits(wait=0.2)) as served:
        served.add("d0", deltas["d0"])
        found = {}

        def ask(text):
            try:
                found[text] = served.predict("d0", [text])[0].label
            except RuntimeError as error:
                found[text] = str(error)

        threads = [threading.Thread(target=ask, args=(text,)) for text in ("good", "the film was good")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found["the film was good"] == "too long for me"
    assert found["good"].startswith("LABEL")


def test_outputs_that_are_not_finite(deltas):
    model, deltas = deltas
    huge = trained(model, "LN()").with_info(task=TASK)
    for tensor in huge.tensors.values():
        tensor.mul_(1e38)
    with server(model) as served:
        with pytest.raises(DeltaError, match="not finite"):
            served.add("huge", huge)
        served.add("d0", deltas["d0"])
        served.add("huge", huge)  # of a recipe that is known to mix: seen when it is asked
        with pytest.raises(ServingError, match="not finite"):
            served.predict("huge", TEXTS)
        assert served.predict("d0", TEXTS)


# Texts


@pytest.fixture(params=["llama", "gpt2"])
def writer(request):
    model = h.causal(request.param)
    task = {"kind": "causal-lm", "text": ["text"]}
    return model, {f"d{i}": trained(model, r, i).with_info(task=task) for i, r in enumerate(RECIPES[:4])}


PROMPTS = ["the film was", "good", "the the the film was good"]


def alone(model, delta, ids, count):
    from contextlib import nullcontext

    given = torch.tensor([ids])
    with sm.attached(model, delta) if delta is not None else nullcontext(), torch.no_grad():
        found = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False,
            pad_token_id=0, eos_token_id=3,
        )  # fmt: skip
    written = found[0, len(ids) :].tolist()
    return written[:-1] if written[-1] == 3 else written


def test_texts_that_join_and_leave_are_as_alone(writer):
    model, deltas = writer
    with server(model, limits=sm.Limits(texts=5)) as served:
        for name, delta in deltas.items():
            served.add(name, delta)
        begun = []
        for i, name in enumerate([*deltas, "base", *deltas]):
            for j, prompt in enumerate(PROMPTS):
                begun.append((name, served.begin(name, prompt, sm.Sampling(max_tokens=3 + (5 * i + 3 * j) % 11))))
                time.sleep(0.002)
        for name, text in begun:
            done = text.future.result(60)
            assert text.written == alone(model, deltas.get(name), text.ids, text.sampling.max_tokens)
            assert done.tokens == len(text.written)
        assert served.engine.counts.steps < sum(len(text.written) for _, text in begun)  # they shared steps


def test_several_prompts_of_one_question_are_written_side_by_side(writer):
    model, deltas = writer
    with server(model) as served:
        served.add("d0", deltas["d0"])
        found = served.predict("d0", PROMPTS, max_new_tokens=8)
        steps = served.engine.counts.steps
        assert [one.label for one in found] == [
            served.generate("d0", p, sm.Sampling(max_tokens=8)).text for p in PROMPTS
        ]
        assert served.engine.counts.steps - steps > steps  # one after another it takes more


def test_streams_stops_and_seeds(writer):
    model, deltas = writer
    with server(model) as served:
        served.add("d0", deltas["d0"])
        whole = served.generate("d0", "the film", sm.Sampling(max_tokens=12))
        assert "".join(served.stream("d0", "the film", sm.Sampling(max_tokens=12))) == whole.text
        word = whole.text.split()[2]
        cut = served.generate("d0", "the film", sm.Sampling(max_tokens=12, stop=(word,)))
        assert cut.reason == "stop"
        assert cut.text == whole.text[: whole.text.index(word)]
        drawn = [served.generate("d0", "the", sm.Sampling(temperature=1.5, top_p=0.9, seed=s)).text for s in (1, 1, 2)]
        assert drawn[0] == drawn[1]
        assert drawn[0] != drawn[2]
        with pytest.raises(ServingError, match="positions"):
            served.generate("d0", "the " * 60)
        assert served.predict("d0", ["the film"], max_new_tokens=12)[0].answer == whole.text


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"stop": ("",)}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ServingError, match=next(iter(wrong))):
        sm.Sampling(**wrong)


def test_whoever_has_gone_leaves_the_others(writer):
    model, deltas = writer
    with server(model) as served:
        served.add("d0", deltas["d0"])
        gone, stays = (served.begin("d0", "the", sm.Sampling(max_tokens=20, temperature=3, seed=s)) for s in (1, 2))
        gone.abandoned = True
        assert stays.future.result(60)
        assert isinstance(gone.future.exception(60), ServingError | None)


class Letters:
    """A tokenizer of bytes."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace")


def test_a_stream_gives_nothing_out_that_may_change():
    stream, given = TextStream(Letters(), ("STOP",)), []
    for byte in "aé ST. STOP more".encode():
        piece, stopped = stream.add(byte)
        given.append(piece)
        assert "�" not in piece
        if stopped:
            break
    assert "".join(given) == stream.whole == "aé ST. "


def test_a_recurrence_is_refused_when_a_delta_is_added():
    import transformers as T

    config = T.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, pad_token_id=0, eos_token_id=3)
    model = T.MambaForCausalLM(config).eval()
    with server(model) as served, pytest.raises(ServingError, match="state of a recurrence"):
        served.add("x", trained(model, "LN()").with_info(task={"kind": "causal-lm", "text": ["text"]}))


def test_what_is_refused_leaves_the_base_as_it_was():
    """OPT's feed-forward parts get the tokens of all rows as one list."""
    import transformers as T

    config = T.OPTConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24,
                         max_position_embeddings=40, word_embed_proj_dim=16, pad_token_id=0)  # fmt: skip
    model = T.OPTForCausalLM(config).eval()
    task = {"kind": "causal-lm", "text": ["text"]}
    with server(model) as served:
        with pytest.raises(AttachError, match="which part belongs to which row"):
            served.add("x", trained(model, "LN()").with_info(task=task))
        text = served.begin(None, "the film", sm.Sampling(max_tokens=6))
        text.future.result(60)
        assert text.written == alone(model, None, text.ids, 6)


# Kinds of task


def kept(folder, model, processor):
    """A model's folder, and the model loaded from it, which says where it came from."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_classifier_tagger_and_numbers_of_one_base(tmp_path):
    folder = kept(tmp_path / "base", h.build("bert", "AutoModel"), h.tokenizer())
    labels = {"classification": ["no", "yes", "so"], "tokens": ["O", "B-a", "I-a", "B-b"], "regression": []}
    deltas = {}
    for i, (kind, names) in enumerate(labels.items()):
        task = kind_task(tmp_path / kind, kind, names)
        model, tokenizer = sm.load(folder, task=task)
        info = {"task": {"kind": kind, "text": list(task.text)}}
        deltas[kind] = trained(model, ["LN()", "LoRA(rank=2)", "IA3()"][i], i).with_info(**info)
    inputs = {"classification": TEXTS, "tokens": [text.split() for text in TEXTS], "regression": TEXTS}
    model, tokenizer = sm.load(folder, delta=deltas["classification"])
    with server(model) as served:
        for kind, delta in deltas.items():
            served.add(kind, delta)
        for kind, delta in deltas.items():
            alone, _ = sm.load(folder, delta=delta)
            wanted = sm.predict(alone, inputs[kind], delta=delta, tokenizer=tokenizer)
            for one, other in zip(served.predict(kind, inputs[kind]), wanted, strict=True):
                assert one.answer == pytest.approx(other.answer) if kind == "regression" else one.answer == other.answer
        classes = served.models.served
        assert sorted(classes) == ["BertForSequenceClassification", "BertForTokenClassification"]
        first, other = (dict(m.plain.named_parameters()) for m in classes.values())
        both = [name for name in first if name in other and not name.startswith("classifier")]
        assert both
        assert all(first[name].data_ptr() == other[name].data_ptr() for name in both)


def kind_task(folder, kind, names):
    rows = {
        "classification": [{"text": f"the film {n}", "label": n} for n in names],
        "tokens": [{"tokens": ["the", "film"], "tags": [n, n]} for n in names],
        "regression": [{"text": f"the film {n}", "label": n + 0.5} for n in range(3)],
    }[kind]
    for split in ("train", "validation"):
        h.jsonl(folder / f"{split}.jsonl", rows * 2 if split == "train" else rows)
    return sm.Task.load(folder, kind=kind)


def test_images(tmp_path):
    from tests import media

    model, processor = media.vit(), media.image_processor()
    task = {"kind": "image-classification", "text": ["image"]}
    deltas = {f"d{i}": trained(model, r, i).with_info(task=task) for i, r in enumerate(["LN()", "LoRA(rank=2)"])}
    files = [str(path) for path in sorted(media.pictures(tmp_path).rglob("*.png"))[:6]]
    with sm.Server(model, processor=processor) as served:
        for name, delta in deltas.items():
            served.add(name, delta)
        for name, delta in deltas.items():
            wanted = sm.predict(model, files, delta=delta, processor=processor)
            assert apart(served.predict(name, files), wanted) < 1e-5
            assert apart(served.predict(name, files), served.predict(None, files)) > 1e-4


def test_what_cannot_be_mixed_on_windows_is_refused_when_it_is_added():
    """Swin computes windows as rows of their own, so what stands inside of them cannot tell whose they are."""
    import transformers as T

    config = T.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.SwinForImageClassification(config).eval()
    with sm.Server(model, processor=object()) as served:
        with pytest.raises(AttachError, match="which part belongs to which row"):
            served.add("x", trained(model, "LoRA(rank=2)"))
        assert not len(served.bank)


def test_a_delta_that_goes_while_it_is_read_is_unknown(deltas, tmp_path, monkeypatch):
    """Not damaged, and not listed any more; one that is damaged still says so."""
    model, deltas = deltas
    with server(model, saved(tmp_path, deltas)) as served:
        store = served.bank.store
        load = store.load

        def late(name):
            store.remove(name)
            return load(name)

        with monkeypatch.context() as patched:
            patched.setattr(store, "load", late)
            with pytest.raises(UnknownDeltaError, match="d0"):
                served.predict("d0", TEXTS)
        assert "d0" not in served.bank
        assert not list(tmp_path.glob(".d0*"))
        (tmp_path / "d1" / "delta.safetensors").write_bytes(b"no values")
        with pytest.raises(DeltaError, match=r"delta\.safetensors"):
            served.predict("d1", TEXTS)
        assert "d1" in served.bank
