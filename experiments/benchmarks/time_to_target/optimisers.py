"""The optimisers, each compiled once per task.

Hyper-parameters are arguments of the compiled step, so that all trials and seeds of an
optimiser share a program. Every learning rate grows linearly over the first twentieth
of its horizon and falls on a cosine to a twentieth of the highest, where it stays.

References:
    Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks";
    Liu et al., 2025, arXiv:2502.16982, Sec. 2.2 (Muon's steps as large as AdamW's);
    Vyas et al., 2024, arXiv:2409.11321 (SOAP).
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.common import timed, without_paths
from experiments.benchmarks.time_to_target.peer import peer_program
from experiments.benchmarks.time_to_target.problems import Problem
from experiments.benchmarks.time_to_target.schedule import rate_at
from experiments.tuning.optimisers import MUON_RMS, kernels

MOMENTUM = 0.9
GROWTH = 5


class Program(NamedTuple):
    """An optimiser that is ready to run."""

    # Values to the seconds of tracing, tagging and compiling what they need; called
    # before a run, outside its clock.
    prepare: Callable[[dict[str, Any]], float]
    # Initial parameters and values to the optimiser's state.
    start: Callable[[Any, dict[str, Any]], Any]
    # ``(carry, values, number, batch, key) -> carry`` with the carry ``(params,
    # model_state, state)``, which is donated, and steps from 0.
    step: Callable[..., tuple[Any, Any, Any]]


class MissingError(Exception):
    """Another project's optimiser that cannot be imported: a fact, not a failure."""


# ``(learning rate, values) -> optimiser``; both may be traced.
MakeTx = Callable[[Any, dict[str, Any]], optax.GradientTransformation]


def make_sgd(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum and decoupled weight decay."""
    return optax.chain(
        optax.trace(MOMENTUM),
        optax.add_decayed_weights(values["weight_decay"]),
        optax.scale_by_learning_rate(rate),
    )


def make_adamw(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    """AdamW."""
    return optax.adamw(rate, b2=values["beta2"], weight_decay=values["weight_decay"])


def make_muon(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    """Muon for kernels, a convolution's as a matrix; Adam for everything else."""
    return optax.contrib.muon(
        rate,
        weight_decay=values["weight_decay"],
        adam_b2=values["beta2"],
        adam_weight_decay=values["weight_decay"],
        muon_weight_dimension_numbers=kernels,
        consistent_rms=MUON_RMS,
    )


def make_soap(rate: Any, values: dict[str, Any]) -> optax.GradientTransformation:
    """SOAP of the package soap_jax, with its own defaults for the rest."""
    soap = import_soap()
    return soap.soap(rate, b2=values["beta2"], weight_decay=values["weight_decay"])


def import_soap() -> ModuleType:
    """The package soap_jax."""
    try:
        return importlib.import_module("soap_jax")
    except ImportError as error:
        raise MissingError(without_paths(str(error))) from error


def optax_program(problem: Problem, make_tx: MakeTx, names: tuple[str, ...]) -> Program:
    """An optimiser that needs the gradient alone."""

    def step(carry, values, number, batch, key):
        del key
        params, model_state, state = carry
        loss = jax.grad(problem.task.loss, has_aux=True)
        grads, model_state = loss(params, model_state, *batch)
        tx = make_tx(rate_at(values, number), values)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), model_state, state

    return compiled(problem, lambda p: make_tx(0.0, zeros(names)).init(p), step, names)


def ours_program(problem: Problem, names: tuple[str, ...]) -> Program:
    """This package's K-FAC."""
    found: dict[str, Any] = {}
    chosen = problem.size.curvature

    def tagged():
        # Within the clock of compiling, once.
        if not found:
            found["loss"] = problem.tagged()
        return found["loss"]

    def make_tx(rate, values, inverse_interval):
        return kfac.kfac(
            tagged().layers,
            rate,
            damping=values["damping"],
            momentum=values["momentum"],
            kl_clip=values["kl_clip"],
            factor_decay=chosen.factor_decay,
            interval=growing(chosen.longest),
            inverse_interval=inverse_interval,
            **chosen.options,
        )

    def step(carry, values, number, batch, key):
        params, model_state, state = carry
        (_, model_state), grads, statistics = tagged().value_and_grad(
            params, model_state, *batch, opt_state=state, key=key, deferred=True
        )
        # Early statistics are of few batches: their inverses must not stay.
        wait = jnp.clip(number // GROWTH, 1, chosen.inverse_interval)
        tx = make_tx(rate_at(values, number), values, wait)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), model_state, state

    ones = {name: 0.5 for name in names}
    return compiled(problem, lambda p: make_tx(1.0, ones, 1).init(p), step, names)


def growing(longest: int) -> kfac.intervals.Interval:
    """Refreshes after 1, 2, 3, … steps, up to `longest`, whatever the statistics do."""
    return kfac.intervals.adaptive(1e9, rule="elapsed", max_interval=longest)


def zeros(names: tuple[str, ...]) -> dict[str, float]:
    """Values that do not matter: the state has the same structure for all."""
    return {name: 0.0 for name in names}


def compiled(
    problem: Problem, init: Callable, step: Callable, names: tuple[str, ...]
) -> Program:
    """Compiles an optimiser and measures how long that takes."""
    params, model_state = jax.eval_shape(problem.task.init, jax.random.key(0))
    start = jax.jit(init)

    def build():
        made = start.lower(params).compile()
        state = jax.eval_shape(init, params)
        values = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in names}
        shapes = jax.eval_shape(lambda *batch: batch, *problem.example())
        carry = params, model_state, state
        count = jax.ShapeDtypeStruct((), jnp.int32)
        key = jax.eval_shape(jax.random.key, 0)
        whole = jax.jit(step, donate_argnums=0)
        return made, whole.lower(carry, values, count, shapes, key).compile()

    made: list[Any] = []
    seconds, _ = timed(lambda: made.extend(build()))
    begin, run = made

    def take(carry, values, number, batch, key):
        floats = {name: jnp.float32(values[name]) for name in names}
        return run(carry, floats, jnp.int32(number), batch, key)

    return Program(lambda values: seconds, lambda params, values: begin(params), take)


MAKERS: dict[str, MakeTx] = {
    "sgd": make_sgd,
    "adamw": make_adamw,
    "muon": make_muon,
    "soap": make_soap,
}


def make_program(name: str, problem: Problem, names: tuple[str, ...]) -> Program:
    """Compiles an optimiser for a task."""
    if name == "ours":
        return ours_program(problem, names)
    if name == "kfac_jax":
        return Program(*peer_program(problem))
    if name == "soap":
        import_soap()
    return optax_program(problem, MAKERS[name], names)
