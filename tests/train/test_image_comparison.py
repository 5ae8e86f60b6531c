"""The comparison of image models: alike in all else, restartable to the last bit, reported from what was measured."""

import fcntl
import importlib.util
import json
import re
import shutil
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import start, wait_until

pytest.importorskip("timm")

from hydra_ssm.bench.report import Row
from hydra_ssm.cli import main
from hydra_ssm.train.checkpoints import write_manifest
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.image.comparison import ROWS, Plan, augment, compare, prepare
from hydra_ssm.train.image.comparison import command as command_module
from hydra_ssm.train.image.comparison import jobs as jobs_module
from hydra_ssm.train.image.comparison import loop as loop_module
from hydra_ssm.train.image.comparison import speed as speed_module
from hydra_ssm.train.image.comparison.augment import MEAN, STD, Random, Strength, augmented, normalized
from hydra_ssm.train.image.comparison.command import BESIDES, seconds_of
from hydra_ssm.train.image.comparison.data import Data
from hydra_ssm.train.image.comparison.models import BASE, TOLERANCE, base, build, parameters
from hydra_ssm.train.image.comparison.plan import Job
from hydra_ssm.train.image.comparison.report import best_rates, table
from hydra_ssm.train.plans import read_plan

NOTHING = Strength(crop=0, randaugment=False, mix=0, smoothing=0)
TINY = {
    "size": "small", "width": 32, "headdim": 16, "d_state": 4, "vit_depth": 1, "patch": 16, "batch_size": 64,
    "epochs": 3, "learning_rates": (3e-3,), "further_rates": 0, "evaluate_every": 1,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "data"
    prepare(None, folder)
    for file in folder.glob("*.npy"):
        np.save(file, np.load(file)[: 320 if "train" in file.name else 80])
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    return folder


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10


def test_without_strength_a_picture_is_itself_or_its_mirror_image(pictures):
    x, target = augmented(*pictures, 10, NOTHING, Random(0, 0, CPU))
    plain = normalized(pictures[0])
    same, mirrored = ((x - y).abs().amax((1, 2, 3)) < 1e-3 for y in (plain, plain.flip(3)))
    assert (same ^ mirrored).all()
    assert 10 < same.sum() < 54
    torch.testing.assert_close(target.argmax(1), pictures[1])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(plain.double(), (pictures[0].double() / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_a_crop_moves_a_picture_by_whole_pixels_and_shows_the_mean_beside_it(pictures):
    x, _ = augmented(*pictures, 10, Strength(crop=3, randaugment=False, mix=0), Random(0, 1, CPU))
    plain = torch.nn.functional.pad(normalized(pictures[0]), (3, 3, 3, 3))
    moved = [torch.roll(y, (i, j), (2, 3))[:, :, 3:-3, 3:-3] for y in (plain, plain.flip(3)) for i in range(-3, 4)
             for j in range(-3, 4)]  # fmt: skip
    nearest = torch.stack([(x - y).abs().amax((1, 2, 3)) for y in moved]).amin(0)
    assert nearest.max() < 1e-2


def test_labels_are_mixed_in_the_proportion_of_the_pixels():
    # Two pictures of one colour each: every pixel says how much of either there is.
    x = torch.cat([torch.zeros(32, 3, 32, 32), torch.full((32, 3, 32, 32), 255)]).to(torch.uint8)
    labels = torch.arange(64) // 32
    mixed, target = augmented(x, labels, 2, Strength(0, False, mix=1, smoothing=0), Random(0, 0, CPU))
    low, high = normalized(x)[[0, -1]].mean((1, 2, 3))
    share = (mixed.mean((1, 2, 3)) - low) / (high - low)
    torch.testing.assert_close(share, target[:, 1], rtol=0, atol=1e-4)
    cut = mixed[:, 0].flatten(1).std(1) > 1e-3
    assert 16 < cut.sum() < 48  # the others are sums


def test_every_operation_of_randaugment_happens_and_a_step_is_the_same_again(pictures):
    strength = Strength(erase=0.5)
    first, again, other = (augmented(*pictures, 10, strength, Random(3, step, CPU))[0] for step in (7, 7, 8))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first != other).any()
    assert first.isfinite().all()
    smoothed = augmented(*pictures, 10, strength, Random(3, 7, CPU))[1]
    torch.testing.assert_close(smoothed.sum(1), torch.ones(64))
    assert smoothed.min() >= 0.01 - 1e-6


def test_half_of_the_pictures_are_left_alone_by_each_of_randaugments_operations():
    torch.manual_seed(0)
    x, still = torch.rand(20_000, 3, 4, 4), torch.eye(3).repeat(20_000, 1, 1)
    found, matrix = augment._randaugment(x, still, Random(0, 0, CPU))
    alone = (found == x).all(3).all(2).all(1) & (matrix == still).all(2).all(1)
    assert abs(alone.float().mean() - augment.EACH) < 0.015


def test_all_rows_have_the_parameters_of_the_vit_and_take_pictures():
    plan = Plan.of("usual", {})
    with torch.device("meta"):
        found = {row: parameters(build(row, plan, 10, 32)) for row in ROWS}
    for row, number in found.items():
        assert abs(number / found["vit"] - 1) <= TOLERANCE, row
    for row in ROWS:
        assert build(row, Plan.of("small", {}), 10, 32)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with torch.device("meta"):
        assert all(base(name, size).num_classes == 1000 for name in BASE for size in (64, 1024))


def test_pictures_come_from_a_compressed_tar_or_a_folder_alike(tmp_path):
    rng = np.random.default_rng(0)
    for part, number in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / "set" / part / name / f"{i}.png"
                )
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "set", "set")
    prepare(tmp_path / "set.tar.xz", tmp_path / "a")
    prepare(tmp_path / "set", tmp_path / "b")
    a, b = Data(tmp_path / "a"), Data(tmp_path / "b")
    assert a.classes == b.classes == ["cat", "dog"]
    assert (len(a.train), len(a.test)) == (6, 4)
    torch.testing.assert_close(a.train.pixels, b.train.pixels, rtol=0, atol=0)
    original = torch.from_numpy(np.array(Image.open(tmp_path / "set/train/cat/1.png"))).permute(2, 0, 1)
    torch.testing.assert_close(a.train.pixels[1], original, rtol=0, atol=0)
    (tmp_path / "set" / "test" / "dog" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"test/dog/0.png of .*set cannot be read"):
        prepare(tmp_path / "set", tmp_path / "c")
    with pytest.raises(UserError, match="must hold train/CLASS/PICTURE and test/CLASS/PICTURE"):
        prepare(tmp_path / "set" / "train", tmp_path / "c")


