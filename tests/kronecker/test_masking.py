"""The part of a layer's statistics that a mask leaves, against slices by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kfac_jax_lite.core.types import KroneckerStatistics, ScaleShiftStatistics
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker import masking as restrict
from tests.helpers import first_pass, spd


def layer(form=forms.FULL):
    """A dense layer with a bias, its input factor in that form."""
    found = first_pass("mlp")[0].layers[0]
    d = found.a_shape[-1]
    shape = {forms.FULL: (d, d), forms.DIAGONAL: (d,), forms.BLOCKS: (2, 3, 3)}[form]
    return dataclasses.replace(found, a_form=form.name, a_shape=shape)


def statistics(a):
    return KroneckerStatistics(jnp.asarray(a), jnp.eye(5), None)


def kept(whole, role):
    return restrict.part(whole, [whole.roles.index(role)])


@pytest.mark.parametrize("form", [forms.FULL, forms.DIAGONAL])
def test_input_factor(form, rng):
    whole = layer(form)
    d = whole.a_shape[-1]
    a = spd(rng, d) if form == forms.FULL else rng.uniform(1, 2, d)
    for role, wanted in (("weight", slice(0, d - 1)), ("bias", slice(d - 1, d))):
        part = kept(whole, role)
        found = restrict.part_of_statistics(part, statistics(a)).a
        assert found.shape == part.a_shape
        wanted = a[wanted, wanted] if form == forms.FULL else a[wanted]
        np.testing.assert_array_equal(found.ravel(), wanted.ravel())


def test_blocks_keep_what_is_not_the_bias(rng):
    whole = layer(forms.BLOCKS)
    a = jnp.asarray(np.stack([spd(rng, 3), spd(rng, 3)]))
    part = kept(whole, "weight")
    found = restrict.part_of_statistics(part, statistics(a)).a
    wanted = np.array(a)
    wanted[1, 1:], wanted[1, :, 1:] = 0, 0  # entries 4 (the bias) and 5 (filled up)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="masked together"):
        kept(whole, "bias")


@pytest.mark.parametrize(("role", "i"), [("scale", 0), ("shift", 1)])
def test_units(role, i, rng):
    whole = next(
        x
        for x in first_pass("layer_norm")[0].layers
        if len(x.roles) == 2 and x.kind == "scale_shift"
    )
    blocks = jnp.asarray(rng.normal(size=whole.a_shape))
    part = kept(whole, role)
    assert part.a_shape == (*whole.a_shape[:-2], 1, 1)
    found = restrict.part_of_statistics(part, ScaleShiftStatistics(blocks))
    np.testing.assert_array_equal(found.blocks[..., 0, 0], blocks[..., i, i])
    assert restrict.part_of_statistics(part, found) is found
