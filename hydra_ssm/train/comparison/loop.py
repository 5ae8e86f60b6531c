"""The training loop of the comparison: one fixed shape a run, so that a GPU replays a graph and waits for no Python."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...bench.clock import captured
from ...mixer import MatrixMixer
from ...text import HydraForMaskedLM
from ...text.collators import IGNORED
from ..baseline import Score
from ..checkpoints import newest_whole, remove_old, remove_unfinished, whole_folder
from ..trainer import LAST, WARM_UP
from ..workers import Say, Until
from .data import Batch, Batches, Data
from .plan import DECAY, TEXTS, Plan, Run

STATE = "state.pt"
CLIP = 1.0
FEW = 4  # evaluations
Evaluations = dict[str, tuple[Tensor, Tensor]]  # (inputs, labels) of each held-out text


@dataclass(frozen=True)
class How:
    """What makes a GPU's run fast. None of it changes what is computed but for rounding."""

    graph: bool = True
    compile: bool = True


class NotFinite(Exception):
    """The training has diverged."""


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its peak: up over 6 % of the steps, then linearly down to 2 %."""
    up = math.ceil(WARM_UP * steps)
    if step < up:
        return (step + 1) / up
    return 1 - (1 - LAST) * (step + 1 - up) / max(1, steps - up)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, float32 on a CPU."""
    if device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # a copy would be of another graph's memory


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled rows."""
    count = (labels != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / count


def make_optimizer(net: nn.Module, rate: float, fused: bool) -> torch.optim.AdamW:
    """Decay on matrices alone: not on biases, norms, and the numbers that Hydra's decays and skips are made of."""
    mixers = [(path, m) for path, m in net.named_modules() if isinstance(m, MatrixMixer)]
    free = {f"{path}.{name}" for path, mixer in mixers for name in mixer.no_weight_decay()}
    norms = {id(p) for m in net.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        without = name in free or name.endswith("bias") or id(parameter) in norms
        (others if without else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": DECAY / rate}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)


class Trainee:
    """A model, its optimizer, and a step forward and backward on batches of one shape."""

    def __init__(self, net: HydraForMaskedLM, rate: float, device: torch.device, how: How, say: Say) -> None:
        net.to(device)  # type: ignore[arg-type]
        self.net, self.device, self.how, self.say = net, device, how, say
        self.optimizer = make_optimizer(net, rate, fused=device.type == "cuda")
        self.loss = torch.zeros((), device=device)
        self.total = torch.zeros((), device=device)  # of the losses since it was read
        self._compute: Callable[[], Any] = self._forward_and_backward
        self._criterion: Callable[[Tensor, Tensor], Tensor] = masked_loss
        self._batch: Batch | None = None

    def warm_up(self, batch: Batch) -> None:
        """Compile and capture, without a change to the weights."""
        self._put(batch)
        self.net.train()
        if self.device.type != "cuda":
            return
        if self.how.compile:
            for layer in self.net.model.encoder.layers:
                layer.compile(dynamic=False)
            self._criterion = torch.compile(masked_loss, dynamic=False)
        self._compute()  # what is chosen or compiled once
        if self.how.graph:
            self._compute = captured(self._forward_and_backward, self.device)
        torch.cuda.synchronize()

    def step(self, batch: Batch, rate: float, seed: int) -> None:
        """One step of training. Nothing waits for the device."""
        torch.manual_seed(seed)  # of the dropout
        self._put(batch)
        self._compute()
        self.total += self.loss
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def mean_loss(self, steps: int) -> float:
        """Of the steps since the last call; waits for the device."""
        mean = float(self.total) / max(1, steps)
        self.total.zero_()
        return mean

    @torch.no_grad()
    def score(self, inputs: Tensor, labels: Tensor, batch_tokens: int) -> Score:
        """How well held-out tokens are predicted."""
        self.net.eval()
        loss, right, hidden = 0.0, 0, 0
        with autocast(self.device), _eager():
            for part in range(0, len(inputs), rows := max(1, batch_tokens // inputs.shape[1])):
                ids, wanted = (t[part : part + rows].to(self.device) for t in (inputs, labels))
                places = (wanted.flatten() != IGNORED).nonzero()[:, 0]
                wanted = wanted.flatten()[places]
                logits = self._logits(ids, places).float()
                loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
                right += int((logits.argmax(-1) == wanted).sum())
                hidden += len(wanted)
        self.net.train()
        return Score(loss / hidden, right / hidden, hidden)

    def _logits(self, ids: Tensor, places: Tensor) -> Tensor:
        h = self.net.model(input_ids=ids).last_hidden_state
        return self.net.predict(h.flatten(0, 1).index_select(0, places))

    def _forward_and_backward(self) -> None:
        assert self._batch is not None
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            logits = self._logits(self._batch.input_ids, self._batch.places)
            loss = self._criterion(logits, self._batch.labels)
        loss.backward()
        self.loss = loss.detach()

    def _put(self, batch: Batch) -> None:
        """Into the tensors that a graph reads."""
        if self.device.type == "cpu":
            self._batch = batch
        elif self._batch is None:
            self._batch = Batch(*(t.to(self.device) for t in vars(batch).values()))
        else:
            for ours, new in zip(vars(self._batch).values(), vars(batch).values(), strict=True):
                ours.copy_(new.pin_memory(), non_blocking=True)


def _eager() -> AbstractContextManager[Any]:
    """Other shapes than those of the training are not worth a compilation."""
    return torch.compiler.set_stance("force_eager")


class Clock:
    """Seconds of training alone: not of evaluations, checkpoints or compilation."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds, self._since = device, seconds, time.perf_counter()

    def start(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Training:
    """A run from its newest checkpoint, or its start, to its end."""

    def __init__(
        self, run: Run, plan: Plan, data: Data, net: HydraForMaskedLM, folder: Path, how: How, say: Say
    ) -> None:
        self.run, self.plan, self.folder, self.say = run, plan, folder, say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batches = Batches(data, run.length, plan.batch_tokens, plan.mask_rate, run.seed)
        self.texts: Evaluations = {t: data.evaluation(t, run.length, plan.evaluation_tokens) for t in TEXTS}
        self.trainee = Trainee(net, run.rate, self.device, how, say)
        self.done, self.seconds, self.warm_up = 0, 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        self.training: list[list[float]] = []  # step, loss

    def fit(self, until: Until) -> bool:
        """Whether it has come to its end. Raises NotFinite."""
        self._restore()
        run, began = self.run, time.perf_counter()
        if not self.curve:
            self._evaluate()  # before the first step
        self.trainee.warm_up(self.batches[self.done])
        self.warm_up += time.perf_counter() - began
        marks = self._marks()
        clock, saved, logged = Clock(self.device, self.seconds), time.monotonic(), self.done
        clock.start()
        while self.done < run.steps:
            rate = run.rate * schedule(self.done, run.steps)
            self.trainee.step(self.batches[self.done], rate, (run.seed << 32) + self.done)
            self.done += 1
            evaluate, log = self.done in marks, self.done % max(1, run.steps // 100) == 0
            over = until.over()
            save = over or time.monotonic() - saved > self.plan.save_after
            if not (evaluate or save or log or self.done == run.steps):
                continue
            clock.stop()
            self.seconds = clock.seconds
            self._log(self.done - logged)
            logged = self.done
            if evaluate or self.done == run.steps:
                self._evaluate()
            if save and self.done < run.steps:
                self._save()
                saved = time.monotonic()
                if over:
                    return False
            clock.start()
        return True

    def _marks(self) -> set[int]:
        """The steps after which it is evaluated; where only the end counts, a few."""
        whole = self.run.stage in ("tokens", "seconds")
        count = self.plan.evaluations if whole else min(FEW, self.plan.evaluations)
        return {round(self.run.steps * i / count) for i in range(1, count + 1)}

    def _log(self, steps: int) -> None:
        loss = self.trainee.mean_loss(steps)
        if not math.isfinite(loss):
            raise NotFinite(f"by step {self.done}, its loss is {loss}")
        self.training.append([self.done, round(loss, 5)])

    def _evaluate(self) -> None:
        point: dict[str, float] = {
            "step": self.done,
            "tokens": self.done * self.plan.batch_tokens,
            "seconds": self.seconds,
        }
        for name, (inputs, labels) in self.texts.items():
            score = self.trainee.score(inputs, labels, self.plan.batch_tokens)
            if not math.isfinite(score.loss):
                raise NotFinite(f"by step {self.done}, its held-out loss is {score.loss}")
            point |= {f"{name}_loss": score.loss, f"{name}_accuracy": score.accuracy}
        self.curve.append(point)
        speed = f"{point['tokens'] / self.seconds:,.0f} tokens/s" if self.seconds else "untrained"
        losses = ", ".join(f"{name} {point[f'{name}_loss']:.3f}" for name in self.texts)
        self.say(f"{self.run.name}: step {self.done:,} of {self.run.steps:,}, held-out loss {losses}; {speed}")

    def _save(self) -> None:
        names = ("done", "seconds", "warm_up", "curve", "training")
        state = {"net": self.trainee.net.state_dict(), "optimizer": self.trainee.optimizer.state_dict()}
        with whole_folder(self.folder / f"checkpoint-{self.done}") as part:
            torch.save(state | {name: getattr(self, name) for name in names}, part / STATE)
        remove_old(self.folder)

    def _restore(self) -> None:
        remove_unfinished(self.folder)
        checkpoint = newest_whole(self.folder)
        if checkpoint is None:
            return
        state = torch.load(checkpoint / STATE, map_location=self.device, weights_only=True)
        self.trainee.net.load_state_dict(state.pop("net"))
        self.trainee.optimizer.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)
