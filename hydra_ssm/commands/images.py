"""Training image classifiers, measuring them, and asking them."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from .._extras import require


def _usual(metavar: str, value: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint=f"(default: {value})")


@dataclass(frozen=True)
class Settings:
    """Settings of a run; those that are not given are the paper's, or small ones for digits."""

    model: Annotated[str | None, _usual("NAME", "vit_hydra_base_patch16_224")] = None
    """Any name that timm knows; those of this library begin with vit_hydra and vit_MATRIX_dropin."""
    img_size: Annotated[int | None, _usual("N", "the model's")] = None
    """Pixels of a side, to which pictures are cut and scaled."""
    epochs: Annotated[int | None, _usual("N", "300")] = None
    """Passes over the pictures."""
    batch_size: Annotated[int | None, _usual("N", "1024")] = None
    """Pictures in a step, of all processes together."""
    accumulate: Annotated[int | None, _usual("N", "1")] = None
    """Parts that a step is computed in, to save memory."""
    learning_rate: Annotated[float | None, _usual("X", "1e-3")] = None
    """The highest, reached after a warm-up, then down by a cosine."""
    weight_decay: Annotated[float | None, _usual("X", "0.05")] = None
    """As in torch's AdamW."""
    warm_up_epochs: Annotated[int | None, _usual("N", "5")] = None
    """A tenth of the epochs at most."""
    drop_path: Annotated[float | None, _usual("X", "0.5")] = None
    """Probability that a picture skips the last layer; less before it."""
    randaugment: Annotated[str | None, _usual("NAME", "rand-m9-mstd0.5-inc1")] = None
    """In timm's words; "" for none."""
    mixup: Annotated[float | None, _usual("X", "0.8")] = None
    """Alpha; 0 for none."""
    cutmix: Annotated[float | None, _usual("X", "1.0")] = None
    """Alpha; 0 for none."""
    erase: Annotated[float | None, _usual("X", "0.25")] = None
    """Probability of losing a rectangle."""
    smoothing: Annotated[float | None, _usual("X", "0.1")] = None
    """Of the labels."""
    hflip: Annotated[float | None, _usual("X", "0.5")] = None
    """Probability of being mirrored: 0 where left is not right, as in text."""
    scale: Annotated[tuple[float, float] | None, _usual("LOW HIGH", "0.08 1")] = None
    """Least and largest share of a picture that is cut out."""
    ema_decay: Annotated[float | None, _usual("X", "0.9999")] = None
    """Of the averaged weights."""
    precision: Annotated[Literal["auto", "bf16", "fp32"] | None, _usual("{auto,bf16,fp32}", "auto")] = None
    """Of the products, in training and its evaluations. auto: bf16 on GPUs that have it."""
    workers: Annotated[int | None, _usual("N", "one a core with a GPU, else 0")] = None
    """Processes that read pictures, for each process that trains."""
    save_every: Annotated[int | None, _usual("N", "an epoch")] = None
    """Steps between checkpoints."""
    seed: Annotated[int | None, _usual("N", "0")] = None
    """Of the weights, the order, the augmentation, and what is held out where the data does not say."""


def image_train(
    *,
    data: Annotated[str | None, _usual("FOLDER", "digits")] = None,
    out: Annotated[Path | None, _usual("DIR", "runs/images, of digits runs/digits")] = None,
    resume: bool = False,
    overwrite: bool = False,
    settings: Annotated[Settings, arg(name="")] = Settings(),
) -> None:
    """Train an image classifier by the paper's recipe.

    Without --data it learns scikit-learn's 1,797 handwritten digits, in about a minute on a CPU. With torchrun it
    trains on several GPUs: torchrun --nproc-per-node 8 -m hydra_ssm.cli image train --data FOLDER. Pictures that cannot
    be read are replaced by others and listed at the end.

    In use:
        hydra-ssm image train
        hydra-ssm image train --data imagenet/ --out runs/imagenet
        hydra-ssm image train --data flowers/ --model vit_hydra_tiny_patch16_224 --epochs 30 --batch-size 64
        hydra-ssm image train --out runs/imagenet --resume

    Args:
        data: CLASS/PICTURE or train/CLASS/PICTURE and val/CLASS/PICTURE; .tar shards as WebDataset writes them; a data
            set of the datasets library, saved or by its name. What is named train, val or test divides it; otherwise
            one picture in ten is held out.
        out: The folder of the run: weights, a description, a card, and what is needed to resume.
        resume: Go on with the run in --out from its newest checkpoint; its settings are known.
        overwrite: Start again where there is a run.
    """
    require("timm", extra="vision")
    for package in ("rich", "tensorboard", "matplotlib"):  # missing at the start of a run, not at its end
        require(package, extra="train")
    from ..train.errors import UserError
    from ..train.image.recipe import ImageRecipe
    from ..train.image.training import resume as go_on
    from ..train.image.training import train as start

    given = {name: value for name, value in asdict(settings).items() if value is not None}
    given |= {} if data is None else {"data": data}
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite removes it: give one of them")
    out = out or Path("runs") / ("digits" if data is None else "images")
    metrics = go_on(out, given) if resume else start(ImageRecipe.of(**given), out, overwrite=overwrite)
    if metrics is None or int(os.environ.get("RANK", 0)) > 0:
        return
    for line in metrics["pictures"]:
        print(line)
    baseline = metrics["baseline"]
    print(
        f"saved {out}: held-out top-1 {metrics['averaged']['top1']:.2%} averaged, {metrics['raw']['top1']:.2%} raw; "
        f"{baseline['name']} {baseline['top1']:.2%}"
    )
    place = shlex.quote(str(out))
    print(f"next: hydra-ssm image predict {place} {f'{place}/examples' if data is None else 'PICTURES'}")


