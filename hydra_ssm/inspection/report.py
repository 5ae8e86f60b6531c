"""What `hydra-ssm inspect` does: load a model, look at its matrices, write them down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..matrices import MATRICES
from ..text.inference import TextModel
from .alignment import alignment
from .capture import Mixing, mixing_matrices
from .page import GENERATOR, fits, page
from .picture import SOFTWARE, draw, save
from .ranks import promise, rank

MOST = 512  # tokens
OVERVIEW = 12, 8  # layers and heads of the picture, where none are chosen
EFFORT = 4e9  # cubed tokens of matrices whose ranks are found: some seconds
PNG, HTML = "matrices.png", "matrices.html"


def inspect(
    folder: Path, text: str, *, out: Path, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> str:
    """Write PNG and HTML into the folder `out`, and return what there is to say.

    Raises ValueError where there is no model, no word, too long a text, no such layers or heads, a matrix that is not
    finite, or a file of another origin where one is to be written.
    """
    check_out(out)
    model = TextModel(folder)
    inputs, tokens = _tokens(model, text)
    with torch.no_grad():
        found = mixing_matrices(model.model.float(), layers=layers, heads=heads, **inputs)
    check_finite(found, folder)
    drawn = with_factors(found)
    held = that_fit(drawn, fits(len(tokens)), heads is not None)
    shown = overview(drawn, layers is None, heads is None)
    summary = f"{_plural(len(tokens), 'token')}, {_plural(len(found), 'layer')}\n\n{table(found)}"
    out.mkdir(parents=True, exist_ok=True)
    save(draw(shown, tokens), out / PNG)
    (out / HTML).write_text(page(held, tokens, title=text, summary=summary), encoding="utf-8")
    return f"{summary}\n\nwrote {out / PNG}{part(shown, drawn)}\nwrote {out / HTML}{part(held, drawn)}"


def with_factors(found: Sequence[Mixing]) -> list[Mixing]:
    """What there is to draw: of a class without a matrix its factors."""
    return [one for mixing in found for one in mixing.factors or (mixing,)]


def check_finite(found: Sequence[Mixing], folder: Path) -> None:
    """Raise ValueError where a matrix is not."""
    broken = [one.layer for one in with_factors(found) if not all(M.isfinite().all() for M in one.matrices)]
    if broken:
        raise ValueError(f"the matrices of {folder} must be finite, those of layer {broken[0]} are not")


def that_fit(found: Sequence[Mixing], room: int, chosen: bool) -> Sequence[Mixing]:
    """What a page holds: all, or if that is more than the room, heads evenly chosen, or layers too if need be."""
    total = _count(found)
    if total <= room:
        return found
    if chosen:
        raise ValueError(f"a page has room for {room} matrices of this size, got {total}: choose fewer heads or layers")
    return [_some_heads(mixing, max(1, room // len(found))) for mixing in _some(found, room)]


def overview(found: Sequence[Mixing], all_layers: bool, all_heads: bool) -> Sequence[Mixing]:
    """What the picture shows: of what was not chosen, some."""
    shown = _some(found, OVERVIEW[0]) if all_layers else found
    return [_some_heads(mixing, OVERVIEW[1]) for mixing in shown] if all_heads else shown


def part(some: Sequence[Mixing], found: Sequence[Mixing]) -> str:
    count, total = _count(some), _count(found)
    return "" if count == total else f": {count} of {total} matrices, --layers and --heads choose others"


def numbers(what: str, given: Sequence[str]) -> list[int]:
    """What "0", "2-5" and so on name. Raises ValueError where they name nothing."""
    found: set[int] = set()
    for part in given:
        first, dash, last = part.partition("-")
        whole = all(number.isdecimal() and len(number) < 7 for number in ((first, last) if dash else (first,)))
        if not whole or int(first) > int(last or first):
            raise ValueError(f"--{what} must be numbers and ranges such as 0 2-5, got {part}")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def check_out(out: Path, *more: str) -> None:
    """Raise ValueError where the files, PNGs of `more` names too, cannot be written without the loss of others' own."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file")
    for path, mark in ((out / HTML, GENERATOR), *((out / name, SOFTWARE) for name in (PNG, *more))):
        if path.exists() and not (path.is_file() and mark.encode() in path.read_bytes()[:2000]):
            raise ValueError(f"{path} is not of hydra-ssm inspect and will not be replaced: give another --out")


