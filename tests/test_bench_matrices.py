"""`hydra-ssm bench --matrices`: checks first, measures what grows, and says where a promise is broken."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hydra_ssm import MATRICES
from hydra_ssm.bench import matrices
from hydra_ssm.bench.growth import LAWS, PROMISES, SLACK, Growth, Point, exponent, line
from hydra_ssm.bench.matrices import Sizes, bench_matrices, make, measure
from hydra_ssm.cli import main
from hydra_ssm.matrices import LowRank, Toeplitz

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def quick(monkeypatch):
    """Few classes, few repeats."""
    kept = ("dense", "toeplitz", "cauchy", "mult")
    monkeypatch.setattr(matrices, "PROMISES", {name: PROMISES[name] for name in kept})
    monkeypatch.setattr(matrices, "REPEATS", 2)
    return kept


def test_one_command_measures_prints_keeps_and_draws(quick, tmp_path, capsys):
    kept, drawn = tmp_path / "new" / "costs.json", tmp_path / "costs.png"
    given = ["bench", "--matrices", "--device", "cpu", "--longest", "512", "--json", str(kept), "--plot", str(drawn)]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert drawn.read_bytes().startswith(b"\x89PNG")
    report = json.loads(kept.read_text(encoding="utf-8"))
    assert report["command"] == "hydra-ssm bench --matrices --device cpu --dtype float32 --longest 512"
    assert report["machine"]["torch"] == torch.__version__
    assert report["errors"].keys() == {*quick}
    points = [Point(**p) for p in report["points"]]
    assert [(p.name, p.length) for p in points] == [(name, n) for name in quick for n in (256, 512)]
    for p in points:
        assert 0 < p.forward < p.step
    for growth in report["growth"]:
        found = Growth(**{name: value for name, value in growth.items() if name != "kept"})
        assert found.kept == growth["kept"]
        assert line([p for p in points if p.name == found.name][-1], found) in out


def test_every_class_has_a_promise_and_is_right_and_runs():
    assert PROMISES.keys() == MATRICES.keys()
    quadratic = {name for name, (law, _) in PROMISES.items() if law == "L^2"}
    assert quadratic == {"dense", "attention"}
    assert {name for name, (_, law) in PROMISES.items() if law == "L^2"} == {"dense"}
    sizes = Sizes.of("cpu")
    for name in PROMISES:
        assert matrices._checked(name, sizes, length=40) < 1e-5
        for run in make(name, 33, sizes).values():
            run()


def test_exponents_are_slopes_over_the_last_two_octaves():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([8, 16], [5, 5]) == pytest.approx(0)
    assert exponent([8], [5]) is None
    lengths = [1 << n for n in range(8, 15)]
    early = [10.0] * 4  # overhead
    grown = Growth.of([Point("low_rank", n, 1, y, y) for n, y in zip(lengths, [*early, 10, 20, 40], strict=True)])
    assert grown.time == pytest.approx(1)
    assert grown.memory == pytest.approx(1)
    assert grown.promised_time == pytest.approx(1)
    assert Growth.of([Point("toeplitz", n, 1, LAWS["L log L"](n), 1) for n in lengths]).time == pytest.approx(
        Growth.of([Point("toeplitz", n, 1, 1, 1) for n in lengths]).promised_time
    )


@pytest.mark.parametrize("what", ["step", "peak"])
def test_a_broken_promise_is_marked(what):
    for excess, kept in ((SLACK - 0.01, True), (SLACK + 0.01, False)):
        grown = {"step": 1.0, "peak": 1.0, what: 1 + excess}
        points = [Point("cauchy", n, 1, n ** grown["step"], n ** grown["peak"]) for n in (1024, 2048, 4096)]
        growth = Growth.of(points)
        assert growth.kept == kept
        assert line(points[-1], growth).endswith("x") != kept


def test_a_class_stops_before_a_step_would_take_too_long_or_too_much_memory(monkeypatch):
    monkeypatch.setattr(matrices, "REPEATS", 1)
    sizes = Sizes(CPU, torch.float32, 1 << 20, 2, 8, 4, seconds=1e-9)
    assert [p.length for p in measure("low_rank", sizes)] == [256]
    monkeypatch.setattr(matrices, "MEMORY", 3e6)
    points = measure("dense", Sizes(CPU, torch.float32, 1 << 20, 2, 8, 4, seconds=10.0))
    if points[-1].peak is None:
        pytest.skip("the system does not tell")
    assert points[-1].length < 1024


def test_a_quadratic_product_would_be_seen(monkeypatch):
    """The measured exponent of a class whose product goes through its entries is above its promise."""
    monkeypatch.setattr(matrices, "REPEATS", 3)
    monkeypatch.setattr(Toeplitz, "multiply", lambda self, x: torch.einsum("bhij,bjhp->bihp", self.entries(), x))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many would hide the growth of so small a product
    growth = Growth.of(measure("toeplitz", Sizes(CPU, torch.float32, 2048, 2, 4, 4, seconds=60.0)))
    torch.set_num_threads(threads)
    assert not growth.kept
    assert growth.time > 1.5


def test_nothing_is_timed_of_a_wrong_product(quick, monkeypatch, capsys):
    right = Toeplitz.multiply
    monkeypatch.setattr(Toeplitz, "multiply", lambda self, x: 1.001 * right(self, x))
    assert main(["bench", "--matrices", "--device", "cpu", "--longest", "512"]) == 1
    found = capsys.readouterr()
    assert "toeplitz is off by 1.0e-03 relative to float64, more than 1e-04; nothing is timed" in found.err
    assert "forward" not in found.out
    monkeypatch.setattr(Toeplitz, "multiply", right)
    monkeypatch.setitem(matrices.PROMISES, "low_rank", PROMISES["low_rank"])
    monkeypatch.setattr(LowRank, "multiply", lambda self, x: torch.nan * x)
    assert main(["bench", "--matrices", "--device", "cpu", "--longest", "512"]) == 1
    assert "low_rank is off by nan" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "message"), [
    (["--matrices", "--longest", "300"], "--longest must be at least 512, got 300"),
    (["--matrices", "--lengths", "64"], "--matrices measures products and no layers: it does not go with --lengths"),
    (["--matrices", "--encoder", "--d-model", "64"], "does not go with --d-model, --encoder"),
    (["--longest", "1024"], "--longest goes with --matrices"),
    (["--matrices", "--json", "."], "--json must be a file, . is a folder"),
    (["--matrices", "--device", "tpu"], "--device must be one of cpu"),
])  # fmt: skip
def test_a_mistake_is_told_before_anything_runs(given, message, capsys):
    assert main(["bench", *given]) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert not found.out


def test_the_page_has_the_figures_that_are_kept_and_every_promise_is(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("cost_figures", ROOT / "docs" / "cost_figures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "matrices.md").read_text(encoding="utf-8")
    report = json.loads((ROOT / "results" / "matrices-cpu.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(script, "PAGE", tmp_path / "matrices.md")
    script.PAGE.write_text(page, encoding="utf-8")
    script.main()
    assert script.PAGE.read_text(encoding="utf-8") == page
    assert {growth["name"] for growth in report["growth"]} == {*MATRICES}
    assert [growth["name"] for growth in report["growth"] if not growth["kept"]] == []
    assert (ROOT / "docs" / "pictures" / "costs.png").stat().st_size < 150_000


@pytest.mark.gpu
def test_the_command_runs_on_a_gpu(quick, tmp_path):
    report = bench_matrices(device="cuda", longest=2048, json=tmp_path / "costs.json")
    assert {p["name"] for p in report["points"]} == {*quick}
    assert all(p["peak"] > 0 for p in report["points"])
