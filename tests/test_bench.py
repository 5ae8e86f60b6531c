"""`hydra-ssm bench`: what it counts, that it checks before it times, and that it says what it could not measure."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hydra_ssm import Encoder, Hydra, SelfAttention
from hydra_ssm.bench import Settings, WrongResult, bench, clock, costs, encoders, scans
from hydra_ssm.bench.layers import layer_error
from hydra_ssm.bench.machine import Ceilings
from hydra_ssm.bench.measure import measure
from hydra_ssm.bench.report import Row
from hydra_ssm.cli import main
from hydra_ssm.matrices import Quasiseparable
from hydra_ssm.ops import Triangle, semiseparable

CPU = torch.device("cpu")
SMALL = ["bench", "--device", "cpu", "--d-model", "64", "--tokens", "64", "--lengths", "16", "64"]
H100 = Ceilings(copy=3.0e12, matmul=790e12)


def test_one_command_prints_a_table_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, drawn = tmp_path / "new" / "speed.json", tmp_path / "speed.png"
    assert main([*SMALL, "--json", str(kept), "--plot", str(drawn)]) == 0
    out = capsys.readouterr().out
    report = json.loads(kept.read_text(encoding="utf-8"))
    assert drawn.read_bytes().startswith(b"\x89PNG")
    shapes = [(row["name"], row["batch"], row["length"]) for row in report["layers"]]
    assert shapes == [(name, batch, length) for batch, length in ((4, 16), (1, 64)) for name in ("hydra", "attention")]
    assert {row["name"] for row in report["products"]} == {"hydra_ssm"}  # the peers need a GPU
    for row in (Row(**row) for row in report["layers"] + report["products"]):
        assert str(row) in out
        assert row.forward > 0
        assert row.tokens_per_second == pytest.approx(1e3 * row.batch * row.length / row.step)
        assert 0 < row.step_of_ceilings < 1
    assert report["errors"].keys() == {"hydra", "attention", "product"}
    assert report["machine"]["torch"] == torch.__version__
    assert report["command"] == " ".join(
        ["hydra-ssm", *SMALL[:3], "--dtype float32", *SMALL[3:], "--layers hydra attention"]
    )


def test_whole_encoders_are_timed_where_they_are_asked_for(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoders, "STACKS", {"hydra": ("two", 2, 0), "attention": ("one", 1, 4)})
    monkeypatch.setattr(encoders, "SMALL", (64, 1, 8))
    bench(json=tmp_path / "speed.json", device="cpu", d_model=64, tokens=256, lengths=(16,), encoder=True)
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert report["command"].endswith("--layers hydra attention --encoder")
    rows = [Row(**row) for row in report["encoders"]]
    assert [(row.name, row.batch, row.length, row.compiled) for row in rows] == [
        ("two", 1, 128, False), ("one", 1, 128, False)
    ]  # fmt: skip
    assert all(str(row) in out and row.step > 0 and row.forward is None for row in rows)
    hydra, attention = (Row(**row).forward for row in report["small"])
    assert f"hydra / attention: {hydra / attention:.2f}" in out

    def stopped(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoders, "_small", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(json=tmp_path / "part.json", device="cpu", d_model=64, tokens=256, lengths=(16,), encoder=True)
    kept = json.loads((tmp_path / "part.json").read_text(encoding="utf-8"))
    assert [len(kept[part]) for part in ("layers", "encoders")] == [2, 2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_alike_layers_are_compiled_once_and_checked(monkeypatch) -> None:
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    encoder = Encoder(64, ["attention"] * 3)
    assert encoders.compile_layers(encoder, "three", 3, 8, torch.float32, print)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    wrong = [torch.zeros(3, 8, 64)] * 2
    right = encoders.gradient
    monkeypatch.setattr(encoders, "gradient", lambda e, u, *more: wrong if len(u) == 3 else right(e, u, *more))
    with pytest.raises(WrongResult, match="the output of three, compiled, is off by"):
        encoders.compile_layers(encoder, "three", 3, 8, torch.float32, print)


@pytest.mark.parametrize(("given", "message"), [
    (["--lengths", "0"], "--lengths must be at least 1, got 0"),
    (["--tokens", "0"], "--tokens must be at least 1, got 0"),
    (["--lengths"], "--layers and --lengths must name at least one each"),
    (["--d-model", "100"], "headdim must divide expand * d_model = 200, got 64"),
    (["--device", "tpu"], "--device must be one of cpu"),
    (["--json", "."], "--json must be a file, . is a folder"),
])  # fmt: skip
def test_a_mistake_is_told_before_anything_runs(given, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *given]) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert "ceilings" not in found.out


def test_no_speed_is_printed_of_a_wrong_layer(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = Quasiseparable.multiply
    monkeypatch.setattr(Quasiseparable, "multiply", lambda self, x: 1.001 * right(self, x))
    assert main(SMALL) == 1
    found = capsys.readouterr()
    assert "product is off by" in found.err  # the norm hides the factor from the layer
    assert "nothing is timed" in found.err
    assert "forward" not in found.out
    monkeypatch.setattr(Quasiseparable, "multiply", lambda self, x: right(self, x) + 1e-3 * x)
    assert main(SMALL) == 1
    assert "hydra is off by" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_as_exact_as_their_dtype(dtype) -> None:
    for layer in (Hydra(64), SelfAttention(64)):
        error = layer_error(layer, dtype, length=70)
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)
        assert (error > 1e-4) == (dtype == torch.bfloat16)  # autocast is on


def test_what_a_token_must_cost_is_what_the_plan_counted() -> None:
    """The figures of the kernels' plan, counted by hand for the base model in bfloat16."""
    layer = Hydra(768, device="meta")
    forward, backward = costs.hydra(layer, 2, 1)
    assert forward.projections == pytest.approx(7.54e6, rel=0.015)
    assert forward.traffic == pytest.approx(20.5e3, rel=0.015)
    assert backward.traffic == pytest.approx(36.7e3, rel=0.015)
    assert (forward + backward).seconds(H100) == pytest.approx(48e-9, rel=0.015)
    forward, backward = costs.product(layer, 2)
    assert forward.traffic == pytest.approx(6752, rel=0.015)
    assert backward.traffic == pytest.approx(10432, rel=0.015)
    assert 41e3 <= forward.products / 24 <= 49e3
    assert 98e3 <= backward.products / 24 <= 115e3
    forward, _ = costs.attention(SelfAttention(768, device="meta"), 2, 2048)
    assert forward.projections == pytest.approx(4.72e6, rel=0.01)
    assert forward.products == 4 * 2048 * 768


