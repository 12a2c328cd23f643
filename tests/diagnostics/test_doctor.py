"""``doctor``: every complaint is seen where it was made, and not in a healthy twin."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.diagnostics.doctor.doctor import doctor
from kfac_jax_lite.diagnostics.doctor.state import trust_region
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

README = pathlib.Path(__file__).parents[2] / "README.md"


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
    tagged, _, early = run(learning_rate=50.0)
    assert doctor(tagged, early) == []  # at first, that is what it is for
    state = clocked(early, {"count": 60}.items(), last_refresh=60, last_inverse=60)
    (finding,) = doctor(tagged, state)
    assert finding.kind == "trust_region_saturated"
    assert finding.severity == "notice"
    assert finding.numbers["trust"] == pytest.approx(float(state.trust))
    past = [report(state)] * 2
    finding, other = doctor(tagged, state, history=past)
    assert (finding.severity, other.kind) == ("warning", "learning_rate_without_effect")
    assert finding.numbers["observations"] == 3
    assert "larger damping" in finding.advice
    adapted = [{**past[0][0], "retreats": 0}]
    *_, finding = trust_region(adapted[0], [adapted] * 2)
    assert finding.advice.startswith("kl_clip=None")
    slack = [[{**r, "trust": 1.0} for r in report(state)]] * 2
    assert doctor(tagged, state, history=slack) == []


def test_learning_rate_without_effect():
    """The trust region always active: a little suffices, once without it does not."""
    (record, _) = report(healthy()[2])
    reports = [[{**record, "trust": trust}] for trust in (0.5, 0.9)]
    (finding,) = trust_region({**record, "trust": 0.7}, reports)
    assert (finding.kind, finding.severity) == (
        "learning_rate_without_effect", "notice"
    )  # fmt: skip
    numbers = {"least": 0.5, "largest": 0.9, "observations": 3}
    assert finding.numbers == numbers
    assert list(trust_region({**record, "trust": 1.0}, reports)) == []
    assert list(trust_region({**record, "trust": 0.7}, reports[:1])) == []


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


def test_stale_factors():
    """Kept for long, changed by much, and the average has been left behind."""
    tagged, _, state = run(interval=kfac.intervals.staleness(), steps=8)

    def patient(distance, **fields):
        """The last fresh statistics, relative to the average, at a distance."""
        inner = state.kfac
        kept = {
            name: (
                jax.tree.map(lambda x: x / (1 + distance), x),
                *inner.previous[name][1:],
            )
            for name, x in inner.factors.items()
        }
        moved = state._replace(kfac=inner._replace(previous=kept))
        return doctor(tagged, clocked(moved, **{"interval": 20, "diff": 0.8, **fields}))

    found = patient(2.0)
    assert kinds(found) == {"stale_factors"}
    assert {f.layer for f in found} == {"hidden", "out"}
    assert found[0].numbers["lag"] == pytest.approx(2.0)
    # Batches that differ by noise: √2 as far from each other as from their mean.
    assert patient(0.8 / 2**0.5) == []
    assert patient(2.0, diff=0.2) == []
    assert patient(2.0, interval=2) == []


def test_noise_of_batches_is_no_staleness():
    """Statistics of Gaussian noise around a constant mean, averaged as in a run."""
    rng = np.random.default_rng(0)
    tagged, _, state = run(interval=kfac.intervals.staleness(), steps=8)
    mean = {k: np.eye(len(x.a)) for k, x in state.kfac.factors.items()}
    fresh = [
        {k: x + 0.3 * rng.normal(size=x.shape) for k, x in mean.items()}
        for _ in range(40)
    ]
    average = {k: np.mean([x[k] for x in fresh], 0) for k in mean}
    factors, previous = dict(state.kfac.factors), dict(state.kfac.previous)
    for k in mean:
        factors[k] = factors[k]._replace(a=average[k], g=previous[k][0].g)
        previous[k] = (previous[k][0]._replace(a=fresh[-1][k]), *previous[k][1:])
    change = max(
        np.linalg.norm(fresh[-1][k] - fresh[-2][k]) / np.linalg.norm(fresh[-2][k])
        for k in mean
    )
    assert change > 0.5
    inner = state.kfac._replace(factors=factors, previous=previous)
    noisy = clocked(state._replace(kfac=inner), interval=20, diff=change)
    assert "stale_factors" not in kinds(doctor(tagged, noisy))


def test_forgotten_refreshes():
    tagged, _, state = healthy()
    late = clocked(state, {"count": 20}.items(), due=True)
    assert "refresh_forgotten" in kinds(doctor(tagged, late))
    assert "refresh_forgotten" not in kinds(doctor(tagged, clocked(late, interval=9)))


def drifting_run(rule, steps, change=0.0):
    """Reports and the state of a run without learning, on inputs that turn."""
    tagged, params = kfac.tag(mean_loss, parameters(), *data()), parameters()
    tx = kfac.kfac(tagged.layers, 0.0, damping=0.1, interval=rule)
    state, history = tx.init(params), []

    @jax.jit
    def step(state, scale):
        x, y = data()
        _, grads, statistics = tagged.value_and_grad(
            params, scale * x, y, opt_state=state
        )
        return tx.update(grads, state, params, statistics=statistics)[1]

    for number in range(steps):
        state = step(state, 1 + change * np.sin(number))
        history.append(report(state))
    return tagged, state, history


def test_an_interval_at_its_longest():
    """Still inputs and a cap of 3; the twins: no cap yet reached, and no cap at all."""
    first = drifting_run(kfac.intervals.adaptive(0.2, "elapsed", 3), 4, 0.05)
    capped = drifting_run(kfac.intervals.adaptive(0.2, "elapsed", 3), 40)
    tagged, state, history = capped
    changed = [[{**r, "diff": 0.1} for r in past] for past in history[:3]]
    found = doctor(tagged, state, history=changed + history[3:])
    assert kinds(found) == {"interval_at_longest"}
    assert {f.layer for f in found} == {"hidden", "out"}
    assert {f.severity for f in found} == {"notice"}
    assert found[0].numbers["interval"] == 3
    # Steps 1, 2, 4, 7, 10, …, 40: 15 refreshes, and the third made it 3 steps.
    assert found[0].numbers["refreshes"] == 15 - 3
    assert doctor(tagged, state) == []  # one state cannot tell
    alike = [[{**r, "diff": 0.1} for r in past] for past in history]
    assert "interval_at_longest" not in kinds(doctor(tagged, state, history=alike))
    free = drifting_run(kfac.intervals.adaptive(0.2, "elapsed"), 40)
    assert doctor(free[0], free[1], history=free[2]) == []
    every = drifting_run(kfac.intervals.every(3), 40)
    assert doctor(every[0], every[1], history=every[2]) == []
    assert doctor(first[0], first[1], history=first[2]) == []


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
    for dead, wanted in ((1, False), (4, True)):
        bias = jnp.where(jnp.arange(8) < dead, -100.0, 0.0)
        sick = {**params, "hidden": {**params["hidden"], "b": bias}}
        tagged, _, state = run(params=sick, steps=5)
        found = {(f.kind, f.layer): f for f in doctor(tagged, state)}
        keys = {("dead_units", "hidden"), ("dead_inputs", "out")}
        assert set(found) == (keys if wanted else set())
        for finding in found.values():
            assert finding.numbers["share"] == pytest.approx(0.5)
    tagged, _, state = run(params=sick, steps=4)
    assert doctor(tagged, state) == []  # too early to say "never"


def test_no_gradient():
    """Nothing reaches what is above a layer of zeros; and all is well without them."""
    params = parameters()
    params["out"]["w"] = jnp.zeros_like(params["out"]["w"])
    tagged, _, state = run(params=params, learning_rate=0.0)
    (finding,) = doctor(tagged, state)
    assert finding.kind == "no_gradient"
    assert finding.layer == "hidden"
    assert finding.numbers == {"steps": 4, "refreshes": 0}


def test_a_layer_long_without_gradient():
    """Due for longer than three intervals and ten steps, while the other is not."""
    tagged, _, state = healthy()
    late = clocked(state, {"count": 30}.items(), last_refresh=30, last_inverse=30)
    clock = late.kfac.clock

    def waiting(since):
        own = clock._replace(
            due=jnp.array([True, False]),
            last_refresh=clock.last_refresh.at[0].set(30 - since),
        )
        return late._replace(kfac=late.kfac._replace(clock=own))

    (finding,) = doctor(tagged, waiting(20))
    assert (finding.kind, finding.layer) == ("no_gradient", "hidden")
    assert finding.numbers["steps"] == 20
    assert doctor(tagged, waiting(13)) == []


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