def test_a_class_is_the_folder_right_below_the_part(tmp_path):
    for place, folder in enumerate(("cat/2019", "test/2019", "cat/.ipynb_checkpoints", ".git/2019", "test")):
        for part in ("train", "test"):
            (tmp_path / "set" / part / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (place, 0, 0)).save(tmp_path / "set" / part / folder / "0.png")
    prepare(tmp_path / "set", tmp_path / "a", size=8)
    data = Data(tmp_path / "a")
    assert data.classes == ["cat", "test"]
    for part in (data.train, data.test):
        shown = zip(part.pixels[:, 0, 0, 0].tolist(), part.labels.tolist(), strict=True)
        assert sorted(shown) == [(0, 0), (1, 1), (4, 1)]


def test_rates_are_chosen_on_training_pictures_alone(digits):
    data = Data(digits)
    train, held = data.tuning()
    assert len(train) + len(held) == len(data.train)
    together = torch.cat([train.pixels, held.pixels]).flatten(1).long().sum(1).sort()[0]
    torch.testing.assert_close(together, data.train.pixels.flatten(1).long().sum(1).sort()[0])


def saving_always(*given, **settings):
    loop_module.SAVE_AFTER = 0
    compare(*given, **settings)


def test_a_killed_comparison_goes_on_to_the_same_bits(digits, tmp_path):
    whole = compare(digits, tmp_path / "whole", rows=["hydra_vit"], seeds=[1], stages=["runs"], **TINY)
    out = tmp_path / "killed"
    process = start(saving_always, digits, out, rows=["hydra_vit"], seeds=[1], stages=["runs"], **TINY)
    wait_until(lambda: [*out.glob("runs/*/checkpoint-*")], process)
    process.kill()
    process.join()
    assert not list(out.glob("runs/*.json"))
    again = compare(digits, out, rows=["hydra_vit"], seeds=[1], stages=["runs"], **TINY)
    assert again["runs"][0]["curve"] == whole["runs"][0]["curve"]
    assert (out / "images.png").stat().st_size > 5000
    with pytest.raises(UserError, match=r"epochs is 3 in .*killed, got 4: choose another --out"):
        compare(digits, out, epochs=4)


