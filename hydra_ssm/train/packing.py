"""Documents to rows of packed pieces, on disk and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

TOKENS = np.dtype("<u4")
ENDS = np.dtype("<i8")
WINDOW = 1 << 16  # pieces that are sorted into rows together
BLOCK = 1 << 16  # characters that are tokenized together


def pieces(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Each document as pieces of at most `length` tokens, [CLS] first and [SEP] last in each; no token is lost."""
    cls, sep, room = tokenizer.cls_token_id, tokenizer.sep_token_id, length - 2
    rest: list[int] = []
    for ids, ends in _tokenized(documents, tokenizer):
        rest += ids
        full = len(rest) if ends else len(rest) - len(rest) % room
        yield from ([cls, *rest[i : min(i + room, full)], sep] for i in range(0, full, room))
        rest = rest[full:]


def _tokenized(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], bool]]:
    """(tokens of a block, whether it is its document's last), tokenized many at a time, which takes all cores."""
    blocks = ((block, end) for document in documents for block, end in _blocks(document))
    while some := list(islice(blocks, 64)):
        texts = [block for block, _ in some]
        found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from zip(found["input_ids"], (end for _, end in some), strict=True)


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """(part, whether it is the last), cut where a line ends: no word is cut, unless a line is longer than a part."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + BLOCK) + 1 or start + BLOCK
        yield text[start:end], end >= len(text)
        start = end


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit, longest first: rows of indices into `lengths` whose sum is at most `capacity`."""
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # rows by the tokens that still fit
    rooms = 0  # bit r is set where with_room[r] is not empty
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = rooms >> lengths[i]
        if fitting:
            room = lengths[i] + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        with_room[room - lengths[i]].append(row)
        rooms |= 1 << (room - lengths[i])
    return rows


class PackedRows:
    """Rows of packed pieces in files that are mapped, not read: `rows[i]` is (tokens, length of each piece)."""

    def __init__(self, folder: Path) -> None:
        self.tokens = _map(folder / "tokens.bin", TOKENS)
        self.piece_ends = _map(folder / "pieces.bin", ENDS)
        self.row_ends = _map(folder / "rows.bin", ENDS)

    def __len__(self) -> int:
        return len(self.row_ends)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        first = self.row_ends[i - 1] if i else 0
        start = self.piece_ends[first - 1] if first else 0
        ends = self.piece_ends[first : self.row_ends[i]]
        return self.tokens[start : ends[-1]], np.diff(ends, prepend=start)

    @classmethod
    def write(cls, folder: Path, found: Iterable[list[int]], length: int) -> Self:
        """Pack pieces into rows of at most `length` tokens and write them to a new folder."""
        folder.mkdir()
        tokens = pieces_so_far = 0
        with (
            (folder / "tokens.bin").open("wb") as t,
            (folder / "pieces.bin").open("wb") as p,
            (folder / "rows.bin").open("wb") as r,
        ):
            for window in _windows(found):
                rows = pack([len(piece) for piece in window], length)
                ordered = [window[i] for row in rows for i in row]
                piece_ends = tokens + np.cumsum([len(piece) for piece in ordered])
                row_ends = pieces_so_far + np.cumsum([len(row) for row in rows])
                np.concatenate(ordered).astype(TOKENS).tofile(t)
                piece_ends.astype(ENDS).tofile(p)
                row_ends.astype(ENDS).tofile(r)
                tokens, pieces_so_far = int(piece_ends[-1]), int(row_ends[-1])
        return cls(folder)


def _windows(found: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    window: list[list[int]] = []
    for piece in found:
        window.append(piece)
        if len(window) == WINDOW:
            yield window
            window = []
    if window:
        yield window


def _map(path: Path, dtype: np.dtype) -> NDArray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
