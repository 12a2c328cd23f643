"""Branches that the larger tests do not reach, each against its formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from kfac_jax_lite.bayes import noisy
from kfac_jax_lite.bayes.diagonal import block_squares, part_of_block
from kfac_jax_lite.core.types import DiagonalStatistics
from kfac_jax_lite.diagnostics import accuracy
from kfac_jax_lite.diagnostics.cost import limit_of, statistics_flops
from kfac_jax_lite.distributed.traffic import Collective
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.optimizer.steps import Guide
from kfac_jax_lite.tagging.interpreter import in_line
from tests.helpers import close, first_pass
from tests.models import BY_NAME
from tests.programs import products, shapes

NHC = {"dimension_numbers": ("NHC", "HIO", "NHC")}


def test_roots_of_diagonals_and_of_single_units(rng):
    found = noisy.inverse_root(jnp.array([4.0, 0.25, -1.0]), forms.DIAGONAL)
    np.testing.assert_allclose(found, [0.5, 2.0, np.nan])
    e = jnp.asarray(rng.normal(size=(2, 1)))
    one = noisy.unit_root_times(jnp.array([[[3.0]], [[8.0]]]), e, 1.0)
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
        return jnp.mean((x @ p["w"] * jnp.cumsum(p["s"])) ** 2)

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


def test_operations_of_layers_without_a_product():
    """A diagonal has rows and no operations; uneven shares of rows spare nothing."""

    def loss(p, x):
        z = jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", **NHC)
        return jnp.mean((z * jnp.cumsum(p["s"])) ** 2)

    args = {"k": shapes(5, 4, 4), "s": shapes(4)}, shapes(6, 40, 4)
    every = kfac.Subsample(positions=3)  # 13 or 14 of 40
    tagged = kfac.tag(loss, *args, num_examples=6, subsample=every)
    rows = kfac.layer_rows(tagged, *args)
    diagonal, conv = sorted(tagged.layers, key=lambda t: t.kind != "diagonal")
    assert diagonal.kind == "diagonal" and rows["s"][:4] == (6, 0, 6, 0)
    assert statistics_flops(diagonal, rows["s"]) == 0
    assert (rows["k"].statistics, rows["k"].saved) == (6 * 40 // 3, 0)
    assert statistics_flops(conv, rows["k"]) == 2 * 80 * (20**2 + 4**2)


def test_diagonals_are_inverted_and_counted_as_such():
    values = jnp.array([4.0, -1.0])
    found = forms.DIAGONAL.iterated_inverse(values, jnp.ones(2), 0.1)
    np.testing.assert_allclose(found, [0.25, np.nan])
    assert accuracy.enough(np.array([3.0, 1.0]), forms.DIAGONAL, 1.0) == 1
    assert accuracy.enough(np.array([3.0, 1.0]), forms.FULL, 1.0) == 2


def test_a_permutation_sends_what_its_pairs_do():
    """Half of the devices send; a ring of very many sends an array, or two."""
    one = Collective("w", "inversion", "permute", 10, 4, devices=8, count=4)
    assert limit_of(one) == one.sent == 10 * 4 * 4 / 8
    ring = dataclasses.replace(one, kind="all_reduce", count=1)
    assert limit_of(ring) == 2 * 40


def test_one_token_of_every_example(rng):
    """``1/N Σ g_n²`` of a table, example by example."""

    def loss(p, ids, y):
        return jnp.mean(jnp.sum((p["e"][ids] - y) ** 2, -1))

    params = {"e": jnp.asarray(rng.normal(size=(3, 2)))}
    ids, y = jnp.array([0, 2, 2, 0, 2]), jnp.asarray(rng.normal(size=(5, 2)))
    tagged = kfac.tag(loss, params, ids, y, statistics="squares")
    found = jax.jit(tagged.value_and_grad)(params, ids, y)[-1]["e"].squares
    each = [2 * (params["e"][i] - t) for i, t in zip(ids, y, strict=True)]
    wanted = np.zeros((3, 2))
    np.add.at(wanted, np.asarray(ids), np.square(each) / 5)
    close(found, wanted)


def test_weights_decay_beside_a_step_that_the_model_chooses():
    """``d = −α u + μ d_prev − α δ w``."""
    guide = Guide(True, 0.1, None, None, 0.5, None, None)
    state = guide.init((), jnp.ones(2))._replace(learning_rate=0.2, momentum=0.3)
    velocity, weights, u = jnp.array([1.0, 2.0]), jnp.array([4.0, -8.0]), jnp.ones(2)
    found = guide.direction(state, velocity, weights, u)
    wanted = -0.2 * u + 0.3 * velocity - 0.2 * 0.5 * weights
    np.testing.assert_allclose(found, wanted)


def test_squares_of_what_is_no_product():
    """VOGN's diagonals: of a parameter without a rule, and of a scale alone."""
    statistics = DiagonalStatistics(jnp.array([3.0, -1.0]), jnp.array(4))
    (norm,) = [t for t in first_pass("layer_norm")[0].layers if t.kind == "scale_shift"]
    np.testing.assert_array_equal(block_squares(norm, statistics), [36, 4])
    part, block = dataclasses.replace(norm, roles=("shift",)), jnp.arange(4.0)
    found = part_of_block(part, block.reshape(2, 2))
    np.testing.assert_array_equal(found, [[1], [3]])


