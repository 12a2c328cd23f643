"""Adaptive damping against a transcription in plain Python, step by step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import batches_of, cases, close, identical, kfac_state, train_step
from tests.parallel import DEVICES

STEPS = 8
RULE = {"initial": 0.5, "gain": 0.7, "minimum": 0.05, "maximum": 20.0, "retreat": None}
# A first damping with which steps go far too far.
TOO_SMALL = {"initial": 1e-5, "gain": 0.7, "minimum": 1e-6, "maximum": 20.0}


def dot(a, b):
    """Inner product of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.vdot(x, y)) for x, y in pairs)


def transcribed(
    tagged, make, params, batches, rule, sign=-1, lag=1, applied=-1.0, held=True
):
    """The rule in plain Python around an optimiser that is told its damping.

    Args:
        tagged: The tagged loss.
        make: Damping to optimiser; the state has the same structure for all.
        params: Where it starts.
        batches: One per step.
        rule: The arguments of ``adaptive``.
        sign: Of a slope downhill.
        lag: Divides the gain.
        applied: What an update is multiplied by before it is added.
        held: Whether inverses hold the damping.

    Returns:
        Parameters, dampings and numbers of steps taken back, after every step.
    """
    damping, step, slope, scale, back = rule["initial"], None, 0.0, 0.0, 0
    retreat = rule.get("retreat", 10.0) if sign < 0 else None
    state, found = make(damping).init(params), []
    for batch in batches:
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        end = dot(step, grads) if step is not None else 0.0
        if slope and retreat and end > scale:
            damping *= min(max(end / scale, retreat), retreat**2)
            damping = min(damping, rule["maximum"])
            step = jax.tree.map(lambda u: -u, step)
            slope, back, state = 0.0, back + 1, forgotten(state, held)
        else:
            if slope:
                r = end / slope if slope * sign > 0 else -np.inf
                r = min(max(r, -5.0), 1.0)
                damping *= np.exp(-rule["gain"] * r / lag)
                damping = min(max(damping, rule["minimum"]), rule["maximum"])
            tx = make(damping)
            step, state = tx.update(grads, state, params, statistics=statistics)
            slope = dot(step, grads)
            scale = max(abs(slope), 0.9 * scale)
        params = jax.tree.map(lambda p, u: p + applied * u, params, step)
        found.append((params, damping, back))
    return found


def forgotten(state, held):
    """The state without velocity, and without inverses that hold the damping."""
    velocity = [
        jax.tree.map(jnp.zeros_like, x) if isinstance(x, optax.TraceState) else x
        for x in state.tail
    ]
    state = state._replace(tail=tuple(velocity))
    if not held:
        return state
    clock = state.kfac.clock
    clock = clock._replace(last_inverse=jnp.zeros_like(clock.last_inverse))
    return state._replace(kfac=state.kfac._replace(clock=clock))


def check(tagged, tx, params, batches, wanted, applied=None):
    """The library's run has the same parameters and dampings."""
    step = jax.jit(train_step(tagged, tx))
    state = tx.init(params)
    for batch, (expected, damping, retreats) in zip(batches, wanted, strict=True):
        params, state, _ = step(params, state, *batch)
        adapted = next(s for s in [state, *state] if isinstance(s, kfac.AdaptedState))
        np.testing.assert_allclose(adapted.damping, damping, rtol=2e-5)
        assert adapted.retreats == retreats == kfac_state(state).skipped
        if not (retreats and adapted.slope == 0):
            np.testing.assert_allclose(kfac_state(state).damping, damping, rtol=2e-5)
        close(params, expected, 1e-4)
    assert step._cache_size() == 1
    return state


@pytest.fixture(scope="module")
def problem():
    """``(tagged, params, batches)`` of a small network."""
    model = models.BY_NAME["mlp"]
    return model.tag(4), model.params(), batches_of(model, STEPS)


PLAIN = {"kl_clip": None, "momentum": None}
RUNS = [("cholesky", 1), ("cholesky", 3), ("eigh", 3)]
RUNS = [(*run, options) for run in RUNS for options in ({}, PLAIN)]
FAST = [("cholesky", 1, PLAIN), ("cholesky", 3, {}), ("eigh", 3, {})]


