"""What the first step costs: kernels counted and traced back to their functions."""

import json

import pytest

from experiments.benchmarks import first_step
from experiments.errors import ConfigError
from experiments.models.architectures import Architecture, classifier
from experiments.models.networks import MLP

TEXT = """HloModule jit_step

FileNames
1 "/somewhere/kfac_jax_lite/optimizer/steps.py"
2 "/somewhere/site-packages/optax/transforms.py"

FunctionNames
1 "guided.<locals>.update_fn"
2 "update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3}
2 {file_name_id=2 function_name_id=2 line=4 end_line=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=2 parent_frame_id=3}

%fused_computation (param_0: f32[4]) -> f32[4] {
  %param_0 = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%param_0, %param_0), metadata={stack_frame_id=1}
}

%fused_computation.1 (param_0.1: f32[4]) -> f32[4] {
  %param_0.1 = f32[4]{0} parameter(0)
  ROOT %add.2 = f32[4]{0} add(%param_0.1, %param_0.1), metadata={stack_frame_id=2}
}

%fused_computation.2 (param_0.2: f32[4]) -> f32[4] {
  %param_0.2 = f32[4]{0} parameter(0)
  ROOT %exp.2 = f32[4]{0} exponential(%param_0.2)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %f = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused_computation, metadata={stack_frame_id=2}
  %g = f32[4]{0} fusion(%f), kind=kLoop, calls=%fused_computation.1, metadata={stack_frame_id=1}
  %h = f32[4]{0} fusion(%g), kind=kLoop, calls=%fused_computation.2, metadata={stack_frame_id=3}
  ROOT %w = f32[4]{0} while(%h), condition=%c, body=%b
}
"""  # noqa: E501


def test_equal_fusions_are_counted_once():
    found = first_step.count(TEXT)
    assert (found["fusions"], found["different_fusions"]) == (3, 2)
    assert (found["loops"], found["branches"], found["custom_calls"]) == (1, 0, 0)


def test_the_innermost_function_of_the_package_is_named():
    found = first_step.sources(TEXT)
    assert found == {"optimizer/steps.py:update_fn": 2, "the network": 1}


def test_a_network_is_compiled_and_written(tmp_path, monkeypatch, capsys):
    tiny = Architecture("tiny", lambda: MLP((5,), 3), classifier, (4, 6))
    monkeypatch.setattr(first_step, "MODELS", {"tiny": tiny})
    arguments = ["--models", "tiny", "--rounds", "1", "--out", str(tmp_path)]
    result = first_step.main(arguments)
    rows = result["models"]["tiny"]
    assert json.loads((tmp_path / "first_step.json").read_text())["models"]["tiny"]
    ours, adam = rows[first_step.OURS], rows[first_step.BASELINE]
    assert ours["different_fusions"] > adam["different_fusions"] > 0
    assert ours["seconds"] >= ours["compile_seconds"] > 0
    assert adam["ratio_quartiles"] == (1, 1, 1)
    assert any(name.startswith("statistics/") for name in ours["sources"])
    assert not any(name.startswith("optimizer/") for name in adam["sources"])
    assert "tiny, 1 rounds" in capsys.readouterr().out


def test_an_unknown_network_is_named():
    with pytest.raises(ConfigError, match="unknown models alexnet; known: mlp"):
        first_step.main(["--models", "alexnet"])
