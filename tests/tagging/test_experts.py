"""Mixtures of experts: rows that are sent to experts, against loops over experts.

With ``R_e`` the rows at expert ``e``: ``A_e = (1/N) Σ_r ā āᵀ``, ``G_e = (N²/R_e) Σ_r c
cᵀ`` over these rows. The oracle adds explicit zero offsets to the outputs of the
experts' products and differentiates with respect to them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax

import kfac_jax_lite as kfac
from tests.helpers import INVERSES, close, kfac_state, train

N, D, H, E, K, C = 12, 4, 5, 3, 2, 3
TOKENS = (6, 2)


def parameters(rng, **shapes):
    return {k: jnp.asarray(0.7 * rng.normal(size=s)) for k, s in shapes.items()}


def sent(ids, experts=E):
    """The order that sorts rows by expert, and how many each one gets."""
    return jnp.argsort(ids), jnp.bincount(ids, length=experts).astype(jnp.int32)


def product(x, w, ids, sizes, hook, name, scale=None):
    """Rows times the matrix of their expert; for the oracle by the expert's number."""
    if hook is None:
        w = w if scale is None else w * scale[:, None]
        return lax.ragged_dot(x, w, sizes)
    z = jnp.einsum("r...i,rio->r...o", x, jnp.concatenate([w, 0 * w[:1]])[ids])
    z = hook(name, x, ids, z)
    return z if scale is None else z * scale[ids]


# ---------------------------------------------------------------- programs


