"""Error against time of the ways to the products with Cauchy and Vandermonde matrices, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/products.py             # a minute; the tables of docs/matrices.md

Cauchy: sums of exponentials, and Chebyshev interpolation in the logarithms of the nodes. Vandermonde: Chebyshev
interpolation in time, and the non-uniform FFT. Times are those that the processor was busy, the least of several.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hydra_ssm.matrices import Cauchy, StructuredMatrix, Vandermonde
from hydra_ssm.matrices._cosines import cosines, rank
from hydra_ssm.matrices._nonuniform import any_cosines
from hydra_ssm.matrices.vandermonde import FREQUENCY

HEADS, WIDTH, ORDER = 2, 32, 16
Product = Callable[[StructuredMatrix, Tensor], Tensor]


def main() -> None:
    torch.manual_seed(0)
    for length in (1024, 4096):
        print(f"\ncauchy, L = {length}: way, error in float32, error of the method, ms forward, ms of a step")
        ways: dict[str, Product] = {f"exponentials, {t:.0e}": exponentials(t) for t in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)}
        ways |= {f"Chebyshev, {n} nodes": chebyshev(n) for n in (8, 12, 16, 24, 32)}
        compare(draw(Cauchy, length), ways | through_the_entries(length))
    for length in (128, 1024, 4096):
        print(f"\nvandermonde, L = {length}: way, error in float32, error of the method, ms forward, ms of a step")
        ways = {f"interpolation, {t:.0e}": interpolation(t) for t in (1e-3, 1e-5, 1e-7)}
        ways |= {f"FFT, {t:.0e}": transform(t) for t in (1e-3, 1e-5, 1e-7)}
        compare(draw(Vandermonde, length), ways | through_the_entries(length))


def draw(matrix: type[Cauchy] | type[Vandermonde], length: int) -> Cauchy | Vandermonde:
    q, k = (torch.randn(1, length, HEADS, ORDER).requires_grad_() for _ in "qk")
    if matrix is Cauchy:
        return Cauchy(None, q, k, torch.tensor(0.5), 1.0)
    return Vandermonde(None, q, k, 1.0)


def through_the_entries(length: int) -> dict[str, Product]:
    if length > 1024:
        return {}
    return {"entries": lambda M, x: torch.einsum("bhij,bjhp->bihp", M.entries(), x)}


def exponentials(tolerance: float) -> Product:
    return lambda M, x: replace(M, tolerance=tolerance) @ x


def chebyshev(nodes: int) -> Product:
    """1 / (exp q + exp k + 2c) as a polynomial of q that is right at the nodes."""

    def product(M: StructuredMatrix, x: Tensor) -> Tensor:
        assert isinstance(M, Cauchy)
        low, high = M.q.detach().amin(), M.q.detach().amax()
        phi = (torch.arange(nodes, dtype=x.dtype) + 0.5) * (math.pi / nodes)
        places = ((phi.cos() + 1) / 2 * (high - low) + low).exp()
        y = torch.zeros_like(x)
        for q, k in zip(M.q.unbind(3), M.k.unbind(3), strict=True):
            psi = torch.arccos((2 * (q - low) / (high - low) - 1).clamp(-1 + 1e-6, 1 - 1e-6))
            degree = torch.arange(nodes, dtype=x.dtype)
            basis = (2 / nodes) * torch.cos(phi[:, None] * degree)  # (nodes, degree)
            basis = torch.cat([basis[:, :1] / 2, basis[:, 1:]], 1)
            left = torch.cos(psi[..., None] * degree) @ basis.mT
            right = 1 / (places + k.exp()[..., None] + 2 * M.c)
            y = y + torch.einsum("bihn,bhnp->bihp", left, torch.einsum("bjhn,bjhp->bhnp", right, x))
        return y

    return product


def interpolation(tolerance: float) -> Product:
    def product(M: StructuredMatrix, x: Tensor) -> Tensor:
        q, k, own = flat(M, x)
        largest = max(t.detach().abs().max().item() for t in (q, k))
        nodes = rank(math.pi * FREQUENCY * largest * (x.shape[1] - 1), tolerance)
        return cosines(q, k, own, 2 * math.pi * FREQUENCY, nodes).transpose(0, 1)[None]

    return product


def transform(tolerance: float) -> Product:
    return lambda M, x: any_cosines(*flat(M, x), FREQUENCY, tolerance).transpose(0, 1)[None]


def flat(M: StructuredMatrix, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(M, Vandermonde)
    return M.q[0].transpose(0, 1), M.k[0].transpose(0, 1), x[0].transpose(0, 1)


def compare(M: Cauchy | Vandermonde, ways: dict[str, Product]) -> None:
    x = torch.randn(1, M.q.shape[1], HEADS, WIDTH)
    wide = replace(M, q=M.q.detach().double(), k=M.k.detach().double())
    wide = replace(wide, c=wide.c.double()) if isinstance(wide, Cauchy) else wide
    exact = by_rows(wide, x.double())
    for name, product in ways.items():

        def step(product: Product = product) -> None:
            torch.autograd.grad(product(M, x).sum(), [M.q, M.k])

        with torch.no_grad():
            errors = [float((product(m, v) - exact).norm() / exact.norm()) for m, v in ((M, x), (wide, x.double()))]
            forward = least(lambda product=product: product(M, x))
        print(f"| {name} | {errors[0]:.0e} | {errors[1]:.0e} | {forward:.1f} | {least(step):.1f} |", flush=True)


def by_rows(M: Cauchy | Vandermonde, x: Tensor) -> Tensor:
    """The product by its definition, a few rows at a time."""
    place = torch.arange(x.shape[1], dtype=x.dtype) * (2 * math.pi * FREQUENCY)
    parts = []
    for i in torch.arange(x.shape[1]).split(256):
        rows = x.new_zeros(1, HEADS, len(i), x.shape[1])
        for q, k in zip(M.q.unbind(3), M.k.unbind(3), strict=True):
            q, k = q.mT[:, :, i, None], k.mT[:, :, None]
            if isinstance(M, Cauchy):
                rows += 1 / (q.exp() + k.exp() + 2 * M.c + 1e-8)
            else:
                rows += torch.cos(q * place) - torch.cos(k * place[i, None])
        parts.append(torch.einsum("bhij,bjhp->bihp", rows, x))
    return torch.cat(parts, 1)


def least(run: Callable[[], object]) -> float:
    """Milliseconds."""
    found = math.inf
    for _ in range(5):
        start = time.process_time()
        run()
        found = min(found, time.process_time() - start)
    return 1e3 * found


if __name__ == "__main__":
    main()
