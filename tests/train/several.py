"""Runs of one team, one after the other: started by torchrun, told by a file what to do."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

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


def main() -> None:
    team = Team.join()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        out = Path(job["out"])
        team.first_does(lambda out=out, job=job: begin(out, job))
        recipe = RunFolder(out).read_recipe().going_on(job.get("how", {}), out)
        Probed(RunFolder(out), Console(quiet=True), team, recipe).train()
    team.leave()


if __name__ == "__main__":
    main()
