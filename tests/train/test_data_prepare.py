"""Text to shards: nothing is lost, doubled or silently left out, whatever the input and however often it is stopped."""

import contextlib
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import LONGEST, alive, children, start, wait_until
from small_text import NOUNS, sentences

from hydra_ssm.cli import main
from hydra_ssm.text.collators import MaskedLMCollator, Row
from hydra_ssm.text.tokenizer import load_tokenizer, train_tokenizer
from hydra_ssm.train.checkpoints import MANIFEST, UNFINISHED
from hydra_ssm.train.data import documents, inputs, pipeline, prepare, shards
from hydra_ssm.train.data.documents import document
from hydra_ssm.train.data.inputs import Input
from hydra_ssm.train.data.prepare import prepare_shards
from hydra_ssm.train.data.settings import Settings
from hydra_ssm.train.data.shards import Layout, ShardRows, TokenSequence, is_shards, pieces_of, sha256, write_shard
from hydra_ssm.train.data.tokens import Words
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.packing import pack, pieces

TOKENIZER = train_tokenizer([sentences(100)], 90)
TEXTS = [f"{i} " + sentences(1 + i * i % 37, seed=i) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prepared(tokenizer: str, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """(manifest, folder) of sources."""

    def prepare_here(*sources: object, **changes: Any) -> tuple[dict[str, Any], Path]:
        out = tmp_path / "shards"
        settings = Settings(tuple(map(str, sources)), tokenizer, **{"length": 32, "held_out": 0.0, **changes})
        return prepare_shards(settings, out, jobs=1), out

    return prepare_here


def write_lines(path: Path, texts: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def found(out: Path, split: str = "train") -> Counter[tuple[int, ...]]:
    """All pieces of a split."""
    rows = ShardRows(out, split)
    parts = (np.split(ids, lengths.cumsum()[:-1]) for ids, lengths in (rows[i] for i in range(len(rows))))
    return Counter(tuple(part.tolist()) for row in parts for part in row)


def expected(texts: Sequence[str], length: int = 32) -> Counter[tuple[int, ...]]:
    return Counter(tuple(piece) for piece in pieces(texts, TOKENIZER, length))


def assert_adds_up(manifest: dict[str, Any]) -> None:
    assert manifest["read"] == manifest["kept"] + sum(manifest["skipped"].values())
    assert manifest["kept"] == sum(split["documents"] for split in manifest["splits"].values())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def shards_of(settings: Settings, name: str) -> dict[str, bytes]:
    prepare_shards(settings, Path(name), jobs=1)
    return contents(Path(name))


# ------------------------------------------------------------------------------------------------------------- tokens


@given(
    st.lists(st.text("theca .\n\t\r\x1c\x85\xa0\u3000\u200b\u0301é中文Σ[MASK]-'x\ufffd\x07ß", max_size=60), max_size=5)
)
def test_words_that_are_looked_up_are_those_of_the_whole_text(texts: list[str]) -> None:
    words = Words(TOKENIZER.backend_tokenizer.to_str())
    assert words.by_word
    for _ in range(2):  # new words, known words
        ids, lengths = words(texts)
        whole = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [part.tolist() for part in np.split(ids, lengths.cumsum())][:-1] == whole


def test_a_tokenizer_of_other_rules_gets_whole_texts() -> None:
    settings = json.loads(TOKENIZER.backend_tokenizer.to_str())
    settings["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " a "}, "behavior": "Isolated", "invert": False}
    words = Words(json.dumps(settings))
    assert not words.by_word
    ids, lengths = words(["the cat sees a dog.", "cat"])
    assert ids.tolist() == [
        n for text in ("the cat sees a dog.", "cat") for n in words.tokenizer.encode(text).ids[1:-1]
    ]
    assert len(lengths) == 2


# ------------------------------------------------------------------------------------------------------------- inputs


def write_as(kind: str, folder: Path, texts: list[str]) -> Path:
    from datasets import Dataset

    table, path = pa.table({"n": range(len(texts)), "text": texts}), folder / f"data.{kind}"
    if kind == "txt":
        path = folder / "texts"
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:03}.txt").write_text(text, encoding="utf-8")
    elif kind in ("txt.gz", "txt.zst", "jsonl.gz", "jsonl.zst", "jsonl", "json.gz"):
        data = write_lines(path, texts).read_bytes() if "json" in kind else "\n\n\n".join(texts).encode()
        path.write_bytes(
            gzip.compress(data) if "gz" in kind else pa.compress(data, "zstd", asbytes=True) if "zst" in kind else data
        )
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(table, path, row_group_size=10)
    else:
        data = Dataset(table)
        data.to_csv(path) if kind == "csv" else data.save_to_disk(path)
    return path


KINDS = ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "csv", "parquet", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_gives_the_same_documents(kind: str, prepared: Callable, tmp_path: Path) -> None:
    source = write_as(kind, tmp_path, TEXTS)
    manifest, out = prepared(source, documents="paragraph" if "txt." in kind else "file")
    assert found(out) == expected(TEXTS)
    assert manifest["kept"] == manifest["read"] == len(TEXTS)
    assert_adds_up(manifest)


def test_a_line_can_be_a_document(prepared: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat.\r\n\r\na dog.\r\nthe end", encoding="utf-8")
    manifest, out = prepared(tmp_path / "a.txt", documents="line")
    assert found(out) == expected(["the cat.", "a dog.", "the end"])
    assert manifest["skipped"]["empty"] == 1
    assert_adds_up(manifest)


@pytest.mark.parametrize("broken", [False, True])
def test_rows_of_a_data_set_are_streamed(broken: bool) -> None:
    def rows() -> Any:
        yield {"text": "one"}
        yield {"text": None}
        yield {"other": "two"}
        if broken:
            raise RuntimeError("the network\nis gone")

    items = list(Input("some/set", open=rows).items("file", "text"))
    assert [item.text or item.problem for item in items] == ["one", "empty", "malformed"] + ["damaged"] * broken
    assert not broken or items[-1].where == "some/set: the network"


def test_a_document_longer_than_a_part_is_cut_and_loses_nothing(
    prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PART", 100)
    text = sentences(30) + "é中" * 200 + "\n" + "the " * 100
    for number, (source, documents_are) in enumerate([("a.txt", "file"), ("a.txt", "line"), ("a.jsonl", "file")]):
        path = tmp_path / source
        path.write_text(text, encoding="utf-8") if source == "a.txt" else write_lines(path, [text])
        items = list(Input(source, path).items(documents_are, "text"))
        assert "".join(item.text for item in items).replace("\n", "") == text.replace("\n", "")
        assert max(len(item.text.encode()) for item in items) <= (100 if number < 2 else 300)
        assert [item.cut for item in items].count(False) == (31 + 1 if documents_are == "line" else 1)
        assert not any(item.repaired or item.problem for item in items)


# ------------------------------------------------------------------------------------------ what is not as it should be


def test_a_truncated_file_gives_what_is_before_its_end_and_is_named(prepared: Callable, tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(NOUNS, k=12)) for _ in range(20_000)]
    for kind in ("jsonl.gz", "jsonl.zst"):
        path = write_as(kind, tmp_path, texts)
        path.write_bytes(path.read_bytes()[:-3000])
    write_lines(tmp_path / "whole.jsonl", ["the dog"])
    manifest, _ = prepared(tmp_path)
    assert manifest["skipped"]["damaged"] == 2
    assert [place.partition(": ")[0] for place in manifest["examples"]["damaged"]] == [
        str(tmp_path / f"data.jsonl.{end}") for end in ("gz", "zst")
    ]
    assert 15_000 < manifest["kept"] < 20_001
    assert manifest["kept"] + manifest["skipped"]["duplicate"] > 30_000
    assert_adds_up(manifest)


def test_a_truncated_text_file_keeps_its_lines(prepared: Callable, tmp_path: Path) -> None:
    data = gzip.compress(sentences(3000).encode())
    (tmp_path / "a.txt.gz").write_bytes(data[:-1000])
    (tmp_path / "b.txt.gz").write_bytes(b"this is no gzip")
    (tmp_path / "c.txt").write_bytes(b"a cat.")
    manifest, _ = prepared(tmp_path)
    assert (manifest["kept"], manifest["skipped"]["damaged"]) == (2, 2)
    assert 30_000 < manifest["bytes"] < len(sentences(3000))
    assert_adds_up(manifest)


def test_a_damaged_row_group_leaves_the_others(prepared: Callable, tmp_path: Path) -> None:
    texts = [f"{i} the cat sees {random.Random(i).random()}" for i in range(90)]
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"text": texts}), path, row_group_size=30, compression="gzip", use_dictionary=False)
    place = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 200] = bytes(200)
    path.write_bytes(data)
    (tmp_path / "cut.parquet").write_bytes(bytes(data[:-100]))
    manifest, out = prepared(tmp_path)
    assert found(out) == expected(texts[:30] + texts[60:])
    assert manifest["skipped"]["damaged"] == 2
    assert "row group 1" in " ".join(manifest["examples"]["damaged"])
    assert_adds_up(manifest)


