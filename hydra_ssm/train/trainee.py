"""A model in training: its optimizer, and steps of one shape, which a GPU replays as a graph without Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoder import undecayed
from ..matrices import Cauchy, StructuredMatrix, Vandermonde
from ..matrices.fusion import fused
from ..mixer import MatrixMixer
from ..text import HydraForMaskedLM
from ..text.collators import IGNORED
from .baseline import Score
from .batches import Batch
from .errors import in_a_line
from .replay import replayed
from .workers import Say

LARGEST = 64.0  # that Vandermonde's features ever are: normal ones stay below 7


@dataclass(frozen=True)
class How:
    """What makes a GPU's run fast. None of it changes what is computed but for rounding.

    In a graph, a Vandermonde mixer's product is NaN once a feature is beyond LARGEST.
    """

    graph: bool = True
    compile: bool = True  # layers and loss


class Means(NamedTuple):
    """Of the hidden tokens of some steps."""

    loss: float
    accuracy: float


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, float32 elsewhere."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)  # a copy would be of another graph's memory


def masked_loss(logits: Tensor, labels: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy of the labelled rows, summed and divided by `count`; how many are right)."""
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / count
    return loss, (logits.detach().argmax(-1) == labels).sum()


def make_optimizer(net: nn.Module, rate: float, decay: float, fused: bool) -> torch.optim.AdamW:
    """Decay on matrices alone: not on biases, norms, and the numbers that Hydra's decays and skips are made of."""
    free = undecayed(net)
    norms = {id(p) for m in net.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        without = name in free or name.endswith("bias") or id(parameter) in norms
        (others if without else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6, fused=fused)


class Trainee:
    """A model, its optimizer, and steps on batches of one shape.

    Args:
        rate, decay: the optimizer's, to begin with.
        clip: largest norm of the gradients; 0 for any.
    """

    def __init__(
        self, net: HydraForMaskedLM, rate: float, decay: float, clip: float, device: torch.device, how: How, say: Say
    ) -> None:
        net.to(device)  # type: ignore[arg-type]
        self.net, self.clip, self.device, self.how, self.say = net, clip, device, how, say
        self.optimizer = make_optimizer(net, rate, decay, fused=device.type == "cuda")
        self.graph = False  # whether it has one
        self.fuse = device.type == "cuda" and bool(self._mixers(Cauchy, Vandermonde))
        self.compiled = how.compile and device.type == "cuda"
        self.found = torch.zeros(3, device=device)  # of a part: loss, right and hidden tokens
        self.total = torch.zeros(3, device=device)  # of the parts since it was read
        self._compute: Callable[[], Any] = self._forward_and_backward
        self._criterion: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = masked_loss
        self._batch: Batch | None = None
        self._sums: list[Tensor] = []

    def warm_up(self, batch: Batch) -> None:
        """Compile and capture, without a change to the weights."""
        self._put(batch)
        self.net.train()
        if self.device.type != "cuda":
            return
        if self.compiled:
            for layer in self.net.model.encoder.layers:
                layer.compile(dynamic=False)
            self._criterion = torch.compile(masked_loss, dynamic=False)
        if self.how.graph:
            self._bound(LARGEST)
        self._choose()
        if self.how.graph:
            self._compute, self.graph = replayed(self._forward_and_backward, self.device, self.say)
            self._bound(None)  # what is not replayed can look
        torch.cuda.synchronize()

    def _choose(self) -> None:
        """What is chosen or compiled once."""
        try:
            self._compute()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.fuse:
                raise
            self.fuse = False
            self.say(f"nothing is fused, cauchy and vandermonde are slower: {in_a_line(error)}")
            self._compute()

    def _bound(self, largest: float | None) -> None:
        """For Vandermonde's features: a graph has the same operations for all values."""
        for mixer in self._mixers(Vandermonde):
            mixer.settings = replace(mixer.settings, largest=largest)

    def _mixers(self, *classes: type[StructuredMatrix]) -> list[MatrixMixer]:
        mixers = [m for m in self.net.modules() if isinstance(m, MatrixMixer)]
        return [mixer for mixer in mixers if issubclass(mixer.matrix_class, classes)]

    def step(self, parts: Sequence[Batch], rate: float, seed: int) -> None:
        """One step of training on all of the parts. Nothing waits for the device."""
        torch.manual_seed(seed)  # of the dropout
        for number, part in enumerate(parts):
            self._put(part)
            self._compute()
            self.total += self.found
            if len(parts) > 1:
                self._add_up(number, len(parts))
        if self.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _add_up(self, number: int, parts: int) -> None:
        """The gradients: each part's are written over the last's."""
        own = [p.grad for p in self.net.parameters() if p.grad is not None]
        if number == 0:
            self._sums = [gradient.clone() for gradient in own]
            return
        torch._foreach_add_(self._sums, own)
        if number == parts - 1:
            torch._foreach_copy_(own, self._sums)

    def means(self, steps: int) -> Means:
        """Of the steps since the last call; waits for the device."""
        loss, right, hidden = self.total.tolist()
        self.total.zero_()
        return Means(loss / max(1, steps), right / max(1.0, hidden))

    def doubt(self) -> str:
        """What else than a divergence may have made a loss of the training NaN."""
        if not self.graph or not self._mixers(Vandermonde):
            return ""
        return f" (or a feature of vandermonde is beyond {LARGEST:g}, which is nan where there is a CUDA graph)"

    @torch.no_grad()
    def score(self, inputs: Tensor, labels: Tensor, batch_tokens: int) -> Score:
        """How well held-out tokens are predicted."""
        self.net.eval()
        loss, right, hidden = 0.0, 0, 0
        with autocast(self.device), self._eager():
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

    def _eager(self) -> AbstractContextManager[Any]:
        """Other shapes than those of the training are not worth a compilation."""
        return torch.compiler.set_stance("force_eager") if self.how.compile else nullcontext()

    def _logits(self, ids: Tensor, places: Tensor) -> Tensor:
        h = self.net.model(input_ids=ids).last_hidden_state
        return self.net.predict(h.flatten(0, 1).index_select(0, places))

    def _forward_and_backward(self) -> None:
        assert self._batch is not None
        labels = self._batch.labels
        self.optimizer.zero_grad(set_to_none=True)
        with fused() if self.fuse else nullcontext():
            with autocast(self.device):
                logits = self._logits(self._batch.input_ids, self._batch.places)
                loss, right = self._criterion(logits, labels, self._batch.count)
            loss.backward()
        self.found = torch.stack([loss.detach().float(), right.float(), (labels != IGNORED).sum().float()])

    def _put(self, batch: Batch) -> None:
        """Into the tensors that a graph reads."""
        if self.device.type == "cpu":
            self._batch = batch
        elif self._batch is None:
            self._batch = Batch(*(t.to(self.device) for t in vars(batch).values()))
        else:
            for ours, new in zip(vars(self._batch).values(), vars(batch).values(), strict=True):
                ours.copy_(new.pin_memory(), non_blocking=True)
