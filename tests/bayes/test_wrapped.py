"""Posteriors inside optax's wrappers, checkpoints, low precision; what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import kfac_jax_lite as kfac
from tests import models
from tests.helpers import batches_of, cases, close, identical

MODEL = models.BY_NAME["mlp"]
METHODS = ("cholesky", "ekfac", "vogn", "ivon")
DATA = 64


@functools.cache
def tagged_loss(name, dtype="float64"):
    """The small network's loss, as a method wants it."""
    statistics = "squares" if name == "vogn" else "factors"
    return MODEL.tag(4, jnp.dtype(dtype), statistics=statistics)


def optimiser(name, rate=0.05, **more):
    """A method's optimiser."""
    layers = tagged_loss(name).layers
    if name == "ivon":
        return kfac.bayes.ivon(DATA, rate, **more)
    if name == "vogn":
        return kfac.bayes.vogn(layers, DATA, rate, **more)
    return kfac.bayes.noisy_kfac(layers, DATA, rate, inverse=name, **more)


def make_step(name, tx, dtype="float64"):
    """A compiled step."""
    tagged = tagged_loss(name, dtype)

    @jax.jit
    def step(params, state, key, *batch):
        _, grads, statistics = kfac.bayes.value_and_grad(
            tagged, params, *batch, opt_state=state, key=key
        )
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state

    return step


def train(name, tx, steps=2, params=None, state=None, start=0, dtype="float64"):
    """Parameters and state after some steps."""
    step = make_step(name, tx, dtype)
    params = MODEL.params(jnp.dtype(dtype)) if params is None else params
    state = tx.init(params) if state is None else state
    batches = batches_of(MODEL, start + steps, dtype=jnp.dtype(dtype))
    keys = jax.random.split(jax.random.key(0), 8)
    for i in range(start, start + steps):
        params, state = step(params, state, keys[i], *batches[i])
    return params, state


KEY = jax.random.key(7)

# ---------------------------------------------------------------- wrappers

WRAPPERS = {
    "chain": lambda name: optax.chain(
        optax.identity(), optimiser(name), optax.identity()
    ),
    "multi_steps": lambda name: optax.MultiSteps(
        optimiser(name), 1, accumulator_dtype=jnp.float64
    ),
    "masked": lambda name: optax.masked(optimiser(name), lambda p: jax.tree.map(
        lambda _: True, p)),
    "apply_if_finite": lambda name: optax.apply_if_finite(optimiser(name), 3),
}  # fmt: skip
EVERY = [(name, wrapper) for name in METHODS for wrapper in WRAPPERS]
FAST = [("vogn", "multi_steps"), ("ivon", "chain")]


@pytest.mark.parametrize(("name", "wrapper"), cases(EVERY, FAST))
def test_the_posterior_is_found_in_any_wrapper(name, wrapper):
    """Training and draws are those of the optimiser without the wrapper."""
    params, state = train(name, WRAPPERS[wrapper](name))
    plain_params, plain_state = train(name, optimiser(name))
    close(params, plain_params, 1e-7)
    seen = kfac.bayes.sample(state, params, KEY, num_samples=3)
    wanted = kfac.bayes.sample(plain_state, plain_params, KEY, num_samples=3)
    close(seen, wanted, 1e-7)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).min(), seen, params)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_injected_hyperparameters():
    """A learning rate in the state, to be changed from outside."""
    layers = tagged_loss("cholesky").layers
    make = optax.inject_hyperparams(
        kfac.bayes.noisy_kfac, static_args=["num_data", "prior_precision",
                                            "temperature", "augmentation"],
    )  # fmt: skip
    tx = make(layers, num_data=DATA, learning_rate=0.05, prior_precision=2.0)
    params, state = train("cholesky", tx)
    plain = train("cholesky", optimiser("cholesky", prior_precision=2.0))
    close(params, plain[0], 1e-6)
    close(kfac.bayes.sample(state, params, KEY),
          kfac.bayes.sample(plain[1], params, KEY), 1e-6)  # fmt: skip
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    still = train("cholesky", tx, 1, params, state, 2)[0]
    identical(still, params)


MASKS = {
    "layer": {"layer0": True, "layer1": False},
    "bias": {"layer0": {"kernel": True, "bias": False}, "layer1": False},
    "weight": {"layer0": {"kernel": False, "bias": True}, "layer1": True},
}


