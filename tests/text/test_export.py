"""Exported files compute what the model does, at batches and lengths that the exporter has not seen."""

import copy
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_models import tiny, words
from test_inference import save

import hydra_ssm
from hydra_ssm.cli import main
from hydra_ssm.text import (
    HydraForMaskedLM,
    HydraForMultipleChoice,
    HydraForSequenceClassification,
    HydraForTokenClassification,
    HydraModel,
    HydraPreTrainedModel,
)
from hydra_ssm.text.export import OUTPUTS, difference, export, read_onnx, write_onnx, write_torch
from hydra_ssm.text.inference import TextModel

ONE = {"num_hidden_layers": 1}  # a layer: exporters take seconds for each
SIZES = ((1, 2), (1, 3), (2, 64), (4, 65), (1, 150))

ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
inputs, expected = torch.load(sys.argv[2])
for found, wanted in zip(map(lambda i: program(*i), inputs), expected, strict=True):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
assert not any(name.startswith("hydra_ssm") for name in sys.modules)
"""


def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """Tokens of two types, with padding anywhere but at a row's first token."""
    mask = torch.rand(batch, length) > 0.2
    mask[:, 0] = True
    return words(batch, length), mask.long(), (torch.arange(length) > length // 2).long().expand(batch, -1)


def exact(source: HydraPreTrainedModel, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What float64 gives; sentence embeddings of each text alone, without its padding."""
    model = copy.deepcopy(source).double()
    with torch.no_grad():
        found = dict(model(*given))
        if "last_hidden_state" in found:
            alone = [
                model(ids[mask > 0][None], token_type_ids=types[mask > 0][None])
                for ids, mask, types in zip(*given, strict=True)
            ]
            found["sentence_embedding"] = torch.cat([text.last_hidden_state.mean(1) for text in alone])
    return [found[name] for name in OUTPUTS[type(model).__name__]]


def check(source: HydraPreTrainedModel, file: Path, sizes: Sequence[tuple[int, int]]) -> None:
    run = read_onnx(file)
    for given in [inputs(*size) for size in sizes]:
        for found, wanted in zip(run(*given), exact(source, given), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def names_no_folder(file: Path) -> bool:
    """Whether it says nothing of where the library lies that wrote it."""
    parts = [file.read_bytes()]
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    return not any(str(Path(hydra_ssm.__file__).parent).encode() in part for part in parts)


@pytest.mark.parametrize(
    ("kind", "model"),
    [("hydra", HydraForMaskedLM), ("bert", HydraModel), ("bert", HydraForSequenceClassification)],
)
def test_onnxruntime_computes_the_model_at_any_batch_and_length(
    kind: str, model: type[HydraPreTrainedModel], tmp_path: Path
) -> None:
    source = model(tiny(kind, num_labels=3, **ONE)).eval()
    write_onnx(source, tmp_path / "model.onnx")
    assert names_no_folder(tmp_path / "model.onnx")
    check(source, tmp_path / "model.onnx", SIZES if kind == "hydra" else ((1, 2), (3, 5), (2, 12)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[HydraModel, Path]:
    """A model and its file for torch."""
    torch.manual_seed(0)
    source, file = HydraModel(tiny("hydra", **ONE)).eval(), tmp_path_factory.mktemp("written") / "model.pt2"
    write_torch(source, file)
    return source, file


def test_a_torch_file_runs_where_this_library_is_not(written: tuple[HydraModel, Path], tmp_path: Path) -> None:
    source, file = written
    assert names_no_folder(file)
    given = [inputs(*size) for size in SIZES]
    torch.save((given, [tuple(w.float() for w in exact(source, i)) for i in given]), tmp_path / "expected.pt")
    command = [sys.executable, "-c", ALONE, str(file), str(tmp_path / "expected.pt")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["toeplitz", "vandermonde", "cauchy"])
def test_matrices_whose_product_depends_on_the_length_are_named(name: str) -> None:
    model = HydraModel(tiny("hydra", mixers=name, max_position_embeddings=64, **ONE)).eval()
    with pytest.raises(ValueError, match=f"{name.capitalize()} does not export with a dynamic length"):
        export(model)


def test_a_program_that_gives_nan_differs(written: tuple[HydraModel, Path]) -> None:
    model, file = written
    exact = torch.export.load(file).module()
    assert difference(model, exact) < 1e-5
    assert difference(model, lambda *inputs: tuple(torch.full_like(t, torch.nan) for t in exact(*inputs))) == torch.inf


@pytest.mark.parametrize("name", ["low_rank", "concat"])
def test_a_hybrid_of_other_linear_mixers_exports(name: str) -> None:
    model = HydraModel(tiny("hydra", mixers=[name, "attention"], num_hidden_layers=2)).train()
    model.embeddings.eval()  # as where a part is frozen
    assert difference(model, export(model).module()) < 1e-5
    assert model.training, "what was training goes on"
    assert not any(part.training for part in model.embeddings.modules()), "and nothing else does"


def test_a_model_of_many_choices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of HydraForMaskedLM, .*, got HydraForMultipleChoice"):
        export(HydraForMultipleChoice(tiny(**ONE)))


def test_the_command_writes_what_the_model_was_trained_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = HydraForTokenClassification(tiny("bert", num_labels=3, **ONE)).eval()
    save(source, tmp_path)
    capsys.readouterr()  # what transformers shows
    assert main(["export", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "model.onnx: " in shown.out
    assert ", gives logits\n" in shown.out
    assert "it differs from the model by " in shown.out
    assert shown.err == ""
    check(source, tmp_path / "model.onnx", ((1, 2), (3, 5), (2, 12)))
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "no" / "model.onnx")]) == 2
    assert "the folder of --out must exist" in capsys.readouterr().err


def test_int8_keeps_the_linear_layers_in_a_quarter_and_all_else_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = HydraForMaskedLM(tiny("hydra", hidden_size=128, vocab_size=16)).eval()
    folder, out = save(source, tmp_path / "model"), tmp_path / "int8"
    capsys.readouterr()
    assert main(["export", str(folder), "--format", "int8", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "outputs move by up to " in shown.out
    assert shown.err == ""
    assert (out / "model.safetensors").stat().st_size < 0.35 * (folder / "model.safetensors").stat().st_size
    found = HydraForMaskedLM.from_pretrained(out).eval()
    before = dict(source.named_parameters())
    for name, parameter in found.named_parameters():
        if type(parameter.data) is torch.Tensor:
            assert torch.equal(parameter, before[name]), name
        else:
            assert name.endswith(("proj.weight", "head.dense.weight")), name
            scale = before[name].abs().amax(1, keepdim=True) / 127
            assert ((parameter.data.dequantize() - before[name]).abs() <= 0.51 * scale).all(), name
    given = inputs(2, 70)[0] % 16
    with torch.no_grad():
        wanted, less = source(given).logits, found(given).logits
    assert 0 < (less - wanted).norm() / wanted.norm() < 0.02
    embedded = [TextModel(f).embed(["the cat", "a mat"]) for f in (folder, out)]
    torch.testing.assert_close(*embedded, rtol=0, atol=0.05)
    assert main(["export", str(folder), "--format", "int8", "--out", str(out)]) == 2
    assert "--out must be new" in capsys.readouterr().err


def test_a_head_without_weights_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(HydraModel(tiny(**ONE, vocab_size=16)), tmp_path, architectures=["HydraForMaskedLM"])
    assert main(["export", str(folder)]) == 2
    assert "it lacks weights of its head: try --embed" in capsys.readouterr().err
