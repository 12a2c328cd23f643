"""kfac-jax with fixed intervals, its values given at every step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.common import import_peer, timed
from experiments.benchmarks.time_to_target.problems import Problem
from experiments.benchmarks.time_to_target.schedule import rate_at


def peer_program(problem: Problem) -> tuple[Callable, Callable, Callable]:
    """kfac-jax's optimiser.

    A bound on the step is part of its compiled program; there is an optimiser for each
    that occurs. It has no decoupled weight decay and gets none.
    """
    kfac_jax, reason = import_peer()
    if kfac_jax is None:
        raise ImportError(reason)
    made: dict[float, tuple[Any, float]] = {}
    key = jax.random.PRNGKey(1)
    schedule = jax.jit(rate_at)
    _, first_state = jax.jit(problem.task.init)(jax.random.key(0))
    kept = bool(first_state)

    def prepare(values):
        bound = values["kl_clip"]
        if bound not in made:
            made[bound] = make_optimiser(problem, kfac_jax, bound), 0.0
            seconds = first_calls(problem, values, start, step)
            made[bound] = made[bound][0], seconds
        return made[bound][1]

    def start(params, values):
        with_state = {"func_state": first_state} if kept else {}
        batch = tuple(map(jnp.asarray, problem.example()))
        return made[values["kl_clip"]][0].init(params, key, batch, **with_state)

    def step(carry, values, number, batch, unused):
        del unused  # it splits a key only to sample labels; raw keys are its habit
        params, model_state, state = carry
        params, state, *rest = made[values["kl_clip"]][0].step(
            params,
            state,
            jax.random.fold_in(key, number),
            batch=tuple(map(jnp.asarray, batch)),
            learning_rate=schedule(values, number),
            momentum=jnp.asarray(values["momentum"]),
            damping=jnp.asarray(values["damping"]),
            global_step_int=number,
            **({"func_state": model_state} if kept else {}),
        )
        return params, rest[0] if kept else model_state, state

    return prepare, start, step


def make_optimiser(problem: Problem, kfac_jax: Any, bound: float) -> Any:
    """Learning rate, momentum and damping are arguments of its step."""

    def mark(logits, targets):
        if problem.bernoulli:
            kfac_jax.register_sigmoid_cross_entropy_loss(logits, targets)
        else:
            flat = logits.reshape(-1, logits.shape[-1])
            kfac_jax.register_softmax_cross_entropy_loss(flat, targets.reshape(-1))
        return logits

    whole = problem.peer_loss(mark)
    _, model_state = jax.eval_shape(problem.task.init, jax.random.key(0))
    kept = bool(model_state)

    def stateless(params, batch):
        return whole(params, model_state, batch)[0]

    chosen = problem.size.curvature
    return kfac_jax.Optimizer(
        jax.value_and_grad(whole if kept else stateless, has_aux=kept),
        l2_reg=0.0,
        value_func_has_state=kept,
        norm_constraint=bound,
        num_burnin_steps=0,
        curvature_ema=chosen.factor_decay,
        curvature_update_period=chosen.peer_interval,
        inverse_update_period=chosen.peer_inverse,
    )


def first_calls(
    problem: Problem, values: dict[str, Any], start: Callable, step: Callable
) -> float:
    """Seconds that first calls take beyond second ones."""
    init, kinds = jax.jit(problem.task.init), problem.size.curvature.peer_interval + 1

    def once():
        params, model_state = init(jax.random.key(0))
        carry = params, model_state, start(params, values)
        for number in range(kinds):
            carry = step(carry, values, number, problem.example(), None)
        return carry[0]

    jax.block_until_ready(init(jax.random.key(0)))
    first, _ = timed(once)
    return max(0.0, first - timed(once)[0])
