"""Statistics that ``update`` computes inside its gate: the same numbers, no zeros."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import batches_of, cases, close, kfac_state, train_step
from tests.optimizer.test_hlo import BATCH, WIDE, called, computations
from tests.parallel import DEVICES, REDUCTIONS, run
from tests.statistics.test_masks import MASK, masked_loss
from tests.tagging.test_tied import autoencoder, tagged_loss

STEPS = 5
FISHERS = ("empirical", "mc", "exact")
RULES = {
    "every": kfac.intervals.every(2),
    "adaptive": kfac.intervals.adaptive(1.5, "elapsed"),
}


def language(p, ids, y):
    """A character model: a table, a head with a term per token."""
    z = kfac.categorical(jnp.tanh(p["table"][ids]) @ p["w"] + p["b"])
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def problem(name, rng, **options):
    """``(tagged, params, batches)`` of a network of the table or of one below."""

    def arrays(**shapes):
        return {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}

    def inputs(*shape):
        return [jnp.asarray(rng.normal(size=shape)) for _ in range(STEPS)]

    def labels(*shape):
        return [jnp.asarray(rng.integers(0, 5, shape)) for _ in range(STEPS)]

    if name == "language":
        params = arrays(table=(5, 4), w=(4, 5), b=5)
        batches = list(zip(labels(4, 3), labels(4, 3), strict=True))
        return kfac.tag(language, params, *batches[0], **options), params, batches
    if name == "masked":
        params = arrays(w=(3, 4), b=4, s=4, v=(4, 5))
        batches = [(x, y, MASK) for x, y in zip(inputs(4, 3, 3), labels(4, 3))]  # noqa: B905
        return kfac.tag(masked_loss, params, *batches[0], **options), params, batches
    if name == "tied":
        params = arrays(table=(5, 3), bias=3, after=5)
        batches = [(x,) for x in inputs(4, 5)]
        return tagged_loss(autoencoder, params, *batches[0], **options), params, batches
    model = models.BY_NAME[name]
    return model.tag(4, **options), model.params(), batches_of(model, STEPS)


def result(tagged, tx, params, batches, deferred):
    """Parameters, state and values after every batch."""
    step = jax.jit(train_step(tagged, tx, deferred=deferred))
    state, values = tx.init(params), []
    for i, batch in enumerate(batches):
        key = jax.random.key(i) if tagged.fisher == "mc" else None
        params, state, value = step(params, state, *batch, key=key)
        values.append(value)
    return params, state, values


def results(*record):
    """The same, eager and deferred."""
    return [result(*record, deferred) for deferred in (False, True)]


def check(tagged, params, batches, rule="every", tolerance=1e-12, **options):
    """Both ways make the same parameters and the same state."""
    tx = kfac.kfac(
        tagged.layers, 0.05, damping=0.01, interval=RULES[rule], inverse_interval=3,
        **options,
    )  # fmt: skip
    eager, deferred = results(tagged, tx, params, batches)
    close(deferred, eager, tolerance)
    clock = kfac_state(deferred[1]).clock
    assert clock.refreshes.tolist() == kfac_state(eager[1]).clock.refreshes.tolist()
    assert 0 < int(clock.refreshes.min()) <= int(clock.refreshes.max()) < STEPS


# ---------------------------------------------------------------- the same numbers


EVERY = list(itertools.product(["mlp", "conv2d"], FISHERS, RULES))
FAST = [("mlp", "mc", "every"), ("mlp", "exact", "adaptive")]
FAST += [("conv2d", "empirical", "adaptive")]


@pytest.mark.parametrize(("name", "fisher", "rule"), cases(EVERY, FAST))
def test_five_steps_of_every_fisher_and_rule(name, fisher, rule, rng):
    check(*problem(name, rng, fisher=fisher), rule)


NAMES = ["language", "masked", "tied", "recurrent", "remat", "twice", "cond"]
NAMES += ["layer_norm", "grouped_nchw", "heads_out"]
KINDS = list(itertools.product(NAMES, FISHERS))
FAST_KINDS = [("language", "empirical"), ("masked", "mc"), ("tied", "empirical")]
FAST_KINDS += [("cond", "empirical"), ("layer_norm", "empirical")]


@pytest.mark.parametrize(("name", "fisher"), cases(KINDS, FAST_KINDS))
def test_every_kind_of_layer(name, fisher, rng):
    check(*problem(name, rng, fisher=fisher))


BASES = list(itertools.product(["mlp", "conv2d"], ["ekfac", "low_rank"], FISHERS[:2]))
FAST_BASES = [("mlp", "ekfac", "mc"), ("mlp", "low_rank", "empirical")]


@pytest.mark.parametrize(("name", "inverse", "fisher"), cases(BASES, FAST_BASES))
def test_bases_kept_in_the_state(name, inverse, fisher, rng):
    check(*problem(name, rng, fisher=fisher), inverse=inverse)


@pytest.mark.parametrize("fisher", cases(["empirical", "mc"], ["empirical"]))
def test_a_part_of_the_rows(fisher, rng):
    some = kfac.Subsample(examples=2, positions=2)
    check(*problem("conv2d", rng, fisher=fisher, subsample=some))


def test_reduced_weight_sharing(rng):
    check(*problem("heads_out", rng, weight_sharing="reduce"))


def test_bfloat16_models():
    """The same to the last bit of the parameters."""
    model = models.BY_NAME["mlp"]
    params, batches = model.params(jnp.bfloat16), batches_of(model, 3, 4, jnp.bfloat16)
    tagged = model.tag(4, jnp.bfloat16)
    check(tagged, params, batches, tolerance=1e-6)


def test_auxiliary_output(rng):
    model = models.BY_NAME["mlp"]
    batches = batches_of(model, STEPS)

    def loss(params, x, y):
        return model.loss(params, x, y), {"mean": x.mean()}

    tagged = kfac.tag(loss, model.params(), *batches[0], has_aux=True)
    check(tagged, model.params(), batches)


def test_outside_jit(rng):
    """Step by step in Python, and against the compiled step."""
    tagged, params, batches = problem("mlp", rng)
    tx = kfac.kfac(tagged.layers, 0.05, interval=RULES["every"])
    batches = batches[:3]
    wanted = result(tagged, tx, params, batches, True)
    step, p, state = train_step(tagged, tx, deferred=True), params, tx.init(params)
    for batch in batches:
        p, state, _ = step(p, state, *batch)
    close((p, state), wanted[:2], 1e-10)


def test_without_a_state_everything_is_due(rng):
    """``opt_state`` left out: computed at every refresh all the same."""
    tagged, params, (batch, *_) = problem("mlp", rng)
    tx = kfac.scale_by_kfac(tagged.layers, damping=0.01)

    def step(deferred):
        _, grads, found = tagged.value_and_grad(params, *batch, deferred=deferred)
        return tx.update(grads, tx.init(params), params, statistics=found)

    close(jax.jit(step, static_argnums=0)(True), step(False), 1e-12)


WRAPPED = ["multi_steps", "finite", "injected", "chain"]


@pytest.mark.parametrize("name", cases(WRAPPED, ["multi_steps", "injected"]))
def test_any_other_transformation_around_it(name, rng):
    """optax's wrappers hand deferred statistics on as they are."""
    tagged, params, batches = problem("mlp", rng)
    make = functools.partial(kfac.kfac, interval=RULES["every"], inverse_interval=3)
    plain = make(tagged.layers, 0.05, damping=0.01)
    tx = {
        "multi_steps": optax.MultiSteps(plain, 2, accumulator_dtype=jnp.float64),
        "finite": optax.apply_if_finite(plain, 3),
        "injected": optax.inject_hyperparams(make)(
            tagged.layers, learning_rate=0.05, damping=0.01
        ),
        "chain": optax.chain(optax.clip_by_global_norm(10.0), plain),
    }[name]
    eager, deferred = results(tagged, tx, params, batches)
    close(deferred, eager, 1e-12)
    wanted = 2 if name == "multi_steps" else STEPS
    assert int(kfac_state(deferred[1]).count) == wanted


