"""Rooms import from lower floors only; the package shows its public names only."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import kfac_jax_lite

ROOT = pathlib.Path(kfac_jax_lite.__file__).parent
FLOORS = [
    {"core"},
    {"kronecker"},
    {"tagging", "distributed"},
    {"statistics"},
    {"optimizer"},
    {"diagnostics", "curvature", "ntk"},
    {"bayes"},
    {"__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path):
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
def test_imports_come_from_lower_floors(path):
    here = room_of(path)
    assert here in FLOOR, f"{here} is no room of the house"
    for other in imports(path) - {here}:
        assert FLOOR[other] < FLOOR[here], f"{path.name} imports {other}"


def modules():
    """Module name to the names of the package's modules that it imports."""
    found = {}
    for path in FILES:
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        found[name] = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
    known = {}
    for name, wanted in found.items():
        # A name imported from a package is its module, or else the package's own.
        given = {m if m in found else m.rpartition(".")[0] for m in wanted}
        known[name] = {m for m in given if m in found and m != name}
    return known


def test_no_module_is_in_a_circle():
    edges, done = modules(), set()
    while edges:
        free = {name for name, needs in edges.items() if needs <= done}
        assert free, f"a circle among {sorted(edges)}"
        done |= free
        for name in free:
            del edges[name]


def test_the_house_is_small():
    """At most eight floors, twelve entries at the top, and no name means two things."""
    entries = {p.name for p in ROOT.iterdir()} - {"__pycache__"}
    assert len(FLOORS) <= 8 and len(entries) <= 12, sorted(entries)


def test_dir_shows_the_public_names():
    shown = {name for name in dir(kfac_jax_lite) if not name.startswith("__")}
    assert shown == set(kfac_jax_lite.__all__)
    for name in shown:
        assert getattr(kfac_jax_lite, name) is not None


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
