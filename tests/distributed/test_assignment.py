"""Who inverts what: balance, equal shapes together, what is shared."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.distributed.assignment import balanced, inverse_cost, make_plan
from kfac_jax_lite.distributed.layout import (
    divided,
    sliced_statistics,
    undivided,
    whole_statistics,
)
from kfac_jax_lite.kronecker.inverses import FactorInverses
from tests import models
from tests.distributed.test_collectives import update_text
from tests.helpers import close
from tests.parallel import OWNER, run, same

# Four layers of one shape: two for each of two devices.
EQUAL = models.mlp("equal", (5, 5, 5, 5, 5))


def layers_of(sizes):
    """Dense layers without bias, of these widths."""
    params = {
        f"w{i}": jax.ShapeDtypeStruct((n, n), "float32") for i, n in enumerate(sizes)
    }
    inputs = {
        k: jax.ShapeDtypeStruct((2, v.shape[0]), "float32") for k, v in params.items()
    }

    def loss(params, inputs):
        return sum((inputs[k] @ w).sum(-1).mean() for k, w in params.items())

    return kfac.tag(loss, params, inputs, num_examples=2).layers


@hypothesis.given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5, unique=True),
    st.integers(1, 3),
)
def test_longest_first_is_within_a_third_of_the_best(sizes, devices):
    """Graham's bound ``4/3 − 1/(3 D)``, against every assignment there is."""
    layers = layers_of(sizes)
    owners = balanced(layers, devices)
    assert set(owners) == {layer.name for layer in layers}

    def longest(assignment):
        loads = [0] * devices
        for layer, device in zip(layers, assignment, strict=True):
            loads[device] += inverse_cost(layer)
        return max(loads)

    best = min(map(longest, itertools.product(range(devices), repeat=len(layers))))
    assert longest([owners[t.name] for t in layers]) <= (4 / 3 - 1 / 3 / devices) * best


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_equal_shapes_go_together(count):
    """Of ``m`` equal layers an owner has ``⌈m / D⌉`` or none, or the rest."""
    owners = balanced(layers_of([8] * count + [3]), 4)
    same_shape = [owners[f"w{i}"] for i in range(count)]
    sizes = [same_shape.count(d) for d in set(same_shape)]
    assert max(sizes) == math.ceil(count / 4)
    assert sum(s < max(sizes) for s in sizes) <= 1


@pytest.mark.usefixtures("compiled_anew")
def test_one_batched_call_for_equal_shapes():
    """Four equal layers on two devices: each inverts two at once."""
    reduction = OWNER(devices=2, share="inverses")
    same(EQUAL, run(EQUAL, "checked", reduction, 4, devices=2), 4)
    text = update_text(EQUAL, reduction, devices=2)[1] or ""
    loops = [x for x in text.splitlines() if " while(" in x]
    for d in (6, 5):  # of the input, with a bias, and of the output
        assert any(f"f64[2,{d},{d}]" in x for x in loops)
        assert not any(f"(s64[], f64[{d},{d}]" in x for x in loops)


@pytest.mark.parametrize(
    ("sizes", "period", "devices", "share"),
    [
        ((300, 20), 1, 8, "gradients"),  # a triangle of 45,150 against 6,000
        ((300, 20), 100, 8, "inverses"),  # once in a hundred steps
        ((20, 300), 1, 8, "gradients"),  # the other side is the larger
        ((300, 20), 1, 4096, "inverses"),  # against rows filled up to 4,096 × 20
    ],
)
def test_what_moves_fewer_bytes_is_shared(sizes, period, devices, share):
    params = {"w": jax.ShapeDtypeStruct(sizes, "float32")}
    x = jax.ShapeDtypeStruct((2, sizes[0]), "float32")
    layers = kfac.tag(lambda p, x: (x @ p["w"]).sum(-1).mean(), params, x).layers
    reduction = kfac.Reduction("owner", devices=devices)
    plan = make_plan(layers, reduction, devices, inverse_interval=period)
    assert plan.share == {"w": share}
    moved = {}
    for choice in ("inverses", "gradients"):
        forced = kfac.Reduction("owner", devices=devices, share=choice)
        found = kfac.traffic(layers, forced, devices, inverse_interval=period)
        gathered = [c for c in found if c.kind == "all_gather"]
        moved[choice] = sum(
            c.payload / (period if c.event == "inversion" else 1) for c in gathered
        )
    assert share == min(moved, key=lambda choice: moved[choice])


@hypothesis.given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([1, 2, 3, 6, 8]),
    st.booleans(),
)
@hypothesis.settings(max_examples=6)
def test_slices_and_rows_there_and_back(sizes, devices, bias):
    """Whole arrays from their parts; norms of slices are Frobenius norms."""
    rng = np.random.default_rng(0)
    params = {"w": jax.ShapeDtypeStruct(sizes, "float64")}
    params |= {"b": jax.ShapeDtypeStruct(sizes[1:], "float64")} if bias else {}
    x = jax.ShapeDtypeStruct((2, sizes[0]), "float64")

    def loss(p, x):
        return (x @ p["w"] + p.get("b", 0)).sum(-1).mean()

    (layer,) = kfac.tag(loss, params, x).layers
    reduction = OWNER(devices=devices, share="gradients")
    plan = make_plan((layer,), reduction, devices)

    def symmetric(shape):
        root = rng.normal(size=shape)
        return jax.numpy.asarray(root + root.T)

    whole = kfac.KroneckerStatistics(symmetric(layer.a_shape), symmetric(layer.g_shape))
    sliced = sliced_statistics(layer, whole, plan)
    assert sliced.a.values.shape[0] == devices
    close(whole_statistics(layer, sliced), whole, 1e-15)
    norm = np.linalg.norm(np.asarray(sliced.a.values))
    np.testing.assert_allclose(norm, np.linalg.norm(np.asarray(whole.a)), rtol=1e-14)
    inverses = FactorInverses(whole.a, whole.g)
    parts = divided(layer, inverses, plan)
    close(undivided(layer, parts), inverses, 0)
