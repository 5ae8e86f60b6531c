"""Teams of processes, one after the other, and the runs of each.

They are forked, not started anew: importing takes each longer than its runs.
"""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch.multiprocessing
from rich.console import Console

from hydra_ssm.train.distributed import Team
from hydra_ssm.train.folder import RunFolder
from hydra_ssm.train.prepare import prepare
from hydra_ssm.train.pretrain import Run
from hydra_ssm.train.recipe import Recipe
from hydra_ssm.train.trainer import MaskedLMTrainer


def begin(out: Path, job: dict[str, Any]) -> None:
    """A new run, or one that goes on from an early checkpoint of another."""
    folder = RunFolder(out)
    if "goes_on" not in job:
        with folder.begin(overwrite=False) as part:
            prepare(Recipe.of("hydra-tiny", **{**job["recipe"], "sources": tuple(job["recipe"]["sources"])}), part)
        return
    back(Path(job["goes_on"]), out, job["step"])


def back(finished: Path, out: Path, step: int) -> None:
    """A copy of a run as it was after a step."""
    shutil.copytree(finished / "training", out / "training")
    folder = RunFolder(out)
    folder.finished.unlink()
    for path in folder.checkpoints.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


class Probed(Run):
    """Writes down in which precision the first layer's parameters are when it runs."""

    def _trainer(self, callbacks: list[Any]) -> MaskedLMTrainer:
        trainer = super()._trainer(callbacks)
        mixer = trainer.net.model.encoder.layers[0].mixer
        seen: dict[str, str] = {}

        def look(name: str, parameter: Any) -> None:
            seen[name] = str(parameter.dtype)
            if self.team.first:
                (self.folder.training / "seen.json").write_text(json.dumps(seen), encoding="utf-8")

        for name in ("in_proj", "out_proj"):
            module = getattr(mixer, name)
            module.register_forward_pre_hook(lambda module, _, name=name: look(name, module.weight))
        mixer.register_forward_pre_hook(
            lambda mixer, _: [look(name, getattr(mixer, name)) for name in ("A_log", "dt_bias", "D")] and None
        )
        return trainer


def work(rank: int, size: int, port: int, jobs: list[dict[str, Any]]) -> None:
    """What one process does, with what torchrun would tell it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    team = Team.join()
    for job in jobs:
        out = Path(job["out"])
        team.first_does(lambda out=out, job=job: begin(out, job))
        recipe = RunFolder(out).read_recipe().going_on(job.get("how", {}), out)
        Probed(RunFolder(out), Console(quiet=True), team, recipe).train()
    team.leave()


def run(teams: list[tuple[int, list[dict[str, Any]]]]) -> None:
    """In a process that has imported and computed nothing yet."""
    for size, jobs in teams:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(work, (size, port, jobs), size, start_method="fork")
