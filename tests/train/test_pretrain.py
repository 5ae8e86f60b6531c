"""A run from text to a model, whatever happens on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import start, wait_until
from rich.console import Console
from safetensors.torch import load_file
from small_text import NOUNS, sentences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainerCallback, pipeline

from hydra_ssm.cli import main
from hydra_ssm.text.collators import Row
from hydra_ssm.text.inference import TextModel
from hydra_ssm.train.checkpoints import MANIFEST, checkpoints, write_manifest
from hydra_ssm.train.errors import Stopped, UserError
from hydra_ssm.train.folder import RunFolder
from hydra_ssm.train.prepare import prepare
from hydra_ssm.train.pretrain import Run, pretrain, resume
from hydra_ssm.train.recipe import Recipe
from hydra_ssm.train.trainer import MaskedLMTrainer, arguments

SHORT = {"vocab_size": 90, "length": 32, "batch_size": 2, "steps": 60, "save_every": 5, "learning_rate": 3e-3}


def recipe(text_file: Path, **changes: object) -> Recipe:
    return Recipe.of("hydra-tiny", sources=(str(text_file),), **{**SHORT, **changes})


@pytest.fixture(scope="module")
def finished(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(recipe(text_file), out)
    return out


def unfinished(finished: Path, out: Path) -> RunFolder:
    """A copy of that run, back at its checkpoints."""
    shutil.copytree(finished / "training", out / "training")
    folder = RunFolder(out)
    folder.finished.unlink()
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_bits(out: Path, expected: Path) -> None:
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def command(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hydra_ssm.cli", "pretrain", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def steps_saved(out: Path) -> int:
    found = checkpoints(out / "training" / "checkpoints")
    return int(found[-1].name.split("-")[1]) if found else 0


@pytest.mark.slow
def test_a_run_that_is_killed_and_then_stopped_ends_as_if_nothing_had_happened(
    text_file: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    killed = start(main, ["pretrain", str(text_file), *settings, "--out", str(out)])
    wait_until(lambda: steps_saved(out) >= 10, killed)
    killed.kill()
    killed.join()
    killed_after = steps_saved(out)

    process = command("--out", out, "--resume")
    wait_until(lambda: steps_saved(out) > killed_after, process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert (
        error
        == f"hydra-ssm: error: stopped and saved after step {steps_saved(out)} of 60; go on with --out {out} --resume\n"
    )
    assert not (out / "model.safetensors").exists()

    assert steps_saved(out) < 60
    assert main(["pretrain", "--out", str(out), "--resume"]) == 0
    assert_same_bits(out, finished)


class Hurried(Run):
    """SIGTERM comes while held-out rows are read, after a checkpoint."""

    after, read = 0, 0

    def _trainer(self, callbacks: list[TrainerCallback]) -> MaskedLMTrainer:
        trainer = super()._trainer(callbacks)
        trainer.args.per_device_eval_batch_size = 1
        collate = trainer.held_out_batches

        def batches(rows: list[Row]) -> dict[str, torch.Tensor]:
            if steps_saved(self.folder.path) == self.after:
                self.read += 1
                if self.read == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            return collate(rows)

        trainer.held_out_batches = batches  # type: ignore[assignment]
        return trainer


@pytest.mark.parametrize(("after", "step"), [(10, 12), (55, 60)])
def test_a_run_that_is_stopped_in_an_evaluation_is_saved_and_evaluates_when_it_goes_on(
    after: int, step: int, finished: Path, tmp_path: Path
) -> None:
    folder = unfinished(finished, tmp_path)
    for path in checkpoints(folder.checkpoints):
        if after < 50 or int(path.name.split("-")[1]) > after:
            shutil.rmtree(path)
    for saved in (after, step):  # the second time in the evaluation that it begins with
        run = Hurried(folder, Console(quiet=True))
        run.after = saved
        with pytest.raises(Stopped, match=f"stopped and saved after step {step} of 60"):
            run.train()
        assert run.read == 2  # and no batch more
        assert steps_saved(tmp_path) == step
    resume(tmp_path)
    assert_same_bits(tmp_path, finished)
    again, whole = (json.loads((out / "metrics.json").read_text())["history"] for out in (tmp_path, finished))
    for key in ("loss", "eval_loss"):
        assert [(e["step"], pytest.approx(e[key])) for e in whole if key in e] == [
            (e["step"], e[key]) for e in again if key in e
        ]


def test_an_evaluation_reads_as_much_as_the_recipe_says(text_file: Path, tmp_path: Path) -> None:
    tokens = {}
    for most in (64, 0):
        out = tmp_path / str(most)
        other = tmp_path / "held-out.txt"
        other.write_text(sentences(300, seed=9), encoding="utf-8")
        pretrain(recipe(text_file, steps=2, evaluation_tokens=most, held_out=(str(other),)), out)
        found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        tokens[most] = found["model"]["tokens"]
        rows = 2 if most else found["held_out_rows"]
        assert found["evaluation_rows"] == rows
        assert f"0.15 of those in {rows} of the {found['held_out_rows']} held-out" in (out / "README.md").read_text()
        assert found["baseline"]["tokens"] == found["model"]["tokens"]
    assert tokens[64] < tokens[0] / 10


@pytest.mark.parametrize("every", [{"save_every": 1}, {"save_every": 20, "evaluate_every": 20}])
def test_training_that_diverges_is_stopped_before_it_is_saved(
    every: dict[str, int], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"has diverged by step \d+, its .*--overwrite and a --learning-rate below 1e\+06"
    ):
        pretrain(recipe(text_file, steps=20, learning_rate=1e6, **every), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    for path in checkpoints(tmp_path / "training" / "checkpoints"):
        assert all(value.isfinite().all() for value in weights(path).values())


def test_a_bad_model_is_reported_as_bad_and_in_json(text_file: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="knows no more than word frequencies"):
        pretrain(recipe(text_file, steps=1, learning_rate=300.0), tmp_path)
    metrics = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(metrics, parse_constant=pytest.fail)["model"]["loss"] > 710


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(file: str, finished: Path, tmp_path: Path) -> None:
    folder = unfinished(finished, tmp_path)
    truncate(folder.checkpoints / "checkpoint-60" / file)
    with pytest.warns(UserWarning, match=f"checkpoint-60 is damaged .{file} has changed.*: going back"):
        resume(tmp_path)
    assert_same_bits(tmp_path, finished)


def test_a_checkpoint_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = unfinished(finished, tmp_path)
    path = folder.checkpoints / "checkpoint-60"
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / MANIFEST).unlink()
    for change, reason in (({"hidden_size": 64}, "hidden_size is 64"), ({"vocab_size": 7}, "vocab_size is 7")):
        (path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        write_manifest(path)
        with pytest.raises(UserError, match=f"checkpoint-60 must be of this run's model, its {reason} in place of"):
            resume(tmp_path)
        (path / MANIFEST).unlink()


def test_a_source_whose_name_is_no_utf8_is_trained_on(text_file: Path, tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"\xff.txt")
    try:
        shutil.copy(text_file, source)
    except OSError:
        pytest.skip("needs a file system that takes such names")
    pretrain(recipe(source, steps=1), tmp_path / "run")
    assert "\\udcff.txt" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_a_resumed_run_may_save_at_other_steps(finished: Path, tmp_path: Path) -> None:
    folder = unfinished(finished, tmp_path)
    for step in (55, 60):
        shutil.rmtree(folder.checkpoints / f"checkpoint-{step}")
    resume(tmp_path, {"save_every": 7})
    assert [p.name for p in checkpoints(folder.checkpoints)] == ["checkpoint-50", "checkpoint-56", "checkpoint-60"]
    assert_same_bits(tmp_path, finished)


def test_without_any_whole_checkpoint_a_run_begins_again(text_file: Path, tmp_path: Path) -> None:
    pretrain(recipe(text_file, steps=8), tmp_path / "one")
    folder = unfinished(tmp_path / "one", tmp_path / "two")
    for path in checkpoints(folder.checkpoints):
        truncate(path / "model.safetensors")
    with pytest.warns(UserWarning, match="is damaged"):
        resume(folder.path)
    assert_same_bits(folder.path, tmp_path / "one")


def test_what_a_killed_process_left_is_removed(finished: Path, tmp_path: Path) -> None:
    folder = unfinished(finished, tmp_path)
    left = folder.checkpoints / ".hydra-ssm-part-checkpoint-60"
    (folder.checkpoints / "checkpoint-60").rename(left)
    resume(tmp_path)
    assert not left.exists()
    assert_same_bits(tmp_path, finished)


def killed_while_it_reads(out: Path) -> None:
    with RunFolder(out).begin(overwrite=True):
        os._exit(9)


def test_a_launcher_that_begins_again_does_not_go_on_with_the_run_that_was_to_be_overwritten(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished, folder.path)
    assert not folder.is_again()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert folder.is_again()
    start(killed_while_it_reads, folder.path).join()
    assert folder.exists()
    assert not folder.is_again()
    with folder.begin(overwrite=True) as part:
        (part / "recipe.json").write_text("the new one's")
    assert folder.is_again()


def test_a_resumed_run_logs_each_step_once(finished: Path, tmp_path: Path) -> None:
    folder = unfinished(finished, tmp_path)
    shutil.rmtree(folder.checkpoints / "checkpoint-60")
    before, after = (EventAccumulator(str(out / "training" / "tensorboard")) for out in (finished, tmp_path))
    resume(tmp_path)
    for tag in ("train/loss", "eval/loss"):
        once, again = ([(event.step, event.value) for event in log.Reload().Scalars(tag)] for log in (before, after))
        assert once == again


def test_a_finished_run_is_a_folder_that_transformers_loads(finished: Path) -> None:
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert type(model).__name__ == "HydraForMaskedLM"
    assert model.config.vocab_size % 8 == 0
    best = pipeline("fill-mask", model=model, tokenizer=tokenizer)("the [MASK] sees a dog.")
    assert len(best) == 5
    names = {path.name for path in finished.iterdir()}
    assert names == {"training", *json.loads((finished / "training" / "finished.json").read_text(encoding="utf-8"))}
    assert names >= {"README.md", "loss.png", "metrics.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "training" / "tensorboard").glob("events.*"))


def test_the_report_has_the_numbers_of_the_run(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    model, baseline = metrics["model"], metrics["baseline"]
    assert model["loss"] < baseline["loss"] - 0.3
    assert model["tokens"] == baseline["tokens"] > 0
    assert [entry["step"] for entry in metrics["history"] if "eval_loss" in entry] == [*range(12, 61, 12)]
    last = next(entry for entry in reversed(metrics["history"]) if "loss" in entry)
    assert 0 < last["masked_accuracy"] < 1
    assert last["tokens_per_second"] > 0
    card = (finished / "README.md").read_text(encoding="utf-8")
    assert f"| this model | {model['loss']:.3f} |" in card
    assert f"| word frequencies alone | {baseline['loss']:.3f} |" in card


def test_the_score_does_not_depend_on_the_batches_it_is_computed_in(finished: Path) -> None:
    trainer = Run(RunFolder(finished), None)._trainer([])
    trainer.net.load_state_dict(weights(finished), strict=False)
    together = trainer.score()
    trainer.args.per_device_eval_batch_size = 1
    alone = trainer.score()
    assert alone == (pytest.approx(together.loss, rel=1e-5), together.accuracy, together.tokens)
    recorded = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))["model"]
    assert together == (pytest.approx(recorded["loss"], rel=1e-6), recorded["accuracy"], recorded["tokens"])


def test_a_step_in_parts_is_the_same_step(text_file: Path, tmp_path: Path) -> None:
    results = []
    for accumulate in (1, 2):
        folder = RunFolder(tmp_path / str(accumulate))
        folder.training.mkdir(parents=True)
        prepare(recipe(text_file, steps=3, batch_size=4, accumulate=accumulate), folder.training)
        config = json.loads((folder.training / "config.json").read_text(encoding="utf-8"))
        (folder.training / "config.json").write_text(json.dumps({**config, "embedding_dropout": 0.0}), encoding="utf-8")
        run = Run(folder, None)
        trainer = run._trainer([])
        trainer.train()
        results.append(torch.cat([p.detach().flatten() for p in trainer.net.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


def test_biases_norms_and_decays_do_not_decay(finished: Path) -> None:
    trainer = Run(RunFolder(finished), None)._trainer([])
    decaying = set(trainer.get_decay_parameter_names(trainer.net))
    kept = {name for name, _ in trainer.net.named_parameters()} - decaying
    assert {name.split(".")[-1] for name in decaying} == {"weight"}
    assert {name.split(".")[-1] for name in kept} == {"weight", "bias", "A_log", "D", "dt_bias"}
    assert all("norm" in name for name in kept if name.endswith(".weight"))


def test_a_tokenizer_knows_how_long_its_models_texts_may_be(text_file: Path, tmp_path: Path) -> None:
    for name, longest in (("bert-tiny", 512), ("hydra-tiny", 1_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        prepare(Recipe.of(name, sources=(str(text_file),), vocab_size=90, length=32, batch_size=2), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        assert len(tokenizer("cat " * 600, truncation=True)["input_ids"]) == min(602, longest)


def test_the_learning_rate_warms_up_for_six_percent_and_falls_to_two(tmp_path: Path) -> None:
    from transformers import get_scheduler

    settings = Recipe.of("hydra-tiny", steps=200, learning_rate=1e-3)
    args = arguments(settings, tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(200),
        200,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(200):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == rates[12] == pytest.approx(1e-3)
    assert schedule.get_last_lr()[0] == pytest.approx(2e-5)
    falls = torch.tensor(rates[12:]).diff()
    torch.testing.assert_close(falls, falls.mean().expand_as(falls), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_without_arguments_a_model_is_trained_on_what_python_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--steps", "5", "--evaluate-every", "5", "--save-every", "5"]) == 0
    out = capsys.readouterr().out
    assert "next: hydra-ssm fill-mask runs/hydra-tiny 'This method [MASK] called when the object is created.'" in out
    metrics = json.loads(Path("runs/hydra-tiny/metrics.json").read_text(encoding="utf-8"))
    assert metrics["training_tokens"] > 80_000
    assert metrics["fill"] > 0.99
    assert 5.3 < metrics["baseline"]["loss"] < 5.8
    assert 0.1 < metrics["baseline"]["accuracy"] < 0.2


def test_a_trained_model_knows_which_words_may_stand_where(finished: Path) -> None:
    model = TextModel(finished)
    fillings = model.fill("the cat sees a [MASK].", top=3)
    assert len(fillings) == 1
    probabilities = [filling.probability for filling in fillings[0]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(filling.word in NOUNS for filling in fillings[0]) >= 2


def test_an_embedding_does_not_depend_on_the_texts_beside_it(finished: Path) -> None:
    model = TextModel(finished)
    texts = ["the cat sees a dog.", "the king.", "a boat leaves the river and finds a stone house."]
    together = model.embed(texts)
    assert together.shape == (3, model.model.config.hidden_size)
    torch.testing.assert_close(together, torch.cat([model.embed([text]) for text in texts]))


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's GPUs are."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, operator
        return found


def test_a_run_needs_no_float64_which_some_devices_lack(text_file: Path, tmp_path: Path) -> None:
    with NoFloat64():
        pretrain(recipe(text_file, steps=2, save_every=2, evaluate_every=1), tmp_path / "run")