def test_layers_in_line(rng):
    """Those of calls with the others, in order; those of loops and branches not."""

    def loss(p, x):
        x = jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w))(x, p["a"])
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["b"], jnp.sin, jnp.tanh(x))
        return jnp.mean(in_loops(1, jnp.matmul, x, p["c"])) + jnp.mean(x @ p["d"])

    params = {"a": (3, 3), "b": (3, 3), "c": (2, 3, 3), "d": (3, 4)}
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in params.items()}
    x = jnp.ones((5, 3))
    found = kfac.tag(loss, params, x).trace(params, (x,), False)
    sites = in_line(found.plan, found.closed.jaxpr)
    named = [(s.layer, out.shape) for s, out in sites if s.layer]
    assert named == [("a", (5, 3)), ("d", (5, 4))]


def test_a_parameter_that_a_loop_hands_through(rng):
    """It is the parameter still: uses inside the loop and behind it are one layer's."""

    def step(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), w), None

    def loss(p, x, y):
        (h, w), _ = jax.lax.scan(step, (x, p["w"]), None, 2)
        return 0.5 * jnp.sum((kfac.normal(h @ w) - y) ** 2, -1).mean()

    w, x, y = (jnp.asarray(rng.normal(size=s)) for s in ((3, 3), (5, 3), (5, 3)))
    tagged = kfac.tag(loss, {"w": w}, x, y)
    assert [t.kind for t in tagged.layers] == ["dense"]
    first = np.tanh(x @ w)
    rows = np.concatenate([x, first, np.tanh(first @ w)])
    found = jax.jit(tagged.value_and_grad)({"w": w}, x, y)[-1]
    close(found["w"].a, rows.T @ rows / 5, 1e-12)


def test_a_loss_of_parameters_alone():
    with pytest.raises(ValueError, match=r"averages over \(no array arguments\)"):
        kfac.tag(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.ones(3)})


@pytest.mark.parametrize("due", [True, False])
def test_statistics_that_are_not_finite(due):
    """Of a layer that asked for them they spoil the batch; of another they do not."""
    tagged, _, grads, statistics = first_pass("mlp")
    params = BY_NAME["mlp"].params()
    tx = kfac.scale_by_kfac(tagged.layers, interval=kfac.intervals.every(2))
    state = tx.init(params)
    if not due:
        _, state = tx.update(grads, state, params, statistics=statistics)
    bad = {**statistics, "layer0": jax.tree.map(jnp.zeros_like, statistics["layer0"])}
    bad["layer0"] = bad["layer0"]._replace(a=bad["layer0"].a.at[0, 0].set(jnp.nan))
    _, new = tx.update(grads, state, params, statistics=bad)
    assert int(new.skipped) == due
