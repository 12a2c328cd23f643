"""Draws of weights (to be replaced)."""

import jax


def find(state):
    """The object with `draw` inside an optax state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "draw"))
    (found,) = [x for x in leaves if hasattr(x, "draw")]
    return found


def sample(state, params, key, num_samples=None):
    """Draws weights; with ``num_samples``, on a new leading axis."""
    posterior = find(state)
    if num_samples is None:
        return posterior.draw(params, key)
    keys = jax.random.split(key, num_samples)
    return jax.vmap(lambda k: posterior.draw(params, k))(keys)
