"""Released checkpoints become HF directories that compute the same, or one line says why not."""

import os
import re
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from hydra_ssm import Hydra, MatrixMixer
from hydra_ssm.text.convert import convert_checkpoint

WIDTH, WORDS, LAYERS = 48, 56, 2
SIZES: dict[str, Any] = {"d_state": 8, "d_conv": 5, "expand": 1.5, "headdim": 12}
State = dict[str, Tensor]


def make_released(mixer: Callable[[], nn.Module], norm: str = "layer.norm") -> State:
    """Random weights in the released layout, without a prefix."""
    state = {
        "bert.embeddings.word_embeddings.weight": torch.randn(WORDS, WIDTH),
        "bert.embeddings.token_type_embeddings.weight": torch.randn(2, WIDTH),
        "cls.predictions.transform.dense.weight": torch.randn(WIDTH, WIDTH) * WIDTH**-0.5,
        "cls.predictions.transform.dense.bias": torch.randn(WIDTH),
        "cls.predictions.bias": torch.randn(WORDS),
    }
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    for i in range(LAYERS):
        block = {
            f"bert.encoder.layer.{i}.layer.mixer.{k}": torch.randn_like(v) for k, v in mixer().state_dict().items()
        }
        state |= {k: v.abs() if k.endswith("norm.weight") else v * 0.3 for k, v in block.items()}
        norms.append(f"bert.encoder.layer.{i}.{norm}")
    for name in norms:
        state |= {f"{name}.weight": torch.rand(WIDTH) + 0.5, f"{name}.bias": torch.randn(WIDTH)}
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    return state


def released_logits(state: State, ids: Tensor, mixer: Callable[[], nn.Module], norm: str = "layer.norm") -> Tensor:
    """What the released model computes, from its weights by hand."""

    def norm_(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    h = state["bert.embeddings.word_embeddings.weight"][ids] + state["bert.embeddings.token_type_embeddings.weight"][0]
    h = norm_(h, "bert.embeddings.LayerNorm")
    for i in range(LAYERS):
        prefix, layer = f"bert.encoder.layer.{i}.layer.mixer.", mixer()
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        h = norm_(h + layer(h), f"bert.encoder.layer.{i}.{norm}")
    dense = "cls.predictions.transform.dense"
    h = F.gelu(F.linear(h, state[f"{dense}.weight"], state[f"{dense}.bias"]))
    h = norm_(h, "cls.predictions.transform.LayerNorm")
    return F.linear(h, state["cls.predictions.decoder.weight"], state["cls.predictions.decoder.bias"])


def write(state: State, path: Path, prefix: str = "model.") -> Path:
    """As the released file nests it: `state`, `model`, then flat names."""
    model = {prefix + key: value for key, value in state.items()}
    moments = {f"{key}.exp_avg": torch.zeros(3) for key in model}
    torch.save({"state": {"model": model, "optimizers": {"AdamW": {"state": moments}}}, "epoch": 1}, path)
    return path


def hydra() -> Hydra:
    return Hydra(WIDTH, **SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("norm", ["layer.norm", "norm", "layer.LayerNorm", "output.LayerNorm"])
def test_a_converted_checkpoint_computes_what_the_released_model_computes(folder: Path, norm: str) -> None:
    state = make_released(hydra, norm)
    config = convert_checkpoint(write(state, folder / "hydra.pt"), folder / "out")
    model, report = AutoModelForMaskedLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report.values())
    ids = torch.randint(0, WORDS, (2, 9))
    torch.testing.assert_close(model(ids).logits, released_logits(state, ids, hydra, norm), rtol=1e-5, atol=1e-5)
    found = {name: getattr(config, name) for name in SIZES}
    assert found == SIZES
    assert model.decoder.weight is model.get_input_embeddings().weight


def test_flat_keys_other_options_and_an_untied_decoder_are_understood(folder: Path) -> None:
    def mixer() -> Hydra:
        return Hydra(WIDTH, **SIZES, ngroups=2, learnable_init_states=True, conv_bias=False, bias=True)

    state = make_released(mixer)
    state["cls.predictions.decoder.weight"] = torch.randn(WORDS, WIDTH)
    torch.save({f"state.model.model.{key}": value for key, value in state.items()}, folder / "flat.pt")
    config = convert_checkpoint(folder / "flat.pt", folder / "out", ngroups=2)
    assert (config.d_state, config.ngroups, config.tie_word_embeddings) == (8, 2, False)
    ids = torch.randint(0, WORDS, (2, 9))
    model = AutoModelForMaskedLM.from_pretrained(folder / "out")
    torch.testing.assert_close(model(ids).logits, released_logits(state, ids, mixer), rtol=1e-5, atol=1e-5)


def test_ablation_blocks_are_converted_where_their_mixer_is_given(folder: Path) -> None:
    spec = {"matrix": "low_rank", "data_dependent": False, "d_state": 4, "headdim": 12, "max_length": 16}

    def mixer() -> MatrixMixer:
        return MatrixMixer(WIDTH, **spec)

    state = make_released(mixer)
    released = {re.sub(r"tables\.(\w)", r"matrix_mixer.\1_matrix", key): value for key, value in state.items()}
    convert_checkpoint(write(released, folder / "low_rank.pt"), folder / "out", mixers=spec)
    ids = torch.randint(0, WORDS, (2, 9))
    model = AutoModelForMaskedLM.from_pretrained(folder / "out")
    torch.testing.assert_close(model(ids).logits, released_logits(state, ids, mixer), rtol=1e-5, atol=1e-5)


def test_half_precision_weights_stay_half_and_decays_float32(folder: Path) -> None:
    keep = ("A_log", "dt_bias", ".D")
    state = {k: v if k.endswith(keep) else v.bfloat16() for k, v in make_released(hydra).items()}
    convert_checkpoint(write(state, folder / "half.pt"), folder / "out")
    written = load_file(folder / "out" / "model.safetensors")
    assert {v.dtype for k, v in written.items() if not k.endswith(keep)} == {torch.bfloat16}
    assert AutoModelForMaskedLM.from_pretrained(folder / "out").dtype == torch.bfloat16
    assert {v.dtype for k, v in written.items() if k.endswith(keep)} == {torch.float32}


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if name not in key}


