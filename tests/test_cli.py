"""The command line: a user's mistake is one line and exit code 2, and loses nothing."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hydra_ssm
from hydra_ssm.cli import main

KINDS = ["red", "old", "big", "new"]
LINES = "".join(f"the {a} cat sees a {b} dog.\n" for a in KINDS for b in KINDS)
SHORT = ["--vocab-size", "60", "--length", "16", "--batch-size", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the text it comes from beside it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(LINES, encoding="utf-8")
    assert main(["pretrain", str(folder / "text.txt"), *SHORT, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def here(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that a user may point to by mistake."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(LINES, encoding="utf-8")
    Path("greek.txt").write_text("η γάτα και ο σκύλος\n" * 20, encoding="utf-8")
    Path("empty.txt").write_text(" \n", encoding="utf-8")
    Path("binary.txt").write_bytes(b"\x00\x01text")
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("short.txt").write_text("two words", encoding="utf-8")
    Path("broken.jsonl").write_text('{"text": ', encoding="utf-8")
    Path("vocab.txt").write_text("a\nb\n", encoding="utf-8")
    Path("no_text").mkdir()
    Path("texts").mkdir()
    Path("texts", "a.txt").write_text(LINES, encoding="utf-8")
    Path("foreign").mkdir()
    Path("foreign", "thesis.tex").write_text("years of work", encoding="utf-8")
    Path("run").symlink_to(run)
    Path("no_model").mkdir()
    Path("no_model", "config.json").write_text("{}", encoding="utf-8")
    Path("no_model", "model.safetensors").write_text("", encoding="utf-8")
    return tmp_path


MISTAKES = {
    "image": "the command must be one of image train, image eval, image predict, image compare, got image",
    "frobnicate": "the command must be one of pretrain, fill-mask, embed, .* got frobnicate",
    "pretrain --stepz 3": "Unrecognized options: --stepz",
    "pretrain --steps few": "Error parsing --steps: no type matching INT could be instantiated from ['few']",
    "pretrain nowhere.txt": "there is no file or folder nowhere.txt",
    "pretrain nowhere/": "there is no file or folder nowhere/",
    "pretrain someone/something": "someone/something is neither a file, a folder nor a data set that could be loaded: ",
    "pretrain text.txt --column body": "a column must be of a data set, there is none to take body from",
    "pretrain text.txt --held-out ./text.txt": "what is held out must not be trained on, .* text.txt is in both",
    "pretrain texts --held-out texts/a.txt": "what is held out must not be trained on, .* a.txt is in both",
    "pretrain empty.txt": "empty.txt must hold text, it is empty",
    "pretrain binary.txt": "binary.txt must be text, it holds a zero byte at 0: a binary file?",
    "pretrain latin.txt": "latin.txt must be UTF-8 text, its byte 2 is not: ",
    "pretrain broken.jsonl": "cannot read broken.jsonl as json: ",
    "pretrain no_text": "the folder no_text must hold text or data files (.csv, .json, ",
    "pretrain short.txt": "the text must have at least 512 tokens to train on (batch_size * length), it has ",
    "pretrain text.txt --preset huge": "a preset must be one of hydra-base, bert-base, hydra-tiny, ",
    "pretrain text.txt --preset bert-tiny --length 600": "length must be at most 512 for bert-tiny, got 600",
    "pretrain text.txt --length 0": "length must be at least 3, got 0",
    "pretrain text.txt --steps 0": "steps must be at least 1, got 0",
    "pretrain text.txt --batch-size 3 --accumulate 2": "accumulate must divide batch_size = 3, got 2",
    "pretrain text.txt --mask-rate 1.5": "mask_rate must be above 0 and at most 1, got 1.5",
    "pretrain text.txt --learning-rate nan": "learning_rate must be a finite number and not negative, got nan",
    "pretrain text.txt --vocab-size 10": "vocab_size must be at least ",
    "pretrain text.txt --tokenizer nowhere": "no tokenizer at nowhere",
    "pretrain text.txt --tokenizer vocab.txt": "vocab.txt must hold [PAD], [UNK], [CLS], [SEP], [MASK], it lacks ",
    "pretrain greek.txt --tokenizer run --length 16 --batch-size 2 --out run --overwrite": (
        "the tokenizer must know the text, it finds .* and has a token for 0 of them: leave out --tokenizer"
    ),
    "pretrain text.txt --out run": "run already holds a run: add --model run --out NEW to train its model further",
    "pretrain text.txt --out foreign": "foreign must be new, empty or hold a run, it holds thesis.tex",
    "pretrain text.txt --out foreign --overwrite": "foreign must be new, empty or hold a run, it holds thesis.tex",
    "pretrain text.txt --out text.txt": "text.txt must be a folder, it is a file",
    "pretrain text.txt --out run --overwrite --seed 99999999999": "seed must be at most 4294967295, got 99999999999",
    "pretrain empty.txt --out run --overwrite": "empty.txt must hold text, it is empty",
    "pretrain --out run --resume --steps 9": "steps is 2 in the run that goes on in run, got 9: a run of 9 has had ",
    "pretrain --out run --resume --overwrite": "--resume goes on with a run, --overwrite removes it: give one of them",
    "pretrain --out new --resume": "there is no run in new to resume: start it without --resume",
    "fill-mask run": "Missing from hydra-ssm fill-mask: TEXT",
    "fill-mask run no-mask-here": "the text must hold a [MASK], got 'no-mask-here'",
    "fill-mask run [MASK] --top 0": "--top must be at least 1, got 0",
    "fill-mask nowhere [MASK]": "nowhere must hold a model (config.json and model.safetensors), it does not",
    "fill-mask foreign [MASK]": "foreign must hold a model (config.json and model.safetensors), it does not",
    "fill-mask no_model [MASK]": "no_model holds no model that can be read: the model_type of config.json must be ",
    "embed run nowhere.txt": "cannot read nowhere.txt: No such file or directory",
    "embed run empty.txt": "empty.txt must hold text, it is empty",
    "embed run text.txt --dtype float64": "invalid choice 'float64' for argument '--dtype'. Expected one of ('",
    "embed run text.txt --out nowhere/x.npy": "the folder of --out must exist, there is no nowhere",
    "convert nowhere.pt new": "nowhere.pt",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [*here.rglob("*"), *here.joinpath("run").resolve().rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    start, _, end = MISTAKES[command].partition(" .* ")
    assert error.startswith("hydra-ssm: error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert start in error
    assert end in error
    assert "'None'" not in error
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not any(Path("runs").glob("*"))  # nothing is begun


def test_words_that_the_tokenizer_does_not_know_are_warned_of(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mixed.txt").write_text(LINES.replace("big", "μεγάλη"), encoding="utf-8")
    assert main(["pretrain", "mixed.txt", *SHORT[2:], "--tokenizer", "run", "--out", "mine"]) == 0
    assert "warning: the tokenizer does not know 7% of the text's words" in capsys.readouterr().err


def test_overwrite_removes_the_old_run_and_nothing_else(here: Path) -> None:
    command = ["pretrain", "text.txt", *SHORT, "--out", "mine"]
    assert main(command) == 0
    Path("mine", "notes.txt").write_text("of the user", encoding="utf-8")
    Path("mine", "training", "checkpoints", "checkpoint-77").mkdir()
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    assert Path("mine", "notes.txt").read_text(encoding="utf-8") == "of the user"
    assert not Path("mine", "training", "checkpoints", "checkpoint-77").exists()
    assert '"seed": 1' in Path("mine", "training", "recipe.json").read_text(encoding="utf-8")


def test_a_finished_run_is_not_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--out", "run", "--resume"]) == 0
    assert "has ended already" in capsys.readouterr().out


def test_damaged_data_is_not_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "text.txt", *SHORT, "--out", "mine"]) == 0
    Path("mine", "training", "finished.json").unlink()
    Path("mine", "training", "train", "tokens.bin").write_bytes(b"0000")
    assert main(["pretrain", "--out", "mine", "--resume"]) == 2
    assert "training is damaged (train/tokens.bin has changed since it was written)" in capsys.readouterr().err


def test_fill_mask_shows_words_and_probabilities(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fill-mask", "run", "the [MASK] cat sees a [MASK].", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[::4]] == [["[MASK]", "1"], ["[MASK]", "2"]]
    assert len(lines) == 8
    assert all(0 < float(line.split()[1].rstrip("%")) < 100 for line in lines[1:4])


def test_embed_writes_a_vector_for_each_paragraph(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.md").write_text("# the cat\n\nsees a dog.\nand a cat.\n\n\nthe end\n", encoding="utf-8")
    assert main(["embed", "run", "notes.md"]) == 0
    vectors = np.load("notes.md.npy")
    out = capsys.readouterr().out
    assert len(vectors) == 3
    assert out.startswith(f"wrote notes.md.npy: 3 texts, {vectors.shape[1]} numbers each\n")
    assert out.count("alike by") == 3
    assert main(["embed", "run", "text.txt", "--out", "lines.npy"]) == 0
    assert len(np.load("lines.npy")) == len(LINES.splitlines())


def test_embed_shows_how_a_text_of_one_long_word_begins(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dna.txt").write_text("\n".join(letter * 120 for letter in "ACGT"), encoding="utf-8")
    assert main(["embed", "run", "dna.txt"]) == 0
    assert f"  {'A' * 96} ...\n" in capsys.readouterr().out


def test_a_missing_extra_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tyro", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert main(["pretrain", "text.txt"]) == 2
        assert capsys.readouterr().err == (
            f'hydra-ssm: error: {name} is not installed: pip install "hydra-ssm[train]"\n'
        )


def test_the_traceback_is_shown_to_whoever_asks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_SSM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no run"):
        main(["pretrain", "--out", "new", "--resume"])


def test_a_mistake_of_ours_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("hydra_ssm.train.pretrain.prepare", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["pretrain", "text.txt"])


def test_the_version_needs_no_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hydra-ssm {hydra_ssm.__version__}, torch {torch.__version__}\n"


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_a_word_that_begins_several_commands_helps_with_them(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", asked]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: hydra-ssm image COMMAND")
    for name in ("image train", "image eval", "image predict", "image compare"):
        assert re.search(rf"^  {name} +[A-Z].*\.$", shown, re.MULTILINE), name


def test_help_teaches_by_example_and_loads_nothing_heavy() -> None:
    code = "import sys, hydra_ssm.cli as c; c.main(['--help']); sys.exit('tyro' in sys.modules)"
    for command in (["-c", code], ["-m", "hydra_ssm.cli"]):
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        assert 'hydra-ssm fill-mask runs/mine "A [MASK] sentence."' in found.stdout
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--help"])
    assert end.value.code == 0
