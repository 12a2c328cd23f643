"""``tag(loss, …, curvature=f)``: gradient of the loss, everything else of ``f``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import kfac_jax_lite as kfac

KEY = jax.random.key
PARAMS = {
    "w": jax.random.normal(KEY(0), (3, 4)),
    "b": jnp.ones(4) / 5,
    "v": jax.random.normal(KEY(1), (4,)),
}
X = jax.random.normal(KEY(2), (8, 3))
LOCAL = jax.random.normal(KEY(3), (8,))


def log_psi(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


@jax.custom_jvp
def energy(p, x):
    """Its derivative is a rule of its own: a covariance with local energies."""
    return LOCAL.mean()


@energy.defjvp
def _(primals, tangents):
    p, x = primals
    _, moved = jax.jvp(lambda p: log_psi(p, x), (p,), (tangents[0],))
    local = LOCAL[: len(x)]
    return energy(p, x), 2 * jnp.mean((local - local.mean()) * moved)


def mark(p, x):
    return kfac.normal(log_psi(p, x))


def close(seen, wanted):
    pairs = zip(jax.tree.leaves(seen), jax.tree.leaves(wanted), strict=True)
    for one, two in pairs:
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def test_without_it_the_note_says_why():
    tagged = kfac.tag(energy, PARAMS, X)
    assert {t.kind for t in tagged.layers} == {"diagonal"}
    assert all("gradient of your own" in t.note for t in tagged.layers)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_statistics_are_those_of_the_function(fisher):
    def surrogate(p, x):
        return 0.5 * (mark(p, x) ** 2).mean()

    curvature = surrogate if fisher == "empirical" else mark
    tagged = kfac.tag(energy, PARAMS, X, fisher=fisher, curvature=curvature)
    plain = kfac.tag(surrogate, PARAMS, X, fisher=fisher)
    assert tagged.layers == plain.layers
    tx = kfac.kfac(tagged.layers, 0.1)
    state = tx.init(PARAMS)

    @jax.jit
    def run(p, s, x, key):
        value, grads, seen = tagged.value_and_grad(p, x, opt_state=s, key=key)
        deferred = tagged.value_and_grad(p, x, opt_state=s, key=key, deferred=True)
        step = [tx.update(grads, s, p, statistics=d) for d in (seen, deferred[2])]
        return value, grads, seen, step

    value, grads, seen, (one, two) = run(PARAMS, state, X, KEY(4))
    close((value, grads), jax.value_and_grad(energy)(PARAMS, X))
    close(seen, plain.value_and_grad(PARAMS, X, key=KEY(4))[2])
    close(one, two)


def test_nothing_is_evaluated_where_nothing_is_due():
    """Found in the program: the only products of its size stand in a conditional."""
    calls = []

    def counted(p, x):
        jax.debug.callback(lambda: calls.append(1))
        return mark(p, x)

    tagged = kfac.tag(energy, PARAMS, X, fisher="exact", curvature=counted)
    tx = kfac.kfac(tagged.layers, 0.1, interval=kfac.intervals.every(3))

    @jax.jit
    def step(p, s):
        _, grads, seen = tagged.value_and_grad(p, X, opt_state=s)
        return tx.update(grads, s, p, statistics=seen)[1]

    state = tx.init(PARAMS)
    for _ in range(6):
        state = step(PARAMS, state)
    jax.effects_barrier()
    assert len(calls) == 2  # at steps 1 and 4


def test_masks_count_rows_of_the_function():
    mask = jnp.array([1, 0, 1, 1, 0, 1, 1, 1], bool)

    def masked(p, x, mask):
        return kfac.normal(log_psi(p, x), mask=mask)

    def surrogate(p, x, mask):
        terms = jnp.where(mask, masked(p, x, mask) ** 2, 0)
        return 0.5 * terms.sum() / mask.sum()

    loss = lambda p, x, mask: energy(p, x)  # noqa: E731
    args = X, mask
    tagged = kfac.tag(loss, PARAMS, *args, fisher="exact", curvature=masked)
    plain = kfac.tag(surrogate, PARAMS, *args, fisher="exact")
    close(
        tagged.value_and_grad(PARAMS, *args)[2], plain.value_and_grad(PARAMS, *args)[2]
    )


def test_the_quadratic_model_has_the_loss_of_one_and_the_matrix_of_the_other():
    loss = lambda p, x: jnp.sin(log_psi(p, x)).mean()  # noqa: E731
    tagged = kfac.tag(loss, PARAMS, X, fisher="exact", curvature=mark)
    model = kfac.quadratic_model(tagged, PARAMS, X)
    v = jax.tree.map(jnp.cos, PARAMS)
    value, (slope,), ((square,),) = model.products([v])
    wanted, moved = jax.jvp(lambda p: loss(p, X), (PARAMS,), (v,))
    _, rows = jax.jvp(lambda p: log_psi(p, X), (PARAMS,), (v,))
    close((value, slope, square), (wanted, moved, (rows**2).mean()))


@pytest.mark.parametrize("checked", [True, False])
def test_on_devices(checked):
    """Statistics add up over devices as those of a loss do."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = lambda p, x: jnp.sin(log_psi(p, x)).mean()  # noqa: E731
    tagged = kfac.tag(loss, PARAMS, X[:4], fisher="exact", curvature=mark)
    tx = kfac.scale_by_kfac(tagged.layers, axis_name="i")

    def one(p, s, x):
        _, grads, seen = tagged.value_and_grad(p, x, opt_state=s)
        grads = jax.tree.map(lambda g: g / 2, grads) if checked else grads
        grads = grads if checked else jax.lax.pmean(grads, "i")
        return tx.update(grads, s, p, statistics=seen)[1].factors

    rows, whole = PartitionSpec("i"), PartitionSpec()
    run = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(whole, whole, rows),
        out_specs=whole,
        check_vma=checked,
    )
    state = tx.init(PARAMS)
    seen = jax.jit(run)(PARAMS, state, X)
    alone = kfac.tag(loss, PARAMS, X, fisher="exact", curvature=mark)
    wanted = alone.value_and_grad(PARAMS, X)[2]
    for name, factors in seen.items():
        np.testing.assert_allclose(factors.a, wanted[name].a, rtol=1e-6)
        np.testing.assert_allclose(factors.g, wanted[name].g, rtol=1e-6)
