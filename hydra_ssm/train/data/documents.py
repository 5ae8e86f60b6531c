"""Documents out of streams that may be huge or damaged: whatever cannot be read becomes an item as well."""

from __future__ import annotations

import codecs
import csv
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as parquet

from ..sources import HALF

PART = 1 << 20  # bytes; a longer document becomes several
LONGEST = 1 << 26  # bytes of one record of JSON, which must be in memory to be read
REPAIRABLE = 0.01  # of a document's characters may be invalid; with more it is no UTF-8 text
INVALID = "surrogateescape"  # a byte that is not UTF-8 becomes one, which `document` counts
BROKEN = (OSError, EOFError, zlib.error, pa.ArrowException)

Documents = Literal["file", "paragraph", "line"]


@dataclass(frozen=True, slots=True)
class Item:
    """A document, or the reason why there is none."""

    text: str = ""
    problem: str = ""  # a name of SKIPPED, "" for a document
    where: str = ""  # the problem's place and reason
    repaired: bool = False  # invalid bytes became U+FFFD
    cut: bool = False  # not the beginning of its document


def guarded(name: str, items: Iterator[Item]) -> Iterator[Item]:
    """A file that cannot be read to its end gives what is before the damage, and an item that says so."""
    try:
        yield from items
    except BROKEN as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield Item(problem="damaged", where=f"{name}: {reason}")


def document(data: bytes | str, where: str) -> Iterator[Item]:
    """A document's items: itself, its parts where it is long, or its problem."""
    repaired = False
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        text.encode()  # JSON can spell half a character
    except UnicodeError:
        text = data.decode("utf-8", "replace") if isinstance(data, bytes) else HALF.sub("\ufffd", data)
        repaired = True
        if text.count("\ufffd") > REPAIRABLE * len(text):
            yield Item(problem="not UTF-8", where=where)
            return
    if "\0" in text:
        yield Item(problem="binary", where=where)
    elif not text.strip():
        yield Item(problem="empty", where=where)
    else:
        text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
        for start, part in _parts(text):
            yield Item(part, repaired=repaired, cut=start > 0)


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """(where it begins, part), cut where a line or, in long lines, a word ends."""
    start = 0
    while start < len(text):
        end = start + PART
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield start, text[start:end]
        start = end


