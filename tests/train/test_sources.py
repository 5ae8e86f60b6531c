"""Documents from wherever text is."""

import json
from pathlib import Path

import pytest

from hydra_ssm.train.reference_text import SHORTEST, language_reference
from hydra_ssm.train.sources import Corpus, open_corpus, open_source


def test_a_folder_gives_its_text_files_and_those_of_its_folders(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    files = {"b.txt": "bé", "deep/a.md": "a", "deep/er/c.rst": "c", "empty.txt": "", ".git/d.txt": "d", "e.py": "e"}
    files["blank.md"] = "\ufeff \n\n\t\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"^1 of 6 files in .* are of other kinds and left alone, such as e\.py$"):
        assert list(open_source(str(tmp_path), "text")) == ["bé", "a", "c"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "folder of parquet", "saved", "saved with splits"])
def test_a_data_set_gives_its_texts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = ["one", "two\nlines", "three"]
    data = Dataset.from_dict({"n": [1, 2, 3], "body": texts})
    path = tmp_path / "data"
    if kind == "saved":
        data.save_to_disk(path)
    elif kind == "saved with splits":
        DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    elif kind == "folder of parquet":
        path.mkdir()
        data.to_parquet(path / "part.parquet")
    else:
        path = path.with_suffix(f".{kind}")
        {"jsonl": data.to_json, "parquet": data.to_parquet, "csv": data.to_csv}[kind](path)
    assert list(open_source(str(path), "body")) == texts
    with pytest.raises(ValueError, match=r"a column of texts named n, it has n \(int64\), body \(\w*string\): choose"):
        open_source(str(path), "n")


def test_a_folder_of_two_kinds_of_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "much"}\n', encoding="utf-8")
    (tmp_path / "README.md").write_text("how it was collected", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text or data files, it holds both: name data/train.jsonl or README.md"):
        open_source(str(tmp_path), "text")
    (tmp_path / "README.md").write_text("\n", encoding="utf-8")
    (tmp_path / "data" / "more.csv").write_text("text\nmore\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data files must be of one kind, .* holds csv, json"):
        open_source(str(tmp_path), "text")


@pytest.mark.parametrize("names", [("train", "test"), ("data/train-0", "data/validation-0"), ("a/b", None)])
def test_other_splits_of_a_folder_are_not_trained_on(
    names: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in filter(None, names):
        path = tmp_path / "folder" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    assert list(open_source(str(tmp_path / "folder"), "text")) == [names[0]]


def test_one_document_in_twenty_is_held_out() -> None:
    documents = [str(i) for i in range(60)]
    split = list(Corpus([documents[:7], documents[7:]]))
    assert [text for _, text in split] == documents
    assert [text for held_out, text in split if held_out] == ["10", "30", "50"]


def test_the_end_of_each_of_a_few_documents_is_held_out_and_no_line_is_cut() -> None:
    documents = ["".join(f"line {i}\n" for i in range(n)) for n in (40, 200)]
    split = list(Corpus([documents]))
    assert "".join(text for _, text in split) == "".join(documents)
    kept = [text for held_out, text in split if held_out]
    assert all(text.startswith("line ") and text.endswith("\n") for text in kept)
    assert 0.03 < sum(map(len, kept)) / sum(map(len, documents)) < 0.06


def test_what_is_held_out_by_the_user_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    corpus = open_corpus([str(tmp_path / "train.txt")], [str(tmp_path / "valid.txt")])
    assert list(corpus) == [(False, "train"), (True, "valid")]


def test_no_text_is_given_twice(tmp_path: Path) -> None:
    """Of two copies of a document one may be held out."""
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text(name, encoding="utf-8")
    folder, file = str(tmp_path / "texts"), str(tmp_path / "texts" / ".." / "texts" / "a.txt")
    with pytest.raises(ValueError, match=r"each source must be given once, .*texts/a.txt is in two"):
        open_corpus([folder, file])


def test_a_text_may_be_trained_on_twice_where_another_is_held_out(tmp_path: Path) -> None:
    """So much more it weighs; held-out texts may overlap, too."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    a, b = (str(tmp_path / f"{name}.txt") for name in ("a", "b"))
    assert list(open_corpus([a, a], [b, b])) == [(False, "a"), (False, "a"), (True, "b"), (True, "b")]


def test_a_data_set_is_not_trained_on_and_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"body": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"must not be trained on, .*rows.jsonl is in both"):
        open_corpus([str(tmp_path / "rows.jsonl")], ["rows.jsonl"], "body")
    Path("more.txt").write_text("b", encoding="utf-8")
    assert list(open_corpus(["rows.jsonl"], ["more.txt"], "body")) == [(False, "a"), (True, "b")]


def test_no_held_out_paragraph_of_the_language_reference_is_trained_on() -> None:
    def paragraphs(texts: list[str]) -> list[str]:
        found = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
        return [part for part in found if len(part) >= SHORTEST]

    train, held_out = (paragraphs(texts) for texts in language_reference())
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    sizes = [sum(map(len, part)) for part in (train, held_out)]
    assert sizes[0] > 250_000
    assert 0.05 < sizes[1] / sum(sizes) < 0.2
