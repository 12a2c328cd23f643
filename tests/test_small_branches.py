"""Branches that the larger tests do not reach, each against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite import forms
from kfac_jax_lite.bayes import noisy, roots
from tests.helpers import close, first_pass
from tests.models import BY_NAME


def test_roots_of_diagonals_and_of_single_units(rng):
    found = roots.inverse_root(jnp.array([4.0, 0.25, -1.0]), forms.DIAGONAL)
    np.testing.assert_allclose(found, [0.5, 2.0, np.nan])
    e = jnp.asarray(rng.normal(size=(2, 1)))
    one = roots.unit_root_times(jnp.array([[[3.0]], [[8.0]]]), e, 1.0)
    np.testing.assert_allclose(one, e / np.array([[2.0], [3.0]]))


def test_damping_of_a_posterior():
    """``δ + γ`` of a number and of a schedule."""
    assert noisy.total_damping(0.5, 0.25) == 0.75
    schedule = noisy.total_damping(lambda count: 1.0 / (1 + count), 0.25)
    assert schedule(1) == 0.75  # type: ignore[operator]
    with pytest.raises(TypeError, match="a number or a schedule"):
        noisy.total_damping("small", 0.25)


def test_a_mesh_over_which_nothing_is_spread():
    """Every device keeps everything: as without a mesh."""
    tagged, _, grads, statistics = first_pass("mlp")
    params = BY_NAME["mlp"].params()
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    spread = {"axis_name": "data", "reduction": kfac.Reduction(mesh=mesh)}
    found = []
    for options in ({}, spread):
        tx = kfac.scale_by_kfac(tagged.layers, **options)
        found.append(tx.update(grads, tx.init(params), params, statistics=statistics))
    close(found[0][0], found[1][0])


def test_traffic_of_moments_and_of_what_falls_back():
    """A diagonal layer sends its gradient and a count; EKFAC its moments as well."""

    def loss(p, x):
        return jnp.mean((x @ p["w"] * jnp.exp(p["s"])) ** 2)

    params = {"w": jnp.ones((4, 3)), "s": jnp.ones(3)}
    layers = kfac.tag(loss, params, np.ones((5, 4))).layers
    found = kfac.traffic(layers, kfac.Reduction(), 2)
    assert [c.elements for c in found if c.layer == "s"] == [3, 1]
    more = kfac.traffic(layers, kfac.Reduction(), 2, inverse="ekfac")
    extra = sum(c.elements for c in more) - sum(c.elements for c in found)
    assert extra == 4 * 3
