"""The notebooks: a script and its outputs are of one mind, and they run anywhere."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 2_000_000
SECONDS = 300
# Files of the machine that ran it: "/home/…", "C:\…", "~/…", a kernel's own files.
MACHINE = re.compile(
    r"/(?:home|Users|root|tmp|var|usr|opt|mnt|work|proc|etc|private|workspace)/"
    r"|\b[A-Z]:\\|~/|site-packages|ipykernel_\d"
)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    """The notebook, of the newest format."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a cell shows, but for figures."""
    for output in cell.outputs:
        data = output.get("data", {})
        shown = {kind: value for kind, value in data.items() if "image" not in kind}
        yield json.dumps([output.get("text", ""), shown], ensure_ascii=False)


def figures(notebook):
    """How many figures each code cell shows."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in code_cells(notebook)
    ]


def test_every_notebook_has_a_script():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts and scripts == {path.stem for path in NOTEBOOKS}
    readme = (FOLDER / "README.md").read_text()
    assert {name for name in scripts if f"({name}.ipynb)" in readme} == scripts


def test_they_are_small():
    assert sum(p.stat().st_size for p in FOLDER.glob("*.*")) < MOST_BYTES


@each
def test_script_and_notebook_have_the_same_cells(path):
    notebook, script = read(path), jupytext.read(path.with_suffix(".py"))
    nbformat.validate(notebook)
    for pair in (notebook, script):
        assert pair.metadata.jupytext.formats == "ipynb,py:percent"
    cells = [
        [(cell.cell_type, cell.source) for cell in pair.cells]
        for pair in (notebook, script)
    ]
    assert cells[0] == cells[1]


@each
def test_outputs_are_there_and_clean(path):
    notebook = read(path)
    cells = code_cells(notebook)
    # Run from top to bottom, once, by a kernel of its own.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any(output.output_type == "stream" for output in outputs)
    assert any(figures(notebook))
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]


@each
@pytest.mark.parametrize("case", ["installed", "checkout", "alone"])
def test_first_cell_installs_what_is_missing(path, case, tmp_path, monkeypatch):
    calls = []
    found = object() if case == "installed" else None
    monkeypatch.setattr(importlib.util, "find_spec", {"kfac_jax_lite": found}.get)
    monkeypatch.setattr(subprocess, "check_call", calls.append)
    here = tmp_path / "notebooks"
    here.mkdir()
    monkeypatch.chdir(here)
    if case == "checkout":
        (tmp_path / "setup.cfg").touch()
    exec(code_cells(read(path))[0].source, {})
    source = {"checkout": "..", "alone": "kfac_jax_lite"}.get(case)
    command = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert calls == ([] if source is None else [[*command, f"{source}[notebooks]"]])


@each
def test_no_machine_shows(path):
    for cell in read(path).cells:
        for text in [cell.source, *(texts(cell) if cell.cell_type == "code" else ())]:
            assert not MACHINE.search(text), text


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("/home/someone/x.py:3: Warning", True),
        ("/tmp/ipykernel_12/3.py", True),
        ("from ~/lib", True),
        (r"C:\Users\x", True),
        ("share/of the/traffic", False),
        ("2 / tmp", False),
    ],
)
def test_what_counts_as_a_machine(text, shows):
    assert bool(MACHINE.search(text)) == shows


@pytest.mark.slow
@each
def test_it_runs_in_an_empty_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    committed = read(path)
    notebook = jupytext.read(path.with_suffix(".py"))
    # The tests' own flags make slow kernels and eight devices, and threads for them.
    own = ("XLA_FLAGS", "NPROC", "OPENBLAS_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in own}
    environment |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"  # on a busy machine XLA says it is slow
    here = tmp_path / "empty"
    here.mkdir()
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": here}},
    )
    client.execute(env=environment)
    assert figures(notebook) == figures(committed)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert not list(here.iterdir())
