"""What `hydra-ssm inspect` does with a picture: feature maps and mixing matrices, drawn over it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._extras import require
from .capture import Mixing, mixing_matrices
from .page import fits, page
from .picture import DPI, draw, save
from .report import HTML, MOST, PNG, check_finite, check_out, overview, part, table, that_fit, with_factors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS = "maps.png"
SIDE, EDGE, HEAD = 150, 8, 30  # pixels of a map, between maps, and above them

Patch = tuple[int, int]


def holds_image_model(folder: Path) -> bool:
    """Whether a folder has the description of an image model, of timm's form or of transformers'."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and ("architecture" in found or found.get("model_type") == "hydra_ssm_vit")


def over_patches(model: nn.Module, pixels: Tensor, mixings: Sequence[Mixing]) -> list[Mixing]:
    """What `mixing_matrices` found of an image model and a picture (1, C, H, W), with patches in row-major order.

    Mixers see patches in the order in which they read them; here rows and columns are the tokens before the patches,
    and the patches line by line. A layer that sums over orders comes once for each of them.
    """
    from ..vision import reading

    grid, prefix = patch_grid(model, pixels), int(getattr(model, "num_prefix_tokens", 0))
    found: list[Mixing] = []
    for mixing in mixings:
        orders = reading(_order(model, mixing.name), grid, prefix)
        if orders is None or not mixing.matrices:
            found.append(mixing)
            continue
        order = orders[mixing.layer % len(orders)]
        for M, back in zip(mixing.matrices, order.inverse[:, 0], strict=True):
            found.append(replace(mixing, matrices=(M[:, back][:, :, back],)))
    return found


def patch_grid(model: nn.Module, pixels: Tensor) -> Patch:
    """Rows and columns of patches of a picture (1, C, H, W)."""
    height, width = model.patch_embed.patch_size  # type: ignore[union-attr, misc]
    return pixels.shape[2] // int(height), pixels.shape[3] // int(width)  # type: ignore[arg-type]


def _order(model: nn.Module, name: str) -> str:
    """In which the mixer of this name reads: that of the model, or of what holds the mixer."""
    holder = model.get_submodule(name.rpartition(".")[0])
    return str(getattr(holder, "order", getattr(model, "order", "row")))


def inspect_picture(
    folder: Path,
    picture: Path,
    *,
    out: Path,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    patches: Sequence[Patch] | None = None,
) -> str:
    """Write matrices.png, matrices.html and maps.png into `out`, and return what there is to say.

    Raises ValueError where there is no model, no such layers, heads or patches, too many patches, or a file of another
    origin where one is to be written; OSError where there is no picture.
    """
    from ..vision.loading import load_image_model
    from ..vision.pictures import open_picture

    check_out(out, MAPS)
    loaded = load_image_model(folder)
    opened, _ = open_picture(picture.read_bytes())
    pixels = loaded.prepare(opened.convert("L") if loaded.channels == 1 else opened)[None]
    grid = patch_grid(loaded.model, pixels)
    if math.prod(grid) > MOST:
        raise ValueError(f"the picture must have at most {MOST} patches to be drawn, it has {math.prod(grid)}")
    chosen = list(patches) if patches is not None else _spread(grid)
    for row, column in chosen:
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise ValueError(
                f"patches must be rows from 0 to {grid[0] - 1} and columns from 0 to {grid[1] - 1}, got {row},{column}"
            )
    with torch.no_grad():
        seen = mixing_matrices(loaded.model, pixels, layers=layers, heads=heads)
        check_finite(seen, folder)
        found = over_patches(loaded.model, pixels, with_factors(seen))
        logits = loaded.model(pixels)[0]
    prefix = int(getattr(loaded.model, "num_prefix_tokens", 0))
    tokens = [f"token {i}" for i in range(prefix)] + [f"{r},{c}" for r in range(grid[0]) for c in range(grid[1])]
    held, shown = that_fit(found, fits(len(tokens)), heads is not None), overview(found, layers is None, heads is None)
    drawn = overview(found, layers is None, False)
    features = feature_maps(loaded.model, pixels, sorted({mixing.layer for mixing in drawn}))
    named = logits.ndim == 1 and getattr(loaded.model, "num_classes", 1) != 0
    answer = _answer(logits.softmax(-1), loaded.classes) if named else "no classes"
    summary = f"{grid[0]} x {grid[1]} patches: {answer}\n\n{table(seen)}"
    out.mkdir(parents=True, exist_ok=True)
    save(draw(shown, tokens), out / PNG)
    (out / HTML).write_text(page(held, tokens, title=picture.name, summary=summary), encoding="utf-8")
    save(draw_maps(loaded.shown(pixels[0]), features, drawn, grid, chosen), out / MAPS)
    wrote = [f"wrote {out / PNG}{part(shown, found)}", f"wrote {out / HTML}{part(held, found)}", f"wrote {out / MAPS}"]
    return "\n".join([summary, "", *wrote])