def test_a_shape_that_does_not_fit_is_a_row_that_says_so() -> None:
    row = measure("huge", 1, 8, lambda: {"forward": torch.empty(1 << 60).zero_}, CPU)
    assert str(row).split() == ["huge", "1", "x", "8", "out", "of", "memory"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure("wrong", 1, 8, lambda: {"forward": torch.ones(2, 3) @ torch.ones(2, 3)}, CPU)


def test_a_causal_scan_called_twice_is_both_triangles() -> None:
    def scan(x, dt, A, B, C):
        return semiseparable(x, [Triangle(dt, A, B, C)])

    layer = Hydra(64)
    for groups in (1, layer.settings.nheads):
        inputs = scans.draw(layer, 2, 21, torch.float32, groups, CPU)
        assert scans.product_error(scans.twice(scan), inputs, ours=False) < 1e-6
        assert scans.product_error(scans.quasiseparable, inputs, ours=True) < 1e-6
        assert scans.product_error(scans.quasiseparable, inputs, ours=False) > 0.1


def test_the_peak_is_that_of_the_run() -> None:
    peak = clock.peak_bytes(lambda: torch.ones(1 << 24).sum(), CPU)
    if peak is None:
        pytest.skip("the system does not tell")
    assert peak == pytest.approx(1 << 26, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="needs triton's interpreter")
def test_the_scripts_for_a_gpu_run_through_the_interpreter(tmp_path: Path) -> None:
    """Both in one process, which imports torch once."""
    folder, kept = Path(__file__).parent.parent / "benchmarks" / "gpu", tmp_path / "accuracy.json"
    accuracy = ["accuracy.py", "--dtypes", "float32", "--only", "L = 2", "--json", str(kept), "--device", "cpu"]
    both = [["sweep.py", "--device", "cpu"], accuracy]
    code = f"import runpy, sys\nfor sys.argv in {both}: runpy.run_path(sys.argv[0], run_name='__main__'); print('end')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    of_sweep, out = done.stdout.split("end\n")
    assert of_sweep == ""  # what does not run is told
    assert "1 rows, 0 of them drawn; 0 bad" in out
    (row,) = json.loads(kept.read_text(encoding="utf-8"))["rows"]
    assert row["errors"].keys() == {"y", "x", "dt_f", "dt_b", "A", "B_f", "C_f", "B_b", "C_b", "diagonal"}


@pytest.mark.gpu
def test_times_and_peaks_of_a_gpu() -> None:
    device = torch.device("cuda")
    x = torch.ones(1 << 28, device=device)
    assert all(1e-4 < seconds < 0.1 for seconds in clock.on_gpu(lambda: x + 1, device))
    assert clock.peak_bytes(lambda: x + 1, device) == 1 << 30
    row = measure("add", 1, 1, lambda: {"forward": lambda: x + 1}, device)
    assert row.graph_forward == pytest.approx(row.forward, rel=0.2)
    assert len(Settings.of().shapes()) == 6
