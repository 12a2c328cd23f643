"""``doctor`` on the damping: beside the eigenvalues, and of rules that adapt it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.diagnostics.doctor.doctor import doctor
from kfac_jax_lite.diagnostics.report import report
from tests.patients import (
    clocked,
    data,
    healthy,
    kinds,
    mean_loss,
    parameters,
    run,
)


def adapted_run(steps=10, **options):
    """Reports and the state of a run whose damping is adapted."""
    rule = kfac.damping.adaptive(**options)
    batch, params = data(), parameters()
    tagged = kfac.tag(mean_loss, params, *batch)
    tx = kfac.kfac(tagged.layers, 0.05, damping=rule, kl_clip=None, momentum=None)

    @jax.jit
    def step(params, state):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        history.append(report(state))
    return tagged, state, history


def test_an_adaptive_damping_at_its_bound():
    """Steps of a twentieth of Newton's end too short however small the damping is."""
    tagged, state, history = adapted_run(minimum=0.5)
    (finding,) = doctor(tagged, state, history=history)
    assert finding.kind == "damping_at_bound"
    assert "lower" in finding.message
    assert finding.numbers["damping"] == pytest.approx(0.5)
    assert finding.numbers["agreement"] == pytest.approx(
        np.median([past[0]["agreement"] for past in history[-3:]])
    )
    assert doctor(tagged, state) == []  # nothing but a number
    # The twin is on its way; or the last number stands at two steps only.
    tagged, moving, history = adapted_run()
    assert doctor(tagged, moving, history=history) == []
    tagged, two, history = adapted_run(3, initial=0.6, minimum=0.4)
    assert [past[0]["damping"] for past in history].count(np.float32(0.4)) == 2
    assert doctor(tagged, two, history=history) == []


def test_a_bound_seen_in_one_state():
    """At a default bound; in an inverse that has been there for some steps."""
    tagged, state, _ = adapted_run()
    for bound, word in ((1e-8, "lower"), (1e8, "upper")):
        sign = 0.9 if word == "lower" else -0.9
        inner = clocked(state.inner, {"damping": bound}.items())
        held = state._replace(inner=inner, agreement=jnp.float32(sign))
        found = {f.kind: f for f in doctor(tagged, held)}
        assert word in found["damping_at_bound"].message
    value = float(state.damping)
    old = clocked(state.inner, inverse_damping=value, last_inverse=7)
    assert "damping_at_bound" in kinds(doctor(tagged, state._replace(inner=old)))
    new = clocked(state.inner, inverse_damping=1.1 * value, last_inverse=7)
    assert "damping_at_bound" not in kinds(doctor(tagged, state._replace(inner=new)))


def judged_run(steps, **options):
    """Reports and states of a run with a Levenberg-Marquardt damping."""
    rule = kfac.damping.levenberg_marquardt(1.0, 0.8, 2, **options)
    batch, params = data(), parameters()
    tagged = kfac.tag(mean_loss, params, *batch)
    tx = kfac.kfac(tagged.layers, "auto", damping=rule)

    @jax.jit
    def step(params, state):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        model = kfac.quadratic_model(tagged, params, *batch)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, model=model
        )
        return optax.apply_updates(params, updates), state

    state, history, states = tx.init(params), [], []
    for _ in range(steps):
        params, state = step(params, state)
        states.append(state)
        history.append(report(state))
    return tagged, states, history


def test_a_judged_damping_at_its_bound():
    """Good steps lower it every second step, ``1, 0.64, 0.41``, and no further."""
    tagged, states, history = judged_run(20, minimum=0.4)
    dampings = [float(state.damping) for state in states]
    assert dampings == pytest.approx([0.64] * 2 + [0.4096] * 2 + [0.4] * 16)
    (finding,) = doctor(tagged, states[-1], history=history)
    assert (finding.kind, finding.severity) == ("damping_at_bound", "notice")
    assert "lower" in finding.message and "levenberg_marquardt" in finding.advice
    assert finding.numbers["damping"] == pytest.approx(0.4)
    assert finding.numbers["ratio"] == float(states[-1].ratio) > 0.75
    assert doctor(tagged, states[-1]) == []  # nothing but a number
    # Not for long enough: changes are in force from steps 2, 4 and 6.
    seen = [
        bool(doctor(tagged, state, history=history[:i]))
        for i, state in enumerate(states)
    ]
    assert seen == [False] * (6 + 3 * 3 - 1) + [True] * 6
    # The model predicts half of what happened: the rule leaves the damping where it is.
    content = states[-1]._replace(ratio=jnp.float32(0.5))
    assert doctor(tagged, content, history=history) == []
    # The last step has lowered it.
    moving = states[-1]._replace(damping=jnp.float32(0.3))
    assert doctor(tagged, moving, history=history) == []
    tagged, states, history = judged_run(10)
    assert "damping_at_bound" not in kinds(doctor(tagged, states[-1], history=history))


