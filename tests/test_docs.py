"""The documentation is true: its code runs, its links lead somewhere, and no matrix class is missing from it."""

import importlib.util
import inspect
import json
import re
import struct
import sys
from pathlib import Path

import pytest
import test_matrices
import torch

from hydra_ssm import MATRICES, MatrixMixer, undecayed

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
MATRICES_PAGE = (DOCS / "matrices.md").read_text(encoding="utf-8")
ADDING_PAGE = (DOCS / "adding-a-matrix.md").read_text(encoding="utf-8")
ROOMS = "hydra_ssm|tests|docs|benchmarks|recipes"
BLOCK = re.compile(r"(?:<!-- (.+?) -->\n)?```python\n(.*?)```", re.DOTALL)


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def png_size(path):
    signature, width, height = struct.unpack(">8s8x2I", path.read_bytes()[:24])
    assert signature == b"\x89PNG\r\n\x1a\n", path
    return width, height


@pytest.mark.parametrize("name", MATRICES)
def test_every_class_has_a_section_with_its_file_and_its_picture(name):
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", MATRICES_PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"docs/matrices.md has no section '## {name}'"
    home = Path(inspect.getfile(MATRICES[name])).relative_to(ROOT).as_posix()
    assert f"[{home}](../{home})" in section[1]
    assert f"![{name}](pictures/{name}.png)" in section[1]
    assert re.search(rf"^\| \[{name}\]\(#{name}\) .*`{home}` \|$", MATRICES_PAGE, re.MULTILINE), "not in the table"
    assert (DOCS / "pictures" / f"{name}.png").stat().st_size < 60_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"
    for path in re.findall(rf"`((?:{ROOMS})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_code_of_the_matrices_page_runs():
    names = {}
    for _, code in BLOCK.findall(MATRICES_PAGE):
        exec(code, names)


def test_the_code_for_code_of_ones_own_runs_and_no_weight_decay_reaches_the_decays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixer, text = BLOCK.findall((DOCS / "using.md").read_text(encoding="utf-8"))
    names, parts = {}, ("A_log", "dt_bias", "D")
    exec(mixer[1], names)
    assert names["kept"] == {f"mixers.{i}.{part}" for i in range(3) for part in parts}
    decayed = {id(p) for p in names["groups"][0]["params"]}
    wanted = {name for name, p in names["model"].named_parameters() if id(p) in decayed}
    assert wanted & names["kept"] == set()
    assert undecayed(names["model"].mixers[0]) == set(parts)
    exec(text[1], names)
    wanted = names["trainer"].get_decay_parameter_names(names["model"])
    assert "classifier.weight" in wanted
    assert not [name for name in wanted if name.rpartition(".")[2] in parts]


@pytest.fixture
def banded(tmp_path, monkeypatch):
    """The class of adding-a-matrix.md, installed as the page says."""
    code = next(code for mark, code in BLOCK.findall(ADDING_PAGE) if mark == "file: banded.py")
    file = tmp_path / "banded.py"
    file.write_text(code, encoding="utf-8")
    name = "hydra_ssm.matrices.banded"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(MATRICES, "banded", module.Banded)
    return module.Banded


def test_the_example_class_runs_as_its_page_says(banded):
    for mark, code in BLOCK.findall(ADDING_PAGE):
        if not mark:
            exec(code, {})


def test_the_example_class_passes_the_tests_of_the_matrices(banded, monkeypatch):
    row = next(code for mark, code in BLOCK.findall(ADDING_PAGE) if mark == "row of FORMULAS")
    monkeypatch.setitem(test_matrices.FORMULAS, "banded", eval("{" + row + "}", vars(test_matrices))["banded"])
    test_matrices.test_entries_equal_the_formula("banded")
    for length in (1, 2, 13, 23):
        test_matrices.test_product_equals_dense_with_every_gradient("banded", length)
    test_matrices.test_padding_rows_and_columns_are_zero_and_the_rest_is_the_matrix_of_the_shorter_sequence("banded")


@pytest.mark.parametrize("data_dependent", [True, False])
@pytest.mark.parametrize("order", [1, 4, 5])
def test_the_example_class_is_exact_in_a_mixer_with_padding_and_packing(banded, order, data_dependent):
    L, heads, headdim = 12, 4, 4
    layer = MatrixMixer(
        8, "banded", d_state=order, headdim=headdim, max_length=L, data_dependent=data_dependent
    ).double()
    mask = torch.rand(1, L) > 0.3
    u = torch.randn(1, L, 8, dtype=torch.float64)
    x = torch.randn(1, L, heads, headdim, dtype=torch.float64)
    nan = u.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(layer(nan, mask)[mask], layer(u[mask][None])[0], rtol=0, atol=1e-12)
    cu_seqlens = torch.tensor([0, 5, 6, L])
    apart = [layer(u[:, start:end]) for start, end in cu_seqlens.unfold(0, 2, 1)]
    torch.testing.assert_close(layer(u, cu_seqlens=cu_seqlens), torch.cat(apart, dim=1), rtol=0, atol=1e-12)
    for M in (layer.matrix(u), layer.matrix(nan, mask), layer.matrix(u, cu_seqlens=cu_seqlens)):
        torch.testing.assert_close(M @ x, torch.einsum("bhij,bjhp->bihp", M.dense(), x), rtol=1e-12, atol=1e-13)


@pytest.fixture
def script(request, monkeypatch):
    """A script of docs/ as a module."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(request.param, DOCS / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["draw_kernels"], indirect=True)
def test_the_table_of_the_kernels_is_what_their_tensors_sum_up_to(script, tmp_path, capsys):
    script.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out in (DOCS / "performance.md").read_text(encoding="utf-8")
    assert png_size(tmp_path / "kernels.png") == png_size(DOCS / "pictures" / "kernels.png")


@pytest.mark.parametrize("script", ["speed_figures"], indirect=True)
def test_measurements_become_a_page_with_tables_and_a_plot(script, tmp_path, monkeypatch):
    row = {"name": "hydra", "batch": 2, "length": 128, "step": 2.0, "graph_step": 1.5, "compiled": True}
    gone = {"name": "attention", "batch": 2, "length": 128, "note": "out of memory"}
    report = {
        "command": "hydra-ssm bench", "date": "today", "machine": {"device": "GPU", "torch": "2"},
        "ceilings": {"copy": 3e12, "matmul": 8e14}, "settings": {"d_model": 768, "dtype": "bfloat16"},
        "layers": [row, gone], "products": [], "encoders": [row, gone], "small": [row | {"forward": 0.1}] * 2,
    }  # fmt: skip
    (tmp_path / "pictures").mkdir()
    page, kept = tmp_path / "performance.md", tmp_path / "speed.json"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n", encoding="utf-8")
    kept.write_text(json.dumps(report), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    for _ in range(2):  # over what is there
        script.main(str(kept))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| hydra | 2 x 128 | - | 1.50 | - | 2.00 | - | -, - |") == 1
    assert "| 2 x 128 | 1.50 | out of memory |" in text
    assert "old" not in text
    assert png_size(tmp_path / "pictures" / "speed.png")


@pytest.mark.parametrize("script", ["draw_matrices"], indirect=True)
def test_the_drawing_script_draws_one_class(script, tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        script.main(["quasiseparable", "--out", str(folder)])
    drawn = tmp_path / "one" / "quasiseparable.png"
    assert png_size(drawn) == png_size(DOCS / "pictures" / "quasiseparable.png") == (372, 312)
    assert drawn.read_bytes() == (tmp_path / "two" / "quasiseparable.png").read_bytes()
