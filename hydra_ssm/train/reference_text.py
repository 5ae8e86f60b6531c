"""Python's language reference, which every CPython carries as text: data that needs no network."""

from __future__ import annotations

import re

SIZES = range(1_000, 10_000)  # characters of the topics that may be held out: neither a remark nor a chapter
ONE_IN = 4  # of these, one is held out: a tenth of the text
SHORTEST = 40  # characters; a shorter paragraph ("For example:") may occur on both sides


def language_reference() -> tuple[list[str], list[str]]:
    """(training documents, held-out documents), one a topic.

    Topics quote each other. A paragraph of a held-out topic occurs in no training document, and none occurs twice.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = [name for name in names if len(topics[name]) in SIZES][ONE_IN - 1 :: ONE_IN]
    seen: set[str] = set()
    kept = [_unseen(topics[name], seen) for name in held_out]
    train = [_unseen(topics[name], seen) for name in names if name not in held_out]
    return [text for text in train if text], [text for text in kept if text]


def _unseen(text: str, seen: set[str]) -> str:
    """The paragraphs that are not in `seen`, to which they are added."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        plain = " ".join(paragraph.split())
        if len(plain) < SHORTEST or plain not in seen:
            paragraphs.append(paragraph)
        seen.add(plain)
    return "\n\n".join(paragraphs)
