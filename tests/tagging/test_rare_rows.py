"""Rare forms of a loss in which a layer has several rows, against explicit offsets.

The oracle: ``loss(params, x, y, o)`` adds ``o = 0`` where the layer's output is to be
tapped, ``jax.grad`` in ``o`` gives its cotangents ``c``, and ``A = 1/N Σ a aᵀ`` and
``G = N²/R Σ c cᵀ`` are written out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from tests.helpers import close

B, T, D, OUT = 5, 4, 3, 2
PROGRAMS = {}
NHC = {"dimension_numbers": ("NHC", "HIO", "NHC")}


def program(kind, offset, inputs, **shapes):
    """Registers a loss with its first layer: kind, output's shape, and input rows."""

    def register(loss):
        PROGRAMS[loss.__name__] = loss, kind, offset, inputs, shapes
        return loss

    return register


def squares(z, y):
    return 0.5 * jnp.sum((z - y) ** 2, -1).mean()


def data(rng, shapes):
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(B, T, D))), rng.normal(size=(B, D))


def plus(z, o=None):
    """The output to be tapped, with its offset."""
    return z if o is None else z + o


def every_position(x):
    return np.tile(np.eye(T), (B, 1))


# ------------------------------------------------ tables


@program("embedding", (B, T, D), every_position, e=(T, D))
def positions_from_a_call(p, x, y, o):
    found = jax.jit(lambda e: e[jnp.arange(T)])(p["e"])
    return squares(jnp.tanh(x + plus(found, o)).sum(1), y)


@program("embedding", (B, T, D), every_position, e=(T, D))
def positions_repeated_before_they_are_used(p, x, y, o):
    found = plus(jnp.broadcast_to(p["e"][jnp.arange(T)], (B, T, D)), o)
    return squares(jnp.tanh(x * found).sum(1), y)


@program("embedding", (B, T, D), every_position, e=(T, D))
def positions_repeated_twice(p, x, y, o):
    found = plus(jnp.broadcast_to(p["e"][jnp.arange(T)], (B, T, D)), o)
    found = jnp.broadcast_to(found, (2, B, T, D))
    return squares(jnp.tanh(jnp.stack([x, 2 * x]) * found).sum((0, 2)), y)


@program("embedding", (B, T, D), lambda x: np.repeat(every_position(x), D, 0), e=(T, 1))
def a_number_for_each_position(p, x, y, o):
    """Shared by all units, so that these are rows."""
    return squares(jnp.tanh(plus(x + p["e"][jnp.arange(T)], o)).sum(1), y)


@program("embedding", (T, 1), lambda x: np.eye(T), e=(T, 1))
def a_number_added_to_constants(p, x, y, o):
    found = plus(p["e"][jnp.arange(T)], o) + jnp.ones((T, D))
    return squares(jnp.tanh(x + found).sum(1), y)


@program("embedding", (2, T, D), lambda x: np.tile(np.eye(T), (2, 1)), e=(T, D))
def positions_whose_axes_change_places(p, x, y, o):
    ids = jnp.stack([jnp.arange(T), jnp.arange(T)[::-1]])
    found = jnp.swapaxes(plus(p["e"][ids], o), 0, 1)
    return squares(jnp.tanh(x[:, :, None] + found).sum((1, 2)), y)


def tokens(x):
    return jnp.asarray(np.argsort(np.asarray(x[..., 0]), 1))


@program("embedding", (B * T, D), lambda x: np.eye(T)[tokens(x).ravel()], e=(T, D))
def tokens_whose_axes_are_merged(p, x, y, o):
    found = p["e"][jnp.argsort(x[..., 0], 1)].reshape(B * T, D)
    return squares(jnp.tanh(plus(found, o)).reshape(B, T, D).sum(1), y)


def numbered(x):
    return np.eye(T)[tokens(x)[:, 0]]


@program("dense", (B, D), numbered, w=(T, D))
def one_hot_vectors_of_a_grid(p, x, y, o):
    """A count over two axes is not followed: rows like any other, the same factors."""
    first = jnp.argsort(x[..., 0], 1)[:, 0]
    hot = first[:, None, None] == jnp.arange(T).reshape(2, 2)
    return squares(plus(hot.reshape(B, T).astype(x.dtype) @ p["w"], o), y)


