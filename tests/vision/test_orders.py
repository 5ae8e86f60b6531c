"""Orders of reading, and data of any shape: each order is checked against matrices, each kind of data is learned."""

import math

import pytest
import torch
from torch.nn import functional as F

from hydra_ssm import Encoder
from hydra_ssm.ops import Order
from hydra_ssm.vision import ORDERS, DropIn, HydraViT, orders, places, reading

GRIDS = [(1, 1), (1, 5), (4, 4), (3, 5), (6, 4), (14, 14), (2, 3, 4), (4, 4, 4), (7,)]
OPTIONS = {"d_state": 4, "headdim": 8}


def steps(order, grid):
    """How far each step goes along the axes, (L - 1, axes)."""
    cells = torch.stack(torch.unravel_index(order, grid), dim=1)
    return (cells[1:] - cells[:-1]).abs()


# ------------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ORDERS)
def test_every_order_reads_each_cell_once(name, grid):
    assert ORDERS[name](grid).sort().values.tolist() == list(range(math.prod(grid)))


def test_orders_are_what_they_are_called():
    assert ORDERS["row"]((2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert ORDERS["column"]((2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert ORDERS["snake"]((3, 3)).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert ORDERS["hilbert"]((2, 2)).tolist() in ([0, 2, 3, 1], [0, 1, 3, 2])
    assert ORDERS["column"]((2, 2, 2)).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_snake_never_jumps(grid):
    assert (steps(ORDERS["snake"](grid), grid).sum(1) == 1).all()


def test_hilberts_curve_never_jumps_in_a_rectangle_or_a_cube_of_a_power_of_two():
    for height in range(1, 20):
        for width in range(1, 20):
            moved = steps(ORDERS["hilbert"]((height, width)), (height, width))
            diagonal = int((moved.sum(1) == 2).sum())
            long, short = max(height, width), min(height, width)
            assert moved.numel() == 0 or moved.max() == 1
            assert diagonal <= int(long % 2 == 1 and short % 2 == 0)
    for grid in ((4, 4, 4), (8, 8, 8), (4, 4, 4, 4)):
        assert (steps(ORDERS["hilbert"](grid), grid).sum(1) == 1).all()


def test_hilberts_curve_keeps_near_what_is_near():
    grid = (16, 16)
    mean = {}
    for name in ORDERS:
        cells = torch.stack(torch.unravel_index(ORDERS[name](grid), grid), dim=1).float()
        apart = torch.cdist(cells, cells)
        mean[name] = float(torch.stack([apart.diagonal(k).mean() for k in range(1, 17)]).mean())
    assert mean["hilbert"] < 0.6 * min(mean["row"], mean["column"], mean["snake"])


def test_a_prefix_is_read_first():
    (order,) = places("column", (2, 2), prefix=2)
    assert order.tolist() == [[[0, 1, 2, 4, 3, 5]]]
    assert reading("row", (2, 2)) is None
    assert reading("column", (2, 2)) is reading("column", (2, 2))


def test_orders_of_many_sizes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(orders, "MOST_MADE", 3)
    monkeypatch.setattr(orders, "_MADE", {})
    kept = [reading("column", (2, n)) for n in range(1, 6)]
    assert len(orders._MADE) == 3
    assert reading("column", (2, 5)) is kept[-1]


def test_what_a_cuda_graph_reads_is_never_freed(monkeypatch):
    monkeypatch.setattr(orders, "MOST_MADE", 3)
    monkeypatch.setattr(orders, "_MADE", {})
    monkeypatch.setattr(orders, "_CAPTURED", set())
    warmed_up = reading("column", (2, 1))
    with monkeypatch.context() as capture:
        capture.setattr(orders, "_is_captured", lambda device: True)
        assert reading("column", (2, 1)) is warmed_up
    for n in range(2, 9):
        reading("column", (2, n))
    assert reading("column", (2, 1)) is warmed_up
    assert len(orders._MADE) == 1 + 3


@pytest.mark.parametrize(
    ("make", "spec"),
    [(HydraViT, spec) for spec in ("row", "column", "row,hilbert", "row+column")]
    + [(DropIn, spec) for spec in ("column", "row+column")],
)
def test_what_was_evaluated_first_can_be_trained(make, spec, monkeypatch):
    """An order is kept for the whole process: it must not be one that only inference may use."""
    monkeypatch.setattr(orders, "_MADE", {})
    own = {"num_heads": 2} if make is DropIn else {}
    model = make(img_size=8, patch_size=2, embed_dim=16, depth=2, num_classes=2, order=spec, **own, **OPTIONS)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------------------------- the encoder reads in any order


def dense(mixer, u, order):
    """What a mixer gives for u (1, L, D) with its matrix conjugated by an order, from the entries."""
    read = u[:, order]
    z, inputs = mixer._inputs(mixer.in_proj(read), None)
    M = mixer.matrix(read).dense()
    back = order.argsort()
    M, x, z = M[:, :, back][..., back], inputs.x[:, back], z[:, back]
    y = torch.einsum("bhij,bjhp->bihp", M, x)
    y = y + x if mixer.matrix_class.skip else y
    return mixer.out_proj(mixer.norm(y.flatten(2), z, None))


@pytest.mark.parametrize("mixer", ["hydra", "toeplitz", "low_rank"])
@pytest.mark.parametrize("spec", ["column", "row,hilbert", "row+snake", "column,row+column+hilbert"])
def test_layers_mix_with_permuted_matrices_and_sum_over_orders(spec, mixer):
    encoder = Encoder(16, [mixer] * 3, norm="pre", d_ff=8, **OPTIONS).double()
    order = places(spec, (3, 4))
    h = expected = torch.randn(1, 12, 16, dtype=torch.float64)
    states = [h]
    for i, layer in enumerate(encoder.layers):
        u = layer.norm(expected)
        expected = expected + sum(dense(layer.mixer, u, p[0]) for p in order[i % len(order)])
        expected = expected + layer.feed_forward(layer.feed_forward_norm(expected))
        states.append(expected)
    expected = encoder.last_norm(expected)
    torch.testing.assert_close(encoder(h, order=order), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        encoder(h, order=order, every_layer=True), torch.stack([*states[:3], expected], 2), rtol=0, atol=1e-11
    )
    torch.testing.assert_close(
        encoder(h, order=order, states=[3, 1]), torch.stack([states[1], states[3]], 2), rtol=0, atol=1e-11
    )


def test_gradients_of_reading_are_those_of_indexing():
    encoder = Encoder(8, ["hydra"] * 2, d_state=2, headdim=4).double()
    order = places("column,row+hilbert", (2, 3))
    h = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: encoder(t, order=order), h, fast_mode=True)
    rows = Order.of(torch.stack([torch.randperm(6), torch.randperm(6)]))
    weight = torch.randn(2, 6, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: rows.restore(rows.take(t).sin() * weight), h)
    assert torch.autograd.gradgradcheck(lambda t: rows.take(t).sin(), h)


@pytest.mark.parametrize("kind", ["one", "in turn", "summed"])
def test_each_row_may_have_its_own_order_and_padding(kind):
    encoder = Encoder(16, ["hydra", "attention"], d_ff=8, **OPTIONS).double()
    h, mask = torch.randn(3, 9, 16, dtype=torch.float64), torch.rand(3, 9) > 0.3
    first, second = (torch.stack([torch.randperm(9) for _ in range(3)]) for _ in range(2))
    order = {"one": first, "in turn": [first, second], "summed": torch.stack([first, second])}[kind]
    y = encoder(h.masked_fill(~mask[..., None], torch.nan), mask, order=order)
    assert (y[~mask] == 0).all()
    for row in range(3):
        kept = mask[row].nonzero()[:, 0]
        number = torch.full((9,), -1)
        number[kept] = torch.arange(len(kept))
        own = [number[o[row]] for o in (first, second)]
        own = [o[o >= 0] for o in own]
        alone = {"one": own[0], "in turn": own, "summed": torch.stack(own)[:, None]}[kind]
        torch.testing.assert_close(y[row, kept], encoder(h[row, kept][None], order=alone)[0], rtol=0, atol=1e-11)


def test_reading_costs_no_parameters_and_one_order_for_all_layers_moves_tokens_twice():
    encoder, h = Encoder(16, ["hydra"] * 4, **OPTIONS), torch.randn(2, 12, 16)
    order = places("column", (3, 4))[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, torch.no_grad():
        encoder(h, order=Order.of(order))
    moves = [e for e in seen.events() if e.name == "aten::index"]
    assert len(moves) == 2


def test_an_order_that_is_none_is_named():
    encoder, h = Encoder(16, ["hydra"], **OPTIONS), torch.randn(2, 4, 16)
    with pytest.raises(ValueError, match="an order of 4 tokens must hold each of 0 to 3 once"):
        encoder(h, order=torch.tensor([0, 1, 1, 3]))
    with pytest.raises(ValueError, match=r"order must be for \(batch, length\) = \(2, 4\), got one for \(1, 5\)"):
        encoder(h, order=torch.randperm(5))
    with pytest.raises(TypeError, match=r"an order must be a tensor of int64, got torch.float32"):
        encoder(h, order=torch.zeros(4))
    with pytest.raises(ValueError, match="order must hold at least one, got none"):
        encoder(h, order=[])
    with pytest.raises(ValueError, match="order must come without cu_seqlens"):
        encoder(h[:1], cu_seqlens=torch.tensor([0, 2, 4]), order=torch.randperm(4))
    with pytest.raises(ValueError, match="states must be numbers from 0 to 1, got"):
        encoder(h, states=[2])


# ----------------------------------------------------------------------------------- conditions and stochastic depth


def test_a_new_encoder_does_not_hear_its_condition_and_learns_to():
    torch.manual_seed(1)
    plain = Encoder(16, ["hydra"] * 2, norm="pre", d_ff=8, **OPTIONS).double()
    encoder = Encoder(16, ["hydra"] * 2, norm="pre", d_ff=8, d_condition=3, **OPTIONS).double()
    encoder.load_state_dict(plain.state_dict(), strict=False)
    h, condition = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(encoder(h, condition=condition), plain(h))
    encoder(h, condition=condition).square().sum().backward()
    modulations = {n: p for n, p in encoder.named_parameters() if "modulation" in n}
    assert len(modulations) == 2 * 2 * 2
    assert all(p.grad.abs().sum() > 0 for p in modulations.values())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_condition_scales_shifts_and_gates_each_branch(norm):
    encoder = Encoder(16, ["hydra"], norm=norm, d_ff=8, d_condition=3, **OPTIONS).double()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.3)
    (layer,) = encoder.layers
    h, condition = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def branch(h, f, norm_of, modulation):
        m = modulation.weight @ F.silu(condition)[..., None]
        scale, shift, gate = (m[..., 0] + modulation.bias)[:, None].chunk(3, -1)
        if norm == "pre":
            return h + (1 + gate) * f(norm_of(h) * (1 + scale) + shift)
        return norm_of(h + (1 + gate) * f(h * (1 + scale) + shift))

    expected = branch(h, layer.mixer, layer.norm, layer.modulation)
    expected = branch(expected, layer.feed_forward, layer.feed_forward_norm, layer.feed_forward_modulation)
    expected = encoder.last_norm(expected)
    torch.testing.assert_close(encoder(h, condition=condition), expected, rtol=0, atol=1e-12)
    packed = encoder(h.reshape(1, 10, 16), cu_seqlens=torch.tensor([0, 5, 10]), condition=condition)
    torch.testing.assert_close(packed.reshape(2, 5, 16), expected, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match=r"condition must be \(documents, d_condition\) = \(2, 3\), got \(1, 3\)"):
        encoder(h, condition=condition[:1])
    with pytest.raises(ValueError, match="made without d_condition"):
        Encoder(16, ["hydra"], **OPTIONS)(h.float(), condition=condition)


def test_a_dropped_branch_is_gone_for_its_document_alone_and_the_mean_stays():
    encoder = Encoder(16, ["hydra"] * 2, drop_path=0.5, norm="pre", **OPTIONS).double().eval()
    assert [layer.drop_path.rate for layer in encoder.layers] == [0, 0.5]
    h = torch.randn(1, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        first, whole = encoder(h, states=[1, 2]).unbind(2)
        found = encoder.train()(h.expand(400, -1, -1), states=[2])[:, :, 0]
        gone = torch.isclose(found, first, rtol=1e-12, atol=1e-12).flatten(1).all(1)  # batches round in their own way
        torch.testing.assert_close(found[~gone], (2 * whole - first).expand(int((~gone).sum()), -1, -1))
        assert 150 < gone.sum() < 250
        packed = encoder(h.expand(40, -1, -1).reshape(1, 200, 16), cu_seqlens=torch.arange(0, 201, 5), states=[2])
        kept = (packed.reshape(40, 5, 16) - first).abs().amax(2) > 1e-9
        assert (kept.all(1) | ~kept.any(1)).all()
        assert 5 < kept.all(1).sum() < 35
    with pytest.raises(ValueError, match="drop_path must be at least 0 and below 1, got 1"):
        Encoder(16, ["hydra"], drop_path=1.0, **OPTIONS)
