"""Text files."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its lines ended as Unix does. Raises ValueError where it is empty or something else."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, its byte {error.start} is not: {error.reason}") from error
    if "\0" in text:
        raise ValueError(f"{path} must be text, it holds a zero byte at {text.index(chr(0))}: a binary file?")
    if not text.strip():
        raise ValueError(f"{path} must hold text, it is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")