@pytest.mark.parametrize(
    ("name", "mask"),
    cases([(name, mask) for name in METHODS for mask in MASKS
           if name != "ekfac" or mask == "layer"],
          [("cholesky", "bias"), ("ivon", "layer")]),
)  # fmt: skip
def test_masked_parameters_stay_at_the_mean(name, mask):
    """Only what the optimiser sees is drawn."""
    mask = MASKS[mask]
    params, state = train(name, optax.masked(optimiser(name), mask))
    drawn = kfac.bayes.sample(state, params, KEY)

    def check(shown, mean, weights):
        for a, b in zip(*map(jax.tree.leaves, (mean, weights)), strict=True):
            assert (np.asarray(a) != np.asarray(b)).all() == shown

    jax.tree.map(check, mask, params, drawn)


@pytest.mark.slow
def test_accumulated_batches_are_one_draw_each():
    """Between the steps of ``MultiSteps`` the posterior stays."""
    tx = optax.MultiSteps(optimiser("ivon"), 2, accumulator_dtype=jnp.float64)
    params, state = MODEL.params(), tx.init(MODEL.params())
    half = train("ivon", tx, 1, params, state)
    identical(half[0], params)
    identical(kfac.bayes.sample(half[1], params, KEY),
              kfac.bayes.sample(state, params, KEY))  # fmt: skip
    whole = train("ivon", tx, 1, *half, start=1)
    assert int(whole[1].inner_opt_state.count) == 1


def test_states_without_a_posterior_or_with_two_are_refused():
    params = MODEL.params()
    adam = optax.adam(0.1).init(params)
    with pytest.raises(ValueError, match="contains 0 posteriors, wanted one"):
        kfac.bayes.sample(adam, params, KEY)
    one = optimiser("ivon").init(params)
    with pytest.raises(ValueError, match="tuple contains 2 posteriors"):
        kfac.bayes.sample((one, one), params, KEY)
    with pytest.raises(ValueError, match="contains 0 posteriors"):
        kfac.bayes.value_and_grad(
            tagged_loss("ivon"), params, *MODEL.batch(4), opt_state=adam, key=KEY
        )
    plain = kfac.kfac(tagged_loss("cholesky").layers, 0.1).init(params)
    with pytest.raises(ValueError, match="contains 0 posteriors"):
        kfac.bayes.sample(plain, params, KEY)


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("name", cases(METHODS, ["cholesky", "vogn", "ivon"]))
def test_state_and_programs_are_fixed(name):
    """One compilation; structure, shapes and dtypes stay; an abstract init."""
    tx, params = optimiser(name), MODEL.params()
    step, state = make_step(name, tx), tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(pointers) == len(set(pointers))  # each may be donated
    after, keys = state, jax.random.split(KEY, 3)
    for key, batch in zip(keys, batches_of(MODEL, 3), strict=True):
        params, after = step(params, after, key, *batch)
    assert step._cache_size() == 1
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    # Made anew, it is the same program: layers are equal by value.
    step(params, optimiser(name).init(params), keys[0], *batch)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", cases(METHODS, ["cholesky"]))
def test_orbax_resumes_bit_for_bit(name, tmp_path):
    tx, params = optimiser(name), MODEL.params(seed=7)
    half, fresh = train(name, tx, 2), (params, tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", fresh)
    identical(restored, half)
    identical(kfac.bayes.sample(restored[1], restored[0], KEY),
              kfac.bayes.sample(half[1], half[0], KEY))  # fmt: skip
    identical(train(name, tx, 2, *restored, start=2), train(name, tx, 4))


@pytest.mark.parametrize("name", cases(METHODS, ["cholesky", "vogn"]))
def test_bfloat16_parameters(name):
    """Draws and steps in their dtype, finite; factors and their roots in float32."""
    params, state = train(name, optimiser(name), dtype="bfloat16")
    drawn = kfac.bayes.sample(state, params, KEY, num_samples=2)
    for tree in (params, drawn):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
        assert all(np.isfinite(np.float32(x)).all() for x in jax.tree.leaves(tree))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state, optimiser(name).init(MODEL.params(jnp.bfloat16))
    )
    if name in ("cholesky", "ekfac"):
        held = state.roots, state.kfac.factors
    else:  # a slow average is no average in bfloat16
        held = state.gradient, state.squares if name == "vogn" else state.hessian
    assert {x.dtype for x in jax.tree.leaves(held)} == {jnp.dtype("float32")}


