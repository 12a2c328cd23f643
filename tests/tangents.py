"""What the tests of the tangent kernel and of its dual step share."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from tests.models import BY_NAME

EXAMPLES = 5


def setting(name, examples=EXAMPLES):
    """A model with its tagged loss, parameters and batch."""
    model = BY_NAME[name]
    return model, model.tag(examples), model.params(), model.batch(examples)


def ravel(tree):
    """One float64 vector."""
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0], np.float64)


def step_of(tx):
    """The first update, to be jitted."""
    return lambda grads, params, batch: tx.update(
        grads, tx.init(params), params, batch=batch
    )


def primal(fisher, gradient, damping):
    """``(F + λI)⁻¹ g`` densely."""
    return np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient)


def masked_loss(params, x, y, mask):
    """A classifier of sequences, some of whose positions do not count."""
    z = jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]
    terms = optax.softmax_cross_entropy_with_integer_labels(
        kfac.categorical(z, mask), y
    )
    return jnp.where(mask, terms, 0).sum() / mask.sum()


def masked_setting():
    """Parameters, arguments, and the Jacobian ``[n, C, P]`` of all rows."""
    rng = np.random.default_rng(3)
    shapes = {"w": (3, 4), "v": (4, 3), "b": (3,)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(4, 2, 3))), jnp.asarray([[0, 2], [1, 1]] * 2)
    mask = jnp.asarray([[True, True], [True, False], [False, False], [True, True]])
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def forward(v):
        p = unravel(v)
        return (jnp.tanh(x @ p["w"]) @ p["v"] + p["b"]).reshape(8, 3)

    return params, (x, y, mask), forward(flat), jax.jit(jax.jacrev(forward))(flat)
