"""How far a preparation is, in one SQLite file: each commit is a point from which a killed run goes on."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError

NAME = "progress.sqlite"
CACHE = 64_000  # KiB of it in memory
BEGIN = (
    f"PRAGMA cache_size = -{CACHE}",
    "PRAGMA locking_mode = EXCLUSIVE",
    "BEGIN EXCLUSIVE",
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value)",
    "CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY) WITHOUT ROWID",
)


class State:
    """Key-value facts, the hashes of all documents so far, and tokens that fill no shard yet.

    anew: whatever is there is not needed, and may be damaged.
    """

    def __init__(self, folder: Path, anew: bool = False) -> None:
        self.path = folder / NAME
        try:
            self.connection = _opened(self.path)
        except sqlite3.OperationalError as error:
            raise UserError(f"{folder} is being prepared by another process ({error}): wait for its end") from None
        except sqlite3.DatabaseError as error:
            if not anew:
                raise UserError(f"{self.path} is damaged ({error}): start again with --overwrite") from None
            self.path.unlink()
            self.connection = _opened(self.path)

    def get(self, name: str, default: Any = None) -> Any:
        """A fact: text, bytes or what JSON holds."""
        row = self.connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        if row is None:
            return default
        return row[0] if isinstance(row[0], bytes) else json.loads(row[0])

    def put(self, name: str, value: Any) -> None:
        """Change a fact; other processes and a restart see it after `commit`."""
        stored = value if isinstance(value, bytes) else json.dumps(value)
        self.connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, stored))

    def seen(self, digest: bytes) -> bool:
        """Whether a document of this hash was added."""
        return self.connection.execute("SELECT 1 FROM seen WHERE hash = ?", (digest,)).fetchone() is not None

    def add(self, digests: Iterable[bytes]) -> None:
        """Remember documents by their hashes."""
        self.connection.executemany("INSERT INTO seen VALUES (?)", ((digest,) for digest in digests))

    def commit(self) -> None:
        """Put all on the disk, at once or not at all."""
        self.connection.execute("COMMIT")
        self.connection.execute("BEGIN EXCLUSIVE")

    def close(self) -> None:
        """Forget what was not committed."""
        self.connection.close()

    def remove(self) -> None:
        """Close and delete it."""
        self.close()
        for name in (NAME, f"{NAME}-journal"):
            self.path.with_name(name).unlink(missing_ok=True)


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        for statement in BEGIN:
            connection.execute(statement)
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection
