"""Real data of every shape through the same code: pictures, volumes, point clouds, time series; and conditions."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import cbook
from sklearn.datasets import load_digits, load_sample_image
from torch import nn
from torch.nn import functional as F

from hydra_ssm import Encoder
from hydra_ssm.vision import HydraViT, TimeStep

SMALL = {"embed_dim": 32, "depth": 2, "headdim": 16, "d_state": 4, "num_classes": 2}


def train(model, inputs, targets, steps=40, rate=1e-2):
    """A few steps of AdamW; `inputs` are the model's arguments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / steps)
        chosen = torch.randint(len(targets), (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(*(t[chosen] for t in inputs)), targets[chosen]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, inputs, targets):
    return float((model(*inputs).argmax(1) == targets).float().mean())


def scans(first, second):
    """Scans of two digits, 8 x 8 pixels from -1 to 1, and which they are; the last 100 are held out."""
    found = load_digits()
    chosen = np.isin(found.target, (first, second))
    x = torch.tensor(found.images[chosen], dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(found.target[chosen] == second).long()
    return (x[:-100], y[:-100]), (x[-100:], y[-100:])


@pytest.fixture(scope="module")
def digits():
    return scans(3, 8)


@pytest.fixture(scope="module")
def noughts():
    return scans(0, 1)


@pytest.mark.parametrize("order", ["row,column", "hilbert+snake"])
def test_digits_are_told_apart_in_every_order(digits, order):
    (x, y), (held_x, held_y) = digits
    model = train(HydraViT(8, 2, in_chans=1, order=order, **SMALL), [x], y)
    assert accuracy(model, [held_x], held_y) > 0.85


def films(count):
    """(count, 1, 4 frames, 16, 16): a window moves over one of two photographs; and over which."""
    grey = [torch.tensor(load_sample_image(n)).float().mean(2) / 64 - 2 for n in ("china.jpg", "flower.jpg")]
    which = torch.randint(2, (count,))
    corner = torch.stack([torch.randint(390, (count,)), torch.randint(600, (count,))], 1).tolist()
    shots = [
        torch.stack([grey[k][y + t : y + t + 16, x + 3 * t : x + 3 * t + 16] for t in range(4)])
        for k, (y, x) in zip(which.tolist(), corner, strict=True)
    ]
    return torch.stack(shots)[:, None], which


def test_volumes_are_read_along_three_axes():
    (x, y), (held_x, held_y) = films(300), films(200)
    model = HydraViT((4, 16, 16), (2, 8, 8), in_chans=1, order="row,column", dynamic_img_size=True, **SMALL)
    assert model.patch_embed.grid_size == (2, 2, 2)
    assert accuracy(train(model, [x], y), [held_x], held_y) > 0.7
    maps = model.forward_intermediates(held_x[:2, :, :, :8], intermediates_only=True)
    assert maps[0].shape == (2, 32, 2, 1, 2)


class Clouds(nn.Module):
    """Points (B, L, 3), where there are any, read in a given order; the mean over the points tells the class."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 32), nn.Linear(32, 2)
        self.encoder = Encoder(32, ["hydra"] * 2, norm="pre", headdim=16, d_state=4)

    def forward(self, points, mask, order):
        h = self.encoder(self.embed(points), mask, order=order)
        return self.head(h.sum(1) / mask.sum(1, keepdim=True))


def clouds(x):
    """The inked pixels of pictures (B, 1, 8, 8) as points (row, column, ink), shuffled, and in which order to read."""
    ink = x.flatten(1) + 1
    shuffled = torch.rand_like(ink).argsort(1)
    place = torch.stack([shuffled // 8, shuffled % 8], -1) / 4 - 1
    points = torch.cat([place, ink.gather(1, shuffled)[..., None]], -1)
    mask = points[..., 2] > 0.5
    return points, mask, shuffled.argsort(1)


def test_point_clouds_of_any_size_are_read_in_the_order_that_is_given(noughts):
    (x, y), (held_x, held_y) = noughts
    model = train(Clouds(), clouds(x), y, rate=2e-2)
    held, again = clouds(held_x), clouds(held_x)  # the same points shuffled otherwise
    assert held[1].sum(1).unique().numel() > 5
    assert accuracy(model, held, held_y) > 0.65
    with torch.no_grad():
        torch.testing.assert_close(model(*held), model(*again), atol=1e-4, rtol=1e-4)
        as_they_come = model(*held[:2], torch.arange(64))
    assert (as_they_come - model(*held)).abs().max() > 0.1


def stretches(name, dtype):
    """(n, 1, 64) of a recording, each of mean 0 and deviation 1; those of its last third apart."""
    whole = torch.tensor(np.fromfile(cbook.get_sample_data(name, asfileobj=False), dtype=dtype)).float()
    found = [part.unfold(0, 64, 7)[:120, None] for part in whole[: 800 * 4].reshape(-1, 4).T[0].split([530, 270])]
    return [(part - part.mean(2, keepdim=True)) / (part.std(2, keepdim=True) + 1e-3) for part in found]


def test_time_series_are_patches_along_one_axis():
    """Stretches of an electroencephalogram and of a membrane's voltage are told apart."""
    recordings = stretches("eeg.dat", np.float64), stretches("membrane.dat", np.float32)
    (x, y), (late, late_y) = (
        (torch.cat(parts), torch.arange(2).repeat_interleave(len(parts[0]))) for parts in zip(*recordings, strict=True)
    )
    model = train(HydraViT((64,), (8,), in_chans=1, dynamic_img_size=True, **SMALL), [x], y)
    assert accuracy(model, [late], late_y) > 0.75
    assert model(late[..., :40]).shape == (len(late), 2)
    assert model.forward_intermediates(late, intermediates_only=True)[0].shape == (len(late), 32, 8)


@pytest.mark.skipif("HYDRA_SSM_ETT" not in os.environ, reason="HYDRA_SSM_ETT names no folder with ETTh1.csv, ETTh2.csv")
def test_oil_temperatures_of_two_transformers_are_told_apart():
    """Four days by the hour, each of mean 0 and deviation 1, of the data set ETT; the last third is held out."""
    parts = []
    for name in ("ETTh1.csv", "ETTh2.csv"):
        path = Path(os.environ["HYDRA_SSM_ETT"], name)
        whole = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, usecols=7, dtype=np.float32))
        days = [part.unfold(0, 96, 12)[:, None] for part in whole.split([12000, len(whole) - 12000])]
        parts.append([(day - day.mean(2, keepdim=True)) / (day.std(2, keepdim=True) + 1e-3) for day in days])
    (x, y), (late, late_y) = (
        (torch.cat(both), torch.arange(2).repeat_interleave(len(both[0]))) for both in zip(*parts, strict=True)
    )
    model = train(HydraViT((96,), (8,), in_chans=1, **SMALL), [x], y, steps=150)
    assert accuracy(model, [late], late_y) > 0.8


