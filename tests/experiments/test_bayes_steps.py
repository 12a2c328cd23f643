"""The benchmark of the variational optimisers' steps."""

import json

import pytest

from experiments.benchmarks import bayes_steps, common


def test_the_usual_command_line():
    args = common.parse(bayes_steps.Config, [], "bayes_steps")
    assert args.models == ("mlp", "lenet5", "resnet")
    assert args.cycle == bayes_steps.INVERT


@pytest.mark.slow
def test_every_row_has_a_ratio_to_adam(tmp_path):
    given = ["--models", "lenet5", "--rounds", "1", "--cycle", "1"]
    result = bayes_steps.main([*given, "--out", str(tmp_path)])
    rows = result["models"]["lenet5"]
    assert list(rows["Adam"]["ratio_to_adam"]) == [1, 1, 1]
    assert {"noisy K-FAC", "VOGN", "IVON"} < set(rows)
    assert json.loads((tmp_path / "bayes_steps.json").read_text())["models"].keys() == {
        "lenet5"
    }
