"""What a step is made of, however many processes compute it: rows, dropout, FLOP, and how it is reported."""

import io
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState

from hydra_ssm.bench.costs import hydra
from hydra_ssm.mixer import MatrixMixer
from hydra_ssm.text import HydraForMaskedLM, preset
from hydra_ssm.text.collators import Row
from hydra_ssm.train.baseline import Score
from hydra_ssm.train.dropout import RowDropout, by_row, words_of
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.flops import peak, step_cost
from hydra_ssm.train.folder import RunFolder
from hydra_ssm.train.parts import Parts
from hydra_ssm.train.pretrain import pretrain, resume
from hydra_ssm.train.progress import ProgressBar
from hydra_ssm.train.recipe import Recipe
from hydra_ssm.train.reporters import reporting


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("accumulate", [1, 2, 6])
def test_every_step_has_the_same_rows_in_the_same_order(size: int, accumulate: int) -> None:
    ranks = [list(Parts(5, 6, accumulate, rank, size)) for rank in range(size)]
    assert {len(lists) for lists in ranks} == {5 * accumulate}
    for step in range(5):
        own = range(step * accumulate, (step + 1) * accumulate)
        assert [row for part in own for lists in ranks for row in lists[part]] == [*range(6 * step, 6 * step + 6)]
        for part in own:
            sizes = [len(lists[part]) for lists in ranks]
            assert max(sizes) - min(sizes) <= 1


def row(i: int, length: int) -> Row:
    return Row(np.arange(length), np.array([length]), key=(0, i))


def test_dropout_follows_from_the_row_and_not_from_its_neighbours() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.5))
    draw = by_row(model, 9)
    together = words_of([row(0, 5), row(1, 7), row(2, 3)])
    alone = words_of([row(1, 7)])
    first, second = (module for module in model if isinstance(module, RowDropout))
    assert torch.equal(first.keep(together[None])[:, 5:12], first.keep(alone[None]))
    assert not torch.equal(first.keep(alone[None]), second.keep(alone[None]))
    draw.words = alone[None]
    h = torch.ones(1, 7, 9, requires_grad=True)
    y = model(h)
    assert torch.equal(y, model(h))
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.9 / 0.5), rtol=1e-4, atol=0)
    assert torch.equal(model.eval()(h), h)


