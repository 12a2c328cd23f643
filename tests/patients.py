"""A small run, healthy or made ill, for the tests of ``doctor``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac


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