@pytest.mark.parametrize("inverse, interval, options", cases(RUNS, FAST), ids=str)
def test_the_rule_is_its_transcription(problem, inverse, interval, options):
    tagged, params, batches = problem
    options = {"inverse": inverse, "inverse_interval": interval, **options}

    def make(damping):
        return kfac.kfac(tagged.layers, 0.3, damping=damping, **options)

    lag = interval if inverse == "cholesky" else 1
    wanted = transcribed(tagged, make, params, batches, RULE, lag=lag, applied=1.0)
    assert len({damping for _, damping, _ in wanted}) > STEPS // 2
    check(tagged, make(kfac.damping.adaptive(**RULE)), params, batches, wanted)


@pytest.mark.parametrize(
    "inverse, interval, rate, first",
    [("cholesky", 1, 1.0, 1e-5), ("cholesky", 4, 1.0, 1e-2), ("eigh", 3, 0.5, 1e-5)],
)
def test_steps_that_go_too_far_are_taken_back(problem, inverse, interval, rate, first):
    """As in the transcription; the next step is made with the new damping."""
    tagged, params, batches = problem
    # Every third batch has inputs five times as large: a model of the others is wrong.
    batches = [(x * (5 if i % 3 == 2 else 1), y) for i, (x, y) in enumerate(batches)]
    batches = batches[:5]  # later ones only magnify rounding
    rule = TOO_SMALL | {"initial": first}
    options: dict[str, Any] = {"inverse": inverse, "inverse_interval": interval}

    def make(damping):
        return kfac.kfac(tagged.layers, rate, damping=damping, kl_clip=None, **options)

    held = inverse == "cholesky"
    rest = {"lag": interval if held else 1, "applied": 1.0, "held": held}
    wanted = transcribed(tagged, make, params, batches, rule, **rest)
    retreats = [0, *(number for *_, number in wanted)]
    assert 1 <= retreats[-1] <= len(batches) // 2
    tx = make(kfac.damping.adaptive(**rule))
    check(tagged, tx, params, batches, wanted)
    step, state = jax.jit(train_step(tagged, tx)), tx.init(params)
    before = params
    for i, batch in enumerate(batches):
        older, before = before, params
        params, state, _ = step(params, state, *batch)
        if retreats[i + 1] > retreats[i]:
            close(params, older, 1e-6)  # where the step began that is taken back
            assert kfac_state(state).count == kfac_state(state).clock.refreshes[0]
        elif retreats[i] > retreats[max(i - 1, 0)] and held:
            inverted = kfac_state(state).clock.inverse_damping
            np.testing.assert_allclose(inverted, state.damping, rtol=1e-6)


def test_preconditioner_alone(problem):
    """What comes behind ``scale_by_kfac`` does not matter: its slope is uphill."""
    tagged, params, batches = problem

    def make(damping):
        return kfac.scale_by_kfac(tagged.layers, damping=damping)

    wanted = transcribed(tagged, make, params, batches, RULE, sign=1, applied=-0.3)
    tx = optax.chain(make(kfac.damping.adaptive(**RULE)), optax.scale(-0.3))
    check(tagged, tx, params, batches, wanted)


def test_a_rejected_batch_changes_nothing(problem):
    tagged, params, batches = problem
    tx = kfac.kfac(tagged.layers, 0.3, damping=kfac.damping.adaptive(**RULE))
    step = jax.jit(train_step(tagged, tx))
    state = tx.init(params)
    for batch in batches[:3]:
        params, state, _ = step(params, state, *batch)
    x, y = batches[3]
    after, rejected, _ = step(params, state, jnp.full_like(x, jnp.nan), y)
    close(after, params, 0)
    assert kfac_state(rejected).skipped == 1
    for name in ("damping", "step", "slope", "scale", "agreement", "retreats"):
        close(getattr(rejected, name), getattr(state, name), 0)


@pytest.mark.parametrize("rate", [0.3, "auto"])
@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
def test_refused_batches_forget_velocity_and_inverses(problem, rate, inverse):
    """``reject=True``: the state stays, but for velocity and when to invert."""
    tagged, params, batches = problem
    tx = kfac.kfac(tagged.layers, rate, inverse=inverse, inverse_interval=9)
    state, updates = tx.init(params), None
    for i, batch in enumerate(batches[:3]):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        model = kfac.quadratic_model(tagged, params, *batch)
        rest = {"statistics": statistics, "model": model, "reject": jnp.array(i == 2)}
        before = state
        updates, state = tx.update(grads, state, params, **rest)
        params = optax.apply_updates(params, updates)
    velocity = state.velocity if rate == "auto" else state.tail[1]
    assert all(not np.any(x) for x in jax.tree.leaves((updates, velocity)))
    assert np.any(
        jax.tree.leaves(before.velocity if rate == "auto" else before.tail)[0]
    )
    new, old = kfac_state(state), kfac_state(before)
    assert new.skipped == old.skipped + 1
    clock = old.clock
    if inverse == "cholesky":
        clock = clock._replace(last_inverse=jnp.zeros_like(clock.last_inverse))
    identical(new, old._replace(skipped=new.skipped, clock=clock))


