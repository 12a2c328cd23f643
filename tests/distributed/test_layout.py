"""A device's view of a state whose layers are spread over two, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.distributed.assignment import NOBODY, Plan
from kfac_jax_lite.distributed.layout import own_part
from tests import parallel
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
    found = own_part(layers, seen, Plan(2, dict.fromkeys(owned, 0), {}, True))
    for t in layers:
        whole, part = numbered.factors[t.name], found.factors[t.name]
        if t.name in owned:
            np.testing.assert_array_equal(part.a.values, whole.a.values[1])
            np.testing.assert_array_equal(part.g.values, whole.g.values[1])
        else:
            identical(part, whole)
    identical(own_part(layers, numbered, NOBODY), numbered)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_moments_of_ekfac_travel_with_the_bases():
    """Owners invert, and turn second moments, as one device does."""
    model, reduction = BY_NAME["mlp"], kfac.Reduction("owner", devices=2, bucket=0)
    result = parallel.run(model, "checked", reduction, 3, "ekfac", devices=2)
    parallel.same(model, result, 3, inverse="ekfac")


def test_what_moments_of_ekfac_cost_on_the_way():
    """``a g`` numbers more in every refresh, and in every parcel of an owner."""
    layers = first_pass("mlp")[0].layers
    reduction = kfac.Reduction("owner", devices=2, bucket=0)
    moments = sum(t.sizes[0] * t.sizes[1] for t in layers)
    found = {
        inverse: kfac.traffic(layers, reduction, 2, inverse)
        for inverse in ("eigh", "ekfac")
    }

    def total(inverse, event, kind):
        chosen = [c for c in found[inverse] if (c.event, c.kind) == (event, kind)]
        return sum(c.elements for c in chosen if c.layer)

    for event, kind in (("refresh", "all_reduce"), ("inversion", "all_gather")):
        more = total("ekfac", event, kind) - total("eigh", event, kind)
        assert moments <= more <= moments + 2 * len(layers)  # filled up to even shares
