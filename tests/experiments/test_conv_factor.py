"""One tiny run of the benchmark of convolution factors."""

import json

import pytest

from experiments.benchmarks import conv_factor


def test_run(tmp_path, capsys):
    argv = ["--shapes", "tiny", "--rounds", "2", "--out", str(tmp_path)]
    result = conv_factor.main(argv)
    written = json.loads((tmp_path / "conv_factor.json").read_text())
    assert written["shapes"]["tiny"]["shape"] == [4, 6, 6, 2]
    assert "folder" not in written["settings"] and "out" not in written["settings"]
    rows = result["shapes"]["tiny"]["rows"]
    assert set(rows) == set(conv_factor.ways(conv_factor.geometry_of((1, 6, 1, 3, 1))))
    assert rows[conv_factor.WHOLE]["ratio_to_im2col"] == (1.0, 1.0, 1.0)
    assert 2 * 4 * 36 * 18**2 == result["shapes"]["tiny"]["flops"]
    assert "shifts" in capsys.readouterr().out


def test_ways_that_disagree_are_an_error(monkeypatch):
    wrong = lambda geometry, x: 2 * conv_factor.gram(geometry, x)  # noqa: E731
    monkeypatch.setattr(conv_factor, "naive", wrong)
    with pytest.raises(RuntimeError, match="conv patches is off by"):
        conv_factor.benchmark("tiny", 1)
