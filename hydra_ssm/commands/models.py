"""What a trained model is asked for, and where one comes from."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .._extras import require


def fill_mask(
    model: Annotated[Positional[Path], arg(metavar="DIR")],
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    /,
    *,
    top: int = 5,
) -> None:
    """Show the likeliest words for each [MASK] of a text.

    In use:
        hydra-ssm fill-mask runs/mine "The [MASK] statement."

    Args:
        model: A folder that pretrain or convert wrote.
        text: With one [MASK] or more.
        top: How many words.
    """
    from ..text.inference import TextModel

    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    found = TextModel(model).fill(text, top)
    for number, fillings in enumerate(found, start=1):
        if len(found) > 1:
            print(f"[MASK] {number}")
        width = max(len(filling.word) for filling in fillings)
        for word, probability in fillings:
            print(f"  {word:{width}}  {probability:6.1%}  {'█' * round(30 * probability)}")


def embed(
    model: Annotated[Positional[Path], arg(metavar="DIR")],
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    *,
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: FILE.npy)")] = None,
) -> None:
    """Write a vector for each paragraph of a file, and show which paragraphs are most alike.

    In use:
        hydra-ssm embed runs/mine notes/today.md

    Args:
        model: A folder that pretrain or convert wrote.
        file: Text whose paragraphs blank lines separate; without blank lines, each line is one.
        out: The array (paragraphs, width) of float32, to load with numpy.
    """
    import numpy as np

    from ..text.inference import TextModel, nearest_pairs, paragraphs
    from ..text.reading import read_text
    from ..train.checkpoints import whole_file

    out = out or file.with_name(file.name + ".npy")
    if not out.parent.is_dir():
        raise ValueError(f"the folder of --out must exist, there is no {out.parent}")
    texts = paragraphs(read_text(file))
    vectors = TextModel(model).embed(texts)
    with whole_file(out) as part, part.open("wb") as stream:
        np.save(stream, vectors.numpy())
    print(f"wrote {out}: {len(texts)} texts, {vectors.shape[1]} numbers each")
    for first, second, similarity in nearest_pairs(vectors, 3):
        print(f"\nalike by {similarity:.2f}:\n  {_shortened(texts[first])}\n  {_shortened(texts[second])}")


def inspect(
    model: Annotated[Positional[Path], arg(metavar="DIR")],
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    /,
    *,
    layers: Annotated[tuple[str, ...] | None, arg(metavar="N ...", help_behavior_hint="(default: all)")] = None,
    heads: Annotated[tuple[str, ...] | None, arg(metavar="N ...", help_behavior_hint="(default: all)")] = None,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: DIR/inspect)")] = None,
) -> None:
    """Draw the matrices that a model mixes the tokens of a text with, and check their ranks.

    A mixer computes y = M x along the tokens: row i of M, one matrix for each layer and head, says how much token i
    reads from each token, as attention maps do for a Transformer. matrices.png shows them in a grid; matrices.html is a
    page that works offline in any browser: choose layer and head, point at a weight to see both tokens and its value.
    Red is positive, blue negative. The table beside them tells the ranks of M's blocks below and above the diagonal,
    what the class of matrices promises of them, and whether the class is sequence aligned; docs/theory.md explains
    both.

    In use:
        hydra-ssm inspect runs/mine "The statement is executed when the condition is true."
        hydra-ssm inspect runs/mine "A sentence." --layers 0 2-3 --heads 5 --out pictures

    Args:
        model: A folder that pretrain wrote, or save_pretrained with the model and its tokenizer.
        text: A sentence or a few; up to 512 tokens, fewer where the model has learned positions.
        layers: Numbers from 0 and ranges of them; of many layers the picture shows 12.
        heads: Numbers from 0 and ranges of them; of many heads the picture shows 8.
        out: A folder for matrices.png and matrices.html. Those of an earlier call are replaced, other files never.
    """
    require("matplotlib", "train")
    from ..inspection.report import inspect as look
    from ..inspection.report import numbers

    chosen = {name: numbers(name, given) for name, given in (("layers", layers), ("heads", heads)) if given}
    print(look(model, text, out=out or model / "inspect", **chosen))


def convert(
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")],
    out: Annotated[Positional[Path], arg(metavar="DIR")],
    /,
    *,
    ngroups: int = 1,
    drop: Annotated[tuple[str, ...], arg(metavar="PATTERN", help_behavior_hint="(default: none)")] = (),
    skip_objects: bool = False,
) -> None:
    """Turn a released checkpoint into a folder that transformers loads. No code in the file runs.

    In use:
        hydra-ssm convert hydra_bert_23layers.pt runs/released

    Args:
        checkpoint: A file of torch.save.
        out: A folder that is new or empty.
        ngroups: Groups of B and C, which the file does not tell.
        drop: Keys to leave out, with * and ?.
        skip_objects: Leave out Python objects that were saved beside the tensors, instead of refusing the file.
    """
    from ..text.convert import convert_checkpoint

    convert_checkpoint(checkpoint, out, ngroups=ngroups, drop=drop, skip_objects=skip_objects)
    print(f"wrote {out}; it holds no tokenizer: save that of bert-base-uncased there, then use it as any model")


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 100, placeholder=" ...")
