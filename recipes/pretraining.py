"""Masked language models: the paper's, its baseline, and pairs of other sizes.

Hydra and BERT of a size have the same recipe, tokens and masks, and parameters within 2 % of each other. Text comes as
shards that were cut to rows of 128 tokens, as the paper did; c4/ holds C4's English part, vocab.txt is
bert-base-uncased's:

    hydra-ssm data prepare c4/*.json.gz --tokenizer vocab.txt --length 128 --rows cut --out c4-128

The hours are what docs/performance.md's measured steps of the encoders add up to, with about a fifth for embeddings,
head and optimizer, on one H100 in bfloat16; with several, divide. They have not been run here, but for the tiny ones.
"""

from __future__ import annotations

from typing import Any

from hydra_ssm.train.recipe import Recipe

DECAY = 1e-5  # decoupled: what a step at the highest learning rate takes off the weights. torch multiplies it by that


def _paper(preset: str, sources: tuple[str, ...], given: dict[str, Any], rate: float = 8e-4, **more: Any) -> Recipe:
    """Length 128, batch 4096, 70,000 steps, masks of 0.30 (0.15 in evaluation), and what `Recipe` has for all runs:
    AdamW (0.9, 0.98), epsilon 1e-6, gradients clipped at 1, warm-up over 6 %, then linearly down to 2 %, bfloat16."""
    rate = given.get("learning_rate", rate)
    numbers: dict[str, Any] = {
        "length": 128, "batch_size": 4096, "steps": 70_000, "mask_rate": 0.30, "learning_rate": rate,
        "weight_decay": DECAY / rate, "accumulate": 8,
    }  # fmt: skip
    numbers |= more
    if "tokens" in given:
        del numbers["steps"]
    return Recipe.of(preset, **numbers | {"sources": sources} | given)


def hydra_base(*sources: str, **given: Any) -> Recipe:
    """The paper's Table 4: 23 Hydra layers of width 768, 112M parameters, on 37 billion tokens of C4.

    Expect: masked loss 1.46 and accuracy 69.1 % on C4, GLUE 84.3 (paper). About 30 hours.
    """
    return _paper("hydra-base", sources, given)


def bert_base(*sources: str, **given: Any) -> Recipe:
    """Its baseline with the same recipe: BERT of 12 layers of width 768, 110M parameters.

    Expect: masked loss 1.59 and accuracy 67.3 % on C4, GLUE 83.5 (paper). About 20 hours.
    """
    return _paper("bert-base", sources, given)


def hydra_large(*sources: str, **given: Any) -> Recipe:
    """45 Hydra layers of width 1024, 334M parameters. Not in the paper: nothing is known to expect. About 90 hours.

    BERT's large size sets width and sum; 45 layers come nearest to its 335M. Half of the base's learning rate, as
    larger post-norm encoders need it lower.
    """
    return _paper("hydra-large", sources, given, 4e-4, accumulate=32)


def bert_large(*sources: str, **given: Any) -> Recipe:
    """24 layers of width 1024, 335M parameters: what hydra_large is to be compared with. About 60 hours."""
    return _paper("bert-large", sources, given, 4e-4, accumulate=32)


def hydra_medium(*sources: str, **given: Any) -> Recipe:
    """13 Hydra layers of width 512, 38.7M parameters, on 2.6 billion tokens. About an hour; nothing is known to expect.

    A quarter of the paper's batch, so that a short training has enough steps.
    """
    return _paper("hydra-medium", sources, given, 1e-3, batch_size=1024, steps=20_000, accumulate=1)


def bert_medium(*sources: str, **given: Any) -> Recipe:
    """7 layers of width 512, 38.3M parameters: what hydra_medium is to be compared with. Less than an hour."""
    return _paper("bert-medium", sources, given, 1e-3, batch_size=1024, steps=20_000, accumulate=1)


def hydra_small(*sources: str, **given: Any) -> Recipe:
    """11 Hydra layers of width 384, 23.0M parameters, on 1.3 billion tokens. About half an hour."""
    return _paper("hydra-small", sources, given, 1e-3, batch_size=512, steps=20_000, accumulate=1)


def bert_small(*sources: str, **given: Any) -> Recipe:
    """6 layers of width 384, 22.7M parameters: what hydra_small is to be compared with."""
    return _paper("bert-small", sources, given, 1e-3, batch_size=512, steps=20_000, accumulate=1)


def hydra_tiny(*sources: str, **given: Any) -> Recipe:
    """The paper's recipe with numbers for two CPU cores, on the text that Python carries. Three minutes.

    Expect: held-out loss well below that of word frequencies alone.
    """
    return Recipe.of("hydra-tiny", **{"sources": sources, **given})


def bert_tiny(*sources: str, **given: Any) -> Recipe:
    """The same of BERT, of one size with hydra_tiny."""
    return Recipe.of("bert-tiny", **{"sources": sources, **given})