# ------------------------------------------------ loops


def rows(x):
    return np.swapaxes(x, 0, 1).reshape(-1, D)


@program("dense", (T, B, D), rows, w=(D, D))
def a_weight_carried_unchanged(p, x, y, o):
    def body(w, step):
        x, *o = step
        return w, jnp.tanh(plus(x @ w, *o))

    steps = (jnp.swapaxes(x, 0, 1), *(() if o is None else (o,)))
    return squares(lax.scan(body, p["w"], steps)[1].sum(0), y)


@pytest.mark.parametrize("name", PROGRAMS)
def test_factors_of_rows_written_out(name, rng):
    loss, kind, offset, inputs, shapes = PROGRAMS[name]
    params, x, y = data(rng, shapes)
    plain = functools.partial(loss, o=None)
    tagged = kfac.tag(plain, params, x, y, num_examples=B)
    (layer,) = tagged.layers
    assert layer.kind == kind
    run = jax.jit(lambda p: tagged.value_and_grad(p, x, y)[1:])
    grads, statistics = run(params)
    wanted, c = jax.jit(jax.grad(loss, argnums=(0, 3)))(params, x, y, jnp.zeros(offset))
    close(grads, wanted)
    a = np.asarray(inputs(x), np.float64)
    c = np.asarray(c).reshape(-1, layer.g_shape[-1])
    assert len(a) == len(c)
    found = statistics[layer.name]
    wanted = a.T @ a / B
    close(found.a, np.diag(wanted) if np.ndim(found.a) == 1 else wanted)
    close(found.g, B**2 / len(c) * c.T @ c)


# ------------------------------------------------ what falls back, shifts


def repeated_and_merged(p, x, y):
    return squares((jnp.broadcast_to(p["b"], (2, D)).reshape(-1)[1:-2] + x[:, 0]), y)


def repeated_and_cut(p, x, y):
    return squares(x[:, 0] + jnp.broadcast_to(p["b"], (4, D))[1:2], y)


def repeated_and_reversed(p, x, y):
    return squares(x[:, 0] + jnp.flip(jnp.broadcast_to(p["b"], (2, D)), 1)[0], y)


def one_kernel_for_all_channels(p, x, y):
    """A depthwise kernel that all channels share, spread over a full one."""
    kernel = jnp.broadcast_to(p["b"][:, None, None], (D, D, D))
    z = lax.conv_general_dilated(x, kernel, (1,), "VALID", **NHC)
    return squares(z.sum(1), y)


FALLBACKS = [
    repeated_and_merged, repeated_and_cut, repeated_and_reversed,
    one_kernel_for_all_channels,
]  # fmt: skip


@pytest.mark.parametrize("loss", FALLBACKS, ids=lambda f: f.__name__)
def test_what_no_rule_follows_keeps_its_squared_gradient(loss, rng):
    params, x, y = data(rng, {"b": (D,)})
    tagged = kfac.tag(loss, params, x, y, num_examples=B)
    (layer,) = tagged.layers
    assert layer.kind == "diagonal" and layer.note
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, x, y)
    wanted = jax.jit(jax.grad(loss))(params, x, y)
    close(grads, wanted)
    close(statistics["b"].gradient, wanted["b"])
    assert int(statistics["b"].num_examples) == B


def test_a_part_of_every_row_of_a_table(rng):
    """A lookup of two columns of three: the third is not in it."""
    ids = jnp.arange(B) % T

    def loss(p, x, y):
        start = jnp.stack([ids, jnp.ones_like(ids)], 1)
        numbers = lax.GatherDimensionNumbers((1,), (0,), (0, 1))
        z = lax.gather(p["e"], start, numbers, (1, 2))
        return squares(jnp.concatenate([z, x[:, 0, :1]], 1), y)

    params, x, y = data(rng, {"e": (T, D)})
    tagged = kfac.tag(loss, params, x, y, num_examples=B)
    (layer,) = tagged.layers
    assert layer.kind == "diagonal" and "gather" in layer.note
    grads = jax.jit(tagged.value_and_grad)(params, x, y)[1]
    close(grads, jax.grad(loss)(params, x, y))