def test_checksums_of_parquet_pages_are_heeded_where_a_file_has_them(prepared: Callable, tmp_path: Path) -> None:
    texts = [f"{i} the cat" for i in range(90)]
    for name, has in (("with", True), ("without", False)):
        path = tmp_path / f"{name}.parquet"
        table = pa.table({"text": [f"{text} sees {name}" for text in texts]})
        parquet.write_table(table, path, 30, compression="none", use_dictionary=False, write_page_checksum=has)
        path.write_bytes(path.read_bytes().replace(b"45 the cat", b"45 the rat", 1))
    manifest, _ = prepared(tmp_path)
    assert (manifest["kept"], manifest["skipped"]["damaged"]) == (60 + 90, 1)
    assert "with.parquet: row group 1" in manifest["examples"]["damaged"][0]


def test_a_damaged_file_of_a_saved_data_set_leaves_the_others(prepared: Callable, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    texts = [f"{i} the cat sees {random.Random(i).random()}" for i in range(90)]
    folder = tmp_path / "saved"
    DatasetDict(train=Dataset.from_dict({"text": texts})).save_to_disk(folder, num_shards={"train": 3})
    cut, missing = (folder / "train" / f"data-0000{i}-of-00003.arrow" for i in (0, 1))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    missing.unlink()
    other = tmp_path / "other"
    Dataset.from_dict({"text": texts[:30]}).save_to_disk(other)
    (other / "state.json").write_text("{}", encoding="utf-8")
    manifest, out = prepared(folder, other, write_lines(tmp_path / "a.jsonl", ["the dog"]))
    assert found(out) == expected([*texts[60:], "the dog"])
    assert manifest["skipped"]["damaged"] == 3
    places = [place.partition(": ")[0] for place in manifest["examples"]["damaged"]]
    assert places == [str(cut), str(missing), str(other)]
    assert_adds_up(manifest)


def test_a_file_of_a_saved_data_set_that_is_cut_between_batches_is_damaged(prepared: Callable, tmp_path: Path) -> None:
    from datasets import Dataset

    texts = [f"{i} the cat sees {i * i}" for i in range(30)]
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    manifest, _ = prepared(tmp_path / "saved")
    assert (manifest["kept"], manifest["skipped"]["damaged"]) == (30, 1)
    assert "ends between two batches" in manifest["examples"]["damaged"][0]


def test_damage_within_a_saved_data_set_is_found(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["the cat"] * 100}).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    data = bytearray(path.read_bytes())
    place = data.index(bytes([7, 0, 0, 0, 14, 0, 0, 0]))  # where the second and third text begin
    data[place + 3] = 0x7F
    path.write_bytes(data)
    items = list(Input("saved", saved=tmp_path / "saved").items("file", "text"))
    assert [item.problem for item in items] == ["damaged"]


