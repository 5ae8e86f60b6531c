"""The package as a whole: light to import, layered, and described truly by its own files."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hydra_ssm._extras import require

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hydra_ssm"

# A module may import its own room and those of a lower level. The root stands above the encoder, which it re-exports;
# modules named _*.py are helpers for all.
LEVEL = {
    "helpers": 0,
    "ops": 1,
    "matrices": 2,
    "parameters": 2,  # of a mixer: neither imports the other
    "mixer": 3,
    "released": 3,  # parameter names only: neither imports the other
    "layer": 4,
    "encoder": 5,
    "root": 6,
    "pretrained": 6,  # of texts and pictures alike: neither it nor the root imports the other
    "text": 7,
    "vision": 7,
    "bench": 7,
    "inspection": 8,
    "train": 9,
    "commands": 10,
    "cli": 11,
}
CORE = {"helpers", "ops", "matrices", "mixer", "released", "layer", "encoder", "root"}
CORE_REQUIREMENTS = {"torch", "einops"}
OPTIONAL = {
    "accelerate", "datasets", "matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "safetensors", "scipy",
    "sklearn", "tensorboard", "timm", "tokenizers", "torchao", "torchvision", "transformers", "triton", "tyro",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- imports


def room_of(module: str) -> str:
    """The room of ``hydra_ssm.a.b``: ``a``, or where a module outside the rooms belongs."""
    name = module.partition(".")[2].partition(".")[0]
    if name in ("", "__init__"):
        return "root"
    if name == "__main__":
        return "cli"
    return "helpers" if name.startswith("_") else name


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, at its top or later, by statement or by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(path, node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full.startswith("hydra_ssm.") and is_module(full) else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in ("import_module", "__import__", "require"):
                yield node.lineno, str(node.args[0].value)


def absolute_name(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_module_has_a_room() -> None:
    unknown = {room_of(module_name(path)) for path in sources()} - set(LEVEL)
    assert not unknown, f"not in the table LEVEL of this test: {sorted(unknown)}"


def test_imports_point_from_higher_rooms_to_lower_ones() -> None:
    wrong = []
    for path in sources():
        importer = room_of(module_name(path))
        for line, module in imported_modules(path):
            if module.partition(".")[0] != "hydra_ssm":
                continue
            imported = room_of(module)
            if imported != importer and LEVEL[imported] >= LEVEL[importer] and importer != "root":
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {importer} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_core_names_no_package_but_torch_and_einops() -> None:
    """Triton is the exception: the folders named triton, imported only when used, and the ops that choose them."""
    wrong = []
    for path in sources():
        room = room_of(module_name(path))
        allowed = CORE_REQUIREMENTS | {"hydra_ssm", "__future__"} | sys.stdlib_module_names
        allowed |= {"triton"} if room == "ops" else set()
        if room in CORE:
            found = ((line, module.partition(".")[0]) for line, module in imported_modules(path))
            wrong += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in found if name not in allowed]
    assert not wrong, "\n".join(wrong)


def test_the_direction_test_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hydra_ssm" / "ops").mkdir(parents=True)
    (tmp_path / "hydra_ssm" / "mixer.py").touch()
    source = tmp_path / "hydra_ssm" / "ops" / "scan.py"
    source.write_text(
        "import hydra_ssm.mixer\nfrom hydra_ssm import mixer\nfrom hydra_ssm.mixer import Hydra\nfrom .. import mixer\n"
        "def late():\n    from ..mixer import Hydra\n    import_module('hydra_ssm.mixer')\n",
        encoding="utf-8",
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert sorted(imported_modules(source)) == [(line, "hydra_ssm.mixer") for line in (1, 2, 3, 4, 6, 7)]


# ------------------------------------------------------------------------------------------------- cost of importing

IMPORT = f"""
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import hydra_ssm
elapsed = time.perf_counter() - start
heavy = {{name.partition(".")[0] for name in set(sys.modules) - before}} & {OPTIONAL!r}
print(elapsed, *sorted(heavy))
"""


def test_importing_is_quick_and_loads_no_optional_package() -> None:
    taken: list[float] = []
    while not taken or (min(taken) > 0.3 and len(taken) < 3):  # another process may be what took the time
        run = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, *loaded = run.stdout.split()
        assert not loaded, f"import hydra_ssm imports {loaded}"
        taken.append(float(seconds))
    assert min(taken) <= 0.3, f"import hydra_ssm takes {taken} s over import torch"


def test_importing_prints_nothing_whatever_is_installed() -> None:
    """torchao, which transformers imports, reports the libraries that it cannot load."""
    code = "import hydra_ssm.text, hydra_ssm.train.trainer, logging; logging.warning('still logged')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "WARNING:root:still logged\n")


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ImportError, match=re.escape('no_such_package is not installed: pip install "hydra-ssm[text]"')):
        require("no_such_package.part", extra="text")


def test_an_installed_package_that_fails_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import its_missing_dependency\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_missing_dependency"):
        require("half_installed", extra="text")


def test_a_torchvision_of_another_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "needs_torchvision.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=r"torchvision [\d.]+, which hydra-ssm\[vision\] brings, is not the build for torch"
    ):
        require("needs_torchvision", extra="vision")


def test_required_extras_are_declared() -> None:
    declared = set(pyproject()["project"]["optional-dependencies"])
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "require":
                extra = next((k.value for k in node.keywords if k.arg == "extra"), None) or node.args[1]
                assert ast.literal_eval(extra) in declared, f"{path}:{node.lineno}: no extra {ast.unparse(extra)}"


PACKAGES = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn"}
NOBODYS = {"_typeshed", "fla", "mamba_ssm"}  # types alone, and what is measured where it is installed


def test_every_package_that_is_imported_is_declared() -> None:
    """Not left to what others bring. In whichever extra: what a command needs, it asks for by the extra's name."""
    project = pyproject()["project"]
    declared = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in declared}  # type: ignore[index]
    for path in sources():
        for line, module in imported_modules(path):
            top = module.partition(".")[0]
            if top not in {*sys.stdlib_module_names, *NOBODYS, "hydra_ssm"}:
                assert PACKAGES.get(top, top) in names, f"{path}:{line}: {top} is not declared in pyproject.toml"


