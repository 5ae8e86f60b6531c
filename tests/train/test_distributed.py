"""One run, computed by several processes: the same numbers, whatever their number and whatever happens to them."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LONGEST, children, start, wait_until
from safetensors.torch import load_file
from several import back, run
from small_text import sentences
from transformers import AutoModelForMaskedLM

from hydra_ssm.train.checkpoints import checkpoints
from hydra_ssm.train.distributed import restarted
from hydra_ssm.train.pretrain import pretrain, resume
from hydra_ssm.train.recipe import Recipe

pytestmark = pytest.mark.slow

SETTINGS = {
    "vocab_size": 90, "length": 32, "batch_size": 6, "steps": 4, "save_every": 2, "evaluate_every": 2,
    "learning_rate": 3e-3,
}  # fmt: skip
NEAR = 1e-5
STEPS = 24  # of a run that does not come to its end undisturbed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of very different lengths."""
    folder = tmp_path_factory.mktemp("documents")
    for i, count in enumerate([150, 1, 40, 2, 3, 100, 1]):
        (folder / f"{i}.txt").write_text(sentences(count, i), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(base: Path, text: str) -> Path:
    """What a single process finds."""
    pretrain(Recipe.of("hydra-tiny", sources=(text,), **SETTINGS), base / "one")
    return base / "one"


def recipe(text: str, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "sources": [text], **changes}


def further(text: str, one: Path, **changes: Any) -> dict[str, Any]:
    """A run that begins with that one's weights."""
    settings = recipe(text, model=str(one), **changes)
    del settings["vocab_size"]
    return settings


@pytest.fixture(scope="module")
def teams(base: Path, text: str, one: Path) -> Path:
    """What two processes find, and four after them."""
    two = [
        {"out": "ddp2", "recipe": recipe(text)},
        {"out": "fsdp2", "recipe": recipe(text, sharding="fsdp2", activation_checkpointing=True)},
        {"out": "again2", "goes_on": "ddp2"},
        {"out": "ddp2-further", "recipe": further(text, one)},
        {"out": "fsdp2-further", "recipe": further(text, one, sharding="fsdp2")},
        {"out": "ddp2-bf16", "recipe": recipe(text, precision="bf16", steps=2)},
        {"out": "fsdp2-bf16", "recipe": recipe(text, precision="bf16", steps=2, sharding="fsdp2")},
    ]
    four = [
        {"out": "idle4", "recipe": recipe(text, accumulate=3, sharding="fsdp2")},  # 2 rows for 4 processes
        {"out": "again4", "goes_on": "ddp2", "how": {"sharding": "fsdp2"}},  # 6 rows for 4 processes
        {"out": "again4-fsdp", "goes_on": "fsdp2", "how": {"accumulate": 2}},
        {"out": "again4-further", "goes_on": "fsdp2-further"},
    ]
    for job in (*two, *four):
        job |= {name: str(base / job[name]) for name in ("out", "goes_on") if name in job} | {"step": 2}
    process = start(run, [(2, two), (4, four)])
    process.join(LONGEST)
    assert process.exitcode == 0
    return base


def torchrun(size: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", *options]


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MASTER_PORT": "0"}


def losses(out: Path) -> torch.Tensor:
    """Of training and of held-out text, in their order."""
    history = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["history"]
    return torch.tensor([entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry])


def assert_same_losses(out: Path, expected: Path, near: float = NEAR) -> None:
    torch.testing.assert_close(losses(out), losses(expected), rtol=0, atol=near)


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_two_processes_find_what_one_finds(name: str, one: Path, teams: Path) -> None:
    assert len(losses(one)) == 6
    assert_same_losses(teams / name, one)


def test_processes_without_any_row_keep_up_with_the_others(one: Path, teams: Path) -> None:
    assert_same_losses(teams / "idle4", one)


def test_the_same_processes_go_on_to_the_last_bit(teams: Path) -> None:
    again, whole = (load_file(teams / name / "model.safetensors") for name in ("again2", "ddp2"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert torch.equal(losses(teams / "again2"), losses(teams / "ddp2"))


@pytest.mark.parametrize("name", ["again4", "again4-fsdp"])
def test_four_processes_go_on_from_what_two_saved(name: str, one: Path, teams: Path) -> None:
    assert_same_losses(teams / name, one)


def test_processes_begin_with_the_weights_of_a_model_as_one_does(
    one: Path, teams: Path, text: str, tmp_path: Path
) -> None:
    settings = further(text, one)
    pretrain(Recipe.of("hydra-tiny", **settings | {"sources": (text,)}), tmp_path)
    assert len(losses(tmp_path)) == 7  # one before the first step
    for name in ("ddp2-further", "fsdp2-further", "again4-further"):
        assert_same_losses(teams / name, tmp_path)


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_one_process_goes_on_from_what_two_saved(name: str, one: Path, teams: Path, tmp_path: Path) -> None:
    back(teams / name, tmp_path, 2)
    resume(tmp_path, {"accumulate": 2})
    assert_same_losses(tmp_path, one)


def test_sharded_and_single_processes_leave_the_same_files(one: Path, teams: Path) -> None:
    files = [
        sorted(p.name for p in (out / "training/checkpoints/checkpoint-4").iterdir()) for out in (one, teams / "fsdp2")
    ]
    assert files[0] == files[1]
    for name in ("training/checkpoints/checkpoint-4", "."):
        model, expected = (AutoModelForMaskedLM.from_pretrained(out / name) for out in (teams / "fsdp2", one))
        for found, right in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-4)
    states = [torch.load(out / "training/checkpoints/checkpoint-4/optimizer.pt") for out in (one, teams / "fsdp2")]
    for i, state in states[0]["state"].items():
        torch.testing.assert_close(states[1]["state"][i]["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-2, atol=1e-7)


def test_decays_and_skips_stay_float32_where_weights_travel_as_bfloat16(teams: Path) -> None:
    seen = json.loads((teams / "fsdp2-bf16/training/seen.json").read_text(encoding="utf-8"))
    weights = {"in_proj": "torch.bfloat16", "out_proj": "torch.bfloat16"}
    assert seen == {**weights, "A_log": "torch.float32", "dt_bias": "torch.float32", "D": "torch.float32"}
    assert_same_losses(teams / "fsdp2-bf16", teams / "ddp2-bf16", 1e-3)


# ------------------------------------------------------------------------------------------------- jobs that are hit


@contextmanager
def job(out: Path, text: str, *launcher: str) -> Iterator[subprocess.Popen[str]]:
    """Training in two processes for long, once it has saved."""
    settings = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (SETTINGS | {"steps": STEPS, "evaluate_every": STEPS}).items()
    ]
    command = [*launcher, "-m", "hydra_ssm.cli", "pretrain", text, *settings, "--out", str(out)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: checkpoints(out / "training" / "checkpoints"), process)
        yield process
    finally:
        process.kill()
        process.wait()


def ask(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(rank)}
    print(f"{restarted()}\n", end="", flush=True)  # one write: two processes share the file


def ask_two(known: dict[str, str], out: Path, error: Path) -> None:
    os.environ |= known
    for to, file in ((1, out), (2, error)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), to)
    torch.multiprocessing.start_processes(ask, (), 2, start_method="fork")


def test_all_processes_go_on_where_one_machine_has_started_its_own_anew(tmp_path: Path) -> None:
    """torchrun counts attempts on the machine alone whose process died."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    known |= {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    out, error = tmp_path / "out", tmp_path / "error"
    start(ask_two, known, out, error).join(LONGEST)
    assert out.read_text() == "True\n" * 2, error.read_text()
    assert error.read_text().count("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 1


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")


@needs_proc
def test_after_the_death_of_a_process_the_job_goes_on_from_its_checkpoint(text: str, tmp_path: Path) -> None:
    with job(tmp_path / "run", text, *torchrun(2, "--max-restarts=1")) as process:
        os.kill(children(process.pid)[1], signal.SIGKILL)
        out, error = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, error[-4000:]
    assert out.count(f"step {STEPS}: held-out loss") == 1  # one process speaks
    assert out.count(f"step 1/{STEPS}") == 1  # it did not begin again
    assert (tmp_path / "run" / "model.safetensors").exists()


@needs_proc
def test_sigterm_to_a_job_saves_once_and_all_processes_stop_after_the_same_step(text: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    with job(tmp_path / "run", text, *launcher) as process:
        before = len(checkpoints(tmp_path / "run" / "training" / "checkpoints"))
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=LONGEST)[1]
    said = [line for line in error.splitlines() if line.startswith("hydra-ssm: error")]
    last = checkpoints(tmp_path / "run" / "training" / "checkpoints")[-1].name.removeprefix("checkpoint-")
    assert said == [
        f"hydra-ssm: error: stopped and saved after step {last} of {STEPS}; go on with "
        f"--out {tmp_path / 'run'} --resume"
    ]
    assert before >= 1
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert resume(tmp_path / "run")[1] is not None
