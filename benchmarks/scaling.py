"""What a second GPU brings: tokens per second of one process, of DDP on two, of FSDP2 on two, once their losses agree.

    python benchmarks/scaling.py --json results/scaling.json              # two GPUs, some four minutes
    python benchmarks/scaling.py --json results/scaling.json --compile    # the same with compiled layers, added to it

Every run trains on the same batches of random text: one process computes a batch in two parts, two processes a part
each. So all have the same work at a time, and efficiency is the speed of two over twice that of one. A case is checked
before its speed counts: its losses are those of one process, and so are those of one process that goes on from a
checkpoint that two have written. What the file has already is not measured again. Needs torch, transformers,
accelerate and tokenizers; neither tyro, rich nor datasets.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
SAVE, WARM, STEPS = 20, 22, 39  # steps: saved after, timed from, in all; no other save comes between
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # largest difference of a step's loss, which begins at about 10
VOCABULARY = 30528
LIMIT = 280  # seconds for a case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("scaling.json"), help="the figures (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["hydra-base", "bert-base"], help="presets")
    parser.add_argument("--rows", type=int, default=512, help="in a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--precision", choices=TOLERANCE, default="bf16")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--work", type=Path, default=Path("scaling-work"), help="for checkpoints, removed at the end")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        child(**arguments.case)
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """All cases, each in processes of its own; the file is complete after each."""
    known = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {"cases": {}}
    known |= {"machine": machine(), "command": shlex.join(sys.argv), "date": f"{date.today()}"}
    for model in arguments.models:
        settings = {"model": model, "rows": arguments.rows, "length": arguments.length}
        settings |= {"precision": arguments.precision, "compiled": arguments.compile}
        name = f"{model} {arguments.precision}{' compiled' if arguments.compile else ''}"
        found = known["cases"].setdefault(name, {"settings": settings})
        for case in ("one", "ddp", "fsdp2", "ddp to one", "fsdp2 to one"):
            if "losses" not in found.get(case, {}):
                found[case] = run(case, settings, arguments.work / name.replace(" ", "-"))
                judge(case, found)
                write(arguments.json, known)
                print(
                    f"{name}, {case}: {json.dumps({k: v for k, v in found[case].items() if k != 'losses'})}", flush=True
                )
    shutil.rmtree(arguments.work, ignore_errors=True)


def write(path: Path, known: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def run(case: str, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """The losses of a case by step and its speed, or its error."""
    engine, _, goes_on = case.partition(" to ")
    work.mkdir(parents=True, exist_ok=True)
    out = work / f"{case}.json".replace(" ", "-")
    out.unlink(missing_ok=True)
    told = {**settings, "sharding": "ddp" if engine == "one" or goes_on else engine, "out": str(out)}
    told |= {"folder": str(work / engine), "goes_on": bool(goes_on)}
    one = engine == "one" or goes_on
    launcher = [] if one else ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511"]
    command = [sys.executable, *launcher, __file__, "--case", json.dumps(told)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.setdefault("NCCL_NVLS_ENABLE", "0")  # containers often may not map multicast memory
    environment.setdefault("OMP_NUM_THREADS", "4" if torch.cuda.is_available() else "1")
    if one and torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"}
    if done.returncode or not out.exists():
        return {"error": done.stderr[-2000:]}
    return json.loads(out.read_text(encoding="utf-8")) | {"wall_seconds": round(time.monotonic() - started, 1)}


def judge(case: str, found: dict[str, Any]) -> None:
    """Whether a case's losses are those of one process, and its efficiency."""
    one, own = found["one"], found[case]
    if case == "one" or "losses" not in own or "losses" not in one:
        return
    apart = max(abs(own["losses"][step] - one["losses"][step]) for step in own["losses"])
    tolerance = TOLERANCE[found["settings"]["precision"]]
    own |= {"largest_difference": apart, "tolerance": tolerance, "agrees": apart <= tolerance}
    if case in ("ddp", "fsdp2") and own["agrees"]:
        own["efficiency"] = own["tokens_per_second"] / (2 * one["tokens_per_second"])


def machine() -> dict[str, Any]:
    """Devices and versions."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {"devices": names or [f"CPU, {os.cpu_count()} cores"], "python": sys.version.split()[0]}
    found |= {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return found | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if names else found


# ------------------------------------------------------------------------------------------------- in each process


class RandomRows:
    """Rows of random text, whose frequencies a model can learn."""

    def __init__(self, count: int, length: int) -> None:
        draw = np.random.default_rng(0).zipf(1.3, (count, length))
        self.tokens, self.lengths = (6 + draw % (VOCABULARY - 6)).astype(np.uint32), np.array([length])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        return self.tokens[i], self.lengths


class Words:
    """What hiding tokens asks a tokenizer."""

    mask_token_id = 4
    all_special_ids: Sequence[int] = range(5)

    def __len__(self) -> int:
        return VOCABULARY


def child(
    model: str,
    rows: int,
    length: int,
    precision: str,
    compiled: bool,
    sharding: str,
    folder: str,
    goes_on: bool,
    out: str,
) -> None:
    """Train, and write down the losses and the speed."""
    from transformers import TrainerCallback, set_seed

    from hydra_ssm.text import HydraForMaskedLM, preset
    from hydra_ssm.text.collators import MaskedLMCollator
    from hydra_ssm.text.messages import quiet
    from hydra_ssm.train.distributed import Team
    from hydra_ssm.train.recipe import Recipe
    from hydra_ssm.train.rows import EvaluationRows, TrainingRows
    from hydra_ssm.train.trainer import MaskedLMTrainer, arguments

    class Clock(TrainerCallback):
        """Reads the time where the device has come to, after the steps that warm it up and after the last."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (WARM, STEPS):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

    team, times = Team.join(), []
    settings = {"length": length, "batch_size": rows, "accumulate": 1 if team.size > 1 else 2, "steps": STEPS}
    settings |= {"save_every": SAVE, "evaluate_every": 10**6, "sharding": sharding, "precision": precision}
    recipe = Recipe.of(model, **settings, compile=compiled, learning_rate=1e-4, vocab_size=VOCABULARY)
    args = arguments(recipe, Path(folder))
    args.logging_steps = 1
    data, words = RandomRows(4096, length), Words()
    set_seed(0)
    with quiet():
        trainer = MaskedLMTrainer(
            HydraForMaskedLM(preset(model, vocab_size=VOCABULARY)),
            args,
            (TrainingRows(data, STEPS * rows, 0), MaskedLMCollator(words, recipe.mask_rate)),
            (EvaluationRows(data), MaskedLMCollator(words, 0.15)),
            team=team,
            recipe=recipe,
            callbacks=[Clock()],
        )
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVE}" if goes_on else None)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    found: dict[str, Any] = {"losses": {f"{e['step']}": e["loss"] for e in history if not goes_on or e["step"] > SAVE}}
    found["tokens_per_second"] = (STEPS - WARM) * rows * length / (times[1] - times[0])
    if utilised := [e["model_flop_utilisation"] for e in history if "model_flop_utilisation" in e]:
        found["model_flop_utilisation"] = float(np.median(utilised))
    if torch.cuda.is_available():
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if team.first:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    team.leave()


if __name__ == "__main__":
    main()
