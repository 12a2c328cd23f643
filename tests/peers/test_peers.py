"""The peers' tests with K-FAC put in; and the machinery that puts it there."""

import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from tests.peers import __main__ as program
from tests.peers import adapter, places, sources
from tests.peers.reasons import NAMED, REASONS, reason

# ---------------------------------------------------------------- the adapter


def test_from_gradients_is_the_full_matrix_of_gradients():
    """``(g gᵀ + λ I)⁻¹ g = g / (|g|² + λ)`` for every parameter by itself."""
    tx = adapter.FACTORIES["kfac_eigh"](learning_rate=0.5, damping=2.0, momentum=None)
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}
    grads = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.asarray(3.0)}
    updates, _ = tx.update(grads, tx.init(params), params, unknown=1)
    np.testing.assert_allclose(updates["a"], -0.5 * grads["a"] / (55 + 2), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.5 * 3 / (9 + 2), rtol=1e-6)


def test_in_place_of_sgd():
    """What the tests get who ask for SGD has SGD's numbers."""
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
    ours, theirs = adapter.in_place(0.1, 0.9), optax.sgd(0.1, 0.9)
    states = [ours.init(params), theirs.init(params)]
    for number in range(3):
        grads = jax.tree.map(
            lambda p, n=number: jnp.sin(jnp.arange(p.size) + n), params
        )
        grads = jax.tree.map(lambda g, p: g.reshape(p.shape), grads, params)
        seen, states[0] = ours.update(grads, states[0], params)
        wanted, states[1] = theirs.update(grads, states[1], params)
        for x, y in zip(*map(jax.tree.leaves, (seen, wanted)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


# ---------------------------------------------------------------- their files


def test_another_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.metadata, "version", lambda _: "0.2.8")
    with tarfile.open(tmp_path / "optax-0.2.8.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("optax-0.2.8/test.py"), io.BytesIO(b""))
    with pytest.raises(sources.Unavailable, match="SHA-256"):
        sources.unpacked("optax", tmp_path)
    assert not (tmp_path / "optax-0.2.8").exists()


def test_an_unknown_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.metadata, "version", lambda _: "9.9")
    with pytest.raises(sources.Unavailable, match="no checksum is known for flax-9.9"):
        sources.unpacked("flax", tmp_path)


def test_lists_are_replaced_while_a_module_is_imported():
    theirs = [{"opt_name": "adam", "opt_kwargs": {}, "wrapper_name": "x"}]
    plain = parameterized.product
    with places.lists_replaced("ours"):
        found = parameterized.product(theirs, flag=[True])(lambda self: None)
        names = {case["opt_name"] for case in found.testcases}
        wrapped = {case["wrapper_name"] for case in found.testcases}
    assert parameterized.product is plain
    assert names == {"kfac", "kfac_ekfac", "kfac_units"}
    assert wrapped == {None, "reduce_on_plateau", "schedule_free", "mechanize"}


# ---------------------------------------------------------------- verdicts


def test_verdicts(monkeypatch):
    monkeypatch.setitem(REASONS, "test_known", "it is so")

    def record(outcome, used=True):
        return {"outcome": outcome, "why": outcome, "used": used}

    failed, passed = record("failed"), record("passed")
    names = "ok idle named broken known fault".split()
    ours = [passed, record("passed", False), failed, failed, failed, failed]
    control = [passed, passed, failed, failed, passed, passed]
    theirs = [passed, passed, passed, failed, passed, passed]
    found = {
        key: {f"Test.test_{n}": r for n, r in zip(names, rows, strict=True)}
        for key, rows in (("ours", ours), ("control", control), ("theirs", theirs))
    }
    rows = program.compared(found)
    assert {k.removeprefix("Test.test_"): r["verdict"] for k, r in rows.items()} == {
        "ok": "passed",
        "idle": "untouched",
        "named": "control fails too",
        "broken": "fails as it is",
        "known": "reason known",
        "fault": "ours fails",
    }
    assert rows["Test.test_known"]["reason"] == "it is so"


def test_reasons_are_found_with_parameters():
    assert reason("X.test_masked_state_structure3") == NAMED
    assert reason("X.test_other") == ""


# ---------------------------------------------------------------- all of them


@pytest.mark.slow
@pytest.mark.parametrize("file", places.FILES, ids=lambda file: file.path)
def test_their_tests(file, tmp_path_factory):
    """No test fails with ours for a reason that nobody has looked at."""
    folder = tmp_path_factory.getbasetemp() / "peers"
    folder.mkdir(exist_ok=True)
    try:
        result = program.measure([file], folder)
    except sources.Unavailable as why:
        pytest.skip(str(why))
    (found,) = result.values()
    assert sum(found["counts"].values()) > 0
    bad = {k: r["why"] for k, r in found["tests"].items()
           if r["verdict"] == "ours fails"}  # fmt: skip
    assert not bad, json.dumps(bad, indent=1)
