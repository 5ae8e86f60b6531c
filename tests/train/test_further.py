"""Runs that begin with a model's weights: on other text, longer, or of a model that something else has written."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from several import back
from small_text import sentences
from test_pretrain import Hurried
from transformers import AutoTokenizer

from hydra_ssm.cli import main
from hydra_ssm.text import HydraForMaskedLM, HydraForSequenceClassification, preset
from hydra_ssm.text.tokenizer import load_tokenizer
from hydra_ssm.train.checkpoints import checkpoints
from hydra_ssm.train.data.prepare import prepare_shards
from hydra_ssm.train.data.settings import Settings
from hydra_ssm.train.errors import Stopped, UserError
from hydra_ssm.train.folder import RunFolder
from hydra_ssm.train.prepare import prepare
from hydra_ssm.train.pretrain import pretrain, resume
from hydra_ssm.train.recipe import Recipe
from hydra_ssm.train.start import Start
from recipes import hydra_tiny

pytestmark = pytest.mark.filterwarnings("ignore:the model knows no more than word frequencies")

SHORT: dict[str, Any] = {"length": 16, "batch_size": 2, "steps": 4, "save_every": 2}


@pytest.fixture(scope="module")
def base(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "base"
    pretrain(Recipe.of("hydra-tiny", sources=(str(text_file),), vocab_size=90, **SHORT), out)
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text with the same words in other places."""
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(sentences(200, seed=3).replace("the", "a"), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def shards(text_file: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model's tokenizer in own/, of another one in foreign/."""
    folder = tmp_path_factory.mktemp("shards")
    for name, tokenizer in (("own", str(base)), ("foreign", None)):
        settings = Settings((str(text_file),), tokenizer, vocab_size=60, length=16, documents="line", held_out=0.1)
        prepare_shards(settings, folder / name, jobs=1)
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def history(out: Path, key: str) -> dict[int, float]:
    entries = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["history"]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To the last bit."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def copy(model: Path, out: Path, **changes: Any) -> Path:
    """A model without its run, with changes to config.json."""
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return out


def test_a_run_begins_with_the_weights_and_the_words_of_a_model(base: Path, other: str, tmp_path: Path) -> None:
    for rate in (0.0, 1e-3):
        pretrain(Recipe.of(model=str(base), sources=(other,), learning_rate=rate, **SHORT), tmp_path / str(rate))
    still, moved, begun = weights(tmp_path / "0.0"), weights(tmp_path / "0.001"), weights(base)
    assert_same(still, begun)
    assert not torch.equal(moved["head.dense.weight"], begun["head.dense.weight"])
    words = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tmp_path / "0.001", base))
    assert next(words) == next(words)
    before, after = (history(tmp_path / name, "eval_loss") for name in ("0.0", "0.001"))
    assert before[4] == pytest.approx(before[0], rel=1e-6)  # of the model as it came
    assert after[0] == before[0]
    assert after[4] < after[0]
    assert max(history(tmp_path / "0.001", "learning_rate").values()) == pytest.approx(1e-3)  # from its start
    assert 0 not in history(base, "eval_loss")  # which is nothing to look at where weights are new

    card = (tmp_path / "0.001" / "README.md").read_text(encoding="utf-8")
    assert f"`hydra-ssm pretrain` from the weights of {base}." in card
    assert f"| this model | {after[4]:.3f} |" in card
    assert f"\n| {base}, before | {after[0]:.3f} |" in card
    assert "before |" not in (base / "README.md").read_text(encoding="utf-8")


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_needs_the_model_no_more(
    base: Path, other: str, tmp_path: Path
) -> None:
    start = copy(base, tmp_path / "start")
    pretrain(Recipe.of(model=str(start), sources=(other,), **SHORT), tmp_path / "whole")
    shutil.rmtree(start)
    for step in (2, 0):  # the second time there is none
        out = tmp_path / f"again-{step}"
        back(tmp_path / "whole", out, step)
        assert len(checkpoints(out / "training" / "checkpoints")) == bool(step)
        resume(out, {"model": str(start)})
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert history(out, "eval_loss") == history(tmp_path / "whole", "eval_loss")
    back(tmp_path / "whole", tmp_path / "stopped", 0)
    hurried = Hurried(RunFolder(tmp_path / "stopped"), Console(quiet=True))
    with pytest.raises(Stopped, match="stopped and saved after step 0 of 4"):
        hurried.train()  # in the evaluation that it begins with
    resume(tmp_path / "stopped")
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    back(tmp_path / "whole", tmp_path / "damaged", 0)
    damaged = tmp_path / "damaged" / "training" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"training is damaged \(model.safetensors has changed"):
        resume(tmp_path / "damaged")


