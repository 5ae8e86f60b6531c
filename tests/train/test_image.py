"""Training of image classifiers: pictures of every kind, exact resumption, several processes, and what comes out."""

import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from processes import start, wait_until
from rich.console import Console
from safetensors.torch import load_file
from timm.task import ClassificationTask
from torch import nn

from hydra_ssm.cli import main
from hydra_ssm.train.errors import Stopped, UserError
from hydra_ssm.train.image import evaluation, loading, progress, training
from hydra_ssm.train.image import run as running
from hydra_ssm.train.image.evaluation import Score
from hydra_ssm.train.image.folder import ImageFolder
from hydra_ssm.train.image.loading import (
    Pictures,
    TrainingOrder,
    evaluation_transform,
    operations,
    posterize,
    seed_drawing,
    training_transform,
)
from hydra_ssm.train.image.processes import Processes
from hydra_ssm.train.image.progress import Shown
from hydra_ssm.train.image.recipe import ImageRecipe
from hydra_ssm.train.image.result import create, load
from hydra_ssm.train.image.run import Run
from hydra_ssm.train.image.sources import Part, open_held_out, open_parts
from hydra_ssm.train.image.sources.folders import Folder
from hydra_ssm.train.image.training import resume, train
from hydra_ssm.vision.pictures import Unreadable, open_picture

COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 70), "red": (220, 40, 50)}
TINY = {
    "model": "vit_hydra_tiny_patch16_224", "model_args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "headdim": 8,
    "d_state": 4}, "img_size": 16, "epochs": 2, "batch_size": 8, "workers": 0, "learning_rate": 3e-3, "ema_decay": 0.9,
}  # fmt: skip
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erase": 0.0, "drop_path": 0.0, "randaugment": "", "scale": (1.0, 1.0)}