@pytest.mark.usefixtures("warm_processes")
def test_a_comparison_that_runs_out_of_time_keeps_what_it_has_and_goes_on(digits, tmp_path, capsys):
    settings = {**TINY, "learning_rates": (1e-3, 3e-2), "epochs": 1, "tuning_epochs": 1}
    stages = ["speed", "tuning", "runs"]
    nothing = compare(digits, tmp_path / "out", rows=["vit", "add"], seeds=[0], stages=stages, limit=0, **settings)
    assert nothing["rows"] == []
    compare(digits, tmp_path / "out", rows=["vit", "add"], stages=stages[:2], **settings)
    options = ["--rows", "vit", "add", "--seeds", "0", "--jobs", "2", "--small", "--data", str(digits)]
    assert main(["image", "compare", "--out", str(tmp_path / "out"), *options]) == 0
    report = json.loads((tmp_path / "out" / "images.json").read_text())
    plan = read_plan(Plan, tmp_path / "out")
    for row in report["rows"]:
        tried = {r["learning_rate"]: max(r["top1"], r["top1_ema"]) for r in report["tuning"] if r["row"] == row["row"]}
        assert tried.keys() == {1e-3, 3e-2}
        assert tried[row["learning_rate"]] == max(tried.values())
        assert best_rates(tmp_path / "out", plan, [row["row"]]) == {row["row"]: row["learning_rate"]}
        assert row["speed"]["pictures_per_second_step"] > 0
        run = next(r for r in report["runs"] if r["row"] == row["row"])
        assert row["top1"] == {"mean": run["top1"], "std": 0.0}
        assert run["steps"] == 320 // 64
    assert "vit" in capsys.readouterr().out


def test_a_row_whose_best_rate_is_the_last_tries_further():
    plan = Plan.of("usual", {"learning_rates": (1.0, 2.0, 4.0), "further_rates": 2})
    assert plan.further({1.0: 5, 2.0: 6, 4.0: 5}) is None
    assert plan.further({1.0: 5, 2.0: 6, 4.0: 7}) == 8
    assert plan.further({1.0: 8, 2.0: -1, 4.0: -1}) == 0.5
    assert plan.further({1.0: 5, 2.0: 6, 4.0: 7, 8.0: 6}) is None
    assert plan.further({1.0: 5, 2.0: 6, 4.0: 7, 8.0: 8}) == 16
    assert plan.further({1.0: 5, 2.0: 6, 4.0: 7, 8.0: 8, 16.0: 9}) is None  # enough
    assert Plan.of("usual", {"learning_rates": (1.0,)}).further({1.0: 5}) is None


def test_epochs_are_fewer_where_time_is_short_for_all_rows_alike():
    plan = Plan.of("usual", {"epochs": 30, "tuning_epochs": 6})

    def seconds(p):
        return 10 * p.epochs + p.tuning_epochs

    assert plan.within(306, seconds) == plan
    longer = Plan.of("usual", {"tuning_epochs": 10})
    assert longer.within(310, seconds) == longer
    assert longer.within(206, seconds).tuning_epochs == round(10 * 19 / 30)
    assert (plan.within(204, seconds).epochs, plan.within(204, seconds).tuning_epochs) == (20, 4)
    assert plan.within(0, seconds).epochs == 5


