"""`hydra-ssm glue`: official metrics, files as they are distributed, and results that no interruption changes."""

import json
import math
import multiprocessing
import operator
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from processes import alive, children, wait_until
from scipy import stats
from sklearn import metrics as sk
from small_glue import write, write_glue, write_model
from small_text import NOUNS

from hydra_ssm.cli import main
from hydra_ssm.train import workers
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.finetune import engine, glue, metrics
from hydra_ssm.train.finetune.data import Examples, find, read_tsv
from hydra_ssm.train.finetune.run import Key, Plan, train
from hydra_ssm.train.finetune.tasks import TASKS, choose

QUICK = {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3}
SHORT = {"epochs": 0.5, "batch_size": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_model(tmp_path_factory.mktemp("glue") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def done(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[str]]:
    """All tasks with two seeds in one process: the folder, what JSON has and what was said."""
    out, said = tmp_path_factory.mktemp("out") / "glue", []
    report = glue(model, data, out, seeds=(0, 1), jobs=1, say=said.append, **QUICK)
    return out, report, said


def records(out: Path) -> dict[str, dict]:
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (out / "runs").glob("*.json")}
    for record in found.values():
        record.pop("seconds", None)
    return found


# ------------------------------------------------------------------------------------------------------------ metrics


def counts(labels: np.ndarray, found: np.ndarray) -> tuple[int, int, int, int]:
    pairs = list(zip(labels.tolist(), found.tolist(), strict=True))
    return pairs.count((1, 1)), pairs.count((0, 1)), pairs.count((1, 0)), pairs.count((0, 0))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_classes_are_scikit_learns_and_their_definitions(seed: int) -> None:
    labels, found = np.random.default_rng(seed).integers(0, 2, (2, 30))
    tp, fp, fn, tn = counts(labels, found)
    assert metrics.accuracy(labels, found) == sk.accuracy_score(labels, found) == pytest.approx((tp + tn) / 30)
    assert metrics.f1(labels, found) == sk.f1_score(labels, found) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    bottom = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(labels, found) == sk.matthews_corrcoef(labels, found)
    assert metrics.matthews(labels, found) == pytest.approx((tp * tn - fp * fn) / bottom)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys_and_their_definitions(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 6, 25) / 1.0  # with ties
    found = labels + draw.normal(size=25)

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(), y - y.mean()
        return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))

    ranks = [np.array([(a < x).sum() + ((a == x).sum() + 1) / 2 for x in a]) for a in (labels, found)]
    assert metrics.pearson(labels, found) == pytest.approx(correlation(labels, found), abs=1e-12)
    assert metrics.pearson(labels, found) == pytest.approx(stats.pearsonr(labels, found).statistic, abs=1e-12)
    assert metrics.spearman(labels, found) == pytest.approx(correlation(*ranks), abs=1e-12)
    assert metrics.spearman(labels, found) == pytest.approx(stats.spearmanr(labels, found).statistic, abs=1e-12)


def test_constant_answers_score_zero_and_not_nan() -> None:
    labels, constant = np.array([0.0, 1.0, 1.0]), np.zeros(3)
    assert metrics.pearson(labels, constant) == metrics.spearman(labels, constant) == 0
    assert metrics.matthews(labels, constant) == metrics.f1(labels, constant) == 0
    assert metrics.pearson(labels[:1], labels[:1]) == 0


def test_each_task_has_its_official_metrics() -> None:
    expected = {
        "MNLI": {"accuracy"}, "QNLI": {"accuracy"}, "RTE": {"accuracy"}, "SST-2": {"accuracy"},
        "QQP": {"accuracy", "f1"}, "MRPC": {"accuracy", "f1"}, "STS-B": {"pearson", "spearman"},
    }  # fmt: skip
    assert {name: set(task.metrics) for name, task in TASKS.items() if name != "CoLA"} == expected
    assert TASKS["CoLA"].score == ("matthews",)
    assert TASKS["STS-B"].score == ("spearman",)
    labels = np.array([0, 1, 1, 0])
    outputs = np.array([[2, 1], [0, 1], [3, 0], [1, 0]])  # found: 0 1 0 0
    assert TASKS["MRPC"].scores(labels, outputs) == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    scores = TASKS["STS-B"].scores(np.array([0.0, 2.5, 5.0]), np.array([[1.0], [2.0], [9.0]]))
    assert scores["spearman"] == pytest.approx(1)
    assert scores["pearson"] < 0.95


# ------------------------------------------------------------------------------------------------------------- recipe


