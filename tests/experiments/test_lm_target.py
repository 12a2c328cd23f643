"""The benchmark of the language model: searches, resumption, comparison."""

import json

import optuna
import pytest

from experiments.benchmarks import lm_target
from experiments.errors import RunFolderError


def options(tmp_path, trials):
    (tmp_path / "tinyshakespeare.txt").write_text("to be, or not to be:\n" * 20)
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


def test_lm_target(tmp_path, monkeypatch, capsys):
    """Both are tuned; a search that was stopped goes on with the trials it has."""
    result = lm_target.main(options(tmp_path, 2))
    path = tmp_path / "lm_target.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    trials = [json.loads(line) for line in lines[1:]]
    assert [t["optimizer"] for t in trials] == ["adamw", "adamw", "ours", "ours"]
    assert [t["values"] for t in trials[::2]] == list(lm_target.USUAL.values())
    assert [r["step"] for r in result["best"]["ours"]["curve"]] == [1, 2]
    assert (tmp_path / "lm_target.png").stat().st_size > 0
    assert "steps to AdamW's best" in capsys.readouterr().out

    path.write_text("".join(lines[:4]))
    taken = []
    whole = lm_target.run_trial

    def counted(study, name, values):
        taken.append((name, values))
        return whole(study, name, values)

    monkeypatch.setattr(lm_target, "run_trial", counted)
    again = lm_target.main(options(tmp_path, 2))
    assert taken == [("ours", trials[3]["values"])]
    for name in lm_target.OPTIMIZERS:
        assert again["best"][name]["best_loss"] == result["best"][name]["best_loss"]


def test_trials_of_another_search(tmp_path):
    first = {"kind": "config", "step": 0, "settings": {"trials": 3}}
    path = tmp_path / "lm_target.jsonl"
    path.write_text(json.dumps(first) + "\n")
    with pytest.raises(RunFolderError, match="holds trials with other settings"):
        lm_target.finished_trials(path, {"settings": {"trials": 2}})
    assert lm_target.finished_trials(tmp_path / "none", {"settings": {}}) == {}
