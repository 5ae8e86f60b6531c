"""Times of layers, and what their classes learn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from .._extras import require


def _by_size(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: by size)")


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
    jobs: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: GPUs, or cores)")] = None,
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
        jobs: Runs at once, spread over the GPUs.
        limit: Stop after so many seconds, and some more to save, to go on later. 0 prepares the data alone.
        out: The folder of the runs and of what they found.
    """
    for package in ("accelerate", "matplotlib"):  # missing at the start, not at the end
        require(package, extra="train")
    from ..train.ablation import ablate as start
    from ..train.errors import UserError

    if small and paper:
        raise UserError("--small and --paper are two sizes: give one of them, or none for the one between")
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    given |= {"unmatched": True} if unmatched else {}
    size = "small" if small else "paper" if paper else None
    start(sources, out, size=size, rows=rows, seeds=seeds, jobs=jobs, limit=limit, **given)
