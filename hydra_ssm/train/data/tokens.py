"""Texts to token numbers in several processes, in order."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

T = TypeVar("T")
REMEMBERED = 1 << 18  # words; about 60 MB a process
SPACE = str.maketrans("\n\t\r", "   ")


class Tokens(NamedTuple):
    """Of several texts, back to back."""

    ids: NDArray[np.integer]
    lengths: NDArray[np.int64]  # of each text


class Words:
    """A tokenizer that looks most words up instead of taking them apart again.

    BERT's rules never look beyond white space: the tokens of a text are those of its words, one by one. Where a
    tokenizer has other rules, it gets the texts whole.
    """

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.dtype = np.dtype(np.uint16 if self.tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
        self.by_word = _is_by_word(json.loads(tokenizer))
        self.known: dict[str, bytes] = {}

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """The tokens of each text, without special ones."""
        if not self.by_word:
            found = self._encode(texts)
        else:
            split = [text.translate(SPACE).split(" ") for text in texts]
            if len(self.known) > REMEMBERED:
                self.known.clear()
            new = list(set().union(*split) - self.known.keys())
            self.known.update(zip(new, self._encode(new), strict=True))
            found = [b"".join(map(self.known.__getitem__, words)) for words in split]
        lengths = np.array([len(data) for data in found], np.int64) // self.dtype.itemsize
        return Tokens(np.frombuffer(b"".join(found), self.dtype), lengths)

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.dtype).tobytes() for one in encoded]


def _is_by_word(settings: dict[str, Any]) -> bool:
    rules = [(settings[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    words = all(len(token["content"].split()) == 1 for token in settings["added_tokens"])
    return words and rules == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]


_words: Words


def _start(tokenizer: str) -> None:
    global _words
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as shall work
    _words = Words(tokenizer)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()  # a killed parent cannot say goodbye


def _work(texts: Sequence[str]) -> Tokens:
    return _words(texts)


def tokenized(
    batches: Iterable[T], texts: Callable[[T], Sequence[str]], tokenizer: str, jobs: int
) -> Iterator[tuple[T, Tokens]]:
    """Each batch with the tokens of its texts, in order; never more than two batches a process are under way."""
    if jobs == 1:
        words = Words(tokenizer)
        yield from ((batch, words(texts(batch))) for batch in batches)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start, (tokenizer,))
    waiting: deque[tuple[T, Future[Tokens]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_work, texts(batch))))
            if len(waiting) > 2 * jobs:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