# ------------------------------------------------------------------------------------- files that describe the others


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == pyproject()["project"]["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Hwang", "Lahoti", "Dao", "Gu"]
    assert paper["url"].endswith("2407.09941")


def fenced_blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language; "" means no language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if name.strip() == language]


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = fenced_blocks("python")
    assert blocks, "README.md shows no python code"
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


def tree_paths(block: str) -> list[str]:
    """Paths of a drawn tree, relative to its root, which is the first line.

    An entry is the first word of a line, and every further word set off by two spaces that looks like a path; what
    follows a # is a comment. Depth is the column of the first word, so spaces and box-drawing characters both work.
    """
    paths: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in block.splitlines()[1:]:
        column = len(line) - len(line.lstrip(" │├└─|`-"))
        cells = re.split(r"\s{2,}", line[column:].partition("#")[0].strip())
        names = [c for i, c in enumerate(cells) if c and (i == 0 or re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", c))]
        names = [c for i, c in enumerate(names) if i == 0 or "/" in c or "." in c or c in ("Makefile", "LICENSE")]
        while parents and parents[-1][0] >= column:
            parents.pop()
        prefix = parents[-1][1] if parents else ""
        paths += [prefix + name for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            parents.append((column, prefix + names[0]))
    return paths


@pytest.mark.parametrize(
    "drawing",
    [
        "hydra-ssm/\n  pkg/   the code\n    a.py   one, e.g. this\n    sub/  # two\n      b.py\n"
        "  docs/  Makefile  .ci/run\n",
        "hydra-ssm/\n├── pkg/            the code\n│   ├── a.py  one\n│   └── sub/\n│       └── b.py\n"
        "├── docs/  words here\n├── Makefile\n└── .ci/run\n",
    ],
    ids=["indented", "drawn"],
)
def test_a_tree_is_read_by_its_columns(drawing: str) -> None:
    assert tree_paths(drawing) == ["pkg/", "pkg/a.py", "pkg/sub/", "pkg/sub/b.py", "docs/", "Makefile", ".ci/run"]


def test_the_tree_in_the_readme_is_the_repository() -> None:
    blocks = [block for block in fenced_blocks("") + fenced_blocks("text") if block.startswith("hydra-ssm/")]
    assert len(blocks) == 1, f"README.md must draw one tree, in a block that starts with hydra-ssm/, got {len(blocks)}"
    paths = tree_paths(blocks[0])
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"in the tree, not in the repository: {missing}"
    packages = {f"hydra_ssm/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    unlisted = {f"hydra_ssm/{path.name}" for path in PACKAGE.glob("*.py")} | packages
    unlisted -= set(paths)
    assert not unlisted, f"in the repository, not in the tree: {sorted(unlisted)}"