@pytest.mark.parametrize("fisher", cases(["empirical", "mc"], ["mc"]))
def test_the_automatic_learning_rate(fisher, rng):
    tagged, params, batches = problem("mlp", rng, fisher=fisher)
    rule = kfac.damping.levenberg_marquardt(1.0, interval=2)
    tx = kfac.kfac(tagged.layers, "auto", damping=rule, interval=RULES["every"])

    def step(params, state, batch, key, deferred):
        value, grads, statistics = tagged.value_and_grad(
            params, *batch, opt_state=state, key=key, deferred=deferred
        )
        model = kfac.quadratic_model(tagged, params, *batch)
        updates, state = tx.update(
            grads, state, params, statistics=statistics, model=model
        )
        return optax.apply_updates(params, updates), state, value

    found = []
    for deferred in (False, True):
        jitted = jax.jit(functools.partial(step, deferred=deferred))
        p, state = params, tx.init(params)
        for i, batch in enumerate(batches):
            p, state, _ = jitted(p, state, batch, jax.random.key(i))
        found.append((p, state))
    # The quadratic model is solved in float32.
    close(found[1], found[0], 1e-6)


@pytest.mark.parametrize("fisher", cases(FISHERS, ["empirical"]))
def test_bad_batches_are_rejected_alike(fisher, rng):
    tagged, params, batches = problem("mlp", rng, fisher=fisher)
    x, *rest = batches[2]
    batches[2] = x.at[1, 0].set(jnp.nan), *rest
    tx = kfac.kfac(tagged.layers, 0.05, damping=0.01, interval=RULES["every"])
    eager, deferred = results(tagged, tx, params, batches)
    close(deferred[:2], eager[:2], 1e-12)
    assert int(kfac_state(deferred[1]).skipped) == 1
    if fisher != "mc":  # its keys go by the step
        clean = result(tagged, tx, params, batches[:2] + batches[3:], True)
        close(deferred[0], clean[0], 1e-12)


