"""From documents to shards: without duplicates, tokenised in several processes, packed, written, counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...text.tokenizer import load_tokenizer, train_tokenizer
from ..checkpoints import MANIFEST, remove_unfinished, whole_folder
from ..errors import UserError
from ..prepare import TOKENIZER_TEXT, check_known
from ..records import write_json
from .documents import Item
from .inputs import Input, listed
from .settings import Settings
from .shards import FORMAT, SPLITS, Layout, describe_to_datasets, sha256, write_shard
from .state import State
from .tokens import Tokens, Words, tokenized

BATCH = 1 << 20  # characters that a process gets at a time
ITEMS = 1 << 13  # or documents, if that is less
EXAMPLES = 20  # of each kind of problem that the manifest names; of damaged files all, up to a thousand
CHECKED = 100_000  # characters by which it is seen whether the tokenizer fits the text
SKIPPED = {
    "empty": "empty documents",
    "duplicate": "documents that occurred before",
    "malformed": "records that are no JSON or CSV, or hold no such text",
    "too long": "records that are too long to read",
    "binary": "documents with zero bytes",
    "not UTF-8": "documents of which more than a hundredth is not UTF-8",
    "no tokens": "documents that the tokenizer makes nothing of",
    "damaged": "files or parts of them that could not be read to their end",
}


@dataclass
class Batch:
    """Documents that are tokenised together, and what was met on the way to the last of them."""

    place: tuple[int, int]  # (input, item) after it
    read: int  # bytes of the inputs so far
    texts: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)
    characters: int = 0

    def skip(self, problem: str, where: str) -> None:
        """Count what is left out."""
        self.counts[problem] += 1
        if where:
            self.examples.append((problem, where))


class Window:
    """Documents of a split that wait for their shard."""

    def __init__(self, dtype: np.dtype, tokens: bytes = b"", lengths: bytes = b"") -> None:
        self.tokens = [np.frombuffer(tokens, dtype)]
        self.lengths = [np.frombuffer(lengths, np.int64)]
        self.size = len(self.tokens[0])

    def add(self, tokens: NDArray[np.integer], lengths: NDArray[np.int64]) -> None:
        """Documents back to back."""
        self.tokens.append(tokens)
        self.lengths.append(lengths)
        self.size += len(tokens)

    def all(self) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """(tokens, lengths of the documents)."""
        return np.concatenate(self.tokens), np.concatenate(self.lengths)


class Preparation:
    """One folder on its way from the first document to the manifest."""

    def __init__(self, settings: Settings, out: Path, inputs: list[Input], ignored: list[str], state: State) -> None:
        self.settings, self.out, self.inputs, self.ignored, self.state = settings, out, inputs, ignored, state
        self.listed = listed(inputs)  # before they are read: they may change meanwhile
        self.tokenizer = self._tokenizer()
        self.backend = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        dtype = Words(self.backend).dtype
        assert isinstance(self.tokenizer.cls_token_id, int)
        assert isinstance(self.tokenizer.sep_token_id, int)
        self.layout = Layout(settings.rows, settings.length, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        self.place: tuple[int, int] = tuple(state.get("place", (0, 0)))
        self.counts = Counter[str](state.get("counts", {}))
        self.examples: dict[str, list[str]] = state.get("examples", {})
        self.shards: dict[str, list[dict[str, Any]]] = state.get("shards", {split: [] for split in SPLITS})
        self.windows = {
            split: Window(dtype, state.get(f"{split} tokens", b""), state.get(f"{split} lengths", b""))
            for split in SPLITS
        }
        self.under_way: set[bytes] = set()
        self.dtype = dtype

    def run(self, jobs: int, show: Callable[[Batch, Counter[str]], None]) -> dict[str, Any]:
        """From where it is to the end: the manifest."""
        for split in SPLITS:
            (self.out / split).mkdir(exist_ok=True)
            remove_unfinished(self.out / split)
        for batch, tokens in tokenized(self._batches(), lambda batch: batch.texts, self.backend, jobs):
            self._fold(batch, tokens)
            if full := [split for split in SPLITS if self.windows[split].size >= self.settings.shard_tokens]:
                for split in full:
                    self._close(split)
                self._commit()
            show(batch, self.counts)
        for split in SPLITS:
            if self.windows[split].size:
                self._close(split)
        if not self.shards["train"]:
            raise UserError(f"the sources must hold text to train on, found {self._problems()}")
        return self._finish()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The given or trained one, kept in the folder before anything else is."""
        folder, given = self.out / "tokenizer", self.settings.tokenizer
        try:
            if not folder.exists():
                tokenizer = load_tokenizer(given) if given else self._train()
                self._check_known(tokenizer)
                with whole_folder(folder) as part:
                    tokenizer.save_pretrained(part)
            return load_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise UserError(str(error).splitlines()[0]) from error

    def _texts(self, characters: int) -> Iterator[str]:
        """The first documents that are not held out."""
        for item in (item for source in self.inputs for item in self._items(source)):
            if item.text and not self._is_held_out(_digest(item.text)[0]):
                yield item.text[:characters]
                characters -= len(item.text)
                if characters <= 0:
                    return

    def _train(self) -> PreTrainedTokenizerBase:
        texts = list(self._texts(TOKENIZER_TEXT))
        if not texts:
            raise UserError("the sources must hold text to train a tokenizer on, there is none")
        return train_tokenizer(texts, self.settings.vocab_size)

    def _check_known(self, tokenizer: PreTrainedTokenizerBase) -> None:
        words = Words(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        found = words(list(self._texts(CHECKED))).ids
        if len(found):
            check_known(found, tokenizer)

    def _items(self, source: Input, read: Callable[[int], None] = lambda _: None) -> Iterator[Item]:
        return source.items(self.settings.documents, self.settings.column, read)

    def _is_held_out(self, digest: bytes) -> bool:
        """By the text alone: in whatever order and company it comes."""
        return int.from_bytes(digest[:8], "little") < self.settings.held_out * 2**64

    def _batches(self) -> Iterator[Batch]:
        first, done = self.place
        before = sum(source.size for source in self.inputs[:first])
        batch = Batch(self.place, before)
        for number in range(first, len(self.inputs)):
            source, here = self.inputs[number], 0

            def read(size: int) -> None:
                nonlocal here
                here = size

            for count, item in enumerate(self._items(source, read), start=1):
                if number == first and count <= done:
                    continue
                self._take(batch, item)
                if batch.characters >= BATCH or batch.counts["read"] >= ITEMS:
                    batch.place, batch.read = (number, count), before + here
                    yield batch
                    batch = Batch(batch.place, batch.read)
            before += source.size
        batch.place, batch.read = (len(self.inputs), 0), before
        yield batch

    def _take(self, batch: Batch, item: Item) -> None:
        batch.counts["read"] += 1
        if item.problem:
            return batch.skip(item.problem, item.where)
        digest, size = _digest(item.text)
        if digest in self.under_way or self.state.seen(digest):
            return batch.skip("duplicate", "")
        self.under_way.add(digest)
        batch.texts.append(item.text)
        batch.digests.append(digest)
        batch.held_out.append(self._is_held_out(digest))
        counts = batch.counts
        counts["kept"] += 1
        counts["bytes"] += size
        counts["repaired"] += item.repaired
        counts["parts"] += item.cut
        batch.characters += len(item.text)

    def _fold(self, batch: Batch, tokens: Tokens) -> None:
        """Make a batch part of what the next commit keeps."""
        held_out, lengths = np.array(batch.held_out, bool), tokens.lengths
        if nothing := int((lengths == 0).sum()):
            batch.counts += Counter({"no tokens": nothing})
            batch.counts["kept"] -= nothing
        for split, chosen in (("train", ~held_out), ("held_out", held_out)):
            ids = tokens.ids if chosen.all() else tokens.ids[np.repeat(chosen, lengths)]
            self.windows[split].add(ids, lengths[chosen & (lengths > 0)])
        self.state.add(batch.digests)
        self.under_way.difference_update(batch.digests)
        self.counts += batch.counts
        for problem, where in batch.examples:
            some = self.examples.setdefault(problem, [])
            if len(some) < (1000 if problem == "damaged" else EXAMPLES):
                some.append(where)
        self.place = batch.place

    def _close(self, split: str) -> None:
        shards = self.shards[split]
        path = self.out / split / f"data-{len(shards):05}.arrow"
        shards.append(write_shard(path, *self.windows[split].all(), self.layout))
        self.windows[split] = Window(self.dtype)

    def _commit(self) -> None:
        for split, window in self.windows.items():
            tokens, lengths = window.all()
            self.state.put(f"{split} tokens", tokens.tobytes())
            self.state.put(f"{split} lengths", lengths.tobytes())
        for name in ("place", "counts", "examples", "shards"):
            self.state.put(name, getattr(self, name))
        self.state.commit()

    def _problems(self) -> str:
        found = [f"{self.counts[name]:,} {what}" for name, what in SKIPPED.items() if self.counts[name]]
        first = next((places[0] for places in self.examples.values()), "")
        return (", ".join(found) or "no document") + (f"; the first: {first}" if first else "")

    def _finish(self) -> dict[str, Any]:
        """Write what makes the folder complete, the manifest last."""
        for split in SPLITS:
            names = [Path(shard["file"]).name for shard in self.shards[split]]
            for path in (self.out / split).iterdir():
                if path.name not in names:
                    path.unlink()
            describe_to_datasets(self.out / split, names)
        splits = [split for split in SPLITS if self.shards[split]]
        write_json(self.out / "dataset_dict.json", {"splits": splits})
        manifest = self.manifest()
        write_json(self.out / MANIFEST, manifest, indent=2, ensure_ascii=False)
        self.state.remove()
        return manifest

    def manifest(self) -> dict[str, Any]:
        """What the folder holds and what was left out. Nothing in it depends on time, machine or interruptions."""
        totals = ("rows", "documents", "pieces", "tokens", "tokens_cut_off")
        length = self.settings.length
        splits = {
            split: {name: sum(shard[name] for shard in shards) for name in totals} | {"shards": shards}
            for split, shards in self.shards.items()
        }
        return {
            "format": FORMAT, "version": 1,
            "tokenizer": {
                "name": self.settings.tokenizer or "trained on this text",
                "sha256": sha256(self.out / "tokenizer" / "tokenizer.json"), "vocabulary": len(self.tokenizer),
            },
            "settings": asdict(self.settings),
            "inputs": self.listed,
            "read": self.counts["read"], "kept": self.counts["kept"], "bytes": self.counts["bytes"],
            "skipped": {name: self.counts[name] for name in SKIPPED},
            "examples": self.examples,
            "files_of_other_kinds": {"count": len(self.ignored), "examples": self.ignored[:EXAMPLES]},
            "repaired": self.counts["repaired"], "parts_of_long_documents": self.counts["parts"],
            "fill": round(splits["train"]["tokens"] / max(1, splits["train"]["rows"] * length), 6),
            "splits": splits,
        }  # fmt: skip


def _digest(text: str) -> tuple[bytes, int]:
    """(what tells texts apart, bytes). White space around them does not."""
    data = text.encode()
    return hashlib.blake2b(data.strip(), digest_size=16).digest(), len(data)
