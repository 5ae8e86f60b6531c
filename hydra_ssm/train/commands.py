"""The commands of hydra-ssm and their options: as tyro reads them. Each imports what it needs when it runs."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from .._extras import require


def _by_preset(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: by preset)")


def _by_columns(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: by the columns)")


def _by_task(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: the paper's, by task)")


def _by_size(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: by size)")


@dataclass(frozen=True)
class Settings:
    """Settings of a run; those that are not given follow the preset."""

    held_out: Annotated[tuple[str, ...] | None, arg(metavar="SOURCE ...", help_behavior_hint="(default: a part)")] = (
        None
    )
    """Files, folders or data sets to evaluate on."""
    column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: text)")] = None
    """The column of a data set that holds its texts."""
    tokenizer: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="(default: train one)")] = None
    """A folder with a tokenizer, or a vocab.txt."""
    vocab_size: Annotated[int | None, _by_preset("N")] = None
    """Most tokens of a trained tokenizer."""
    length: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 128)")] = None
    """Tokens of a row; longer documents are cut."""
    batch_size: Annotated[int | None, _by_preset("N")] = None
    """Rows in a step."""
    accumulate: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Parts that a step is computed in, to save memory."""
    steps: Annotated[int | None, _by_preset("N")] = None
    """Steps of training."""
    learning_rate: Annotated[float | None, _by_preset("X")] = None
    """The highest, reached after a warm-up of 6 %."""
    weight_decay: Annotated[float | None, _by_preset("X")] = None
    """As in torch's AdamW: times the learning rate."""
    mask_rate: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 0.3)")] = None
    """Share of the tokens that are hidden in training; evaluation hides 0.15."""
    save_every: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a tenth)")] = None
    """Steps between checkpoints."""
    evaluate_every: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a fifth)")] = None
    """Steps between evaluations."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Of the weights, the order of the rows and the masks."""


def pretrain(
    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="[SOURCE ...]", help_behavior_hint="")] = (),
    /,
    *,
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: hydra-tiny)")] = None,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/PRESET)")] = None,
    resume: bool = False,
    overwrite: bool = False,
    settings: Annotated[Settings, arg(name="")] = Settings(),
) -> None:
    """Train a masked language model on text.

    In use:
        hydra-ssm pretrain
        hydra-ssm pretrain notes/ book.txt --out runs/mine
        hydra-ssm pretrain Salesforce/wikitext:wikitext-2-raw-v1 --preset hydra-tiny --steps 2000
        hydra-ssm pretrain shards/ --preset hydra-base
        hydra-ssm pretrain --out runs/mine --resume

    Args:
        sources: Text files, folders of them, files of a data set (.jsonl, .parquet, .csv), the name of one on the
            Hugging Face Hub (NAME or NAME:CONFIGURATION), or a folder that data prepare wrote, which has a tokenizer,
            a length and held-out rows of its own. None: the language reference that Python carries.
        preset: A size of model: hydra-tiny, bert-tiny, hydra-base, bert-base, ...
        out: The folder of the run: model, tokenizer, model card, and what is needed to resume.
        resume: Go on with the run in --out from its newest checkpoint; its settings are known.
        overwrite: Start again where there is a run.
    """
    for package in ("accelerate", "matplotlib", "rich", "tensorboard"):  # missing at the start of a run, not at its end
        require(package, extra="train")
    from .data.shards import settings_of
    from .errors import UserError
    from .pretrain import Recipe, example
    from .pretrain import pretrain as start
    from .pretrain import resume as go_on

    given = {name: value for name, value in asdict(settings).items() if value is not None}
    given |= {"sources": sources} if sources else {}
    out = out or Path("runs") / (preset or "hydra-tiny")
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite removes it: give one of them")
    if resume:
        recipe, score = go_on(out, {**given, **({"preset": preset} if preset else {})})
    else:
        recipe = Recipe.of(preset or "hydra-tiny", **settings_of(sources) | given)
        score = start(recipe, out, overwrite=overwrite)
    if score is None:
        print(f"the run in {out} has ended already")
    else:
        print(
            f"saved {out}: held-out loss {score.loss:.3f}, masked accuracy {score.accuracy:.1%}; more in its README.md"
        )
    place = shlex.quote(str(out))
    print(f"next: hydra-ssm fill-mask {place} {shlex.quote(example(recipe))}\n      hydra-ssm embed {place} FILE")


