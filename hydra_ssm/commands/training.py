"""Training a masked language model, and preparing its text."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from .._extras import require


def _by_preset(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: by preset)")


def _choice(*choices: str, many: bool = False) -> Any:
    """The first one is the default."""
    metavar = f"{{{','.join(choices)}}}{' ...' if many else ''}"
    return arg(metavar=metavar, help_behavior_hint=f"(default: {choices[0]})")


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
    """A folder with a tokenizer, or a vocab.txt. Shards and --model have their own."""
    vocab_size: Annotated[int | None, _by_preset("N")] = None
    """Most tokens of a trained tokenizer."""
    length: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 128)")] = None
    """Tokens of a row; longer documents take several."""
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
    save_every: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a tenth, at most 1,000)")] = None
    """Steps between checkpoints."""
    evaluate_every: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a fifth, at most 1,000)")] = (
        None
    )
    """Steps between evaluations."""
    evaluation_tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1048576)")] = None
    """Most held-out tokens that an evaluation reads, of rows spread evenly over all; 0: all of them."""
    tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: by --steps)")] = None
    """Instead of --steps: train until so many tokens were read."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Of the weights, the order of the rows, the masks and the dropout."""
    precision: Annotated[Literal["auto", "bf16", "fp32"] | None, _choice("auto", "bf16", "fp32")] = None
    """Of matrix products. auto: bf16 on GPUs that have it."""
    sharding: Annotated[Literal["ddp", "fsdp2"] | None, _choice("ddp", "fsdp2")] = None
    """Of several processes. ddp: each holds the whole model; fsdp2: a part, for models too large for one GPU."""
    compile: bool = False
    """Compile each layer by torch.compile: a minute at the start, faster steps."""
    activation_checkpointing: bool = False
    """Compute each layer twice instead of keeping what its gradient needs: less memory, a third more time."""
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...] | None, _choice("tensorboard", "wandb", many=True)
    ] = None
    """Where the numbers go besides the terminal. W&B heeds its own variables, such as WANDB_MODE=offline."""


def pretrain(
    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="[SOURCE ...]", help_behavior_hint="")] = (),
    /,
    *,
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: hydra-tiny)")] = None,
    model: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="(default: new weights)")] = None,
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
        hydra-ssm pretrain letters/ --model runs/mine --steps 500 --learning-rate 1e-3 --out runs/letters
        torchrun --nproc-per-node 8 --no-python hydra-ssm pretrain shards/ --preset hydra-base --out runs/base
        torchrun --nproc-per-node 2 --no-python hydra-ssm pretrain --out runs/base --resume --accumulate 4

    Under torchrun or accelerate launch, a step has the same rows, masks and loss whatever the number of processes, and
    a run may go on with another one; docs/training.md has the details.

    A run's length is part of it: the learning rate falls until the last step. To train a finished model further, on its
    own text or another, begin a run with --model.

    Args:
        sources: Text files, folders of them, files of a data set (.jsonl, .parquet, .csv), the name of one on the
            Hugging Face Hub (NAME or NAME:CONFIGURATION), or a folder that data prepare wrote, which has a tokenizer,
            a length and held-out rows of its own. None: the language reference that Python carries.
        preset: A size of model: hydra-tiny, bert-tiny, hydra-base, bert-base, ...
        model: Begin with a model's weights, sizes and tokenizer: a folder that pretrain or convert wrote, or
            save_pretrained with the model and its tokenizer; or the name of such a model on the Hugging Face Hub. The
            schedule is a new one; settings that are not given follow the preset that has the model's sizes.
        out: The folder of the run: model, tokenizer, model card, and what is needed to resume. With --model,
            runs/MODEL-further if not given.
        resume: Go on with the run in --out from its newest checkpoint; its settings are known. Of them, --accumulate,
            --sharding, --compile, --activation-checkpointing, --report-to and --save-every may change.
        overwrite: Start again where there is a run.
    """
    for package in ("accelerate", "matplotlib", "rich", "tensorboard"):  # missing at the start of a run, not at its end
        require(package, extra="train")
    from ..train.data.shards import settings_of
    from ..train.distributed import is_first
    from ..train.errors import UserError
    from ..train.folder import RunFolder
    from ..train.pretrain import Recipe, example
    from ..train.pretrain import pretrain as start
    from ..train.pretrain import resume as go_on

    given = {name: value for name, value in asdict(settings).items() if value is not None and value is not False}
    given |= {"sources": sources} if sources else {}
    given |= {"model": model} if model else {}
    further = f"{Path(model).resolve().name}-further" if model else None
    out = out or Path("runs") / (further or preset or "hydra-tiny")
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite removes it: give one of them")
    if resume or RunFolder(out).is_again():
        recipe, score = go_on(out, {**given, **({"preset": preset} if preset else {})})
    else:
        recipe = Recipe.of(preset or (None if model else "hydra-tiny"), **settings_of(sources) | given)
        score = start(recipe, out, overwrite=overwrite)
    if not is_first():
        return
    if score is None:
        print(f"the run in {out} has ended already: --model {out} --out NEW trains its model further")
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
    from ..train.data.report import prepare_and_show
    from ..train.data.settings import Settings as Preparation

    settings = Preparation(sources, tokenizer, vocab_size, length, rows, documents, column, held_out, shard_tokens)
    prepare_and_show(settings, out, jobs=jobs, overwrite=overwrite)
    print(f"next: hydra-ssm pretrain {shlex.quote(str(out))}")
