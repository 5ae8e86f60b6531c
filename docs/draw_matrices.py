"""Draw the matrix that each class mixes with, for docs/matrices.md."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from hydra_ssm import MATRICES, MatrixMixer
from hydra_ssm.matrices import Mult
from hydra_ssm.matrices.semiseparable import Triangles
from hydra_ssm.ops.reference import entries

LENGTH, WIDTH, HEADDIM = 48, 16, 8
PIXELS_PER_INCH, COLOURS = 120, 256
PICTURES = Path(__file__).parent / "pictures"
STYLE: dict[Any, Any] = {"font.size": 8, "font.family": "DejaVu Sans", "axes.linewidth": 0.5, "axes.titlesize": 8}
SHOWN = 0.97  # the colours end at this quantile of |entry|: a free diagonal saturates, the rest stays visible


@dataclass(frozen=True)
class Example:
    """The layer whose matrix is drawn, small and untrained."""

    gain: float = 2.0  # on in_proj: features of a size at which the structure shows in 48 tokens
    options: dict[str, Any] = field(default_factory=lambda: {"d_state": 2, "max_length": LENGTH})
    seed: int = 0

    def having(self, **options: Any) -> Example:
        return replace(self, options=self.options | options)


# A = -1 and a step of 0.1 a token: a decay over about ten tokens.
SCAN = Example(gain=1.0).having(dt_min=0.1, dt_max=0.1, d_state=4)
EXAMPLES = {
    "attention": Example(gain=5.0),
    "vandermonde": Example(gain=25.0),  # its frequencies are thousandths of a turn for features of 1
    "cauchy": Example(gain=8.0),
    **{name: SCAN for name, matrix in MATRICES.items() if issubclass(matrix, Triangles)},
}


def layer_of(name: str) -> MatrixMixer:
    """The layer of a class, in float64."""
    example = EXAMPLES.get(name, Example())
    torch.manual_seed(example.seed)
    layer = MatrixMixer(WIDTH, name, headdim=HEADDIM, **example.options).double()
    with torch.no_grad():
        layer.in_proj.weight.mul_(example.gain)
    return layer


def smooth_input() -> Tensor:
    """(1, LENGTH, WIDTH): a few slow waves in each channel."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.arange(1, 7, dtype=torch.float64)
    phase, size = (torch.rand(2, 6, WIDTH, dtype=torch.float64, generator=generator) - 0.5).unbind()
    turns = torch.arange(LENGTH, dtype=torch.float64)[:, None, None] / LENGTH * waves[:, None] + phase
    return (torch.sin(2 * math.pi * turns) * size * 2).sum(1)[None]


@torch.no_grad()
def matrices_of(name: str) -> list[tuple[str, Tensor]]:
    """(caption, (LENGTH, LENGTH) entries) of what there is to see of a class."""
    matrix = layer_of(name).matrix(smooth_input())
    if isinstance(matrix, Mult):  # has no matrix: its two factors
        return [("anticausal" if t.upper else "causal", entries(t, None)[0, 0]) for t in matrix.triangles]
    M = matrix.dense()[0]
    if name == "concat":
        return [("first head", M[0]), ("last head", M[-1])]
    return [("", M[0])]


def colour_limit(M: Tensor) -> float:
    return float(M[M != 0].abs().quantile(SHOWN))


def square(figure: Figure, x: float, y: float, side: int) -> Axes:
    """Axes of `side` pixels whose lower left corner is at x, y in inches: whole pixels an entry."""
    width, height = figure.get_size_inches()
    inches = side / PIXELS_PER_INCH
    return figure.add_axes((x / width, y / height, inches / width, inches / height), xticks=[], yticks=[])


def show(axes: Axes, M: Tensor, limit: float) -> AxesImage:
    """M in blue (negative), white (zero) and red (positive)."""
    return axes.imshow(M.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")


def draw(name: str) -> Figure:
    """The picture of one class."""
    panels = matrices_of(name)
    figure = plt.figure(figsize=(3.1 * len(panels), 2.6))
    for place, (caption, M) in enumerate(panels):
        axes = square(figure, 0.35 + 3.1 * place, 0.3, 5 * LENGTH)
        image = show(axes, M, colour_limit(M))
        axes.set(title=caption, xticks=[0, LENGTH - 1], yticks=[0, LENGTH - 1])
        axes.tick_params(length=2, width=0.5)
        axes.set_xlabel("j, read from", labelpad=-8)
        axes.set_ylabel("i, written to", labelpad=-8)
        x, y, width, height = axes.get_position().bounds
        side = figure.add_axes((x + 1.05 * width, y + 0.1 * height, 0.04 * width, 0.8 * height))
        bar = figure.colorbar(image, cax=side, extend="both")
        bar.locator = MaxNLocator(5)
        side.tick_params(length=2, width=0.5, labelsize=7)
    return figure


def draw_overview() -> Figure:
    """All classes in one grid."""
    rows = math.ceil(len(MATRICES) / 4)
    figure = plt.figure(figsize=(7.3, 1.95 * rows))
    for place, name in enumerate(MATRICES):
        x, y = 0.1 + 1.8 * (place % 4), 0.1 + 1.95 * (rows - 1 - place // 4)
        panels = matrices_of(name)
        side = 4 * LENGTH // len(panels)
        figure.text((x + 0.8) / 7.3, (y + 1.66) / (1.95 * rows), name, ha="center", family="monospace")
        for index, (_, M) in enumerate(panels):
            # The first of two lies in the upper left corner, the second in the lower right one.
            step = index * side / PIXELS_PER_INCH
            show(square(figure, x + step, y + 1.6 - side / PIXELS_PER_INCH - step, side), M, colour_limit(M))
    return figure


@torch.no_grad()
def draw_documents() -> Figure:
    """One layer and one input, alone, with padding, and packed."""
    layer, u = layer_of("quasiseparable"), smooth_input()
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[:, :6] = mask[:, 26:32] = False
    seen = {
        "one document": layer.matrix(u),
        "padding in front and in the middle": layer.matrix(u, mask=mask),
        "three documents in one row": layer.matrix(u, cu_seqlens=torch.tensor([0, 12, 32, LENGTH])),
    }
    matrices = {title: matrix.dense()[0, 0] for title, matrix in seen.items()}
    limit = colour_limit(matrices["one document"])
    figure = plt.figure(figsize=(6.8, 2.4))
    for place, (title, M) in enumerate(matrices.items()):
        axes = square(figure, 0.1 + 2.25 * place, 0.1, 5 * LENGTH)
        axes.set_title(title)
        show(axes, M, limit)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a small PNG that holds nothing of the day or the machine."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=PIXELS_PER_INCH)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes, overview, documents; none: all of these")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder for the PNG files")
    options = parser.parse_args(arguments)
    pages = {"overview": draw_overview, "documents": draw_documents}
    known = [*pages, *MATRICES]
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"names must be among {', '.join(known)}, got {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name in options.names or known:
            save(pages[name]() if name in pages else draw(name), options.out / f"{name}.png")


if __name__ == "__main__":
    main()