# ---------------------------------------------------------------- several devices

OVER_DEVICES = [
    ("pmap", "all", "empirical", pytest.mark.slow),
    ("shard_map", "gradients", "mc", pytest.mark.slow),
    ("checked", "all", "exact", pytest.mark.slow),
    ("checked", "inverses", "empirical", ()),
    ("auto", "all", "mc", pytest.mark.slow),
    ("auto", "gradients", "empirical", pytest.mark.slow),
    ("explicit", "all", "empirical", ()),
    ("explicit", "gradients", "exact", pytest.mark.slow),
]


def over_devices():
    """Every mode and kind of reduction; two of them in the fast suite."""
    return [pytest.param(*case[:3], marks=case[3]) for case in OVER_DEVICES]


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
@pytest.mark.parametrize(("mode", "reduction", "fisher"), list(over_devices()))
def test_many_devices(mode, reduction, fisher):
    """Eager and deferred in one mode; that modes agree is tested elsewhere."""
    options = {"fisher": fisher, "key": jax.random.key(0)}
    record = (models.BY_NAME["mlp"], mode, REDUCTIONS[reduction], STEPS)
    eager = run(*record, **options)
    deferred = run(*record, deferred=True, **options)
    close(jax.device_get(deferred), jax.device_get(eager), 1e-10)


# ---------------------------------------------------------------- what is written

IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "call"}
RESULT = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")


def factor_sized(entry, found, sizes):
    """Instructions outside loops that write a matrix of the size of a factor."""
    written, seen, waiting = [], set(), [entry]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in found[name]:
            result = RESULT.search(line)
            if result is None or result[2] == "while":
                continue
            if result[2] not in IN_PLACE:
                shapes = [f"[{d},{d}]" for d in sizes]
                written += [line] if any(s in result[1] for s in shapes) else []
            if result[2] in ("call", "conditional"):
                waiting += called(line, found)
    return written


@pytest.mark.parametrize("fisher", cases(FISHERS, ["empirical"]))
def test_a_step_with_nothing_due_writes_no_factor(fisher):
    """Outside the gates no instruction has a result of the size of a factor."""
    tagged = WIDE.tag(BATCH, fisher=fisher)
    params, batch = WIDE.params(), WIDE.batch(BATCH)
    tx = kfac.kfac(
        tagged.layers, 0.05, interval=kfac.intervals.every(10), inverse_interval=10
    )
    sizes = {d for layer in tagged.layers for d in (*layer.a_shape, *layer.g_shape)}
    written = {}
    for deferred in (False, True):
        step = jax.jit(train_step(tagged, tx, deferred=deferred), donate_argnums=(1,))
        key = jax.random.key(0)
        lowered = step.lower(params, tx.init(params), *batch, key=key)
        found, entry = computations(lowered.compile().as_text())
        written[deferred] = factor_sized(entry, found, sizes)
    assert written[True] == []
    assert len(written[False]) >= len(tagged.layers)


# ---------------------------------------------------------------- misuse


def test_they_cannot_be_read():
    model = models.BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))
    statistics = model.tag(4).value_and_grad(*args, deferred=True)[2]
    for read in (lambda: statistics["layer0"], lambda: list(statistics)):
        with pytest.raises(TypeError, match=r"value_and_grad without deferred=True"):
            read()


def test_they_cannot_be_returned():
    model = models.BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))
    run = functools.partial(model.tag(4).value_and_grad, deferred=True)
    with pytest.raises(TypeError, match="Deferred"):
        jax.jit(run)(*args)


def test_they_belong_to_one_traced_step():
    model = models.BY_NAME["mlp"]
    tagged, params, kept = model.tag(4), model.params(), []
    tx = kfac.scale_by_kfac(tagged.layers)

    @jax.jit
    def first(params, x, y):
        _, grads, statistics = tagged.value_and_grad(params, x, y, deferred=True)
        kept.append(statistics)
        return grads

    grads = first(params, *model.batch(4))
    with pytest.raises(jax.errors.UnexpectedTracerError):
        tx.update(grads, tx.init(params), params, statistics=kept[0])


def test_values_are_numbers_all_the_same():
    """Loss and gradient do not wait for anything."""
    model = models.BY_NAME["mlp"]
    args = (model.params(), *model.batch(4))
    value, grads, _ = model.tag(4).value_and_grad(*args, deferred=True)
    close((value, grads), jax.value_and_grad(model.plain_loss)(*args), 1e-12)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(grads))