def _tokens(model: TextModel, text: str) -> tuple[dict[str, Tensor], list[str]]:
    """The model's inputs for a text, and the tokens by name."""
    if not text.strip():
        raise ValueError("the text must hold a word, it is empty")
    inputs = dict(model.tokenizer([text], return_tensors="pt"))
    ids = inputs["input_ids"][0].tolist()
    if set(ids) <= {model.tokenizer.cls_token_id, model.tokenizer.sep_token_id}:
        raise ValueError(f"the text must hold a word, the tokenizer finds none in {text!r}")
    longest = min(model.model.longest_document or MOST, MOST)
    if len(ids) > longest:
        why = "to be drawn" if longest == MOST else "for this model"
        raise ValueError(f"the text must have at most {longest} tokens {why}, it has {len(ids)}")
    return inputs, list(model.tokenizer.convert_ids_to_tokens(ids))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _count(mixings: Sequence[Mixing]) -> int:
    return sum(len(mixing.heads) for mixing in mixings if mixing.matrices)


def _evenly(count: int, most: int) -> list[int]:
    """At most so many numbers below count, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / max(1, most - 1)) for k in range(most)]


def _some(mixings: Sequence[Mixing], most: int) -> list[Mixing]:
    return [mixings[k] for k in _evenly(len(mixings), most)]


def _some_heads(mixing: Mixing, most: int) -> Mixing:
    kept = _evenly(len(mixing.heads), most)
    return replace(mixing, heads=tuple(mixing.heads[k] for k in kept), matrices=tuple(M[kept] for M in mixing.matrices))


# --------------------------------------------------------------------------------------------------------- the table

HEADER = ("layer", "mixer", "heads", "rank below", "above", "whole", "promised rank", "aligned")


def table(mixings: Sequence[Mixing]) -> str:
    """For each layer the ranks of its first document, the largest of its heads, and whether its class is aligned."""
    measured = [mixing for mixing in mixings if mixing.matrices]
    n = max((mixing.matrices[0].shape[-1] for mixing in measured), default=1)
    most, cuts = _affordable(n, _count(measured), len(measured))
    rows = [HEADER, *(_row(mixing, most, cuts) for mixing in mixings)]
    widths = [max(len(row[k]) for row in rows if len(row) == len(HEADER)) for k in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    notes = [f"rank below, above: the largest of a block strictly below, above the diagonal; of {n} tokens {n // 2}."]
    if cuts is not None:
        notes.append(f"Looked for at {len(cuts)} of {n - 1} places, in at most {_plural(most, 'head')} a layer.")
    notes = notes if measured else []
    if any(mixing.factors for mixing in mixings):
        notes.append("Of mixers without a matrix the factors are drawn, whose products with x are multiplied.")
    return "\n".join([*lines, "", *notes] if notes else lines)


def _affordable(n: int, count: int, layers: int) -> tuple[int, list[int] | None]:
    """How many heads of a layer, and at which cuts (None: all), so that it takes seconds."""
    if count * n**3 * (1 + (n - 1) / 4) <= EFFORT:
        return count, None
    cuts = [n // 4, n // 2, n - n // 4]
    most = int(EFFORT / (n**3 * (1 + len(cuts) / 4)) / max(1, layers))
    return max(1, most), cuts


def _row(mixing: Mixing, most: int, cuts: list[int] | None) -> tuple[str, ...]:
    mixer = mixing.mixer
    names = {matrix: name for name, matrix in MATRICES.items()}
    name = names.get(mixer.matrix_class, mixer.matrix_class.__name__)
    name += "" if mixer.data_dependent or not mixer.matrix_class.data_dependent else ", fixed"
    if mixing.missing:
        return (str(mixing.layer), name, f"no matrix: {mixing.missing}")
    if not mixing.heads:
        return (str(mixing.layer), name, f"none of these heads, it has {mixer.settings.nheads}")
    M = _some_heads(mixing, most).matrices[0]
    order = mixer.settings.d_state
    promised = promise(mixer.matrix_class, order)
    found = [int(t.max()) for t in rank(M, cuts=cuts)]
    kept = all(bound is None or number <= bound for number, bound in zip(found, promised, strict=True))
    return (
        str(mixing.layer), name, str(len(mixing.heads)), *map(str, found),
        str(promised) + ("" if kept else " (NOT KEPT)"), alignment(mixer.matrix_class).kind,
    )  # fmt: skip
