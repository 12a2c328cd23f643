"""Odd but legal programs: no parameter stops training, no statistic is wrong unsaid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from tests.helpers import close

B, IN, OUT = 6, 4, 3


def squares(z, y):
    return 0.5 * jnp.sum((z - y) ** 2, -1).mean()


def bias_row(p, x, y):
    return squares(x @ p["w"][:-1, :] + 0.1 * p["w"][-1], y)


def halves(p, x, y):
    w = p["w"]
    right = jnp.concatenate([w[2:, :1], w[2:, 1:]], 1) * 0.5
    return squares(x[:, :2] @ w[:2] + x[:, 2:] @ right, y)


def switched(p, x, y):
    branches = [lambda: p["w"][0], lambda: p["w"][1]]
    w = lax.switch(jnp.argmax(x[0, :2]), branches)
    return squares(x @ w + x @ p["w"][2], y)


def beside_the_batch(p, x, y):
    positions = jnp.linspace(0, 1, 3 * IN).reshape(3, IN) @ p["w"][1]
    return squares(x @ p["w"][0] + positions.sum(0), y)


def twice_bias(p, x, y):
    return squares(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + 0.1 * p["b"], y)


def reshaped_after_scaling(p, x, y):
    return squares(x @ (p["w"] * 0.5)[:, :OUT], y)


def scaled_in_checkpoint(p, x, y):
    return squares(x @ jax.checkpoint(lambda w: w * 0.5)(p["w"]), y)


def carried_slice(p, x, y):
    w, _ = lax.scan(lambda c, w: (w, None), jnp.zeros((IN, OUT)), p["w"])
    return squares(x @ w, y)


def marked_in_a_loop(p, x, y):
    def body(total, xy):
        z = kfac.normal(xy[0] @ p["w"])
        return total + 0.5 * jnp.sum((z - xy[1]) ** 2), None

    parts = (x.reshape(2, 3, IN), y.reshape(2, 3, OUT))
    return lax.scan(body, 0.0, parts)[0] / B


PROGRAMS = {
    bias_row: {"w": (IN + 1, OUT)},
    halves: {"w": (IN, OUT)},
    switched: {"w": (3, IN, OUT)},
    beside_the_batch: {"w": (2, IN, OUT)},
    twice_bias: {"w": (IN, OUT), "b": (OUT,), "v": (OUT, OUT)},
    reshaped_after_scaling: {"w": (IN, OUT + 2)},
    scaled_in_checkpoint: {"w": (IN, OUT)},
    carried_slice: {"w": (2, IN, OUT)},
    marked_in_a_loop: {"w": (IN, OUT)},
}


def problem(rng, shapes, examples=B):
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    x, y = rng.normal(size=(examples, IN)), rng.normal(size=(examples, OUT))
    return params, jnp.asarray(x), jnp.asarray(y)


@pytest.mark.parametrize("loss", PROGRAMS, ids=lambda f: f.__name__)
def test_every_entry_with_a_gradient_moves(loss, rng):
    params, x, y = problem(rng, PROGRAMS[loss])
    tagged = kfac.tag(loss, params, x, y, num_examples=B)
    tx = kfac.scale_by_kfac(tagged.layers, damping=0.1)
    value, grads, statistics = jax.jit(tagged.value_and_grad)(params, x, y)
    close((value, grads), jax.jit(jax.value_and_grad(loss))(params, x, y), 1e-10)
    update = jax.jit(lambda g, s: tx.update(g, tx.init(params), statistics=s)[0])
    updates = update(grads, statistics)
    for name, g in grads.items():
        assert not np.any((np.asarray(g) != 0) & (np.asarray(updates[name]) == 0))


def oracle_block(loss, params, x, y):
    """The empirical Fisher of the ravelled parameters from examples one by one."""
    rows = []
    gradient = jax.jit(jax.grad(loss))
    for i in range(len(x)):
        g = gradient(params, x[i : i + 1], y[i : i + 1])
        rows.append(np.concatenate([np.ravel(g[k]) for k in sorted(g)]))
    return np.mean([np.outer(r, r) for r in rows], 0)


def test_a_parameter_minus_a_layer_is_not_its_bias(rng):
    loss = lambda p, x, y: squares(p["b"] - x @ p["w"], y)  # noqa: E731
    params, x, y = problem(rng, {"w": (IN, OUT), "b": (OUT,)})
    tagged = kfac.tag(loss, params, x, y)
    assert {t.name: t.kind for t in tagged.layers} == {"w": "dense", "b": "scale_shift"}
    blocks = jax.jit(tagged.value_and_grad)(params, x, y)[-1]["b"].blocks[:, 0, 0]
    close(blocks, np.diag(oracle_block(loss, params, x, y))[:OUT], 1e-9)


def test_class_token_from_the_second_result_of_a_call(rng):
    @jax.jit
    def parts(cls, x):
        return x * 2, jnp.broadcast_to(cls, x.shape)

    def loss(p, x, y):
        twice, token = parts(p["cls"], x)
        both = jnp.concatenate([jnp.tanh(twice), jnp.tanh(token)], 1)
        return squares(both @ p["w"], y)

    params, x, y = problem(rng, {"cls": (IN,), "w": (2 * IN, OUT)})
    tagged = kfac.tag(loss, params, x, y)
    found = jax.jit(tagged.value_and_grad)(params, x, y)[-1]["cls"]
    wanted = np.diag(oracle_block(loss, params, x, y))[:IN]
    close(found.blocks[:, 0, 0], wanted, 1e-9)


def test_biases_beside_are_only_joined_where_nothing_else_reads_the_product(rng):
    def loss(p, x, y):
        z = x @ jnp.concatenate([p["v"], p["w"]], 1)
        return squares(jnp.tanh(z + jnp.concatenate([p["a"], p["b"]])) + z, y)

    shapes = {"v": (IN, 1), "w": (IN, OUT - 1), "a": (1,), "b": (OUT - 1,)}
    params, x, y = problem(rng, shapes)
    layers = kfac.tag(loss, params, x, y).layers
    assert all(t.roles in (("weight",), ("leaf",)) for t in layers)


def test_a_batch_of_one_finds_the_same_layers(rng):
    loss = lambda p, x, y: squares((x * p["g"] + p["s"]) @ p["w"], y)  # noqa: E731
    params, x, y = problem(rng, {"g": (IN,), "s": (IN,), "w": (IN, OUT)})
    tagged = kfac.tag(loss, params, x, y)
    assert kfac.tag(loss, params, x[:1], y[:1]).fingerprint() == tagged.fingerprint()
    tagged.value_and_grad(params, x[:1], y[:1])


def test_rows_under_nested_branches_are_those_of_the_longest_path(rng):
    def loss(p, x, y):
        inner = lambda x: lax.cond(  # noqa: E731
            x[0, 0] > 0, lambda x: x @ p["w"], lambda x: 2 * (x @ p["w"]), x
        )
        return squares(lax.cond(x.sum() > -1e9, inner, lambda x: x @ p["w"], x), y)

    params, x, y = problem(rng, {"w": (IN, OUT)})
    found = kfac.tag(loss, params, x, y).value_and_grad(params, x, y)[-1]["w"]
    scale = 1.0 if x[0, 0] > 0 else 2.0
    c = scale * (scale * x @ params["w"] - y) / B
    close(found.g, B * np.asarray(c).T @ np.asarray(c), 1e-9)


def test_rows_and_columns_of_one_table_fall_back(rng):
    def loss(p, x, y):
        ids = jnp.arange(B) % OUT
        z = p["e"][ids] + p["e"][:, ids].T
        return squares(z, y)

    params, x, y = problem(rng, {"e": (OUT, OUT)})
    (layer,) = kfac.tag(loss, params, x, y).layers
    assert layer.kind == "diagonal" and layer.note


def test_convolution_with_a_bias_at_one_of_two_uses(rng):
    def loss(p, x, y):
        image = x.reshape(B, 2, 2, 1)
        run = functools.partial(
            lax.conv_general_dilated, rhs=p["k"], window_strides=(1, 1),
            padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        z = jnp.tanh(run(image)) + (run(2 * image) + p["b"])
        return squares(z.sum((1, 2)), y)

    params, x, y = problem(rng, {"k": (2, 2, 1, OUT), "b": (OUT,)})
    tagged = kfac.tag(loss, params, x, y)
    kinds = {t.name: t.kind for t in tagged.layers}
    assert kinds == {"k": "conv", "b": "dense"}
    value, grads, statistics = jax.jit(tagged.value_and_grad)(params, x, y)
    close((value, grads), jax.jit(jax.value_and_grad(loss))(params, x, y), 1e-10)
    close(statistics["b"].a, np.full((1, 1), 4.0))  # four positions of every image


@pytest.mark.parametrize("inverse", ["ekfac", "eigh"])
def test_reduced_lookups_in_the_eigenbasis(inverse, rng):
    """EKFAC's moments of token counts, against one-hot rows written out."""
    ids = jnp.asarray(rng.integers(0, 5, (B, IN)))

    def loss(p, ids, y):
        return squares(jnp.tanh(p["e"][ids]).sum(1) @ p["w"], y)

    params, _, y = problem(rng, {"e": (5, OUT), "w": (OUT, OUT)})
    tagged = kfac.tag(loss, params, ids, y, weight_sharing="reduce")
    tx = kfac.scale_by_kfac(tagged.layers, inverse=inverse)
    state, run = tx.init(params), jax.jit(tagged.value_and_grad)
    for _ in range(2):
        _, grads, statistics = run(params, ids, y, opt_state=state)
        _, state = tx.update(grads, state, params, statistics=statistics)
    rows = np.stack([np.bincount(i, minlength=5) / IN for i in np.asarray(ids)])
    close(statistics["e"].a, (rows**2).sum(0) / B)
    if inverse == "ekfac":
        table = np.asarray(params["e"])[np.asarray(ids)]
        z = np.tanh(table).sum(1) @ params["w"]
        c = ((z - y) / B @ params["w"].T)[:, None] * (1 - np.tanh(table) ** 2)
        basis = run(params, ids, y, opt_state=state)[-1]["e"].s
        q = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)][0]
        turned = c.sum(1) @ q.inverses["e"].q_g
        close(basis, B * np.einsum("ni,nj->ij", rows**2, turned**2), 1e-9)