def image_eval(
    folder: Annotated[Positional[Path], arg(metavar="DIR")],
    /,
    *,
    data: Annotated[str | None, _usual("FOLDER", "digits")] = None,
    batch_size: int = 256,
    workers: Annotated[int, _usual("N", "one a core with a GPU, else 0")] = -1,
) -> None:
    """Measure a trained classifier: top-1, top-5 and pictures a second, of averaged and of raw weights.

    In use:
        hydra-ssm image eval runs/imagenet --data imagenet/
        hydra-ssm image eval runs/digits

    Args:
        folder: What image train wrote.
        data: As for image train. The held-out part is taken where it has a division; otherwise all pictures that the
            run in DIR was not trained on.
        batch_size: Pictures at once.
        workers: Processes that read pictures.
    """
    require("timm", extra="vision")
    from ..train.image.evaluation import evaluate

    evaluate(folder, data, batch_size=batch_size, workers=workers)


def image_predict(
    folder: Annotated[Positional[Path], arg(metavar="DIR")],
    pictures: Annotated[Positional[tuple[Path, ...]], arg(metavar="PICTURE [PICTURE ...]", help_behavior_hint="")],
    /,
    *,
    out: Annotated[Path, _usual("FILE", "predictions.png")] = Path("predictions.png"),
) -> None:
    """Name pictures: print the likeliest classes, and draw the pictures with them.

    In use:
        hydra-ssm image predict runs/imagenet holiday/ cat.jpg --out sheet.png

    Args:
        folder: What image train wrote.
        pictures: Files, and folders of them.
        out: The PNG to draw.
    """
    require("timm", extra="vision")
    from ..train.image.prediction import predict

    predict(folder, pictures, out)


def image_compare(
    *,
    data: Annotated[str | None, _usual("PATH", "digits")] = None,
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/image-comparison"),
    small: bool = False,
    rows: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = (),
    seeds: Annotated[tuple[int, ...], arg(metavar="N ...")] = (0, 1, 2),
    epochs: Annotated[int | None, _usual("N", "30")] = None,
    jobs: Annotated[int | None, _usual("N", "3 on each GPU, else 1")] = None,
    limit: Annotated[float | None, _usual("SECONDS", "none")] = None,
    budget: Annotated[float | None, _usual("SECONDS", "none")] = None,
) -> None:
    """Compare image models that are alike in all else: ViT, Hydra-ViT, Hydra in place of attention, other matrices.

    Measures their speed and memory, tunes a learning rate for each on the same small grid, trains each with several
    seeds, and measures base models from 64 to 1,024 pixels. The same command goes on where it stopped.

    In use:
        hydra-ssm image compare --small
        hydra-ssm image compare --data cifar10.tar.xz --out runs/cifar --limit 540

    Args:
        data: A .tar (also .xz) or folder with train/CLASS/PICTURE and test/CLASS/PICTURE.
        out: The folder of the runs and of what they found: images.json, images.png.
        small: Models that a CPU trains in minutes; no base models.
        rows: vit, hydra_vit, hydra_dropin, low_rank, toeplitz, add.
        seeds: Of the runs that count.
        epochs: Of the runs that count.
        jobs: Runs at once, spread over the GPUs.
        limit: Stop after so many seconds, and some more to save, to go on later.
        budget: Before the first run lower the epochs, for all rows alike, until tuning and runs take no more seconds of
            the device, by the measured times of a step.
    """
    require("timm", extra="vision")
    from ..train.image.comparison import compare

    settings: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
    size = "small" if small else None
    compare(data, out, size=size, rows=rows, seeds=seeds, jobs=jobs, limit=limit, budget=budget, **settings)
