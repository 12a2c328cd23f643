"""The benchmarks' arithmetic, and one tiny run of each."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess

import numpy as np
import pytest

import experiments
from experiments.benchmarks import (
    common,
    inverses,
    jobs,
    scaling,
    step_time,
)
from experiments.benchmarks.networks import Problem, Spec, make_problem
from experiments.models.networks import MLP


def tiny(bernoulli: bool = False) -> Problem:
    return make_problem("tiny", Spec(lambda: MLP((3,), 10), (4, 10), bernoulli))


def test_openblas_has_one_thread():
    assert os.environ["OPENBLAS_NUM_THREADS"]
    assert common.machine()["OPENBLAS_NUM_THREADS"] is not None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_checkout(tmp_path):
    """Short hash; modified are tracked files, except for results."""

    def git(*arguments):
        who = "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout

    folder = tmp_path / "some" / "code"
    (folder / "results").mkdir(parents=True)
    assert common.commit(folder, "some/code/") is None  # no checkout
    git("init", "-q")
    assert common.commit(folder, "some/code/") is None  # nothing committed
    for name in ("a.py", "results/b.json"):
        (folder / name).write_text("1\n")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    found = git("rev-parse", "--short", "HEAD").strip()
    assert common.commit(folder, "some/code/") == found
    assert common.commit(folder, "other/") is None  # in another repository
    (folder / "results" / "b.json").write_text("2\n")
    (folder / "new.txt").write_text("2\n")
    assert common.commit(folder, "some/code/") == found
    (folder / "a.py").write_text("2\n")
    assert common.commit(folder, "some/code/") == f"{found}, modified"


def test_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.commit() is None
    assert common.machine()["commit"] is None


def test_the_c_library_is_told_to_keep_memory():
    wanted = "glibc" in platform.libc_ver()[0]
    assert experiments.keep_freed_memory() == wanted


@pytest.mark.parametrize(
    ("factor", "inverse", "cycle"),
    [
        (1, 1, {"refresh+invert": 1}),
        (1, 5, {"refresh+invert": 1, "refresh": 4}),
        (10, 100, {"refresh+invert": 1, "refresh": 9, "nothing": 90}),
        (5, 5, {"refresh+invert": 1, "nothing": 4}),
    ],
)
def test_cycle(factor, inverse, cycle):
    assert common.cycle_of(factor, inverse) == cycle


def test_cycle_of_unrelated_intervals():
    with pytest.raises(ValueError, match="no multiple"):
        common.cycle_of(10, 25)


def test_amortised_is_the_cycle_mean_of_medians():
    samples = [("a", 1.0), ("a", 3.0), ("a", 100.0), ("b", 10.0)]
    assert common.amortised(samples, {"a": 3, "b": 1}) == pytest.approx(19 / 4)
    assert common.amortised(samples) == pytest.approx(19 / 4)
    with pytest.raises(ValueError, match="'c'"):
        common.amortised(samples, {"c": 1})


def test_compile_seconds():
    assert common.compile_seconds([5.0, 1.0, 1.2, 4.0], [1, 0, 0, 1]) == pytest.approx(
        3.9 + 2.9
    )
    assert common.compile_seconds([5.0], [True]) == 5.0


def test_quartiles():
    assert common.quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert common.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_first_reach():
    curve = [{"step": i, "loss": x} for i, x in enumerate([3.0, None, 1.0, 2.0, 0.5])]
    assert common.first_reach(curve, 1.0)["step"] == 2
    assert common.first_reach(curve, 0.1) is None


def test_error_messages_lose_their_folders():
    text = "cannot import name 'x' from 'y' (/somewhere/else/y.py)\nmore"
    assert common.without_paths(text) == "cannot import name 'x' from 'y'"


def test_settings_have_no_folders():
    kept = common.settings(step_time.Config())
    assert "out" not in kept and kept["rounds"] == 15


def test_effect_of_a_step():
    before = np.array([1, 1]), np.array([1, 1])
    assert jobs.effect(before, before) == "nothing"
    assert jobs.effect(before, (np.array([2, 2]), before[1])) == "refresh"
    assert jobs.effect(before, (np.array([2, 2]),) * 2) == "refresh+invert"
    assert jobs.effect(before, (np.array([2, 1]),) * 2) == "30"


@pytest.mark.parametrize(("factor", "inverse"), [(1, 2), (2, 4)])
def test_steps_do_what_their_kind_says(factor, inverse):
    job = jobs.ours_job(tiny(), factor, inverse, "empirical", "cholesky")
    samples = job.run()
    assert [kind for kind, _ in samples] == list(common.cycle_of(factor, inverse))
    assert all(seconds > 0 for _, seconds in samples)
    assert job.state_mb > 0 and job.compile_seconds(samples) > 0


def test_adaptive_damping_has_a_job_of_its_own():
    """Its kinds of step are those of a fixed damping; its damping moves."""
    rule = jobs.kfac.damping.adaptive()
    job = jobs.ours_job(tiny(), 2, 4, "empirical", "cholesky", rule)
    assert job.name.endswith("(2, 4), adaptive damping")
    assert {kind for kind, _ in job.run()} == {"refresh+invert", "refresh", "nothing"}


def test_adaptive_job_goes_on_training():
    job = jobs.adaptive_job(tiny(True), "mc", "cholesky", 2, 3, 0.3, 0.5)
    assert len(job.run()) == 3
    assert job.notes()["steps"] == [3, 5]


def test_staggered_job_knows_its_slowest_step():
    job = jobs.staggered_job(tiny(), "empirical", "cholesky", 4, warm_up=3)
    assert len(job.run()) == 4
    notes = job.notes()
    assert notes["slowest_to_median"] >= 1 and notes["flop_floor"] > 1


def test_flop_floor_by_hand():
    """One layer 3 → 2, four rows, refreshed every 2, inverted every 4 steps."""
    problem = make_problem("one", Spec(lambda: MLP((), 2), (4, 3)))
    parts = jobs.Ours(problem, "mc")
    gradient, products = 6 * 4 * 3 * 2, 2 * (4 * 4 * 2 + 4 * 2 * 2)
    refresh = 2 * 4 * (4 * 4 + 2 * 2) + gradient / 3
    inversion = 0  # up to 8 × 8 row by row, without a product
    total = gradient + products + refresh / 2 + inversion / 4
    got = jobs.flop_floor(problem, parts.tagged, 2, 4, "cholesky")
    assert got == pytest.approx(total / gradient, rel=1e-9)


def test_step_time(tmp_path, monkeypatch):
    monkeypatch.setitem(step_time.SPECS, "mlp", Spec(lambda: MLP((3,), 10), (4, 10)))
    monkeypatch.setattr(step_time, "INTERVALS", ((1, 2),))
    options = ["--models", "mlp", "--rounds", "2", "--warm-up", "1"]
    options += ["--adaptive-steps", "1", "--fishers", "empirical", "--without-peer"]
    options += ["--staggered-steps", "2", "--inverses", "cholesky"]
    step_time.main([*options, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "step_time.json").read_text())
    rows = result["models"]["mlp"]["rows"]
    assert rows[step_time.BASELINE]["ratio_to_sgd"] == 1
    assert {"Adam", step_time.FLOOR, "ours empirical (1, 2)"} < set(rows)


def test_step_time_of_chosen_rows():
    def parse(arguments):
        return common.parse(step_time.Config, arguments, "step_time")

    options = ["--inverses", "cholesky", "--fishers", "empirical", "--without-peer"]
    every, some = (
        set(step_time.job_makers(None, parse([*options, *rows])))
        for rows in ([], ["--rows", "(10, 100)", "adaptive damping"])
    )
    found = {"ours empirical cholesky (10, 100)"}
    found |= {"ours empirical cholesky adaptive damping"}
    assert some == {step_time.BASELINE, step_time.FLOOR} | found < every


def test_other_projects_failures_are_results():
    def fail():
        raise TypeError("no")

    assert step_time.make_jobs({"kfac-jax (1, 5)": fail}) == (
        [],
        {"kfac-jax (1, 5)": "TypeError: no"},
    )
    with pytest.raises(TypeError):
        step_time.make_jobs({"ours": fail})


def test_inverses(tmp_path, capsys):
    config = inverses.Config((6, 70), (2,), (4,), largest_eigh=6, rounds=2)
    result = inverses.main(dataclasses.replace(config, out=tmp_path))
    assert json.loads((tmp_path / "inverses.json").read_text())["cases"]
    small, large = (case["rows"] for case in result["cases"])
    assert set(small) - set(large) == {"eigh"}
    assert small[inverses.BASELINE]["ratio"] == (1, 1, 1)
    assert "2 x 70 x 70, rank 32" in capsys.readouterr().out


def test_the_matrices_change_by_as_much_as_they_should():
    before, after = inverses.matrices(20, 3, 0.05)
    eye = 1e-2 * np.eye(20)
    change = np.linalg.norm(after[0] - before[0]) / np.linalg.norm(before[0] - eye)
    assert before.shape == (3, 20, 20)
    assert change == pytest.approx(0.05, rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
def test_scaling(tmp_path, capsys):
    """Every mode on two devices, and what a device sends."""
    options = ["--devices", "2", "--rounds", "1", "--batch", "8", "--width", "4"]
    result = scaling.main([*options, "--layers", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "scaling.json").read_text())
    rows = written["rows"]["2"]
    assert (
        set(rows) == set(result["rows"]["2"]) == {"SGD", "all", "owner", "owner, rows"}
    )
    assert set(rows["all"]["ms"]) == set(scaling.KINDS)
    # A ring of two sends what it reduces: triangles of 785, 5, 4, 10.
    elements = 785 * 786 // 2 + 5 * 6 // 2 + 4 * 5 // 2 + 10 * 11 // 2
    sent = rows["all"]["sent_megabytes"]["refresh"]
    # And whether all statistics are finite, one more.
    np.testing.assert_allclose(sent, 4e-6 * (elements + 1))
    assert rows["owner"]["sent_megabytes"]["refresh"] < 0.51 * sent
    assert "2 devices" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="divide the batch"):
        scaling.main(["--devices", "3", "--batch", "8", "--out", str(tmp_path)])