def test_slow_averages_move_in_bfloat16_models():
    """A thousandth of the way in a step is less than bfloat16 can tell from none."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = kfac.bayes.ivon(DATA, 0.0, initial=0.1, decay=0.999)
    state = tx.init(params)
    new = kfac.bayes.ReparameterisedStatistics({"w": jnp.full(3, 0.3, jnp.bfloat16)})
    for _ in range(3):
        _, state = tx.update(params, state, params, statistics=new)
    assert np.allclose(state.hessian["w"] - 0.1, 3 * 0.001 * 0.2, rtol=0.02)


@pytest.mark.parametrize("name", cases(METHODS, ["cholesky"]))
def test_foreign_extra_arguments_are_ignored(name):
    params, tx = MODEL.params(), optimiser(name)
    state, tagged = tx.init(params), tagged_loss(name)

    @jax.jit
    def both(params, state):
        _, grads, statistics = kfac.bayes.value_and_grad(
            tagged, params, *MODEL.batch(4), opt_state=state, key=KEY
        )
        plain = tx.update(grads, state, params, statistics=statistics)
        more = {"value": 1.0, "other": None}
        return plain, tx.update(grads, state, params, statistics=statistics, **more)

    identical(*both(params, state))


def test_report_reads_a_noisy_state():
    """``kfac.report`` finds the ``KFACState`` inside."""
    _, state = train("cholesky", optimiser("cholesky"))
    report = kfac.report(state)
    text = str(report)
    assert "layer0" in text and "layer1" in text
    inner = kfac.report(state.inner)
    assert text == str(inner)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("prior_precision", 0.0), ("temperature", -1.0), ("augmentation", 0.0),
     ("prior_precision", float("nan"))],
)  # fmt: skip
def test_numbers_of_the_posterior_must_be_positive(name, option, value):
    with pytest.raises(ValueError, match=f"{option} must be positive, got {value!r}"):
        optimiser(name, **{option: value})


OUT_OF_RANGE = [
    ("vogn", "momentum", 1.0, r"vogn: momentum must be in \[0, 1\), got 1.0"),
    ("vogn", "decay", -0.1, r"vogn: decay must be in \[0, 1\), got -0.1"),
    ("vogn", "damping", -1.0, "vogn: damping must not be negative, got -1.0"),
    ("ivon", "momentum", -0.5, r"ivon: momentum must be in \[0, 1\), got -0.5"),
    ("ivon", "decay", 1.0, r"ivon: decay must be in \[0, 1\), got 1.0"),
    ("ivon", "initial", 0.0, "ivon: initial must be positive, got 0.0"),
    ("cholesky", "momentum", 1.5, r"momentum must be in \[0, 1\), got 1.5"),
    ("cholesky", "kl_clip", 0.0, "kl_clip must be positive or None, got 0.0"),
]


@pytest.mark.parametrize(("name", "option", "value", "message"), OUT_OF_RANGE)
def test_numbers_out_of_range_name_themselves(name, option, value, message):
    with pytest.raises(ValueError, match=message):
        optimiser(name, **{option: value})


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="num_data must be positive, got 0"):
        kfac.bayes.ivon(0, 0.1)


def test_what_cannot_be_drawn_from_is_refused():
    layers = tagged_loss("cholesky").layers
    make = functools.partial(kfac.bayes.noisy_kfac, layers, DATA, 0.1)
    with pytest.raises(ValueError, match='noisy_kfac: inverse="low_rank" is not drawn'):
        make(inverse="low_rank")
    with pytest.raises(ValueError, match="inverse must be one of"):
        make(inverse="qr")
    reduction = kfac.Reduction("owner", devices=2)
    with pytest.raises(ValueError, match=r'Reduction\(mode="owner"\).*use mode="all"'):
        make(reduction=reduction, axis_name="batch")
    with pytest.raises(TypeError, match="damping"):
        make(damping="high")


@pytest.mark.parametrize("name", METHODS)
def test_updates_want_parameters_and_statistics(name):
    """Each says what is missing."""
    params, tx = MODEL.params(), optimiser(name)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"update wants params"):
        tx.update(params, state)
    with pytest.raises((ValueError, TypeError), match="statistics"):
        tx.update(params, state, params)


def test_vogn_wants_squares():
    params, tagged = MODEL.params(), tagged_loss("cholesky")
    tx = kfac.bayes.vogn(tagged.layers, DATA, 0.1)
    _, grads, statistics = jax.jit(tagged.value_and_grad)(params, *MODEL.batch(4))
    with pytest.raises(ValueError, match='tag the loss with statistics="squares"'):
        tx.update(grads, tx.init(params), params, statistics=statistics)
