"""The soak: its oracle against numbers by hand, its verdicts, and small runs of it."""

import json

import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests.acceptance.soak import __main__ as soak
from tests.acceptance.soak import oracle as soak_oracle
from tests.acceptance.soak import verdict as soak_verdict
from tests.acceptance.soak.record import Step

ONE = np.eye(1, dtype=np.float32)


def step(count, a, refreshes, last, squares=1.0, due=True, **values):
    """A step of one layer with factors of one number."""
    clocks = {
        "interval": [2],
        "last_refresh": [last],
        "last_inverse": [last],
        "refreshes": [refreshes],
        "inversions": [refreshes],
        "failed": [False],
    }
    return Step(
        value=0.0,
        squares=np.float32([squares]),
        statistics=[(a * ONE, ONE)],
        due=np.array([due]),
        sound=True,
        count=count,
        skipped=values.pop("skipped", 0),
        **{k: np.array(v) for k, v in (clocks | values).items()},
    )


def oracle(inverse="eigh", rule=None):
    rule = rule or kfac.intervals.every(2)
    return soak_oracle.Oracle(["layer"], inverse, 0.75, 10, rule)


def test_oracle_by_hand():
    """Steps 11 and 13 refresh, with 4 and 8: ``(0.75·4 + 8) / (0.75 + 1)``."""
    found = oracle()
    assert found.follow(step(11, 4.0, 1, 11), 0.1, 1)
    assert found.due == [False]
    assert found.follow(step(12, np.nan, 1, 11, due=False), 0.1, 1)
    assert not found.follow(step(12, np.inf, 1, 11, skipped=1), 0.1, 1)
    assert not found.follow(step(12, 8.0, 1, 11, np.inf, skipped=2), 0.1, 1)
    assert found.follow(step(13, 8.0, 2, 13, skipped=2), 0.1, 1)
    np.testing.assert_allclose(found.factors(0)[0], [[11 / 1.75]])
    np.testing.assert_allclose(found.inverted[0][0], [[11 / 1.75]])
    assert found.wrong == [] and (found.count, found.skipped) == (13, 2)


def test_oracle_sees_clocks_that_are_off():
    found = oracle()
    found.follow(step(10, 4.0, 1, 11), 0.1, 1)  # the count did not advance
    found.follow(step(12, 4.0, 2, 11, due=False), 0.1, 1)  # refreshed without being due
    assert len(found.wrong) == 3
    assert "count 10, wanted 11" in found.wrong[0] and "refreshes" in found.wrong[1]


def test_oracle_inverts_for_a_new_damping_and_not_too_early():
    found = oracle("cholesky")
    found.follow(step(11, 4.0, 1, 11), 0.1, 3)
    for count in (12, 13):  # damping is another: wait until three steps have passed
        found.count = count
        found.invert(step(count, 4.0, 1, 11), np.float32(0.2), 3)
        assert found.last_inverse == [11]
    found.count = 14
    found.invert(step(14, 4.0, 1, 11), np.float32(0.2), 3)
    assert found.last_inverse == [14] and found.inverted[0][2] == pytest.approx(0.2)
    found.count = 17
    found.invert(step(17, 4.0, 1, 11), np.float32(0.2), 3)  # nothing has changed
    assert found.last_inverse == [14]


def test_errors_of_factors_and_inverses(rng):
    root = rng.normal(size=(5, 5))
    matrix, g = root @ root.T, np.diag([1.0, 4.0])
    good = soak_oracle.factor_errors(matrix, matrix)
    assert max(good.values()) < 1e-12
    bent = matrix.copy()
    bent[0, 1] += 0.1
    errors = soak_oracle.factor_errors(bent, matrix)
    scale = np.abs(matrix).max()
    assert errors["factor"] == pytest.approx(0.1 / scale)
    assert errors["asymmetry"] == pytest.approx(0.1 / np.abs(bent).max())
    indefinite = matrix - 2 * np.linalg.eigvalsh(matrix)[2] * np.eye(5)
    assert soak_oracle.factor_errors(indefinite, matrix)["negative"] > 0.01

    pi = np.sqrt(np.trace(matrix) / 5 / 2.5)
    explicit = kfac_inverses(
        np.linalg.inv(matrix + pi * 0.3 * np.eye(5)),
        np.linalg.inv(g + 0.3 / pi * np.eye(2)),
    )
    inverted = (matrix, g, 0.09)
    assert soak_oracle.inverse_errors(explicit, inverted)["inverse"] < 1e-12
    assert soak_oracle.inverse_errors(explicit, (matrix, g, 1.0))["inverse"] > 0.01


