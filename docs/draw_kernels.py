"""Draw the chunks of the GPU's algorithm and what its kernels read and write, for docs/performance.md.

python docs/draw_kernels.py            # writes pictures/kernels.png, prints the table of the kernels
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PICTURES = Path(__file__).parent / "pictures"
STYLE: dict[Any, Any] = {"font.size": 8, "font.family": "DejaVu Sans", "axes.linewidth": 0.5, "axes.titlesize": 8}
CAUSAL, ANTICAUSAL, OWN, READ, WRITTEN = "#2166ac", "#b2182b", "#7b3294", "#bdd7e7", "#08519c"

HEADS, HEADDIM, STATE, CHUNK = 24, 64, 64, 64
INNER, HALF, FULL = HEADS * HEADDIM, 2, 4  # bytes of a 16-bit number and of a float32
VALUES, FEATURES, PER_HEAD = HALF * INNER, HALF * STATE, FULL * HEADS
# Bytes a token, each tensor with its gradient in the backward pass.
TENSORS = {
    "z": VALUES,
    "x B C": VALUES + 4 * FEATURES,  # as projected
    "dt": HALF * 2 * HEADS,
    "x": VALUES,  # from here on after the convolution
    "B": 2 * FEATURES,
    "C": 2 * FEATURES,
    "diagonal": HALF * HEADS,
    "decays": 4 * PER_HEAD,
    "S": 2 * HALF * HEADS * HEADDIM * STATE // CHUNK,
    "T": 2 * HALF * HEADS * HEADDIM * STATE // CHUNK,
    "y": VALUES,
    "out": VALUES,
    "parts": 4 * FULL * STATE,  # of dB and dC, through the states
    "sums": 2 * 2 * PER_HEAD,  # for dt and A: of the chunks, and as much again of the states
}


@dataclass(frozen=True)
class Kernel:
    """A kernel and the tensors that it reads and writes; "d" before a name is a gradient."""

    name: str
    does: str
    reads: str
    writes: str

    @property
    def bytes(self) -> int:
        """A token's, every tensor once."""
        return sum(size(name) for name in (*listed(self.reads), *listed(self.writes)))


FORWARD = [
    Kernel("convolution", "taps, bias, SiLU", "x B C", "x, B, C"),
    Kernel("diagonal", "W_D x + D (cuBLAS)", "x", "diagonal"),
    Kernel("decays", "softplus, sums over a chunk", "dt, diagonal", "decays"),
    Kernel("states", "S at each chunk's borders", "x, B, decays", "S"),
    Kernel("output", "M x in a chunk, C S", "x, B, C, decays, S", "y"),
    Kernel("norm", "gate and norm", "y, z", "out"),
]
BACKWARD = [
    Kernel("norm", "and dy . x", "dout, y, z, x", "dy, dz, ddiagonal"),
    Kernel("diagonal", "W_D (cuBLAS)", "x, ddiagonal", ""),
    Kernel("adjoint states", "T: the states of dy", "dy, C, decays", "T"),
    Kernel("feature gradients", "dC through S, dB through T", "x, dy, B, C, decays, S, T", "parts, sums"),
    Kernel("value gradients", "dx; dB, dC in a chunk", "x, dy, B, C, decays, T, parts, ddiagonal", "dx, dB, dC, sums"),
    Kernel("steps", "dt, A, dt_bias", "dt, sums, sums", "ddt"),
    Kernel("convolution", "all its gradients", "x B C, dx, dB, dC", "dx B C"),
]


def listed(tensors: str) -> list[str]:
    """Of a list in words."""
    return tensors.split(", ") if tensors else []


def size(name: str) -> int:
    """Bytes a token of a tensor or of its gradient."""
    return TENSORS[name] if name in TENSORS else TENSORS[name.removeprefix("d")]


def table() -> str:
    """The kernels in Markdown."""
    lines = ["| kernel | reads | writes | bytes a token |", "|---|---|---|---|"]
    for title, kernels in (("forward", FORWARD), ("backward", BACKWARD)):
        lines += [f"| {k.name} | {k.reads} | {k.writes} | {k.bytes:,} |" for k in kernels]
        lines.append(f"| **{title}** | | | **{sum(k.bytes for k in kernels):,}** |")
    return "\n".join(lines)