def examples_squared(loss, params, x, y, name):
    """``1/N Σ g_n²`` of a parameter, example by example."""
    gradient = jax.jit(jax.grad(loss))
    each = [gradient(params, x[n : n + 1], y[n : n + 1])[name] for n in range(B)]
    return np.mean(np.square(each), 0)


def test_a_shift_behind_rows_that_were_split(rng):
    """Output axes in front of the rows: the shift is not joined to the weight."""

    def loss(p, x, y):
        z = (p["w"].T @ x.reshape(-1, D).T).reshape(D, len(x), T)
        return squares(jnp.tanh(z + p["b"][:, None, None]).sum(2).T, y)

    params, x, y = data(rng, {"w": (D, D), "b": (D,)})
    tagged = kfac.tag(loss, params, x, y, num_examples=B)
    assert {t.name: t.kind for t in tagged.layers} == {"w": "dense", "b": "scale_shift"}
    found = jax.jit(tagged.value_and_grad)(params, x, y)[-1]
    wanted = examples_squared(loss, params, x, y, "b")
    close(found["b"].blocks[:, 0, 0], wanted)


def test_biases_of_a_loop_around_one_weight(rng):
    """A bias for every turn is no bias of the weight that all turns share."""

    def loss(p, x, y):
        turn = lambda h, b: (jnp.tanh(h @ p["w"] + b), h)  # noqa: E731
        return squares(lax.scan(turn, x[:, 0], p["b"])[0], y)

    params, x, y = data(rng, {"w": (D, D), "b": (T, D)})
    tagged = kfac.tag(loss, params, x, y)
    assert {t.name: t.kind for t in tagged.layers} == {"w": "dense", "b": "scale_shift"}
    found = jax.jit(tagged.value_and_grad)(params, x, y)[-1]
    close(found["b"].blocks[..., 0, 0], examples_squared(loss, params, x, y, "b"))
    h, total = np.asarray(x[:, 0]), 0.0
    for b in np.asarray(params["b"]):
        total, h = total + h.T @ h / B, np.tanh(h @ np.asarray(params["w"]) + b)
    close(found["w"].a, total)


