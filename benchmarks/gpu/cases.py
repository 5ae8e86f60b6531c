"""What the kernels are checked on: cases with names, and others that hypothesis draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hydra_ssm import Hydra
from hydra_ssm.ops import Documents, Triangle, semiseparable

DTYPES = ("bfloat16", "float16", "float32")
PRODUCT = ("x", "dt_f", "dt_b", "A", "B_f", "C_f", "B_b", "C_b", "diagonal")
HALF = {"x", "B_f", "C_f", "B_b", "C_b", "diagonal"}  # the rest are exponents, float32
Run = Callable[[str, torch.dtype], dict[str, Tensor]]  # (impl, dtype) to the output and all gradients


@dataclass(frozen=True)
class Case:
    """One problem: the product alone, or a layer with its projections."""

    name: str = "drawn"
    layer: bool = False
    dtype: str = "float32"
    batch: int = 1
    length: int = 300
    heads: int = 4
    width: int = 64
    state: int = 64
    groups: int = 1
    documents: int = 0  # packed in each row; 0: the row is one
    mask: str = ""  # of a layer: "end" or "holes"
    decay: float = 1.0  # A is multiplied by it
    zero: float = 0.0  # share of steps that are zero; in a layer, of heads
    scale: float = 1.0  # of x
    conv: int = 7
    recompute: bool = False
    seed: int = 0

    @property
    def kernels(self) -> tuple:
        """Cases that are alike in this share compiled kernels."""
        sizes = self.heads, self.width, self.state, self.groups
        return self.layer, self.dtype, *sizes, self.conv * self.layer, bool(self.documents or self.mask)


def _named() -> list[Case]:
    product, layer = Case(batch=2), Case(layer=True, batch=2)
    corners = [(16, 16), (16, 128), (128, 16), (128, 128), (32, 64), (64, 32)]
    found = {
        "ordinary": product,
        "8,192 tokens": replace(product, length=8192, batch=1),
        "documents": replace(product, documents=7),
        "documents of one token": replace(product, length=100, documents=100),
        "1,000 documents": replace(product, batch=1, length=5000, documents=1000),
        "decay times 100": replace(product, decay=100.0),
        "decay times 1/1000": replace(product, decay=1e-3),
        "a third of dt 0": replace(product, zero=0.33),
        "dt 0": replace(product, zero=1.0),
        "huge": replace(product, scale=1e8),
        "tiny": replace(product, scale=1e-8),
        "two groups": replace(product, groups=2),
        **{f"L = {n}": replace(product, length=n) for n in (1, 2, 63, 127, 129, 1025)},
        **{f"P {p}, N {n}": replace(product, heads=2, width=p, state=n) for p, n in corners},
        "layer": layer,
        "layer, 4,097 tokens": replace(layer, batch=1, length=4097),
        "layer, recompute": replace(layer, recompute=True),
        "layer, documents": replace(layer, batch=1, documents=7),
        "layer, documents of one token": replace(layer, batch=1, length=100, documents=100),
        "layer, 1,000 documents": replace(layer, batch=1, length=5000, documents=1000),
        "layer, padding at the end": replace(layer, mask="end"),
        "layer, padding anywhere": replace(layer, mask="holes"),
        "layer, both": replace(layer, batch=1, documents=7, mask="holes"),
        "layer, decay times 100": replace(layer, decay=100.0),
        "layer, half of the heads dt 0": replace(layer, zero=0.5),
        "layer, two groups": replace(layer, groups=2),
        "layer, L = 1": replace(layer, length=1),
        "layer, L = 129": replace(layer, length=129),
    }
    return [replace(case, name=name, dtype=dtype) for name, case in found.items() for dtype in DTYPES]


NAMED = _named()


@st.composite
def configurations(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Case:
    """Any case of a few sizes of the kernels: each would be compiled anew."""
    layer = draw(st.booleans())
    sizes = (
        [(4, 64, 64, 1), (4, 64, 64, 2)] + [(4, 32, 16, 2)] * layer + [(2, 16, 16, 1), (2, 128, 32, 1)] * (not layer)
    )
    heads, width, state, groups = draw(st.sampled_from(sizes))
    length = draw(
        st.sampled_from([1, 2, 17, 63, 64, 65, 100, 127, 128, 129, 255, 256, 300, 513, 777, 1000, 1024, 1500])
    )
    documents = draw(st.sampled_from([0, 0, 1, 3, 20]))
    return Case(
        "drawn", layer, draw(st.sampled_from(dtypes)),
        batch=1 if layer and documents else draw(st.integers(1, 3)), length=length, heads=heads, width=width,
        state=state, groups=groups, documents=min(documents, length),
        mask=draw(st.sampled_from(["", "", "end", "holes"])) if layer else "",
        decay=draw(st.sampled_from([0.01, 1.0, 1.0, 10.0, 100.0])),
        zero=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])), scale=draw(st.sampled_from([1.0, 1.0, 100.0, 0.01])),
        conv=3 if width == 32 else 7, recompute=layer and draw(st.booleans()), seed=draw(st.integers(0, 1 << 20)),
    )  # fmt: skip


def drawn(count: int, dtypes: tuple[str, ...] = DTYPES) -> list[Case]:
    """`count` cases, the same every time."""
    found: dict[Case, None] = {}
    relaxed = settings(
        max_examples=2 * count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @relaxed
    @given(configurations(dtypes))
    def collect(case: Case) -> None:
        found.setdefault(case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collect()
    return list(found)[:count]


def problem(case: Case, device: str) -> Run:
    """Draws a case's tensors, and returns what computes it."""
    torch.manual_seed(case.seed)
    return _layer(case, device) if case.layer else _product(case, device)


