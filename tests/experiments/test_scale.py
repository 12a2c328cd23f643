"""The benchmark of cost against size: exponents, limits, end to end."""

import json
import math

import pytest

from experiments.benchmarks import scale


def test_power_law():
    exact = scale.power_law([(1, 3), (2, 24), (4, 192)])
    assert exact["exponent"] == pytest.approx(3)
    assert exact["standard_error"] == pytest.approx(0, abs=1e-12)
    # log2 y = 0, 2, 1 at 0, 1, 2: slope 1/2, residuals -1/2, 1, -1/2,
    # error √(3/2 / (3 - 2) / 2).
    bent = scale.power_law([(1, 1), (2, 4), (4, 2)])
    assert bent["exponent"] == pytest.approx(0.5)
    assert bent["standard_error"] == pytest.approx(math.sqrt(0.75))
    two = scale.power_law([(1, 1), (10, 100)])
    assert two == {"exponent": pytest.approx(2), "standard_error": None}


def test_exponents_of_rows_that_points_lack():
    def point(width, **rows):
        held = {name: {"ms": {"step": ms}} for name, ms in rows.items()}
        return {"width": width, "rows": held}

    points = [point(1, a=1.0, b=5.0), point(2, a=2.0), point(4, a=4.0)]
    found = scale.exponents("width", points)
    assert set(found) == {"a"}
    assert found["a"]["step"]["exponent"] == pytest.approx(1)


def test_work_of_a_step():
    # One layer, a = 2, g = 3, B = 5.
    cubes = 10 / 3 * (8 + 27) + 2 * 5 * (4 + 9)
    assert scale.work(2, 1, 5, 3) == pytest.approx(cubes + 6 * 5 * 6 + 2 * 6 * 5)


def fake_point(seconds):
    kinds = {"step": 1e3 * seconds, scale.AMORTISED: 1e3 * seconds}
    rows = {"AdamW": {"ms": kinds, "compile_seconds": 0.0, "state_mb": 0.0}}
    return {"rows": rows, "failed": {}}


def test_an_axis_ends_before_a_step_that_would_take_too_long(monkeypatch):
    taken = []

    def measured(config, sizes):
        taken.append(sizes[0])
        return fake_point(1.0)

    monkeypatch.setattr(scale, "measure_point", measured)
    config = scale.Scale(width=(256, 512, 1024, 2048), limit=20.0)
    found = scale.measure_axis(config, "width")
    # Each doubling costs at most eight times as much.
    assert taken == [256, 512, 1024, 2048]
    assert found["stopped"] is None
    found = scale.measure_axis(scale.Scale(width=(256, 2048), limit=20.0), "width")
    assert taken[4:] == [256]
    assert found["stopped"].startswith("width 2048: a step would take about")
    assert found["exponents"] == {}
    found = scale.measure_axis(scale.Scale(width=(1, 2), minutes=-1.0), "width")
    assert found["points"] == [] and "minutes are over" in found["stopped"]


@pytest.mark.slow
def test_scale(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "AXES", scale.AXES[:2])
    options = "--width 4 8 --depth 2 --base 4 2 4 10".split()
    rest = "--methods cholesky no_such_method --rounds 1 --without-peer".split()
    scale.main([*options, *rest, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "scale.json").read_text())
    width = result["axes"]["width"]
    assert [p["width"] for p in width["points"]] == [4, 8]
    rows = width["points"][1]["rows"]
    assert set(rows) == {"AdamW", "ours cholesky"}
    kinds = {"refresh+invert", "refresh", "nothing", scale.AMORTISED}
    assert set(rows["ours cholesky"]["ms"]) == kinds
    assert set(width["exponents"]["ours cholesky"]) == kinds
    assert result["axes"]["depth"]["exponents"] == {}
    assert (tmp_path / "scale.png").stat().st_size > 0
    assert "ours cholesky, refresh+invert" in capsys.readouterr().out
