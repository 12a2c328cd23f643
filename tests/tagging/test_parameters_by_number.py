"""Parameters read by numbers known in advance: loop counters, ``vmap`` over indices.

The oracle writes the layers out one by one, adds explicit zero offsets to their outputs
and differentiates with respect to them: ``A = (1/N) Σ_r x xᵀ``, ``G = (N²/R) Σ_r c cᵀ``
over all rows of a slice.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kfac_jax_lite as kfac
from tests.helpers import close

N, D, L, M = 5, 3, 4, 2
PROGRAMS = {}


def chain(w, x, indices, hook):
    """One layer behind the other."""
    h = x
    for i in indices:
        h = jnp.tanh(hook(i, h, h @ w[i]))
    return h


def chain_with_input(w, x, indices, hook):
    h = x
    for i in indices:
        h = jnp.tanh(hook(i, h, h @ w[i])) + x
    return h


def side_by_side(w, x, indices, hook):
    return sum(jnp.tanh(hook(i, x, x @ w[i])) for i in indices)


def program(*indices, shape=(L, D, D), reference=chain):
    """Registers a network with the slices of ``w`` that it applies, in order."""

    def register(network):
        PROGRAMS[network.__name__] = network, indices, shape, reference
        return network

    return register


ALL = tuple(range(L))
BACK = ALL[::-1]


@program(*ALL, reference=side_by_side)
def map_over_numbers(p, x):
    return lax.map(lambda i: jnp.tanh(x @ p["w"][i]), jnp.arange(L)).sum(0)


@program(*ALL)
def loop_of_static_length(p, x):
    return lax.fori_loop(0, L, lambda i, h: jnp.tanh(h @ p["w"][i]), x)


@program(*ALL)
def scan_over_numbers(p, x):
    step = lambda h, i: (jnp.tanh(h @ p["w"][i]), None)  # noqa: E731
    return lax.scan(step, x, jnp.arange(L))[0]


@program(*BACK)
def scan_over_numbers_from_behind(p, x):
    step = lambda h, i: (jnp.tanh(h @ p["w"][i]), None)  # noqa: E731
    return lax.scan(step, x, jnp.arange(L), reverse=True)[0]


@program(*BACK)
def count_down(p, x):
    return lax.fori_loop(0, L, lambda i, h: jnp.tanh(h @ p["w"][L - 1 - i]), x)


@program(*BACK)
def count_from_behind(p, x):
    return lax.fori_loop(0, L, lambda i, h: jnp.tanh(h @ p["w"][-1 - i]), x)


@program(1, 3)
def every_other_one(p, x):
    return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"][2 * i + 1]), x)


@program(0, 1, 2, 3)
def in_pairs(p, x):
    def step(i, h):
        h = jnp.tanh(h @ p["w"][2 * i])
        return jnp.tanh(h @ p["w"][2 * i + 1])

    return lax.fori_loop(0, 2, step, x)


@program(*ALL)
def by_dynamic_index(p, x):
    def step(i, h):
        return jnp.tanh(h @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False))

    return lax.fori_loop(0, L, step, x)


@program(*ALL)
def by_a_counter_in_a_call(p, x):
    layer = jax.checkpoint(jax.jit(lambda w, i, h: jnp.tanh(h @ w[i])))
    return lax.fori_loop(0, L, lambda i, h: layer(p["w"], i, h), x)


@program(*ALL)
def by_take(p, x):
    step = lambda h, i: (jnp.tanh(h @ jnp.take(p["w"], i, axis=0)), None)  # noqa: E731
    return lax.scan(step, x, jnp.arange(L))[0]


@program(*ALL)
def by_numbers_closed_over(p, x):
    return lax.scan(lambda h, i: (jnp.tanh(h @ p["w"][i]), None), x, ORDER)[0]


ORDER = jnp.arange(L)


@program(*[np.s_[D * i : D * i + D] for i in ALL], shape=(L * D, D))
def rows_in_blocks(p, x):
    def step(i, h):
        return jnp.tanh(h @ lax.dynamic_slice_in_dim(p["w"], D * i, D))

    return lax.fori_loop(0, L, step, x)


@program(*[np.s_[:, :, i] for i in ALL], shape=(D, D, L))
def along_the_last_axis(p, x):
    return lax.fori_loop(0, L, lambda i, h: jnp.tanh(h @ p["w"][..., i]), x)


GRID = tuple((i, j) for i in range(M) for j in range(L))


@program(*GRID, shape=(M, L, D, D))
def two_counters(p, x):
    def outer(i, h):
        return lax.fori_loop(0, L, lambda j, h: jnp.tanh(h @ p["w"][i, j]), h)

    return lax.fori_loop(0, M, outer, x)


@program(*((j, i) for i, j in GRID), shape=(L, M, D, D))
def two_counters_the_other_way(p, x):
    def outer(i, h):
        return lax.fori_loop(0, L, lambda j, h: jnp.tanh(h @ p["w"][j, i]), h)

    return lax.fori_loop(0, M, outer, x)


@program(*GRID, shape=(M, L, D, D))
def sliced_and_counted(p, x):
    def outer(h, w):
        return lax.fori_loop(0, L, lambda j, h: jnp.tanh(h @ w[j]), h), None

    return lax.scan(outer, x, p["w"])[0]


@program(0, 0, 0, 1, 1, 1, shape=(M, D, D), reference=chain_with_input)
def by_the_outer_counter(p, x):
    """The same layer in all turns of the inner loop."""

    def outer(i, h):
        step = lambda _, h: jnp.tanh(h @ p["w"][i]) + x  # noqa: E731
        return lax.fori_loop(0, 3, step, h)

    return lax.fori_loop(0, M, outer, x)


@program(2, 2, 2, reference=chain_with_input)
def a_number_written_in_a_loop(p, x):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][2]) + x, x)


@program(*ALL, reference=side_by_side)
def vmap_over_numbers(p, x):
    return jax.vmap(lambda i: jnp.tanh(x @ p["w"][i]))(jnp.arange(L)).sum(0)


@program(1, 2, reference=side_by_side)
def vmap_over_some_numbers(p, x):
    return jax.vmap(lambda i: jnp.tanh(x @ p["w"][i + 1]))(jnp.arange(2)).sum(0)


def switched(w, x, indices, hook):
    del indices
    one, two = hook(0, x, x @ w[0]), hook(2, jnp.tanh(x), jnp.tanh(x) @ w[2])
    return jnp.where(x[:, :1] > 0, two, one)


@program(0, 2, reference=switched)
def vmapped_switch(p, x):
    """Every example picks a branch: all run, the rest is masked."""
    which = (x[:, 0] > 0).astype(int)
    branches = [lambda h: h @ p["w"][0], lambda h: jnp.tanh(h) @ p["w"][2]]
    return jax.vmap(lambda i, h: lax.switch(i, branches, h))(which, x)


def linear(w, x, indices, hook):
    (i,) = indices
    return hook(i, x, x @ w[i])


@program(0, shape=(1, D, D), reference=linear)
def one_weight_for_every_example(p, x):
    w = jnp.broadcast_to(p["w"][0], (len(x), D, D))
    return jnp.einsum("nd,nde->ne", x, w)


def oracle(name, w, x, y):
    """``A`` and ``G`` of every slice."""
    _, indices, _, reference = PROGRAMS[name]

    def run(offsets):
        seen = []

        def hook(index, inputs, z):
            seen.append((index, inputs, jnp.zeros_like(z)))
            return z + offsets[len(seen) - 1] if offsets else z

        return reference(w, x, indices, hook), seen

    z, seen = run(None)
    jacobian = jax.jacrev(lambda offsets: run(offsets)[0])([zero for *_, zero in seen])
    uses, numbers = {}, np.arange(w.size).reshape(w.shape)
    for (index, inputs, _), j in zip(seen, jacobian, strict=True):
        c = np.tensordot((z - y) / N, j, z.ndim)
        pairs = uses.setdefault(numbers[index].tobytes(), [])
        pairs.append((np.asarray(inputs), c))
    found = {}
    for entries, pairs in uses.items():
        rows, cs = (np.concatenate(part) for part in zip(*pairs, strict=True))
        found[entries] = rows.T @ rows / N, cs.T @ cs * N**2 / len(rows)
    return found


def loss_of(network):
    def loss(p, x, y):
        z = kfac.normal(network(p, x))
        return 0.5 * jnp.sum((z - y) ** 2, -1).mean()

    return loss


@pytest.mark.parametrize("name", PROGRAMS)
def test_blocks_of_slices(rng, name):
    network, _, shape, _ = PROGRAMS[name]
    p = {"w": jnp.asarray(rng.normal(size=shape))}
    x, y = (jnp.asarray(rng.normal(size=(N, D))) for _ in range(2))
    loss = loss_of(network)
    tagged = kfac.tag(loss, p, x, y)
    assert {t.kind for t in tagged.layers} == {"dense"}, str(tagged)
    value, grads, found = jax.jit(tagged.value_and_grad)(p, x, y)
    close((value, grads), jax.value_and_grad(loss)(p, x, y), 1e-10)
    numbers, seen = jnp.arange(p["w"].size).reshape(shape), {}
    for layer in tagged.layers:
        places = np.asarray(layer.views[0].read(numbers)).reshape(-1, D, D)
        factors = (m.reshape(-1, D, D) for m in found[layer.name][:2])
        seen |= {k.tobytes(): pair for k, *pair in zip(places, *factors, strict=True)}
    wanted = oracle(name, p["w"], x, y)
    assert seen.keys() == wanted.keys()
    for entries, pair in wanted.items():
        close(tuple(seen[entries]), pair, 1e-9)


def test_biases_by_number_join(rng):
    def network(p, x):
        z = lax.map(lambda i: jnp.tanh(x @ p["w"][i] + p["b"][i]), jnp.arange(L))
        return z.sum(0)

    p = {"w": jnp.asarray(rng.normal(size=(L, D, D))), "b": jnp.zeros((L, D))}
    x = jnp.asarray(rng.normal(size=(N, D)))
    (layer,) = kfac.tag(loss_of(network), p, x, x).layers
    assert layer.roles == ("weight", "bias") and layer.stack == (L,)


def picked_by_data(p, x):
    """Every turn's layer is where the data says."""
    start = (x.sum() > 0).astype(int)
    return lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"][start + i]), x)