def test_a_budget_lowers_the_epochs_before_the_first_run_and_the_same_call_goes_on(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(command_module, "measure_models", lambda *given: None)
    monkeypatch.setattr(command_module, "seconds_of", lambda folder, facts, rows, seeds, plan: seeds * plan.epochs)
    told: list[str] = []
    given = {"rows": ["vit"], "seeds": [0, 1], "stages": ["speed"], "say": told.append}
    for _ in range(2):
        report = compare(digits, tmp_path, **given, **TINY | {"epochs": 9}, budget=14)
        assert report["plan"]["epochs"] == 7
    assert sum("7 epochs, " in line and "about 14 s" in line for line in told) == 2
    (tmp_path / "runs" / "vit-0.003-seed-0").mkdir(parents=True)  # too late
    assert compare(digits, tmp_path, **given, budget=12)["plan"]["epochs"] == 7
    assert "more than the budget of 12 s" in told[-2]
    compare(digits, tmp_path, **given | {"stages": ["tuning"]}, budget=12)
    assert any("the budget has no effect" in line for line in told)


def test_the_estimate_is_of_the_steps_of_the_rows_that_are_compared(tmp_path):
    rows = {"vit": {"step": 9.0, "graph_step": 8.0}, "add": {"step": 8.0, "graph_step": None},
            "toeplitz": {"step": 100.0, "graph_step": 50.0}}  # fmt: skip
    (tmp_path / "speed.json").write_text(json.dumps({"rows": rows, "machine": {}}), encoding="utf-8")
    facts = {"train_pictures": 10_240}
    plan = Plan.of("usual", {"epochs": 10, "tuning_epochs": 5, "learning_rates": (1e-3,)})
    step = 0.008 + BESIDES
    assert seconds_of(tmp_path, facts, ["vit", "add", "low_rank"], 3, plan) == pytest.approx(2 * step * 20 * 3 * 10)
    plan = replace(plan, learning_rates=(1e-3, 2e-3), further_rates=0)  # nine tenths of the pictures
    assert seconds_of(tmp_path, facts, ["vit"], 1, plan) == pytest.approx(step * 20 * (10 + 2 * 5 * 0.9))


def test_a_wrong_row_does_not_lose_the_others_and_is_tried_again_last(digits, tmp_path, monkeypatch):
    def wrong(row, *given):
        if row == "vit":
            raise RuntimeError("out of\nluck")
        return build(row, *given)

    def measured(name, batch, length, make, device):
        assert make()["step"]() is not None
        return Row(name, batch, length, forward=1.0, step=1.0)

    monkeypatch.setattr(speed_module, "measure", measured)
    settings = TINY | {"epochs": 1}
    out, rows, told = tmp_path / "out", ["vit", "add"], []
    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "build", wrong)
        patched.setattr(speed_module, "build", wrong)
        with pytest.raises(UserError, match=r"1 runs failed.*vit, 0.003, seed 0: out of luck"):
            compare(digits, out, rows=rows, seeds=[0], stages=["speed", "runs"], say=told.append, **settings)
        report = json.loads((out / "images.json").read_text())
        assert [r["row"] for r in report["runs"]] == ["add"]
        assert {r["row"]: r["speed"]["note"] for r in report["rows"]} == {"add": "", "vit": "failed: out of luck"}
        assert report["failed"] == {"vit-0.003-seed-0": ["luck"]}
        assert "in wrong" in (out / "runs" / "vit-0.003-seed-0.failed").read_text()
    order: list[str] = []
    monkeypatch.setattr(loop_module, "build", lambda row, *given: order.append(row) or build(row, *given))
    report = compare(digits, out, rows=rows, seeds=[0, 1], stages=["speed", "runs"], say=told.append, **settings)
    assert order == ["vit", "add", "vit"]  # of seed 1, then what failed
    assert {r["row"]: len(r["seeds"]) for r in report["rows"]} == {"add": 2, "vit": 2}
    assert all(r["speed"]["step"] > 0 for r in report["rows"])
    assert report["failed"] == {}