def test_a_saved_data_set_without_training_rows_is_refused(prepared: Callable, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(test=Dataset.from_dict({"text": ["a cat"]})).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved must have a split train, it has test$"):
        prepared(write_lines(tmp_path / "a.jsonl", ["the dog " * 150_000]), tmp_path / "saved", shard_tokens=100)
    assert not (tmp_path / "shards").exists()


def test_files_with_nothing_in_them_are_counted_and_named(prepared: Callable, tmp_path: Path) -> None:
    names = {"damaged": ["a.jsonl.gz", "b.csv.zst"], "empty": ["c.jsonl", "d.csv", "e.json", "f.jsonl.gz"]}
    for name in (*names["damaged"], *names["empty"]):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name == "f.jsonl.gz" else b"")
    write_lines(tmp_path / "whole.jsonl", ["the dog"])
    manifest, _ = prepared(tmp_path)
    for problem, files in names.items():
        assert manifest["skipped"][problem] == len(files)
        assert [Path(place.partition(":")[0]).name for place in manifest["examples"][problem]] == files
    assert_adds_up(manifest)


def test_bad_records_are_counted_by_kind_and_the_others_kept(prepared: Callable, tmp_path: Path) -> None:
    good = ["the cat.", "a dog.", "half \ud83d of a pair " + "the cat " * 20, "the tree."]
    lines = [
        *(json.dumps({"text": text}).encode() for text in good),
        b'{"text": "a naive' + b" cat" * 60 + b' \xe9"}',  # one bad byte: repaired
        b'{"text": "\xe9\xe8\xe9"}', b'{"text": "a\\u0000b"}', b'{"text": ', b"[1, 2]", b'{"body": "cat"}',
        b'{"text": 7}', b'{"text": null}', b'{"text": " \\n"}', b'{"text": " the cat.\\n"}', b'{"text": "\\u0007"}',
        b"",
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    manifest, out = prepared(tmp_path / "a.jsonl")
    assert manifest["skipped"] == {
        "empty": 2, "duplicate": 1, "malformed": 4, "too long": 0, "binary": 1, "not UTF-8": 1, "no tokens": 1,
        "damaged": 0,
    }  # fmt: skip
    assert manifest["kept"] == 5
    assert manifest["repaired"] == 2
    assert found(out) == expected([*good[:2], "half  of a pair " + "the cat " * 20, good[3], "a naive" + " cat" * 60])
    assert manifest["examples"]["malformed"][0].startswith(f"{tmp_path}/a.jsonl:8: Expecting value")
    assert "no text named text in body: choose one by --column" in manifest["examples"]["malformed"][2]
    assert_adds_up(manifest)


def test_a_record_that_fits_no_memory_is_passed_over(
    prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 100)
    manifest, out = prepared(write_lines(tmp_path / "a.jsonl", ["a cat.", "the " * 200, "a dog."]))
    assert manifest["skipped"]["too long"] == 1
    assert found(out) == expected(["a cat.", "a dog."])


def test_a_stray_quote_or_a_ragged_row_of_csv_costs_its_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f"{i},text {i}" for i in range(20)]
    rows[3], rows[9] = '"3,text 3', '"9,text 9'
    rows[12:14] = ["12", "13,a,text 13"]
    legal = 'x,"two\r\nlines, ""quoted"""'
    path.write_bytes("\r\n".join(["n,text", *rows, legal]).encode())
    items = list(Input("a", path).items("file", "text"))
    kept = [f"text {i}" for i in range(20) if i not in (3, 9, 12, 13)]
    assert [item.text for item in items if not item.problem] == [*kept, 'two\nlines, "quoted"']
    assert [item.where.partition(": ")[0] for item in items if item.problem] == ["a:5", "a:11", "a:14", "a:15"]
    assert {item.problem for item in items} == {"", "malformed"}