def moved_by_half(p, x):
    """Slices that overlap."""

    def step(i, h):
        return jnp.tanh(h @ lax.dynamic_slice_in_dim(p["w"], i, D))

    return lax.fori_loop(0, L, step, x)


def counted_by_the_carry(p, x):
    """A counter that grows with what the loop computes."""

    def step(carry, _):
        i, h = carry
        h = jnp.tanh(h @ p["w"][i])
        return (i + (h.sum() > 0).astype(int), h), None

    return lax.scan(step, (0, x), None, L)[0][1]


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (picked_by_data, (L, D, D)),
        (moved_by_half, (2 * D, D)),
        (counted_by_the_carry, (L, D, D)),
    ],
)
def test_what_the_data_picks_falls_back(rng, network, shape):
    p = {"w": jnp.asarray(rng.normal(size=shape))}
    x = jnp.asarray(rng.normal(size=(N, D)))
    tagged = kfac.tag(loss_of(network), p, x, x)
    (layer,) = tagged.layers
    assert layer.kind == "diagonal"
    assert "dynamic_slice" in layer.note
    assert ("the data" in layer.note) == (network is not moved_by_half)
    loss = loss_of(network)
    value, grads, _ = jax.jit(tagged.value_and_grad)(p, x, x)
    close((value, grads), jax.value_and_grad(loss)(p, x, x), 1e-10)
