"""`hydra-ssm ablate`: rows that differ in their matrix alone, and results that no interruption changes."""

import csv
import fcntl
import importlib.util
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from processes import alive, children, wait_until
from small_text import sentences
from torch.nn import functional as F

from hydra_ssm import MATRICES
from hydra_ssm.cli import main
from hydra_ssm.mixer import MatrixMixer
from hydra_ssm.text import preset
from hydra_ssm.train.ablation import GROUPS, SIZES, Interrupted, Plan, ablate, all_rows
from hydra_ssm.train.ablation import run as runs
from hydra_ssm.train.ablation.data import Data
from hydra_ssm.train.ablation.models import TOLERANCE, choose, config, heads, parameters, state
from hydra_ssm.train.ablation.run import Key
from hydra_ssm.train.batches import Batch, Batches
from hydra_ssm.train.checkpoints import UNFINISHED
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.loop import Clock
from hydra_ssm.train.plans import read_plan
from hydra_ssm.train.trainee import Trainee
from hydra_ssm.train.workers import Until, stopping

TINY = {
    "layers": 1, "d_model": 16, "headdim": 2, "d_state": 4, "length": 16, "vocab_size": 60, "batch_size": 4,
    "steps": 20, "held_out_rows": 8, "learning_rate": 1e-2,
}  # fmt: skip
ONE = {"size": "small", "rows": ["toeplitz"], "seeds": [0], "jobs": 1}
ROWS = ("toeplitz", "quasiseparable", "dense-fixed")


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(25):
        (folder / f"{number:02}.txt").write_text(sentences(30, seed=number), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def done(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[str]]:
    """The folder, what JSON has and what was said of an ablation that nothing interrupted."""
    out, said = tmp_path_factory.mktemp("ablation") / "out", []
    report = ablate(text, out, size="small", rows=ROWS, seeds=(0, 1), jobs=1, say=said.append, **TINY)
    return out, report, said


def results(folder: Path) -> dict[str, dict]:
    """Records by their file, without what a clock says."""
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "runs").glob("*.json")}
    for record in found.values():
        del record["seconds_a_step"], record["at_once"]
    return found


# ------------------------------------------------------------------------------------------------------ what is equal


def test_every_form_of_every_class_of_the_registry_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(MATRICES["toeplitz"]):
        pass

    monkeypatch.setitem(MATRICES, "mine", Mine)
    rows = choose(())
    expected = {n for n, m in MATRICES.items() if m.data_dependent} | {
        f"{n}-fixed" for n, m in MATRICES.items() if m.fixed
    }
    assert set(rows) == expected >= {"mine", "mine-fixed", "dense-fixed", "attention", "attention-fixed"}
    assert len(rows) == len(expected)
    assert {"semiseparable", "add", "mult", "concat", "add_diagonal", "add_shift", "quasiseparable"} <= set(rows)
    assert "dense" not in rows  # it has the fixed form alone


def test_the_rows_of_the_papers_tables_go_by_their_numbers() -> None:
    assert all(set(rows) <= set(all_rows()) for rows in GROUPS.values())
    assert choose(["table10", "add", "dft-fixed"]) == [
        "add",
        "add_diagonal",
        "add_shift",
        "quasiseparable",
        "dft-fixed",
    ]


@pytest.mark.parametrize("size", SIZES)
def test_all_rows_have_equal_parameters_states_depth_and_width(size: str) -> None:
    plan = Plan.of(size, {})
    equal = parameters(config(plan, "quasiseparable", plan.vocab_size))
    bar = {"small": TOLERANCE, "medium": 0.005, "paper": 0.002}[size]
    assert bar <= 0.02
    for row in all_rows():
        found = config(plan, row, plan.vocab_size)
        assert abs(parameters(found) - equal) <= bar * equal, row
        assert (found.num_hidden_layers, found.hidden_size) == (plan.layers, plan.d_model)
        matrix, computed, numbers = row.removesuffix("-fixed"), not row.endswith("-fixed"), heads(plan, row)
        assert max(numbers) - min(numbers) <= (2 if matrix == "concat" else 1)
        layers = [*zip(found.layer_mixers, numbers, strict=True)]
        assert len(layers) == plan.layers
        for spec, number in [layer for at, layer in enumerate(layers) if layer not in layers[:at]]:
            with torch.device("meta"):
                mixer = MatrixMixer(plan.d_model, **{**found.mixer_options, **spec})
            assert mixer.settings.nheads == number
            assert mixer.settings.d_state == plan.d_state == state(plan, row)
            assert mixer.settings.max_length == plan.length
            assert (mixer.matrix_class, mixer.data_dependent) == (MATRICES[matrix], computed)


