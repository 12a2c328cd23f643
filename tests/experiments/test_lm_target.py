"""The benchmark of the language model: searches, resumption, comparison."""

import json

import optuna
import pytest

from experiments.benchmarks import lm_target
from experiments.errors import RunFolderError
from tests.experiments.sums import state_digests


def options(tmp_path, trials):
    (tmp_path / "tinyshakespeare.txt").write_text("to be, or not to be:\n" * 20)
    state_digests(tmp_path)
    sizes = "--layers 1 --heads 1 --features 4 --context 4 --batch-size 4 --steps 2"
    rest = f" --our-steps 2 --eval-every 1 --eval-windows 4 --trials {trials}"
    return [
        *(sizes + rest).split(),
        "--data-dir",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]


def run(*losses):
    curve = [
        {"step": i, "seconds": 2.0 * i, "loss": x} for i, x in enumerate(losses, 1)
    ]
    return {"curve": curve, "best_loss": min(losses)}


def test_comparison_of_best_trials():
    best = {"adamw": run(4.0, 3.0, 2.0, 2.5), "ours": run(3.0, 1.9, 1.0, 0.9)}
    found = lm_target.compare(best)
    assert found["target"] == 2.0
    assert found["step_ratio"] == found["seconds_ratio"] == pytest.approx(2 / 3)
    assert lm_target.compare(best | {"ours": run(5.0)})["step_ratio"] is None


@pytest.mark.parametrize("name", lm_target.OPTIMIZERS)
def test_usual_settings_can_be_drawn(name):
    trial = optuna.trial.FixedTrial(lm_target.USUAL[name])
    assert lm_target.suggest(name, trial) == lm_target.USUAL[name]


def test_schedule():
    schedule = lm_target.cosine(2.0, 10, 110)
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    assert values == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)


@pytest.mark.slow
def test_lm_target(tmp_path, monkeypatch, capsys):
    """Both are tuned; a further search goes on after the trials it finds."""
    result = lm_target.main(options(tmp_path, 1))
    path = tmp_path / "lm_target.jsonl"
    trials = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [t["optimizer"] for t in trials] == ["adamw", "ours"]
    assert [t["values"] for t in trials] == list(lm_target.USUAL.values())
    assert [r["step"] for r in result["best"]["ours"]["curve"]] == [1, 2]
    assert (tmp_path / "lm_target.png").stat().st_size > 0
    assert "steps to AdamW's best" in capsys.readouterr().out

    taken = []

    def counted(study, name, values):
        taken.append((name, values))
        best = {k: result["best"][name][k] for k in ("curve", "compile_seconds")}
        return best | {"best_loss": 100.0}

    monkeypatch.setattr(lm_target, "run_trial", counted)
    again = lm_target.main(options(tmp_path, 3))
    assert [name for name, _ in taken] == ["adamw"] * 2 + ["ours"] * 2
    assert again["best"] == result["best"]
    # Stopped after one of the last two: the other is drawn as it was.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    lm_target.main(options(tmp_path, 3))
    assert taken[4:] == taken[3:4]


def test_trials_of_another_search(tmp_path):
    first = {"kind": "config", "step": 0, "settings": {"trials": 3, "seed": 0}}
    path = tmp_path / "lm_target.jsonl"
    path.write_text(json.dumps(first) + "\n")
    with pytest.raises(RunFolderError, match="holds trials with other settings"):
        lm_target.finished_trials(path, {"settings": {"trials": 3, "seed": 1}})
    assert lm_target.finished_trials(tmp_path / "none", first) == {}