def test_the_recipe_is_the_papers() -> None:
    found = {name: (t.learning_rate, t.weight_decay, t.epochs, t.after_mnli) for name, t in TASKS.items()}
    assert found == {
        "MNLI": (1e-4, 5e-6, 2, False), "QNLI": (5e-5, 1e-6, 7, False), "QQP": (5e-5, 3e-6, 3, False),
        "RTE": (1e-5, 1e-6, 3, True), "SST-2": (5e-5, 3e-6, 2, False), "MRPC": (8e-5, 8e-6, 10, True),
        "CoLA": (1e-4, 5e-6, 10, False), "STS-B": (3e-5, 3e-6, 10, True),
    }  # fmt: skip
    assert {t.batch_size for t in TASKS.values()} == {16, 32}
    recipe = Plan("m", "", "d").recipe(TASKS["MRPC"], 3)
    assert (recipe.length, recipe.seed, recipe.batch_size) == (256, 3, 32)


def test_the_trainer_follows_the_recipe(model: Path, tmp_path: Path) -> None:
    """Warm-up over 6 %, then linear to 0; decoupled decay, none of it on A_log, dt_bias, D and biases."""
    net, words = engine.load_model(model, "sequence", 0, num_labels=2), engine.load_words(model)
    examples = Examples(first=["the cat"] * 100, labels=[0, 1] * 50)
    recipe = engine.Recipe(1e-3, 4e-5, 1, 1)
    rates = []

    class Watch(engine.TrainerCallback):
        def on_step_begin(self, *_, optimizer, **__) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = engine.make_trainer(net, words, engine.Encoded(words, examples, 256), recipe, tmp_path, [Watch()])
    trainer.train()
    expected = [1e-3 * min(step / 6, (100 - step) / 94) for step in range(100)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-12)
    decayed, rest = trainer.optimizer.param_groups
    assert decayed["weight_decay"] * decayed["initial_lr"] == pytest.approx(4e-5)
    assert rest["weight_decay"] == 0
    assert decayed["betas"] == (0.9, 0.98)
    plain = {id(p) for p in rest["params"]}
    assert all(
        id(p) in plain for name, p in net.named_parameters() if name.endswith(("A_log", "dt_bias", ".D", "bias"))
    )
    assert id(net.classifier.weight) not in plain


