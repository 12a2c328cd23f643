"""Input factors of convolutions against patches that numpy loops take."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.statistics import conv
from kfac_jax_lite.tagging.sites import ConvGeometry
from tests.helpers import close


def loop_patches(x, kernel, padding, strides, dilation):
    """One row per example and output position, entries (kernel axes, channel)."""
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    sizes = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, s, d in zip(x.shape[1:-1], kernel, strides, dilation, strict=True)
    ]
    rows = []
    for example in x:
        for position in itertools.product(*map(range, sizes)):
            row = []
            for offset in itertools.product(*map(range, kernel)):
                steps = zip(position, strides, offset, dilation, strict=True)
                row.append(example[tuple(p * s + o * d for p, s, o, d in steps)])
            rows.append(np.concatenate(row))
    return np.stack(rows), sizes


@st.composite
def convolutions(draw):
    """Shapes of a convolution with at least one output position."""
    dims = draw(st.integers(1, 3))
    axes = [
        (
            draw(st.integers(1, 4)),
            (draw(st.integers(0, 3)), draw(st.integers(0, 3))),
            draw(st.sampled_from([1, 1, 1, 2])),
            draw(st.sampled_from([1, 1, 1, 2])),
        )
        for _ in range(dims)
    ]
    kernel, padding, strides, dilation = zip(*axes, strict=True)
    least = [max(1, (k - 1) * d + 1 - sum(p)) for k, p, _, d in axes]
    space = [n + draw(st.integers(0, 5 if dims < 3 else 2)) for n in least]
    batch, channels = draw(st.sampled_from([1, 2, 8])), draw(st.integers(1, 3))
    shape = (batch, *space, channels)
    return shape, kernel, padding, strides, dilation


def geometry_of(shape, kernel, padding, strides, dilation, sizes):
    """The geometry that the shapes are of, channels last, one group."""
    dims, channels = len(kernel), shape[-1]
    spec = (0, dims + 1, *range(1, dims + 1))
    return ConvGeometry(
        lhs_spec=spec,
        out_spec=spec,
        kernel=kernel,
        window_strides=strides,
        padding=padding,
        lhs_dilation=(1,) * dims,
        rhs_dilation=dilation,
        groups=1,
        rows=(shape[0], *sizes),
        n_in=channels * math.prod(kernel),
        n_out=1,
    )


patches = jax.jit(conv.patches, static_argnums=0)


@hypothesis.given(convolutions(), st.sampled_from([1, 40, 1 << 20]))
@hypothesis.settings(max_examples=30)
def test_shifted_products_are_those_of_all_patches(shapes, limit):
    shape, kernel, padding, strides, dilation = shapes
    x = np.random.default_rng(0).normal(size=shape)
    rows, sizes = loop_patches(x, kernel, padding, strides, dilation)
    geometry = geometry_of(*shapes, sizes)
    close(patches(geometry, x), rows, 1e-15)
    wide = [a for a, k in enumerate(kernel) if k > 1]
    if not wide or strides[wide[0]] > 1 or dilation[wide[0]] > 1:
        assert conv.shift_axis(geometry) is None
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "CACHED_PATCH_ELEMENTS", limit)
        moment = jax.jit(conv.shifted_moment, static_argnums=(0, 2))
        found = moment(geometry, x, wide[0])
    close(found, rows.T @ rows, 1e-12)


def conv_loss(strides, padding, dilation):
    """Mean loss of one convolution with a bias, of its logits summed over space."""

    def loss(params, x, y):
        z = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        logits = kfac.categorical((z + params["bias"]).sum((1, 2)))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    return loss


@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_factor_of_a_layer_with_bias(strides, limit, rng, monkeypatch):
    monkeypatch.setattr(conv, "CACHED_PATCH_ELEMENTS", limit)
    x = rng.normal(size=(16, 9, 8, 2))
    padding, dilation = ((2, 0), (1, 2)), (1, 1)
    params = {"kernel": rng.normal(size=(3, 4, 2, 5)), "bias": rng.normal(size=5)}
    y = rng.integers(0, 5, 16)
    loss = conv_loss(strides, padding, dilation)
    tagged = kfac.tag(loss, params, x, y)
    (layer,) = tagged.layers
    seen = jax.jit(tagged.value_and_grad)(params, x, y)[2][layer.name].a
    rows, _ = loop_patches(x, (3, 4), padding, strides, dilation)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    close(seen, rows.T @ rows / 16, 1e-12)


def test_the_way_is_chosen_by_shape():
    def chosen(kernel, rows, strides=(1, 1), channels=4):
        geometry = geometry_of(
            (8, 1, 1, channels), kernel, ((0, 0),) * 2, strides, (1, 1), rows
        )
        return conv.shift_axis(geometry)

    assert chosen((3, 3), (8, 8)) == 0
    assert chosen((1, 7), (8, 8)) == 1
    assert chosen((1, 1), (8, 8)) is None
    assert chosen((3, 3), (8, 8), (2, 2)) is None
    # One output row: the edges alone cost more than all patches.
    assert chosen((3, 3), (1, 8)) is None
    # A factor beyond the cache, of fewer rows than it is wide.
    assert chosen((3, 3), (7, 7), channels=512) is None
    assert chosen((3, 3), (32, 32), channels=512) == 0
