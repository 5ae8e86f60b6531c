"""What an image run is made of: every setting, written into the run's folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from ..errors import UserError

MODEL = "vit_hydra_base_patch16_224"  # the paper's
PRECISIONS = ("auto", "bf16", "fp32")
DIGITS: dict[str, Any] = {  # about a minute on 2 cores
    "model": "vit_hydra_tiny_patch16_224",
    "model_args": {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "headdim": 16, "d_state": 16},
    "img_size": 8, "epochs": 12, "batch_size": 64, "learning_rate": 3e-3, "warm_up_epochs": 3, "drop_path": 0.1,
    "randaugment": "", "mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "hflip": 0.0, "scale": (0.7, 1.0),
    "ema_decay": 0.99,
}  # fmt: skip


@dataclass(frozen=True)
class ImageRecipe:
    """Settings of a run. The defaults are the paper's for its Table 5; where no data is given `of` takes the digits'.

    Args:
        data: a folder, a .tar, or the name of a data set; None for scikit-learn's digits.
        model: a name that timm knows; `model_args`: what its function is given besides.
        img_size: of the pictures, None for the model's own.
        batch_size: pictures in a step, of all processes together; each computes its share in `accumulate` parts.
        warm_up_epochs: of 300; at most a tenth of the epochs.
        randaugment: timm's name of it, "" for none.
        mixup, cutmix: alpha of either, 0 for none.
        erase: probability of losing a rectangle.
        hflip: probability of being mirrored.
        scale: least and largest share of the area that is cut out.
        ema_decay: of the averaged weights, reached after a warm-up of its own.
        precision: of the model's products, in training and its evaluations: bf16, fp32, or auto, which is bf16 on a GPU
            that has it.
        workers: processes that read pictures; -1: one a core that this process has, 0 where that is one.
        save_every: steps between checkpoints, 0: one an epoch.

    Raises:
        UserError: a setting out of its range.
    """

    data: str | None = None
    model: str = MODEL
    model_args: dict[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    epochs: int = 300
    batch_size: int = 1024
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up_epochs: int = 5
    drop_path: float = 0.5
    randaugment: str = "rand-m9-mstd0.5-inc1"
    mixup: float = 0.8
    cutmix: float = 1.0
    erase: float = 0.25
    smoothing: float = 0.1
    hflip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ema_decay: float = 0.9999
    precision: str = "auto"
    workers: int = -1
    save_every: int = 0
    seed: int = 0

    @classmethod
    def of(cls, **given: Any) -> Self:
        """What is given, with the digits' numbers where there is no data, and the paper's otherwise."""
        usual = DIGITS if given.get("data") is None else {}
        if given.get("model", usual.get("model")) != usual.get("model"):
            usual = {**usual, **_size_of_digits(given["model"])} if usual else {}
        return cls(**{**usual, **given})

    def __post_init__(self) -> None:
        least = {"workers": -1, "save_every": 0, "seed": 0, "warm_up_epochs": 0}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and not least.get(f.name, 1) <= value < 1 << 32:
                raise UserError(f"{f.name} must be at least {least.get(f.name, 1)} and below 2^32, got {value}")
            if f.type == "float" and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{f.name} must be a finite number and not negative, got {value}")
        for name in ("drop_path", "erase", "smoothing", "hflip", "ema_decay"):
            if getattr(self, name) > 1:
                raise UserError(f"{name} must be at most 1, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision}")
        if self.smoothing == 1:
            raise UserError("smoothing must be below 1, at which no label is left, got 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale must be two rising numbers above 0 and up to 1, got {self.scale}")
        if self.batch_size % self.accumulate:
            raise UserError(f"accumulate must divide batch_size = {self.batch_size}, got {self.accumulate}")
        if self.mixes and self.batch_size // self.accumulate % 2:
            raise UserError(
                f"the parts of a step must be even for mixup and cutmix, got {self.batch_size // self.accumulate}"
            )

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def warm_up(self) -> int:
        """Epochs."""
        return min(self.warm_up_epochs, max(1, self.epochs // 10)) if self.epochs > 1 else 0

    def to_json(self) -> str:
        """All settings."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            found: dict[str, Any] = json.loads(text)
            return cls(**found | {"scale": tuple(found["scale"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the settings of an image run: {error}") from None


def _size_of_digits(model: str) -> dict[str, Any]:
    """As they are, in patches of 2 x 2, to a model that takes such; else scaled to what most others get along with."""
    import timm
    import torch

    from ... import vision  # noqa: F401  registers its models

    own: dict[str, Any] = {"img_size": 8, "patch_size": 2}
    try:
        with torch.device("meta"):
            timm.create_model(model, **own)
    except Exception:  # of whatever class: what is wrong with the model itself is told when it is made
        return {"img_size": 32, "model_args": {}}
    return {"model_args": own}
