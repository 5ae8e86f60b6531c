"""Hydra beside BERT."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .._extras import require


def _usual(metavar: str) -> object:
    return arg(metavar=metavar, help_behavior_hint="(default: the recipe compare_medium's)")


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison that begins; those that are not given are those of the recipe compare_medium."""

    hydra: Annotated[str | None, _usual("NAME")] = None
    """A preset."""
    bert: Annotated[str | None, _usual("NAME")] = None
    """Another, of equal parameters."""
    tokens: Annotated[int | None, _usual("N")] = None
    """Of each pretraining."""
    batch_tokens: Annotated[int | None, _usual("N")] = None
    """Of a step."""
    norms: Annotated[tuple[str, ...] | None, _usual("NAME ...")] = None
    """Places of the norm that both try: post, pre."""
    rates: Annotated[tuple[float, ...] | None, _usual("X ...")] = None
    """Learning rates that both try with each, and further ones beyond the best if that is the highest or the lowest."""
    rate_tokens: Annotated[int | None, _usual("N")] = None
    """On so many tokens each."""
    seeds: Annotated[tuple[int, ...] | None, _usual("N ...")] = None
    """Of the pretraining."""
    length: Annotated[int | None, _usual("N")] = None
    """Tokens of a row."""
    lengths: Annotated[tuple[int, ...] | None, _usual("N ...")] = None
    """Of the rows that the models go on with."""
    length_tokens: Annotated[int | None, _usual("N")] = None
    """On so many tokens each."""
    tasks: Annotated[tuple[str, ...] | None, _usual("NAME ...")] = None
    """Of GLUE."""
    task_seeds: Annotated[tuple[int, ...] | None, _usual("N ...")] = None
    """Of each task."""


def compare(
    data: Annotated[Positional[Path], arg(metavar="DATA")],
    /,
    *,
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/compare"),
    limit: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: none)")] = None,
    jobs: int = 1,
    records: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None,
    settings: Annotated[ComparisonSettings, arg(name="")] = ComparisonSettings(),
) -> None:
    """Compare Hydra with BERT: equal parameters, tokens and recipe, each at its best norm and learning rate.

    Trains both on the same tokens, then fine-tunes both on GLUE, goes on with longer rows, and trains the faster one on
    as many seconds as the slower one took. Leaves comparison.json with every curve, and pictures, in --out. The same
    command again goes on with what is there, whatever stopped it.

    In use:
        hydra-ssm compare prepare runs/compare/data --train books/ --books more/ --wikitext wiki/ --tokenizer vocab.txt
        hydra-ssm compare runs/compare/data
        hydra-ssm compare runs/compare/data --limit 500 --jobs 8

    Args:
        data: A folder that `hydra-ssm compare prepare` wrote.
        out: The folder of the comparison.
        limit: Stop after so many seconds, and some more to save, to go on later.
        jobs: Runs of GLUE at once, of each of the two models, spread over the GPUs. Other runs: one on each GPU.
        records: The comparison.json of the same comparison on another machine: what it has finished is not done again.
    """
    for package in ("accelerate", "scipy", "sklearn"):
        require(package, extra="train")
    from ..train.comparison import compare as start

    given = {name: value for name, value in asdict(settings).items() if value is not None}
    start(data, out, limit=limit, jobs=jobs, records=records, **given)


def compare_prepare(
    out: Annotated[Positional[Path], arg(metavar="DATA")],
    /,
    *,
    train: Annotated[tuple[str, ...], arg(metavar="SOURCE ...")],
    books: Annotated[tuple[str, ...], arg(metavar="SOURCE ...")],
    wikitext: Annotated[tuple[str, ...], arg(metavar="SOURCE ...")],
    tokenizer: Annotated[str, arg(metavar="PATH")],
    glue: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None,
) -> None:
    """Turn the text of a comparison into a folder of tokens, once: what compare reads, and may be carried elsewhere.

    Args:
        out: The folder.
        train: Files and folders of text to train on.
        books: The same, held out, of the same kind of text.
        wikitext: The same, held out, of another kind; WikiText's marks become what they stand for.
        tokenizer: A folder with a tokenizer, or a vocab.txt.
        glue: A folder with a folder for each task of GLUE, whose files for training and development are copied.
    """
    from ..train.comparison import prepare

    facts = prepare(out, train, {"books": books, "wikitext": wikitext}, tokenizer, glue)
    counts = ", ".join(f"{name} {found['tokens']:,}" for name, found in facts["texts"].items())
    print(f"wrote {out}: tokens of {counts}; tasks {', '.join(facts.get('glue', [])) or 'none'}")
    print(f"next: hydra-ssm compare {out}")