def test_the_paper_size_has_the_papers_70_million_parameters() -> None:
    plan = Plan.of("paper", {})
    assert (plan.layers, plan.length, plan.batch_size, plan.steps) == (12, 128, 4096, 24_000)
    assert abs(parameters(config(plan, "quasiseparable", 30522)) - 70e6) < 0.5e6


def test_the_released_setting_is_that_of_the_presets() -> None:
    plan = Plan.of("paper", {"unmatched": True})
    for row in all_rows():
        name = row.replace("-fixed", "") + "-12" + "-fixed" * row.endswith("-fixed")
        assert parameters(config(plan, row, 30528)) == parameters(preset(name)), row
        assert state(plan, row) == preset(name).d_state
    assert (state(plan, "attention"), state(plan, "quasiseparable_shared")) == (16, 192)
    assert state(replace(plan, headdim=32), "attention") == 8
    assert "NOT matched" in plan.setting


def test_one_seed_means_the_same_batches_and_masks_for_every_row(
    done: tuple[Path, dict, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []
    draw = Batches.__getitem__

    def record(self: Batches, step: int) -> list[Batch]:
        parts = draw(self, step)
        seen.extend(torch.cat([part.input_ids.flatten(), part.places, part.labels]) for part in parts)
        return parts

    monkeypatch.setattr(Batches, "__getitem__", record)
    batches = []
    for row, seed in (("toeplitz", 0), ("dft-fixed", 0), ("toeplitz", 1)):
        out = tmp_path / f"{row}{seed}"
        ablate(done[0] / "data", out, size="small", rows=[row], seeds=[seed], jobs=1, say=quiet, **TINY)
        batches.append(torch.stack(seen))
        seen.clear()
    assert batches[0].shape[0] >= TINY["steps"]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


# -------------------------------------------------------------------------------------------------- what is reported


def test_the_table_says_what_json_says(done: tuple[Path, dict, list[str]]) -> None:
    out, report, said = done
    kept = json.loads((out / "ablation.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert kept == json.loads(json.dumps(report))
    lines = next(part for part in said if "held-out loss  " in part).splitlines()
    assert lines[0] == kept["setting"] == "matched: state 4 in every class, equal parameters"
    for row in kept["rows"]:
        line = next(line for line in lines if line.startswith(row["row"] + " "))
        own = [run for run in kept["runs"] if run["row"] == row["row"]]
        figures = [float(number.replace(",", "")) for number in re.findall(r"[\d,.]+", line.removeprefix(row["row"]))]
        expected = [row["state"]] * (row["state"] is not None) + [own[0]["parameters"]]
        for name, scale, digits in (("loss", 1, 3), ("accuracy", 100, 1), ("seconds_a_step", 1000, 1)):
            values = [run[name] for run in own]
            assert row[name] == {
                "mean": pytest.approx(np.mean(values), rel=1e-12),
                "spread": pytest.approx(np.std(values, ddof=1), rel=1e-9),
            }
            expected += [round(scale * row[name]["mean"], digits), round(scale * row[name]["spread"], digits)]
        assert figures == [*expected, len(own)]
    losses = [row["loss"]["mean"] for row in kept["rows"]]
    assert losses == sorted(losses)
    assert {row["row"]: row["state"] for row in kept["rows"]} == {
        "toeplitz": None,
        "quasiseparable": 4,
        "dense-fixed": None,
    }


def test_a_record_has_the_whole_curves(done: tuple[Path, dict, list[str]]) -> None:
    for run in done[1]["runs"]:
        assert run["training"]["step"] == [*range(1, 21)]
        assert run["held_out"]["step"] == [*range(2, 21, 2)]
        for curve in (run["training"], run["held_out"]):
            assert len(curve["loss"]) == len(curve["accuracy"]) == len(curve["step"])
            assert all(map(math.isfinite, curve["loss"]))
        for name in ("loss", "accuracy"):
            assert run["held_out"][name][-1] == pytest.approx(run[name], rel=1e-5)
        assert run["held_out"]["loss"][-1] < run["held_out"]["loss"][0]  # it learns
        assert 0 < run["seconds_a_step"] < 5


class Stalls(Clock):
    """Seconds that a machine takes which stands still in every fourth stretch."""

    stretches = 0

    def stop(self) -> None:
        self.stretches += 1
        self.seconds += 9.0 if self.stretches % 4 == 0 else 0.5


def test_a_time_a_step_is_of_the_row_and_not_of_what_holds_the_machine_up(
    done: tuple[Path, dict, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_ssm.train.loop.Clock", Stalls)
    out, key = tmp_path / "out", Key("toeplitz", 0)
    ablate(done[0] / "data", out, **ONE | {"limit": 0}, say=quiet, **{**TINY, "steps": 200})
    assert runs.train(out, key, Until(After(91), math.inf), 1, quiet) is None  # between two logs
    assert runs.steps_done(out, key) == 91
    (run,) = ablate(out=out, say=quiet, **ONE)["runs"]
    assert len(run["training"]["step"]) == 100
    assert run["seconds_a_step"] == 0.25  # half a second for two steps


def test_csv_has_a_line_a_run_and_the_picture_is_drawn(done: tuple[Path, dict, list[str]]) -> None:
    out, report, said = done
    with (out / "ablation.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report["runs"]) == len(ROWS) * 2
    for line, run in zip(lines, report["runs"], strict=True):
        assert line["setting"] == report["setting"]
        assert (line["row"], int(line["seed"]), int(line["parameters"])) == (run["row"], run["seed"], run["parameters"])
        assert [float(line[name]) for name in ("loss", "accuracy", "seconds_a_step")] == [
            run[name] for name in ("loss", "accuracy", "seconds_a_step")
        ]
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {out}/ablation.json, {out}/ablation.csv, {out}/ablation.png" in said


def test_every_output_says_that_the_released_setting_is_unequal(
    done: tuple[Path, dict, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, titles = [], []
    draw = Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **rest: titles.append(text) or draw(self, text, **rest))
    ablate(done[0] / "data", tmp_path, **ONE, unmatched=True, say=said.append, **TINY)
    label = "released setting: states and parameters NOT matched"
    assert said[0].startswith(label)
    assert any(part.startswith(f"{label}\n") for part in said)  # the table
    assert titles == [f"small ablation, {label}"]
    for ending in ("json", "csv"):
        assert label in (tmp_path / f"ablation.{ending}").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    assert " --unmatched " in report["command"]
    assert report["plan"]["unmatched"]


def test_the_command_of_a_report_does_the_same_again(
    text: Path, done: tuple[Path, dict, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = Data(done[0] / "data").tokenizer.get_vocab()
    (tmp_path / "base-vocab.txt").write_text(
        "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)), encoding="utf-8"
    )
    (tmp_path / "held out.txt").write_text(sentences(30, seed=99), encoding="utf-8")
    settings = {
        "held_out": (tmp_path / "held out.txt",), "tokenizer": str(tmp_path / "base-vocab.txt"), "length": 16,
        "batch_size": 8, "accumulate": 1, "steps": 1000, "learning_rate": 5e-4, "mask_rate": 0.3, "clip": 1.0,
        "held_out_rows": 4096,
    }  # fmt: skip
    rows = ["add", "quasiseparable", "toeplitz-fixed"]
    first = ablate(text, tmp_path / "first", size="paper", rows=rows, limit=0, jobs=1, say=quiet, **settings)
    words = [*shlex.split(first["command"])[1:], "--limit", "0", "--jobs", "1", "--out", str(tmp_path / "second")]
    assert main(words) == 0, capsys.readouterr().err
    second = json.loads((tmp_path / "second" / "ablation.json").read_text(encoding="utf-8"))
    assert second == json.loads(json.dumps(first))
    assert len(second["unfinished"]) == len(rows) * 3
    assert (second["plan"]["accumulate"], second["plan"]["clip"], second["plan"]["mask_rate"]) == (1, 1.0, 0.3)
    for name in ("train.npy", "held_out.npy"):
        files = [(tmp_path / out / "data" / name).read_bytes() for out in ("first", "second")]
        assert files[0] == files[1]


@pytest.mark.gpu
def test_on_a_gpu_rows_train_at_once_in_bf16(text: Path, tmp_path: Path) -> None:
    sizes = {**TINY, "layers": 2, "d_model": 64, "headdim": 16, "length": 64, "unmatched": True, "batch_size": 16}
    rows = ["quasiseparable", "cauchy", "vandermonde", "toeplitz", "attention"]
    report = ablate(text, tmp_path, size="small", rows=rows, seeds=[0], jobs=2, say=quiet, **sizes)
    assert len(report["runs"]) == len(rows)
    for run in report["runs"]:
        assert run["device"] == torch.cuda.get_device_name(0)
        assert run["at_once"] == 2
        assert run["graph"]
        assert run["loss"] < run["held_out"]["loss"][0]


def test_the_loss_is_that_of_the_hidden_tokens_in_float64(done: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    plan, data = read_plan(Plan, done[0]), Data(done[0] / "data")
    training = runs._training(plan, data, Key("quasiseparable", 0), tmp_path, quiet)
    inputs, labels = runs.evaluation(data, len(data.held_out))
    assert inputs.shape == (len(data.held_out), plan.length)
    found = training.trainee.score(inputs, labels, 2 * plan.length)
    model, chosen = training.trainee.net.double().eval(), labels != -100
    with torch.no_grad():
        logits = model(input_ids=inputs).logits[chosen]
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels[chosen])), rel=1e-5)
    assert found.accuracy == float((logits.argmax(-1) == labels[chosen]).double().mean())
    assert found.tokens == chosen.sum() == data.baseline.tokens


class Never:
    """Nobody asks to stop."""

    def is_set(self) -> bool:
        return False

    def set(self) -> None:
        raise AssertionError


class After(Never):
    """Somebody asks when it has been looked at so many times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


# ------------------------------------------------------------------------------------------------- what may interrupt


BARE = """
import sys
for name in ("tyro", "rich", "datasets", "tensorboard", "matplotlib", "sklearn", "scipy", "pandas"):
    sys.modules[name] = None  # as on a machine that has torch, transformers, accelerate and what they need
from hydra_ssm.train.ablation import ablate
data, out, rows, settings = sys.argv[1:]
ablate(data, out, size="small", rows=rows.split(), seeds=[0], jobs=2, save_after=0, **eval(settings))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to see the processes of a process")
def test_runs_that_are_killed_with_all_their_processes_end_as_if_nothing_had_happened(
    done: tuple[Path, dict, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", BARE, done[0] / "data", out, "toeplitz quasiseparable", repr(TINY)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kept = [out / "runs" / f"{row}-seed-0" for row in ("toeplitz", "quasiseparable")]
    wait_until(lambda: any(list(folder.glob("checkpoint-[3-9]")) for folder in kept), process)
    others = children(process.pid)
    assert others
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, others)))
    assert len(results(out)) < 2
    said: list[str] = []
    report = ablate(out=out, rows=("toeplitz", "quasiseparable"), seeds=[0], jobs=1, say=said.append)
    assert not report["unfinished"]
    assert f"going on in {out}" in said[0]
    expected = results(done[0])
    assert results(out) == {name: expected[name] for name in ("toeplitz-seed-0.json", "quasiseparable-seed-0.json")}


def test_a_run_that_stops_and_goes_on_is_the_same_run(done: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    out, key = tmp_path / "out", Key("toeplitz", 0)
    report = ablate(done[0] / "data", out, size="small", rows=["toeplitz"], seeds=[0], limit=0, say=quiet, **TINY)
    assert report["runs"] == []
    assert report["unfinished"] == [{"row": "toeplitz", "seed": 0, "steps_kept": 0}]
    for steps in (7, 16):
        looks = steps + 1 - runs.steps_done(out, key)  # before the first step, and after each
        assert runs.train(out, key, Until(After(looks - 1), math.inf), 1, quiet) is None
        assert runs.steps_done(out, key) == steps
    said: list[str] = []
    report = ablate(out=out, rows=["toeplitz"], seeds=[0], limit=0, say=said.append)
    assert "0 of 1 runs are finished (toeplitz, seed 0, at step 16): the same command goes on" in said[-2]
    ablate(out=out, rows=["toeplitz"], seeds=[0], jobs=1, say=quiet)
    assert results(out) == {"toeplitz-seed-0.json": results(done[0])["toeplitz-seed-0.json"]}
    assert not key.folder(out).exists()  # its checkpoints have served


def test_a_run_that_went_on_elsewhere_says_so(
    done: tuple[Path, dict, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key("toeplitz", 0)
    ablate(done[0] / "data", tmp_path, **ONE | {"limit": 0}, say=quiet, **TINY)
    monkeypatch.setattr("hydra_ssm.train.loop.device_name", lambda _: "first")
    assert runs.train(tmp_path, key, Until(After(9), math.inf), 3, quiet) is None
    monkeypatch.setattr("hydra_ssm.train.loop.device_name", lambda _: "second")
    said: list[str] = []
    (run,) = ablate(out=tmp_path, say=said.append, **ONE)["runs"]
    assert (run["device"], run["at_once"], run["graph"]) == ("first, then second", 3, False)
    assert "ms a step on first, then second, 3 runs at once, which slow each other" in "\n".join(said)


def test_steps_in_parts_are_the_same_steps(
    done: tuple[Path, dict, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_dropout(*given: Any) -> Any:
        found = config(*given)
        found.embedding_dropout = 0.0
        return found

    def add_up(self: Trainee, number: int, count: int) -> None:
        parts.append(number)
        add(self, number, count)

    parts: list[int] = []
    add = Trainee._add_up
    monkeypatch.setattr(runs, "config", without_dropout)
    monkeypatch.setattr(Trainee, "_add_up", add_up)
    (whole,), (run,) = (
        ablate(done[0] / "data", tmp_path / str(accumulate), **ONE, accumulate=accumulate, say=quiet, **TINY)["runs"]
        for accumulate in (1, 2)
    )
    for curve in ("training", "held_out"):
        assert run[curve]["step"] == whole[curve]["step"]
        assert run[curve]["loss"] == pytest.approx(whole[curve]["loss"], rel=1e-4)
    assert parts == [0, 1] * TINY["steps"]


def test_seeds_come_one_after_the_other_and_the_papers_rows_first(
    done: tuple[Path, dict, list[str]], tmp_path: Path
) -> None:
    rows = ["add-fixed", "toeplitz", "dense-fixed"]
    report = ablate(done[0] / "data", tmp_path, size="small", rows=rows, seeds=[0, 1], limit=0, say=quiet, **TINY)
    order = [(run["seed"], run["row"]) for run in report["unfinished"]]
    assert order == [(s, row) for s in (0, 1) for row in rows[1:]] + [(0, rows[0]), (1, rows[0])]


def test_what_is_finished_is_kept_and_rows_and_seeds_can_be_added(
    done: tuple[Path, dict, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ablate(done[0] / "data", out, size="small", rows=["toeplitz"], seeds=[1], jobs=1, say=quiet, **TINY)
    file = Key("toeplitz", 1).file(out)
    before = file.stat().st_mtime_ns
    report = ablate(out=out, rows=["dense-fixed"], seeds=[0], jobs=1, say=quiet)
    assert file.stat().st_mtime_ns == before
    assert [(run["row"], run["seed"]) for run in report["runs"]] == [("dense-fixed", 0), ("toeplitz", 1)]
    assert {row["row"]: row["loss"]["spread"] for row in report["rows"]} == {"toeplitz": None, "dense-fixed": None}
    expected = results(done[0])
    assert results(out) == {name: expected[name] for name in ("toeplitz-seed-1.json", "dense-fixed-seed-0.json")}


def test_a_signal_stops_between_runs_and_is_the_exit_code(done: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    said: list[str] = []

    def interrupt(text: str) -> None:
        said.append(text)
        if "seed 0: held-out" in text:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="the same command goes on") as end:
        ablate(done[0] / "data", tmp_path, size="small", rows=ROWS, seeds=[0], jobs=1, say=interrupt, **TINY)
    assert end.value.exit_code == 128 + signal.SIGTERM
    assert "1 of 3 runs are finished" in "\n".join(said)
    assert len(results(tmp_path)) == 1
    handler = signal.getsignal(signal.SIGTERM)
    with stopping(Never()):
        assert signal.getsignal(signal.SIGTERM) is not handler
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_row_that_diverges_is_told_and_holds_up_no_other(text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    wild = {**TINY, "learning_rate": 1e9, "clip": 0.0}
    report = ablate(
        text, tmp_path, size="small", rows=["toeplitz", "dft-fixed"], seeds=[0], jobs=1, say=said.append, **wild
    )
    assert [row["diverged"] for row in report["rows"]] == [[0], [0]]
    assert report["rows"][0]["loss"] == {"mean": None, "spread": None}
    assert any(re.search(r"toeplitz, seed 0: diverged by step \d+, its .* \(1 of 2\)", line) for line in said)
    assert json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


# ---------------------------------------------------------------------------------------------------------- the data


def test_text_becomes_full_rows_once(text: Path, done: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    data = Data(done[0] / "data")
    assert data.train.tokens.dtype == np.uint16
    assert data.train.tokens.shape[1] == data.held_out.tokens.shape[1] == TINY["length"]
    assert len(data.held_out) == TINY["held_out_rows"]
    cls, sep = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
    for rows in (data.train, data.held_out):
        assert (rows.tokens[:, 0] == cls).all()
        assert (rows.tokens[:, -1] == sep).all()
        assert ((rows.tokens[:, 1:-1] != cls) & (rows.tokens[:, 1:-1] != sep)).all()
    tokens = [len(data.tokenizer(file.read_text(encoding="utf-8"))["input_ids"]) - 2 for file in sorted(text.iterdir())]
    tokens.pop(10)  # the one of 25 that is held out
    assert len(data.train) == sum(number // (TINY["length"] - 2) for number in tokens)
    files = {path: path.stat().st_mtime_ns for path in (done[0] / "data").rglob("*") if path.is_file()}
    ablate(out=done[0], rows=["toeplitz"], seeds=[0], jobs=1, say=quiet)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(UserError, match="length must be 16, that of the prepared data, got 12"):
        ablate(done[0] / "data", tmp_path / "out", **ONE, say=quiet, **{**TINY, "length": 12})


def test_data_that_has_changed_is_not_trained_on(text: Path, tmp_path: Path) -> None:
    ablate(text, tmp_path, size="small", rows=["toeplitz"], limit=0, say=quiet, **TINY)
    file = tmp_path / "data" / "train.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"data is damaged \(train.npy has changed since it was written\)"):
        ablate(out=tmp_path, say=quiet)


# -------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "ablate nowhere.txt": "there is no file or folder nowhere.txt",
    "ablate --small --paper": "--small and --paper are two sizes: give one of them, or none for the one between",
    "ablate text.txt --rows atention": "rows must be of table2, table3, table10, attention, low_rank, ",
    "ablate text.txt --small --headdim 48": "headdim must divide 2 * d_model = 128, got 48",
    "ablate text.txt --small --headdim 64": "a smaller --headdim than 64, by which the width within grows",
    "ablate text.txt --small --steps 0": "steps must be at least 1, got 0",
    "ablate text.txt --small --layers 0": "layers must be at least 1, got 0",
    "ablate text.txt --small --jobs 0": "jobs must be at least 1 and limit not negative, got jobs 0 and limit None",
    "ablate text.txt --small --limit -1": "jobs must be at least 1 and limit not negative, got jobs None and limit -1",
    "ablate text.txt --small --vocab-size 40 --batch-size 4096": (
        "the text must fill at least batch_size = 4096 rows of 32 tokens to train on, it fills "
    ),
    "ablate text.txt --small --seeds 0 -1": "seed must be at least 0, got -1",
    "ablate short.txt --small": "the text must fill a row of 32 tokens to train on: give more text, or --held-out",
    "ablate text.txt --small --out foreign": "foreign must be new, empty or hold an ablation, it holds thesis.tex",
    "ablate --out text.txt": "text.txt must be a folder, it is a file",
    "ablate --out begun --steps 9": "steps is 20 in the ablation that goes on in begun, got 9: choose another --out",
    "ablate --out begun --paper": "size is small in the ablation that goes on in begun, got paper",
    "ablate --out begun --unmatched": "unmatched is False in the ablation that goes on in begun, got True",
    "ablate --out begun --seeds 99999999999": "seed must be at most 4294967295, got 99999999999",
}


@pytest.fixture(scope="module")
def here(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    (folder / "text.txt").write_text(sentences(100), encoding="utf-8")
    (folder / "short.txt").write_text("two words", encoding="utf-8")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("years of work", encoding="utf-8")
    ablate(text, folder / "begun", size="small", rows=["toeplitz"], limit=0, say=quiet, **TINY)
    return folder


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("hydra-ssm: error: ")
    assert error.count("\n") == 1
    assert MISTAKES[command] in error
    after = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert not any(Path("runs").glob("*"))


def test_a_record_that_is_none_is_named(done: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    record = (done[0] / "runs" / "toeplitz-seed-0.json").read_text(encoding="utf-8")
    for number, (name, content) in enumerate([("toeplitz-seed-0", "{"), ("mine", "{}"), ("toeplitz-seed-7", record)]):
        out = tmp_path / str(number)
        shutil.copytree(done[0], out)
        (out / "runs" / f"{name}.json").write_text(content, encoding="utf-8")
        (out / "runs" / f"{UNFINISHED}toeplitz-seed-1.json").write_text("{", encoding="utf-8")  # a kill's: no record
        with pytest.raises(UserError, match=f"{name}.json must be the record of a run, it is something else or"):
            ablate(out=out, **ONE, say=quiet)


def test_two_ablations_do_not_share_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (here / "begun" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["ablate", "--out", str(here / "begun")]) == 2
    assert f"another process is at work in {here / 'begun'}" in capsys.readouterr().err


def test_without_matplotlib_the_picture_comes_later(
    done: tuple[Path, dict, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        ablate(done[0] / "data", tmp_path, **ONE, say=said.append, **TINY)
    assert "no picture: matplotlib is not installed" in said[-2]
    assert not (tmp_path / "ablation.png").exists()
    ablate(out=tmp_path, **ONE, say=quiet)
    assert (tmp_path / "ablation.png").exists()


# ---------------------------------------------------------------------------------------------------------- the page

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """docs/ablation_figures.py, at work on copies of the page and of the results."""
    spec = importlib.util.spec_from_file_location("ablation_figures", ROOT / "docs" / "ablation_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "docs" / "results.md", tmp_path / "docs")
    monkeypatch.setattr(module, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "results.md")
    return module


def test_the_page_is_what_the_results_say(script: ModuleType) -> None:
    script.main()
    assert script.PAGE.read_text(encoding="utf-8") == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_a_result_stands_beside_the_papers(script: ModuleType, done: tuple[Path, dict, list[str]]) -> None:
    shutil.copy(done[0] / "ablation.json", script.RESULTS)
    shutil.copy(done[0] / "ablation.json", script.RESULTS / "ablation_unmatched.json")
    (script.RESULTS / "ablation_paper.json").unlink()  # which would stand beside them
    script.main()
    text = script.PAGE.read_text(encoding="utf-8")
    assert "have not been run" not in text
    for name, paper in (("toeplitz", "1.91 | 61.9 | 77.7"), ("dense-fixed", "2.05 | 59.6 | 74.7")):
        own = [run for run in done[1]["runs"] if run["row"] == name]
        loss, accuracy = ([scale * run[key] for run in own] for key, scale in (("loss", 1), ("accuracy", 100)))
        (low, high), (less, more) = ((np.mean(values), np.std(values, ddof=1)) for values in (loss, accuracy))
        cells = f"{low:.3f} ± {high:.3f} | {less:.1f} ± {more:.1f}"
        assert f"| {name} | {paper} | {cells} | {cells} |\n" in text
        assert re.search(rf"\| {name} \| - \| {own[0]['parameters']:,} \| {re.escape(cells)} \|", text)
    assert "| add | 1.68 | 65.6 | 80.6 | - | - | - | - |" in text
    assert "By loss, the best first:" not in text  # that order is of all rows
    losses = {row["row"]: row["loss"]["mean"] for row in done[1]["rows"]}
    assert (
        "By loss, the best first, of only the 3 rows that were run in all of these:\n\n"
        "- paper: quasiseparable, toeplitz, dense-fixed\n"
        f"- 0M, matched: {', '.join(sorted(losses, key=losses.__getitem__))}\n\n"
    ) in text
    assert (script.DOCS / "pictures" / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_times_stand_on_the_page_where_a_gpu_took_them(script: ModuleType) -> None:
    report = script.read("ablation_small")
    page = "\n".join(script.all_rows(report))
    assert "ms a step" not in page
    assert script.NO_TIMES in page.replace("\n", " ")
    report["runs"] = [{**run, "graph": True} for run in report["runs"]]
    page = "\n".join(script.all_rows(report))
    assert script.NO_TIMES not in page.replace("\n", " ")
    assert "| ms a step |" in page
    for row in report["rows"]:
        time = row["seconds_a_step"]
        assert f"| {1e3 * time['mean']:.1f} ± {1e3 * time['spread']:.1f} | {len(row['seeds'])} |" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_the_orders_of_the_paper_and_of_ours_are_told(script: ModuleType) -> None:
    def report(millions: int, *rows: str) -> dict:
        found = [{"row": row, "parameters": millions * 10**6, "loss": {"mean": float(len(row))}} for row in rows]
        return {"rows": found, "setting": "matched: all of it"}

    rows = list(script.PAPER["Table 3"])
    diverged = {"row": "concat", "parameters": 7 * 10**7, "loss": {"mean": None}}
    some = report(70, "mult", "quasiseparable", "dense-fixed", "add")
    some["rows"].append(diverged)
    whole = [
        "By loss, the best first:",
        "",
        "- paper: quasiseparable, add, concat, mult, semiseparable",
        "- 7M, matched: add, mult, concat, semiseparable, quasiseparable",
        "",
    ]
    assert script.order("Table 3", [report(7, *rows)]) == whole
    assert script.order("Table 3", [report(7, *rows), some]) == [
        *whole,
        "By loss, the best first, of only the 3 rows that were run in all of these:",
        "",
        "- paper: quasiseparable, add, mult",
        "- 7M, matched: add, mult, quasiseparable",
        "- 70M, matched: add, mult, quasiseparable",
        "",
    ]
    assert script.order("Table 3", [report(70, "add")]) == script.order("Table 3", []) == []  # of one row it is none


def test_the_papers_size_stands_beside_the_smaller_one(script: ModuleType) -> None:
    smaller = script.read("ablation")
    rows = ("quasiseparable", "attention", "add")
    report = json.loads(json.dumps(smaller).replace("state 16 in", "state 64 in"))
    report["plan"]["size"] = "paper"
    for kind in ("rows", "runs"):
        report[kind] = [{**found, "parameters": 69_900_123} for found in report[kind] if found["row"] in rows]
    report["rows"][0]["loss"] = {"mean": 3.25, "spread": 0.125}
    picture = script.DOCS / "pictures" / "ablation_paper.png"
    (script.RESULTS / "ablation_paper.json").write_text(json.dumps(report), encoding="utf-8")
    (script.RESULTS / "ablation_small.json").unlink()  # whose picture takes a second
    script.main()
    text = script.PAGE.read_text(encoding="utf-8")
    head = "| | paper: loss | accuracy | GLUE | 7M, matched: loss | accuracy | 70M, matched: loss | accuracy |\n"
    assert text.count(head) == len(script.PAPER)
    cells = " | ".join(script.result(smaller, "quasiseparable"))
    assert f"| quasiseparable | 1.84 | 63.3 | 79.7 | {cells} | 3.250 ± 0.125 | {cells.split(' | ')[1]} |\n" in text
    assert f"| toeplitz | 1.91 | 61.9 | 77.7 | {' | '.join(script.result(smaller, 'toeplitz'))} | - | - |\n" in text
    (section,) = (part for part in text.split("\n## ") if part.startswith("The rows of paper size, matched\n"))
    assert re.findall(r"^\| (\w+) \| 16 \| 69,900,123 \|", section, re.MULTILINE) == [r["row"] for r in report["rows"]]
    assert "![held-out loss by step of every row, matched: state 64 in every class, equal parameters]" in section
    assert "](pictures/ablation_paper.png)" in section
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_results_the_paper_stands_alone(script: ModuleType) -> None:
    shutil.rmtree(script.RESULTS)
    script.main()
    text = script.PAGE.read_text(encoding="utf-8")
    assert "Ours have not been run yet" in text
    assert text.count("| | paper: loss | accuracy | GLUE |\n|---|---|---|---|\n") == len(script.PAPER)
    assert "| add | 1.68 | 65.6 | 80.6 |\n" in text
    assert "By loss" not in text
    assert "## The rows of" not in text
