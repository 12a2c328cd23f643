"""Mutation testing itself: mutants are mutants, and caught ones told from lost ones."""

import ast
import itertools
import json
import textwrap

import coverage
import pytest

from tests.helpers import cases
from tests.mutation import covering, mutants, page
from tests.mutation.__main__ import Run, recorded, tried, valid, wanted
from tests.mutation.trial import attempt

SMALL = mutants.PACKAGE / "core" / "likelihoods.py"


@pytest.fixture
def one_module(monkeypatch):
    """Only one module is core."""
    monkeypatch.setattr(mutants, "core", lambda: [SMALL])


def test_formulas_are_in_the_code():
    found = list(mutants.formulas())
    assert len({mutant.identity for mutant in found}) == len(found) > 100
    for mutant in found:
        assert mutant.differing and mutant.source != mutant.original


def test_core_has_the_optimiser_and_not_the_laboratory():
    names = {str(path.relative_to(mutants.PACKAGE)) for path in mutants.core()}
    wanted = {"optimizer/transform.py", "kronecker/inverses.py", "statistics/dense.py"}
    assert wanted <= names
    assert not any(name.startswith(("bayes", "curvature", "ntk")) for name in names)


def test_drawn_mutants(one_module):
    found = list(mutants.drawn(9, 0))
    again, other = mutants.drawn(9, 0), mutants.drawn(9, 1)
    assert [m.identity for m in found] == [m.identity for m in again]
    assert [m.identity for m in found] != [m.identity for m in other]
    assert len({m.identity for m in found}) == 9
    for mutant in found:
        texts = mutant.source, mutant.original
        assert len({ast.dump(ast.parse(text)) for text in texts}) == 2
        assert len(mutant.change) % 2 == 0 and mutant.change[0] != mutant.change[1]


def test_nothing_silent_is_changed():
    source = textwrap.dedent("""
        import math

        @math.cache(1)
        def double(x: int | None = 2) -> int | None:
            if x is None:
                raise ValueError("1" * 2)
            y: int | float = x * 2
            return y
    """)
    assert mutants.silent(source) == {4, 5, 7, 8}


@pytest.mark.parametrize(
    ("operator", "kept"),
    [
        ("core/ReplaceBinaryOperator_Add_Sub", True),
        ("core/ReplaceBinaryOperator_Add_BitOr", False),
        ("core/ReplaceBinaryOperator_BitOr_BitAnd", True),
        ("core/NumberReplacer", True),
        ("core/RemoveDecorator", False),
    ],
)
def test_plausible_operators(operator, kept):
    assert mutants.plausible(operator) is kept


def test_drawn_mutants_are_replayed(one_module):
    for mutant in mutants.drawn(5, 0):
        row = {"module": mutant.module, "name": mutant.name, "change": mutant.change}
        again = mutants.replayed(row)
        assert again is None or again == mutant
    assert mutants.replayed(row | {"change": ["no such line", "x"]}) is None


def test_controls_change_nothing(one_module):
    for mutant in mutants.controls(3, 0):
        assert mutant.source == SMALL.read_text() and not mutant.change


# ---------------------------------------------------------------- choosing tests

TIMES = {"a::1": 1.0, "a::2": 3.0, "b::1": 2.0, "c::1": 50.0}


def test_files_take_turns():
    assert list(covering.in_turn(TIMES, TIMES)) == ["a::1", "b::1", "c::1", "a::2"]


@pytest.mark.parametrize(
    ("budget", "kept"), [(0.5, 1), (3.0, 2), (4.0, 2), (6.0, 3), (100.0, 4)]
)
def test_budget(budget, kept):
    order = ["a::1", "b::1", "c::1", "a::2"]
    chosen = covering.within(order, TIMES, budget)
    assert len(chosen) == kept
    assert len(chosen) == 1 or sum(TIMES[name] for name in chosen) <= budget


def test_own_tests_come_first():
    order = [
        "tests/kronecker/test_inverses.py",
        "tests/tagging/test_zoo.py",
        "tests/optimizer/test_hlo.py",
    ]
    order.append("tests/experiments/test_train.py")
    ranks = [
        covering.rank(path, "kfac_jax_lite/kronecker/inverses.py") for path in order
    ]
    assert ranks == sorted(ranks) and ranks[0] < ranks[1] and ranks[2] < ranks[3]


# ---------------------------------------------------------------- a package of one line

