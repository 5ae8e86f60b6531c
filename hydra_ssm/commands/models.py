"""What a trained model is asked for, and where one comes from."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

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
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, arg(help_behavior_hint="(default: as saved)")
    ] = None,
) -> None:
    """Write a vector for each paragraph of a file, and show which paragraphs are most alike.

    Paragraphs of any lengths go through the model back to back, without padding; docs/serving.md has the speed.

    In use:
        hydra-ssm embed runs/mine notes/today.md

    Args:
        model: A folder that pretrain or convert wrote.
        file: Text whose paragraphs blank lines separate; without blank lines, each line is one.
        out: The array (paragraphs, width) of float32, to load with numpy.
        dtype: What the model computes in; means are float32.
    """
    import numpy as np
    import torch

    from ..text.inference import TextModel, nearest_pairs, paragraphs
    from ..text.reading import read_text
    from ..train.checkpoints import whole_file

    out = out or file.with_name(file.name + ".npy")
    if not out.parent.is_dir():
        raise ValueError(f"the folder of --out must exist, there is no {out.parent}")
    texts = paragraphs(read_text(file))
    vectors = TextModel(model, dtype and getattr(torch, dtype)).embed(texts)
    with whole_file(out) as part, part.open("wb") as stream:
        np.save(stream, vectors.numpy())
    print(f"wrote {out}: {len(texts)} texts, {vectors.shape[1]} numbers each")
    for first, second, similarity in nearest_pairs(vectors, 3):
        print(f"\nalike by {similarity:.2f}:\n  {_shortened(texts[first])}\n  {_shortened(texts[second])}")


def export(
    model: Annotated[Positional[Path], arg(metavar="DIR")],
    /,
    *,
    format: Literal["onnx", "torch", "int8"] = "onnx",
    embed: bool = False,
    out: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: in DIR)")] = None,
) -> None:
    """Write a model in another form: a file that runs without this library, or a smaller folder.

    A file, onnx or torch, takes input_ids, attention_mask and token_type_ids, int64 of any batch and length, and gives
    what the model was trained for: logits of words, classes or tags. The tokenizer in DIR makes its inputs. What was
    written is read again and compared with the model. docs/serving.md shows how it is used.

    In use:
        hydra-ssm export runs/mine
        hydra-ssm export runs/mine --format torch --out mine.pt2
        hydra-ssm export runs/mine --format int8 --out runs/mine-int8

    Args:
        model: A folder that pretrain, finetune or convert wrote.
        format: onnx, for onnxruntime and others; torch, for torch.export.load; int8, a folder whose linear layers are
            kept as 8-bit numbers, for from_pretrained and this command's others, where torchao is installed.
        embed: Export the encoder alone: last_hidden_state, and sentence_embedding, the mean of each text's tokens.
        out: The file or new folder: model.onnx, model.pt2 or int8 in DIR.
    """
    from .. import text
    from ..text import export as to
    from ..text.inference import saved_kind

    kind = "HydraModel" if embed else saved_kind(model)
    if kind not in to.OUTPUTS:
        raise ValueError(f"what is exported must be one of {', '.join(to.OUTPUTS)}, got {kind}: try --embed")
    out = out or model / {"onnx": "model.onnx", "torch": "model.pt2", "int8": "int8"}[format]
    if not out.parent.is_dir():
        raise ValueError(f"the folder of --out must exist, there is no {out.parent}")
    if format == "int8":
        _export_folder(model, getattr(text, kind), out)
    else:
        _export_file(model, getattr(text, kind), out, format)


def _export_file(model: Path, kind: Any, out: Path, format: str) -> None:
    import torch

    from ..text import export as to
    from ..text.inference import load
    from ..train.checkpoints import whole_file

    source, _, lacks_head = load(model, kind, dtype=torch.float32)
    if lacks_head:
        raise ValueError(f"{model} must hold all of a {kind.__name__}, it lacks weights of its head: try --embed")
    write, read = (to.write_onnx, to.read_onnx) if format == "onnx" else (to.write_torch, to.read_torch)
    with whole_file(out) as part:
        write(source, part)
        error = to.difference(source, read(part))
        if not error < 1e-3:
            raise RuntimeError(f"the exported file must compute what the model does, it differs by {error:.1e}")
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB, gives {', '.join(to.OUTPUTS[kind.__name__])}")
    print(f"checked at batches and lengths that the exporter had not seen: it differs from the model by {error:.1e}")


def _export_folder(model: Path, kind: Any, out: Path) -> None:
    import torch

    from ..text import export as to
    from ..text.inference import load
    from ..train.checkpoints import whole_folder

    if out.exists():
        raise ValueError(f"--out must be new, {out} exists")
    with whole_folder(out) as part:
        to.write_int8(model, kind, part)
    exact, less = load(model, kind, dtype=torch.float32)[0], load(out, kind)[0]
    error = to.difference(exact, to.Program(less))
    before, after = ((folder / "model.safetensors").stat().st_size / 1e6 for folder in (model, out))
    print(f"wrote {out}: weights of {after:.1f} MB, before {before:.1f} MB; outputs move by up to {error:.1e}")


def inspect(
    model: Annotated[Positional[Path], arg(metavar="DIR")],
    text: Annotated[Positional[str], arg(metavar="TEXT|PICTURE")],
    /,
    *,
    layers: Annotated[tuple[str, ...] | None, arg(metavar="N ...", help_behavior_hint="(default: all)")] = None,
    heads: Annotated[tuple[str, ...] | None, arg(metavar="N ...", help_behavior_hint="(default: all)")] = None,
    patches: Annotated[tuple[str, ...] | None, arg(metavar="R,C ...", help_behavior_hint="(default: three)")] = None,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: DIR/inspect)")] = None,
) -> None:
    """Draw the matrices that a model mixes the tokens of a text, or patches of a picture, with, and check their ranks.

    A mixer computes y = M x along the tokens: row i of M, one matrix for each layer and head, says how much token i
    reads from each token, as attention maps do for a Transformer. matrices.png shows them in a grid; matrices.html is a
    page that works offline in any browser: choose layer and head, point at a weight to see both tokens and its value.
    Red is positive, blue negative. The table beside them tells the ranks of M's blocks below and above the diagonal,
    what the class of matrices promises of them, and whether the class is sequence aligned; docs/theory.md explains
    both. With an image model maps.png shows, over the picture: the features of each layer, how much each patch is read,
    and what single patches read.

    In use:
        hydra-ssm inspect runs/mine "The statement is executed when the condition is true."
        hydra-ssm inspect runs/mine "A sentence." --layers 0 2-3 --heads 5 --out pictures
        hydra-ssm inspect runs/flowers rose.jpg --patches 3,4 10,2

    Args:
        model: A folder that pretrain or image train wrote, or save_pretrained with the model and its tokenizer.
        text: A sentence or a few, up to 512 tokens, fewer where the model has learned positions; or a picture's file.
        layers: Numbers from 0 and ranges of them; of many layers the picture shows 12.
        heads: Numbers from 0 and ranges of them; of many heads the picture shows 8.
        patches: Rows and columns, from 0, of patches whose reading maps.png shows.
        out: A folder for matrices.png, .html and maps.png. Those of an earlier call are replaced, other files never.
    """
    require("matplotlib", "train")
    from ..inspection.images import holds_image_model, inspect_picture, places
    from ..inspection.report import inspect as look
    from ..inspection.report import numbers

    chosen = {name: numbers(name, given) for name, given in (("layers", layers), ("heads", heads)) if given}
    out = out or model / "inspect"
    if holds_image_model(model):
        require("timm", "vision")
        print(inspect_picture(model, Path(text), out=out, patches=places(patches) if patches else None, **chosen))
        return
    if patches:
        raise ValueError(f"--patches are of pictures, and {model} holds no image model")
    print(look(model, text, out=out, **chosen))


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
    words = " ".join(text.split())
    short = textwrap.shorten(words, 100, placeholder=" ...")
    return short if short != "..." or words == short else f"{words[:96]} ..."  # one word alone, as a sequence of DNA is
