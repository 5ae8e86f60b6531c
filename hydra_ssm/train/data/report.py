"""What a preparation shows: how far it is, and at its end what was kept and what was not."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .inputs import find_inputs
from .pipeline import SKIPPED, Batch
from .prepare import prepare_shards
from .settings import Settings

EVERY = 10.0  # seconds between lines where the output is no terminal
DAMAGED = 5  # files that are named; the manifest has the others


def prepare_and_show(settings: Settings, out: Path, *, jobs: int | None, overwrite: bool) -> dict[str, Any]:
    """`prepare_shards` with a bar, and a summary."""
    console = Console()
    total = sum(source.size for source in find_inputs(settings.sources)[0]) or None
    started = said = time.monotonic()
    first: int | None = None
    bar = Progress(
        BarColumn(bar_width=10), DownloadColumn(), TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(),
        TextColumn("left"), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("prepare", total=total, numbers="")

    def show(batch: Batch, counts: Counter[str]) -> None:
        nonlocal said, first
        now = time.monotonic()
        first = counts["bytes"] if first is None else first
        speed = (counts["bytes"] - first) / (now - started) / 1e6
        numbers = f"{counts['kept']:,} documents  {speed:.1f} MB/s"
        bar.update(task, completed=batch.read, numbers=numbers)
        if bar.disable and now - said > EVERY:
            said = now
            console.print(f"{batch.read:,} of {total:,} bytes: {numbers}" if total else numbers, soft_wrap=True)

    with bar:
        manifest = prepare_shards(settings, out, jobs=jobs, overwrite=overwrite, show=show)
    console.print(summary(manifest, out), soft_wrap=True, markup=False, highlight=False)
    return manifest


def summary(manifest: dict[str, Any], out: Path) -> str:
    """What the folder holds, what was left out, and what was changed."""
    lines = []
    for split, facts in manifest["splits"].items():
        lines.append(
            f"{out}/{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens in {facts['rows']:,} rows, "
            f"{len(facts['shards'])} shards"
        )
    lines.append(
        f"the rows are {manifest['fill']:.2%} full; the tokenizer has {manifest['tokenizer']['vocabulary']:,} tokens"
    )
    cut = sum(facts["tokens_cut_off"] for facts in manifest["splits"].values())
    changed = {
        "documents with bytes that are not UTF-8, which were replaced": manifest["repaired"],
        "parts that long documents were cut into": manifest["parts_of_long_documents"],
        "tokens cut off from long documents": cut,
        "files of other kinds in the folders, not read": manifest["files_of_other_kinds"]["count"],
    }
    lines += [
        f"left out: {manifest['skipped'][name]:,} {what}" for name, what in SKIPPED.items() if manifest["skipped"][name]
    ]
    lines += [f"  {place}" for place in manifest["examples"].get("damaged", [])[:DAMAGED]]
    lines += [f"note: {number:,} {what}" for what, number in changed.items() if number]
    if not manifest["splits"]["held_out"]["documents"]:
        lines.append(
            "note: no document is held out: prepare again with a larger --held-out (or --documents paragraph), or give "
            "pretrain its own --held-out"
        )
    return "\n".join(lines)
