"""The study of times to a target: arithmetic, end to end, resumption."""

import contextlib
import dataclasses
import json
import math

import optuna
import pytest

from experiments.benchmarks.time_to_target import (
    __main__,
    config,
    problem,
    report,
    study,
)
from experiments.errors import ConfigError, MetricsError

TIMES = ("seconds", "cpu_seconds", "compile_seconds", "cores_busy", "machine")


def run(*losses, compile_seconds=1.0):
    curve = [
        {"step": 10 * i, "seconds": 2.0 * i, "cpu_seconds": 1.5 * i, "loss": x}
        for i, x in enumerate(losses, 1)
    ]
    best = problem.best_loss(curve)
    return {"curve": curve, "best_loss": best, "compile_seconds": compile_seconds}


def test_times_to_the_target():
    found = report.times(run(4.0, None, 2.0, 1.0), 2.0)
    expected = {"steps": 30, "seconds": 6, "with_compiling": 7, "cpu_seconds": 4.5}
    assert found == expected
    assert set(report.times(run(4.0, 3.0), 2.0).values()) == {math.inf}


def test_score_of_a_trial():
    assert problem.score(run(4.0, 2.0, 1.0), 2.0, 100) == 0.2
    # 2.5 is 25 % above the target.
    assert problem.score(run(4.0, 2.5), 2.0, 100) == 1.25
    assert problem.score(run(400.0), 2.0, 100) == 11.0
    assert problem.score(run(None), 2.0, 100) == 11.0


def test_quartiles_are_values_that_were_seen():
    assert report.quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert report.quartiles([1, math.inf, 2, math.inf, 3]) == (2, 3, math.inf)
    assert report.quartiles([7]) == (7, 7, 7)


MEDIANS = {
    "one": {"adamw": 4.0, "ours": 1.0, "sgd": 8.0},
    "two": {"adamw": 2.0, "ours": 4.0, "sgd": math.inf},
}


def test_geometric_mean_over_the_tasks_that_are_reached():
    ends = {"one": 4.5, "two": 2.5}
    found = report.relative(MEDIANS, "adamw", ends)
    assert found["adamw"]["geometric_mean"] == 1
    # √(1/4 · 2)
    assert found["ours"]["geometric_mean"] == pytest.approx(math.sqrt(0.5))
    assert found["sgd"] == {"geometric_mean": 2, "ratios": {"one": 2}, "bounds": []}
    # A baseline that does not come there is given the end of its run.
    late = {"one": {"adamw": math.inf, "ours": 1.0}}
    found = report.relative(late, "adamw", {"one": 8.0})
    assert found["ours"]["ratios"] == {"one": 1 / 8}
    assert found["ours"]["bounds"] == ["one"]
    assert found["adamw"] == {"geometric_mean": None, "ratios": {}, "bounds": []}
    without = report.relative({"one": {"ours": 1.0}}, "adamw", {})
    assert without["ours"]["geometric_mean"] is None


def test_end_of_a_run():
    found = report.ends(run(4.0, 3.0))
    assert found["steps"] == 20 and found["with_compiling"] == 5


def test_performance_profile():
    found = report.profiles(MEDIANS)
    assert found["ours"] == [(1, 0.5), (2, 1)]
    assert found["adamw"] == [(1, 0.5), (4, 1)]
    assert found["sgd"] == [(8, 0.5)]


def test_schedule():
    values = {"learning_rate": 2.0, "horizon": 100.0}
    numbers = [0, 4, 50, 100, 400]
    found = [float(problem.rate_at(values, n)) for n in numbers]
    # 2 · 1/5 of the warm-up; half-way (1/20 + 1) / 2; then 1/20 for good.
    assert found[0] == pytest.approx(0.4)
    assert found[2:] == pytest.approx([1.05, 0.1, 0.1])
    assert 1.98 < found[1] < 2


@pytest.mark.parametrize("task", config.TASKS)
@pytest.mark.parametrize("name", config.OPTIMISERS)
def test_usual_values_can_be_drawn(task, name):
    space = config.space_of(task, name)
    values = space.usual | {"horizon": 0.5}
    assert set(values) == set(space.distributions())
    trial = optuna.trial.create_trial(
        params=values, distributions=space.distributions(), value=0.0
    )
    assert trial.params == values
    assert config.to_step(values, 200)["horizon"] == 100


def options(tmp_path, *rest):
    wanted = ["--size", "tiny", "--out", str(tmp_path)]
    return [*wanted, *rest]