def read_text(name: str, stream: BinaryIO, documents: Documents) -> Iterator[Item]:
    """Documents of a plain file. One longer than PART is cut while it is read: no file needs to fit into memory."""
    kept: list[bytes] = []
    size, first, cut = 0, 1, False

    def flush(continues: bool) -> Iterator[Item]:
        nonlocal size, cut
        for item in document(b"".join(kept), f"{name}:{first}"):
            yield Item(item.text, item.problem, item.where, item.repaired, cut or item.cut)
        kept.clear()
        size, cut = 0, continues

    broken: BaseException | None = None
    number = 0
    lines = _lines(stream)
    while broken is None:
        try:
            line = next(lines, b"")
        except BROKEN as error:
            broken = error
            break
        if not line:
            break
        number += 1
        ends = line.endswith(b"\n") if documents == "line" else documents == "paragraph" and not line.strip()
        if kept and size + len(line) > PART:
            yield from flush(continues=True)
        first = first if kept else number
        kept.append(line)
        size += len(line)
        if ends and documents == "paragraph" and size == len(line):
            kept.clear()  # one of several blank lines between two paragraphs
            size, cut = 0, False
        elif ends:
            yield from flush(continues=False)
    if kept or (documents == "file" and number == 0 and broken is None):
        yield from flush(continues=False)
    if broken is not None:
        raise broken


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines, the longest in parts that end where a word or at least a character ends; the last up to the damage."""
    rest, broken = b"", None
    while broken is None:
        try:
            data = cast(io.BufferedIOBase, stream).read1(1 << 16)
        except BROKEN as error:
            data, broken = b"", error
        if not data:
            break
        rest += data
        start = 0
        while end := _line_end(rest, start):
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if broken is not None:
        rest = rest[: codecs.utf_8_decode(rest, "replace", False)[1]]  # not half a character
    if rest:
        yield rest
    if broken is not None:
        raise broken


def _line_end(data: bytes, start: int) -> int:
    """Where the line or part of a line that begins at `start` ends, 0 if behind the data."""
    if end := data.find(b"\n", start, start + PART) + 1:
        return end
    if len(data) - start < PART:
        return 0
    return data.rfind(b" ", start, start + PART) + 1 or start + (_last_character(data[start : start + PART]) or PART)


def _last_character(data: bytes) -> int:
    """Where the last character begins."""
    start = len(data) - 1
    while start > 0 and data[start] & 0xC0 == 0x80:
        start -= 1
    return start


def read_json_lines(name: str, stream: BinaryIO, column: str) -> Iterator[Item]:
    number = 0
    while line := stream.readline(LONGEST):
        number += 1
        where = f"{name}:{number}"
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST)
            yield Item(problem="too long", where=f"{where}: a record of more than {LONGEST:,} bytes")
        elif line.strip():
            yield from _record(line, column, where)


def _record(line: bytes, column: str, where: str) -> Iterator[Item]:
    try:
        record = json.loads(line.decode("utf-8-sig", INVALID))
    except (ValueError, RecursionError) as error:
        yield Item(problem="malformed", where=f"{where}: {error}")
    else:
        yield from _field(record, column, where)


def _field(record: Any, column: str, where: str) -> Iterator[Item]:
    value = record.get(column, 0) if isinstance(record, dict) else 0
    if value is None or isinstance(value, str):
        yield from document(value or "", where)
    elif isinstance(record, dict) and column in record:
        yield Item(problem="malformed", where=f"{where}: {column} must be a text, it is of type {_kind_of(value)}")
    else:
        names = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        yield Item(
            problem="malformed", where=f"{where}: no text named {column} in {names[:200]}: choose one by --column"
        )


def _kind_of(value: Any) -> str:
    """Of a value, or of the values of a column."""
    return str(value if isinstance(value, pa.DataType) else type(value).__name__)


def read_json(name: str, stream: BinaryIO, column: str) -> Iterator[Item]:
    """JSON Lines, as most files of this ending are, or one array, which must fit into memory."""
    start = b""
    while not start.strip(b" \t\r\n\xef\xbb\xbf") and (byte := stream.read(1)):  # nor a byte order mark
        start = byte
    if start != b"[":
        yield from read_json_lines(name, cast(BinaryIO, io.BufferedReader(_Behind(start, stream))), column)
        return
    data = start + stream.read(LONGEST)
    if len(data) > LONGEST:
        yield Item(problem="too long", where=f"{name}: an array of more than {LONGEST:,} bytes: make it JSON Lines")
        return
    try:
        records = json.loads(data.decode("utf-8", INVALID))
    except (ValueError, RecursionError) as error:
        yield Item(problem="malformed", where=f"{name}: {error}")
        return
    for number, record in enumerate(records, start=1):
        yield from _field(record, column, f"{name}:{number}")


class _Behind(io.RawIOBase):
    """A stream with some bytes put back before it."""

    def __init__(self, before: bytes, stream: BinaryIO) -> None:
        self.before, self.stream = before, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self.before = self.before or self.stream.read(len(buffer)), b""
        buffer[: len(data)] = data
        return len(data)


class _Lines:
    """Lines that, but for a record's first, can be read again, up to the damage of a stream that has one."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.again, self.record = lines, deque[str](), list[str]()
        self.first, self.size = 1, 0
        self.broken: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.size > LONGEST:
            raise csv.Error(f"a record of more than {LONGEST:,} characters")
        try:
            line = self.again.popleft() if self.again else next(self.lines)
        except BROKEN as error:
            self.broken, self.lines = error, iter(())
            raise StopIteration from None
        self.record.append(line)
        self.size += len(line)
        return line

    def end(self, lines: int) -> None:
        """The record was so many lines; the others are of the next."""
        self.again.extendleft(reversed(self.record[lines:]))
        self.record.clear()
        self.first, self.size = self.first + lines, 0


def read_csv(name: str, stream: BinaryIO, column: str) -> Iterator[Item]:
    """Of a broken record only the first line is left out: a stray quote makes one of many."""
    csv.field_size_limit(LONGEST)
    lines = _Lines(io.TextIOWrapper(cast(Any, stream), "utf-8-sig", INVALID, newline=""))
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        problem = ""
        try:
            cells = next(reader, None)
            if cells and header and len(cells) != len(header):
                problem = f"{len(cells)} cells for {len(header)} columns"
        except csv.Error as error:
            cells, problem = [], str(error)
        if cells is None:
            break
        first, count = lines.first, len(lines.record)
        lines.end(1 if problem else count)
        if problem:
            yield Item(problem="malformed", where=f"{name}:{first}: up to line {first + count - 1}: {problem}")
        elif cells and header:
            yield from _field(dict(zip(header, cells, strict=True)), column, f"{name}:{first}")
        else:
            header = header or cells
    if lines.broken is not None:
        raise lines.broken


def read_parquet(name: str, path: Path, column: str) -> Iterator[Item]:
    """A damaged row group leaves the others."""
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        if not _is_text(kinds.get(column)):
            yield from _field(kinds, column, name)
            return
        row = 0
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(64, [group], [column]):
                    values = batch.column(0)
                    if pa.types.is_dictionary(values.type):
                        values = values.dictionary_decode()
                    for value in values.cast(pa.large_binary()).to_pylist():
                        row += 1
                        yield from document(value or b"", f"{name}: row {row}")
            except BROKEN as error:
                yield Item(problem="damaged", where=f"{name}: row group {group}: {str(error).splitlines()[0]}")


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def read_rows(name: str, dataset: Any, column: str) -> Iterator[Item]:
    """Rows of a data set, streamed. Whatever error its reader has ends it, and is an item."""
    try:
        for number, row in enumerate(dataset, start=1):
            yield from _field(row, column, f"{name}: row {number}")
    except Exception as error:  # network, format, ...: each reader has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield Item(problem="damaged", where=f"{name}: {reason}")
