"""Shards: Arrow files of rows, which the datasets library reads as well, and a manifest that tells what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..._extras import require
from ..checkpoints import MANIFEST, whole_file
from ..errors import UserError
from ..packing import pack
from ..records import write_json

FORMAT = "hydra-ssm shards"
SPLITS = ("train", "held_out")
TOGETHER = 2048  # rows that are written at a time

Rows = Literal["packed", "cut"]


class Layout(NamedTuple):
    """How documents become rows."""

    rows: Rows  # packed: all pieces of documents, several in a row; cut: of each document the beginning, alone
    length: int  # most tokens of a row
    cls: int
    sep: int


def pieces_of(lengths: NDArray[np.int64], layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(where each piece begins, its tokens without [CLS] and [SEP]) for documents that lie back to back."""
    room = layout.length - 2
    begins = np.cumsum(lengths) - lengths
    if layout.rows == "cut":
        return begins, np.minimum(lengths, room)
    count = -(-lengths // room)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(begins, count) + number * room, np.minimum(np.repeat(lengths, count) - number * room, room)


def write_shard(path: Path, tokens: NDArray[np.integer], lengths: NDArray[np.int64], layout: Layout) -> dict[str, Any]:
    """Rows of these documents as one file, whole or not at all: its line of the manifest."""
    begins, sizes = pieces_of(lengths, layout)
    packed = layout.rows == "packed"
    rows = pack((sizes + 2).tolist(), layout.length) if packed else [[i] for i in range(len(sizes))]
    pa = require("pyarrow", "train")
    schema = pa.schema([("input_ids", pa.list_(pa.from_numpy_dtype(tokens.dtype))), ("lengths", pa.list_(pa.int32()))])
    with whole_file(path) as part:
        with part.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for first in range(0, len(rows), TOGETHER):
                writer.write_batch(_batch(rows[first : first + TOGETHER], tokens, begins, sizes, layout, schema))
        digest = sha256(part)
        size = part.stat().st_size
    kept = int(sizes.sum())
    return {
        "file": f"{path.parent.name}/{path.name}", "sha256": digest, "bytes": size, "rows": len(rows),
        "documents": len(lengths), "pieces": len(sizes), "tokens": kept + 2 * len(sizes),
        "tokens_cut_off": int(lengths.sum()) - kept,
    }  # fmt: skip


def _batch(
    rows: list[list[int]],
    tokens: NDArray[np.integer],
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    layout: Layout,
    schema: Any,
) -> Any:
    pa = require("pyarrow", "train")
    pieces = np.array([i for row in rows for i in row])
    counts = np.array([len(row) for row in rows])
    size, begin = sizes[pieces], begins[pieces]
    ends = np.cumsum(size + 2)
    starts = ends - size - 2
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    ids = np.empty(ends[-1], tokens.dtype)
    ids[starts], ids[ends - 1] = layout.cls, layout.sep
    ids[np.repeat(starts + 1, size) + within] = tokens[np.repeat(begin, size) + within]
    piece_ends = np.concatenate([[0], np.cumsum(counts)])
    row_ends = np.concatenate([[0], ends])[piece_ends]
    columns = [(row_ends, ids), (piece_ends, (size + 2).astype(np.int32))]
    arrays = [
        pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values)) for offsets, values in columns
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def describe_to_datasets(folder: Path, files: list[str]) -> None:
    """What datasets.load_from_disk wants to find beside the files of a split."""
    fingerprint = hashlib.sha256(" ".join(files).encode()).hexdigest()[:16]
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files], "_fingerprint": fingerprint, "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": folder.name,
    }  # fmt: skip
    for name, content in (("state.json", state), ("dataset_info.json", {})):
        write_json(folder / name, content, indent=2)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenSequence:
    """The tokens of all shards in their order, of which a slice is one array."""

    def __init__(self, parts: list[NDArray[np.integer]]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, wanted: slice) -> NDArray[np.integer]:
        start, stop, _ = wanted.indices(len(self))
        found: list[NDArray[np.integer]] = [np.empty(0, np.uint16)]
        for i in range(int(np.searchsorted(self.ends, start, "right")), len(self.parts)):
            begin = int(self.ends[i]) - len(self.parts[i])
            if begin >= stop:
                break
            found.append(self.parts[i][max(0, start - begin) : stop - begin])
        return np.concatenate(found)


class ShardRows:
    """The rows of one split, in files that are mapped, not read: `rows[i]` is (tokens, length of each piece)."""

    def __init__(self, folder: Path, split: str) -> None:
        manifest = read_manifest(folder)
        files = [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]
        self.batches = [columns for file in files for columns in _columns(file)]
        self.ends = np.cumsum([len(batch[0]) - 1 for batch in self.batches], dtype=np.int64)
        self.tokens = TokenSequence([batch[1] for batch in self.batches])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        number = int(np.searchsorted(self.ends, i, "right"))
        row_ends, ids, piece_ends, lengths = self.batches[number]
        row = i - int(self.ends[number]) + len(row_ends) - 1
        return ids[row_ends[row] : row_ends[row + 1]], lengths[piece_ends[row] : piece_ends[row + 1]]


def _columns(file: Path) -> Iterator[tuple[NDArray[np.integer], ...]]:
    """(row ends, tokens, piece ends, lengths) of each batch, without a copy."""
    pa = require("pyarrow", "train")
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield tuple(
                array.to_numpy(zero_copy_only=True)
                for column in batch.columns
                for array in (column.offsets, column.values)
            )


def is_shards(source: str) -> bool:
    """Whether it names a folder that `hydra-ssm data prepare` has finished."""
    path = Path(source).expanduser() / MANIFEST
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def settings_of(sources: Sequence[str]) -> dict[str, Any]:
    """What shards among the sources decide of a recipe."""
    found = [read_manifest(Path(source).expanduser()) for source in sources if is_shards(source)]
    return {"length": found[0]["settings"]["length"]} if found else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError where the folder holds no finished shards."""
    if not is_shards(str(folder)):
        raise UserError(f"{folder} must hold shards with a {MANIFEST}, as hydra-ssm data prepare writes them")
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, once every file has the hash that it says. Raises UserError for the first that has not."""
    manifest = read_manifest(folder)
    expected = {"tokenizer/tokenizer.json": manifest["tokenizer"]["sha256"]}
    expected |= {s["file"]: s["sha256"] for split in SPLITS for s in manifest["splits"][split]["shards"]}
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} is damaged ({name} is missing): prepare it again with --overwrite")
        if sha256(folder / name) != digest:
            raise UserError(f"{folder} is damaged ({name} has changed): prepare it again with --overwrite")
    return manifest
