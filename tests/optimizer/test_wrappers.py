"""Optax's wrappers around K-FAC and line searches behind it, against their algorithms.

Wrappers that hand no further arguments on are called around a transformation that has
its statistics already.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests.helpers import batches_of, close, first_pass, kfac_state, train
from tests.models import BY_NAME

MODEL = BY_NAME["mlp"]
STEPS = 6


def made():
    """The tagged loss, its parameters, batches, and an optimiser with momentum."""
    tagged = first_pass("mlp")[0]
    tx = kfac.kfac(tagged.layers, 0.05, damping=0.1)
    return tagged, MODEL.params(), batches_of(MODEL, STEPS), tx


def bound(tx, statistics):
    """The transformation with its statistics."""
    update = functools.partial(tx.update, statistics=statistics)
    return optax.GradientTransformation(tx.init, update)


@functools.partial(jax.jit, static_argnums=(0, 1))
def plain_step(tagged, tx, params, state, at, *batch):
    """K-FAC's update of ``params`` by gradient and statistics at ``at``."""
    _, grads, statistics = tagged.value_and_grad(at, *batch, opt_state=state)
    updates, state = tx.update(grads, state, params, statistics=statistics)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("reset", [False, True])
def test_lookahead(reset):
    """Fast parameters go on; every other step slow ones follow by half."""
    tagged, params, batches, tx = made()
    wrapped = functools.partial(
        optax.lookahead, sync_period=2, slow_step_size=0.5, reset_state=reset
    )

    @jax.jit
    def step(both, state, *batch):
        _, grads, statistics = tagged.value_and_grad(both.fast, *batch, opt_state=state)
        around = wrapped(bound(tx, statistics))
        updates, state = around.update(grads, state, both)
        return optax.apply_updates(both, updates), state

    both = optax.LookaheadParams.init_synced(params)
    seen = wrapped(tx).init(both)
    slow = fast = params
    state = tx.init(params)
    for number, batch in enumerate(batches):
        both, seen = step(both, seen, *batch)
        fast, state = plain_step(tagged, tx, fast, state, fast, *batch)
        if number % 2:
            fast = slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
            state = tx.init(params) if reset else state
    close(both.fast, fast, 1e-8)
    close(both.slow, slow, 1e-8)
    assert int(kfac_state(seen).count) == (0 if reset else STEPS)


def test_sharpness_aware_minimisation():
    """Every other step goes uphill; K-FAC sees gradient and statistics found there."""
    tagged, params, batches, tx = made()
    uphill = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))

    @jax.jit
    def step(params, state, *batch):
        _, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
        around = optax.contrib.sam(bound(tx, statistics), uphill)
        updates, state = around.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    seen, around = params, optax.contrib.sam(tx, uphill).init(params)
    wanted, state, gradient = params, tx.init(params), jax.jit(jax.grad(tagged))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        for batch in (first, second):
            seen, around = step(seen, around, *batch)
        grads = gradient(wanted, *first)
        far = 0.1 / optax.tree.norm(grads)
        at = jax.tree.map(lambda p, g, far=far: p + far * g, wanted, grads)
        wanted, state = plain_step(tagged, tx, wanted, state, at, *second)
    close(seen, wanted, 1e-8)
    assert int(kfac_state(around).count) == STEPS // 2


SEARCHES = {
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(10),
    "zoom": lambda: optax.scale_by_zoom_linesearch(10),
}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("how", ["plain", "accepted", "bound", "named", "nested"])
def test_line_search(name, how):
    """The search sees K-FAC's direction, the value and the gradient."""
    tagged, params, batches, _ = made()
    batch = batches[0]
    tx = kfac.kfac(tagged.layers, 1.0, damping=0.1, momentum=None, kl_clip=None)
    search = SEARCHES[name]()

    def value_fn(params):
        return tagged(params, *batch)

    def accepting(params, statistics=None):
        assert statistics is not None
        return value_fn(params)

    def chained(tx):
        if how == "named":
            return optax.named_chain(("kfac", tx), ("search", search))
        if how == "nested":
            return optax.chain(optax.chain(optax.identity(), tx), search)
        return optax.chain(tx, search)

    def together(grads, statistics, state, params, more):
        more |= {"value_fn": accepting} if how == "accepted" else {}
        if how == "bound":
            return chained(bound(tx, statistics)).update(grads, state, params, **more)
        more["statistics"] = statistics
        return chained(tx).update(grads, state, params, **more)

    @jax.jit
    def step(params, state):
        value, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state
        )
        more = {"value": value, "grad": grads, "value_fn": value_fn}
        updates, state = together(grads, statistics, state, params, more)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def apart(params, state, found):
        value, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state
        )
        d, state = tx.update(grads, state, params, statistics=statistics)
        u, found = search.update(
            d, found, params, value=value, grad=grads, value_fn=value_fn
        )
        return optax.apply_updates(params, u), state, found

    seen, state, values = params, chained(tx).init(params), []
    wanted, own, found = params, tx.init(params), search.init(params)
    for _ in range(3):
        seen, state, value = step(seen, state)
        wanted, own, found = apart(wanted, own, found)
        values.append(float(value))
    close(seen, wanted, 1e-10)
    assert values == sorted(values, reverse=True)


