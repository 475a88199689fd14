"""Rules of the code base: who may include whom, one place per constant, no torch in kernels, no heavy imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PYTHON = ROOT / "python" / "qlora"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})

# Folders of csrc, lowest first: a file may include files of its own folder and of those listed for it.
MAY_INCLUDE = {
    "format": {"format"},
    "reference": {"format", "reference"},
    "cpu": {"format", "cpu"},
    "cuda": {"format", "cuda"},
    "ops": {"format", "cpu", "cuda", "ops"},
    "bindings": {"format", "cpu", "cuda", "bindings"},
}
# Python layers, lowest first.
LAYERS = (
    "_C",
    "_load",
    "tables",
    "ops",
    "reference",
    "weight",
    "explain",
    "devices",
    "nn",
    "optim",
    "distributed",
    "storage",
    "calibration",
    "integrations",
    "adapters",
    "models",
    "serving",
    "export",
    "planning",
    "training",
    "evaluation",
    "demo",
    "bench",
    "cli",
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_one_way_and_torch_stays_in_ops(path):
    room = path.relative_to(CSRC).parts[0]
    for include in re.findall(r'#include [<"]([^">]+)[">]', path.read_text()):
        if include.startswith("torch"):
            assert room == "ops", f"{path} includes {include}"
        if include.startswith("cuda_"):  # headers of the CUDA toolkit
            assert room == "cuda", f"{path} includes {include}"
        if include.startswith("pybind11"):
            assert room == "bindings", f"{path} includes {include}"
        folder = include.split("/")[0]
        if folder in MAY_INCLUDE:
            assert folder in MAY_INCLUDE[room], f"{path} includes {include}"


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qlora":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("qlora."):
                    yield alias.name.split(".")[1]


PYTHON_FILES = sorted(
    p for p in PYTHON.rglob("*.py") if p.parent != PYTHON or p.name not in {"__init__.py", "__main__.py"}
)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PYTHON)))
def test_python_imports_go_one_way(path):
    layer = path.relative_to(PYTHON).with_suffix("").parts[0]
    assert layer in LAYERS, f"{layer} is missing in LAYERS"
    for imported in imports_of(path):
        if imported in LAYERS:
            assert LAYERS.index(imported) <= LAYERS.index(layer), f"{path} imports {imported}"


# Digits that may occur only in a table of the format, except in tests and the golden script.
CONSTANTS = {
    "0.6961928009986877": "csrc/format/nf4.h",
    "0.00260417": "csrc/format/fp4.h",
    "0.0052083333": "csrc/format/fp4.h",
}


@pytest.mark.parametrize("digits", CONSTANTS)
def test_one_home_per_constant(digits):
    homes = [
        str(path.relative_to(ROOT))
        for folder in (CSRC, PYTHON, ROOT / "benchmarks", ROOT / "examples")
        for path in folder.rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"} and digits in path.read_text()
    ]
    assert homes == [CONSTANTS[digits]]


@pytest.mark.parametrize("path", [*SOURCES, *PYTHON.rglob("*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_its_purpose_first(path):
    first = path.read_text().lstrip().splitlines()[0]
    assert first.startswith(("//", '"""')), f"{path} begins with {first!r}"
    assert len(first) > 20


def test_no_path_of_a_machine_in_the_tree():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    pattern = re.compile("/(" + "|".join(("wo" + "rk", "ro" + "ot", "ho" + "me")) + r")/\w")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".h", ".cpp", ".txt", ".toml", ".cmake", ".yaml"} and path.exists():
            assert not pattern.search(path.read_text()), name


def test_the_table_of_places_in_contributing_is_true():
    places = re.findall(r"^\| [^|]* \| `([^`]*/[^`]*)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(places) >= 15
    assert [place for place in places if not (ROOT / place).exists()] == []


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


HEAVY = (
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "rich",
    "matplotlib",
    "huggingface_hub",
    "bitsandbytes",
    "gguf",
)


def test_import_needs_only_torch():
    assert python(f"import qlora, sys; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_import_takes_less_than_a_third_of_a_second_above_torch():
    code = "import torch, time; t = time.perf_counter(); import qlora; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_the_kernel_module_knows_no_torch():
    assert (
        python(
            "import sys; sys.modules['torch'] = None; import importlib.util as u, pathlib, importlib.metadata as m;"
            "f = next(p for p in m.files('fused-qlora') if p.name.startswith('_C'));"
            "s = u.spec_from_file_location('_C', f.locate()); c = u.module_from_spec(s); s.loader.exec_module(c);"
            "print(c.runnable_isas()[0])"
        )
        == "scalar"
    )
