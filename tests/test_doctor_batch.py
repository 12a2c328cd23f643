"""``doctor`` with parameters and a batch: what only these show, and the whole of it."""

import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.doctor import doctor
from kfac_jax_lite.findings import Finding, Findings
from kfac_jax_lite.placement import relayout
from tests.patients import (
    clocked,
    data,
    forward,
    healthy,
    kinds,
    mean_loss,
    parameters,
    run,
    sum_loss,
)

ROOT = pathlib.Path(__file__).parent.parent


def test_parameters_and_losses_that_are_not_finite():
    tagged, params, state = healthy()
    x, y = data()
    sick = {**params, "out": {**params["out"], "b": jnp.full(3, jnp.nan)}}
    assert kinds(doctor(tagged, state, params=sick)) == {"parameters_not_finite"}
    found = doctor(tagged, state, (x.at[0].set(jnp.nan), y), params)
    assert kinds(found) == {"loss_not_finite"}


def test_steps_that_explode():
    """Without a trust region; the learning rate is given, or held by the state."""
    tagged, params, state = run(learning_rate=100.0, kl_clip=None, steps=1)
    assert "steps_explode" not in kinds(doctor(tagged, state, params=params))
    before = parameters()
    found = doctor(tagged, state, params=before, learning_rate=100.0)
    assert kinds(found) == {"steps_explode"}
    moved = jax.tree.map(lambda new, old: new - old, params, before)
    assert found[0].numbers["update"] == pytest.approx(float(optax.tree.norm(moved)))
    assert doctor(tagged, state, params=before, learning_rate=1e-4) == []
    held = optax.InjectStatefulHyperparamsState(
        jnp.zeros((), jnp.int32), {"learning_rate": jnp.asarray(100.0)}, {}, state
    )
    assert kinds(doctor(tagged, held, params=before)) == {"steps_explode"}
    tx = kfac.kfac(tagged.layers, 0.1, damping=kfac.damping.adaptive())
    adapted = tx.init(before)
    long = jax.tree.map(lambda p: 2 * p, before)
    found = doctor(tagged, adapted._replace(step=long), params=before)
    assert kinds(found) == {"steps_explode", "no_steps"}


def test_a_loss_that_is_a_sum():
    tagged, params, state = run(loss=sum_loss, learning_rate=1e-5)
    (finding,) = [
        f for f in doctor(tagged, state, data(), params) if f.kind == "loss_is_a_sum"
    ]
    assert finding.numbers["doubled"] == pytest.approx(2 * finding.numbers["loss"])


def test_a_loss_of_one_batch_size_is_not_doubled():
    def loss(p, x, y):
        return mean_loss(p, x.reshape(64, 6), y)

    tagged, params, state = run(loss=loss)
    assert doctor(tagged, state, data(), params) == []


def test_too_few_rows():
    """Two rows and an average of two refreshes against factors of 9 and 8."""
    tagged, params, state = run(data(2), steps=2)
    found = [f for f in doctor(tagged, state, data(2), params)]
    rows = [f for f in found if f.kind == "too_few_rows"]
    assert [(f.layer, f.numbers["size"]) for f in rows] == [
        ("hidden", 7), ("hidden", 8), ("out", 9)
    ]  # fmt: skip
    # Ten rows and refreshes on ten different batches would have done.
    record = {"refreshes": 100, "weight": 1.0}
    found = doctor(tagged, clocked(state, **record), data(2), params)
    assert "too_few_rows" not in kinds(found)


def test_a_batch_of_another_kind():
    tagged, params, state = healthy()
    x, y = data()
    found = doctor(tagged, state, (3 * x, y), params)
    assert ("other_inputs", "hidden") in {(f.kind, f.layer) for f in found}
    found = doctor(tagged, state, (x, 30 * y), params)
    assert "other_gradients" not in kinds(found)  # the factors are fresh
    old = clocked(state, {"count": 20}.items(), interval=20)
    old = clocked(old, due=False)
    found = doctor(tagged, old, (x, 30 * y), params)
    assert ("other_gradients", "out") in {(f.kind, f.layer) for f in found}
    assert doctor(tagged, old, (x, y), params) == []


def test_the_empirical_fisher_vanishes():
    """Targets that the network meets to 1e-3: the sampled matrix is what it was."""
    params, (x, _) = parameters(), data()
    batch = x, forward(params, x) + 1e-3 * data()[1]
    for fisher in ("empirical", "exact"):
        tagging = {"fisher": fisher}
        tagged, _, state = run(batch, params, tagging=tagging, learning_rate=0.0)
        for key in (None, jax.random.key(0)):
            found = doctor(tagged, state, batch, params, key=key)
            assert kinds(found) == (
                {"fisher_vanishes"} if fisher == "empirical" else set()
            )
    # Without a batch it is seen as the damping that it leaves alone.
    tagged, _, state = run(batch, params, learning_rate=0.0)
    assert kinds(doctor(tagged, state)) == {"damping_too_large"}


@pytest.mark.parametrize("layout", ["packed", "owner", "chain", "partition"])
def test_layouts_and_wrappers(layout):
    """Healthy and ill states look the same through them."""
    tagged, params, state = healthy()
    if layout in ("packed", "owner"):
        owner = kfac.Reduction("owner", devices=8, bucket=0)
        options = {"packed": {"packed": True}}.get(
            layout, {"reduction": owner, "axis_name": "batch"}
        )
        like = kfac.kfac(tagged.layers, 0.05, **options).init(params)
        wrap = lambda s: relayout(s, like, tagged.layers)  # noqa: E731
    elif layout == "chain":
        wrap = lambda s: (optax.EmptyState(), {"inner": s})  # noqa: E731
    else:
        tx = optax.partition(
            {"kfac": kfac.kfac(tagged.layers, 0.05), "adam": optax.adam(1e-3)},
            {"hidden": "kfac", "out": "adam"},
        )
        mixed = tx.init(params)
        found = doctor(tagged, mixed)
        assert kinds(found) == {"no_steps"}
        return
    assert doctor(tagged, wrap(state), data(), params) == []
    sick = clocked(state, inverse_damping=1e6)
    assert kinds(doctor(tagged, wrap(sick))) == {"damping_too_large"}


def test_the_text():
    tagged, params, state = healthy()
    shown = str(doctor(tagged, clocked(state, failures=2, diff=0.8, interval=20)))
    lines = shown.splitlines()
    assert lines[0].startswith("[warning] stale_factors: layer hidden: ")
    assert "  the same in: out" in lines
    assert "  from: failures 2, inversions 4" in lines
    alone = Findings([Finding("notice", "odd", None, "Odd.", "Even.", {"x": 0.12345})])
    assert str(alone) == "[notice] odd: Odd.\n  try: Even.\n  from: x 0.123"
    del params


def test_bad_arguments():
    tagged, params, state = healthy()
    with pytest.raises(ValueError, match="params="):
        doctor(tagged, state, data())
    with pytest.raises(ValueError, match="KFACState"):
        doctor(tagged, optax.adam(1e-3).init(params))
