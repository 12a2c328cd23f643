"""The version matrix: what it installs, counts, keeps and says; and what was run."""

import io
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")
from packaging.requirements import Requirement  # noqa: E402
from packaging.version import Version  # noqa: E402
from rich.console import Console  # noqa: E402

from tests.matrix import cell as cells  # noqa: E402
from tests.matrix import command, page, sources  # noqa: E402

WHEEL = Path("dist/kfac.whl")
REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="1"
failures="2" skipped="3" tests="10" time="1.0"></testsuite></testsuites>"""
CELL = cells.Cell("/bin/py", "3.12.1", "oldest", "smoke", "abc")


def row(**values):
    start = {"python": "3.12.1", "packages": "oldest", "suite": "smoke"}
    numbers = {"passed": 5, "failed": 0, "errors": 0, "skipped": 1, "seconds": 7}
    return start | {"sources": "abc", "versions": {"jax": "1.2"}} | numbers | values


# ------------------------------------------------------------------------ what is said


def test_lower_bounds():
    assert sources.lower_bound(Requirement("a>=1.2,<3")) == "1.2"
    for text in ("a", "a<3", "a>=1,>=2"):
        with pytest.raises(sources.MatrixError, match="no single lower bound"):
            sources.lower_bound(Requirement(text))


def test_what_is_installed():
    known = sources.requirements()
    assert set(cells.PINNED) | set(cells.NEEDED) <= set(known)
    oldest = cells.to_install(CELL, WHEEL)
    bounds = {n: re.search(rf"^    {n}>=(.*)$", config(), re.M) for n in cells.PINNED}
    pins = [f"{name}=={found[1]}" for name, found in bounds.items() if found]
    assert len(pins) == 7 and oldest[-7:] == pins
    newest = cells.to_install(with_values(packages="newest"), WHEEL)
    assert newest == oldest[:-7] and newest[0] == str(WHEEL)
    full = cells.to_install(with_values(packages="newest", suite="full"), WHEEL)
    assert full == [f"{WHEEL}[dev]"]
    one = cells.to_install(with_values(packages="0.11"), WHEEL)
    assert one == [*newest, "jax==0.11.*", "jaxlib==0.11.*"]


def config():
    return (sources.ROOT / "setup.cfg").read_text()


def with_values(**values):
    return cells.Cell(**({**vars(CELL), **values}))


def test_smoke_tests_exist():
    for name in cells.SMOKE:
        path, _, test = name.partition("::")
        assert (sources.ROOT / path).exists()
        assert not test or f"def {test}" in (sources.ROOT / path).read_text()


def test_counts(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    counted = cells.counts(tmp_path / "report.xml")
    assert counted == {"passed": 4, "failed": 2, "errors": 1, "skipped": 3}


def test_digest_is_that_of_package_and_requirements():
    files = sources.tracked()
    assert Path("setup.cfg") in files and Path("kfac_jax_lite/core/pytree.py") in files
    assert not any(path.parts[0] in (".venv", "runs") for path in files)
    mine = [p for p in files if p.parts[0] == "kfac_jax_lite"]
    assert sources.digest(files) == sources.digest([*mine, Path("setup.cfg")])
    assert sources.digest(files) != sources.digest(mine)


def test_failing_command_names_its_log(tmp_path):
    log = tmp_path / "log"
    program = [sys.executable, "-c", "print('said'); raise SystemExit(3)"]
    with pytest.raises(sources.MatrixError, match=f"ended with code 3; see {log}"):
        sources.run(program, log, tmp_path)
    assert "said" in log.read_text()
    sources.run(program, log, tmp_path, allowed=(3,))
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(sources.MatrixError, match=f"not done in 0 s; see {log}"):
        sources.run(slow, log, tmp_path, seconds=0.1)


# ------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize(
    ("values", "done"),
    [
        ({}, True),
        ({"failed": 1}, False),
        ({"errors": 1}, False),
        ({"passed": 0}, False),
        ({"sources": "other"}, False),
        ({"packages": "newest"}, False),
        ({"python": "3.12.2"}, False),
        ({"suite": "full"}, False),
    ],
)
def test_finished_cell(values, done):
    assert CELL.is_that_of(row(**values)) is done


def test_store_replaces_the_row_of_a_cell(tmp_path):
    path = tmp_path / "results" / "matrix.jsonl"
    command.store(path, row(failed=1))
    command.store(path, row(python="3.11.7"))
    command.store(path, row(packages="newest"))
    command.store(path, row(python="3.12.9"))
    kept = [(r["python"], r["packages"], r["failed"]) for r in command.rows(path)]
    wanted = [("3.11.7", "oldest"), ("3.12.1", "newest"), ("3.12.9", "oldest")]
    assert kept == [(*pair, 0) for pair in wanted]
    with path.open("a") as file:
        file.write('{"python": "3.1')
    assert len(command.rows(path)) == 3


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """Runs the command with cells that only say what they are."""
    ran, failing = [], set()

    def run_cell(cell, *rest):
        ran.append((cell.packages, cell.suite))
        if cell.packages in failing:
            raise sources.MatrixError(f"pip ended with code 1; see {cell.title}.log")
        names = ("python", "packages", "suite", "sources")
        return row(**{name: getattr(cell, name) for name in names})

    def run(*options):
        ran.clear()
        console = Console(file=io.StringIO(), width=200)
        folders = ["--out", tmp_path / "out.jsonl", "--folder", tmp_path / "folder"]
        arguments = [str(a) for a in (*folders, "--python", sys.executable, *options)]
        code = command.main(arguments, console)
        return code, list(ran), console.file.getvalue()

    monkeypatch.setattr(command, "run_cell", run_cell)
    monkeypatch.setattr(command, "build", lambda files, folder: WHEEL)
    monkeypatch.setattr(command, "copy", lambda files, folder: None)
    return run, failing


def test_finished_cells_are_skipped(matrix):
    run, failing = matrix
    failing.add("newest")
    code, ran, text = run()
    assert code == 1 and ran == [("oldest", "smoke"), ("newest", "smoke")]
    assert re.search(r"-newest-smoke: pip ended with code 1; see \S+-smoke.log", text)
    failing.clear()
    code, ran, text = run()
    assert code == 0 and ran == [("newest", "smoke")]
    version = ".".join(map(str, sys.version_info[:3]))
    assert len(re.findall(rf"{re.escape(version)} +│ (?:old|new)est", text)) == 2
    assert run()[:2] == (0, [])
    assert run("--full", "--packages", "oldest")[1] == [("oldest", "full")]


def test_missing_interpreter_is_named(matrix):
    code, ran, text = matrix[0]("python3.99", "--packages", "oldest")
    assert code == 1 and ran == [("oldest", "smoke")]
    assert "python3.99 was not found: give its path with --python" in text


def test_unknown_packages_are_named(matrix):
    code, ran, text = matrix[0]("--packages", "0.9")
    assert code == 1 and not ran
    assert "--packages 0.9: wanted one of oldest, newest, 0.10" in text
    assert matrix[0]("--packages", "0.11")[:2] == (0, [("0.11", "smoke")])


# ------------------------------------------------------------------------ what was run


def results():
    """The rows of the committed result file."""
    return command.rows(command.Matrix().out)


def test_bounds_are_those_that_were_run():
    """Where the oldest packages were tested, they were the bounds of ``setup.cfg``."""
    found = [r for r in results() if r["packages"] == "oldest"]
    if not found:
        pytest.skip("no cell was run yet: python -m tests.matrix")
    known = sources.requirements()
    for result in found:
        assert cells.succeeded(result)
        for name in cells.PINNED:
            bound = Version(sources.lower_bound(known[name]))
            assert Version(result["versions"][name]) == bound, result["python"]


def test_the_page_is_what_the_command_writes():
    text = page.PAGE.read_text()
    assert page.START + "\n" + page.table(results()) + "\n" + page.END in text


def test_table_of_versions(tmp_path, monkeypatch):
    names = ("flax", "optax", "numpy")
    versions = dict.fromkeys(names, "1") | {"jax": "0.10.1"}
    rows = [row(versions=versions, failed=2, errors=1)]
    rows.append(row(versions=versions | {"jax": "0.9.3"}, python="3.11.7"))
    lines = page.table(rows).splitlines()[2:]
    assert lines == [
        "| 0.9 | 0.9.3 | 3.11.7 | 1 | 1 | 1 | smoke | 5 | 0 |",
        "| 0.10 | 0.10.1 | 3.12.1 | 1 | 1 | 1 | smoke | 5 | **3** |",
        "| 0.11 | not run | | | | | | | |",
        "| 0.12 | not run | | | | | | | |",
    ]
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(f"before\n{page.START}old\n{page.END}\nafter\n")
    page.write(rows)
    page.write(rows)
    wanted = f"before\n{page.START}\n{page.table(rows)}\n{page.END}\nafter\n"
    assert page.PAGE.read_text() == wanted


def test_minor_versions_begin_at_the_bound():
    bound = sources.lower_bound(sources.requirements()["jax"])
    assert page.MINORS[0] == page.minor(bound)
