"""What a finished run leaves for its reader: numbers, a picture of the loss, and a model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .._extras import require
from .baseline import Score
from .recipe import Recipe

CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags: [hydra-ssm, masked-lm]
---

# {name}, pretrained on {data}

A bidirectional text encoder that predicts hidden words, trained with `hydra-ssm pretrain`{beginning}.

| on held-out text | loss (nats) | perplexity | masked accuracy |
|---|---|---|---|
| this model | {model.loss:.3f} | {model_perplexity:.1f} | {model.accuracy:.1%} |{before}
| word frequencies alone | {baseline.loss:.3f} | {baseline_perplexity:.1f} | {baseline.accuracy:.1%} |

Both on the same {model.tokens:,} hidden tokens, 0.15 of those in {evaluation_rows:,} of the {held_out_rows:,} held-out
rows, which no training step has seen.

![loss](loss.png)

## Use

```python
import hydra_ssm.text  # registers the model with transformers
from transformers import pipeline

fill = pipeline("fill-mask", "PATH/OF/THIS/FOLDER")
print(fill("{example}"))
```

## Data

{data}: {training_tokens:,} tokens to train on and {held_out_tokens:,} held out, in rows of at most {length} tokens that
hold several documents ({fill:.1%} filled, no padding), {vocabulary:,} different tokens.

## Recipe

{parameters:,} parameters. {steps:,} steps of {batch_size} rows ({passes:.1f} passes over the data), {mask_rate:.0%} of
the tokens hidden (80 % [MASK], 10 % another token, 10 % themselves). AdamW (0.9, 0.98), learning rate
{learning_rate:g} after a warm-up of 6 % and linearly down to 2 % of it, weight decay {weight_decay:.3g} but for biases,
norms, A_log, dt_bias and D, gradients clipped at norm 1. All settings are in `training/recipe.json`, all numbers in
`metrics.json`; the logs for TensorBoard are in `training/tensorboard`.
"""


def write_report(folder: Path, recipe: Recipe, facts: dict[str, Any], history: list[dict[str, float]]) -> None:
    """README.md, loss.png and metrics.json. `facts` has the scores `model` and `baseline`, and what the card names."""
    scores = {name: value._asdict() for name, value in facts.items() if isinstance(value, Score)}
    metrics = {**facts, **scores, "history": history}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    draw_loss(folder / "loss.png", history, facts["baseline"].loss)
    card = CARD.format(**vars(recipe) | facts | _beginning(recipe, facts))
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # a name may be no UTF-8


def _beginning(recipe: Recipe, facts: dict[str, Any]) -> dict[str, str]:
    """What the card says of the model that the run began with, if there was one."""
    if recipe.model is None:
        return {"name": str(recipe.preset), "beginning": "", "before": ""}
    score: Score = facts["start"]
    return {
        "name": recipe.preset or Path(recipe.model).resolve().name,
        "beginning": f" from the weights of {recipe.model}",
        "before": f"\n| {recipe.model}, before | {score.loss:.3f} | {perplexity(score):.1f} | {score.accuracy:.1%} |",
    }


def perplexity(score: Score) -> float:
    """Of its loss."""
    return math.exp(min(score.loss, 700.0))  # JSON has no infinity


def draw_loss(path: Path, history: list[dict[str, float]], baseline: float) -> None:
    """Training and held-out loss by step, and the line to get below."""
    # Without pyplot: no display, no global state.
    figure = require("matplotlib.figure", "train").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(baseline, color="grey", linestyle="--", label="word frequencies alone, held out")
    axes.set(xlabel="step", ylabel="loss of hidden tokens (nats)")
    axes.legend()
    figure.savefig(path, dpi=120)
