"""JAX's debug switches: what ``optax.adamw`` survives, K-FAC survives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests.helpers import cases, kfac_state

WIDTH, VOCABULARY, LENGTH, EXAMPLES = 3, 5, 4, 6


@pytest.fixture(autouse=True)
def switches():
    """All of them at once."""
    with jax.debug_nans(True), jax.debug_infs(True), jax.numpy_rank_promotion("raise"):
        yield


def normalised(p, h):
    """A normalisation's scale and shift."""
    h = h - h.mean(-1, keepdims=True)
    return h * p["scale"][None, None] + p["shift"][None, None]


def loss(p, tokens, labels):
    """Every kind of layer: embedding (tied), unit-wise, scan, convolution, diagonal."""
    h = normalised(p, p["table"][tokens])

    def turn(h, w):
        return jnp.tanh(h @ w["w"] + w["b"][None, None]), None

    h, _ = jax.lax.scan(turn, h, p["stack"])
    h = jax.lax.conv_general_dilated(
        h, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    h = h * jnp.cumsum(p["odd"])[None, None]
    logits = kfac.categorical(jnp.einsum("btc,vc->btv", h, p["table"]))
    chosen = jax.nn.one_hot(labels, VOCABULARY, dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, chosen).mean()


def problem():
    """Parameters and a batch; one unit's gradient is zero, and so is one input."""
    rng = np.random.default_rng(0)
    shapes = {
        "table": (VOCABULARY, WIDTH), "scale": (WIDTH,), "shift": (WIDTH,),
        "stack": {"w": (2, WIDTH, WIDTH), "b": (2, WIDTH)},
        "conv": (3, WIDTH, WIDTH), "odd": (WIDTH,),
    }  # fmt: skip
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    make = lambda s: jnp.asarray(0.5 * rng.normal(size=s))  # noqa: E731
    params = jax.tree.map(make, shapes, is_leaf=is_shape)
    tokens = rng.integers(0, VOCABULARY - 1, (EXAMPLES, LENGTH))
    labels = rng.integers(0, VOCABULARY, (EXAMPLES, LENGTH))
    return params, (jnp.asarray(tokens), jnp.asarray(labels))


def injected(layers, **options):
    """Numbers in the state."""
    return optax.inject_hyperparams(kfac.kfac)(
        layers, learning_rate=0.05, damping=0.1, weight_decay=0.01, **options
    )


linear, adaptive = optax.linear_schedule(0.1, 0.05, 3), kfac.intervals.adaptive
RULES = {
    "fixed": lambda t, **o: kfac.kfac(t, 0.05, damping=0.1, **o),
    "schedules": lambda t, **o: kfac.kfac(
        t, linear, damping=linear, momentum=linear, kl_clip=linear,
        interval=adaptive(0.3), **o,
    ),
    "adaptive": lambda t, **o: kfac.kfac(
        t, 5.0, damping=kfac.damping.adaptive(0.1),
        interval=kfac.intervals.staleness(), **o,
    ),
    "levenberg_marquardt": lambda t, **o: kfac.kfac(
        t, 0.05, damping=kfac.damping.levenberg_marquardt(interval=1), **o
    ),
    "auto": lambda t, **o: kfac.kfac(t, "auto", damping=0.1, **o),
    "inject": injected,
    "scale_by_kfac": lambda t, **o: kfac.scale_by_kfac(
        t, damping=kfac.damping.adaptive(), **o
    ),
}  # fmt: skip
METHODS = ("cholesky", "newton_schulz", "auto", "eigh", "ekfac", "low_rank")
FISHERS = ("empirical", "mc", "exact")
EVERYTHING = list(itertools.product(FISHERS, METHODS, RULES))
# Each of them once.
SOME = [
    (fisher, method, rule)
    for fisher, method, rule, _ in zip(
        itertools.cycle(FISHERS), itertools.cycle(METHODS), RULES, range(7)
    , strict=False)
]  # fmt: skip


def train(fisher, method, rule, params, batch, jit):
    """A few steps; the table of layers and the state."""
    tagged = kfac.tag(loss, params, *batch, fisher=fisher)
    tx = RULES[rule](tagged.layers, inverse=method)
    state = tx.init(params)

    def step(params, state, key):
        _, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state, key=key
        )
        more = {"statistics": statistics}
        if rule in ("auto", "levenberg_marquardt"):
            more["model"] = kfac.quadratic_model(tagged, params, *batch)
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step) if jit else step
    for key in jax.random.split(jax.random.key(0), 3):
        params, state = run(params, state, key)
    return tagged, state


def test_the_program_is_one_that_adamw_survives():
    params, batch = problem()
    tx = optax.adamw(0.1)
    updates, _ = tx.update(jax.grad(loss)(params, *batch), tx.init(params), params)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(("fisher", "method", "rule"), cases(EVERYTHING, SOME))
def test_a_compiled_step(fisher, method, rule):
    _, state = train(fisher, method, rule, *problem(), True)
    assert int(kfac_state(state).clock.failures.sum()) == 0
    numbers = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert all(bool(jnp.isfinite(x).all()) for x in numbers)


EAGER = [SOME[2], SOME[4]]


@pytest.mark.parametrize(("fisher", "method", "rule"), cases(EVERYTHING, EAGER))
def test_an_eager_step(fisher, method, rule):
    tagged, state = train(fisher, method, rule, *problem(), False)
    kinds = {layer.kind for layer in tagged.layers}
    assert kinds >= {"dense", "conv", "embedding", "scale_shift", "diagonal"}
    for record in kfac.report(state):
        assert record["diff"] is None or record["diff"] < 1e30