def language_model(p, tokens, hook=None):
    """Top-k routing, softmax gates, sorted tokens, silu gate, up and down."""
    x = p["embed"][tokens].reshape(-1, D)
    x = x + x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["norm"]
    gates, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), K)
    gates = gates / gates.sum(-1, keepdims=True)
    order, sizes = sent(chosen.reshape(-1))
    rows, ids = x[order // K], chosen.reshape(-1)[order]
    h = product(rows, p["gate"], ids, sizes, hook, "gate")
    h = jax.nn.silu(h) * product(rows, p["up"], ids, sizes, hook, "up")
    out = product(h, p["down"], ids, sizes, hook, "down")
    out = out * gates.reshape(-1)[order][:, None]
    x = x + jnp.zeros_like(x).at[order // K].add(out)
    return (x @ p["head"]).reshape(*tokens.shape, C)


def biased(p, x, hook=None):
    """One expert a row; biases looked up by the expert's number."""
    ids = jnp.argmax(x[:, :E], -1)
    order, sizes = sent(ids)
    h, own = x[order], ids[order]
    h = jnp.tanh(product(h, p["w"], own, sizes, hook, "w") + p["b"][own])
    return product(h, p["v"], own, sizes, hook, "v")[jnp.argsort(order)]


def rescaled(p, x, hook=None):
    """A weight times a number of every expert, another transposed."""
    ids = jnp.argmax(x[:, :E], -1)
    order, sizes = sent(ids)
    h, own = x[order], ids[order]
    scale = jnp.arange(2.0, 2 + E)[:, None]
    h = jnp.tanh(product(h, p["w"], own, sizes, hook, "w", scale))
    v = jnp.swapaxes(p["v"], 1, 2)
    return product(h, v, own, sizes, hook, "v")[jnp.argsort(order)]


def with_the_rest(p, x, hook=None):
    """Pairs of rows at the same expert; some rows at the end are nobody's."""
    sizes = jnp.array([1, 2, 0], jnp.int32)
    ids = np.repeat([0, 1, E], [1, 2, N - 3])
    h = jnp.stack([x, jnp.sin(x)], 1)
    if hook is None:
        numbers = lax.RaggedDotDimensionNumbers((((2,), (1,)), ((), ())), (0,), (0,))
        z = lax.ragged_dot_general(h, p["w"], sizes, numbers)
    else:
        z = product(h, p["w"], ids, sizes, hook, "w")
    return jnp.tanh(z).sum(1) + jnp.cos(x[:, :1])


SHAPES = {
    "language_model": {
        "embed": (7, D), "norm": (D,), "router": (D, E), "gate": (E, D, H),
        "up": (E, D, H), "down": (E, H, D), "head": (D, C),
    },
    "biased": {"w": (E, D, H), "b": (E, H), "v": (E, H, C)},
    "rescaled": {"w": (E, D, H), "v": (E, C, H)},
    "with_the_rest": {"w": (E, D, H)},
}  # fmt: skip
NETWORKS = {f.__name__: f for f in (language_model, biased, rescaled, with_the_rest)}


def loss_of(network):
    """Half the squared error, a sum over outputs, a mean over terms."""

    def loss(p, x, y):
        z = kfac.normal(network(p, x))
        return 0.5 * jnp.sum((z - y) ** 2, -1).mean()

    return loss


def problem(name, rng):
    p = parameters(rng, **SHAPES[name])
    x = jnp.asarray(rng.normal(size=(N, D)))
    if name == "language_model":
        x = jnp.asarray(rng.integers(0, 7, TOKENS))
    y = rng.normal(size=jax.eval_shape(NETWORKS[name], p, x).shape)
    return NETWORKS[name], p, x, jnp.asarray(y)


# ---------------------------------------------------------------- oracle


def uses(network, p, x, y, fisher):
    """By layer its uses: rows, their experts, cotangents ``[columns, rows, out]``."""

    def run(offsets):
        seen = {}

        def hook(name, inputs, ids, z):
            found = seen.setdefault(name, [])
            found.append((inputs, ids, jnp.zeros_like(z)))
            return z + offsets[name][len(found) - 1] if offsets else z

        return network(p, x, hook), seen

    z, seen = run(None)
    zeros = {k: [zero for *_, zero in found] for k, found in seen.items()}
    jacobian = jax.jit(jax.jacrev(lambda offsets: run(offsets)[0]))(zeros)
    n = z.size // z.shape[-1]
    columns = np.broadcast_to(np.eye(z.shape[-1]), (*z.shape, z.shape[-1]))
    columns = np.moveaxis(columns, -1, 0) if fisher == "exact" else (z - y)[None]

    def use(inputs, ids, j):
        c = np.tensordot(columns / n, j, z.ndim)
        ids = np.repeat(ids, inputs.size // len(ids) // inputs.shape[-1])
        shape = (len(columns), len(ids), -1)
        return np.reshape(inputs, (len(ids), -1)), ids, c.reshape(shape)

    pairs = {k: zip(seen[k], jacobian[k], strict=True) for k in seen}
    return {k: [use(a, i, j) for (a, i, _), j in pairs[k]] for k in seen}, n


def factors(network, name, p, x, y, fisher="empirical", seen_only=False, terms=None):
    found, n = uses(network, p, x, y, fisher)
    a, g = [], []
    for e in range(E):
        a_sum, g_sum, rows = 0.0, 0.0, 0
        for inputs, ids, cs in found[name]:
            mine = ids == e
            mine &= (cs != 0).any((0, 2)) | (not seen_only)
            rows += mine.sum()
            a_sum = a_sum + inputs[mine].T @ inputs[mine]
            g_sum = g_sum + np.einsum("krd,kre->de", cs[:, mine], cs[:, mine])
        a.append(a_sum / (terms or n))
        g.append(g_sum * n**2 / max(rows, 1))
    return np.stack(a), np.stack(g)


EXPERTS = {name: [k for k, s in SHAPES[name].items() if len(s) == 3] for name in SHAPES}


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", SHAPES)
def test_factors_by_expert(rng, name, fisher):
    network, p, x, y = problem(name, rng)
    loss = loss_of(network)
    tagged = kfac.tag(loss, p, x, y, fisher=fisher)
    assert not any(t.kind == "diagonal" for t in tagged.layers), str(tagged)
    value, grads, found = jax.jit(tagged.value_and_grad)(p, x, y)
    close((value, grads), jax.value_and_grad(loss)(p, x, y), 1e-10)
    for layer in EXPERTS[name]:
        wanted = factors(network, layer, p, x, y, fisher)
        close((found[layer].a, found[layer].g), wanted, 1e-9)


def test_blocks_of_single_rows(rng):
    """An expert with one row has the exact block ``g gᵀ``."""
    network, p, x, y = problem("biased", rng)
    x = x[:E].at[:, :E].set(jnp.eye(E))
    loss = loss_of(network)
    tagged = kfac.tag(loss, p, x, y[:E], num_examples=E)
    found = jax.jit(tagged.value_and_grad)(p, x, y[:E])[-1]
    for layer in ("w", "v"):
        for e in range(E):
            grad = jax.grad(loss)(p, x[e, None], y[e, None])[layer][e]
            wanted = jnp.outer(grad.ravel(), grad.ravel()) / E
            close(jnp.kron(found[layer].a[e], found[layer].g[e]), wanted, 1e-9)


def test_masked_terms(rng):
    """Rows of terms that the mask leaves out count nowhere."""
    network, p, x, y = problem("biased", rng)
    mask = jnp.arange(N) % 3 > 0

    def loss(p, x, y):
        z = kfac.normal(network(p, x), mask=mask)
        return 0.5 * jnp.sum((z - y) ** 2, -1) @ mask / mask.sum()

    tagged = kfac.tag(loss, p, x, y)
    found = jax.jit(tagged.value_and_grad)(p, x, y)[-1]
    for layer in ("w", "v"):
        wanted = factors(network, layer, p, x[mask], y[mask])
        close((found[layer].a, found[layer].g), wanted, 1e-9)


def test_large_factors_and_moments(rng):
    """Blocks on the diagonal, diagonals, and EKFAC's moments, expert by expert."""
    network, p, x, y = problem("biased", rng)
    loss = loss_of(network)
    a, g = factors(network, "v", p, x, y)
    by_size = {}
    for limit in (1, 2):
        tagged = kfac.tag(loss, p, x, y, max_factor_dim=limit)
        by_size[limit] = jax.jit(tagged.value_and_grad)(p, x, y)[-1]["v"]
    close(by_size[1].a, np.stack([np.diag(m) for m in a]), 1e-9)
    padded = np.pad(a, ((0, 0), (0, 1), (0, 1)))
    parts = np.stack([padded[:, i : i + 2, i : i + 2] for i in (0, 2, 4)], 1)
    close(by_size[2].a, parts, 1e-9)
    for limit in (2, 9):
        tagged = kfac.tag(loss, p, x, y, max_factor_dim=limit)
        tx = kfac.scale_by_kfac(tagged.layers, inverse="ekfac")
        state = tx.init(p)
        for _ in range(2):
            _, grads, seen = jax.jit(tagged.value_and_grad)(p, x, y, opt_state=state)
            before = kfac_state(state).inverses["v"]
            _, state = jax.jit(tx.update)(grads, state, p, statistics=seen)
        (pieces,), n = uses(network, p, x, y, "empirical")[0]["v"], N
        for e in range(E):
            rows, (c,) = pieces[0][pieces[1] == e], pieces[2][:, pieces[1] == e]
            q_a, q_g = (rotation(q[e]) for q in (before.q_a, before.q_g))
            rows = np.pad(rows, ((0, 0), (0, len(q_a) - H))) @ q_a
            c = np.pad(c, ((0, 0), (0, len(q_g) - C))) @ q_g
            close(seen["v"].s[e], n * (rows**2).T @ c**2, 1e-5)


def rotation(q):
    """A basis as one matrix, whatever its form."""
    q = np.asarray(q)
    return scipy.linalg.block_diag(*q) if q.ndim == 3 else q


@pytest.mark.parametrize("inverse", INVERSES)
def test_experts_without_rows(rng, inverse):
    """Zero factors: finite steps, and no step for an expert that nothing is sent to."""
    network, p, x, y = problem("biased", rng)
    x = x.at[:, 0].set(-9.0)
    tagged = kfac.tag(loss_of(network), p, x, y)
    tx = kfac.kfac(tagged.layers, 0.01, inverse=inverse, weight_decay=0.0)
    new, state, losses = train(tagged, tx, p, [(x, y)] * 5)
    assert losses[-1] < losses[0] and int(kfac_state(state).skipped) == 0
    for name in ("w", "v", "b"):
        np.testing.assert_array_equal(new[name][0], p[name][0])
        assert np.isfinite(new[name]).all()
        assert (new[name][1:] != p[name][1:]).any()


def test_rows_taken_whole_and_squares(rng):
    """No part of the rows is taken; squares where rows are examples."""
    network, p, x, y = problem("rescaled", rng)
    loss = loss_of(network)
    whole = kfac.tag(loss, p, x, y)
    part = kfac.tag(loss, p, x, y, subsample=kfac.Subsample(examples=2))
    run = lambda tagged: jax.jit(tagged.value_and_grad)(p, x, y)[-1]["w"]  # noqa: E731
    close(run(part), run(whole))

    def one_after_the_other(p, x, y):
        z = lax.ragged_dot(x, p["w"], jnp.array([3, 4, 5], jnp.int32))
        z = z + lax.ragged_dot(jnp.sin(x), p["w"], jnp.array([5, 0, 6], jnp.int32))
        z = kfac.normal(jnp.tanh(z))
        return 0.5 * jnp.sum((z - y) ** 2, -1).mean()

    y = jnp.asarray(rng.normal(size=(N, H)))
    args = {"w": p["w"]}, x, y
    tagged = kfac.tag(one_after_the_other, *args, statistics="squares")
    found = jax.jit(tagged.value_and_grad)(*args)[-1]
    zero = jnp.zeros_like(p["w"])

    def of_example(n):
        only = jnp.arange(N) == n

        def loss(w):
            z = lax.ragged_dot(x, w, jnp.array([3, 4, 5], jnp.int32))
            z += lax.ragged_dot(jnp.sin(x), w, jnp.array([5, 0, 6], jnp.int32))
            return 0.5 * jnp.sum((jnp.tanh(z) - y) ** 2, -1) @ only

        return jax.grad(loss)(p["w"])

    wanted = sum(of_example(n) ** 2 for n in range(N)) / N + zero
    close(found["w"].squares, wanted, 1e-9)


def there_and_back(p, x, hook=None):
    """Two layers in a loop; in each a weight and its transpose."""
    ids = jnp.argmax(x[:, :E], -1)
    order, sizes = sent(ids)

    def step(h, w, name):
        own = ids[order]
        z = jnp.tanh(product(h, w, own, sizes, hook, name))
        return h + product(z, jnp.swapaxes(w, 1, 2), own, sizes, hook, name + " back")

    h = x[order]
    if hook is None:
        h = lax.scan(lambda h, w: (step(h, w, ""), None), h, p["w"])[0]
    else:
        h = step(step(h, p["w"][0], "0"), p["w"][1], "1")
    return h[jnp.argsort(order)]


def test_tied_and_stacked(rng):
    p = parameters(rng, w=(2, E, D, H))
    x, y = (jnp.asarray(rng.normal(size=(N, D))) for _ in range(2))
    tagged = kfac.tag(loss_of(there_and_back), p, x, y)
    found = jax.jit(tagged.value_and_grad)(p, x, y)[-1]["w"]
    for number in (0, 1):
        forward = factors(there_and_back, f"{number}", p, x, y)
        close((found.a[number], found.g[number]), forward, 1e-9)
        reverse = factors(there_and_back, f"{number} back", p, x, y)
        close((found.a_out[number], found.g_out[number]), reverse, 1e-9)


# ---------------------------------------------------------------- capacities


SLOTS = 4


def dispatch(x):
    """One-hot places ``[N, E, SLOTS]``: which slot of which expert a row gets."""
    chosen = jax.nn.one_hot(jnp.argmax(x[:, :E], -1), E)
    place = jnp.cumsum(chosen, 0) * chosen - 1
    return jax.nn.one_hot(place.astype(int), SLOTS) * chosen[..., None]


def with_capacity(p, x, hook=None):
    """Experts with few places; rows that find none are left out, places stay empty."""
    places = dispatch(lax.stop_gradient(x))
    hook = hook or (lambda name, inputs, ids, z: z)
    h = jnp.einsum("nd,nes->esd", x, places)
    ids = jnp.arange(E)[:, None].repeat(SLOTS, 1).ravel()
    h = hook("w", h.reshape(-1, D), ids, jnp.einsum("esd,edh->esh", h, p["w"]))
    h = jnp.tanh(h + p["b"][:, None])
    z = jnp.einsum("esh,ehc->esc", h, p["v"])
    z = hook("v", h.reshape(-1, H), ids, z)
    return jnp.einsum("esc,nes->nc", z, places) + x[:, :C]


def test_empty_places_do_not_count(rng):
    p = parameters(rng, **SHAPES["biased"])
    x, y = (jnp.asarray(rng.normal(size=(N, d))) for d in (D, C))
    filled = dispatch(x).sum((0, 2))
    assert filled.min() < SLOTS
    loss = loss_of(with_capacity)
    tagged = kfac.tag(loss, p, x, y)
    notes = {t.name: t.note for t in tagged.layers}
    assert notes == {"w": "", "v": ""}
    value, grads, found = jax.jit(tagged.value_and_grad)(p, x, y)
    close((value, grads), jax.value_and_grad(loss)(p, x, y), 1e-10)
    a, g = factors(with_capacity, "v", p, x, y, seen_only=True)
    close((found["v"].a, found["v"].g), (a, g), 1e-9)
    a, g = factors(with_capacity, "w", p, x, y, seen_only=True)
    close((found["w"].a[:, :-1, :-1], found["w"].g), (a, g), 1e-9)
    close(found["w"].a[:, -1, -1], np.asarray(filled) / N, 1e-12)


def test_members_are_not_applied_once(rng):
    """An ensemble with batches of its own: no member's rows are all the terms."""
    p = parameters(rng, w=(E, D, C))
    x, y = (jnp.asarray(rng.normal(size=(E, 5, d))) for d in (D, C))
    tagged = kfac.tag(loss_of(lambda p, x: jax.vmap(jnp.matmul)(x, p["w"])), p, x, y)
    assert tagged.layers[0].note == ""
