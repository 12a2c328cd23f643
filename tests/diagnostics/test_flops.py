"""Rows and operations against the programs that the library makes."""

import itertools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.core.linalg import spd_inverse, spd_inverse_flops
from kfac_jax_lite.diagnostics.cost import statistics_flops
from tests import models, zoo
from tests.helpers import cases
from tests.programs import mlp, products, shapes


@hypothesis.given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from(["cholesky", "eigh", "ekfac", "low_rank"]),
)
def test_operations_are_those_of_the_program(widths, batch, norm, inverse):
    """Every product of gradient, statistics, inversion and preconditioning."""
    tagged, params, args = mlp(widths, batch, norm)
    cost = kfac.cost_model(
        tagged.layers, rows=kfac.layer_rows(tagged, params, *args), inverse=inverse
    )
    tx = kfac.scale_by_kfac(tagged.layers, inverse=inverse)
    state = jax.eval_shape(tx.init, params)
    step = jax.make_jaxpr(
        lambda p, s, *a: tagged.value_and_grad(p, *a, opt_state=s), return_shape=True
    )
    program, (_, grads, statistics) = step(params, state, *args)
    flops = cost.flops_per_step()
    # Nobody wants the gradient of the first layer's input.
    spared = 2 * batch * widths[0] * widths[1]
    assert products(program.jaxpr) == flops.gradient + flops.statistics - spared

    def update(grads, state, statistics):
        return tx.update(grads, state, statistics=statistics)

    program = jax.make_jaxpr(update)(grads, state, statistics)
    wanted = flops.inversion + flops.precondition
    assert products(program.jaxpr) == pytest.approx(wanted, abs=len(cost.layers))


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    st.lists(st.integers(5, 14), min_size=3, max_size=3),
    st.integers(1, 4),
    st.sampled_from([100, 6, 3]),
)
def test_operations_of_low_rank_inverses(widths, rank, limit):
    """The solve in every form, and one turn of the iteration."""
    tagged, params, args = mlp(widths, 4, limit=limit)
    method = kfac.low_rank(rank)
    cost = kfac.cost_model(
        tagged.layers, rows=kfac.layer_rows(tagged, params, *args), inverse=method
    )
    tx = kfac.scale_by_kfac(tagged.layers, inverse=method)
    statistics = jax.eval_shape(tagged.value_and_grad, params, *args)[-1]
    program = jax.make_jaxpr(lambda g, s, f: tx.update(g, s, statistics=f))(
        params, jax.eval_shape(tx.init, params), statistics
    )
    flops = cost.flops_per_step()
    wanted = flops.inversion + flops.precondition
    assert products(program.jaxpr) == pytest.approx(wanted, abs=len(cost.layers))


MODELS = ["heads_in", "recurrent", "twice", "cond", "remat", "groups", "lhs_dilation"]
MODELS += ["batch_norm"]
NETS = ["tied-jax", "bag-jax", "experts-jax", "layers_scan_norm-jax", "gru-jax"]


KINDS = itertools.product(MODELS + NETS, ["expand", "reduce"])
FAST = [(name, "expand") for name in MODELS[:3] + MODELS[5:] + NETS]
FAST += [("recurrent", "reduce"), ("groups", "reduce"), ("bag-jax", "reduce")]