def data_prepare(
    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE [SOURCE ...]", help_behavior_hint="")],
    /,
    *,
    out: Annotated[Path, arg(metavar="DIR")],
    tokenizer: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="(default: train one)")] = None,
    vocab_size: int = 30522,
    length: int = 512,
    rows: Literal["packed", "cut"] = "packed",
    documents: Literal["file", "paragraph", "line"] = "file",
    column: str = "text",
    held_out: float = 0.01,
    shard_tokens: int = 1 << 24,
    jobs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: one a core)")] = None,
    overwrite: bool = False,
) -> None:
    """Turn text of any size into shards of tokens that pretrain reads, once and for all.

    Sources are read as streams, so that memory does not grow with them; a killed command goes on when it is given
    again, and its result is the same, byte for byte. What cannot be read (damaged or truncated files, records without
    text, bytes that are no UTF-8) and what should not (empty documents, documents that occurred before) is counted,
    shown, and listed in DIR/manifest.json, beside the hash of every shard.

    In use:
        hydra-ssm data prepare books/ --out shards --documents paragraph
        hydra-ssm data prepare c4/*.json.gz --tokenizer vocab.txt --length 128 --out c4-128
        hydra-ssm data prepare allenai/c4:en --tokenizer vocab.txt --jobs 16 --out c4
        hydra-ssm pretrain shards --preset hydra-base

    Args:
        sources: Files (.txt, .md, .rst, .jsonl, .json, .csv, also with .gz or .zst behind; .parquet), folders of them,
            a folder of the datasets library, or the name of a data set on the Hugging Face Hub (NAME or
            NAME:CONFIGURATION), whose split train is streamed.
        out: A new folder for the shards, or one to go on with.
        tokenizer: A folder with a tokenizer, or a vocab.txt. One is trained on the first 50 million characters
            otherwise.
        vocab_size: Most tokens of a trained tokenizer.
        length: Most tokens of a row.
        rows: packed: documents fill rows together, without padding, longer ones in pieces. cut: each document is a
            row and ends where the row does, as in the paper; what is cut off is counted.
        documents: What a document is in plain text: a file, a paragraph (blank lines separate them), or a line.
        column: The field or column that holds the text of a record.
        held_out: Share of the documents to evaluate on, chosen by their text.
        shard_tokens: A shard is closed when it holds so many, or some more.
        jobs: Processes that turn text into tokens.
        overwrite: Begin again where there are shards of other settings.
    """
    for package in ("datasets", "pyarrow", "rich"):
        require(package, extra="train")
    from .data.prepare import Settings as Preparation
    from .data.report import prepare_and_show

    settings = Preparation(sources, tokenizer, vocab_size, length, rows, documents, column, held_out, shard_tokens)
    prepare_and_show(settings, out, jobs=jobs, overwrite=overwrite)
    print(f"next: hydra-ssm pretrain {shlex.quote(str(out))}")


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
    from .checkpoints import whole_file

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


