"""What enters the averages and what counts as inverted, one bad thing at a time."""

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from tests.helpers import first_pass, identical
from tests.models import BY_NAME


def transformation(**options):
    """A transformation of the mlp, and its first state, gradient and statistics."""
    tagged, _, grads, statistics = first_pass("mlp")
    tx = kfac.scale_by_kfac(tagged.layers, damping=0.1, **options)
    return jax.jit(tx.update), tx.init(BY_NAME["mlp"].params()), grads, statistics


def with_a(statistics, name, change):
    """Statistics in which the input factor of one layer is another."""
    own = statistics[name]
    return {**statistics, name: own._replace(a=change(own.a))}


def test_one_infinite_statistic_keeps_the_batch_out():
    """The gradient is finite: nothing is averaged, of no layer, but for the count."""
    update, state, grads, statistics = transformation()
    _, before = update(grads, state, None, statistics=statistics)
    bad = with_a(statistics, "layer1", lambda a: a.at[0, 0].set(jnp.inf))
    updates, after = update(grads, before, None, statistics=bad)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert int(after.skipped) == 1
    identical(after._replace(skipped=before.skipped), before)


def test_a_factor_without_a_root_is_not_counted_as_inverted():
    """A negative ``A``: the layer waits with what it had, the others are inverted."""
    update, state, grads, statistics = transformation()
    names = [t.name for t in first_pass("mlp")[0].layers]
    bad = with_a(statistics, "layer1", lambda a: -jnp.eye(len(a), dtype=a.dtype))
    _, after = update(grads, state, None, statistics=bad)
    clock, failing = after.clock, np.array([n == "layer1" for n in names])
    np.testing.assert_array_equal(clock.failures, failing)
    np.testing.assert_array_equal(clock.inversions, ~failing)
    np.testing.assert_array_equal(clock.last_inverse, ~failing)
    np.testing.assert_array_equal(clock.inverse_damping > 0, ~failing)
    identical(after.inverses["layer1"], state.inverses["layer1"])