def test_a_truncated_file_without_line_ends_keeps_what_is_before(tmp_path: Path) -> None:
    text = " ".join(random.Random(0).choices(NOUNS, k=50_000))
    data = gzip.compress(text.encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data[: len(data) * 9 // 10])
    items = list(Input("a", path).items("file", "text"))
    assert [item.problem for item in items] == ["", "damaged"]
    assert text.startswith(items[0].text)
    assert len(items[0].text) > 0.8 * len(text)


def test_files_that_are_no_text_are_counted_and_named(prepared: Callable, tmp_path: Path) -> None:
    for name, data in {"a.txt": b"a cat.", "b.txt": b"", "c.txt": b"\0\1", "d.txt": "naïve".encode("latin-1")}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "picture.png").write_bytes(b"")
    manifest, _ = prepared(tmp_path)
    assert manifest["kept"] == 1
    assert {name for name, count in manifest["skipped"].items() if count} == {"empty", "binary", "not UTF-8"}
    assert manifest["files_of_other_kinds"] == {"count": 1, "examples": [f"{tmp_path}/picture.png"]}
    assert_adds_up(manifest)


def test_what_else_lies_in_a_folder_is_counted_too(
    prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "texts", tmp_path / "other"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    other.mkdir()
    for path in (folder / "a.txt", folder / "deep" / "b.txt", folder / "deep" / ".hidden" / "c.txt", other / "d.txt"):
        path.write_text(f"the cat sees {path.name}", encoding="utf-8")
    for name, target in {
        "link": other,
        "loop": folder,
        "gone.txt": tmp_path / "x",
        "file.txt": other / "d.txt",
    }.items():
        (folder / name).symlink_to(target)
    manifest, _ = prepared(folder)
    assert manifest["kept"] == 3
    others = [str(folder / name) for name in ("gone.txt", "link", "loop")]
    assert manifest["files_of_other_kinds"] == {"count": 3, "examples": others}

    scan = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"cannot read the folder .*deep: Permission denied"):
        prepared(folder)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_bytes_that_are_no_utf8_count_alike_in_every_kind_of_record(
    kind: str, prepared: Callable, tmp_path: Path
) -> None:
    texts = [b"a cat " * 40 + b"\xe9", b"a naive\xe9", b"the tree \xef\xbf\xbd", b"a dog. " * 40]
    data = {
        "jsonl": b"".join(b'{"text": "%b"}\n' % text for text in texts),
        "json": b"[" + b", ".join(b'{"text": "%b"}' % text for text in texts) + b"]",
        "csv": b"n,text\n" + b"".join(b"0,%b\n" % text for text in texts),
    }
    (tmp_path / f"a.{kind}").write_bytes(b"\xef\xbb\xbf" + data[kind])  # behind a byte order mark
    manifest, out = prepared(tmp_path / f"a.{kind}")
    assert found(out) == expected(["a cat " * 40, "the tree \ufffd", "a dog. " * 40])
    assert (manifest["repaired"], manifest["skipped"]["not UTF-8"], manifest["read"]) == (1, 1, 4)


def test_columns_of_text_have_several_types_and_others_are_named(prepared: Callable, tmp_path: Path) -> None:
    texts = pa.array(["the cat", None, "a dog", "the cat sees"])
    columns = [texts.dictionary_encode(), texts.cast(pa.string_view()), texts.cast(pa.large_string())]
    for column in columns:
        parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        items = list(Input("a", tmp_path / "a.parquet").items("file", "text"))
        assert [item.text or item.problem for item in items] == ["the cat", "empty", "a dog", "the cat sees"]
    for values, kind in (([1, 2], "int64"), ([["a"]], "list<element: string>")):
        parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
        items = list(Input("a", tmp_path / "a.parquet").items("file", "text"))
        assert [item.where for item in items] == [f"a: text must be a text, it is of type {kind}"]
    items = list(Input("a", write_lines(tmp_path / "a.jsonl", [7])).items("file", "text"))
    assert [item.where for item in items] == ["a:1: text must be a text, it is of type int"]


@pytest.mark.parametrize("text", ["é" * 50, "x" * 999 + "é", "\ufeffcat", "a\rb\r\nc", "\ufffd"])
def test_valid_text_is_never_repaired(text: str) -> None:
    items = list(document(text.encode(), "here"))
    assert [(item.problem, item.repaired) for item in items] == [("", False)]
    assert items[0].text == text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


# ------------------------------------------------------------------------------------------------------ rows and shards


def test_long_rows_need_no_memory_before_they_are_filled() -> None:
    tracemalloc.start()
    try:
        assert pack([5, 1_000_000, 7], 1_000_000) == [[1], [2, 0]]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_rows_waste_at_most_a_hundredth() -> None:
    """Log-normal lengths as those of web pages (median 250 tokens), of paragraphs, of tweets, and all of these."""
    draw = np.random.default_rng(0)
    kinds = {"pages": (5.5, 1.0), "paragraphs": (4.2, 0.9), "short": (3.0, 0.5), "long": (8.0, 1.2)}
    lengths = {name: np.exp(draw.normal(*m, 20_000)).astype(int) + 1 for name, m in kinds.items()}
    lengths["mixed"] = np.concatenate([some[:5000] for some in lengths.values()])
    for name, some in lengths.items():
        sizes = pieces_of(some, Layout("packed", 512, 2, 3))[1] + 2
        rows = len(pack(sizes.tolist(), 512))
        assert sizes.sum() == some.sum() + 2 * (-(-some // 510)).sum()
        assert 1 - sizes.sum() / (rows * 512) <= 0.01, name


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(3, 20), st.sampled_from(["packed", "cut"]))
def test_a_shard_holds_every_token_once_or_counts_it(lengths: list[int], length: int, rows: Any) -> None:
    from tempfile import TemporaryDirectory

    tokens = np.arange(10, 10 + sum(lengths), dtype=np.uint16)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train" / "data-00000.arrow"
        path.parent.mkdir()
        facts = write_shard(path, tokens, np.array(lengths), Layout(rows, length, 2, 3))
        manifest = {"format": "hydra-ssm shards", "splits": {"train": {"shards": [facts]}}}
        (Path(folder) / MANIFEST).write_text(json.dumps(manifest))
        data = ShardRows(Path(folder), "train")
        got = found(Path(folder))
        every = data.tokens[0 : len(data.tokens)]
        assert facts["rows"] == len(data)
    documents_of = np.split(tokens, np.cumsum(lengths)[:-1])
    room = length - 2
    parts = [
        part
        for one in documents_of
        for part in np.split(one, range(room, len(one), room))[: 1 if rows == "cut" else None]
    ]
    assert got == Counter((2, *part.tolist(), 3) for part in parts)
    assert facts["tokens"] == len(every) == sum(map(len, parts)) + 2 * len(parts)
    assert facts["tokens_cut_off"] == sum(lengths) - sum(map(len, parts))


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 20), st.integers(0, 20))
def test_the_tokens_of_shards_are_one_sequence(sizes: list[int], start: int, stop: int) -> None:
    parts = [np.arange(size, dtype=np.uint16) + 10 * i for i, size in enumerate(sizes)]
    whole = np.concatenate([np.empty(0, np.uint16), *parts])
    assert len(TokenSequence(parts)) == len(whole)
    assert TokenSequence(parts)[start:stop].tolist() == whole[start:stop].tolist()