def bench(
    *,
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: a GPU, else cpu)")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        arg(metavar="NAME", help_behavior_hint="(default: bfloat16, on a CPU float32)"),
    ] = None,
    d_model: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 768, on a CPU 256)")] = None,
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 32768, on a CPU 2048)")] = None,
    lengths: Annotated[
        tuple[int, ...] | None,
        arg(metavar="N ...", help_behavior_hint="(default: 128 to 131072, on a CPU to 2048)"),
    ] = None,
    layers: Annotated[
        tuple[Literal["hydra", "hydra-recompute", "attention"], ...] | None,
        arg(metavar="NAME ...", help_behavior_hint="(default: all, on a CPU hydra attention)"),
    ] = None,
    encoder: bool = False,
    matrices: bool = False,
    longest: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 131072, on a CPU 65536)")] = None,
    plot: Annotated[Path | None, arg(metavar="FILE.png", help_behavior_hint="")] = None,
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Time a Hydra layer on this machine, beside attention; checked before it is timed.

    The table tells milliseconds forward and of a step (forward and backward), on a GPU as a CUDA graph and as called
    from Python, memory of a step, tokens a second, and how near that is to what the machine could do, by its speed at
    copies and matrix products, which is measured too. A second table has the quasiseparable product alone, beside the
    scans of mamba_ssm and flash-linear-attention, called once for each direction, where these are installed.

    With --matrices, the product of every matrix class instead: its time and memory at lengths from 256 up to where it
    fits, and how they grow over the last two octaves, beside what the class promises. A few minutes.

    In use:
        hydra-ssm bench
        hydra-ssm bench --matrices --plot costs.png
        hydra-ssm bench --lengths 128 1024 8192 --plot speed.png --json speed.json
        hydra-ssm bench --device cpu --d-model 128 --tokens 4096 --layers hydra

    Args:
        device: cpu, cuda, cuda:1, ...
        dtype: Of the layers' arithmetic: float32, bfloat16 or float16, the latter two by autocast.
        d_model: Width of the layers, a multiple of 64.
        tokens: In a step: batches are tokens / length sequences, at least one.
        lengths: Of the sequences.
        layers: Which layers: hydra, hydra-recompute (less memory, more time), attention (the Transformer's, through
            scaled_dot_product_attention).
        encoder: Time stacks of 23 Hydra layers and of BERT's 12 as well, compiled on a GPU, on half the tokens.
        matrices: Measure the products of all matrix classes, and no layer.
        longest: The longest sequence for --matrices; each class stops before a step would take about a second.
        plot: Draw time per token against length there; with --matrices, time and memory of a product.
        json: Write the figures there, with device, versions and command.
    """
    for option, path in (("plot", plot), ("json", json)):  # now, not after the measurements
        if path is not None and path.is_dir():
            raise ValueError(f"--{option} must be a file, {path} is a folder")
    if plot is not None:
        require("matplotlib", "train")
    others = {"d-model": d_model, "tokens": tokens, "lengths": lengths, "layers": layers, "encoder": encoder or None}
    if matrices:
        if given := [f"--{name}" for name, value in others.items() if value is not None]:
            raise ValueError(f"--matrices measures products and no layers: it does not go with {', '.join(given)}")
        from ..bench.matrices import bench_matrices

        bench_matrices(device=device, dtype=dtype, longest=longest, plot=plot, json=json)
        return
    if longest is not None:
        raise ValueError("--longest goes with --matrices; the lengths of layers are given by --lengths")
    from ..bench import bench as measure

    measure(
        device=device, dtype=dtype, d_model=d_model, tokens=tokens, lengths=lengths, layers=layers, encoder=encoder,
        plot=plot, json=json,
    )  # fmt: skip


@dataclass(frozen=True)
class AblationSettings:
    """Settings of all runs of an ablation; those that are not given follow its size."""

    held_out: Annotated[tuple[str, ...] | None, arg(metavar="SOURCE ...", help_behavior_hint="(default: a part)")] = (
        None
    )
    """Files, folders or data sets to evaluate on."""
    tokenizer: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="(default: train one)")] = None
    """A folder with a tokenizer, or a vocab.txt."""
    vocab_size: Annotated[int | None, _by_size("N")] = None
    """Most tokens of a trained tokenizer."""
    layers: Annotated[int | None, _by_size("N")] = None
    """Of each model."""
    d_model: Annotated[int | None, _by_size("N")] = None
    """Width of each model."""
    headdim: Annotated[int | None, _by_size("N")] = None
    """Width of a head, by which the width within a layer grows until the parameters are equal."""
    d_state: Annotated[int | None, _by_size("N")] = None
    """State size, rank, features of a query and a key: N of every class."""
    length: Annotated[int | None, _by_size("N")] = None
    """Tokens of every row of text."""
    batch_size: Annotated[int | None, _by_size("N")] = None
    """Rows in a step."""
    accumulate: Annotated[int | None, _by_size("N")] = None
    """Parts that a step is computed in, to save memory."""
    steps: Annotated[int | None, _by_size("N")] = None
    """Steps of each run."""
    learning_rate: Annotated[float | None, _by_size("X")] = None
    """The highest, reached after a warm-up of 6 %."""
    mask_rate: Annotated[float | None, _by_size("X")] = None
    """Share of the tokens that are hidden in training; evaluation hides 0.15."""
    clip: Annotated[float | None, _by_size("X")] = None
    """Largest norm of the gradients, 0 for any."""
    held_out_rows: Annotated[int | None, _by_size("N")] = None
    """Most rows that are evaluated on."""
    save_after: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 60)")] = None
    """Seconds between checkpoints."""


def ablate(
    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="[SOURCE ...]", help_behavior_hint="")] = (),
    /,
    *,
    small: bool = False,
    paper: bool = False,
    unmatched: bool = False,
    rows: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = (),
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint="(default: 0 1 2, small 0 1)")] = (),
    jobs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1, on a CPU its cores)")] = None,
    limit: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: none)")] = None,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/ablation-SIZE)")] = None,
    settings: Annotated[AblationSettings, arg(name="")] = AblationSettings(),
) -> None:
    """Compare the matrix classes: train one masked language model of each, alike in all else.

    Every class in its data-dependent and its fixed form, and the ways of reading in both directions, with equal
    parameters, states, tokens, seeds and schedule. Shows held-out loss, masked accuracy, parameters and time of a step,
    each with its spread over the seeds, and leaves ablation.json (all curves), ablation.csv and ablation.png in --out.
    The same command again goes on with what is there, whatever stopped it, and adds rows and seeds.

    In use:
        hydra-ssm ablate --small
        hydra-ssm ablate books/ --rows table3 --seeds 0 1 2 --out runs/table3
        hydra-ssm ablate books/ --jobs 4 --limit 500

    Args:
        sources: Text files, folders, data sets as for pretrain, or the folder data/ of another ablation. None: the
            language reference that Python carries.
        small: Tiny models on a small text: some minutes on 2 cores.
        paper: The paper's: 12 layers, 70M parameters, 24,000 steps of 4096 x 128 tokens.
        unmatched: The released comparison's sizes: neither states nor parameters are equal.
        rows: Names of rows (attention, dense-fixed, ...), or table2, table3, table10.
        seeds: Of the weights, the order of the rows and the masks.
        jobs: Runs at once.
        limit: Stop after so many seconds, and some more to save, to go on later. 0 prepares the data alone.
        out: The folder of the runs and of what they found.
    """
    for package in ("accelerate", "matplotlib"):  # missing at the start, not at the end
        require(package, extra="train")
    from .ablation import ablate as start
    from .errors import UserError

    if small and paper:
        raise UserError("--small and --paper are two sizes: give one of them, or none for the one between")
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    given |= {"unmatched": True} if unmatched else {}
    size = "small" if small else "paper" if paper else None
    start(sources, out, size=size, rows=rows, seeds=seeds, jobs=jobs, limit=limit, **given)


def glue(
    model: Annotated[Positional[Path], arg(metavar="DIR")],
    /,
    *,
    data: Annotated[str, arg(metavar="FOLDER")],
    tasks: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = (),
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = (0, 1, 2, 3, 4),
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: DIR/glue)")] = None,
    jobs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: GPUs, or cores)")] = None,
    limit: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: none)")] = None,
    direct: bool = False,
    learning_rate: Annotated[float | None, _by_task("X")] = None,
    epochs: Annotated[float | None, _by_task("X")] = None,
    batch_size: Annotated[int | None, _by_task("N")] = None,
    length: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 256)")] = None,
) -> None:
    """Fine-tune a model on GLUE's tasks by the paper's recipe, and show the paper's table with it.

    RTE, MRPC and STS-B start from the model fine-tuned on MNLI with their seed. Leaves glue.json in --out (every run,
    mean and spread of every metric), and in predictions/ the answers for the test sets in the form that GLUE's site
    takes. The same command goes on where it stopped, and adds tasks and seeds.

    In use:
        hydra-ssm glue runs/mine --data glue/
        hydra-ssm glue runs/mine --data glue/ --tasks rte mrpc --seeds 0 1 2 --jobs 4
        hydra-ssm glue runs/mine --data nyu-mll/glue --limit 3000

    Args:
        model: A folder that pretrain or convert wrote, or save_pretrained with the model and its tokenizer.
        data: A folder with a folder for each task (CoLA, SST-2, ...) with its TSV files as distributed, or the name of
            a Hugging Face data set.
        tasks: CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE, or all. One whose data is not there is left out.
        seeds: Of the heads, the order of the examples and the dropout.
        out: The folder of the runs and of what they found.
        jobs: Runs at once, spread over the GPUs.
        limit: Stop after so many seconds, and some more to save, to go on later.
        direct: Start every task from the model itself, none from MNLI.
        learning_rate: Of all tasks.
        epochs: Of all tasks.
        batch_size: Of all tasks.
        length: Most tokens of an example.
    """
    require("accelerate", extra="train")
    from .finetune import glue as start

    settings: dict[str, Any] = {
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "length": length,
    }
    start(model, data, out, tasks=tasks, seeds=seeds, jobs=jobs, limit=limit, direct=direct, **settings)


def finetune(
    model: Annotated[Positional[Path], arg(metavar="DIR")],
    data: Annotated[Positional[Path], arg(metavar="FILE")],
    /,
    *,
    task: Annotated[Literal["classification", "regression", "tagging"] | None, _by_columns("NAME")] = None,
    text: Annotated[tuple[str, ...], _by_columns("COLUMN ...")] = (),
    label: Annotated[str | None, _by_columns("COLUMN")] = None,
    held_out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: a tenth)")] = None,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/FILE)")] = None,
    overwrite: bool = False,
    epochs: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 10, of many rows 3)")] = None,
    learning_rate: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 5e-5)")] = None,
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 16)")] = None,
    length: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 256)")] = None,
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None,
) -> None:
    """Fine-tune a model on your own table: texts or pairs of texts to classes or numbers, or words to tags.

    Guesses from the columns what is to be learned and says so, holds out a tenth of the rows, prints how well the model
    does on them, and saves a folder that transformers' Auto classes and pipelines load.

    In use:
        hydra-ssm finetune runs/mine reviews.csv
        hydra-ssm finetune runs/mine pairs.jsonl --text question answer --label fits
        hydra-ssm finetune runs/mine words.jsonl --task tagging --out runs/tagger

    Args:
        model: A folder that pretrain or convert wrote, or save_pretrained with the model and its tokenizer.
        data: A .csv, .tsv or .jsonl file with named columns.
        task: classification, regression (labels are numbers) or tagging (a tag for each word).
        text: The column of the texts, or two whose texts belong together.
        label: The column of what is to be learned.
        held_out: A file of the same columns to score the model on.
        out: The folder of the new model.
        overwrite: Replace what an earlier call left there.
        epochs: Passes over the rows.
        learning_rate: The highest, reached after a warm-up of 6 %. Small models take more: 1e-3.
        batch_size: Rows in a step.
        length: Most tokens of a row; longer ones are cut.
        seed: Of the new head, the order of the rows, the dropout and what is held out.
    """
    require("accelerate", extra="train")
    from .finetune import finetune as start

    settings: dict[str, Any] = {
        "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "length": length, "seed": seed
    }  # fmt: skip
    start(model, data, out, task=task, text=text, label=label, held_out=held_out, overwrite=overwrite, **settings)


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 100, placeholder=" ...")


COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain,
    "fill-mask": fill_mask,
    "embed": embed,
    "inspect": inspect,
    "convert": convert,
    "bench": bench,
    "ablate": ablate,
    "data prepare": data_prepare,
    "glue": glue,
    "finetune": finetune,
}
