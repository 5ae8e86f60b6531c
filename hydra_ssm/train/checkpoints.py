"""Folders that are whole or not there: written beside, hashed, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

MANIFEST = "manifest.json"
UNFINISHED = ".hydra-ssm-part-"  # begins the names of what is being written or removed
REMOVED = f"{UNFINISHED}removed-"  # perhaps in part already
REPLACED = f"{UNFINISHED}replaced-"  # whole, as long as nothing stands in its place
KEPT = 3  # newest checkpoints
SHARE = 0.05  # of the time, at most, goes into saving


class SaveTimer:
    """When the next checkpoint is due: every so many seconds, or seldomer where saving would take more than its share.

    After 0 seconds it is due at every step.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._since = seconds, time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._since >= self.seconds

    def begin(self) -> None:
        """To save."""
        self._since = time.monotonic()

    def end(self) -> None:
        """Of saving, which `begin` began."""
        now = time.monotonic()
        self.seconds, self._since = max(self.seconds, (now - self._since) / SHARE) if self.seconds else 0.0, now


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` with a manifest of its files once all is on the disk.

    Whatever happens before that, `target` is as it was. Raises UserError where the files cannot be written.
    """
    part = target.with_name(UNFINISHED + target.name)
    try:
        remove(part)
        part.mkdir(parents=True)
        yield part
        write_manifest(part)
        for path in [*part.rglob("*"), part]:
            sync(path)
        old = _set_aside(target, REPLACED)
        part.rename(target)
        sync(target.parent)
        remove(old)
    except BaseException as error:
        reason = _no_room(error, target.parent)
        restore(target)
        remove(part)
        if reason:
            raise UserError(f"{reason}: {target} could not be saved; what was saved before is intact") from error
        raise


def _no_room(error: BaseException, folder: Path) -> str:
    """If that is why something could not be written, what there is none of.

    torch and safetensors have errors of their own for it.
    """
    if not isinstance(error, Exception):
        return ""
    number, said = getattr(error, "errno", None), str(error)
    full = folder.exists() and shutil.disk_usage(folder).free < 1 << 20
    if full or number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in said:
        return "the disk is full"
    if number == errno.EFBIG or "File too large" in said or "inline_container" in said:  # the last is torch's
        return "a file may not be as large as it has to be (ulimit -f), or the disk fails"
    return ""


def write_manifest(folder: Path) -> None:
    """The SHA-256 of every file below the folder, in a file of it."""
    hashes = {str(p.relative_to(folder)): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What differs from the folder's manifest, or None."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if _sha256(folder / name) != expected:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"cannot be read: {error}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written. Warns of each one that is not."""
    for path in reversed(checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return path
        warnings.warn(f"{path.name} is damaged ({reason}): going back to the checkpoint before it", stacklevel=2)
    return None


def remove_old(folder: Path) -> None:
    """Keep the newest checkpoints alone."""
    for path in checkpoints(folder)[:-KEPT]:
        remove(path)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left behind, but for what it had no other of."""
    for path in folder.glob(f"{REPLACED}*"):
        restore(path.with_name(path.name.removeprefix(REPLACED)))
    for path in folder.glob(f"{UNFINISHED}*"):
        remove(path)


def restore(target: Path) -> None:
    """Bring back a folder that was set aside for another, if the other did not come."""
    aside = target.with_name(REPLACED + target.name)
    if aside.exists() and not target.exists():
        aside.rename(target)


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one. No folder is ever seen half removed under its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path if path.name.startswith(UNFINISHED) else _set_aside(path, REMOVED))
    else:
        path.unlink(missing_ok=True)


def _set_aside(path: Path, prefix: str) -> Path:
    """Where a folder, if there is one, waits for its removal: of `prefix` and its name."""
    aside = path.with_name(prefix + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    return aside


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A new file to write, which becomes `path` once it is on the disk. A device or pipe is given as it is."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(UNFINISHED + path.name)
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