def prepared(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run of it begins with."""
    folder.mkdir()
    prepare(recipe, folder)
    return weights(folder)


def test_a_classifiers_encoder_in_bfloat16_begins_in_float32_with_a_new_head(
    base: Path, other: str, tmp_path: Path
) -> None:
    given = HydraForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)
    given.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "classifier")
    recipe = Recipe.of(model=str(tmp_path / "classifier"), sources=(other,), **SHORT)
    with pytest.warns(UserWarning, match="has no head that predicts words: it gets a new one"):
        one, two = (prepared(recipe, tmp_path / name) for name in ("one", "two"))
    assert_same(one, two)
    assert all(value.dtype == torch.float32 for value in one.values())
    inner = {name: value.float() for name, value in given.state_dict().items() if name.startswith("model.")}
    assert len(inner) > 20
    assert_same({name: one[name] for name in inner}, inner)


def test_a_models_preset_is_found_by_its_sizes(base: Path, tmp_path: Path) -> None:
    assert Recipe.of(model=str(base)) == Recipe.of("hydra-tiny", model=str(base))
    mine = copy(base, tmp_path / "mine", embedding_dropout=0.2)
    assert Recipe.of(model=str(mine)).preset == "hydra-tiny"
    HydraForMaskedLM(preset("hydra-tiny", num_hidden_layers=1, vocab_size=16)).save_pretrained(tmp_path / "own")
    own = Recipe.of(model=str(tmp_path / "own"))
    assert (own.preset, own.batch_size) == (None, 4096)  # the paper's numbers
    with pytest.raises(UserError, match="a run needs a preset or a model to begin with, got neither"):
        Recipe.of()


def test_a_checkpoint_of_a_run_is_a_model_too(base: Path, other: str, tmp_path: Path) -> None:
    checkpoint = base / "training" / "checkpoints" / "checkpoint-2"
    assert_same(
        prepared(Recipe.of(model=str(checkpoint), sources=(other,), **SHORT), tmp_path / "run"), weights(checkpoint)
    )


def test_a_recipe_takes_a_model_of_its_size(base: Path, other: str, tmp_path: Path) -> None:
    recipe = hydra_tiny(other, model=str(base), **SHORT)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert_same(prepared(recipe, tmp_path / "run"), weights(base))


def test_shards_of_the_models_words_train_it_further(base: Path, shards: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(model=str(base), sources=(str(shards / "own"),), learning_rate=0.0, **SHORT)
    pretrain(recipe, tmp_path / "run")
    assert_same(weights(tmp_path / "run"), weights(base))


def test_a_model_without_a_tokenizer_takes_the_one_that_it_was_trained_with(
    base: Path, other: str, shards: Path, tmp_path: Path
) -> None:
    """As what `convert` writes."""
    start = copy(base, tmp_path / "start")
    for path in start.glob("tokenizer*"):
        path.unlink()
    settings: dict[str, Any] = {"model": str(start), **SHORT}
    with pytest.raises(UserError, match="start must hold the model's tokenizer, it holds none: give that with --tok"):
        prepared(Recipe.of(sources=(other,), **settings), tmp_path / "none")
    few = tmp_path / "few.txt"
    few.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(200))]), encoding="utf-8")
    with pytest.raises(UserError, match=r"must have the words of the model in .*, about 80, it has 205: give the one"):
        prepared(Recipe.of(sources=(other,), tokenizer=str(few), **settings), tmp_path / "few")
    given = {"sources": (other,), "tokenizer": str(base)}, {"sources": (str(shards / "own"),)}
    for name, sources in zip(("text", "shards"), given, strict=True):
        assert_same(prepared(Recipe.of(**sources, **settings), tmp_path / name), weights(base))
        assert load_tokenizer(tmp_path / name / "tokenizer").get_vocab() == load_tokenizer(base).get_vocab()


def test_a_model_has_a_vector_for_each_word_and_few_to_spare(tmp_path: Path) -> None:
    """A vocabulary is padded up to a multiple of 128 at most."""
    HydraForMaskedLM(preset("hydra-tiny", num_hidden_layers=1, vocab_size=200)).save_pretrained(tmp_path)
    special, path = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], tmp_path / "words"
    words = {}
    for count in (72, 73, 200, 201):
        path.write_text("\n".join([*special, *map(str, range(count - 5))]), encoding="utf-8")
        words[count] = load_tokenizer(path)
    start = Start(str(tmp_path), None, 0)
    assert start.words is None
    for count in (73, 200):
        assert start.tokenizer(words[count], "it", "") is words[count]
    for count in (72, 201):
        with pytest.raises(UserError, match=f"it must have the words of the model in .*, about 200, it has {count}"):
            start.tokenizer(words[count], "it", "")
    for count in (73, 200, 201):
        words[count].save_pretrained(tmp_path)
        start = Start(str(tmp_path), None, 0)
        if count <= 200:
            assert start.tokenizer(None, "it", "").get_vocab() == words[count].get_vocab()
            path.write_text("\n".join([*special, *(f"w{i}" for i in range(count - 5))]), encoding="utf-8")  # as many
            with pytest.raises(UserError, match=r"it must have the words of the tokenizer in .*, it has others: so"):
                start.tokenizer(load_tokenizer(path), "it", "so")
            continue
        with pytest.raises(UserError, match=r"the tokenizer in .* must have 200 words at most, it has 201"):
            start.tokenizer(None, "it", "")


def test_a_name_on_the_hub_is_a_model_too(
    base: Path, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was brought from there once is there without a network."""
    place = tmp_path / "hub" / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    copy(base, place / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    recipe = Recipe.of(model="someone/model", sources=(other,), **SHORT)
    assert recipe.preset == "hydra-tiny"
    assert_same(prepared(recipe, tmp_path / "run"), weights(base))
    with pytest.raises(UserError, match="someone/else is neither a folder nor a model on the Hub that could be loaded"):
        Recipe.of(model="someone/else")


def long(folder: Path) -> str:
    """A model for documents of 12 tokens."""
    tokenizer = load_tokenizer(folder / "base")
    sizes: dict[str, Any] = {"max_position_embeddings": 12, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    HydraForMaskedLM(preset("bert-tiny", **sizes)).save_pretrained(folder / "positions")
    tokenizer.save_pretrained(folder / "positions")
    return "positions"


MISTAKES = {
    "TEXT --model base --preset bert-tiny": (
        "the model in base must have the sizes of the preset bert-tiny, its num_hidden_layers is 4 in place of 2: leave"
    ),
    "TEXT --model base --preset huge": "a preset must be one of hydra-base, ",
    "TEXT --model base --vocab-size 60": "vocab_size = 60 is for a new one: leave out --vocab-size",
    "TEXT --tokenizer base --vocab-size 60": "got one, base: leave out --vocab-size, or --tokenizer",
    "own --vocab-size 60": "leave out --vocab-size, or prepare the text again with hydra-ssm data prepare ... --voc",
    "TEXT --model base --tokenizer foreign/tokenizer": (
        "the tokenizer foreign/tokenizer must have the words of the tokenizer in base, it has others: leave it out"
    ),
    "foreign --model base": (
        "of the shards foreign must have the words of the tokenizer in base, it has others: prepare the text again "
        "with hydra-ssm data prepare ... --tokenizer base"
    ),
    "TEXT --model positions --length 16": "length must be at most 12 for positions, got 16",
    "TEXT --model nowhere": "there is no folder nowhere with a model",
    "TEXT --model own": "own must hold a model (config.json and model.safetensors), it does not",
    "TEXT --model rounded": "rounded must hold weights to train, its are rounded: give the folder that they come from",
    "TEXT --model bert": "the model_type of config.json must be hydra_ssm, got bert",
    "TEXT --model base --out base --overwrite": "base holds the model that the run begins with: choose another --out",
    "TEXT --out base": "base already holds a run: add --model base --out NEW to train its model further, or --over",
}


@pytest.fixture(scope="module")
def mistaken(base: Path, other: str, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that they name."""
    folder = tmp_path_factory.mktemp("mistaken")
    for path in (base, shards / "own", shards / "foreign"):
        (folder / path.name).symlink_to(path)
    (folder / "TEXT").write_text(Path(other).read_text(encoding="utf-8"), encoding="utf-8")
    copy(base, folder / "rounded", quantization_config={"quant_method": "torchao"})
    copy(base, folder / "bert", model_type="bert")
    long(folder)
    return folder


@pytest.mark.parametrize("command", MISTAKES)
def test_what_makes_no_sense_is_refused_in_a_line_that_says_what_to_do(
    command: str, mistaken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mistaken)
    before = sorted(mistaken.glob("*/*"))
    assert main(["pretrain", *command.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hydra-ssm: error: ")
    assert error.count("\n") == 1
    assert MISTAKES[command] in error
    assert sorted(mistaken.glob("*/*")) == before


def test_who_asks_for_more_steps_is_told_why_not_and_a_command_that_trains_further(
    base: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    back(base, tmp_path / "begun", 2)
    for name in ("base", "begun"):
        assert main(["pretrain", "--out", name, "--resume", "--steps", "9"]) == 2
        error = capsys.readouterr().err
        assert f"steps is 4 in the run that goes on in {name}, got 9: a run of 9 has had other learning rates" in error
    assert main(["pretrain", str(text_file), "--out", "begun", "--steps", "9"]) == 2
    assert "begun already holds a run: add --resume to go on, or --overwrite to start again" in capsys.readouterr().err
    assert main(["pretrain", "--out", "begun", "--resume", "--tokens", "999"]) == 2
    error = capsys.readouterr().err
    assert "steps is 4 in the run that goes on in begun, got 32: a run of 32 has had" in error
    assert main(["pretrain", "--out", "begun", "--resume", "--steps", "3"]) == 2
    assert capsys.readouterr().err.endswith("in begun, got 3\n")  # and no word on further training

    assert main(["pretrain", "--out", "base", "--resume"]) == 0
    assert (
        "the run in base has ended already: --model base --out NEW trains its model further" in capsys.readouterr().out
    )
    said = shlex.split(error.partition("of its own: ")[2])
    steps = ["--model", "begun", "--seed", "1", "--steps", "28", "--out", "NEW"]
    assert said == ["hydra-ssm", "pretrain", str(text_file), *steps]
    assert main([*said[1:], "--length", "16"]) == 2
    error = capsys.readouterr().err
    assert "begun must hold a model" in error
    assert "its run has not ended, go on with hydra-ssm pretrain --out begun --resume" in error
    resume(tmp_path / "begun")
    assert main([*said[1:-4], "--length", "16", "--steps", "5"]) == 0
    folder = RunFolder(Path("runs/begun-further"))  # where nobody says
    assert folder.read_recipe() == Recipe.of(
        "hydra-tiny", sources=(str(text_file),), model="begun", seed=1, steps=5, length=16
    )
    assert list(history(folder.path, "eval_loss")) == [0, 1, 2, 3, 4, 5]
    kept = [run / "training" / "held_out" / "tokens.bin" for run in (folder.path, tmp_path / "begun")]
    assert kept[0].read_bytes() == kept[1].read_bytes()  # nothing that was trained on is held out now