class Conditioned(nn.Module):
    """Pictures under a number that is a class or a time step."""

    def __init__(self, kind, embed):
        super().__init__()
        self.embed = embed
        self.vit = HydraViT(8, 2, in_chans=1, d_condition=8, condition=kind, **SMALL)

    def forward(self, x, number):
        return self.vit(x, self.embed(number))


@pytest.mark.parametrize(("kind", "number"), [("modulation", "time step"), ("token", "class")])
def test_a_condition_decides_what_the_same_picture_is(digits, kind, number):
    """Which of two digits it is has to be told as it is under one condition, the other way round under the other."""
    (x, y), (held_x, held_y) = digits
    torch.manual_seed(2)
    embed, factor = (TimeStep(8), 700) if number == "time step" else (nn.Embedding(2, 8), 1)
    model = Conditioned(kind, embed)
    assert model.vit.num_prefix_tokens == int(kind == "token")
    turned, held_turned = torch.randint(2, (len(y),)), torch.randint(2, (len(held_y),))
    train(model, [x, turned * factor], y ^ turned, steps=80)
    assert accuracy(model, [held_x, held_turned * factor], held_y ^ held_turned) > 0.7
    assert model.vit.forward_features(x[:2], torch.zeros(2, 8)).shape == (2, 16 + model.vit.num_prefix_tokens, 32)


def test_time_steps_are_told_apart_at_every_scale():
    waves = TimeStep(4, waves=8)
    seen = []
    waves.inner.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    assert waves(torch.tensor([0, 1, 500, 501])).shape == (4, 4)
    t = torch.tensor([0.0, 1, 500, 501])[:, None] * 10_000 ** (-torch.arange(8) / 7)
    torch.testing.assert_close(seen[0], torch.cat([t.sin(), t.cos()], 1), atol=1e-4, rtol=1e-4)
    assert waves.bfloat16()(torch.tensor([999])).dtype == torch.bfloat16