@pytest.mark.parametrize("groups", [1, D])
def test_positions_of_a_convolution_that_a_mask_hides(groups, rng):
    """Patches and cotangents of the positions that count, written out."""
    mask = np.arange(T) < np.array([4, 2, 1, 3, 2])[:, None]
    options = NHC | {"feature_group_count": groups}

    def loss(p, x, mask):
        z = lax.conv_general_dilated(x, p["k"], (1,), "SAME", **options)
        z = kfac.normal(z, mask=mask)
        return 0.5 * jnp.where(mask[..., None], z**2, 0).sum() / mask.sum(), z

    params, x, _ = data(rng, {"k": (2, D // groups, D)})
    tagged = kfac.tag(loss, params, x, jnp.asarray(mask), has_aux=True)
    run = jax.jit(tagged.value_and_grad)
    (_, z), _, statistics = run(params, x, jnp.asarray(mask))
    after = np.concatenate([x[:, 1:], np.zeros((B, 1, D))], 1)
    patches = np.stack([x, after], 2)[mask]  # rows, taps, channels
    n, c = mask.sum(), np.asarray(z)[mask] / mask.sum()
    found = statistics["k"]
    if groups == 1:
        a = patches.reshape(n, -1)
        close(found.a, a.T @ a / n, 1e-6)
        close(found.g, n * c.T @ c, 1e-6)
    else:
        close(found.a, np.einsum("rig,rjg->gij", patches, patches) / n, 1e-6)
        close(found.g[:, 0, 0], n * (c**2).sum(0), 1e-6)


def test_why_a_weight_and_its_bias_fall_back(rng):
    """The weight is read in part, and elsewhere too; the bias goes with it."""

    def loss(p, x, y):
        z = x[:, 0, :-1] @ p["w"][:-1] + p["b"]
        return squares(z, y) + jnp.sin(p["w"]).sum()

    params, x, y = data(rng, {"w": (D, D), "b": (D,)})
    notes = {t.name: t.note for t in kfac.tag(loss, params, x, y).layers}
    assert "only part of it reaches a layer" in notes["w"]
    assert "its layer's weight fell back" in notes["b"]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_tied_weight_behind_a_mask(sharing, rng):
    """Rows that do not count are as if they were not there, in both directions."""
    mask = jnp.asarray([True, False, True, True, False])

    def loss(p, x, y, mask):
        z = kfac.normal(jnp.tanh(x @ p["w"]) @ p["w"].T, mask=mask)
        return 0.5 * jnp.where(mask[:, None], (z - y) ** 2, 0).sum() / mask.sum()

    params, x, y = data(rng, {"w": (D, OUT)})
    args = x[:, 0], y, mask
    found = []
    for batch in (args, [v[mask] for v in args]):
        tagged = kfac.tag(loss, params, *batch, weight_sharing=sharing)
        assert tagged.layers[0].tied
        found.append(jax.jit(tagged.value_and_grad)(params, *batch))
    close(*found, 1e-6)


def test_tokens_of_examples_that_a_mask_hides(rng):
    """Sums over an example's tokens, with and without the examples hidden."""
    mask = jnp.asarray([True, False, True, True, False])

    def loss(p, ids, y, mask):
        z = kfac.normal(jnp.tanh(p["e"][ids]).sum(1), mask=mask)
        return 0.5 * jnp.where(mask[:, None], (z - y) ** 2, 0).sum() / mask.sum()

    params, x, y = data(rng, {"e": (T, D)})
    args = jnp.asarray(rng.integers(0, T, (B, 2))), y, mask
    found = []
    for batch in (args, [v[mask] for v in args]):
        tagged = kfac.tag(loss, params, *batch, weight_sharing="reduce")
        assert tagged.layers[0].kind == "embedding"
        found.append(jax.jit(tagged.value_and_grad)(params, *batch))
    close(*found, 1e-6)


def test_frames_beside_the_examples_of_a_convolution(rng):
    """``reduce``: the mean over all positions of all frames of an example."""

    def loss(p, x, y):
        frames = x.reshape(-1, T // 2, D)
        z = lax.conv_general_dilated(frames, p["k"], (1,), "SAME", **NHC)
        return squares(z.reshape(x.shape).sum(1), y)

    params, x, y = data(rng, {"k": (1, D, D)})
    tagged = kfac.tag(loss, params, x, y, num_examples=B, weight_sharing="reduce")
    found = jax.jit(tagged.value_and_grad)(params, x, y)[-1]["k"]
    mean, z = np.asarray(x).mean(1), np.asarray(x).sum(1) @ params["k"][0]
    c = T * (z - y) / B  # summed over the positions
    close(found.a, mean.T @ mean / B)
    close(found.g, B * np.asarray(c).T @ np.asarray(c))


def test_every_second_bag_of_tokens_in_the_eigenbasis(rng):
    """EKFAC's moments of mean inputs: those of half of the examples, twice."""
    ids = jnp.asarray(rng.integers(0, T, (6, 2)))
    y = jnp.asarray(rng.normal(size=(6, D)))
    loss = lambda p, ids, y: squares(p["e"][ids].sum(1), y)  # noqa: E731
    params = {"e": jnp.asarray(rng.normal(size=(T, D)))}
    options = {"weight_sharing": "reduce", "subsample": kfac.Subsample(examples=2)}
    tagged = kfac.tag(loss, params, ids, y, **options)
    state = kfac.scale_by_kfac(tagged.layers, inverse="ekfac").init(params)
    run = jax.jit(tagged.value_and_grad)
    found = run(params, ids, y, opt_state=state)[-1]["e"].s  # in the first basis, I
    x = np.stack([np.bincount(i, minlength=T) / 2 for i in np.asarray(ids)])
    c = 2 * np.asarray(params["e"][ids].sum(1) - y) / 6  # of both tokens
    close(found, 2 * 6 * np.einsum("ni,nj->ij", x[::2] ** 2, c[::2] ** 2))
