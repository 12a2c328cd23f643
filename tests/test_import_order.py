"""Modules import only from modules to their left in the architecture's picture."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import kfac_jax_lite

ROOT = pathlib.Path(kfac_jax_lite.__file__).parent
ORDER = [
    {"threads"},
    {"views", "types", "tree", "linalg", "forms", "sharding", "chains"},
    {"likelihoods"},
    {"tagging"},
    {"factors"},
    {"packing"},
    {"collectives"},
    {"reduce"},
    {"intervals"},
    {"damping"},
    {"eigenpairs"},
    {"inverse"},
    {"ownership"},
    {"traffic"},
    {"slices"},
    {"precondition"},
    {"options"},
    {"exchange"},
    {"stagger"},
    {"refresh"},
    {"owned"},
    {"inversions"},
    {"placement"},
    {"accuracy"},
    {"telemetry"},
    {"logs"},
    {"adapted"},
    {"transform"},
    {"outputs"},
    {"quadratic"},
    {"guided"},
    {"alias"},
    {"rescaling"},
    {"flops"},
    {"memory"},
    {"cost"},
    {"simulate"},
    {"findings"},
    {"modes"},
    {"symptoms", "counters", "marks"},
    {"examination"},
    {"doctor"},
    {"curvature", "ntk"},
    {"bayes"},
    {"__init__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def part(path):
    """First component of a file's path in the package, without the suffix."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """First components of the package's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ("kfac_jax_lite", *path.relative_to(ROOT).parts[:-1])
            base = ".".join(here[: len(here) - node.level + 1])
            names = [
                ".".join(filter(None, [base, node.module, alias.name]))
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "kfac_jax_lite":
                found.add(pieces[1] if len(pieces) > 1 else "__init__")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_come_from_the_left(path):
    here = part(path)
    assert here in RANK, f"{here} is not in the architecture's picture"
    for other in imports(path) - {here}:
        assert other in RANK, f"{path.name} imports the unknown {other}"
        assert RANK[other] <= RANK[here], f"{path.name} imports {other}"


def test_no_cycles():
    edges = {}
    for path in FILES:
        edges.setdefault(part(path), set()).update(imports(path) - {part(path)})
    done = set()
    while edges:
        free = {name for name, needs in edges.items() if needs <= done | {name}}
        assert free, f"a cycle among {sorted(edges)}"
        done |= free
        for name in free:
            del edges[name]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_public_jax(path):
    assert not re.search(
        r"\bjax\._src|from jax import _|jax\.interpreters", path.read_text()
    )
    assert not path.name.startswith("_") or path.name == "__init__.py"


def test_the_core_imports_no_extras():
    """``pip install kfac_jax_lite`` alone is light: no Flax, no plots, no data sets."""
    code = (
        "import sys, kfac_jax_lite;"
        "extras = {'flax', 'orbax', 'matplotlib', 'tyro', 'rich', 'optuna', 'sklearn',"
        " 'tensorboardX', 'tensorflow_datasets', 'experiments'};"
        "print(sorted(extras & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
