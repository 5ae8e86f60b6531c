"""Mixing matrices as a PNG: layers below each other, heads side by side, tokens on the axes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._extras import require
from .capture import Mixing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 0.99  # the colours end at this quantile of |entry| off the diagonal: a free diagonal may saturate
SOFTWARE = "hydra-ssm inspect"  # names the author in the file
AXES = "rows: the token that is written to; columns: the tokens it reads"
DPI = 100
SIDES = {1: 720, 2: 480, 4: 320}  # pixels of a matrix, at least, by the number of heads side by side; more: SMALL
SMALL = 200
LETTER = 10  # pixels that a line of a token's text needs
MOST_FOR_TEXT = 400  # pixels that a side grows to, so that each token has its text
LONGEST = 14  # letters of a token that are shown
TITLE, GAP = 18, 14
MOST = 12_000_000  # pixels of a picture


def colour_limit(M: Tensor) -> float:
    """The |entry| of M (n, n) at which colours end, above 0."""
    size = M.detach().float().abs()
    off = size - size.diagonal().diag()
    found = off[off > 0]
    if not len(found):
        return float(size.max()) or 1.0
    return float(found.kthvalue(1 + int(SHOWN * (len(found) - 1))).values)


def draw(mixings: Sequence[Mixing], tokens: Sequence[str]) -> Figure:
    """The matrices of the first document, whose tokens these are: red is positive, blue negative, white zero.

    Each has colours of its own; the number above it is where they end.
    """
    rows, columns = len(mixings), max(len(mixing.heads) for mixing in mixings)
    n = len(tokens)
    side, step = _sizes(n, rows, columns)
    words = [_short(token) for token in tokens]
    margin = 16 + 5 * max(map(len, words))
    width = margin + columns * (side + GAP) + GAP
    height = margin + rows * (side + TITLE + GAP) + TITLE + GAP
    figure = require("matplotlib.figure", "train").Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    text: dict[str, Any] = {"fontsize": 6, "parse_math": False}
    title = text | {"fontsize": 8}
    figure.text(margin / width, 1 - 0.9 * TITLE / height, AXES, **title)
    for row, mixing in enumerate(mixings):
        top = TITLE + GAP + row * (side + TITLE + GAP) + TITLE
        for column, head in enumerate(mixing.heads):
            place = (margin + column * (side + GAP), height - top - side)
            axes = figure.add_axes((place[0] / width, place[1] / height, side / width, side / height))
            if mixing.missing:
                axes.axis("off")
                if column == 0:
                    axes.set_title(f"layer {mixing.layer}: no matrix, {mixing.missing}", loc="left", **title)
                continue
            last = row == rows - 1 or bool(mixings[row + 1].missing)
            _label(axes, words, step, text, left=column == 0, below=last)
            M = mixing.matrices[0][column].detach().float().cpu()
            limit = colour_limit(M)
            axes.imshow(M.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="auto")
            name = f"layer {mixing.label}, head {head}" if column == 0 or columns < 5 else f"head {head}"
            axes.set_title(f"{name}   ±{limit:.2g}", pad=3, **title)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 256 colours that says where it comes from."""
    agg, images = require("matplotlib.backends.backend_agg", "train"), require("PIL.Image", "train")
    canvas = agg.FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands for it
        canvas.draw()
    image = images.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    origin = require("PIL.PngImagePlugin", "train").PngInfo()
    origin.add_text("Software", SOFTWARE)
    image.quantize(256, dither=images.Dither.NONE).save(path, format="png", pnginfo=origin)


def _sizes(n: int, rows: int, columns: int) -> tuple[int, int]:
    """Pixels of a matrix's side, whole ones a token if they fit; and the step between tokens whose text is shown."""
    least = next((side for most, side in SIDES.items() if columns <= most), SMALL)
    least = max(least, min(LETTER * n, MOST_FOR_TEXT))
    side = n * max(1, math.ceil(least / n))
    most = int(math.sqrt(MOST / (rows * columns)))
    side = min(side, most)
    return side, max(1, math.ceil(LETTER * n / side))


def _label(axes: Axes, words: Sequence[str], step: int, text: dict[str, Any], *, left: bool, below: bool) -> None:
    shown = list(range(0, len(words), step))
    axes.tick_params(length=2, width=0.5, pad=1)
    axes.set_xticks(shown if below else [], [words[i] for i in shown] if below else [], rotation=90, **text)
    axes.set_yticks(shown if left else [], [words[i] for i in shown] if left else [], **text)
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)


def _short(token: str) -> str:
    token = "".join(c if c.isprintable() else "·" for c in token)
    return token if len(token) <= LONGEST else token[: LONGEST - 1] + "…"