def test_two_comparisons_do_not_share_a_folder(digits, tmp_path):
    tmp_path.joinpath("out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is at work in .*out: choose another --out, or wait"):
            compare(digits, tmp_path / "out", **TINY)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_runs_whose_process_lost_its_device_are_begun_in_another(digits, tmp_path, monkeypatch):
    states = iter([True, True, False, True])  # of the first round: a run, one that fails, one that cannot begin
    monkeypatch.setattr(jobs_module, "device_works", lambda: next(states))

    def train(out, data, job, *given):
        if job.row == "add":
            raise RuntimeError("illegal memory access")
        return {"diverged": None, "top1": 1.0, "top1_ema": 1.0, "seconds": 1.0}

    monkeypatch.setattr(jobs_module, "train", train)
    todo, told = [Job(row, 1.0, 0, False) for row in ("vit", "add", "toeplitz")], []
    ended = jobs_module.run_all(tmp_path, digits, todo, 1, float("inf"), told.append)
    assert ended.failed == ["add, 1, seed 0: illegal memory access"]
    assert [line.split(",")[0] for line in told] == ["vit", "add", "toeplitz"]
    monkeypatch.setattr(jobs_module, "device_works", lambda: False)
    with pytest.raises(UserError, match="have no device that works"):
        jobs_module.run_all(tmp_path, digits, todo, 1, float("inf"), told.append)


def test_what_came_back_from_a_machine_goes_on_on_another(digits, tmp_path):
    """Records, without pictures and checkpoints, are enough."""
    settings = {"rows": ["vit"], "stages": ["runs"], **TINY, "epochs": 1}
    first = compare(digits, tmp_path / "one", seeds=[0], **settings)
    kept = tmp_path / "two"
    shutil.copytree(tmp_path / "one", kept, ignore=shutil.ignore_patterns("data", "checkpoint-*"))
    again = compare(digits, kept, seeds=[0, 1], **settings)
    assert again["runs"][0] == first["runs"][0]
    assert again["rows"][0]["seeds"] == [0, 1]


def test_a_comparison_is_of_the_pictures_that_it_began_with(digits, tmp_path):
    """Whatever it is asked for: nothing is reported of others under their name."""
    options = {"rows": ["vit"], "stages": ["tuning"], **TINY}
    compare(str(digits), tmp_path / "of a folder", **options)
    other = tmp_path / "data"  # of the same name
    shutil.copytree(digits, other)
    labels = np.load(other / "test-labels.npy")
    np.save(other / "test-labels.npy", labels[::-1])
    (other / "manifest.json").unlink()
    write_manifest(other)
    with pytest.raises(UserError, match=r"is of digits \(320 and 80 pictures\), got others of digits .*another --out"):
        compare(other, tmp_path / "of a folder", **options)

    shutil.copytree(digits, tmp_path / "cmp" / "data")
    compare(None, tmp_path / "cmp", **options)
    for wrong in ("mine", "does-not-exist.tar"):
        with pytest.raises(UserError, match=f"the pictures in .*data are those of digits, got {wrong}: choose another"):
            compare(tmp_path / wrong, tmp_path / "cmp", **options)
    compare(None, tmp_path / "cmp", **options)
    shutil.rmtree(tmp_path / "cmp" / "data")  # as on another machine
    with pytest.raises(UserError, match=r"is of digits .*, got others of digits \(1,438 and 359 pictures\)"):
        compare(None, tmp_path / "cmp", **options)


def test_resolutions_keep_the_number_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_module, "TOKENS", 32)
    monkeypatch.setattr(speed_module, "BASE", {"vit": "vit_tiny_patch16_224"})
    monkeypatch.setattr(
        speed_module, "base", lambda name, size: build("vit", Plan.of("small", {"patch": 16}), 10, size)
    )
    speed_module.measure_resolutions(tmp_path, float("inf"), print, pixels=(32, 64))
    found = json.loads((tmp_path / "resolutions.json").read_text())["rows"]
    assert {name: (r["batch"], r["length"]) for name, r in found.items()} == {"vit 32": (8, 4), "vit 64": (2, 16)}


def test_mistakes_are_told():
    for given, told in (
        ({"rows": ["mamba"]}, "rows must be of vit, hydra_vit, .* got mamba"),
        ({"stages": ["all"]}, "stages must be of speed, tuning, runs, resolutions, got all"),
        ({"depth": 3}, "there is no setting depth"),
        ({"batch_size": 3}, "batch_size must be even"),
        ({"learning_rates": (1e-3, 5e-4)}, "learning_rates must rise"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"size": "huge"}, "size must be one of usual, small, got huge"),
    ):
        with pytest.raises(UserError, match=told):
            compare(None, "nowhere", **given)
    assert not Path("nowhere").exists()
    assert str(Job("vit", 1e-3, 0, True)) == "vit, 0.001, tuning"