@pytest.mark.parametrize(("name", "sharing"), cases(KINDS, FAST))
def test_every_kind_of_layer(name, sharing):
    """What tagging adds to the products of the plain gradient, and the update's."""
    model = zoo.BY_NAME[name] if name in NETS else models.BY_NAME[name]
    tagged = model.tag(4, weight_sharing=sharing)
    args = model.params(), *model.batch(4)
    cost = kfac.cost_model(tagged.layers, rows=kfac.layer_rows(tagged, *args))
    loss = jax.value_and_grad(tagged.loss_fn, has_aux=tagged.has_aux)
    step = jax.make_jaxpr(tagged.value_and_grad, return_shape=True)
    program, (_, grads, statistics) = step(*args)
    added = products(program.jaxpr) - products(jax.make_jaxpr(loss)(*args).jaxpr)
    flops = cost.flops_per_step()
    assert added == flops.statistics
    tx = kfac.scale_by_kfac(tagged.layers)
    program = jax.make_jaxpr(lambda g, s, f: tx.update(g, s, statistics=f)[0])(
        grads, jax.eval_shape(tx.init, args[0]), statistics
    )
    wanted = flops.inversion + flops.precondition
    assert products(program.jaxpr) == pytest.approx(wanted, abs=len(cost.layers))


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    st.integers(1, 4), st.integers(3, 7), st.integers(1, 3), st.integers(1, 2)
)
def test_rows_of_a_convolution(batch, side, kernel, stride):
    """One row for every place where the kernel fits, counted by hand."""
    model = nn.Conv(3, (kernel, kernel), (stride, stride), padding="VALID")
    x = shapes(batch, side, side, 2)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(jnp.sum(kfac.normal(model.apply(params, x).sum((1, 2))), -1))

    tagged = kfac.tag(loss, params, x)
    rows = kfac.layer_rows(tagged, params, x)
    places = [i for i in range(0, side, stride) if i + kernel <= side]
    count = batch * len(places) ** 2
    (layer,) = tagged.layers
    assert rows[layer.name][:3] == (count, 0, count)
    (record,) = kfac.cost_model(tagged.layers, rows=rows).layers
    a, g = kernel * kernel * 2 + 1, 3
    spared = rows[layer.name].saved
    assert record.statistics == 2 * count * (a * a + g * g) - spared
    assert record.gradient == 6 * count * (a - 1) * g
    assert record.precondition == 2 * a * a * g + 2 * a * g * g


def test_rows_after_reduce():
    """Positions of an example are one row of statistics, but many of the products."""

    def loss(params, x):
        return jnp.mean(jnp.sum(kfac.normal((x @ params["w"]).mean(1)), -1))

    x, params = shapes(5, 7, 2), {"w": shapes(2, 3)}
    for sharing, rows in (("expand", 35), ("reduce", 5)):
        tagged = kfac.tag(loss, params, x, weight_sharing=sharing)
        assert kfac.layer_rows(tagged, params, x) == {"w": kfac.Rows(35, 0, rows)}


@pytest.mark.parametrize("size", [1, 5, 64, 100, 129, 300])
@pytest.mark.parametrize("block", [4, 16, 128])
def test_inversion_by_blocks(size, block):
    """The loops have the products that their formula counts."""
    matrix = shapes(size, size)
    program = jax.make_jaxpr(lambda m: spd_inverse(m, block))(matrix)
    assert products(program.jaxpr) == spd_inverse_flops(size, block)


def test_products_are_what_xla_counts():
    """The oracle above agrees with XLA's own count of a product."""

    def factor(x):
        return jnp.einsum("ri,rj->ij", x, x)

    x = jnp.ones((64, 24), jnp.float32)
    seen = jax.jit(factor).lower(x).compile().cost_analysis()["flops"]
    assert seen == products(jax.make_jaxpr(factor)(x).jaxpr) == 2 * 64 * 24**2


def test_rows_of_another_batch():
    """Rows follow the arguments, not those of ``tag``."""
    tagged, params, _ = mlp([4, 3], 2)
    rows = kfac.layer_rows(tagged, params, shapes(6, 4), shapes(6, 3))
    assert rows == {"0": kfac.Rows(6, 0, 6)}
    assert np.shape(rows["0"]) == (5,)


def test_subsampled_rows():
    """Every second example, and every second position along both axes."""
    model = nn.Conv(3, (3, 3))
    x = shapes(4, 8, 8, 2)
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(jnp.sum(kfac.normal(model.apply(params, x).sum((1, 2))), -1))

    def cost(**some):
        tagged = kfac.tag(loss, params, x, subsample=kfac.Subsample(**some))
        rows = kfac.layer_rows(tagged, params, x)
        (layer,) = tagged.layers
        return rows[layer.name], statistics_flops(layer, rows[layer.name])

    # Three shifts of patches [8 rows, 8, 6], both edges of two rows, and nine blocks
    # that are sums of seven.
    shifted, sums = 2 * (256 * 3 + 256 // 8 * 2 * 4) * 6**2, 2 * 9 * 7 * 6**2
    rest = shifted + 2 * 256 * 3**2
    assert cost()[1] == rest + sums
    assert cost(examples=2)[1] == rest // 2 + sums
    assert cost(examples=2, positions=2)[0] == (256, 0, 32, 0, False)
    assert cost(examples=2, positions=2)[1] == 2 * 32 * (19**2 + 3**2)
