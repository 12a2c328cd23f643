"""The study of reached losses: earlier runs are rendered, and a tiny run of its own."""

import json

import pytest

from experiments.benchmarks import reach_loss
from experiments.benchmarks.time_to_target import __main__ as time_to_target
from experiments.benchmarks.time_to_target import config
from experiments.errors import MetricsError

RESULTS = "experiments/benchmarks/results"


def test_comparison_of_best_runs():
    def run(*losses):
        curve = [
            {"step": i, "seconds": 2.0 * i, "loss": x}
            for i, x in enumerate(losses, start=1)
        ]
        return {"curve": curve, "best_loss": min(losses)}

    best = {"adam": run(4.0, 3.0, 2.0, 2.5), "ours": run(3.0, 1.9, 1.0, 0.9)}
    found = reach_loss.compare(best, "adam")
    assert found["target"] == 2.0
    assert found["step_ratio"] == found["seconds_ratio"] == pytest.approx(2 / 3)
    slow = reach_loss.compare(best | {"ours": run(5.0)}, "adam")
    assert slow["step_ratio"] is None


@pytest.mark.parametrize(
    ("name", "dataset", "title"),
    [
        ("mlp_target", "mnist", "Adam"),
        ("mlp_target", "fashion_mnist", "Adam"),
        ("lm_target", "", "AdamW"),
    ],
)
def test_the_best_trials_are_those_of_the_committed_summaries(
    request, name, dataset, title
):
    folder = request.config.rootpath / RESULTS
    whole = json.loads((folder / f"{name}.json").read_text())
    wanted = whole["datasets"][dataset] if dataset else whole
    best = reach_loss.read_best(folder / f"{name}.jsonl")[dataset]
    found = reach_loss.compare(best, title.lower())
    for key in ("target", "step_ratio", "seconds_ratio"):
        assert found[key] == pytest.approx(wanted["comparison"][key])


def test_earlier_runs_are_rendered(request, tmp_path, capsys):
    folder = str(request.config.rootpath / RESULTS)
    assert reach_loss.main(["--render", folder, "--out", str(tmp_path)]) == 0
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "autoencoder.png", "mlp_target_mnist.png", "mlp_target_fashion_mnist.png",
        "lm_target.png",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "kfac_jax_lite, averaged" in shown and "steps to AdamW's best" in shown
    with pytest.raises(MetricsError, match="holds none of autoencoder"):
        reach_loss.render(tmp_path, tmp_path)


def test_the_study_is_that_of_time_to_target(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(time_to_target, "main", lambda argv: seen.append(argv) or 0)
    reach_loss.main(["--tasks", "mlp", "--core", "0", "--out", str(tmp_path)])
    (given,) = seen
    at = given.index("--optimisers") + 1
    assert given[at : at + 8] == [*config.OPTIMISERS, *config.AUTOMATIC]
    assert given[:2] == ["--size", "reach"] and given[-2:] == ["--core", "0"]


def test_a_tiny_run_with_steps_of_its_own(monkeypatch, tmp_path):
    """The automatic K-FAC on the tiny autoencoder; kfac-jax may be missing."""
    monkeypatch.setitem(config.SIZES, "reach", config.TINY)
    argv = ["--tasks", "autoencoder", "--out", str(tmp_path)]
    assert reach_loss.main(argv) == 0
    result = json.loads((tmp_path / "time_to_target.json").read_text())
    rows = result["tasks"]["autoencoder"]["optimisers"]
    assert {"sgd", "adamw", "ours", "ours_auto"} <= set(rows)
