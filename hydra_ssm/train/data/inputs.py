"""What is read: files, folders of them, and data sets, in an order that is the same every time."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from ..errors import UserError
from ..sources import DATA, TEXT, entries_of, open_hub
from .documents import (
    Documents,
    Item,
    guarded,
    read_csv,
    read_json,
    read_json_lines,
    read_parquet,
    read_rows,
    read_text,
)

COMPRESSED = {".gz", ".zst"}
RECORDS = {".jsonl", ".json", ".ndjson", ".csv", ".parquet"}
OF_RECORDS = {".jsonl": read_json_lines, ".json": read_json, ".csv": read_csv}
STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of Arrow's streams
SAMPLE = 1 << 16  # bytes of a file's beginning, middle and end that tell whether it is still the same


@dataclass(frozen=True)
class Input:
    """A file, or a data set of the datasets library."""

    name: str
    path: Path | None = None
    open: Callable[[], Any] | None = None  # of a data set on the Hub: its rows
    saved: Path | None = None  # the folder of a data set on the disk

    @property
    def size(self) -> int:
        """Bytes; 0 where that is not known."""
        return self.path.stat().st_size if self.path else 0

    @property
    def content(self) -> str:
        """A hash that changes with most edits, those that keep the size too; "" where there is no file to read."""
        if self.saved is not None:
            return _sampled([self.saved / "state.json", *_arrow_files(self.saved)])
        return _sampled([self.path]) if self.path else ""

    def items(self, documents: Documents, column: str, read: Callable[[int], None] = lambda _: None) -> Iterator[Item]:
        """All documents and problems, the same every time. `read` is told how many bytes of the file are used."""
        if self.saved is not None:
            return _saved_items(self.name, self.saved, column)
        if self.path is None:
            assert self.open is not None
            return read_rows(self.name, self.open(), column)
        kind = _kind(self.path)
        if kind == ".parquet":
            return guarded(self.name, read_parquet(self.name, self.path, column))
        return guarded(self.name, self._stream_items(kind, documents, column, read))

    def _stream_items(
        self, kind: str, documents: Documents, column: str, read: Callable[[int], None]
    ) -> Iterator[Item]:
        assert self.path is not None
        if not self.size and self.path.suffix in COMPRESSED:  # gzip finds nothing wrong with it
            yield Item(problem="damaged", where=f"{self.name}: a compressed file must have bytes, it has none")
            return
        number = -1
        with self.path.open("rb") as raw, _plain(self.path, raw) as stream:
            if reader := OF_RECORDS.get(kind):
                found = reader(self.name, stream, column)
            else:
                found = read_text(self.name, stream, documents)
            for number, item in enumerate(found):
                if not number % 64:
                    read(raw.tell())
                yield item
        if number < 0:
            yield Item(problem="empty", where=f"{self.name}: nothing in it")


def find_inputs(sources: Sequence[str]) -> tuple[list[Input], list[str]]:
    """(what to read, what else is in folders). Raises UserError where a source does not exist or cannot be listed."""
    inputs: list[Input] = []
    ignored: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            inputs.append(Input(source, saved=_saved(path)))
        elif path.is_dir():
            found, others = _folder(path)
            inputs += found
            ignored += others
        elif path.is_file():
            inputs.append(Input(source, path))
        elif _kind(path) in TEXT | RECORDS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
            raise UserError(f"there is no file or folder {source}")
        else:
            inputs.append(Input(source, open=_hub(source)))
    if twice := [name for name, times in Counter(source.name for source in inputs).items() if times > 1]:
        raise UserError(f"each source must be given once, {twice[0]} is given twice")
    return inputs, ignored


def listed(inputs: list[Input]) -> list[dict[str, Any]]:
    """As a manifest has them."""
    return [
        {"name": source.name, "bytes": source.size} | ({"content": content} if (content := source.content) else {})
        for source in inputs
    ]


def are_listed(inputs: list[Input], known: list[dict[str, Any]]) -> bool:
    """Whether a manifest has the same. What an earlier version did not write into it is not compared."""
    now = listed(inputs)
    return len(now) == len(known) and all(old.items() <= new.items() for old, new in zip(known, now, strict=True))


def _hub(source: str) -> Callable[[], Any]:
    return functools.cache(lambda: open_hub(source, streaming=True))


def _saved(path: Path) -> Path:
    """The folder of the rows: of several splits, that of train."""
    if (path / "state.json").exists():
        return path
    if not (path / "train").is_dir():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())) or "none"
        raise UserError(f"the data set {path} must have a split train, it has {splits}")
    return path / "train"


def _arrow_files(folder: Path) -> list[Path]:
    """Of a saved data set; none where its list cannot be read, which `_saved_items` tells."""
    try:
        return _read_state(folder)
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _read_state(folder: Path) -> list[Path]:
    state = json.loads((folder / "state.json").read_bytes())
    return [folder / part["filename"] for part in state["_data_files"]]


def _saved_items(name: str, folder: Path, column: str) -> Iterator[Item]:
    """A damaged or missing file leaves the others."""
    try:
        files = _read_state(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield Item(problem="damaged", where=f"{name}: state.json must list the files, it does not: {error}")
        return
    for path in files:
        yield from read_rows(str(path), _arrow_rows(path, column), column)


def _arrow_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as batches:
        names = batches.schema.names
        for batch in batches:
            if column in names:
                chosen = batch.select([column])
                chosen.validate(full=True)  # damaged offsets lead out of the memory
                yield from chosen.to_pylist()
            else:
                yield from [dict.fromkeys(names)] * len(batch)
    with path.open("rb") as end:  # pyarrow takes a file that is cut between two batches for a whole one
        end.seek(-len(STREAM_END), io.SEEK_END)
        if end.read() != STREAM_END:
            raise EOFError("it ends between two batches: rows are missing")


def _sampled(paths: Sequence[Path]) -> str:
    """A hash of the sizes and of some bytes, as a whole file can be too much to read. What cannot be read adds none."""
    found = hashlib.blake2b(digest_size=16)
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode(errors="surrogateescape"))
            for place in sorted({0, max(0, size - SAMPLE) // 2, max(0, size - SAMPLE)}):
                file.seek(place)
                found.update(file.read(SAMPLE))
    return found.hexdigest()


def _folder(path: Path) -> tuple[list[Input], list[str]]:
    entries = entries_of(path)
    texts = [p for p in entries if _kind(p) in TEXT and p.is_file()]
    records = [p for p in entries if _kind(p) in RECORDS and p.is_file()]
    if texts and records:
        raise UserError(
            f"the folder {path} must hold text or data files, it holds both: name {records[0].relative_to(path)} or "
            f"{texts[0].relative_to(path)}, or a folder of one kind"
        )
    if not texts and not records:
        kinds = ", ".join(sorted(TEXT | RECORDS | DATA.keys()))
        raise UserError(f"the folder {path} must hold files of text ({kinds}; also .gz and .zst), it holds none")
    used = set(texts + records)
    return [Input(str(p), p) for p in texts + records], [str(p) for p in entries if p not in used]


def _kind(path: Path) -> str:
    """The ending below that of a compression. JSON Lines has two."""
    suffix = (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix
    return ".jsonl" if suffix == ".ndjson" else suffix


def _plain(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":  # pyarrow, which the extra train brings, has the decoder
        return cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 17))
    return raw
