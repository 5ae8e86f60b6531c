"""Mixing matrices as one HTML file that needs nothing else: choose layer and head, hover over a weight."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .capture import Mixing
from .picture import colour_limit

TEMPLATE = Path(__file__).with_name("page.html")
GENERATOR = '<meta name="generator" content="hydra-ssm inspect">'  # tells a page that may be replaced
LARGEST = 2.0**15  # near the end of float16
BYTES = 12_000_000  # of the weights that a page holds: 2 a weight; a third more as text


def page(mixings: Sequence[Mixing], tokens: Sequence[str], *, title: str = "", summary: str = "") -> str:
    """The page of the first document, whose tokens these are. Weights are kept as float16 of a scale for each.

    Text may hold anything: it never reaches the browser as markup. See `fits` for the size.
    """
    layers, weights = [], bytearray()
    for mixing in mixings:
        heads = []
        for head, M in zip(mixing.heads, mixing.matrices[0] if mixing.matrices else (), strict=False):
            packed, scale = _packed(M.detach().float())
            heads.append({"head": head, "scale": scale, "limit": colour_limit(M.detach()), "start": len(weights) // 2})
            weights += packed
        kind = mixing.mixer.matrix_class.__name__
        layers.append({"layer": mixing.label, "kind": kind, "heads": heads, "missing": mixing.missing})
    data = {"tokens": list(tokens), "layers": layers, "summary": summary}
    return _filled(
        TEMPLATE.read_text(encoding="utf-8"),
        {
            "GENERATOR": GENERATOR,
            "TITLE": html.escape(title or " ".join(tokens)),
            "DATA": _script_safe(json.dumps(data)),
            "WEIGHTS": base64.b64encode(bytes(weights)).decode("ascii"),
        },
    )


def fits(tokens: int) -> int:
    """How many matrices of so many tokens a page can hold."""
    return max(1, BYTES // (2 * tokens * tokens))


def _packed(M: Tensor) -> tuple[bytes, float]:
    """Little-endian float16 of M / scale, and the scale, by which three digits hold down to 1e-9 of the largest."""
    scale = (float(M.abs().max()) or 1.0) / LARGEST
    return (M / scale).to(torch.float16).cpu().contiguous().numpy().astype("<f2").tobytes(), scale


def _script_safe(text: str) -> str:
    """JSON that no HTML parser can take for the end of its script element."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _filled(template: str, values: dict[str, str]) -> str:
    """Each {{NAME}} replaced, once, from left to right: what a value holds is not looked at again."""
    parts = template.split("{{")
    found = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition("}}")
        found += [values[name], rest]
    return "".join(found)
