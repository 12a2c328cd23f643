"""``doctor``: every complaint is seen where it was made, and not in a healthy twin."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.doctor import doctor
from kfac_jax_lite.findings import Finding, Findings
from kfac_jax_lite.placement import relayout
from kfac_jax_lite.telemetry import report

README = pathlib.Path(__file__).parent.parent / "README.md"


def forward(p, x):
    hidden = jax.nn.relu(x @ p["hidden"]["w"] + p["hidden"]["b"])
    return kfac.normal(hidden @ p["out"]["w"] + p["out"]["b"])


def mean_loss(p, x, y):
    """Mean squared error, halved."""
    return 0.5 * jnp.mean(jnp.sum((forward(p, x) - y) ** 2, -1))


def sum_loss(p, x, y):
    return 0.5 * jnp.sum((forward(p, x) - y) ** 2)


def parameters(dtype=np.float64, sizes=(6, 8, 3)):
    rng = np.random.default_rng(0)
    pairs = zip(("hidden", "out"), sizes, sizes[1:], strict=False)
    return {
        name: {
            "w": jnp.asarray(rng.normal(size=(n, m)) / n**0.5, dtype),
            "b": jnp.zeros(m, dtype),
        }
        for name, n, m in pairs
    }


def data(examples=64, dtype=np.float64):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(examples, 6)), dtype)
    return x, jnp.asarray(rng.normal(size=(examples, 3)), dtype)


def run(batch=None, params=None, steps=4, loss=mean_loss, tagging=None, **options):
    """Tagged loss, parameters and state after some steps on one batch."""
    batch = data() if batch is None else batch
    params = parameters() if params is None else params
    tagged = kfac.tag(loss, params, *batch, **(tagging or {}))
    options = {"learning_rate": 0.05, "damping": 0.1, **options}
    tx = kfac.kfac(tagged.layers, **options)

    @jax.jit
    def step(params, state, *batch):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, *batch)
    return tagged, params, state


@functools.cache
def healthy():
    """The twin of every patient."""
    return run()


def kinds(findings):
    return {finding.kind for finding in findings}


def clocked(state, kfac_fields=(), **fields):
    """The state with other counters."""
    inner = state.kfac
    new = {k: jnp.full_like(getattr(inner.clock, k), v) for k, v in fields.items()}
    inner = inner._replace(clock=inner.clock._replace(**new))
    numbers = {k: jnp.asarray(v, getattr(inner, k).dtype) for k, v in kfac_fields}
    return state._replace(kfac=inner._replace(**numbers))


def test_the_healthy_twin_has_no_findings():
    tagged, params, state = healthy()
    found = doctor(
        tagged, state, data(), params, key=jax.random.key(0), learning_rate=0.05
    )
    assert found == [], str(found)
    assert str(found) == "No findings."


def test_the_quickstart_of_the_readme_has_no_findings(capsys):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    names: dict = {}
    exec(code, names)  # noqa: S102
    capsys.readouterr()
    batch = names["x"], names["y"]
    record = names["tagged"], names["opt_state"], batch, names["params"]
    found = doctor(*record, key=jax.random.key(3), learning_rate=0.05)
    assert found == [], str(found)


def test_before_the_first_step():
    tagged, params, _ = healthy()
    state = kfac.kfac(tagged.layers, 0.1).init(params)
    assert kinds(doctor(tagged, state)) == {"no_steps"}


def test_skipped_batches():
    """One of five; then none of them is looked at but counted."""
    tagged, params, state = healthy()
    sick = clocked(state, {"skipped": 1}.items())
    (finding,) = doctor(tagged, sick)
    assert finding.kind == "skipped_batches"
    assert finding.severity == "error"
    assert finding.numbers["share"] == pytest.approx(0.2)
    rare = clocked(state, {"skipped": 1, "count": 200}.items(), last_refresh=200)
    rare = clocked(rare, last_inverse=200)
    assert doctor(tagged, rare) == []
    del params


def test_steps_taken_back():
    """An adaptive damping that starts far too small, with far too long steps."""
    options = {"learning_rate": 30.0, "kl_clip": None, "steps": 6}
    found = {}
    for first in (1e-6, 1e4):
        rule = kfac.damping.adaptive(first)
        tagged, _, state = run(damping=rule, **options)
        found[first] = doctor(tagged, state)
        assert "skipped_batches" not in kinds(found[first])
    assert "steps_taken_back" in kinds(found[1e-6])
    assert "steps_taken_back" not in kinds(found[1e4])


def test_trust_region_saturated():
    """A learning rate a thousand times too large; "always" needs a history."""
    tagged, _, state = run(learning_rate=50.0)
    (finding,) = doctor(tagged, state)
    assert finding.kind == "trust_region_saturated"
    assert finding.severity == "notice"
    assert finding.numbers["trust"] == pytest.approx(float(state.trust))
    past = [report(state)] * 2
    (finding,) = doctor(tagged, state, history=past)
    assert finding.severity == "warning"
    assert finding.numbers["observations"] == 3
    slack = [[{**r, "trust": 1.0} for r in report(state)]] * 2
    assert doctor(tagged, state, history=slack) == []


def test_failed_inversions():
    tagged, _, state = healthy()
    found = doctor(tagged, clocked(state, failures=2))
    assert [f.kind for f in found] == ["failed_inversions"] * 2
    assert {f.layer for f in found} == {"hidden", "out"}
    assert {f.severity for f in found} == {"warning"}
    found = doctor(tagged, clocked(state, failures=2, inversions=0))
    assert {f.severity for f in found} == {"error"}


def test_an_old_inverse():
    """Forty refreshes in forty steps, inverted at the first only, and twice."""
    tagged, _, state = run(steps=40, inverse_interval=100)
    found = doctor(tagged, state)
    assert kinds(found) == {"old_inverse"}
    assert found[0].numbers["refreshes_between"] == pytest.approx(39)
    assert doctor(tagged, clocked(state, last_inverse=30)) == []


def test_layers_without_statistics():
    tagged, _, state = healthy()
    never = clocked(state, last_refresh=0, last_inverse=0, refreshes=0, weight=0)
    found = doctor(tagged, never)
    assert [f.kind for f in found] == ["never_refreshed"] * 2


def test_stale_factors_and_forgotten_refreshes():
    tagged, _, state = healthy()
    stale = clocked(state, interval=20, diff=0.8)
    assert kinds(doctor(tagged, stale)) == {"stale_factors"}
    assert doctor(tagged, clocked(state, interval=20, diff=0.2)) == []
    assert doctor(tagged, clocked(state, interval=2, diff=0.8)) == []
    late = clocked(state, {"count": 20}.items(), due=True)
    assert "refresh_forgotten" in kinds(doctor(tagged, late))
    assert "refresh_forgotten" not in kinds(doctor(tagged, clocked(late, interval=9)))


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_damping_against_eigenvalues(inverse):
    """In float32; of 4 examples, factors have eigenvalues of zero."""
    record = run(data(4, np.float32), parameters(np.float32), inverse=inverse)
    tagged, _, state = record
    assert doctor(tagged, state) == []
    seen = {}
    for value in (1e-14, 1e-8, 1e6):
        sick = clocked(state, {"damping": value}.items(), inverse_damping=value)
        seen[value] = kinds(doctor(tagged, sick))
    assert "damping_too_small" in seen[1e-8]
    assert {"damping_below_rounding", "damping_too_small"} <= seen[1e-14]
    assert seen[1e6] == {"damping_too_large"}
    assert "damping_below_rounding" not in kinds(doctor(*in_float64(tagged, state)))


def in_float64(tagged, state):
    """The same factors, with a damping that only the better precision resolves."""
    factors = jax.tree.map(lambda x: x.astype(np.float64), state.kfac.factors)
    state = clocked(state, {"damping": 1e-8}.items(), inverse_damping=1e-8)
    return tagged, state._replace(kfac=state.kfac._replace(factors=factors))


def test_a_small_damping_of_good_factors_is_none_too_small():
    """Isotropic factors need no damping: the criterion is theirs, not a number."""
    tagged, _, state = healthy()
    a, g = ({"hidden": n, "out": m} for n, m in ((7, 9), (8, 3)))
    factors = {
        k: kfac.KroneckerStatistics(jnp.eye(a[k]), jnp.eye(g[k]))
        for k in ("hidden", "out")
    }
    state = clocked(state, inverse_damping=1e-10)
    state = state._replace(kfac=state.kfac._replace(factors=factors))
    assert doctor(tagged, state) == []


def test_constant_inputs():
    x, y = data()
    tagged, _, state = run((jnp.ones_like(x), y))
    found = doctor(tagged, state)
    assert {"constant_inputs"} == kinds(found)
    assert {f.layer for f in found} == {"hidden", "out"}
    assert found[0].numbers["effective_rank"] == pytest.approx(1, abs=1e-9)
    # A mean of three deviations is none to complain of.
    tagged, _, state = run((3 + x, y))
    assert "constant_inputs" not in kinds(doctor(tagged, state))


def test_dead_units_and_dead_inputs():
    params = parameters()
    for dead, wanted in ((4, True), (1, False)):
        bias = jnp.where(jnp.arange(8) < dead, -100.0, 0.0)
        sick = {**params, "hidden": {**params["hidden"], "b": bias}}
        tagged, _, state = run(params=sick)
        found = {(f.kind, f.layer): f for f in doctor(tagged, state)}
        keys = {("dead_units", "hidden"), ("dead_inputs", "out")}
        assert set(found) == (keys if wanted else set())
        for finding in found.values():
            assert finding.numbers["share"] == pytest.approx(0.5)


def test_no_gradient():
    """Nothing reaches what is above a layer of zeros; and all is well without them."""
    params = parameters()
    params["out"]["w"] = jnp.zeros_like(params["out"]["w"])
    tagged, _, state = run(params=params, learning_rate=0.0)
    (finding,) = doctor(tagged, state)
    assert finding.kind == "no_gradient"
    assert finding.layer == "hidden"


def test_diagonal_fallback():
    def loss(p, x, y):
        return mean_loss(p, x + 1e-3 * jnp.sin(p["odd"]).sum(), y)

    params = {**parameters(), "odd": jnp.ones(20)}
    tagged, _, state = run(params=params, loss=loss)
    (finding,) = doctor(tagged, state)
    assert finding.kind == "diagonal_fallback"
    assert finding.numbers["share"] == pytest.approx(20 / (20 + 7 * 8 + 9 * 3))
    few = {**params, "odd": jnp.ones(2)}
    assert doctor(kfac.tag(loss, few, *data()), healthy()[2]) == []


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