FAULTS: dict[str, tuple[Callable[[State], State], str]] = {
    "a stranger": (lambda s: s | {"bert.pooler.dense.weight": torch.zeros(1)}, "without a place.*bert.pooler.dense"),
    "a second norm": (lambda s: s | {"bert.encoder.layer.0.norm2.weight": torch.zeros(1)}, "without a place.*norm2"),
    "no norm": (lambda s: without(s, "layer.1.layer.norm"), r"nothing for.*layers\.1\.norm\.bias"),
    "no parameter": (lambda s: without(s, "layer.1.layer.mixer.dt_bias"), r"nothing for.*layers\.1\.mixer\.dt_bias"),
    "no first layer": (lambda s: without(s, "layer.0."), "from 0"),
    "no embeddings": (lambda s: without(s, "word_embeddings"), "word_embeddings"),
    "no types": (lambda s: without(s, "token_type"), "must hold bert.embeddings.token_type_embeddings"),
    "no layers": (lambda s: without(s, "encoder"), r"from 0 without a gap, got \[\]"),
    "two biases": (lambda s: s | {"cls.predictions.bias": torch.zeros(WORDS)}, "must be equal"),
    "another size": (
        lambda s: s | {"bert.embeddings.LayerNorm.bias": torch.zeros(3)},
        r"another shape.*embeddings\.norm",
    ),
    "no model": (lambda s: {"weight": torch.zeros(1)}, "one model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_in_one_line_and_nothing_is_written(folder: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    path = write(change(make_released(hydra)), folder / "hydra.pt")
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(path, folder / "out")
    assert "\n" not in str(error.value)
    assert list(folder.iterdir()) == [path]


def test_keys_can_be_dropped_by_name(folder: Path) -> None:
    state = make_released(hydra) | {"bert.pooler.dense.weight": torch.zeros(1)}
    convert_checkpoint(write(state, folder / "hydra.pt"), folder / "out", drop=["bert.pooler.*"])
    AutoModelForMaskedLM.from_pretrained(folder / "out")


def test_objects_beside_the_tensors_can_be_left_out(folder: Path) -> None:
    """As trainers save them: the time that has passed, the state of numpy's generator, metrics."""
    state = {"model": {f"model.{key}": value for key, value in make_released(hydra).items()}}
    objects = [timedelta(days=1), np.random.RandomState(0).get_state(), Code(folder / "ran"), Namespace(a=[1], b=(2,))]
    torch.save({"state": state | {"timestamp": objects[0]}, "rng": objects[1], "run": objects[2:]}, folder / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt holds Python objects \(.*skip_objects"):
        convert_checkpoint(folder / "run.pt", folder / "out")
    convert_checkpoint(folder / "run.pt", folder / "out", skip_objects=True)
    AutoModelForMaskedLM.from_pretrained(folder / "out")
    assert not (folder / "ran").exists()


def make_folder(path: str) -> None:
    Path(path).mkdir()


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, touched: Path, function: Callable[[str], None] = make_folder) -> None:
        self.touched, self.function = touched, function

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return self.function, (str(self.touched),)


@pytest.mark.parametrize("skip_objects", [False, True])
def test_code_in_a_checkpoint_never_runs(folder: Path, skip_objects: bool) -> None:
    state = {"model": make_released(hydra)}
    torch.save({"state": state, "more": Code(folder / "ran", os.mkdir)}, folder / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt holds Python objects \(posix\.mkdir\)") as error:
        convert_checkpoint(folder / "code.pt", folder / "out", skip_objects=skip_objects)
    assert "\n" not in str(error.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("size", [0, 10, 2000, -100])
def test_a_broken_file_is_named_in_one_line(folder: Path, size: int) -> None:
    path = write(make_released(hydra), folder / "hydra.pt")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"hydra\.pt") as error:
        convert_checkpoint(path, folder / "out")
    assert "\n" not in str(error.value)


def test_a_folder_with_something_in_it_is_left_alone(folder: Path) -> None:
    path = write(make_released(hydra), folder / "hydra.pt")
    with pytest.raises(ValueError, match="must not exist yet"):
        convert_checkpoint(path, folder)
    (folder / "empty").mkdir()
    convert_checkpoint(path, folder / "empty")
    assert (folder / "empty" / "config.json").exists()