def test_dropout_without_the_numbers_of_its_tokens_is_an_error_in_training() -> None:
    model = nn.Sequential(nn.Dropout(0.1))
    draw = by_row(model, 9)
    words = [words_of([row(0, length)])[None] for length in (5, 7)]
    for given, h in ((None, (1, 7, 9)), (words[0], (1, 7, 9)), (words[1], (1, 7)), (words[1], (1, 7, 8))):
        draw.words = given
        with pytest.raises(RuntimeError, match=r"dropout needs h \(B, L, 9\) and a random number for each"):
            model.train()(torch.ones(h))
        assert torch.equal(model.eval()(torch.ones(h)), torch.ones(h))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_everywhere_and_each_element_by_itself(p: float) -> None:
    kept = RowDropout(p, 65, 0, SimpleNamespace()).keep(words_of([row(i, 100) for i in range(40)])[None])[0].double()
    n, deviation = len(kept), (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * deviation / kept.numel() ** 0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * deviation / n**0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 6 * deviation / 65**0.5
    between = torch.corrcoef(kept.T).fill_diagonal_(0)
    assert between.abs().max() < 5 / n**0.5


def test_the_flop_of_a_step_are_those_that_torch_counts_where_it_counts_them() -> None:
    model = HydraForMaskedLM(preset("bert-tiny", vocab_size=104)).train()
    tokens, hidden = 24, 5
    labels = torch.full((1, tokens), -100)
    labels[0, :hidden] = 7
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(input_ids=torch.randint(0, 104, (1, tokens)), labels=labels)
    cost = step_cost(model)
    assert cost is not None
    assert cost(tokens, tokens**2, hidden) == 3 * counter.get_total_flops()


def test_the_flop_of_hydra_are_those_that_its_benchmark_states() -> None:
    model = HydraForMaskedLM(preset("hydra-tiny"))
    layers = [m for m in model.modules() if isinstance(m, MatrixMixer)]
    stated = sum(c.projections + c.products for layer in layers for c in hydra(layer, 2, 128))
    convolutions = sum(6 * layer.conv1d.weight.numel() for layer in layers)
    cost = step_cost(model)
    assert cost is not None
    assert cost.token == stated + convolutions
    assert cost.pair == 0


def test_utilisation_is_absent_where_the_device_or_the_cost_is_unknown() -> None:
    assert peak("NVIDIA H100 80GB HBM3", bf16=True) == 989e12
    assert peak("NVIDIA H100 PCIe", bf16=True) == 756e12
    assert peak("NVIDIA H100 80GB HBM3", bf16=False) is None
    assert peak("A processor", bf16=True) is None
    assert step_cost(HydraForMaskedLM(preset("hydra-tiny", mixers="toeplitz", max_position_embeddings=32))) is None


def test_the_progress_says_speed_utilisation_and_the_time_that_is_left() -> None:
    console = Console(file=io.StringIO(), width=200)
    bar = ProgressBar(console, Score(1.0, 0.1, 1))
    state, control = TrainerState(max_steps=100), TrainerControl()
    bar.on_train_begin(None, state, control)  # type: ignore[arg-type]
    state.global_step, bar.began = 20, bar.began - 40
    logs = {"loss": 2.0, "masked_accuracy": 0.25, "tokens_per_second": 12345.6, "model_flop_utilisation": 0.4321}
    bar.on_log(None, state, control, logs=logs)  # type: ignore[arg-type]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 20/100: loss 2.000  masked acc. 25.0%  12,346 tokens/s  MFU 43.2%  0:02:40 left" in said


def test_tokens_say_how_long_to_train() -> None:
    assert Recipe.of("hydra-base", tokens=10**9).steps == -(-(10**9) // (4096 * 128))
    assert Recipe.of("hydra-tiny", tokens=1000, batch_size=4, length=100).steps == 3
    with pytest.raises(UserError, match="steps and tokens both say"):
        Recipe.of("hydra-tiny", tokens=1000, steps=3)


@pytest.mark.parametrize("wrong", [{"sharding": "zero"}, {"precision": "fp8"}, {"report_to": ("mail",)}])
def test_a_setting_of_few_values_names_them(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} must be one of .*, got (zero|fp8|mail)"):
        Recipe.of("hydra-tiny", **wrong)


def test_a_run_goes_on_with_the_tokens_that_it_began_with() -> None:
    begun = Recipe.of("hydra-tiny", tokens=10**5)
    assert begun.going_on({"tokens": 10**5}, "run") == begun
    with pytest.raises(UserError, match=f"steps is {begun.steps} in the run that goes on in run, got"):
        begun.going_on({"tokens": 10**6}, "run")


def test_how_a_run_is_computed_may_change_and_what_may_not() -> None:
    begun = Recipe.from_json(Recipe.of("hydra-tiny").to_json())
    on = begun.going_on({"sharding": "fsdp2", "accumulate": 2, "activation_checkpointing": True}, "run")
    assert (on.sharding, on.accumulate, on.activation_checkpointing) == ("fsdp2", 2, True)
    with pytest.raises(UserError, match="batch_size is 4 in the run that goes on in run, got 8"):
        begun.going_on({"batch_size": 8}, "run")


SMALL = {"vocab_size": 90, "length": 32, "batch_size": 4, "steps": 4, "learning_rate": 3e-3}


def history(out: Path) -> torch.Tensor:
    entries = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["history"]
    return torch.tensor([entry["loss"] for entry in entries if "loss" in entry])


@pytest.mark.slow
@pytest.mark.parametrize("preset_name", ["hydra-tiny", "bert-tiny"])
def test_neither_parts_nor_checkpointing_nor_compilation_change_the_loss(
    preset_name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))  # no compiler of C++
    ways = ({}, {"accumulate": 2}, {"activation_checkpointing": True}, {"compile": True})
    for i, way in enumerate(ways):
        pretrain(Recipe.of(preset_name, sources=(str(text_file),), **SMALL, **way), tmp_path / str(i))
    for i in range(1, len(ways)):
        torch.testing.assert_close(history(tmp_path / str(i)), history(tmp_path / "0"), rtol=0, atol=1e-5)


def written(out: Path) -> dict[Path, bytes]:
    """The logs of the offline runs of Weights & Biases; it has its own process, which writes on after their end."""
    import wandb  # takes seconds, in each process that collects tests

    wandb.teardown()  # waits for it
    return {file: file.read_bytes() for file in out.glob("training/wandb/offline-run-*/run-*.wandb")}


@pytest.mark.slow
def test_weights_and_biases_keeps_the_steps_of_a_run_that_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(tmp_path)
    folder.training.mkdir()
    with reporting(("wandb",), folder, Recipe.of("hydra-tiny")) as report:
        (reporter,) = report(None)
        for step in (5, 3):
            reporter.on_log(None, TrainerState(global_step=step), None, logs={"loss": step + 0.0625})  # type: ignore[arg-type]
    (log,) = written(tmp_path).values()
    assert b"5.0625" in log
    assert b"3.0625" in log


def test_the_last_points_of_a_run_that_fails_are_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def fail() -> None:
        with reporting(("tensorboard",), folder, Recipe.of("hydra-tiny")) as report:
            (reporter,) = report(None)
            reporter.tb_writer.add_scalar("train/loss", 2.5, 7)  # type: ignore[attr-defined]
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    found = EventAccumulator(str(folder.tensorboard)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in found] == [(7, 2.5)]


@pytest.mark.slow
def test_weights_and_biases_gets_the_numbers_of_one_run_offline(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {**SMALL, "steps": 2, "save_every": 1, "report_to": ("wandb",)}
    pretrain(Recipe.of("hydra-tiny", sources=(str(text_file),), **settings), tmp_path)
    (tmp_path / "training/finished.json").unlink()
    for path in (tmp_path / "training/checkpoints/checkpoint-2").iterdir():
        path.unlink()
    os.rmdir(tmp_path / "training/checkpoints/checkpoint-2")
    resume(tmp_path)
    logs = written(tmp_path)
    assert len(logs) == 2
    assert len({file.name for file in logs}) == 1  # the same run, before and after
    for name in (b"train/loss", b"train/tokens_per_second", b"eval/loss"):
        assert all(name in log for log in logs.values())
    assert not (tmp_path / "training/tensorboard").exists()
