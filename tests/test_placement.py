"""A device's view of a state whose layers are spread over two, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

import kfac_jax_lite as kfac
from kfac_jax_lite.ownership import NOBODY, Plan
from kfac_jax_lite.placement import own_part
from tests.helpers import first_pass, identical
from tests.models import BY_NAME


def test_a_device_sees_its_own_slices():
    """Its row of every slice; what is not spread, and what nobody owns, as it was."""
    layers = first_pass("mlp")[0].layers
    tx = kfac.scale_by_kfac(
        layers, axis_name="i", reduction=kfac.Reduction("owner", devices=2, bucket=28)
    )
    state = tx.init(BY_NAME["mlp"].params())
    slices = lambda x: type(x).__name__ == "Slices"  # noqa: E731
    numbered = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape), state)
    seen = jax.tree.map(
        lambda x: type(x)(x.values[1:]) if slices(x) else x, numbered, is_leaf=slices
    )
    owned = [t.name for t in layers if slices(state.factors[t.name].a)]
    assert owned and len(owned) < len(layers)
    found = own_part(layers, seen, Plan(2, 2, dict.fromkeys(owned, 0), {}, True))
    for t in layers:
        whole, part = numbered.factors[t.name], found.factors[t.name]
        if t.name in owned:
            np.testing.assert_array_equal(part.a.values, whole.a.values[1])
            np.testing.assert_array_equal(part.g.values, whole.g.values[1])
        else:
            identical(part, whole)
    identical(own_part(layers, numbered, NOBODY), numbered)