def test_flatten_is_refused():
    tagged, params, _, tx = made()
    with pytest.raises(ValueError, match=r"one vector of \d+ entries, as optax.fl"):
        optax.flatten(tx).init(params)
    behind = optax.chain(tx, optax.flatten(optax.clip_by_global_norm(0.1)))
    before = optax.chain(optax.flatten(optax.clip_by_global_norm(0.1)), tx)
    for chain in (behind, before):
        train(tagged, chain, params, batches_of(MODEL, 1))


def test_a_single_vector_of_parameters_is_no_flattened_tree():
    """A model whose parameters are one vector stays one."""
    x = jnp.ones((3, 2))
    loss = lambda w, x: jnp.mean(kfac.normal(x @ w) ** 2)  # noqa: E731
    w = jnp.ones(2)
    kfac.kfac(kfac.tag(loss, w, x), 0.1).init(w)


def test_statistics_that_a_wrapper_held_back():
    tagged, params, batches, tx = made()
    both = optax.LookaheadParams.init_synced(params)
    around = optax.lookahead(tx, 2, 0.5)
    state = around.init(both)
    grads = jax.grad(tagged)(params, *batches[0])
    with pytest.raises(ValueError, match="optax.lookahead, optax.contrib.sam"):
        around.update(grads, state, both)


# ------------------------------------------------------------------- weight decay

MASKS = {
    "none": None,
    "tree": {"layer0": {"kernel": True, "bias": False}, "layer1": False},
    "function": lambda p: jax.tree.map(lambda x: np.ndim(x) > 1, p),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masked_weight_decay_is_optax_own(mask):
    """Without momentum the update is K-FAC's, less the decayed weights."""
    tagged, params, batches, _ = made()
    options = {"damping": 0.1, "momentum": None, "kl_clip": None}
    tx = kfac.kfac(tagged.layers, 0.05, weight_decay=0.3, mask=MASKS[mask], **options)
    decay = optax.add_decayed_weights(0.3, MASKS[mask])
    tail = optax.chain(decay, optax.scale_by_learning_rate(0.05))
    other = optax.chain(kfac.scale_by_kfac(tagged.layers, damping=0.1), tail)
    seen, wanted = (train(tagged, t, params, batches)[0] for t in (tx, other))
    close(seen, wanted, 1e-10)
    plain = train(tagged, kfac.kfac(tagged.layers, 0.05, **options), params, batches)
    assert float(jnp.abs(plain[0]["layer0"]["kernel"] - seen["layer0"]["kernel"]).max())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("rate", "damping"), [("auto", 0.1), (0.05, kfac.damping.levenberg_marquardt(0.1))]
)
def test_masked_weight_decay_beside_the_quadratic_model(mask, rate, damping):
    """``d`` is that without decay, less ``α β θ`` where the mask says so."""
    tagged, params, batches, _ = made()

    def first(**options):
        tx = kfac.kfac(tagged.layers, rate, damping=damping, **options)
        state = tx.init(params)
        _, grads, statistics = tagged.value_and_grad(params, *batches[0])
        model = kfac.quadratic_model(tagged, params, *batches[0])
        return tx.update(grads, state, params, statistics=statistics, model=model)

    without, state = first()
    seen, _ = first(weight_decay=0.3, mask=MASKS[mask])
    scale = -0.3 * float(state.learning_rate)
    decay = optax.add_decayed_weights(scale, MASKS[mask])
    wanted, _ = decay.update(without, decay.init(params), params)
    close(seen, wanted, 1e-7)


# ----------------------------------------------------------- the tagged loss itself


def test_a_tagged_loss_in_place_of_its_layers():
    tagged, params, batches, _ = made()
    for make in (kfac.scale_by_kfac, functools.partial(kfac.kfac, learning_rate=0.1)):
        pair = [
            train(tagged, make(x), params, batches[:2]) for x in (tagged, tagged.layers)
        ]
        close(pair[0][0], pair[1][0], 0)


def test_a_tagged_loss_can_be_called():
    tagged, params, batches, _ = made()
    value, grads = jax.value_and_grad(tagged)(params, *batches[0])
    wanted = tagged.value_and_grad(params, *batches[0])
    close((value, grads), wanted[:2], 1e-12)


def test_numbers_in_the_state_beside_a_tagged_loss():
    """``inject_hyperparams`` calls whatever can be called, as a schedule."""
    tagged, params, batches, _ = made()
    inject = optax.inject_hyperparams(kfac.kfac)
    pair = [
        train(tagged, inject(x, learning_rate=0.1), params, batches[:2])
        for x in (tagged, tagged.layers)
    ]
    close(pair[0][0], pair[1][0], 0)
