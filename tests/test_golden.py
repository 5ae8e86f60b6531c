"""Hydra and the ablation blocks equal the released modules, output and every gradient."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hydra_ssm import Hydra, MatrixMixer, convert_block

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


def load(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["config"]), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def block(config: dict) -> tuple[MatrixMixer, str]:
    """The module that a golden file was made with, and the name of its matrix."""
    if "matrix_mixer_type" not in config:
        return Hydra(**config, dtype=torch.float64), "quasiseparable"
    matrix, data_dependent = config["matrix_mixer_type"], config["is_data_dependent"]
    d_state = config["qk_dim"]
    if matrix == "quasiseparable":
        matrix, d_state = "quasiseparable_shared", 2 * d_state  # one state for both heads
    elif matrix == "vandermonde" and not data_dependent:
        matrix = "dense"  # the released DFT: its table of cosines, in float32
    sizes = {"headdim": config["headdim"], "max_length": config["max_seq_len"], "d_state": d_state}
    mixer = MatrixMixer(config["d_model"], matrix, data_dependent=data_dependent, dtype=torch.float64, **sizes)
    return mixer, matrix


def load_released(mixer: MatrixMixer, tensors: dict[str, torch.Tensor], matrix: str) -> None:
    state = take(tensors, "param.") | take(tensors, "buffer.")
    mixer.load_state_dict(convert_block(state, matrix, mixer.settings.nheads))  # strict


def test_every_golden_file_is_here():
    assert len(FILES) == 13


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_output_and_every_gradient_equal_the_released_module(path):
    config, tensors = load(path)
    mixer, matrix = block(config)
    load_released(mixer, tensors, matrix)
    u = tensors["input"].requires_grad_()
    y = mixer(u)
    y.backward(tensors["grad_output"])
    expected = convert_block(take(tensors, "grad."), matrix) | {"output": tensors["output"]}
    found = {name: p.grad for name, p in mixer.named_parameters()} | {"input": u.grad, "output": y}
    if path.stem == "mixer_cauchy_fixed":
        del expected["c"], found["c"]  # released without one
    if path.stem == "mixer_vandermonde_fixed":
        del found["M"]  # released as a constant
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


def test_the_exact_dft_differs_from_the_released_one_by_the_rounding_of_its_cosines():
    """Angles up to 2 pi 23^2 / 24 = 138 in float32 are off by up to 1.1e-5; the table and the output inherit it."""
    _, tensors = load(next(p for p in FILES if p.stem == "mixer_vandermonde_fixed"))
    exact = MatrixMixer(16, "dft", headdim=16, max_length=24, dtype=torch.float64)
    exact.load_state_dict(take(tensors, "param."))
    M = exact.matrix(tensors["input"]).dense()[0, 0]
    assert (M - tensors["buffer.matrix_mixer.dft_matrix"] / 24**0.5).abs().max() < 1.1e-5 / 24**0.5
    y = exact(tensors["input"])
    assert (y - tensors["output"]).norm() < 2e-6 * tensors["output"].norm()


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("hydra")], ids=lambda p: p.stem)
def test_a_released_layer_loads_without_any_conversion(path):
    config, tensors = load(path)
    Hydra(**config).load_state_dict(take(tensors, "param."), strict=True)


def test_the_base_layer_has_the_size_of_the_released_one():
    assert sum(p.numel() for p in Hydra(768, device="meta").parameters()) == 3_825_224


def take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
