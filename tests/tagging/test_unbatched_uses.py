"""Uses of a layer before the examples appear count as if broadcast over them.

Oracle: the same loss written so that every use has the examples from the start; the
constants that automatic differentiation begins with (cotangent 1, unit tangents) come
in as arguments, one for each example. Its statistics are those of plain batched layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac

KEY = jax.random.key
WIDTH, ROWS = 5, 6
PARAMS = {
    "a": jax.random.normal(KEY(0), (2, WIDTH)),
    "b": 0.1 * jnp.arange(WIDTH, dtype=float),
    "c": jax.random.normal(KEY(1), (WIDTH, 3)) / 2,
    "e": jax.random.normal(KEY(2), (3, 1)),
}
X = jax.random.normal(KEY(3), (ROWS, 2))
ONES, UNITS = jnp.ones(ROWS), jnp.tile(jnp.eye(2), (ROWS, 1, 1))


def net(p, x):
    h = jnp.tanh(x @ p["a"] + p["b"])
    return (h**2 @ p["c"] @ p["e"])[0]


def second(p, z, one, v):
    """``vᵀ H v`` of the network, forward over reverse."""
    slope = jax.grad(lambda z: net(p, z) * one)
    return jax.jvp(slope, (z,), (v,))[1] @ v


def twice_forward(p, z, one, v):
    first = lambda z: jax.jvp(lambda y: net(p, y) * one, (z,), (v,))[1]  # noqa: E731
    return jax.jvp(first, (z,), (v,))[1]


def burgers(p, z, one, v):
    """``u_t + u u_x − ν u_xx`` with ``z = (x, t)``."""
    u, slopes = jax.value_and_grad(lambda y: net(p, y) * one)(z)
    return slopes[1] + u * slopes[0] - 0.1 * second(p, z, one, v)


def slope_only(p, z, one, v):
    return jax.grad(lambda y: net(p, y) * one)(z) @ v


RESIDUALS = {f.__name__: f for f in (second, twice_forward, burgers, slope_only)}


def residuals(kind, batched, jitted=False):
    """``(params, x, ones, units) -> [N]``, its constants the same for all or not."""
    one = RESIDUALS[kind]
    if jitted:
        one = jax.jit(one)

    def run(p, x, ones, units):
        if batched:
            each = lambda z, c, v: sum(one(p, z, c, v[i]) for i in range(2))  # noqa: E731
            return jax.vmap(each)(x, ones, units)
        fixed = lambda z: sum(one(p, z, 1.0, v) for v in jnp.eye(2))  # noqa: E731
        return jax.vmap(fixed)(x)

    return run


def tagged_loss(run, **options):
    def loss(p, x, ones, units):
        return 0.5 * (kfac.normal(run(p, x, ones, units)) ** 2).mean()

    return loss, kfac.tag(loss, PARAMS, X, ONES, UNITS, **options)


CASES = [
    ("second", "exact", {}),
    ("second", "empirical", {}),
    ("second", "mc", {}),
    ("twice_forward", "exact", {}),
    ("burgers", "exact", {"weight_sharing": "reduce"}),
    ("slope_only", "exact", {}),
]


@pytest.mark.parametrize(("kind", "fisher", "options"), CASES)
def test_as_if_broadcast(kind, fisher, options):
    seen = []
    for batched in (False, True):
        run = residuals(kind, batched, jitted=batched is False and fisher == "mc")
        loss, tagged = tagged_loss(run, fisher=fisher, **options)
        call = jax.jit(tagged.value_and_grad)
        value, grads, statistics = call(PARAMS, X, ONES, UNITS, key=KEY(7))
        plain = jax.value_and_grad(loss)(PARAMS, X, ONES, UNITS)
        for one, two in zip(jax.tree.leaves((value, grads)), jax.tree.leaves(plain)):  # noqa: B905
            np.testing.assert_allclose(one, two, atol=1e-10)
        kinds = {t.params: t.kind for t in tagged.layers}
        assert "diagonal" not in kinds.values(), tagged
        assert not [t.note for t in tagged.layers if "whole batch" in t.note]
        seen.append(statistics)
    assert seen[0].keys() == seen[1].keys()
    for name in seen[0]:
        for one, two in zip(seen[0][name], seen[1][name], strict=True):
            if one is not None:
                np.testing.assert_allclose(one, two, rtol=1e-7, atol=1e-9)


def test_last_layer_is_exact():
    """One use with input 1: ``A ⊗ G`` is the block of the whole matrix."""
    run = residuals("second", False)
    _, tagged = tagged_loss(run, fisher="exact")
    seen = tagged.value_and_grad(PARAMS, X, ONES, UNITS)[2]
    (last,) = (t for t in tagged.layers if "['e']" in t.params)
    j = jax.jacobian(run)(PARAMS, X, ONES, UNITS)["e"][:, :, 0]
    # Two uses, one for each second derivative: their sum has cross terms, its own
    # trace lies between that of the uses apart and twice that.
    trace = np.trace(seen[last.name].a) * np.trace(seen[last.name].g)
    assert 0.4 < trace / float((j**2).sum() / ROWS) < 2.5
    single = lambda p, x, *_: jax.vmap(lambda z: second(p, z, 1.0, jnp.ones(2)))(x)  # noqa: E731
    _, tagged = tagged_loss(single, fisher="exact")
    seen = tagged.value_and_grad(PARAMS, X, ONES, UNITS)[2][last.name]
    j = jax.jacobian(single)(PARAMS, X)["e"][:, :, 0]
    np.testing.assert_allclose(np.kron(seen.a, seen.g), j.T @ j / ROWS, rtol=1e-9)


def test_steps_are_those_of_the_batched_program():
    """Deferred, inside ``jit``, through an optimiser; one trace."""
    seen = []
    for batched in (False, True):
        _, tagged = tagged_loss(residuals("second", batched), fisher="exact")
        tx = kfac.kfac(tagged.layers, 0.1, damping=0.1)

        @jax.jit
        def step(p, s, tagged=tagged, tx=tx):
            _, g, st = tagged.value_and_grad(
                p, X, ONES, UNITS, opt_state=s, deferred=True
            )
            u, s = tx.update(g, s, p, statistics=st)
            return jax.tree.map(jnp.add, p, u), s

        p, s = PARAMS, tx.init(PARAMS)
        for _ in range(3):
            p, s = step(p, s)
        seen.append(p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), *seen)


def test_what_meets_no_example_stays():
    """A penalty on products of weights, spectral norms and hypernetworks."""
    u = jnp.ones(2) / 2**0.5

    def penalty(p, x):
        z = kfac.normal(jnp.tanh(x @ p["a"]) @ p["c"])
        return (z**2).sum(-1).mean() / 2 + 0.1 * jnp.sum((u @ p["a"]) ** 2)

    def spectral(p, x):
        v = u @ p["a"]
        w = p["a"] / jnp.sqrt(jnp.sum(v * v))
        return (kfac.normal(jnp.tanh(x @ w) @ p["c"]) ** 2).sum(-1).mean() / 2

    params = {k: PARAMS[k] for k in "ac"}
    for loss in (penalty, spectral):
        tagged = kfac.tag(loss, params, X, fisher="exact")
        _, grads, seen = tagged.value_and_grad(params, X)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
            grads,
            jax.grad(loss)(params, X),
        )
        assert np.isfinite(np.asarray(seen["a"].g)).all()
        (layer,) = (t for t in tagged.layers if t.name == "a")
        assert "products outside the batch" in layer.note or "also" in layer.note


def test_too_large_a_copy_stays():
    """A network that makes the weights of another is not copied for every example."""
    params = {"h": jnp.ones((3, 40)) / 7, "o": jnp.ones((4, 1))}
    x, code = jax.random.normal(KEY(5), (ROWS, 10)), jnp.arange(3.0)

    def loss(p, x):
        w = (code @ p["h"]).reshape(10, 4)
        return (kfac.normal(jnp.tanh(x @ w) @ p["o"]) ** 2).sum(-1).mean() / 2

    tagged = kfac.tag(loss, params, x, fisher="exact")
    (layer,) = (t for t in tagged.layers if t.name == "h")
    assert "whole batch" in layer.note
