"""What a preparation is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..sources import TEXT_COLUMN
from .documents import Documents
from .shards import Rows


@dataclass(frozen=True)
class Settings:
    """What a preparation is made of.

    Args:
        sources: files, folders, data set names.
        tokenizer: a folder or vocab.txt; None to train one of at most `vocab_size` tokens.
        length: most tokens of a row, [CLS] and [SEP] of each piece included.
        rows: packed, or cut: of each document its first `length` tokens alone.
        documents: what a document is in plain text: a whole file, a paragraph, a line.
        column: of records, that holds their text.
        held_out: share of the documents that go to the split held_out.
        shard_tokens: a shard is closed when it has so many.

    Raises:
        UserError: a setting out of its range.
    """

    sources: tuple[str, ...]
    tokenizer: str | None = None
    vocab_size: int = 30522
    length: int = 512
    rows: Rows = "packed"
    documents: Documents = "file"
    column: str = TEXT_COLUMN
    held_out: float = 0.01
    shard_tokens: int = 1 << 24

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("the sources must be files, folders or a data set's name, got none")
        for name, least in (("length", 3), ("vocab_size", 6), ("shard_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be at least 0 and below 1, got {self.held_out}")
