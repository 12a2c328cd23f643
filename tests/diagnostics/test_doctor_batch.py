"""``doctor`` with parameters and a batch: what only these show, and the whole of it."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.diagnostics.doctor.doctor import COMPILED, doctor
from kfac_jax_lite.diagnostics.doctor.findings import TEXTS, Finding, Findings
from kfac_jax_lite.distributed.layout import relayout
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

ROOT = pathlib.Path(__file__).parents[2]
DOCTOR = ROOT / "kfac_jax_lite" / "diagnostics" / "doctor"


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


def test_a_sum_beside_other_arguments():
    """A key and an array that is no example do not hide it, and are not doubled."""

    def loss(p, stored, x, y, key):
        noise = 1e-3 * jax.random.normal(key, x.shape)
        return sum_loss(p, x + noise + stored.sum(), y)

    stored, key = jnp.zeros(8), jax.random.PRNGKey(0)
    params, batch = parameters(), (stored, *data(), key)
    tagged = kfac.tag(loss, params, *batch)
    state = kfac.kfac(tagged.layers, 0.1).init(params)
    found = {f.kind: f for f in doctor(tagged, state, batch, params)}
    assert found["loss_is_a_sum"].numbers["doubled"] == pytest.approx(
        2 * found["loss_is_a_sum"].numbers["loss"], rel=1e-2
    )


def test_a_loss_of_one_batch_size_is_not_doubled():
    def loss(p, x, y):
        return mean_loss(p, x.reshape(64, 6), y)

    tagged, params, state = run(loss=loss)
    assert doctor(tagged, state, data(), params) == []


def test_too_few_rows():
    """Two rows and an average of two refreshes against factors of 9 and 8."""
    tagged, params, state = run(data(2), steps=2)
    late = clocked(state, {"count": 60}.items(), last_refresh=60, last_inverse=60)
    rows = [
        f for f in doctor(tagged, late, data(2), params) if f.kind == "too_few_rows"
    ]
    assert [(f.layer, f.numbers["size"]) for f in rows] == [
        ("hidden", 7), ("hidden", 8), ("out", 9)
    ]  # fmt: skip
    # Ten rows and refreshes on ten different batches would have done.
    record = {"refreshes": 100, "weight": 1.0}
    found = doctor(tagged, clocked(late, **record), data(2), params)
    assert "too_few_rows" not in kinds(found)


def test_an_average_that_is_still_filling_up():
    """It will be worth 39 refreshes, or with a decay of a half three: 6 rows."""
    tagged, params, state = run(data(2), steps=2)
    assert "too_few_rows" not in kinds(doctor(tagged, state, data(2), params))
    tagged, params, state = run(data(2), steps=2, factor_decay=0.5)
    found = [f for f in doctor(tagged, state, data(2), params)]
    rows = [f for f in found if f.kind == "too_few_rows"]
    assert {f.numbers["size"] for f in rows} == {7, 8, 9}
    assert rows[0].numbers["memory"] == pytest.approx(3)


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
    early = clocked(state, refreshes=2)
    assert "other_inputs" not in kinds(doctor(tagged, early, (3 * x, y), params))


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


class Normalised(nn.Module):
    """Two layers with batch norm between them, and dropout."""

    @nn.compact
    def __call__(self, x, train, noisy):
        x = nn.Dense(8, param_dtype=np.float64)(x)
        x = nn.BatchNorm(not train, param_dtype=np.float64)(x)
        x = nn.Dropout(0.5, deterministic=not noisy)(nn.relu(x))
        return kfac.normal(nn.Dense(3, param_dtype=np.float64)(x))


def normalised(train, noisy, closed=False, examples=64, averages=None):
    """Findings in a network with batch norm and dropout, each on or off."""
    net, (x, y), key = Normalised(), data(examples), jax.random.key(0)
    variables = dict(net.init(key, x, False, False))
    params = variables.pop("params")
    variables = variables if averages is None else jax.tree.map(averages, variables)

    def loss(params, variables, x, y, key):
        out, _ = net.apply(
            {"params": params, **variables}, x, train, noisy,
            rngs={"dropout": key}, mutable=["batch_stats"],
        )  # fmt: skip
        return 0.5 * jnp.mean(jnp.sum((out - y) ** 2, -1))

    if closed:
        batch = x, y, key
        tagged = kfac.tag(lambda p, *rest: loss(p, variables, *rest), params, *batch)
    else:
        batch = variables, x, y, key
        tagged = kfac.tag(loss, params, *batch)
    state = kfac.kfac(tagged.layers, 0.1).init(params)
    found = doctor(tagged, state, batch, params)
    return {f.kind: f for f in found if f.kind != "no_steps"}


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("examples", [64, 8])
def test_batch_norm_in_evaluation_mode(closed, examples):
    """As an argument or closed over; with as many examples as channels, too."""
    assert normalised(True, True, closed, examples) == {}
    found = normalised(False, True, closed, examples)
    if closed or examples == 64:
        assert set(found) == {"stored_averages"}
        assert found["stored_averages"].severity == "warning"
        assert "still 0 and 1" in found["stored_averages"].message
    else:
        assert found == {}  # eight rows of eight: it cannot tell


def test_averages_that_are_frozen_on_purpose():
    """Averages that have been learned may be meant: no more than a notice."""
    found = normalised(False, True, averages=lambda x: x + 0.5)
    assert found["stored_averages"].severity == "notice"
    assert "still" not in found["stored_averages"].message


def test_dropout_that_is_off():
    assert normalised(True, True) == {}
    found = normalised(True, False)
    assert set(found) == {"unused_key"}
    assert found["unused_key"].numbers == {"argument": "args[3]"}


@pytest.mark.parametrize("kind", ["inputs", "degrees", "targets", "layer"])
def test_standardising_is_no_evaluation_mode(kind):
    """Stored numbers that scale inputs, a graph's rows or residuals; layer norm."""
    mean, variance = jnp.linspace(1, 2, 6), jnp.linspace(0.5, 2, 6)

    def loss(p, mean, variance, x, y):
        if kind == "inputs":
            x = (x - mean) / jnp.sqrt(variance)
        hidden = jax.nn.relu(x @ p["hidden"]["w"] + p["hidden"]["b"])
        if kind == "degrees":
            hidden = hidden / jnp.sqrt(jnp.tile(variance, 2)[:8])
        if kind == "layer":
            centred = hidden - hidden.mean(-1, keepdims=True)
            hidden = centred / jnp.sqrt(1e-5 + (centred**2).mean(-1, keepdims=True))
        out = hidden @ p["out"]["w"] + p["out"]["b"]
        if kind == "targets":
            out = (out - mean[:3]) / jnp.sqrt(variance[:3])
        return 0.5 * jnp.mean(jnp.sum((kfac.normal(out) - y) ** 2, -1))

    batch, params = (mean, variance, *data()), parameters()
    tagged = kfac.tag(loss, params, *batch)
    state = kfac.kfac(tagged.layers, 0.1).init(params)
    assert kinds(doctor(tagged, state, batch, params)) == {"no_steps"}


def test_a_second_call_finds_everything_compiled():
    tagged, params, state = healthy()
    doctor(tagged, state, data(), params)
    size = COMPILED._cache_size()
    doctor(tagged, state, data(), params)
    assert COMPILED._cache_size() == size


def test_every_text_is_said():
    """The source names every text, and no others."""
    source = "".join(path.read_text() for path in DOCTOR.glob("*.py"))
    texts = re.findall(r'"([a-z_]+(?:/[a-z]+)?)"', source)
    assert set(TEXTS) <= set(texts)
    assert {text for text in texts if "/" in text} <= set(TEXTS)
    assert all(message and advice for message, advice in TEXTS.values())


def test_every_finding_is_documented():
    """In ``doctor`` and on the page of troubles, which has no others."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    part = page.split("## What the doctor finds")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", part, re.M)
    known = {text.split("/")[0] for text in TEXTS}
    assert len(known) > 25
    assert sorted(listed) == sorted(known)
    assert all(f"``{kind}``" in str(doctor.__doc__) for kind in known)