def feature_maps(model: nn.Module, pixels: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """(rows, columns, 3) from 0 to 1 of each layer: the three main directions of its features, as colours."""
    with torch.no_grad():
        found = model.forward_intermediates(pixels, list(layers), intermediates_only=True)  # type: ignore[operator]
    return {layer: _colours(own[0].float()) for layer, own in zip(layers, found, strict=True)}


def _colours(features: Tensor) -> Tensor:
    """Principal components of (C, rows, columns), each from 0 to 1; the sign makes its largest weight positive."""
    flat = features.flatten(1).T
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    directions = directions[:3]
    sign = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    found = flat @ (directions * sign).T
    found = torch.cat([found, found.new_zeros(len(found), 3 - found.shape[1])], 1)
    low, high = found.amin(0), found.amax(0)
    return ((found - low) / (high - low).clamp(min=1e-12)).unflatten(0, features.shape[1:])


def draw_maps(
    picture: Tensor, features: dict[int, Tensor], mixings: Sequence[Mixing], grid: Patch, patches: Sequence[Patch]
) -> Figure:
    """A row for each mixing: features; how much each patch is read; what each of `patches` (ringed) reads.

    Weights are the mean of |M| over the heads, without the diagonal; the brightest colour is the largest of a map.
    """
    columns = 2 + len(patches)
    width, height = EDGE + columns * (SIDE + EDGE), HEAD + EDGE + len(mixings) * (SIDE + EDGE)
    figure = require("matplotlib.figure", "train").Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    titles = ["features", "how much it is read", *(f"{row},{column} reads" for row, column in patches)]
    text: dict[str, Any] = {"fontsize": 8, "parse_math": False}
    for number, mixing in enumerate(mixings):
        maps: list[Tensor | None] = [features.get(mixing.layer), *_reads(mixing, grid, patches)]
        for column, own in enumerate(maps):
            left, bottom = EDGE + column * (SIDE + EDGE), height - HEAD - EDGE - number * (SIDE + EDGE) - SIDE
            axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
            axes.axis("off")
            if number == 0:
                axes.set_title(titles[column], pad=4, **text)
            axes.imshow(picture.numpy(), extent=(0, grid[1], grid[0], 0), aspect="auto")
            if own is None:
                axes.text(0.1, 0.9, "no matrix", va="top", color="white", **text)
            elif column == 0:
                axes.imshow(own.numpy(), extent=(0, grid[1], grid[0], 0), aspect="auto", alpha=0.75)
            else:
                axes.imshow(own.numpy(), extent=(0, grid[1], grid[0], 0), aspect="auto", alpha=0.7, cmap="inferno",
                            vmin=0, vmax=float(own.max()) or 1.0)  # fmt: skip
            if column > 1:
                row, place = patches[column - 2]
                axes.plot([place, place + 1, place + 1, place, place], [row, row, row + 1, row + 1, row], "c-", lw=1.2)
            if column == 0:
                axes.text(0.02, 0.98, f"layer {mixing.label}", transform=axes.transAxes, va="top", color="white",
                          bbox={"facecolor": "black", "alpha": 0.6, "pad": 1, "lw": 0}, **text)  # fmt: skip
    return figure


def _reads(mixing: Mixing, grid: Patch, patches: Sequence[Patch]) -> list[Tensor | None]:
    """Maps (rows, columns): how much each patch is read by the others, and what each of `patches` reads."""
    if not mixing.matrices or not mixing.heads:
        return [None] * (1 + len(patches))
    n = math.prod(grid)
    M = mixing.matrices[0].abs().float().mean(0)[-n:, -n:]
    M = M - M.diagonal().diag()
    return [M.mean(0).unflatten(0, grid), *(M[row * grid[1] + column].unflatten(0, grid) for row, column in patches)]


def places(given: Sequence[str]) -> list[Patch]:
    """What "3,4" and so on name. Raises ValueError where they name nothing."""
    found = []
    for one in given:
        row, comma, column = one.partition(",")
        if not (comma and row.isdecimal() and column.isdecimal()):
            raise ValueError(f"--patches must be rows and columns such as 3,4, got {one}")
        found.append((int(row), int(column)))
    return found


def _spread(grid: Patch) -> list[Patch]:
    """The patch in the middle, and two between it and corners."""
    rows, columns = grid
    return list(
        dict.fromkeys([(rows // 2, columns // 2), (rows // 4, columns // 4), (3 * rows // 4, 3 * columns // 4)])
    )


def _answer(probabilities: Tensor, classes: Sequence[str] | None) -> str:
    values, places = probabilities.topk(min(3, len(probabilities)))
    named = (
        classes if classes and len(classes) == len(probabilities) else [f"class {i}" for i in range(len(probabilities))]
    )
    return ", ".join(f"{named[i]} {p:.1%}" for i, p in zip(places.tolist(), values.tolist(), strict=True))