def test_a_default_bound_of_a_judged_damping():
    """Seen in one state, if the last ratio asks for more of the same."""
    tagged, states, _ = judged_run(4)
    inner = states[-1].kfac
    for bound, ratio, word in (
        (1e-8, 0.9, "lower"),
        (1e8, 0.1, "upper"),
        (1e-8, 0.1, None),
        (1e8, 0.9, None),
        (1e8, 0.5, None),
        (1e8, jnp.nan, None),
    ):
        value = jnp.float32(bound)
        held = states[-1]._replace(
            kfac=inner._replace(damping=value), damping=value, ratio=jnp.float32(ratio)
        )
        found = {f.kind: f for f in doctor(tagged, held)}
        assert ("damping_at_bound" in found) == (word is not None)
        if word:
            finding = found["damping_at_bound"]
            assert word in finding.message
            assert finding.severity == ("notice" if word == "lower" else "warning")


def test_advice_for_a_small_damping_that_a_rule_has_chosen():
    """Which of its numbers to raise, and to a thousandth of the mean eigenvalue."""
    batch = data(4, np.float32)
    x = jnp.concatenate([batch[0], jnp.ones((4, 1))], 1)

    def advice(tagged, state):
        found = doctor(tagged, state)
        return {f.layer: f.advice for f in found if f.kind == "damping_too_small"}

    tagged, _, state = run(batch, parameters(np.float32), steps=1)
    fixed = clocked(state, {"damping": 1e-8}.items(), inverse_damping=1e-8)
    assert "kfac.damping.adaptive()" in advice(tagged, fixed)["hidden"]
    factors = state.kfac.factors["hidden"]
    np.testing.assert_allclose(factors.a, x.T @ x / 4, rtol=1e-5)
    mean = float(jnp.trace(x.T @ x / 4) / 7 * jnp.trace(factors.g) / 8)
    outer = kfac.kfac(tagged.layers, 0.1, damping=kfac.damping.adaptive())
    outer = outer.init(parameters(np.float32))._replace(inner=fixed)
    for agreement, word in ((0.9, "minimum"), (jnp.nan, "minimum"), (-2.0, "initial")):
        sick = outer._replace(agreement=jnp.float32(agreement))
        text = advice(tagged, sick)["hidden"]
        assert text.startswith(f"A larger {word} of kfac.damping.adaptive(), about ")
        assert f"about {1e-3 * mean:.1g}:" in text
        better = clocked(fixed, {"damping": 1e-3 * mean}.items())
        better = clocked(better, inverse_damping=1e-3 * mean)
        assert "hidden" not in advice(tagged, sick._replace(inner=better))
    rule = kfac.damping.levenberg_marquardt()
    guided = kfac.kfac(tagged.layers, "auto", damping=rule)
    guided = guided.init(parameters(np.float32))._replace(kfac=fixed.kfac)
    for ratio, word in ((0.9, "minimum"), (0.1, "initial")):
        text = advice(tagged, guided._replace(ratio=jnp.float32(ratio)))["hidden"]
        assert text.startswith(f"A larger {word} of kfac.damping.levenberg_marquardt()")
    # Without a rule, the quadratic model alone leaves the choice open.
    assert "kfac.damping.adaptive()" in advice(tagged, guided)["hidden"]


def test_an_adaptive_damping_chooses_large_values():
    tagged, state, _ = adapted_run(1, initial=1e6)
    assert doctor(tagged, state) == []
    tagged, _, fixed = run(damping=1e6)
    assert kinds(doctor(tagged, fixed)) == {"damping_too_large"}


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
