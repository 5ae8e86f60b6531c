"""`hydra-ssm finetune`: a user's own table becomes a model that transformers loads, or a mistake is named."""

import csv
import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_glue import write_model
from small_text import NOUNS, VERBS
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline

from hydra_ssm.cli import main
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.finetune import finetune, metrics
from hydra_ssm.train.finetune.own import _natural
from hydra_ssm.train.finetune.table import Problem, guess, read_rows, take

QUICK = {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_model(tmp_path_factory.mktemp("finetune") / "model")


def text(draw: random.Random, noun: str) -> str:
    return f"the {noun} {draw.choice(VERBS)} a {draw.choice(NOUNS)}"


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(count: int = 80) -> list[dict]:
    """The first noun tells the verdict."""
    draw = random.Random(0)
    kinds = [draw.randrange(2) for _ in range(count)]
    return [
        {"id": i, "review": f'{text(draw, NOUNS[k])}, "{i}"', "verdict": ["good", "bad"][k]}
        for i, k in enumerate(kinds)
    ]


def tagged(count: int = 80) -> list[dict]:
    """Nouns are things; an article before one begins its span."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        words = text(draw, draw.choice(NOUNS)).split()
        tags = ["B-thing" if w in ("the", "a") else "I-thing" if w in NOUNS else "O" for w in words]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


# ----------------------------------------------------------------------------------------------------------- guessing


def classes(label: str, *texts: str) -> Problem:
    return Problem("classification", texts, label)


@pytest.mark.parametrize(
    ("row", "values", "expected"),
    [
        ({"text": "a b", "label": ...}, "xyz", classes("label", "text")),
        ({"sentence1": "a", "sentence2": "b", "label": ...}, "xy", classes("label", "sentence1", "sentence2")),
        ({"Premise": "a", "Hypothesis": "b", "Label": ...}, "01", classes("Label", "Premise", "Hypothesis")),
        ({"review": "a", "stars": ...}, ["1", "5", "3"], classes("stars", "review")),
        ({"review": "a", "stars": ...}, ["1.5", "5", "3"], Problem("regression", ("review",), "stars")),
        ({"text": "a", "value": ...}, list(range(30)), Problem("regression", ("text",), "value")),
        ({"id": "1", "what it says": "many words here", "kind": ...}, "xyxy", classes("kind", "what it says")),
        ({"tokens": ["a", "b"], "ner_tags": ...}, [["O", "B-x"]] * 3, Problem("tagging", ("tokens",), "ner_tags")),
        ({"words": "a b", "tags": ...}, ["O X"] * 3, Problem("tagging", ("words",), "tags")),
    ],
    ids=lambda value: str(value) if isinstance(value, Problem) else "",
)  # fmt: skip
def test_what_is_to_be_learned_is_guessed_from_the_columns(row: dict, values: list, expected: Problem) -> None:
    rows = [{name: value if cell is ... else cell for name, cell in row.items()} for value in values]
    assert guess(rows, None, [], None) == expected


def test_a_guess_gives_way_to_what_is_said() -> None:
    rows = [{"text": "a", "title": "b", "label": str(i), "other": "x"} for i in range(3)]
    assert guess(rows, "regression", ["title", "text"], None) == Problem("regression", ("title", "text"), "label")
    assert guess(rows, None, ["title"], "other") == Problem("classification", ("title",), "other")
    assert guess(rows, "tagging", ["text"], "label") == Problem("tagging", ("text",), "label")


def test_spans_are_counted_whole() -> None:
    labels = [["B-x", "I-x", "O", "B-y", "B-y"], ["I-x", "I-y", "O"]]
    assert metrics.spans(labels[0]) == {(0, 2, "x"), (3, 4, "y"), (4, 5, "y")}
    assert metrics.spans(labels[1]) == {(0, 1, "x"), (1, 2, "y")}
    assert metrics.span_f1(labels, labels) == 1
    found = [["B-x", "O", "O", "B-y", "I-y"], ["I-x", "I-y", "O"]]  # 2 of 4 found are right, 2 of 5 are found
    assert metrics.span_f1(labels, found) == pytest.approx(2 * 2 / (4 + 5))


# --------------------------------------------------------------------------------------------------------- whole runs


def test_one_command_makes_a_classifier_of_a_csv_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = write_csv(tmp_path / "reviews.csv", reviews()), tmp_path / "out"
    command = ["finetune", str(model), str(data), "--out", str(out)]
    command += [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "classification of review by verdict (guessed; --task, --text and --label say otherwise)" in said
    assert "2 labels (" in said
    assert "72 rows to train on, 8 held out" in said
    assert "held out: accuracy 1.000, macro f1 1.000 (accuracy 0." in said
    assert {"config.json", "model.safetensors", "tokenizer.json", "finetune.json"} <= {p.name for p in out.iterdir()}
    assert not {"manifest.json", "work"} & {p.name for p in out.iterdir()}
    found = AutoModelForSequenceClassification.from_pretrained(out)
    assert found.config.id2label == {0: "bad", 1: "good"}
    answers = pipeline("text-classification", model=str(out))([f"the {noun} sees a tree" for noun in NOUNS[:2]])
    assert [answer["label"] for answer in answers] == ["good", "bad"]
    assert main(command) == 2  # never over a model that is there
    assert "out holds a model already: choose another --out, or --overwrite" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert main([*command, "--overwrite"]) == 2
    assert "out must be new or empty, it holds notes.txt" in capsys.readouterr().err


def test_a_model_of_pairs_reads_both_texts(model: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [
        {"question": text(draw, draw.choice(NOUNS)), "answer": text(draw, NOUNS[k]), "fits": bool(k)}
        for k in (draw.randrange(2) for _ in range(80))
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    report = finetune(model, data, tmp_path / "out", label="fits", say=len, **{**QUICK, "epochs": 30})
    assert report["problem"]["texts"] == ("question", "answer")
    assert report["metrics"]["accuracy"] == 1
    answers = pipeline("text-classification", model=str(tmp_path / "out"))(
        [{"text": "the boat sees a king", "text_pair": f"the {noun} sees a boat"} for noun in NOUNS[:2]]
    )
    assert [answer["label"] for answer in answers] == ["False", "True"]


def test_numbers_are_learned_in_their_own_unit(model: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    kinds = [draw.randrange(4) for _ in range(120)]
    rows = [{"text": text(draw, NOUNS[k]), "price": 250_000.5 + 10_000 * k} for k in kinds]
    said: list[str] = []
    kept = write_csv(tmp_path / "kept.csv", rows[100:])
    data = write_csv(tmp_path / "prices.csv", rows[:100])
    out = tmp_path / "out"
    report = finetune(model, data, out, label="price", held_out=kept, say=said.append, **{**QUICK, "epochs": 20})
    assert said[0].startswith("regression of text by price")
    assert report["rows"] == {"train": 100, "held_out": 20}
    assert report["metrics"]["pearson"] > 0.95
    assert report["metrics"]["rmse"] < report["baseline"]["rmse"] / 2
    net, words = AutoModelForSequenceClassification.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    answers = [net(**words(row["text"], return_tensors="pt")).logits.item() for row in rows[100:]]
    assert metrics.rmse(np.array([row["price"] for row in rows[100:]]), np.array(answers)) == pytest.approx(
        report["metrics"]["rmse"], rel=1e-3
    )
    assert pipeline("text-classification", model=str(out))(rows[0]["text"])[0]["score"] > 200_000


def test_words_get_tags(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = finetune(model, write_jsonl(tmp_path / "words.jsonl", tagged()), out, say=len, **QUICK)
    assert report["problem"]["task"] == "tagging"
    assert report["metrics"]["accuracy"] > 0.95
    assert report["metrics"]["span_f1"] > 0.9
    found = AutoModelForTokenClassification.from_pretrained(out)
    assert set(found.config.label2id) == {"O", "B-thing", "I-thing"}
    spans = pipeline("token-classification", model=str(out), aggregation_strategy="simple")("the cat sees a dog")
    assert [(span["entity_group"], span["word"]) for span in spans] == [("thing", "the cat"), ("thing", "a dog")]


def test_equal_texts_are_never_on_both_sides(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_ssm.train.finetune import own

    rows = take(
        [{"text": f"text {i % 7}", "label": str(i % 2)} for i in range(70)],
        Problem("classification", ("text",), "label"),
        "x",
    )
    kept, _ = own._held_out(rows, Problem("classification", ("text",), "label"), None, 0)
    assert len(kept) == 10
    assert len(rows) == 60
    assert not set(kept.texts) & set(rows.texts)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_a_quote_that_does_not_close_is_named_with_its_line_and_swallows_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    lines = ["text,label", "a,x", '"b, c",y', '"d stray,x', *(f"text {i},y" for i in range(30))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"opens in line 4 must close in its cell, up to line 34 there are"):
        read_rows(path)
    path.write_text('text,label\n"two\nlines",x\nbroken\nb,y\n', encoding="utf-8")
    rows, remarks = read_rows(path)
    assert [row["text"] for row in rows] == ["two\nlines", "b"]
    assert remarks == [f"{path}: 1 broken lines left out (4)"]
    (tmp_path / "UPPER.CSV").write_text("text,label\na,x\n", encoding="utf-8")
    assert read_rows(tmp_path / "UPPER.CSV")[0] == [{"text": "a", "label": "x"}]
    path.write_text('"text";"label, gold"\na;x\n', encoding="utf-8")
    assert read_rows(path)[0] == [{"text": "a", "label, gold": "x"}]
    path.write_text('"text"s,label\na,x\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"must begin with the names of its columns, it does not: ',' expected after"):
        read_rows(path)


def test_a_quote_that_closes_in_another_row_swallows_no_rows(tmp_path: Path) -> None:
    rows = [f"text {i},y" for i in range(30)]
    rows[5], rows[20] = '"text 5,y', '"text 20,y'
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    with pytest.raises(UserError, match="opens in line 7 must close in its cell, up to line 22 there are"):
        read_rows(tmp_path / "data.csv")


def test_a_few_bad_labels_do_not_change_what_rows_are_for() -> None:
    rows = [{"words": ["a", "b"], "tags": ["O", "B-X"]} for _ in range(20)]
    rows[3]["tags"] = ["O"]
    problem = guess(rows, None, [], None)
    assert problem.task == "tagging"
    assert take(rows, problem, "d").remarks == ["d: 1 of 20 rows left out, with more or fewer tags than words"]
    lists = [{"text": "a", "label": ["x"]}, {"text": "b", "label": "y"}]
    assert take(lists, Problem("classification", ("text",), "label"), "d").remarks == [
        "d: 1 of 2 rows left out, whose label is a list: --task tagging takes those"
    ]
    scores = [{"text": f"text {i}", "score": i / 7} for i in range(40)]
    scores[5]["score"] = float("nan")  # as Python writes and reads JSON
    problem = guess(scores, None, [], None)
    assert problem.task == "regression"
    assert take(scores, problem, "d").remarks == ["d: 1 of 40 rows left out, without a label"]
    commas = [{"text": "a", "score": "1.5"}, {"text": "b", "score": "2,5"}]
    assert take(commas, Problem("regression", ("text",), "score"), "d").remarks == [
        "d: 1 of 2 rows left out, whose label is not a number: write 0.5 for 0,5"
    ]
    names = [{"text": "a", "class": f"{i}_{j}"} for i in range(5) for j in range(7)]
    assert guess(names, None, [], None).task == "classification"


def test_rows_that_teach_nothing_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('text,label\na,x\n"b, with a comma",\n,y\nbroken\nd,y\n,\n', encoding="utf-8-sig")
    rows, remarks = read_rows(path)
    assert remarks == [f"{path}: 1 broken lines left out (5)"]
    found = take(rows, guess(rows, None, [], None), "data")
    assert (found.texts, found.labels) == ([("a",), ("d",)], ["x", "y"])
    assert found.remarks == ["data: 2 of 5 rows left out, without a label", "data: 1 of 5 rows left out, without text"]
    (tmp_path / "d.jsonl").write_text(
        '{"text": "a", "score": 1.5}\n{"text": \n[1]\n{"text": "b", "score": "?"}\n', encoding="utf-8"
    )
    rows, remarks = read_rows(tmp_path / "d.jsonl")
    assert remarks[0].endswith("2 broken lines left out (2, 3)")
    assert take(rows, guess(rows, "regression", [], None), "d").remarks == [
        "d: 1 of 2 rows left out, whose label is not a number"
    ]
    (tmp_path / "s.csv").write_text("text;label\na, b;x\n", encoding="utf-8")
    assert read_rows(tmp_path / "s.csv")[0] == [{"text": "a, b", "label": "x"}]
    (tmp_path / "q.tsv").write_text('text\tlabel\n"a\tx\n', encoding="utf-8")
    assert read_rows(tmp_path / "q.tsv")[0] == [{"text": '"a', "label": "x"}]


def test_half_a_character_is_no_text() -> None:
    """As messages have it that were cut in the midst of an emoji."""
    rows = [{"text": "half \ud83d", "label": "\ude00"}]
    found = take(rows, Problem("classification", ("text",), "label"), "data")
    assert (found.texts, found.labels) == ([("half \ufffd",)], ["\ufffd"])
    found = take([{"text": ["a", "\ud83d"], "label": ["O", "\ud83d"]}], Problem("tagging", ("text",), "label"), "data")
    assert (found.texts, found.labels) == ([(["a", "\ufffd"],)], [["O", "\ufffd"]])


def test_the_order_of_labels_is_that_of_their_numbers_and_names() -> None:
    names = ["-1", "2", "10", "a", "inf", "nan"]
    for order in itertools.permutations(names):
        assert sorted(order, key=_natural) == names


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_labels_that_are_held_out_alone_are_said(kind: str, model: Path, tmp_path: Path) -> None:
    value = (lambda name: [name, "a"]) if kind == "tagging" else str
    rows = [{"tokens": ["the", f"cat{i}"], "label": value("ab"[i % 2])} for i in range(8)]
    kept = [{"tokens": ["the", "dog"], "label": value(name)} for name in ("b", "d", "c")]
    said: list[str] = []
    report = finetune(
        model, write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", task=kind, text=["tokens"], label="label",
        held_out=write_jsonl(tmp_path / "kept.jsonl", kept), say=said.append, **{**QUICK, "epochs": 1},
    )  # fmt: skip
    assert report["classes"] == ("a", "b", "c", "d")
    assert "of the held-out labels, no row to train on has c, d" in said


MISTAKES = {
    "model good.csv --text body": "there must be a column body, the columns are text, label",
    "model good.csv --label verdict": "there must be a column verdict, the columns are text, label",
    "model good.csv --text text --label text": "one column or two must hold texts and another the label",
    "model one.csv": "there must be two labels at least in label, all rows have x",
    "model unlabelled.csv": "unlabelled.csv must hold rows with text and label, it holds none: .* 2 of 2 rows left out",
    "model same.csv": "there must be two different texts at least, one of them to hold out, got 1",
    "model empty.csv": "empty.csv must hold rows, it holds none",
    "model strange.csv": "name the column of the label with --label, the columns are a, b",
    "model twice.csv": "twice.csv must name each column once, it names 'text' more than once",
    "model many.csv": "label has 40 different labels in 40 rows, too many to learn",
    "model good.xlsx": "the data must be a file of .csv, .tsv, .jsonl, .ndjson, got good.xlsx",
    "model nowhere.csv": "No such file or directory: nowhere.csv",
    "model latin.csv": "latin.csv must be UTF-8 text, it is not: invalid continuation byte",
    "model good.csv --length 4": "length must be at least 5, got 4",
    "model good.csv --out odd --overwrite": "odd must be new or empty, it holds finetune.json: choose another --out",
    "model good.csv --task parsing": "invalid choice 'parsing' for argument '--task'",
    "model good.csv --epochs 0": "epochs must be above 0, got 0",
    "model good.csv --out foreign": "foreign must be new or empty, it holds thesis.tex: choose another --out",
    "model good.csv --learning-rate 1e38 --epochs 2": "the training has diverged by step 2, its weights are no longer",
    "model good.csv --learning-rate 1e30 --epochs 30": "the training has diverged by step .* choose a --learning-rate",
    "nowhere good.csv": "nowhere must be a folder with a model, as pretrain or save_pretrained write it, it is none",
    "cut good.csv": "cut holds no model that can be read: ",
    "foreign good.csv": "foreign must hold the model's tokenizer: ",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "good.csv": "text,label\n" + "a,x\nb,y\nc,x\nd,y\n" * 3, "one.csv": "text,label\na,x\nb,x\n",
        "unlabelled.csv": "text,label\na,\nb,\n", "same.csv": "text,label\na,x\na,y\n", "empty.csv": "text,label\n",
        "strange.csv": "a,b\n1,2\n3,4\n5,6\n", "twice.csv": "text,text\na,b\n", "good.xlsx": "",
        "many.csv": "text,label\n" + "".join(f"t{i},l{i}\n" for i in range(40)),
    }  # fmt: skip
    for name, content in files.items():
        Path(name).write_text(content, encoding="utf-8")
    Path("latin.csv").write_bytes("text,label\nnaïve,x\n".encode("latin-1"))
    Path("odd").mkdir()
    Path("odd", "finetune.json").write_text("{}", encoding="utf-8")
    Path("foreign").mkdir()
    Path("foreign", "thesis.tex").touch()
    Path("model").symlink_to(model)
    shutil.copytree(model, "cut", ignore=shutil.ignore_patterns("training"))
    Path("cut", "model.safetensors").write_bytes(Path(model, "model.safetensors").read_bytes()[:-1])
    Path("runs").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["finetune", *command.split()]) == 2
    error = capsys.readouterr().err
    start, _, end = MISTAKES[command].partition(" .* ")
    assert error.startswith("hydra-ssm: error: ")
    assert error.count("\n") == 1
    assert start in error
    assert end in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["reviews", "words"])
def test_rows_that_are_cut_are_counted_and_said(kind: str, model: Path, tmp_path: Path) -> None:
    """A classifier of documents that reads only their first words should not come as a surprise."""
    examples = reviews(19) if kind == "reviews" else tagged(19)
    data = tmp_path / "rows.jsonl"
    examples.append({name: value if name == "verdict" else 20 * value for name, value in examples[0].items()})
    data.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    told: dict[int, str] = {}
    for length in (40, 4000):
        said: list[str] = []
        finetune(
            model, data, tmp_path / str(length), held_out=data, say=said.append, **{**QUICK, "epochs": 1},
            length=length,
        )  # fmt: skip
        told[length] = "\n".join(said)
    assert "1 of 20 rows to train on are cut at 40 tokens: --length takes more" in told[40]
    assert "cut at" not in told[4000]


def test_a_folder_of_another_size_is_no_model(model: Path, tmp_path: Path) -> None:
    """Weights that are not those of the configuration are never drawn at random."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    data = write_csv(tmp_path / "reviews.csv", reviews(20))
    with pytest.raises(UserError, match=r"must hold all weights of its encoder, it lacks model\.encoder\.layers\.1\."):
        finetune(tmp_path, data, tmp_path / "out", say=len)
    assert not (tmp_path / "out").exists()


def test_models_of_others_are_fine_tuned_too(model: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    words = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=9, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    data = write_csv(tmp_path / "reviews.csv", reviews())
    said: list[str] = []
    report = finetune(tmp_path / "bert", data, tmp_path / "out", say=said.append, **QUICK)  # rows are cut at 9 tokens
    assert "72 of 72 rows to train on are cut at 9 tokens, the most that the model reads" in said
    assert report["metrics"]["accuracy"] == 1
    assert pipeline("text-classification", model=str(tmp_path / "out"))("the cat sees a tree")[0]["label"] == "good"