def test_agreement_is_that_of_a_quadratic():
    """On ``½ h w²`` a step ``−η u`` leaves ``r = 1 − η h / (h + λ)`` behind."""
    h = 3.0

    def loss(params, x):
        return 0.5 * jnp.mean(kfac.normal(x * params["w"], 1.0) ** 2)

    params, x = {"w": jnp.array([[2.0]])}, jnp.full((4, 1), np.sqrt(h))
    tagged = kfac.tag(loss, params, x, fisher="exact")
    rule = kfac.damping.adaptive(initial=0.5, gain=1e-9)
    tx = kfac.kfac(
        tagged.layers, 0.4, damping=rule, momentum=None, kl_clip=None, inverse="eigh"
    )
    state = tx.init(params)
    for _ in range(2):
        _, grads, statistics = tagged.value_and_grad(params, x, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.agreement, 1 - 0.4 * h / (h + 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    "agreement, factor",
    [(1.0, np.exp(-0.5)), (0.0, 1.0), (-1.0, np.exp(0.5)), (-99.0, np.exp(2.5)),
     (7.0, np.exp(-0.5)), (-np.inf, np.exp(2.5)), (np.nan, 1.0)],
)  # fmt: skip
def test_adjustment(agreement, factor):
    rule = kfac.damping.adaptive(initial=1.0, gain=0.5)
    new = rule.adjust(jnp.float32(2.0), jnp.float32(agreement))
    np.testing.assert_allclose(new, 2 * factor, rtol=1e-6)
    np.testing.assert_allclose(
        rule.adjust(jnp.float32(2.0), jnp.float32(agreement), 4),
        2 * factor**0.25,
        rtol=1e-6,
    )


def test_automatic_steps_take_the_rule(problem):
    """The quadratic model's damping is the rule's."""
    tagged, params, batches = problem
    tx = kfac.kfac(tagged.layers, "auto", damping=kfac.damping.adaptive(**RULE))
    state = tx.init(params)
    for batch in batches[:3]:
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        model = kfac.quadratic_model(tagged, params, *batch)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, model=model
        )
        params = optax.apply_updates(params, updates)
        assert state.inner.damping == state.damping
    assert state.damping != RULE["initial"]


def test_devices_agree(problem):
    """Under ``shard_map`` every device has the damping of the whole batch."""
    model = models.BY_NAME["mlp"]
    batches = [model.batch(8, seed=i) for i in range(3)]
    rule = kfac.damping.adaptive(**RULE | {"retreat": 2.0})
    found = []
    for axis in (None, "batch"):
        tagged = model.tag(8 if axis is None else 1)
        tx = kfac.kfac(tagged.layers, 0.3, damping=rule, axis_name=axis)

        def step(params, state, x, y, tagged=tagged, tx=tx, axis=axis):
            _, grads, statistics = tagged.value_and_grad(params, x, y, opt_state=state)
            if axis:
                grads = jax.tree.map(lambda g: g / DEVICES, grads)
            updates, state = tx.update(grads, state, params, statistics=statistics)
            return optax.apply_updates(params, updates), state

        if axis:
            kind = (AxisType.Auto,)
            mesh = jax.make_mesh((DEVICES,), (axis,), axis_types=kind)
            whole, split = (
                PartitionSpec(),
                PartitionSpec(axis),
            )
            specs = {"in_specs": (whole, whole, split, split), "out_specs": whole}
            step = jax.shard_map(step, mesh=mesh, **specs)
        params, run = model.params(), jax.jit(step)
        state = tx.init(params)
        for batch in batches:
            params, state = run(params, state, *batch)
        found.append((params, state.damping, state.agreement, state.retreats))
    close(found[1], found[0], 1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial": 0.0},
        {"initial": 1e9},
        {"gain": 0.0},
        {"gain": 3.0},
        {"retreat": 1.0},
        {"retreat": 1e5},
        {"minimum": 2.0},
    ],
    ids=str,
)
def test_wrong_rules(wrong):
    with pytest.raises(ValueError, match="damping wants|gain must|retreat must"):
        kfac.damping.adaptive(**wrong)