CODE = "def double(x):\n    y = 2 * x\n    return y\n"
TEST = """\
import sys
import kfac_jax_lite.double as module

def test_two():
    assert module.double(1) == 2

def test_nothing():
    assert module.double
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A repository with one function, and what its tests cover."""
    folder = tmp_path / "copy"
    for name, text in {
        "kfac_jax_lite/__init__.py": "",
        "kfac_jax_lite/double.py": CODE,
        "tests/test_double.py": TEST,
        "pytest.ini": "[pytest]\npythonpath = .\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    times = tmp_path / "times.xml"
    entries = "".join(
        f'<testcase classname="tests.test_double" name="{name}" time="0.1"/>'
        for name in ("test_two", "test_nothing")
    )
    times.write_text(f"<testsuites><testsuite>{entries}</testsuite></testsuites>")
    data = coverage.CoverageData(basename=str(tmp_path / "coverage"))
    for name, line in (("test_two", 2), ("test_nothing", 1)):
        data.set_context(f"tests/test_double.py::{name}|run")
        data.add_lines({str(folder / "kfac_jax_lite/double.py"): [line]})
    data.write()
    monkeypatch.setattr(covering, "ROOT", folder)
    return folder, covering.Covering(tmp_path / "coverage", times)


def mutant(source, kind="formula"):
    return mutants.Mutant("kfac_jax_lite/double.py", 2, "wrong", kind, source, CODE)


OUTCOMES = {
    "killed": (CODE.replace("2 * x", "3 * x"), "killed"),
    "survived": (CODE.replace("2 * x", "x * 2"), "survived"),
    "hangs": (CODE.replace("    y = 2 * x", "    while True: x = 2 * x"), "timeout"),
    "crashes": (CODE.replace("2 * x", "__import__('os')._exit(3)"), "crashed"),
    "import": ("import nothing_of_the_kind\n" + CODE, "killed"),
}


@pytest.mark.parametrize("name", cases(OUTCOMES, ["killed", "survived"]))
def test_outcomes(package, monkeypatch, name):
    source, outcome = OUTCOMES[name]
    folder, tests = package
    monkeypatch.setattr("tests.mutation.__main__.LEAST_LIMIT", 20)
    row = tried(mutant(source), folder, tests, 1.0)
    assert row["outcome"] == outcome
    assert (folder / "kfac_jax_lite/double.py").read_text() == CODE
    if outcome == "killed":
        assert "test_double" in row["by"]


def test_tests_that_do_not_exist_are_an_error(package):
    folder, _ = package
    assert attempt(folder, ["tests/test_double.py::test_three"], 60)[0] == "error"


# ---------------------------------------------------------------- results


def test_what_is_done_is_not_done_again(one_module, tmp_path):
    out = tmp_path / "rows.jsonl"
    run = Run(drawn=5, controls=1, out=out)
    todo = list(wanted(run))
    outcomes = itertools.cycle(["killed", "survived", "timeout"])
    rows = [
        vars(m) | {"id": m.identity, "change": m.change, "outcome": outcome}
        for m, outcome in zip(todo, outcomes, strict=False)
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert [m.identity for m in wanted(run)] == [rows[-1]["id"]]
    lost = [r for r in rows[:-1] if r["outcome"] != "killed" and r["kind"] != "control"]
    again = {m.identity for m in wanted(Run(drawn=5, controls=1, out=out, again=True))}
    assert again == {r["id"] for r in [*lost, rows[-1]]}
    assert len(recorded(out)) == len(rows) - 1


def test_interval_of_a_share():
    """Wilson, 1927, against scipy."""
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(85, 100).proportion_ci(0.95, "wilson")
    assert page.interval(85, 100) == pytest.approx(tuple(wanted), abs=1e-4)


def test_rewritten_formulas_leave_the_page():
    kept = next(iter(mutants.formulas())).identity
    kinds = {kept: "formula", "gone": "formula", "old": "drawn"}
    assert set(valid({k: {"kind": kind} for k, kind in kinds.items()})) == {kept, "old"}


def test_page(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "REASONS", tmp_path / "reasons.toml")
    page.REASONS.write_text('[equivalent]\nb = "The same."\n[open]\nc = "Not yet."\n')
    base = {
        "module": "kfac_jax_lite/kronecker/factors.py",
        "line": 1,
        "name": "lost",
        "budget": 9,
    }
    base |= {"change": ["x = 1", "x = 2"]}
    outcomes = [("a", "killed"), ("b", "survived"), ("c", "survived"), ("d", "timeout")]
    rows = {k: base | {"id": k, "kind": "formula", "outcome": o} for k, o in outcomes}
    rows["e"] = base | {"id": "e", "kind": "control", "outcome": "survived"}
    page.write(rows)
    text = page.PAGE.read_text()
    assert "| written by hand | 4 | 2 | 50.0% |  | 66.7% |" in text
    assert "(equivalent). The same." in text and "lost. Not yet." in text
    assert "nothing changed 1 times, and 1 times" in text