def test_the_report_becomes_tables_of_a_page(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "docs" / "image_figures.py"
    spec = importlib.util.spec_from_file_location("image_figures", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run = {
        "row": "vit",
        "seed": 0,
        "diverged": None,
        "curve": [{"epoch": 1, "loss": 1.0, "top1": 50.0, "top1_ema": 60.0}],
        "top1": 50.0,
        "top1_ema": 60.0,
    }
    runs = [
        run,
        run | {"seed": 1, "top1": 52.0},
        run | {"seed": 2, "diverged": "in epoch 1"},
        run | {"row": "hydra_vit", "seed": 1, "top1": 55.0, "top1_ema": 63.0},
        run | {"row": "hydra_vit", "top1": 51.0, "top1_ema": 62.0},
        run | {"row": "hydra_vit", "seed": 2, "top1": 99.0},
    ]
    speed = {"pictures_per_second_step": 1234.5, "peak": 99.0, "graph": False, "device": "cuda"}
    mean = {"mean": 60.0, "std": 1.5}
    report = {
        "date": "today", "machine": {"device": "GPU", "torch": "2"}, "plan": asdict(Plan.of("usual", {})),
        "data": {"source": "cifar", "train_pictures": 9, "test_pictures": 3, "size": 32}, "runs": runs,
        "rows": [{"row": "vit", "about": "ViT", "seeds": [0, 1], "diverged": 1, "parameters": 2_000_000, "speed": speed,
                  "learning_rate": 1e-3, "rate_at_edge": True,
                  "top1": mean, "top1_ema": mean, "top5": mean, "top5_ema": mean}],
        "tuning": [{"row": "vit", "learning_rate": 1e-3, "diverged": None, "top1": 40.0, "top1_ema": 41.0},
                   {"row": "vit", "learning_rate": 2e-3, "diverged": "in epoch 1"}],
        "failed": {"add-0.001-seed-0": ["RuntimeError: out of luck"]},
        "resolutions": {"machine": {}, "rows": {
            "vit 64": {"pixels": 64, "length": 16, "note": "", "pictures_per_second_forward": 9000.0, **speed},
            "hydra_vit 64": {"pixels": 64, "length": 16, "note": "out of memory"}}},
    }  # fmt: skip
    page, file = tmp_path / "results.md", tmp_path / "images.json"
    (tmp_path / "pictures").mkdir()
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(script, "FILE", file)
    script.main()
    assert "has not been run yet" in page.read_text()
    file.write_text(json.dumps(report), encoding="utf-8")
    for _ in range(2):  # over what is there
        script.main()
    text = page.read_text()
    line = "| vit | 2,000,000 | 0.001! | 60.00 ± 1.50 | 60.00 ± 1.50 | 60.00 ± 1.50 | 1,234* | 99 | 2, 1 diverged |"
    assert text.count(line) == 1
    assert "`!` the best learning rate is the highest or the lowest" in text
    assert "`*` no CUDA graph" in text
    lead = "hydra_vit less vit, seed by seed (2): top-1 averaged +2.50 ± 0.71, raw +2.00 ± 1.41 points"
    assert text.count(lead) == table(report).count(lead) == 1
    assert "Failed: add-0.001-seed-0 (RuntimeError: out of luck)." in text
    assert "| vit | 41.00 | diverged |" in text
    shown = table(report)  # the same for a terminal
    assert re.search(r"^vit +2,000,000 +0.001! .* 1,234\* +99  2, 1 diverged$", shown, re.MULTILINE)
    assert "! the best learning rate" in shown
    assert "small:" not in shown
    assert "it shows that the command works" in table(report | {"plan": asdict(Plan.of("small", {}))})
    assert "| 64 | 16 | 9,000 | 1,234 | 99 | out of memory | - | - |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert (tmp_path / "pictures" / "images.png").exists()