def test_rows_are_found_in_all_parts_of_all_shards(
    prepared: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCH", 500)
    monkeypatch.setattr(shards, "TOGETHER", 2)
    manifest, out = prepared(write_lines(tmp_path / "a.jsonl", TEXTS), shard_tokens=300)
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert found(out) == expected(TEXTS)
    rows = ShardRows(out, "train")
    assert np.array_equal(np.concatenate([rows[i][0] for i in range(len(rows))]), rows.tokens[:])


def test_a_cut_document_is_a_row_as_in_the_paper(prepared: Callable, tmp_path: Path) -> None:
    manifest, out = prepared(write_lines(tmp_path / "a.jsonl", TEXTS), rows="cut", length=16)
    whole = [TOKENIZER(text, truncation=True, max_length=16)["input_ids"] for text in TEXTS]
    rows = ShardRows(out, "train")
    assert [rows[i][0].tolist() for i in range(len(rows))] == whole
    cut = sum(len(TOKENIZER(text)["input_ids"]) for text in TEXTS) - sum(map(len, whole))
    assert manifest["splits"]["train"]["tokens_cut_off"] == cut > 0


def test_the_datasets_library_reads_the_shards(prepared: Callable, tmp_path: Path) -> None:
    from datasets import load_from_disk

    _, out = prepared(write_lines(tmp_path / "a.jsonl", TEXTS), shard_tokens=300, held_out=0.2)
    data = load_from_disk(str(out))
    for split in ("train", "held_out"):
        rows = ShardRows(out, split)
        assert [row["input_ids"] for row in data[split]] == [rows[i][0].tolist() for i in range(len(rows))]
        assert [row["lengths"] for row in data[split]] == [rows[i][1].tolist() for i in range(len(rows))]


def test_what_is_held_out_depends_on_the_text_alone(prepared: Callable, tmp_path: Path, tokenizer: str) -> None:
    texts = [sentences(5, seed=i) for i in range(100)]
    _, out = prepared(write_lines(tmp_path / "a.jsonl", texts), held_out=0.3, length=100)
    held_out = found(out, "held_out")
    assert found(out) + held_out == expected(texts, 100)
    assert 15 < sum(held_out.values()) < 45
    backwards = write_lines(tmp_path / "b.jsonl", [*texts[::-1], "another cat."])
    prepare_shards(Settings((str(backwards),), tokenizer, length=100, held_out=0.3), tmp_path / "other", jobs=1)
    assert held_out <= found(tmp_path / "other", "held_out")
    assert not found(tmp_path / "other") & held_out


# ------------------------------------------------------------------------------- processes, interruptions and memory


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Several files of different kinds with 3 MB of text, some of it twice."""
    folder = tmp_path_factory.mktemp("many")
    draw = random.Random(0)
    words = ["the", "cat", "dog", "tree", "sees", "likes", "finds", "a", "river", "stone"]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 300))) for _ in range(3000)]
    for i in range(3):
        write_lines(folder / f"{i}.jsonl", [*texts[1000 * i : 1000 * i + 1000], texts[7], "", 3])
    parquet.write_table(pa.table({"text": texts[:50]}), folder / "last.parquet")
    return [str(folder / name) for name in ("0.jsonl", "1.jsonl", "last.parquet", "2.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(many: list[str], tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("once") / "shards"
    settings = Settings(tuple(many), tokenizer, length=64, held_out=0.02, shard_tokens=20_000)
    manifest = prepare_shards(settings, out, jobs=1)
    assert len(manifest["splits"]["train"]["shards"]) > 2
    assert manifest["skipped"]["duplicate"] == 50 + 3
    assert_adds_up(manifest)
    return out


def command(many: list[str], tokenizer: str, out: Path, jobs: int) -> list[str]:
    options = ["--length=64", "--held-out=0.02", "--shard-tokens=20000", f"--jobs={jobs}"]
    return ["data", "prepare", *many, "--tokenizer", tokenizer, "--out", str(out), *options]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_killed_preparation_goes_on_in_other_processes_to_the_same_bytes(
    many: list[str], tokenizer: str, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    process = start(main, command(many, tokenizer, out, 2))
    wait_until(lambda: [*out.glob("train/data-*.arrow")], process)
    workers = children(process.pid)
    process.kill()
    process.join()
    assert not (out / MANIFEST).exists()
    with pytest.raises(UserError, match="must hold shards with a manifest"):
        ShardRows(out, "train")
    assert main(command(many, tokenizer, out, 1)) == 0
    assert contents(out) == contents(uninterrupted)
    assert workers
    wait_until(lambda: not any(map(alive, workers)))


class Killed(BaseException):
    """Stands for a kill at a chosen place."""


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_wherever_it_is_interrupted_the_result_is_the_same(
    batch: int, many: list[str], tokenizer: str, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(tuple(many), tokenizer, length=64, held_out=0.02, shard_tokens=20_000)
    plain = prepare_shards(settings, tmp_path / "plain", jobs=1)
    assert contents(tmp_path / "plain") == contents(uninterrupted)
    monkeypatch.setattr(pipeline, "BATCH", 20_000)
    first = prepare_shards(settings, tmp_path / "once", jobs=1)
    assert first["kept"] == plain["kept"]

    interruptions = left = 0

    def kill(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    for interruptions in range(4):
        left = batch + 9 * interruptions
        try:
            prepare_shards(settings, tmp_path / "often", jobs=1, show=kill)
        except Killed:
            continue
        break
    prepare_shards(settings, tmp_path / "often", jobs=1)
    assert interruptions
    assert contents(tmp_path / "often") == contents(tmp_path / "once")


CAPPED = """
import resource, sys
from pathlib import Path
from hydra_ssm.train.data.prepare import prepare_shards
from hydra_ssm.train.data.settings import Settings
source, tokenizer, out, warm, small, cap = sys.argv[1:]
settings = dict(tokenizer=tokenizer, shard_tokens=100_000, documents="file")
prepare_shards(Settings((small,), **settings), Path(warm), jobs=1)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + int(cap), used + int(cap)))
print(prepare_shards(Settings((source,), **settings), Path(out), jobs=1)["bytes"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory in use from /proc")
def test_memory_does_not_grow_with_the_text(tokenizer: str, tmp_path: Path) -> None:
    """A file of 46 MB, in what one of 3 MB took and 40 MB more."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(NOUNS, k=200)) for _ in range(2000)]
    with (
        gzip.open(tmp_path / "large.txt.gz", "wt", compresslevel=1) as large,
        open(tmp_path / "small.txt", "w") as small,
    ):
        for i in range(45_000):
            line = f"{i} {lines[i % 2000]}\n"
            large.write(line)
            if i < 3000:
                small.write(line)
    names = ("out", "warm", "small.txt")
    given = map(str, [tmp_path / "large.txt.gz", tokenizer, *(tmp_path / name for name in names), 40 << 20])
    run = subprocess.run(
        [sys.executable, "-c", CAPPED, *given], capture_output=True, text=True, timeout=LONGEST, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 45_000_000


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str) -> Path:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [*TEXTS, TEXTS[0]])
    Path("empty.txt").write_bytes(b" ")
    Path("foreign").mkdir()
    Path("foreign", "thesis.tex").write_text("years of work", encoding="utf-8")
    Path("tokenizer").symlink_to(tokenizer)
    return tmp_path


PREPARE = [
    "data",
    "prepare",
    "a.jsonl",
    "--tokenizer",
    "tokenizer",
    "--length",
    "32",
    "--held-out",
    "0.1",
    "--jobs",
    "1",
]
SHORT = ["--batch-size", "2", "--steps", "2"]


def test_pretrain_trains_from_shards_as_from_their_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREPARE, "--out", "shards"]) == 0
    shown = capsys.readouterr().out
    assert "left out: 1 documents that occurred before" in shown
    assert shown.endswith("next: hydra-ssm pretrain shards\n")
    assert main(["pretrain", "shards", *SHORT, "--out", "run"]) == 0
    metrics = json.loads(Path("run", "metrics.json").read_text(encoding="utf-8"))
    manifest = json.loads(Path("shards", MANIFEST).read_text(encoding="utf-8"))
    assert metrics["training_tokens"] == manifest["splits"]["train"]["tokens"]
    assert metrics["held_out_tokens"] == manifest["splits"]["held_out"]["tokens"] > 0
    assert metrics["fill"] == pytest.approx(manifest["fill"], abs=1e-6)
    assert manifest["tokenizer"]["sha256"] == sha256(Path("shards/tokenizer/tokenizer.json"))
    assert load_tokenizer("run").get_vocab() == TOKENIZER.get_vocab()
    assert not Path("run", "training", "train").exists()  # not copied


@pytest.mark.usefixtures("warm_processes")
def test_shards_are_checked_before_they_are_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREPARE, "--out", "shards"]) == 0
    assert main(["pretrain", "shards", *SHORT, "--out", "run"]) == 0
    for file in ("finished.json",):
        Path("run", "training", file).unlink()
    shard = Path("shards/train/data-00000.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    for command_line in (["pretrain", "shards", *SHORT, "--out", "new"], ["pretrain", "--out", "run", "--resume"]):
        assert main(command_line) == 2
        assert "damaged (train/data-00000.arrow has changed)" in capsys.readouterr().err
    assert main([*PREPARE[:-2], "--rows", "cut", "--out", "shards", "--overwrite"]) == 0
    assert main(["pretrain", "--out", "run", "--resume"]) == 2
    assert "must be the shards that the run began with" in capsys.readouterr().err


def test_held_out_text_may_be_given_for_shards_without_any(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREPARE, "--held-out", "0", "--out", "shards"]) == 0
    assert "note: no document is held out: prepare again with a larger --held-out" in capsys.readouterr().out
    assert main(["pretrain", "shards", *SHORT, "--out", "run"]) == 2
    assert "shards must hold out text to evaluate on, it holds out none" in capsys.readouterr().err
    Path("valid.txt").write_text(sentences(40, seed=99), encoding="utf-8")
    overlapping = ["valid.txt", "./valid.txt"]  # of which nothing is trained on
    assert main(["pretrain", "shards", *SHORT, "--held-out", *overlapping, "--out", "run"]) == 0
    metrics = json.loads(Path("run", "metrics.json").read_text(encoding="utf-8"))
    assert metrics["held_out_tokens"] == 2 * sum(len(p) * n for p, n in expected([sentences(40, seed=99)]).items())


def test_rows_of_shards_are_masked_and_keep_their_documents_apart(here: Path) -> None:
    assert main([*PREPARE, "--out", "shards"]) == 0
    rows = ShardRows(Path("shards"), "train")
    batch = MaskedLMCollator(TOKENIZER, 0.3)([Row(*rows[i], key=(0, i)) for i in range(4)])
    ends = batch["cu_seqlens"][1:].long() - 1
    assert (batch["input_ids"][0, ends] == TOKENIZER.sep_token_id).all()
    assert (batch["input_ids"][0, batch["cu_seqlens"][:-1].long()] == TOKENIZER.cls_token_id).all()
    assert batch["input_ids"].shape[1] == sum(len(rows[i][0]) for i in range(4))


def test_the_same_command_again_finds_its_work_done_and_others_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PREPARE, "--out", "shards"]) == 0
    before = {p: p.stat().st_mtime_ns for p in Path("shards").rglob("*")}
    assert main([*PREPARE, "--out", "shards"]) == 0
    assert {p: p.stat().st_mtime_ns for p in Path("shards").rglob("*")} == before
    assert main([*PREPARE, "--rows", "cut", "--out", "shards"]) == 2
    assert "shards holds shards of other settings: choose another --out, or add --overwrite" in capsys.readouterr().err
    write_lines(Path("a.jsonl"), [*TEXTS, "another cat"])
    assert main([*PREPARE, "--out", "shards"]) == 2
    assert "shards holds shards of other files than there are now" in capsys.readouterr().err


def test_names_that_are_no_utf8_are_told_and_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [os.fsdecode(b"\xff.jsonl"), os.fsdecode(b"\xff.jsonl.gz")]
    try:
        Path(names[0]).write_text('{"text": "the cat"}\n{"half\\ud800": 1}\n', encoding="utf-8")
    except OSError:
        pytest.skip("needs a file system that takes such names")
    Path(names[1]).write_bytes(b"no gzip")
    assert main([*PREPARE[:2], *names, *PREPARE[3:], "--out", "shards"]) == 0
    assert "\\udcff.jsonl.gz: Not a gzipped file" in capsys.readouterr().out
    manifest = json.loads(Path("shards", MANIFEST).read_text(encoding="utf-8"))
    assert [source["name"] for source in manifest["inputs"]] == names
    assert "half\ud800" in manifest["examples"]["malformed"][0]
    assert main([*PREPARE[:2], *names, *PREPARE[3:], "--out", "shards"]) == 0  # they are the same


@pytest.mark.parametrize("begun", ["finished", "damaged", "under way"])
def test_wherever_beginning_again_is_interrupted_it_can_be_begun_again(
    begun: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of what was there before is taken for a part of it, or left in the folder."""

    def stop(*_: object) -> None:
        raise Killed

    first, other = (Settings(("a.jsonl",), "tokenizer", length=n, held_out=0.1, shard_tokens=200) for n in (32, 24))
    whole = {n: shards_of(settings, f"whole-{n}") for n, settings in ((32, first), (24, other))}
    remove = prepare.remove
    for last in range(1, 100):
        out, removed = Path(f"shards-{last}"), itertools.count(1)
        with contextlib.suppress(Killed):
            prepare_shards(first, out, jobs=1, show=stop if begun == "under way" else lambda *_: None)
        if begun == "damaged":
            (out / MANIFEST).unlink()
            (out / "progress.sqlite").write_bytes(b"this is no data base" * 100)

        def killed(path: Path, last: int = last, removed: Iterator[int] = removed) -> None:
            if next(removed) == last:
                raise Killed
            remove(path)

        try:
            with monkeypatch.context() as change:
                change.setattr(prepare, "remove", killed)
                prepare_shards(other, out, jobs=1, overwrite=True)
        except Killed:
            if not is_shards(str(out)):
                (out / f"{UNFINISHED}removed-train").mkdir()  # as a kill in the midst of a removal leaves it
        else:
            break
        again = first if last % 2 else other
        prepare_shards(again, out, jobs=1, overwrite=again is other)
        assert contents(out) == whole[again.length]
        assert not list(out.glob(".*"))
    assert contents(out) == whole[other.length]
    assert last > 3


def test_a_data_base_that_cannot_grow_is_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(prepare.State):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.connection.execute("PRAGMA max_page_count = 6")

    monkeypatch.setattr(pipeline, "BATCH", 200)
    settings = Settings(("a.jsonl",), "tokenizer", length=32, held_out=0.1, shard_tokens=100)
    with monkeypatch.context() as change:
        change.setattr(prepare, "State", Full)
        with pytest.raises(UserError, match=r"cannot keep its progress \(database or disk is full\): make room"):
            prepare_shards(settings, Path("shards"), jobs=1)
    prepare_shards(settings, Path("shards"), jobs=1)
    assert contents(Path("shards")) == shards_of(settings, "whole")


def test_a_begun_preparation_refuses_other_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise Killed

    settings = Settings(("a.jsonl",), "tokenizer", length=32, held_out=0.1)
    with pytest.raises(Killed):
        prepare_shards(settings, Path("shards"), jobs=1, show=stop)
    write_lines(Path("a.jsonl"), ["changed"])
    assert main([*PREPARE, "--out", "shards"]) == 2
    assert "shards was begun with other settings or files: add --overwrite" in capsys.readouterr().err
    write_lines(Path("a.jsonl"), TEXTS)
    assert main([*PREPARE, "--out", "shards", "--overwrite"]) == 0
    assert not list(Path("shards").glob("progress*"))


def save_rows(name: str, texts: Sequence[str]) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": list(texts)}).save_to_disk(name)


def edit(place: int) -> None:
    data = bytearray(Path("a.jsonl").read_bytes())
    data[place if place >= 0 else len(data) + place] ^= 1
    times = Path("a.jsonl").stat()
    Path("a.jsonl").write_bytes(data)
    os.utime("a.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = {
    "rows": lambda: save_rows("saved", TEXTS[:30]),
    "other rows of the same size": lambda: save_rows("saved", [text.replace("cat", "dog") for text in TEXTS[:40]]),
    "beginning": lambda: edit(20),
    "middle": lambda: edit(200_000),
    "end": lambda: edit(-9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_finished_shards_are_not_taken_for_those_of_changed_sources(change: str, here: Path) -> None:
    save_rows("saved", TEXTS[:40])
    write_lines(Path("a.jsonl"), ["the cat " * 50_000])
    settings = Settings(("saved", "a.jsonl"), "tokenizer", length=32, held_out=0.0)
    for _ in range(2):
        prepare_shards(settings, Path("shards"), jobs=1)
    size = Path("a.jsonl").stat().st_size
    CHANGES[change]()
    assert Path("a.jsonl").stat().st_size == size
    with pytest.raises(UserError, match="shards holds shards of other files than there are now"):
        prepare_shards(settings, Path("shards"), jobs=1)


def test_what_an_earlier_version_did_not_note_of_sources_is_not_compared(here: Path) -> None:
    def stop(*_: object) -> None:
        raise Killed

    save_rows("saved", TEXTS[:40])
    settings, out = Settings(("saved", "a.jsonl"), "tokenizer", length=32, held_out=0.1), Path("shards")
    with pytest.raises(Killed):
        prepare_shards(settings, out, jobs=1, show=stop)
    state = prepare.State(out)
    described = state.get("described")
    described[1][0] = ["saved"]
    state.put("described", described)
    state.commit()
    state.close()
    manifest = prepare_shards(settings, out, jobs=1)
    for source in manifest["inputs"]:
        del source["content"]
    (out / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    prepare_shards(settings, out, jobs=1)
    write_lines(Path("a.jsonl"), ["another size"])
    with pytest.raises(UserError, match="of other files"):
        prepare_shards(settings, out, jobs=1)


def test_a_begun_preparation_refuses_another_saved_data_set(here: Path) -> None:
    def stop(*_: object) -> None:
        raise Killed

    save_rows("saved", TEXTS[:40])
    settings = Settings(("saved",), "tokenizer", length=32)
    with pytest.raises(Killed):
        prepare_shards(settings, Path("shards"), jobs=1, show=stop)
    save_rows("saved", TEXTS)
    with pytest.raises(UserError, match="was begun with other settings or files"):
        prepare_shards(settings, Path("shards"), jobs=1)


def test_a_source_that_changes_while_it_is_read_is_another(here: Path) -> None:
    settings = Settings(("a.jsonl",), "tokenizer", length=32)
    prepare_shards(settings, Path("shards"), jobs=1, show=lambda *_: edit(20))
    with pytest.raises(UserError, match="of other files"):
        prepare_shards(settings, Path("shards"), jobs=1)


def test_a_name_on_the_hub_is_looked_up_once_and_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def look_up(name: str, **_: object) -> list[dict[str, str]]:
        names.append(name)
        if name == "no/such":
            raise UserError("no/such is no data set")
        return [{"text": "a cat"}]

    monkeypatch.setattr(inputs, "open_hub", look_up)
    write_lines(Path("long.jsonl"), ["the cat " * 150_000])  # more than a batch
    shown: list[object] = []
    with pytest.raises(UserError, match="no/such is no data set"):
        prepare_shards(
            Settings(("long.jsonl", "no/such"), "tokenizer"), Path("new"), jobs=1, show=lambda *now: shown.append(now)
        )
    assert not shown
    assert not Path("new").exists()
    settings = Settings(("a.jsonl", "some/set"), vocab_size=120)  # its rows are read for the tokenizer too
    for _ in range(2):
        assert prepare_shards(settings, Path("shards"), jobs=1)["kept"] == len(TEXTS) + 1
    assert names == ["no/such", "some/set"]


def test_without_a_tokenizer_one_is_trained_on_the_text(here: Path) -> None:
    line = ["data", "prepare", "a.jsonl", "--vocab-size", "120", "--jobs", "1"]
    for out in ("one", "two"):
        assert main([*line, "--out", out]) == 0
    assert contents(Path("one")) == contents(Path("two"))
    assert json.loads(Path("one", MANIFEST).read_text(encoding="utf-8"))["tokenizer"]["vocabulary"] <= 120


def test_words_without_end_are_refused_with_the_way_out_that_the_page_shows(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, page = random.Random(0), Path(__file__).parents[2] / "docs" / "data.md"
    dna = ["".join(draw.choices("ACGTacgtN", k=500)) for _ in range(20)]
    Path("dna.txt").write_text("\n".join(dna), encoding="utf-8")
    line = ["data", "prepare", "dna.txt", "--documents", "line", "--jobs", "1", "--out", "new", "--held-out", "0"]
    assert main(line) == 2
    assert "put spaces into words of more than 100 letters" in capsys.readouterr().err
    assert main(["pretrain", "dna.txt", "--vocab-size", "120", "--out", "run"]) == 2  # more text would not help
    assert "put spaces into words of more than 100 letters" in capsys.readouterr().err
    code = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert main([*line, "--tokenizer", "letters", "--overwrite"]) == 0
    letters = load_tokenizer("letters")
    pieces_found = [letters.decode(piece, skip_special_tokens=True).replace(" ", "") for piece in found(Path("new"))]
    assert sorted(pieces_found) == sorted(text.lower() for text in dna)


MISTAKES = {
    "data prepare nowhere.txt --out new": "there is no file or folder nowhere.txt",
    "data prepare a.jsonl": "Missing from hydra-ssm data prepare: --out",
    "data prepare --out new": "the sources must be files, folders or a data set's name, got none",
    "data prepare a.jsonl a.jsonl --out new": "each source must be given once, a.jsonl is given twice",
    "data prepare a.jsonl --out foreign": "foreign must be new, empty or hold shards, it holds thesis.tex",
    "data prepare a.jsonl --out foreign --overwrite": "foreign must be new, empty or hold shards, it holds thesis.tex",
    "data prepare a.jsonl --out a.jsonl": "a.jsonl must be a folder, it is a file",
    "data prepare a.jsonl --out new --length 2": "length must be at least 3, got 2",
    "data prepare a.jsonl --out new --held-out 1": "held_out must be at least 0 and below 1, got 1.0",
    "data prepare a.jsonl --out new --jobs 0": "jobs must be at least 1, got 0",
    "data prepare a.jsonl --out new --column body --tokenizer tokenizer": (
        "the sources must hold text to train on, found 61 records that are no JSON or CSV, or hold no such text; the "
        "first: a.jsonl:1: no text named body in text: choose one by --column"
    ),
    "data prepare empty.txt --out new": "the sources must hold text to train a tokenizer on, there is none",
    "data prepare a.jsonl --tokenizer nowhere --out new": "no tokenizer at nowhere",
    "data prepare someone/something --out new --tokenizer tokenizer": "someone/something is neither a file, a ",
    "data": "the command must be one of",
    "pretrain shards a.jsonl": "shards must be the only source, got shards, a.jsonl: prepare them together",
    "pretrain shards --tokenizer tokenizer": "shards have the tokenizer that made them, got another",
    "pretrain shards --length 64": "length must be 32, that of the shards, got 64",
}


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_begins_nothing(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if line.startswith("pretrain"):
        assert main([*PREPARE, "--out", "shards"]) == 0
    capsys.readouterr()
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("hydra-ssm: error: ")
    assert error.count("\n") == 1
    assert MISTAKES[line] in error
    assert not Path("new").exists()
    assert not Path("runs").exists() or not any(Path("runs").iterdir())
