"""What a finished image run leaves for its reader: weights, numbers, a picture of its course, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._extras import require
from .evaluation import told
from .result import AVERAGED, RAW, save
from .sources import Digits

if TYPE_CHECKING:
    from .run import Run

INSTEAD = "replaced by others in training, left out of evaluations"  # of pictures that could not be read
EXAMPLES = 20  # held-out digits that are saved to be looked at
CARD = """\
---
library_name: timm
pipeline_tag: image-classification
tags: [hydra-ssm, image-classification]
---

# {model}, trained on {data}

| on {held_out_pictures:,} held-out pictures | top-1 | top-5 |
|---|---|---|
| averaged weights (`model.safetensors`) | {averaged_top1:.2%} | {averaged_top5:.2%} |
| weights of the last step (`raw.safetensors`) | {raw_top1:.2%} | {raw_top5:.2%} |
| {baseline_name} | {baseline:.2%} | |

![course](course.png)

## Use

```python
import hydra_ssm.vision  # registers the models
import timm

model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True)
```

`hydra-ssm image predict FOLDER PICTURES` names pictures, `hydra-ssm image eval FOLDER --data DATA` measures.

## Recipe

{parameters:,} parameters, {classes:,} classes, {train_pictures:,} pictures to train on, {epochs} epochs of
{steps_an_epoch:,} steps of {batch_size}. AdamW, learning rate {learning_rate:g} after a warm-up and down by a cosine,
weight decay {weight_decay:g}, drop-path {drop_path:g}, RandAugment {randaugment}, mixup {mixup:g}, cutmix {cutmix:g},
random erasing {erase:g}, label smoothing {smoothing:g}, averaged weights of decay {ema_decay:g}. All settings are in
`training/recipe.json`, all numbers in `metrics.json`, the logs for TensorBoard in `training/tensorboard`.

## Pictures

{pictures}
"""


def finish(run: Run, baseline: tuple[str, float]) -> dict[str, Any]:
    """Write the result of a run that has come to its end, all or nothing, and return its metrics."""
    last = run.curve[-1]
    metrics = {
        "model": run.recipe.model, "parameters": sum(p.numel() for p in run.model.parameters()),
        "classes": len(run.classes), "train_pictures": len(run.train_part), "held_out_pictures": len(run.held_out),
        "averaged": {name: last[f"{name}_averaged"] for name in ("top1", "top5", "loss")},
        "raw": {name: last[f"{name}_raw"] for name in ("top1", "top5", "loss")},
        "baseline": {"name": baseline[0], "top1": baseline[1]},
        "pictures": told(run.notes, INSTEAD), "notes": run.notes, "course": run.curve,
    }  # fmt: skip
    with run.folder.finish() as part:
        weights = {AVERAGED: run.ema.module.state_dict(), RAW: run.model.state_dict()}
        save(part, run.recipe, run.config, run.classes, weights)
        (part / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        draw_course(part / "course.png", run.curve, baseline)
        (part / "README.md").write_text(_card(run, metrics), encoding="utf-8")
        if isinstance(run.held_out.source, Digits):
            _write_examples(run, part / "examples")
    return metrics


def _card(run: Run, metrics: dict[str, Any]) -> str:
    recipe = vars(run.recipe)
    facts = {
        **recipe, "data": Path(recipe["data"]).name if recipe["data"] else "scikit-learn's digits",
        "randaugment": recipe["randaugment"] or "none",
        "averaged_top1": metrics["averaged"]["top1"], "averaged_top5": metrics["averaged"]["top5"],
        "raw_top1": metrics["raw"]["top1"], "raw_top5": metrics["raw"]["top5"], "baseline": metrics["baseline"]["top1"],
        "baseline_name": metrics["baseline"]["name"], "steps_an_epoch": run.order.steps,
        "pictures": "\n".join(metrics["pictures"]) or "All were eight-bit RGB and whole.",
        **{name: metrics[name] for name in ("parameters", "classes", "train_pictures", "held_out_pictures")},
    }  # fmt: skip
    return CARD.format(**facts)


def draw_course(path: Path, curve: list[dict[str, float]], baseline: tuple[str, float]) -> None:
    """Top-1 by epoch of both kinds of weights, and the line to get above."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [entry["epoch"] for entry in curve]
    for name, style in (("averaged", "o-"), ("raw", ":")):
        axes.plot(epochs, [100 * entry[f"top1_{name}"] for entry in curve], style, label=f"{name} weights")
    axes.axhline(100 * baseline[1], color="grey", linestyle="--", label=baseline[0])
    axes.set(xlabel="epoch", ylabel="held-out top-1, %")
    axes.legend()
    figure.savefig(path, dpi=120)


def _write_examples(run: Run, folder: Path) -> None:
    folder.mkdir()
    source = run.held_out.source
    for i in run.held_out.index[:EXAMPLES]:
        (folder / f"{i:04}-is-{source.labels[i]}.png").write_bytes(source.read(i))
