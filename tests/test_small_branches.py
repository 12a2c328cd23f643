"""Branches that the larger tests do not reach, each against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite import forms
from kfac_jax_lite.bayes import noisy, roots
from kfac_jax_lite.flops import statistics_flops
from tests.helpers import close, first_pass
from tests.models import BY_NAME
from tests.programs import products, shapes

NHC = {"dimension_numbers": ("NHC", "HIO", "NHC")}


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


def test_which_factors_may_raise_the_damping():
    """Of a step that is taken back: above 1, below ``1e4``, or none are."""
    for retreat in (None, 1.5, 9999.0):
        assert kfac.damping.adaptive(retreat=retreat).retreat == retreat
    for retreat in (-1.0, 0.5, 1.0, 1e4, 1e5):
        with pytest.raises(ValueError, match="retreat must be in"):
            kfac.damping.adaptive(retreat=retreat)


def in_loops(loops, body, x, weights):
    """``body(x, w)`` in loops over the leading axes of the weights."""
    if not loops:
        return body(x, weights)
    turn = lambda x, w: (in_loops(loops - 1, body, x, w), None)  # noqa: E731
    return jax.lax.scan(turn, x, weights)[0]


def test_low_rank_inverses_of_experts_in_loops():
    """``[2, 3]`` matrices of each side: orthonormal bases ``[2, 3, d, 1]``."""

    def loss(p, x):
        experts = lambda x, w: jnp.tanh(jnp.einsum("bed,edo->beo", x, w))  # noqa: E731
        return jnp.mean(in_loops(1, experts, x, p["w"]) ** 2)

    params = {"w": jnp.ones((2, 3, 4, 4))}
    layers = kfac.tag(loss, params, np.ones((5, 3, 4)), num_examples=5).layers
    state = kfac.scale_by_kfac(layers, inverse=kfac.low_rank(1)).init(params)
    inverse = state.inverses["w"]
    for u in (inverse.u_a, inverse.u_g):
        assert u.shape == (2, 3, 4, 1)
        np.testing.assert_allclose(jnp.sum(u**2, -2), 1, rtol=0.5)


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
def test_operations_of_a_convolution_in_loops(stack):
    """Products of shifted patches, as many as the program has."""

    def loss(p, x):
        def body(x, k):
            z = jax.lax.conv_general_dilated(x, k, (1,), "SAME", **NHC)
            return jnp.tanh(z)

        return jnp.mean(in_loops(len(stack), body, x, p["k"]) ** 2)

    args = {"k": shapes(*stack, 5, 4, 4)}, shapes(6, 40, 4)
    tagged = kfac.tag(loss, *args, num_examples=6)
    rows = kfac.layer_rows(tagged, *args)["k"]
    steps = tagged.value_and_grad, jax.value_and_grad(loss)
    with_them, without = (products(jax.make_jaxpr(f)(*args).jaxpr) for f in steps)
    assert rows.saved > 0
    assert with_them - without == statistics_flops(tagged.layers[0], rows)