def _starts(case: Case) -> Tensor:
    """(batch, L) True where a document begins, at places that are drawn."""
    rows = torch.zeros(case.batch, case.length, dtype=torch.bool)
    for row in rows:
        row[torch.randperm(case.length - 1)[: case.documents - 1] + 1] = True
    return rows


def _product(case: Case, device: str) -> Run:
    batch, L, H = case.batch, case.length, case.heads
    scale = case.scale
    if case.dtype == "float16":  # which ends at 65504, and its digits at 6e-5
        scale = min(max(scale, 0.02), 30.0)
    leaves = {"x": F.silu(torch.randn(batch, L, H, case.width)) * scale}
    for name in ("B_f", "C_f", "B_b", "C_b"):
        leaves[name] = F.silu(torch.randn(batch, L, case.groups, case.state))
    for name in ("dt_f", "dt_b"):
        leaves[name] = F.softplus(torch.randn(batch, L, H) - 3.0) * (torch.rand(batch, L, H) >= case.zero)
    leaves["A"] = -torch.exp(0.5 * torch.randn(H)) * case.decay
    leaves["diagonal"] = torch.randn(batch, L, H)
    ids = _starts(case).cumsum(1).to(device) if case.documents else None
    half = getattr(torch, case.dtype)
    leaves = {name: t.to(device, half if name in HALF else None) for name, t in leaves.items()}
    dy = torch.randn(batch, L, H, case.width).to(device, half)

    def run(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = dtype == torch.float64
        t = {k: leaves[k].detach().to(torch.float64 if wide else None).requires_grad_() for k in PRODUCT}
        triangles = [
            Triangle(t["dt_f"], t["A"], t["B_f"], t["C_f"], strict=True),
            Triangle(t["dt_b"], t["A"], t["B_b"], t["C_b"], upper=True, strict=True),
        ]
        documents = None if ids is None else Documents(ids)
        y = semiseparable(t["x"], triangles, documents, diagonal=t["diagonal"], impl=impl)
        grads = torch.autograd.grad(y, list(t.values()), dy.to(y.dtype), allow_unused=True, materialize_grads=True)
        return {"y": y.detach(), **dict(zip(t, grads, strict=True))}

    return run


def _layer(case: Case, device: str) -> Run:
    d_model, half = case.heads * case.width // 2, getattr(torch, case.dtype)
    sizes = {"d_state": case.state, "headdim": case.width, "ngroups": case.groups, "d_conv": case.conv}
    parameters = Hydra(d_model, **sizes).state_dict()
    parameters["A_log"] += torch.tensor(case.decay).log()
    parameters["dt_bias"][: round(case.zero * case.heads)] = -300.0
    u, dy = (torch.randn(case.batch, case.length, d_model).to(half) for _ in range(2))
    u = u * case.scale**0.5
    where = _place(case, device)
    if "mask" in where:
        u[~where["mask"].cpu()] = torch.nan  # nobody may read it

    def run(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = dtype == torch.float64
        layer: nn.Module = Hydra(d_model, **sizes, impl=impl, recompute=case.recompute and impl == "triton")
        layer.load_state_dict(parameters)
        layer.to(device, torch.float64 if wide else None)
        leaf = u.detach().to(device, torch.float64 if wide else None).requires_grad_()
        with torch.autocast(device.partition(":")[0], half, enabled=not wide and half != torch.float32):
            y = layer(leaf, **where)
        y.backward(dy.to(device, y.dtype))
        return {"y": y.detach(), "u": leaf.grad, **{k: p.grad for k, p in layer.named_parameters()}}

    return run


def _place(case: Case, device: str) -> dict[str, Tensor]:
    """mask and cu_seqlens."""
    found = {}
    if case.documents:
        begins = _starts(case)[0].nonzero().flatten()
        found["cu_seqlens"] = F.pad(F.pad(begins, (1, 0)), (0, 1), value=case.length).to(device)
    if case.mask:
        mask = torch.rand(case.batch, case.length) > 0.3
        if case.mask == "end":
            mask = torch.arange(case.length) < torch.randint(1, case.length + 1, (case.batch, 1))
        mask[:, 0] = True
        found["mask"] = mask.to(device)
    return found
