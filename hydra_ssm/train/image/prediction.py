"""Pictures and what a model sees in them: printed, and drawn beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..._extras import require
from ...vision.pictures import open_picture
from ..checkpoints import whole_file
from ..errors import UserError
from .evaluation import logits_of
from .loading import evaluation_transform
from .result import load
from .sources import ENDINGS

COLUMNS, MOST = 5, 60  # of the sheet
SHOWN = 3  # likeliest classes
TOGETHER = 64

Say = Callable[[str], None]


class Answer(NamedTuple):
    """The likeliest classes of a picture and their probabilities."""

    path: Path
    classes: list[tuple[str, float]]


def predict(folder: Path, pictures: Sequence[Path], sheet: Path | None, *, say: Say = print) -> list[Answer]:
    """What `hydra-ssm image predict` does.

    Args:
        folder: what `hydra-ssm image train` wrote.
        pictures: files, and folders of them.
        sheet: a PNG to draw; None for none.

    Raises:
        UserError: there is no model, no picture that can be read, or no place for the sheet.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if sheet is not None and sheet.is_dir():
        raise UserError(f"the sheet must be a file, {sheet} is a folder")
    if sheet is not None and not sheet.parent.is_dir():
        raise UserError(f"there must be a folder {sheet.parent} for {sheet.name}")
    files = _files(pictures)
    model, config, classes = load(folder, device)
    transform = evaluation_transform(config)
    answers: list[Answer] = []
    shown: list[Image.Image] = []
    broken: list[str] = []
    for start in range(0, len(files), TOGETHER):
        readable: list[tuple[Path, Any]] = []
        for file in files[start : start + TOGETHER]:
            try:
                picture, _ = open_picture(file.read_bytes())
            except OSError as error:
                broken.append(f"  {file}: {error}")
                continue
            readable.append((file, transform(picture)))
            if len(shown) < MOST:
                shown.append(_thumbnail(picture))
        if readable:
            pixels = torch.stack([x for _, x in readable])
            likely = logits_of(model, pixels, config, device).softmax(1).topk(min(SHOWN, len(classes)))
            for (file, _), values, index in zip(readable, likely.values.tolist(), likely.indices.tolist(), strict=True):
                answers.append(Answer(file, [(classes[i], p) for i, p in zip(index, values, strict=True)]))
                say(f"{file}: {', '.join(f'{name} {p:.1%}' for name, p in answers[-1].classes)}")
    if broken:
        say(f"{len(broken)} pictures could not be read:")
        for line in broken:
            say(line)
    if not answers:
        raise UserError(f"none of {len(files)} files holds a picture that can be read")
    if sheet is not None:
        draw(answers, shown, sheet)
        say(f"wrote {sheet}" + (f" with the first {MOST}" if len(answers) > MOST else ""))
    return answers


def draw(answers: Sequence[Answer], pictures: Sequence[Image.Image], path: Path) -> None:
    """A PNG of the pictures with their likeliest classes below each."""
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = require("matplotlib.figure", "train").Figure(figsize=(2.2 * columns, 2.7 * rows), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if place < len(pictures):
            axes.imshow(pictures[place])
            answer = answers[place]
            lines = [f"{name[:24]} {p:.0%}" for name, p in answer.classes[:2]]
            axes.set_title(f"{answer.path.name[-24:]}\n" + "\n".join(lines), fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=100, format="png")


def _thumbnail(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((200, 200))
    return small


def _files(given: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and not p.is_dir())
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    if not found:
        raise UserError(
            f"there must be pictures to look at ({', '.join(ENDINGS)}), {', '.join(map(str, given))} has none"
        )
    return found
