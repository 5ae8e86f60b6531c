"""Fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from .._extras import require


def _by_task(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: the paper's, by task)")


def _by_columns(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: by the columns)")


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
    from ..train.finetune import glue as start

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
    from ..train.finetune import finetune as start

    settings: dict[str, Any] = {
        "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "length": length, "seed": seed
    }  # fmt: skip
    start(model, data, out, task=task, text=text, label=label, held_out=held_out, overwrite=overwrite, **settings)