def draw_matrix(axes: Axes, chunks: int = 4) -> None:
    """Which part of the matrix comes from where."""
    for i in range(chunks):
        for j in range(chunks):
            colour = OWN if i == j else CAUSAL if i > j else ANTICAUSAL
            axes.add_patch(
                Rectangle((j, i), 1, 1, facecolor=colour, alpha=0.75 if i == j else 0.3, edgecolor="white", linewidth=2)
            )
    axes.text(1.0, 3.0, "through S,\nfrom the left", ha="center", va="center")
    axes.text(3.0, 1.0, "through S,\nfrom the right", ha="center", va="center")
    for k in range(chunks):
        axes.text(k + 0.5, k + 0.5, "M", ha="center", va="center", color="white")
    axes.set(xlim=(0, chunks), ylim=(chunks, 0), xticks=[], yticks=[], aspect="equal", title="the matrix, in chunks")
    axes.set(xlabel="j, read from", ylabel="i, written to")


def draw_chunks(axes: Axes, chunks: int = 4) -> None:
    """The sequence, and the two states that go over each border."""
    axes.axis("off")
    axes.set(
        xlim=(-0.15, chunks + 0.15), ylim=(-1.3, 2.3), title="the sequence: one state a direction, head and border"
    )
    for k in range(chunks):
        axes.add_patch(Rectangle((k + 0.06, 0.2), 0.88, 0.6, facecolor=OWN, alpha=0.75))
        axes.text(k + 0.5, 0.5, f"{CHUNK} tokens", ha="center", va="center", color="white")
    for k in range(1, chunks):
        for y, colour, name in ((1.35, CAUSAL, "S"), (-0.35, ANTICAUSAL, "S")):
            ends = ((k - 0.5, y), (k + 0.5, y))
            start, end = ends if colour == CAUSAL else ends[::-1]
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.5})
            axes.text(k, y + 0.12, f"{name} ({STATE} x {HEADDIM})", ha="center", va="bottom", color=colour, fontsize=7)
    axes.text(chunks / 2, 2.05, "B and dt x write it, the next chunks' C read it", ha="center", color=CAUSAL)
    axes.text(chunks / 2, -0.85, "in the backward pass T goes against each arrow:", ha="center", va="center")
    axes.text(chunks / 2, -1.15, "C and dy write it, B and x read it", ha="center", va="center")


def draw_traffic(axes: Axes) -> None:
    """A row a kernel, a column a tensor, as wide as it has bytes."""
    gap, minimum, place = 260, 300, {}
    right = 0
    for name, bytes_ in TENSORS.items():
        place[name] = right, max(bytes_, minimum)
        right += max(bytes_, minimum) + gap
        axes.text(place[name][0] + place[name][1] / 2, -0.35, name, ha="center", va="bottom", fontsize=7,
                  rotation=90 if bytes_ < 1500 else 0)  # fmt: skip
    for row, kernel in enumerate([*FORWARD, None, *BACKWARD]):
        if kernel is None:
            continue
        axes.text(-gap, row, kernel.name, ha="right", va="center")
        axes.text(right, row, f"{kernel.bytes / 1000:.1f} kB", ha="left", va="center")
        columns: dict[str, list[str]] = {}
        for kind, names in (("read", kernel.reads), ("written", kernel.writes)):
            for name in listed(names):
                column = name if name in TENSORS else name.removeprefix("d")
                columns.setdefault(column, []).append(kind + (" d" if column != name else ""))
        for column, found in columns.items():
            left, width = place[column]
            for part, kind in enumerate(found):
                height = 0.7 / len(found)
                axes.add_patch(
                    Rectangle(
                        (left, row - 0.35 + part * height), width, height,
                        facecolor=READ if kind.startswith("read") else WRITTEN,
                    )
                )  # fmt: skip
                if kind.endswith(" d") and width > 1000:
                    axes.text(left + width / 2, row - 0.35 + (part + 0.5) * height, "d", ha="center", va="center",
                              fontsize=5, color="black" if kind.startswith("read") else "white")  # fmt: skip
    axes.text(-gap, len(FORWARD), "backward:", ha="right", va="center", style="italic")
    axes.set(xlim=(-6800, right + 3200), ylim=(len(FORWARD) + len(BACKWARD) + 0.6, -2.4))
    axes.axis("off")


def draw() -> Figure:
    figure = plt.figure(figsize=(7.6, 6.4))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.75), width_ratios=(1, 2.1), left=0.05, right=0.99, top=0.95,
                               bottom=0.02, hspace=0.16, wspace=0.08)  # fmt: skip
    draw_matrix(figure.add_subplot(grid[0, 0]))
    draw_chunks(figure.add_subplot(grid[0, 1]))
    axes = figure.add_subplot(grid[1, :])
    draw_traffic(axes)
    axes.set_title("what kernels read (light) and write (dark): widths are bytes a token, d is a gradient")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder for the PNG file")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = draw()
        figure.savefig(out / "kernels.png", dpi=120, metadata={"Software": None})
        plt.close(figure)
    print(table())


if __name__ == "__main__":
    main()