def _is_state(node):
    return type(node).__name__ == "KFACState"


def test_reference_with_a_computed_weight(rng):
    """A named layer whose reference scales the weight in a call of its own."""
    scaled = jax.jit(lambda w, s: w * s)

    def loss(p, x, y):
        z = kfac.tag_as(
            x @ jnp.abs(p["w"]), lambda x, w, s: x @ scaled(w, s), x, p["w"], 2.0
        )
        return squares(z, y)

    params, x, y = problem(rng, {"w": (IN, OUT)})
    tagged = kfac.tag(loss, params, x, y)
    value, grads, _ = tagged.value_and_grad(params, x, y)
    close((value, grads), jax.value_and_grad(loss)(params, x, y), 1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_masked_grouped_convolution(sharing, rng):
    """Where no row is masked the statistics are those without a mask."""

    def loss(p, x, mask=None):
        z = lax.conv_general_dilated(
            x.reshape(B, IN, 2), p["k"], (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2,
        )  # fmt: skip
        z = kfac.normal(jnp.tanh(z).sum(1), mask=mask)
        return squares(z, 1.0)

    params = {"k": jnp.asarray(rng.normal(size=(3, 1, 4)))}
    x, mask = jnp.asarray(rng.normal(size=(B, 2 * IN))), jnp.ones(B, bool)
    args = [(params, x, mask), (params, x)]
    seen, wanted = (
        jax.jit(kfac.tag(loss, *a, weight_sharing=sharing).value_and_grad)(*a)[-1]["k"]
        for a in args
    )
    close(seen, wanted, 1e-6)


def test_bias_of_its_own_is_reduced(rng):
    """Of a weight used in both directions, at several positions of an example."""

    def loss(p, x, y):
        h = jnp.tanh(x.reshape(len(x), 2, 2) @ p["w"] + p["b"]) @ p["w"].T
        return squares(h.reshape(len(x), -1)[:, :OUT], y)

    params, x, y = problem(rng, {"w": (2, 3), "b": (3,)})
    tagged = kfac.tag(loss, params, x, y, weight_sharing="reduce")
    found = jax.jit(tagged.value_and_grad)(params, x, y)[-1]["b"]
    close(found.a, np.ones((1, 1)))

    def split(p, x, y):
        return loss({"w": params["w"], "b": p["b"]}, x, y)

    wanted = oracle_block(split, {"b": params["b"]}, x, y)
    close(found.g, wanted, 1e-9)


def test_shift_used_twice_for_every_sequence(rng):
    """Its block is of the example's whole gradient, though tokens are the terms."""

    def loss(p, x, y):
        context = jnp.sin(jnp.tanh(x + p["s"]) + p["s"])
        z = x[:, None] * jnp.arange(1.0, 4)[:, None] + context[:, None]
        return squares(kfac.normal(z), y[:, :, None])

    params, x, y = problem(rng, {"s": (IN,)})
    tagged = kfac.tag(loss, params, x, y)
    found = jax.jit(tagged.value_and_grad)(params, x, y)[-1]["s"]
    examples = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    each = examples(params, x[:, None], y[:, None])["s"]  # of the mean over 3 terms
    close(found.blocks[:, 0, 0], (each**2).sum(0) * 3 / B, 1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_masked_convolution_is_that_of_the_rest(groups, sharing, rng):
    """Examples that a mask leaves out are as if they were not there."""

    def loss(p, x, mask):
        z = lax.conv_general_dilated(
            x.reshape(len(x), IN, 2), p["k"], (1,), "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups,
        )  # fmt: skip
        z = kfac.normal(jnp.tanh(z).sum(1), mask=mask)
        return jnp.sum(mask * jnp.sum(z**2, -1)) / jnp.sum(mask)

    params = {"k": jnp.asarray(rng.normal(size=(3, 2 // groups, 4)))}
    x, mask = jnp.asarray(rng.normal(size=(B, 2 * IN))), jnp.arange(B) % 2 == 0
    seen, wanted = (
        jax.jit(kfac.tag(loss, *a, weight_sharing=sharing).value_and_grad)(*a)[-1]["k"]
        for a in ((params, x, mask), (params, x[mask], mask[mask]))
    )
    close(seen, wanted, 1e-6)
