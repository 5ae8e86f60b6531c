"""The recipes hold the paper's numbers, and the tiny ones run."""

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from hydra_ssm.text import HydraConfig, HydraForMaskedLM, preset
from hydra_ssm.train.errors import Interrupted, Stopped, UserError
from hydra_ssm.train.prepare import EVALUATION_RATE
from hydra_ssm.train.recipe import Recipe
from hydra_ssm.train.trainer import arguments
from recipes import COMPARISONS, PRETRAINING, bert_base, hydra_base
from recipes.__main__ import main

LIKE_THE_PAPER = ("hydra_base", "bert_base", "hydra_large", "bert_large")
PAIRS = ("base", "large", "medium", "small", "tiny")


def size(name: str) -> int:
    with torch.device("meta"):
        return HydraForMaskedLM(preset(name)).num_parameters()


@pytest.mark.parametrize("name", LIKE_THE_PAPER)
def test_tokens_and_masks_are_the_papers(name: str) -> None:
    recipe = PRETRAINING[name]("c4")
    assert (recipe.length, recipe.batch_size, recipe.steps) == (128, 4096, 70_000)
    assert (recipe.mask_rate, EVALUATION_RATE) == (0.30, 0.15)
    assert recipe.batch_size % recipe.accumulate == 0
    assert recipe.sources == ("c4",)


@pytest.mark.parametrize("name", [name for name in PRETRAINING if not name.endswith("tiny")])
def test_a_long_run_loses_a_thousand_steps_at_most(name: str) -> None:
    recipe = PRETRAINING[name]()
    assert (recipe.save_every, recipe.evaluate_every) == (1000, 1000)
    assert PRETRAINING[name](save_every=7000).save_every == 7000