def kfac_inverses(a, g):
    """An explicit inverse as states hold it."""
    return type("Inverses", (), {"a": a, "g": g})()


def test_errors_of_bases(rng):
    root = rng.normal(size=(5, 5))
    matrix = root @ root.T
    d, q = np.linalg.eigh(matrix)
    assert max(soak_oracle.eigen_errors(q, d, matrix).values()) < 1e-12
    assert soak_oracle.eigen_errors(q, d + 0.5, matrix)["inverse"] > 0.01
    assert soak_oracle.eigen_errors(1.1 * q, d, matrix)["basis"] > 0.1
    u, e, tau = q[:, -2:], d[-2:], d[:3].mean()
    assert max(soak_oracle.low_rank_errors(u, e, tau, matrix).values()) < 1e-12
    assert soak_oracle.low_rank_errors(u, e, 2 * tau, matrix)["trace"] > 1e-3
    assert soak_oracle.low_rank_errors(u, e + 1, tau, matrix)["ritz"] > 1e-3


def sample(number, **values):
    errors = dict.fromkeys(soak_verdict.BOUNDS, 1e-8)
    plain = {"rss_mb": 800.0, "arrays": 99, "compiled": 7, "fast_ms": 0.5}
    return {"step": 100 * number, "errors": errors} | plain | values


PLANTED = {
    "memory": lambda i: {"rss_mb": 800.0 + i},
    "live arrays": lambda i: {"arrays": 99 + i},
    "compilations": lambda i: {"compiled": 7 + (i > 30)},
    "speed": lambda i: {"fast_ms": 0.5 + 0.01 * i},
    "factor": lambda i: {"errors": {"factor": 1e-6 * i}},
    "inverse": lambda i: {"errors": {"inverse": np.nan if i == 3 else 0.0}},
}


@pytest.mark.parametrize("fault", PLANTED)
def test_verdicts_find_what_is_planted(fault):
    plain = [sample(i) for i in range(40)]
    good = soak_verdict.verdicts(plain, {"one": {"wrong": []}})
    assert all(v["good"] for v in good.values())
    bad = [sample(i, **PLANTED[fault](i)) for i in range(40)]
    found = soak_verdict.verdicts(bad, {"one": {"wrong": []}})
    assert [name for name, v in found.items() if not v["good"]] == [fault]


def test_complaints_are_a_verdict():
    found = soak_verdict.verdicts([sample(1)], {"one": {"wrong": ["count 3: due"]}})
    assert not found["clocks, refusals, checkpoints"]["good"]


SMALL = ("--steps", "100", "--segment", "8", "--check", "2", "--orbax", "2")


def test_soak(tmp_path, monkeypatch):
    """A hundred steps of two optimisers, and the file; then with a wrong oracle."""
    names = ("--players", "cholesky every 1", "ekfac elapsed")
    config = (*SMALL, *names, "--first-count", str(2**24 - 20))
    soak.main([*config, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "soak.json").read_text())
    judged = result["verdicts"]
    bad = [
        n for n, v in judged.items() if not v["good"] and n not in ("speed", "memory")
    ]
    assert bad == []
    assert sum(p["steps"] for p in result["players"].values()) == 100
    assert sum(p["refused"] for p in result["players"].values()) > 0
    assert sum(result["restored"].values()) > 1


@pytest.mark.slow
def test_soak_of_all_optimisers(tmp_path):
    soak.main(["--steps", "2000", "--orbax", "5", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "soak.json").read_text())
    judged = result["verdicts"]
    assert [n for n, v in judged.items() if not v["good"] and n != "speed"] == []
    assert all(p["steps"] > 0 for p in result["players"].values())