def lines(path):
    text = (path / "time_to_target.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_times(record):
    kept = {k: v for k, v in record.items() if k not in TIMES}
    if "curve" in kept:
        kept["curve"] = [
            {k: v for k, v in point.items() if k not in TIMES}
            for point in kept["curve"]
        ]
    return kept


def test_end_to_end_and_a_kill_in_the_middle(tmp_path, capsys):
    """Ours and the first-order optimisers; the other file is cut and goes on."""
    only = ["--tasks", "mlp", "--optimisers", "ours"]
    assert __main__.main(options(tmp_path / "a", *only)) == 0
    whole = lines(tmp_path / "a")
    # Two trials and two seeds of three optimisers, and the target.
    kinds = [r["kind"] for r in whole]
    assert [kinds.count(k) for k in ("trial", "seed", "target")] == [6, 6, 1]
    target = next(r for r in whole if r["kind"] == "target")
    lowest = min(
        r["best_loss"]
        for r in whole
        if r["kind"] == "trial" and r["number"] == 0 and r["optimiser"] != "ours"
    )
    assert target["lowest"] == lowest
    assert target["target"] == pytest.approx(1.02 * lowest)
    for record in whole:
        points = record.get("curve", [])
        assert all(p["loss"] > target["target"] for p in points[:-1]) or (
            record["kind"] == "trial" and record["values"]["horizon"] == 1.0
        )
    result = json.loads((tmp_path / "a" / "time_to_target.json").read_text())
    assert set(result["tasks"]["mlp"]["optimisers"]) == {"sgd", "adamw", "ours"}
    for plot in ("profiles", "curves"):
        assert (tmp_path / "a" / f"time_to_target_{plot}.png").stat().st_size > 0
    assert "Geometric mean relative to AdamW" in capsys.readouterr().out

    (tmp_path / "b").mkdir()
    text = (tmp_path / "a" / "time_to_target.jsonl").read_text()
    cut = text.splitlines(keepends=True)
    file = tmp_path / "b" / "time_to_target.jsonl"
    file.write_text("".join(cut[:4]) + cut[4][:30])
    assert __main__.main(options(tmp_path / "b", *only)) == 0
    again = lines(tmp_path / "b")
    assert again[:4] == whole[:4]
    assert list(map(without_times, again)) == list(map(without_times, whole))


def test_finished_studies_are_reported_only(tmp_path, monkeypatch):
    only = ["--tasks", "mlp", "--optimisers", "adamw"]
    assert __main__.main(options(tmp_path, *only)) == 0
    before = lines(tmp_path)

    def no_more(*args):
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(problem, "train", no_more)
    assert __main__.main(options(tmp_path, *only)) == 0
    assert lines(tmp_path) == before
    assert __main__.main(options(tmp_path, "--slack", "0.5", *only)) == 1


def test_missing_packages_are_facts(tmp_path, monkeypatch):
    from experiments.benchmarks.time_to_target import problem

    real = problem.importlib.import_module

    def absent(name, *rest):
        if name == "soap_jax":
            raise ImportError("No module named 'soap_jax'")
        return real(name, *rest)

    monkeypatch.setattr(problem.importlib, "import_module", absent)
    only = ["--tasks", "mlp", "--optimisers", "soap"]
    assert __main__.main(options(tmp_path, *only)) == 0
    result = json.loads((tmp_path / "time_to_target.json").read_text())
    found = result["tasks"]["mlp"]
    assert found["missing"] == {"soap": "No module named 'soap_jax'"}
    assert set(found["optimisers"]) == {"sgd", "adamw"}


def test_records_of_other_options(tmp_path):
    tiny = config.Study(size="tiny", out=tmp_path)
    size = config.TINY.tasks["mlp"]
    record = {"kind": "trial", "step": 4, "task": "mlp", "optimiser": "ours"}
    record |= {"number": 0, "size": "tiny", "slack": 0.02}
    for fingerprint, fine in ((size.fingerprint("ours"), True), ("other", False)):
        text = json.dumps(record | {"fingerprint": fingerprint})
        tiny.lines.write_text(text + "\n")
        if fine:
            with contextlib.closing(study.Records(tiny)) as records:
                assert len(records.found) == 1
        else:
            with pytest.raises(MetricsError, match="mlp, ours"):
                study.Records(tiny)
    # Forgotten, the runs of that optimiser are none of our business.
    redo = config.Study(size="tiny", out=tmp_path, redo=("ours",))
    with contextlib.closing(study.Records(redo)) as records:
        assert records.found == {}
    with pytest.raises(ConfigError, match="targets are theirs"):
        config.Study(redo=("adamw",))


def test_options_of_ours_do_not_touch_the_others():
    size = config.SMALL.tasks["mlp"]
    chosen = config.Curvature(options={"inverse": "eigh"})
    other = dataclasses.replace(size, curvature=chosen)
    changed = {
        name: size.fingerprint(name) != other.fingerprint(name)
        for name in config.OPTIMISERS
    }
    assert changed == {name: name == "ours" for name in config.OPTIMISERS}


def test_cores(monkeypatch):
    with pytest.raises(ConfigError, match="core is 4096"):
        __main__.use_core(4096)


def test_report_without_seeds(tmp_path, console):
    with pytest.raises(MetricsError, match="no seeds"):
        report.save_report(config.Study(size="tiny", out=tmp_path), console)


def test_held_out_examples_are_not_trained_on(tmp_path):
    from experiments.benchmarks.time_to_target import problem

    size = config.TINY.tasks["mlp"]
    data, held, labels = problem.load_split(size, None)
    assert len(data.x_train) == size.train and len(held) == len(labels) == 32
    seen = {x.tobytes() for x in data.x_train}
    assert not any(x.tobytes() in seen for x in held)