@pytest.mark.parametrize("name", ["hydra_base", "bert_medium"])
def test_tokens_take_the_place_of_a_recipes_steps(name: str) -> None:
    recipe = PRETRAINING[name](tokens=10**9)
    assert recipe.steps == -(-(10**9) // (recipe.batch_size * recipe.length))
    with pytest.raises(UserError, match="steps and tokens both say"):
        PRETRAINING[name](tokens=10**9, steps=5)


@pytest.mark.parametrize("recipe", [hydra_base(), bert_base()], ids=["hydra", "bert"])
def test_the_paper_peaks_at_8e_4(recipe: Recipe) -> None:
    assert recipe.learning_rate == 8e-4


@pytest.mark.parametrize("name", [name for name in PRETRAINING if not name.endswith("tiny")])
def test_decay_is_decoupled_at_every_learning_rate(name: str) -> None:
    for recipe in (PRETRAINING[name](), PRETRAINING[name](learning_rate=3e-4)):
        assert recipe.weight_decay * recipe.learning_rate == pytest.approx(1e-5)


def test_optimizer_and_schedule_are_the_papers(tmp_path: Path) -> None:
    args: TrainingArguments = arguments(hydra_base(), tmp_path)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.98, 1e-6, 1.0)
    assert args.weight_decay == pytest.approx(0.0125)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    up = args.get_warmup_steps(args.max_steps)
    assert up == 4200  # 6 %
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, up, args.max_steps, args.lr_scheduler_kwargs)
    share = schedule.lr_lambdas[0]
    assert [share(0), share(4200)] == pytest.approx([0, 1], abs=0.02)
    assert share(2100) - share(0) == pytest.approx(share(4200) - share(2100))  # linear up, and
    assert share((4200 + 70_000) // 2) == pytest.approx((1 + 0.02) / 2, abs=1e-4)  # down
    assert share(70_000) == pytest.approx(0.02)


def test_the_base_model_is_the_papers() -> None:
    config: HydraConfig = preset(hydra_base().preset)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (23, 768, 0)
    assert (config.d_state, config.d_conv, config.expand, config.headdim, config.ngroups) == (64, 7, 2, 64, 1)
    assert (config.norm, config.layer_norm_eps, config.type_vocab_size) == ("post", 1e-5, 2)
    assert (config.embedding_dropout, config.hidden_dropout, config.position_embeddings) == (0.1, 0, False)
    assert config.vocab_size == 30528
    assert round(size("hydra-base") / 1e6) == 112
    assert round(size("bert-base") / 1e6) == 110


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_differs_in_its_model_alone(pair: str) -> None:
    ours, theirs = (PRETRAINING[f"{name}_{pair}"]() for name in ("hydra", "bert"))
    assert (ours.preset, theirs.preset) == (f"hydra-{pair}", f"bert-{pair}")
    assert {**vars(ours), "preset": ""} == {**vars(theirs), "preset": ""}


@pytest.mark.parametrize(("pair", "most"), [("base", 0.025), ("large", 0.02), ("medium", 0.02), ("small", 0.02)])
def test_a_pair_has_equal_parameters(pair: str, most: float) -> None:
    """The paper's own base pair is 2.3 % apart."""
    ours, theirs = (size(f"{name}-{pair}") for name in ("hydra", "bert"))
    assert abs(ours / theirs - 1) < most


def test_medium_has_30_to_40_million_parameters() -> None:
    assert all(30e6 < size(f"{name}-medium") < 40e6 for name in ("hydra", "bert"))


def test_every_recipe_says_what_it_is_and_has_a_command_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, recipe in (PRETRAINING | COMPARISONS).items():
        assert recipe.__doc__
        assert f"python -m recipes {name} " in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hydra_tiny", "bert_tiny"])
def test_a_tiny_recipe_trains_and_goes_on(
    name: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["steps=6", "batch_size=2", "length=32", "vocab_size=200"]
    command = [name, str(text_file), "--out", str(tmp_path / "run"), "--with", *small]
    assert main(command) == 0
    assert HydraForMaskedLM.from_pretrained(tmp_path / "run").config.hidden_size == 128
    assert main([*command, "--resume"]) == 0  # has ended: nothing is lost
    capsys.readouterr()
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*command[:-1], "vocab_size=300", "--resume"]) == 2
    assert "vocab_size is 200 in the run" in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [Stopped(3, 6, signal.SIGTERM, "runs/x"), Interrupted(signal.SIGTERM, "runs/x")])
def test_a_signal_is_one_line_and_the_exit_code(
    stopped: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise stopped

    monkeypatch.setattr("recipes.__main__.pretrain", stop)
    monkeypatch.setattr("recipes.__main__.compare", stop)
    name = "hydra_tiny" if isinstance(stopped, Stopped) else "compare_tiny"
    assert main([name, "texts", "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == f"recipes: error: {stopped}\n"


@pytest.mark.slow
def test_a_recipe_does_not_go_on_with_other_text(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path / "run"), "--with", "steps=2", "batch_size=2", "length=32", "vocab_size=200"]
    assert main(["hydra_tiny", str(text_file), *command]) == 0
    other = tmp_path / "other.txt"
    other.write_text("other text " * 100)
    assert main(["hydra_tiny", str(other), *command, "--resume"]) == 2
    assert "sources" in capsys.readouterr().err


def test_the_comparison_is_the_one_whose_results_are_told() -> None:
    page = Path(__file__).parents[2] / "results" / "comparison.json"
    told = json.loads(page.read_text(encoding="utf-8"))["plan"]
    assert json.loads(json.dumps(COMPARISONS["compare_medium"]())) == told


def test_the_tiny_comparison_has_every_part() -> None:
    settings = COMPARISONS["compare_tiny"]()
    assert settings["tasks"]
    assert len(settings["lengths"]) == len(settings["seeds"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra_base", "--with", "steps"], "--with takes NAME=VALUE, got steps"),
        (["hydra_base", "--with", "epochs=3"], "epochs"),
        (["compare_tiny"], "one folder that `hydra-ssm compare prepare` wrote, got 0"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*words[:1], "--out", str(tmp_path / "run"), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