def test_a_batch_is_padded_and_the_outputs_keep_their_order(model: Path, tmp_path: Path) -> None:
    net, words = engine.load_model(model, "sequence", 0, num_labels=3), engine.load_words(model)
    texts = ["the cat sees a dog", "tree", "a king likes", "the boat the boat the boat the boat"]
    rows = engine.Encoded(words, Examples(first=texts, second=texts[::-1]), 12)
    assert max(map(len, rows.ids)) == 12
    trainer = engine.make_trainer(net, words, rows, engine.Recipe(1e-3, 0, 1, 4, 12), tmp_path, [])
    found = engine.predict(trainer, rows)
    net.eval()
    for text, other, outputs in zip(texts, texts[::-1], found, strict=True):
        alone = net(**words(text, other, truncation=True, max_length=12, return_tensors="pt")).logits[0]
        np.testing.assert_allclose(outputs, alone.detach().numpy(), atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_as_it_is_distributed(task: str, data: Path) -> None:
    """Quotes are not special, MRPC begins with a byte order mark, CoLA has no header but for its test set."""
    found = find(str(data), TASKS[task])
    train = found.train()
    assert len(train) == len(train.labels) == 64
    assert train.remarks == []
    assert (train.second is not None) == (task not in ("CoLA", "SST-2"))
    assert all(text.startswith("the ") and text.count('"') == 1 for text in train.first)
    kinds = [5.0 * i for i in range(2)] if task == "STS-B" else range(max(2, len(TASKS[task].classes)))
    assert all(NOUNS[kinds.index(label)] in text for text, label in zip(train.first, train.labels, strict=True))
    assert {len(part()) for part in found.dev.values()} == {32}
    assert set(found.test) == ({"MNLI-m", "MNLI-mm"} if task == "MNLI" else {task})
    for part in found.test.values():
        assert part().index == list("01234")
        assert part().labels is None


def test_broken_lines_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "QQP" / "train.tsv"
    write(path, "QQP", 4)
    lines = path.read_bytes().split(b"\n")
    lines[2:2] = [
        b"7\tx",
        b"",
        b"\xff" + b"\ta" * 5,
        "1\t2\t3\ta\u2028b\x0b\x85c\td\t1\r".encode(),
        b"1\t2\t3\ta\tb\tno",
    ]
    path.write_bytes(b"\n".join(lines))
    found = read_tsv(path, TASKS["QQP"], labelled=True)
    assert len(found) == 5
    assert found.first[1] == "a\u2028b\x0b\x85c"
    assert found.remarks == [
        f"{path}: 3 lines (3, 4, 5) left out, broken, not of 6 columns",
        f"{path}: 1 line (7) left out, without one of the labels",
    ]
    path.write_bytes(b"id\tquestion1\n1\ta\n")
    with pytest.raises(UserError, match=r"must have a column sentence2 or question2 .* it has id, question1"):
        read_tsv(path, TASKS["QQP"], labelled=True)
    path.write_bytes(b"question1\tquestion2\tlabel\n1\n")
    with pytest.raises(UserError, match=r"must hold examples, it holds none: .* 1 line \(2\) left out"):
        read_tsv(path, TASKS["QQP"], labelled=True)


def test_names_of_tasks_are_read_however_they_are_spelled() -> None:
    assert choose(["stsb", "SST2", "MNLI"]) == ["MNLI", "SST-2", "STS-B"]
    assert choose(["all"]) == choose([]) == list(TASKS)


def test_the_hubs_data_set_is_the_same(model: Path, tmp_path: Path) -> None:
    """As its snapshot lies in a folder, and as save_to_disk leaves it; labels are numbers, -1 in the test set."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "mrpc").mkdir()
    parts = {
        split: datasets.Dataset.from_dict(
            {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": labels, "idx": [4, 7, 9]}
        )
        for split, labels in {"train": [0, 1, -1], "validation": [1, 0, 1], "test": [-1] * 3}.items()
    }
    for split, part in parts.items():
        part.to_parquet(tmp_path / "mrpc" / f"{split}-00000-of-00001.parquet")
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "disk" / "MRPC")
    for folder in (tmp_path, tmp_path / "disk"):
        found = find(str(folder), TASKS["MRPC"])
        train = found.train()
        assert (train.first, train.second, train.labels) == (["a", "b"], ["d", "e"], [0, 1])
        assert "1 rows without a label" in train.remarks[0]
        assert found.test["MRPC"]().index == ["4", "7", "9"]
    assert "could not be loaded" in find("someone/something", TASKS["MRPC"])


# --------------------------------------------------------------------------------------------------------- whole runs


def test_all_tasks_are_learned_and_the_table_has_means_and_spreads(done: tuple[Path, dict, list[str]]) -> None:
    out, report, said = done
    assert set(report["tasks"]) == set(TASKS)
    for name, task in report["tasks"].items():
        scores = [100 * run["score"] for run in report["runs"] if run["task"] == name]
        assert len(scores) == 2
        assert task["mean"] == pytest.approx(mean(scores))
        assert task["spread"] == pytest.approx(stdev(scores))
    assert report["tasks"]["SST-2"]["mean"] > 90  # the label is a word of the text
    assert report["tasks"]["STS-B"]["mean"] > 80
    by_seed = [mean(r["score"] for r in report["runs"] if r["seed"] == seed) for seed in (0, 1)]
    assert report["average"]["mean"] == pytest.approx(100 * mean(by_seed))
    assert report["average"]["spread"] == pytest.approx(100 * stdev(by_seed))
    lines = said[-2].splitlines()
    assert lines[0].split() == [*TASKS, "average"]
    cell = report["tasks"]["CoLA"]
    assert f"{cell['mean']:.1f} ± {cell['spread']:.1f}" in lines[1]
    assert lines[3].split()[-1] == "84.3"
    assert json.loads((out / "glue.json").read_text(encoding="utf-8")) == report


def test_both_parts_of_mnli_are_scored(done: tuple[Path, dict, list[str]]) -> None:
    record = records(done[0])["MNLI-seed-0.json"]
    assert set(record["scores"]) == {"accuracy_m", "accuracy_mm"}
    assert record["score"] == pytest.approx(mean(record["scores"].values()))


def test_rte_mrpc_and_stsb_start_from_the_mnli_model_of_their_seed(done: tuple[Path, dict, list[str]]) -> None:
    found = {(r["task"], r["seed"]): r["start"] for r in records(done[0]).values()}
    assert found == {(t, s): "MNLI" if t in ("RTE", "MRPC", "STS-B") else "model" for t in TASKS for s in (0, 1)}
    saved = [engine.load_model(done[0] / "models" / f"MNLI-seed-{s}", "sequence", 0) for s in (0, 1)]
    assert saved[0].config.id2label == dict(enumerate(("entailment", "neutral", "contradiction")))
    again = engine.load_model(done[0] / "models" / "MNLI-seed-0", "sequence", 5, num_labels=1)
    torch.testing.assert_close(again.pooler.weight, saved[0].pooler.weight)
    torch.testing.assert_close(again.model.state_dict(), saved[0].model.state_dict())
    assert not torch.equal(saved[0].pooler.weight, saved[1].pooler.weight)


def test_predictions_have_the_official_format(done: tuple[Path, dict, list[str]], data: Path) -> None:
    folder = done[0] / "predictions" / "seed-1"
    assert {p.stem for p in folder.iterdir()} == {*TASKS, "MNLI-m", "MNLI-mm"} - {"MNLI"}
    for path in folder.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "index\tprediction"
        index, answers = zip(*(line.split("\t") for line in lines[1:]), strict=True)
        assert index == tuple("01234")
        if path.stem == "STS-B":
            assert all(0 <= float(answer) <= 5 for answer in answers)
        else:
            assert set(answers) <= set(TASKS[path.stem.partition("-m")[0]].words)
    rows = [line.split("\t")[0] for line in (data / "SST-2" / "test.tsv").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6


def test_a_finished_run_is_not_run_again_and_seeds_are_added(
    done: tuple[Path, dict, list[str]], model: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(done[0], out := tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    said: list[str] = []
    report = glue(model, data, out, tasks=["sst2"], seeds=(0, 2), jobs=1, say=said.append, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert report["tasks"]["SST-2"]["seeds"] == [0, 1, 2]
    assert any(text.startswith("SST-2, seed 2: accuracy ") and text.endswith("(2 of 2)") for text in said)
    with pytest.raises(UserError, match=r"epochs is 4 in the runs that .* holds, got 3: choose another --out"):
        glue(model, data, out, **{**QUICK, "epochs": 3})


def test_a_missing_task_is_named_and_left_out(model: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "RTE", tmp_path / "glue" / "rte")
    said: list[str] = []
    report = glue(
        model, tmp_path / "glue", tmp_path / "out", tasks=["rte", "cola"], seeds=[0], jobs=1, say=said.append, **SHORT
    )
    assert f"CoLA is left out: there is no folder {tmp_path / 'glue' / 'CoLA'}" in said
    assert f"MNLI is left out: there is no folder {tmp_path / 'glue' / 'MNLI'}" in said
    assert "RTE: without MNLI, from the model itself" in said
    assert set(report["tasks"]) == {"RTE"}
    assert report["average"]["tasks"] == 1
    assert "average of 1" in said[-2]


def test_mnli_is_run_for_those_that_start_from_it_but_for_direct_ones(model: Path, data: Path, tmp_path: Path) -> None:
    for direct, expected in ((False, {"MNLI", "RTE"}), (True, {"RTE"})):
        out = tmp_path / str(direct)
        report = glue(model, data, out, tasks=["rte"], seeds=[0], jobs=1, direct=direct, say=len, **SHORT)
        assert set(report["tasks"]) == expected
        assert (out / "models").exists() != direct


def test_a_diverged_run_is_a_result(model: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    rate = {**SHORT, "epochs": 3, "learning_rate": 1e30}
    report = glue(model, data, tmp_path / "o", tasks=["rte"], seeds=[0], jobs=1, say=said.append, **rate)
    assert report["tasks"] == {}
    assert "MNLI, seed 0: diverged by step " in said[-2]
    assert "RTE, seed 0: diverged with MNLI, from which it starts" in said[-2]
    json.loads((tmp_path / "o" / "glue.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_jobs_are_spread_over_the_gpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpus(named: str | None, count: int) -> list[str]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        return workers.gpus()

    assert gpus(None, 2) == ["0", "1"]
    assert gpus("GPU-a", 1) == ["GPU-a"]
    assert gpus("", 0) == gpus("3,5", 0) == []  # none, or none that works
    assert gpus("7,9", 2) == ["7", "9"]
    assert [workers.at_once(jobs) for jobs in (1, 2, 3, 6)] == [1, 1, 2, 3]
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(workers, "begin", operator.is_)  # quick: imports nothing of ours
    with ExitStack() as stack:
        pools = workers._processes(3, context, None, stack)
        seen = [pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() for pool in pools]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,9"
    assert seen == ["7", "9", "7"]


@pytest.mark.skipif(os.name != "posix", reason="signals are sent to a group of processes")
def test_a_process_outlives_signals_before_it_works_and_is_told_of_if_it_dies_without_a_run() -> None:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        until = workers.Until(context.Event(), float("inf"))
        (pool,) = workers._processes(1, context, until, stack)
        (process,) = pool._processes
        os.kill(process, signal.SIGTERM)  # as Control-C or `timeout` does to all, while it imports
        assert pool.submit(int).result() == 0
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: pool._broken)
        with pytest.raises(UserError, match="a process has died, with RTE, seed 0"):
            workers._result(workers._submitted(pool, str, Key("RTE", 0)), Key("RTE", 0))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


class AfterSteps:
    """Time is over after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps + 1  # it is asked once before the first

    def over(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_run_goes_on_from_its_step_to_the_same_result(
    done: tuple[Path, dict, list[str]], model: Path, data: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    glue(model, data, tmp_path, tasks=["cola"], seeds=[0], limit=0, say=said.append, **QUICK)
    assert records(tmp_path) == {}
    assert "1 of 1 runs are not finished: the same command goes on" in said
    key = Key("CoLA", 0)
    for steps in (3, 9):
        assert train(tmp_path, key, AfterSteps(steps)) is None
        assert list(key.folder(tmp_path).glob("checkpoint-*"))
    train(tmp_path, key, AfterSteps(10_000))
    assert not key.folder(tmp_path).exists()
    assert records(tmp_path) == {n: r for n, r in records(done[0]).items() if n == "CoLA-seed-0.json"}


@pytest.mark.parametrize("package", ["scipy", "sklearn"])
def test_what_is_missing_is_named_before_anything_is_read(package: str, tmp_path: Path) -> None:
    class Missing:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == package:
                raise ModuleNotFoundError(name=package)

    with pytest.MonkeyPatch.context() as patch:
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            patch.delitem(sys.modules, module)
        patch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
        with pytest.raises(ImportError, match=rf'{package} is not installed: pip install "hydra-ssm\[train\]"'):
            glue(tmp_path / "nowhere", tmp_path)


def test_glue_without_its_folders_is_a_mistake(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model)
    Path("glue").symlink_to(data)
    Path("foreign").mkdir()
    Path("foreign", "thesis.tex").touch()
    shutil.copytree(model, "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    mistakes = {
        "model --data foreign": "--data must hold one of the tasks, foreign holds none: MNLI is left out: there is no",
        "model --data foreign/thesis.tex": "--data must be a folder with GLUE's tasks or the name of a data set, got",
        "model --data glue --tasks wnli": "tasks must be of MNLI, QNLI, QQP, RTE, SST-2, MRPC, CoLA, STS-B, or all",
        "model --data glue --out foreign": "foreign must be new, empty or hold runs of glue, it holds thesis.tex",
        "model --data glue --jobs 0": "jobs must be at least 1",
        "model --data glue --epochs 0": "epochs must be above 0, got 0",
        "model --data glue --length 4": "length must be at least 5, got 4",
        "empty --data glue": "empty must hold a model, as pretrain or save_pretrained write it, it has no weights",
        "foreign --data glue": "foreign must hold the model's tokenizer: ",
    }
    for command, message in mistakes.items():
        assert main(["glue", *command.split()]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    options = "--tasks sst2 --seeds 0 --epochs 0.1 --jobs 1 --out new"
    assert main(["glue", "model", "--data", "glue", *options.split()]) == 0
    assert "SST-2, seed 0: accuracy" in capsys.readouterr().out


# What parses the options, draws and reads data sets need not be there.
START = """
import sys
if __name__ == "__main__":
    sys.modules |= dict.fromkeys(("tyro", "rich", "datasets", "matplotlib", "tensorboard"))
from hydra_ssm.train.finetune import glue
if __name__ == "__main__":
    model, data, out, jobs = sys.argv[1:]
    glue(model, data, out, tasks=["rte", "sst2"], seeds=[0], jobs=int(jobs), epochs=4, batch_size=8,
         learning_rate=5e-3)
"""


def test_a_killed_run_goes_on_where_it_stopped(
    done: tuple[Path, dict, list[str]], model: Path, data: Path, tmp_path: Path
) -> None:
    """To the same results, whether runs were beside each other in processes or alone in one."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", START, *map(str, (model, data, out, 2))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: [*out.glob("runs/*.json")], process)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(alive, workers)))  # they see that their parent has gone
    before = {path.name: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    assert 0 < len(before) < 3
    glue(model, data, out, tasks=["rte", "sst2"], seeds=[0], jobs=1, say=len, **QUICK)
    assert {name: (out / "runs" / name).stat().st_mtime_ns for name in before} == before
    names = {f"{task}-seed-0.json" for task in ("RTE", "SST-2", "MNLI")}
    expected = {name: record for name, record in records(done[0]).items() if name in names}
    assert records(out) == expected