def coloured(colour: tuple[int, int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-30, 30, (20, 24, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose class is their colour, in train/CLASS and val/CLASS."""
    folder = tmp_path_factory.mktemp("flowers")
    for part, number in (("train", 12), ("val", 5)):
        for place, (name, colour) in enumerate(COLOURS.items()):
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                coloured(colour, 100 * place + i).save(folder / part / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def run(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the colours."""
    out = tmp_path_factory.mktemp("run") / "out"
    train(ImageRecipe.of(data=str(flowers), **{**TINY, **PLAIN, "epochs": 8}), out)
    return out


def content(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------ pictures


def test_every_mode_becomes_eight_bit_rgb():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 4, 8))
    palette = red.convert("P")
    deep = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    cases = {
        "RGB": (content(red), "", (255, 0, 0)),
        "grey": (content(Image.new("L", (8, 8), 90)), "grey", (90, 90, 90)),
        "one bit": (content(Image.new("1", (8, 8), 1)), "grey", (255, 255, 255)),
        "grey and alpha": (content(Image.new("LA", (8, 8), (90, 0))), "grey", (255, 255, 255)),
        "CMYK": (content(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "CMYK", (254, 0, 0)),
        "palette": (content(palette), "palette", (255, 0, 0)),
        "transparent palette": (content(palette, transparency=palette.getpixel((0, 0))), "palette", (255, 255, 255)),
        "alpha": (content(half), "transparent", (255, 255, 255)),
        "16 bits": (content(deep), "16-bit", (128, 128, 128)),
        "16 bits, dark": (content(Image.fromarray(np.ones((8, 8), np.uint16))), "16-bit", (1, 1, 1)),
        "fractions": (content(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"), "F", (128, 128, 128)),
    }
    for name, (data, kind, colour) in cases.items():
        picture, done = open_picture(data)
        assert (picture.mode, done, picture.size) == ("RGB", kind, (8, 8)), name
        assert np.abs(np.array(picture.getpixel((1, 4))) - colour).max() <= 1, (name, picture.getpixel((1, 4)))
    assert open_picture(content(half))[0].getpixel((6, 4)) == (255, 0, 0)


def test_a_picture_is_turned_as_its_camera_says():
    image = Image.new("RGB", (10, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_picture(content(image, "JPEG", exif=exif))[0].size == (4, 10)


def test_what_cannot_be_read_is_told(monkeypatch):
    monkeypatch.setattr("hydra_ssm.vision.pictures.MOST_PIXELS", 10_000)
    whole = content(coloured(COLOURS["red"], 0), "JPEG")
    png = bytearray(content(coloured(COLOURS["red"], 0)))
    png[60] ^= 255
    for data, told in (
        (b"", "empty"),
        (
            b"<html>not found</html>",
            "^the file holds no picture of a known kind$",
        ),  # and no address, in no two runs the same
        (content(Image.new("RGB", (8, 8)), "EPS"), "no picture of a known kind"),  # a program, which is not run
        (whole[: len(whole) // 2], "(?i)truncated"),
        (bytes(png), "."),
        (content(Image.new("RGB", (200, 100))), r"200 x 100 pixels, more than 10,000"),
        (content(Image.new("RGB", (304, 3))), "304 x 3 pixels, one side more than 100 times the other"),
    ):
        with pytest.raises(Unreadable, match=told):
            open_picture(data)
    monkeypatch.setattr("hydra_ssm.vision.pictures.MOST_PIXELS", 5_000_000)
    picture, done = open_picture(content(Image.new("RGB", (4096, 4096)), "JPEG"))
    assert (done, picture.size) == ("huge", (2048, 2048))
    picture, done = open_picture(content(Image.new("L", (30_000, 400)), "JPEG"))
    assert (done, picture.size) == ("huge", (15_000, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # of which PIL opens twice as many, whatever they are
    picture, done = open_picture(content(Image.new("RGB", (4096, 4096)), "JPEG"))
    assert (done, picture.size) == ("huge", (2048, 2048))
    with pytest.raises(Unreadable, match="more than 5,000,000 pixels"):
        open_picture(content(Image.new("RGB", (4096, 4096))))


# ------------------------------------------------------------------------------------------------------------- sources


def shards(flowers: Path, folder: Path, with_cls: bool) -> None:
    for part in ("train", "val"):
        paths = sorted((flowers / part).rglob("*.png"))
        for shard in range(2):
            with tarfile.open(folder / f"flowers-{part}-{shard:04}.tar", "w") as archive:
                for i, path in enumerate(paths[shard::2]):
                    name = f"{shard}{i:03}" if with_cls else f"{path.parent.name}/{shard}{i:03}"
                    files = {f"{name}.png": path.read_bytes()}
                    if with_cls:
                        files[f"{name}.cls"] = str(sorted(COLOURS).index(path.parent.name)).encode()
                    for member, data in files.items():
                        entry = tarfile.TarInfo(member)
                        entry.size = len(data)
                        archive.addfile(entry, io.BytesIO(data))


def seen(part: Part) -> list[tuple[bytes, int]]:
    return sorted((part.source.read(i), part.source.labels[i]) for i in part.index)


def test_folders_shards_and_data_sets_hold_the_same_pictures(flowers, tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("cls", "folders", "parquet"):
        (tmp_path / name).mkdir()
    shards(flowers, tmp_path / "cls", with_cls=True)
    shards(flowers, tmp_path / "folders", with_cls=False)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=sorted(COLOURS)))
    splits = datasets.DatasetDict()
    for part, split in (("train", "train"), ("val", "validation")):
        paths = sorted((flowers / part).rglob("*.png"))
        rows = [{"image": {"bytes": p.read_bytes(), "path": None}, "label": p.parent.name} for p in paths]
        splits[split] = datasets.Dataset.from_list(rows, features=features)
    splits.save_to_disk(tmp_path / "saved")
    for split, rows in splits.items():
        rows.to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    expected = [seen(part) for part in open_parts(str(flowers))[:2]]
    shutil.copytree(flowers, tmp_path / "stray")
    shutil.copy(min((tmp_path / "folders").iterdir()), tmp_path / "stray" / "train" / "left-there.tar")
    for name in ("cls", "folders", "saved", "parquet", "stray"):
        with pytest.warns(UserWarning, match="left alone") if name == "stray" else nullcontext():
            train_part, held_out, classes = open_parts(str(tmp_path / name))
        assert [seen(train_part), seen(held_out)] == expected, name
        assert classes == (["0", "1", "2"] if name == "cls" else sorted(COLOURS)), name
        names = [part.source.name(i) for part in (train_part, held_out) for i in part.index]
        assert len(set(names)) == 51  # by which those that cannot be read are told
    assert len(expected[0]) == 36
    assert len(expected[1]) == 15


def test_a_picture_beside_shards_does_not_hide_them(flowers, tmp_path):
    shards(flowers, tmp_path, with_cls=False)
    expected = [seen(part) for part in open_parts(str(tmp_path))[:2]]
    for name in ("previews", "more"):
        (tmp_path / name).mkdir()
        coloured(COLOURS["red"], 0).save(tmp_path / name / "sheet.png")
        with pytest.warns(UserWarning, match="pictures beside 4 .tar files are left alone"):
            assert [seen(part) for part in open_parts(str(tmp_path))[:2]] == expected
    folders = tmp_path / "folders"
    shutil.copytree(flowers / "train", folders)
    shutil.copy(min(tmp_path.glob("*.tar")), folders)
    with pytest.warns(UserWarning, match=r"1 .tar files among 36 pictures are left alone"):
        assert sum(len(part) for part in open_parts(str(folders))[:2]) == 36


def test_pictures_without_a_class_are_refused(flowers, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=sorted(COLOURS)))
    picture = {"path": str(flowers / "train" / "red" / "00.png"), "bytes": None}
    labels = {"train": (0, 1, 2), "test": (1, -1)}
    rows = {name: [{"image": picture, "label": label} for label in own] for name, own in labels.items()}
    splits = {name: datasets.Dataset.from_list(own, features=features) for name, own in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="must have a class, 1 have none"):
        open_parts(str(tmp_path / "set"), 0)


def test_folders_hold_pictures_of_every_kind_and_those_of_no_class_are_left_alone(flowers, tmp_path):
    shutil.copytree(flowers, tmp_path / "data")
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "Val")
    red = tmp_path / "data" / "train" / "red"
    for ending in ("webp", "bmp", "GIF", "tif"):
        coloured(COLOURS["red"], 7).save(red / f"more.{ending}")
    assert [len(part) for part in open_parts(str(tmp_path / "data"))[:2]] == [40, 15]
    shutil.copy(red / "00.png", red.parent / "stray.png")
    with pytest.warns(UserWarning, match="1 pictures in no class's folder are left alone, such as .*stray.png"):
        first, _, classes = open_parts(str(tmp_path / "data"))
    assert (len(first), classes) == (40, sorted(COLOURS))
    (tmp_path / "data" / "Val" / "red").rename(tmp_path / "data" / "Val" / "rose")
    (red.parent / "stray.png").unlink()
    with pytest.raises(UserError, match=r"every class of .*Val must be trained on, got rose"):
        open_parts(str(tmp_path / "data"))


def test_a_class_may_be_named_as_a_part_is(flowers, tmp_path):
    for own, name in (("red", "train"), ("blue", "bus"), ("green", "Test")):
        shutil.copytree(flowers / "train" / own, tmp_path / name)
    first, held_out, classes = open_parts(str(tmp_path))
    assert (len(first) + len(held_out), classes) == (36, ["bus", "Test", "train"])


LAYOUTS = {  # the folder that holds pictures of a class, within a part's
    "plain": "{part}/{name}",
    "deeper in the class": "{part}/{name}/2019",
    "below one folder": "flowers/{part}/{name}",
    "below one folder of the part": "{part}/pictures/{name}",
    "below two, and deeper": "some/flowers/{part}/pictures/{name}/2019",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_class_is_the_first_folder_below_its_part(layout, flowers, tmp_path):
    expected = [seen(part) for part in open_parts(str(flowers))[:2]]
    for part in ("train", "val"):
        for name in COLOURS:
            folder = tmp_path / "data" / layout.format(part=part, name=name)
            shutil.copytree(flowers / part / name, folder)
            for place in (folder, folder.parent.parent):
                (place / ".ipynb_checkpoints").mkdir(exist_ok=True)
                shutil.copy(folder / "00.png", place / ".ipynb_checkpoints" / "00-checkpoint.png")
    whole = tmp_path / "data" / layout.partition("{part}")[0]
    for part in ("train", "val"):
        (tmp_path / "tars" / part).mkdir(parents=True)
        with tarfile.open(tmp_path / "tars" / part / "0.tar", "w") as archive:
            archive.add(whole / part, layout.format(part=part, name="").partition(part)[0] + part)
    for data in ("data", "tars"):
        *parts, classes = open_parts(str(tmp_path / data))
        assert ([seen(part) for part in parts], classes) == (expected, sorted(COLOURS)), data
    shutil.copy(tmp_path / "tars" / "train" / "0.tar", tmp_path / "alone.tar")
    assert open_parts(str(tmp_path / "alone.tar"))[2] == sorted(COLOURS)


def test_a_tar_of_both_parts_has_the_classes_below_them(flowers, tmp_path):
    with tarfile.open(tmp_path / "flowers.tar", "w") as archive:
        archive.add(flowers, "flowers")
    first, held_out, classes = open_parts(str(tmp_path))
    assert (len(first) + len(held_out), classes) == (51, sorted(COLOURS))


def test_shards_of_one_folder_each_with_more_in_them_are_warned_of(flowers, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"shard{number}.tar", "w") as archive:
            archive.add(flowers / "train", f"shard{number}")
    with pytest.warns(UserWarning, match="each .tar holds one folder, which is taken for its class, such as shard0"):
        assert open_parts(str(tmp_path))[2] == ["shard0", "shard1"]


def test_held_out_pictures_of_one_class_are_known_by_the_classes_trained_on(flowers, tmp_path):
    shutil.copytree(flowers / "train", tmp_path / "train")
    shutil.copytree(flowers / "val" / "red", tmp_path / "val" / "red" / "2019")
    assert [label for _, label in seen(open_parts(str(tmp_path))[1])] == [2] * 5


def test_shards_pictures_of_no_class_are_left_alone(flowers, tmp_path):
    shards(flowers, tmp_path, with_cls=True)
    damaged = tmp_path / "flowers-train-0000.tar"
    with tarfile.open(damaged) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]
    wrong = {"0000.cls": b"", "0001.cls": b"\xff\xfe", "0002.cls": b"-1", "0003.cls": None}

    def write(wrong: dict[str, bytes | None]) -> None:
        with tarfile.open(damaged, "w") as archive:
            for name, data in members:
                data = wrong.get(name, data)
                entry = tarfile.TarInfo(f"pictures/{name}")
                entry.size = len(data or b"")
                if data is not None:
                    archive.addfile(entry, io.BytesIO(data))

    write(wrong)
    with pytest.warns(UserWarning, match=r"flowers-train-0000.tar: 4 pictures have no class and are left alone"):
        first, _, classes = open_parts(str(tmp_path))
    assert (len(first), classes) == (32, ["0", "1", "2"])
    write({"0000.cls": b"99999999999999999999"})
    with pytest.raises(UserError, match=r"0000.png is of class 99999999999999999999, classes must be below 1,000,000"):
        open_parts(str(tmp_path))


def test_one_class_alone_is_nothing_to_learn(flowers, tmp_path):
    shutil.copytree(flowers / "train" / "red", tmp_path / "data" / "train" / "red")
    with pytest.raises(UserError, match="must be pictures of at least two classes, got red alone"):
        train(ImageRecipe.of(data=str(tmp_path / "data"), **{**TINY, "batch_size": 2}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_nobody_has_divided_has_a_tenth_held_out(flowers):
    first, again, other = (open_parts(str(flowers / "train"), seed) for seed in (0, 0, 1))
    assert (len(first[0]), len(first[1])) == (33, 3)
    assert sorted(first[0].index + first[1].index) == list(range(36))
    assert first[1].index == again[1].index != other[1].index
    assert len(open_held_out(str(flowers / "val"), sorted(COLOURS))) == 15
    with pytest.raises(UserError, match=r"the classes must be those of the model, red, .* got blue"):
        open_held_out(str(flowers / "val"), ["red"])


@pytest.mark.parametrize("only", ["train", "val"])
def test_one_part_alone_is_divided_and_no_picture_is_on_both_sides(only, flowers, tmp_path):
    (tmp_path / only).symlink_to(flowers / only)
    first, held_out, _ = open_parts(str(tmp_path), 0)
    assert not set(first.index) & set(held_out.index)
    assert len(first) + len(held_out) == {"train": 36, "val": 15}[only]
    assert len(open_held_out(str(tmp_path), sorted(COLOURS))) == len(first) + len(held_out)


def test_one_shard_is_a_data_set(flowers, tmp_path):
    shards(flowers, tmp_path, with_cls=False)
    first, held_out, classes = open_parts(str(min(tmp_path.rglob("*.tar"))), 0)
    assert len(held_out) >= 1
    assert set(classes) <= set(COLOURS)
    assert not set(first.index) & set(held_out.index)


def test_a_run_is_evaluated_on_what_it_was_not_trained_on(flowers, tmp_path, monkeypatch):
    """Wherever one stands, wherever its pictures have been copied to, and whatever has been added to them."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(flowers / "train", tmp_path / "flowers")
    monkeypatch.chdir(tmp_path)
    train(ImageRecipe.of(data="flowers", **TINY, **PLAIN, seed=3), Path("out"))
    _, held_out, _ = open_parts("flowers", 3)
    kept = seen(held_out)
    monkeypatch.setattr(evaluation, "open_held_out", lambda *given: asked.append(open_held_out(*given)) or asked[-1])
    asked: list[Part] = []

    def evaluated(folder: str, data: str) -> list[tuple[bytes, int]]:
        evaluation.evaluate(Path(folder), data, workers=0, say=lambda _: None)
        return seen(asked[-1])

    assert evaluated("out", "flowers") == kept
    for i, (name, colour) in enumerate(COLOURS.items()):
        (tmp_path / "new" / name).mkdir(parents=True)
        coloured(colour, 900 + i).save(tmp_path / "new" / name / "00.png")  # named as one that was trained on
    assert len(evaluated("out", "new")) == 3
    shutil.copytree("flowers", "copy")
    coloured(COLOURS["red"], 999).save("copy/red/new.png")
    assert evaluated("out", "copy") == sorted([*kept, (Path("copy/red/new.png").read_bytes(), 2)])
    monkeypatch.chdir("elsewhere")
    assert evaluated("../out", "../flowers") == kept
    assert resume(Path("../out"), {"data": "../flowers"})["held_out_pictures"] == 3
    assert Path(json.loads(Path("../out/training/recipe.json").read_text())["data"]) == tmp_path / "flowers"
    assert "trained on flowers\n" in Path("../out/README.md").read_text()


def test_shards_and_data_sets_know_again_what_was_trained_on(flowers, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = sorted((flowers / "train").rglob("*.png"))
    rows = [{"image": {"bytes": p.read_bytes(), "path": None}, "label": p.parent.name} for p in paths]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=sorted(COLOURS)))
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    (tmp_path / "shards").mkdir()
    shards(flowers, tmp_path / "shards", with_cls=False)
    for path in (tmp_path / "shards").glob("*-val-*"):
        path.unlink()
    for name in ("saved", "shards"):
        first, held_out, classes = open_parts(str(tmp_path / name), 1)
        shutil.copytree(tmp_path / name, tmp_path / "copies" / name)
        assert seen(open_held_out(str(tmp_path / "copies" / name), classes, first.marks())) == seen(held_out)
        with pytest.raises(UserError, match="trained on all of these 36 pictures"):
            open_held_out(str(tmp_path / name), classes, np.concatenate([first.marks(), held_out.marks()]))


@pytest.mark.parametrize(("ending", "by"), [("tar.gz", "gunzip"), ("tgz", "gunzip"), ("TAR.XZ", "unxz")])
def test_shards_that_are_compressed_are_told_how_to_be_unpacked(ending, by, flowers, tmp_path):
    with tarfile.open(tmp_path / f"flowers.{ending}", f"w:{ending[-2:].lower()}") as archive:
        archive.add(flowers, "flowers")
    for data in (tmp_path, tmp_path / f"flowers.{ending}"):
        with pytest.raises(UserError, match=rf"must not be compressed, got .*: unpack each, such as with {by} flowers"):
            open_parts(str(data))
    shutil.copytree(flowers / "train", tmp_path / "train")
    assert len(open_parts(str(tmp_path))[0]) == 33  # what it was made of lies beside it


def test_a_damaged_shard_gives_the_pictures_before_the_damage(flowers, tmp_path):
    shards(flowers, tmp_path, with_cls=True)
    path = tmp_path / "flowers-train-0001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"flowers-train-0001.tar is damaged, its first \d+ pictures are used"):
        train_part, held_out, _ = open_parts(str(tmp_path))
    assert 18 < len(train_part) < 36
    assert len(held_out) == 15


def test_processes_share_every_batch_of_the_one_order():
    recipe = ImageRecipe.of(data="x", **TINY)
    for epoch in (0, 1):
        orders = [TrainingOrder(37, recipe, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2))]
        for order in orders:
            order.epoch = epoch
        alone, first, second = map(list, orders)
        assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in alone]
        places = [place for batch in alone for place, _, _ in batch]
        assert len(set(places)) == len(places) == 32
        orders[0].start = 3
        assert list(orders[0]) == alone[3:]


# ------------------------------------------------------------------------------------------------------------ training


def test_a_run_learns_and_its_folder_is_loaded_by_timm_and_by_eval_and_predict(run, flowers, tmp_path, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["averaged"]["top1"] > 0.9
    assert metrics["baseline"] == {"name": "always the commonest class", "top1": pytest.approx(1 / 3)}
    assert main(["image", "eval", str(run), "--data", str(flowers)]) == 0
    said = capsys.readouterr().out
    assert f"averaged weights  top-1 {metrics['averaged']['top1']:.2%}, top-5 100.00%" in said
    assert f"raw weights       top-1 {metrics['raw']['top1']:.2%}" in said
    assert "pictures/s" in said
    sheet = tmp_path / "sheet.png"
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    files = [flowers / "val" / "red" / "00.png", flowers / "val" / "blue", tmp_path / "broken.jpg"]
    assert main(["image", "predict", str(run), *map(str, files), "--out", str(sheet)]) == 0
    said = capsys.readouterr().out
    assert f"{files[0]}: red " in said
    assert said.count(": blue ") == 5
    assert "1 pictures could not be read:\n" in said
    assert Image.open(sheet).format == "PNG"
    own = load(run, torch.device("cpu"))
    theirs = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(own.model(x), theirs(x))
    assert own.classes == list(theirs.pretrained_cfg["label_names"]) == sorted(COLOURS)
    assert any((run / "training" / "tensorboard").iterdir())


def test_a_killed_run_goes_on_to_the_same_bits_with_any_number_of_workers(flowers, tmp_path):
    settings = {**TINY, "epochs": 3, "save_every": 1, "drop_path": 0.3}
    train(ImageRecipe.of(data=str(flowers), **settings), tmp_path / "whole")
    out = tmp_path / "killed"
    process = start(train, ImageRecipe.of(data=str(flowers), **{**settings, "workers": 1}), out)
    wait_until(lambda: [*out.glob("training/checkpoints/checkpoint-[6-9]")], process)  # amid the second epoch
    process.kill()
    process.join()
    assert not (out / "model.safetensors").exists()
    with pytest.raises(UserError, match=r"epochs is 3 in the run that goes on in .*killed, got 4"):
        resume(out, {"epochs": 4})
    resumed = resume(out)
    for name in ("model.safetensors", "raw.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert resumed["course"] == json.loads((tmp_path / "whole" / "metrics.json").read_text())["course"]
    assert resume(out)["course"] == resumed["course"]  # it has ended


def test_an_evaluation_reads_each_picture_once_for_both_kinds_of_weights(flowers, tmp_path, monkeypatch):
    read: list[int] = []
    of_folder = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, i: read.append(i) or of_folder(self, i))
    train(ImageRecipe.of(data=str(flowers), **TINY), tmp_path / "out")
    assert len(read) == 2 * (32 + 15)


@pytest.mark.parametrize("save_every", [1, 0])
def test_weights_that_are_not_finite_are_never_saved(save_every, flowers, tmp_path, monkeypatch):
    """Though losses are looked at now and then alone."""
    step = Run._step

    def broken(self, batch):
        step(self, batch)
        if self.done == (3 if save_every else 8):
            next(self.model.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(Run, "_step", broken)
    with pytest.raises(UserError, match="its weights are no longer finite"):
        train(ImageRecipe.of(data=str(flowers), **TINY, save_every=save_every), tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out/training/checkpoints").iterdir())
    assert kept == (["checkpoint-1", "checkpoint-2"] if save_every else ["checkpoint-4"])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_batch_must_divide_among_the_processes_of_a_resumed_run_too(flowers, tmp_path, monkeypatch):
    monkeypatch.setattr(Shown, "step", lambda self, done: signal.raise_signal(signal.SIGTERM) if done == 3 else None)
    with pytest.raises(Stopped):
        train(ImageRecipe.of(data=str(flowers), **TINY), tmp_path)
    monkeypatch.setattr(training, "processes", lambda: nullcontext(Processes(0, 3, torch.device("cpu"))))
    with pytest.raises(UserError, match="batch_size = 8 in accumulate = 1 parts must divide among 3 processes"):
        resume(tmp_path)


def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_bits(flowers, tmp_path, monkeypatch):
    recipe = ImageRecipe.of(data=str(flowers), **TINY)
    train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Shown, "step", lambda self, done: signal.raise_signal(signal.SIGTERM) if done == 3 else None)
        with pytest.raises(Stopped, match=r"saved after step 3 of 8; go on with --out .*out --resume") as stop:
            train(recipe, tmp_path / "out")
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert main(["image", "train", "--out", str(tmp_path / "out"), "--resume"]) == 0
    own, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert own == other


def test_a_run_that_is_told_to_stop_while_it_evaluates_does_so_at_once(flowers, tmp_path, monkeypatch):
    recipe = ImageRecipe.of(data=str(flowers), **TINY)
    monkeypatch.setattr(running, "score", partial(evaluation.score, batch_size=1))
    train(recipe, tmp_path / "whole")
    sums, seen = evaluation._sums, []

    def measured(*given):
        if not seen:
            signal.raise_signal(signal.SIGTERM)
        seen.append(given)
        return sums(*given)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_sums", measured)
        with pytest.raises(Stopped, match="saved after step 4 of 8"):
            train(recipe, tmp_path / "out")
        assert len(seen) == 2  # one picture, by either kind of weights
    assert resume(tmp_path / "out")["course"] == json.loads((tmp_path / "whole/metrics.json").read_text())["course"]
    own, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert own == other


def test_what_fails_after_the_last_step_loses_no_step(flowers, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(running, "finish", lambda run, baseline: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(ImageRecipe.of(data=str(flowers), **TINY, save_every=3), tmp_path)
    monkeypatch.setattr(Run, "_step", lambda self, batch: 1 / 0)
    assert len(resume(tmp_path)["course"]) == 2


CONFIG = {"input_size": (3, 16, 16), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


@pytest.mark.parametrize("name", [ImageRecipe.randaugment, "rand-m20-mmax20-inc1", "rand-m0", "originalr", "augmix"])
def test_posterizing_to_no_bits_is_black_in_whatever_transform(name):
    """Magnitude 10 of the paper's recipe; and in the processes of a loader, to which a transform is pickled."""
    transform = pickle.loads(pickle.dumps(training_transform(ImageRecipe.of(data="x", randaugment=name), CONFIG)))
    posterizing = [operation for operation in operations(transform) if "Posterize" in operation.name]
    assert posterizing
    white = Image.new("RGB", (6, 4), "white")
    for operation in posterizing:
        operation.prob, operation.magnitude_std, operation.magnitude_max = 1.0, 0.0, 8
        operation.level_fn = lambda bits, _: (int(bits),)
        for operation.magnitude, value in ((0, 0), (1, 128), (4, 240), (8, 255)):
            assert operation(white).getextrema() == ((value, value),) * 3, operation
    assert posterize(white, -4).getextrema() == ((0, 0),) * 3


def test_no_draw_of_the_papers_recipe_fails():
    transform, picture = training_transform(ImageRecipe.of(data="x"), CONFIG), coloured(COLOURS["red"], 0)
    for draw in range(2000):
        seed_drawing(draw)
        assert transform(picture).shape == (3, 16, 16)


def test_what_fails_in_a_transform_is_not_blamed_on_the_picture(flowers):
    part, _, _ = open_parts(str(flowers))
    for training_too in (True, False):
        pictures = Pictures(part, lambda picture: 1 / 0, training_too)
        with pytest.raises(ZeroDivisionError) as failed:
            pictures[0, 0, 0]
        assert failed.value.__notes__ == ["in the transform of train/blue/00.png, of 24 x 20 pixels"]


class MostlyBroken:
    """2,000 pictures, of which those from 1,900 on can be read."""

    def __init__(self) -> None:
        self.classes = ["one", "other"]
        self.labels = [0] * 1950 + [1] * 50

    def read(self, i: int) -> bytes:
        return content(coloured(COLOURS["red"], i)) if i >= 1900 else b""

    def name(self, i: int) -> str:
        return f"picture {i}"


def test_a_broken_stretch_is_replaced_by_pictures_from_everywhere():
    pictures = Pictures(Part(MostlyBroken(), list(range(2000))), np.array, training=True)
    found = [pictures[place, 3, 1] for place in range(40)]
    assert {label for _, label, _ in found} == {0, 1}
    assert len({pixels.tobytes() for pixels, _, _ in found}) > 20
    assert "picture 0" in found[0][2]
    again = pictures[7, 3, 1]
    assert (again[0].tobytes(), again[2]) == (found[7][0].tobytes(), found[7][2])
    drawn = Pictures(Part(MostlyBroken(), [0, 1900]), lambda picture: torch.rand(()).item(), training=True)
    assert len({drawn[0, 0, epoch][0] for epoch in range(8)}) == 8
    own = drawn[1, 0, 5][0]
    seed_drawing(0, 5, 1)
    assert own == torch.rand(()).item()  # one that can be read draws as it always has


def test_a_part_without_a_picture_that_can_be_read_is_told_of(monkeypatch):
    monkeypatch.setattr(loading, "MOST_TRIES", 20)
    pictures = Pictures(Part(MostlyBroken(), list(range(1900))), np.array, training=True)
    told = "of 1,900 none of 20 drawn could be: picture 4 cannot be read: the file is empty"
    with pytest.raises(UserError, match=told):
        pictures[4, 0, 0]


def test_pictures_that_cannot_be_read_are_named_and_stop_nothing(flowers, tmp_path):
    data = tmp_path / "data"
    for part in ("train", "val"):
        for path in (flowers / part).rglob("*.png"):
            target = data / path.relative_to(flowers)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (data / "train/red/00.png").write_bytes(b"")
    (data / "train/blue/05.png").write_bytes((flowers / "train/blue/05.png").read_bytes()[:200])
    Image.new("CMYK", (20, 20), (0, 200, 200, 0)).save(data / "train/red/cmyk.jpg")
    (data / "val/green/01.png").write_bytes(b"GIF89a")
    Image.new("L", (20, 20), 90).save(data / "val/green/grey.png")
    metrics = train(ImageRecipe.of(data=str(data), **{**TINY, "batch_size": 2, "epochs": 1}), tmp_path / "out")
    told = "\n".join(metrics["pictures"])
    assert "converted: 1 CMYK, 1 grey" in told
    assert "3 pictures could not be read and were replaced by others in training, left out of evaluations:" in told
    for name in ("red/00.png: the file is empty", "blue/05.png: ", "green/01.png: "):
        assert name in told
    assert told in (tmp_path / "out" / "README.md").read_text()


def member(rank, port, said, recipe, out):
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    with said.open("w", encoding="utf-8") as sys.stdout:
        train(recipe, out)


def test_two_processes_take_the_steps_of_one(flowers, tmp_path):
    settings = {**TINY, **PLAIN, "epochs": 2}
    train(ImageRecipe.of(data=str(flowers), **{**settings, "accumulate": 2}), tmp_path / "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    recipe = ImageRecipe.of(data=str(flowers), **settings)
    workers = [start(member, rank, port, tmp_path / rank, recipe, tmp_path / "two") for rank in "01"]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    said = [(tmp_path / rank).read_text(encoding="utf-8") for rank in "01"]
    assert "epoch 2/2" in said[0]
    assert said[1] == ""
    one, two = (load(tmp_path / name, torch.device("cpu")).model.state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    courses = [json.loads((tmp_path / name / "metrics.json").read_text())["course"] for name in ("one", "two")]
    assert courses[0][-1]["top1_raw"] == courses[1][-1]["top1_raw"]


def test_pictures_and_convolutions_are_channels_last(flowers, tmp_path, monkeypatch):
    seen: list[tuple[bool, bool]] = []
    forward = ClassificationTask.forward

    def watched(self, x, target):
        weight = self.trainable_module.patch_embed.proj.weight
        seen.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)))
        return forward(self, x, target)

    monkeypatch.setattr(ClassificationTask, "forward", watched)
    train(ImageRecipe.of(data=str(flowers), **{**TINY, "epochs": 1}), tmp_path / "out")
    assert set(seen) == {(True, True)}


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_a_model_is_trained_and_evaluated_in_the_precision_that_is_asked_for(precision, dtype, flowers, tmp_path):
    settings = {**TINY, **PLAIN, "epochs": 8, "precision": precision}
    found: list[tuple[bool, torch.dtype]] = []

    def watch(module, _, out):
        if isinstance(module, nn.Linear):
            found.append((module.training, out.dtype))

    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        metrics = train(ImageRecipe.of(data=str(flowers), **settings), tmp_path / "out")
    finally:
        handle.remove()
    assert set(found) == {(True, dtype), (False, dtype)}
    assert metrics["averaged"]["top1"] > 0.8
    assert {p.dtype for p in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_a_bar_is_drawn_where_there_is_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda quiet: Console(file=screen, force_terminal=True, color_system=None, width=100)
    )
    with Shown(40, 0, quiet=False) as shown:
        for done in (1, 20):
            shown.step(done)
            shown.numbers(done, 1.234, 1e-3, 5678.0)
        shown.evaluated(1, 2, Score(0.25, 0.5, 1.0, 8), Score(0.5, 0.75, 1.0, 8))
    drawn = screen.getvalue()
    assert "20/40 loss 1.234  rate 0.001  5,678 pictures/s" in drawn
    assert "epoch 1/2: held-out top-1 50.0% averaged, 25.0% raw; top-5 75.0%" in drawn


def test_a_model_of_two_sides_gets_pictures_of_them():
    arguments = {**TINY["model_args"], "img_size": (16, 24)}
    recipe = ImageRecipe.of(data="x", **{**TINY, "img_size": None, "model_args": arguments})
    model, config = create(recipe, 3)
    assert config["input_size"] == (3, 16, 24)
    picture = evaluation_transform(config)(coloured(COLOURS["red"], 0))
    assert model(torch.as_tensor(picture, dtype=torch.float32)[None]).shape == (1, 3)


def test_a_model_that_takes_any_size_gets_pictures_of_the_one_asked_for(flowers, tmp_path):
    recipe = ImageRecipe.of(
        data=str(flowers), **{**TINY, **PLAIN, "epochs": 1, "model": "test_resnet", "model_args": {}}
    )
    train(recipe, tmp_path / "out")
    assert load(tmp_path / "out", torch.device("cpu")).config["input_size"] == [3, 16, 16]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert timm.data.resolve_model_data_config(model)["input_size"] == [3, 16, 16]


def test_the_recipe_is_the_papers(flowers, tmp_path):
    recipe = ImageRecipe.of(data="imagenet")
    paper = {
        "model": "vit_hydra_base_patch16_224", "epochs": 300, "batch_size": 1024, "learning_rate": 1e-3,
        "weight_decay": 0.05, "drop_path": 0.5, "randaugment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0,
        "erase": 0.25, "smoothing": 0.1,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in paper} == paper
    settings = {**TINY, "epochs": 20, "warm_up_epochs": 2}
    out = tmp_path / "out"
    train(ImageRecipe.of(data=str(flowers), **{**settings, "epochs": 1}), out)
    (out / "training" / "recipe.json").write_text(ImageRecipe.of(data=str(flowers), **settings).to_json())
    run = Run(ImageFolder(out), Processes(0, 1, torch.device("cpu")))
    steps, warm = run.order.steps * 20, run.order.steps * 2
    for step in (0, 1, warm, steps // 2, steps - 1):
        run.schedule.step_update(step)
        least, most = 3e-5, 3e-3
        expected = 3e-6 + step * (most - 3e-6) / warm if step < warm else (
            least + (most - least) * (1 + np.cos(np.pi * step / steps)) / 2
        )  # fmt: skip
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(expected), step
    kept = {id(p) for group in run.optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        assert (id(parameter) in kept) == (parameter.ndim < 2), name


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "levit_128s", "vit_toeplitz_dropin_tiny_patch16_224"])
def test_any_model_of_timms_takes_the_digits(model):
    model, config = create(ImageRecipe.of(model=model), 10)
    side = 8 if hasattr(model, "patch_embed") and hasattr(model, "blocks") else 32
    assert config["input_size"] == (3, side, side)
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 10)


def test_digits_are_learned_without_any_data(tmp_path, capsys):
    small = ["--epochs", "2", "--workers", "0", "--learning-rate", "5e-3"]
    assert main(["image", "train", "--out", str(tmp_path / "digits"), *small]) == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "digits" / "metrics.json").read_text())
    assert metrics["raw"]["top1"] > 0.5
    assert 0.94 < metrics["baseline"]["top1"] < 0.99
    assert f"logistic regression on the pixels {metrics['baseline']['top1']:.2%}" in said
    assert main(["image", "predict", str(tmp_path / "digits"), str(tmp_path / "digits" / "examples"),
                 "--out", str(tmp_path / "sheet.png")]) == 0  # fmt: skip
    answers = [line.partition(": ") for line in capsys.readouterr().out.splitlines() if "-is-" in line]
    assert len(answers) == 20
    assert sum(path[-5] == answer[0] for path, _, answer in answers) > 4


MISTAKES = {
    "image train --data nowhere": "nowhere is neither a folder, a .tar nor a data set that could be loaded",
    "image train --data flowers --model resnet": "model must be a name that timm knows, such as .* got resnet",
    "image train --data flowers --batch-size 64 --img-size 32 --model vit_tiny_patch16_224": (
        "there must be as many pictures to train on as in a step, 64, got 36: choose a smaller --batch-size"
    ),
    "image train --data flowers --img-size 30 --batch-size 4": "cannot be made with .*30",
    "image train --model vgg11": r"cannot be made with {'drop_path_rate': 0.1}.* --drop-path \(0: none\) change",
    "image train --data flowers --batch-size 5": "the parts of a step must be even for mixup and cutmix, got 5",
    "image train --data flowers --batch-size 8 --accumulate 3": "accumulate must divide batch_size = 8, got 3",
    "image train --data flowers --drop-path 2": "drop_path must be at most 1, got 2",
    "image train --data flowers --smoothing 1": "smoothing must be below 1",
    "image train --data flowers --scale 0.9 0.1": "scale must be two rising numbers",
    "image train --data flowers --batch-size 8 --model vit_hydra_tiny_patch4_32 --randaugment loud": (
        "randaugment must be what timm knows, such as rand-m9-mstd0.5-inc1, got loud"
    ),
    "image train --data flowers/train/red": "must hold folders of pictures, one a class",
    "image train --out out --resume": "there is no run in out to resume: start it without --resume",
    "image train --resume --overwrite": "--resume goes on with a run, --overwrite removes it",
    "image train --data flowers --out run --batch-size 8": "run already holds a run: add --resume",
    "image eval flowers": "flowers must be what hydra-ssm image train wrote",
    "image eval run --data flowers --batch-size 0": "batch_size must be at least 1, got 0",
    "image eval run --data flowers --workers -2": "workers must be at least -1, got -2",
    "image predict run flowers --out no/sheet.png": "there must be a folder no for sheet.png",
    "image predict run flowers --out empty": "the sheet must be a file, empty is a folder",
    "image predict run nothing.jpg": "there is no file or folder nothing.jpg",
    "image predict run empty": "there must be pictures to look at",
    "image predict run text.jpg": "none of 1 files holds a picture that can be read",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(command, run, flowers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("flowers").symlink_to(flowers)
    Path("run").symlink_to(run)
    Path("empty").mkdir()
    Path("text.jpg").write_text("words")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(command.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert re.search(MISTAKES[command], lines[0]), lines
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_each_picture_draws_from_a_seed_of_its_own():
    def draws(*key):
        seed = seed_drawing(*key)
        return random.random(), np.random.rand(), torch.rand(()).item(), seed

    seen = [draws(0, epoch, place) for epoch in range(3) for place in range(4)]
    assert seen == [draws(0, epoch, place) for epoch in range(3) for place in range(4)]
    assert all(len(set(own)) == 12 for own in zip(*seen, strict=True)), "of Python, NumPy and torch alike"
    torch.manual_seed(seen[5][3])
    assert torch.rand(()).item() == seen[5][2]
