"""What is read: files, folders of them, and data sets, in an order that is the same every time."""

from __future__ import annotations

import gzip
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from ..errors import UserError
from ..sources import DATA, TEXT, entries_of, open_hub, open_saved
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


@dataclass(frozen=True)
class Input:
    """A file, or a data set of the datasets library."""

    name: str
    path: Path | None = None
    open: Callable[[], Any] | None = None  # of a data set: its rows

    @property
    def size(self) -> int:
        """Bytes; 0 where that is not known."""
        return self.path.stat().st_size if self.path else 0

    def items(self, documents: Documents, column: str, read: Callable[[int], None] = lambda _: None) -> Iterator[Item]:
        """All documents and problems, the same every time. `read` is told how many bytes of the file are used."""
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
        with self.path.open("rb") as raw, _plain(self.path, raw) as stream:
            if reader := OF_RECORDS.get(kind):
                found = reader(self.name, stream, column)
            else:
                found = read_text(self.name, stream, documents)
            for number, item in enumerate(found):
                if not number % 64:
                    read(raw.tell())
                yield item


def find_inputs(sources: Sequence[str]) -> tuple[list[Input], list[str]]:
    """(what to read, what else is in folders). Raises UserError where a source does not exist or cannot be listed."""
    inputs: list[Input] = []
    ignored: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            inputs.append(Input(source, open=_saved(path)))
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
    return [{"name": source.name, "bytes": source.size} for source in inputs]


def _saved(path: Path) -> Callable[[], Any]:
    return lambda: open_saved(path)


def _hub(source: str) -> Callable[[], Any]:
    return lambda: open_hub(source, streaming=True)


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
