"""A task's data, network and loss, the optimisers compiled for it, and one run.

Hyper-parameters are arguments of the compiled step, so that all trials and seeds of an
optimiser share a program. Every learning rate grows linearly over the first twentieth
of its horizon and falls on a cosine to a twentieth of the highest, where it stays.

References:
    Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks";
    Liu et al., 2025, arXiv:2502.16982, Sec. 2.2 (Muon's steps as large as AdamW's);
    Vyas et al., 2024, arXiv:2409.11321 (SOAP).
"""

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfac_jax_lite as kfac
from experiments import metrics
from experiments.benchmarks.common import first_reach, import_peer, timed, without_paths
from experiments.benchmarks.time_to_target.config import TaskSize, to_step
from experiments.configs.train import TEXTS
from experiments.datasets import Examples, TextDataset, batches, load, load_text
from experiments.errors import ConfigError
from experiments.models import Task, make_task
from experiments.models.task import linen_functions, linen_module, make_preprocess
from experiments.tuning.optimisers import MUON_RMS, kernels

WARM_UP, LAST = 0.05, 0.05


def rate_at(values: dict[str, Any], number: Any) -> jax.Array:
    """The learning rate of a step.

    ``η · min(1, (n + 1) / (w h)) · (f + (1 − f) (1 + cos(π min(1, n / h))) / 2)`` with
    the horizon ``h`` and ``w = f = 1/20``.
    """
    horizon = jnp.asarray(values["horizon"], jnp.float32)
    n = jnp.asarray(number, jnp.float32)
    warm = jnp.minimum(1.0, (n + 1) / jnp.maximum(1.0, WARM_UP * horizon))
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(1.0, n / horizon)))
    return values["learning_rate"] * warm * (LAST + (1 - LAST) * cosine)


Mark = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an optimiser is given."""

    size: TaskSize  # sizes and budget
    data: Examples  # the data set; its training part has no held-out examples
    task: Task  # initial parameters, loss and evaluation
    # ``(params, model_state, inputs, targets) -> (logits, what they should be, new
    # model_state)`` in training mode.
    outputs: Callable[..., tuple[jax.Array, jax.Array, Any]]
    # Parameters and model state to the means over the held-out examples.
    evaluate: Callable[[Any, Any], dict[str, float]]
    bernoulli: bool  # whether targets are probabilities of pixels

    def example(self) -> tuple[Any, Any]:
        rows = slice(self.size.batch)
        return self.data.x_train[rows], self.data.y_train[rows]

    def peer_loss(self, mark: Mark) -> Callable[..., tuple[jax.Array, Any]]:
        """The loss, for a library that is told the output in its own way."""

        def loss(params, model_state, batch):
            logits, targets, model_state = self.outputs(params, model_state, *batch)
            logits = mark(logits, targets)
            if self.bernoulli:
                terms = optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
            else:
                terms = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return terms.mean(), model_state

        return loss

    def tagged(self) -> kfac.TaggedLoss:
        """The loss tagged by this package; nothing is computed."""
        start = jax.eval_shape(self.task.init, jax.random.key(0))
        fisher: Any = self.size.curvature.fisher
        return kfac.tag(
            self.task.loss, *start, *self.example(), fisher=fisher, has_aux=True
        )


def load_split(size: TaskSize, data_dir: Path | None) -> tuple[Examples, Any, Any]:
    """Loads the data and holds examples out.

    Returns:
        The data set with the examples for training, held-out inputs and targets. Of
        images the last of the training set are held out, of a text the first windows
        of its last tenth; a test set takes no part.
    """
    count = size.validation
    if size.dataset in TEXTS:
        data: Examples = load_text(size.dataset, data_dir, size.net.context)
        held = data.x_test[:count], data.y_test[:count]
    else:
        data = load(size.dataset, data_dir)
        held = data.x_train[-count:], data.y_train[-count:]
        rest = slice(None, -count)
        data = dataclasses.replace(
            data, x_train=data.x_train[rest], y_train=data.y_train[rest]
        )
    data = data.first(size.train)
    if len(held[0]) < count or len(data.x_train) < size.batch:
        raise ConfigError(
            f"{data.title}: {len(data.x_train)} examples for training and "
            f"{len(held[0])} held out; wanted at least {size.batch} and {count}."
        )
    return data, *held


def make_problem(size: TaskSize, data_dir: Path | None = None) -> Problem:
    data, *held = load_split(size, data_dir)
    task = make_task(size.model, size.net, data)  # pyright: ignore[reportArgumentType]
    return Problem(
        size,
        data,
        task,
        make_outputs(size, data),
        metrics.make_evaluate(task, *held),
        size.model == "autoencoder",
    )


def make_outputs(size: TaskSize, data: Any) -> Callable[..., Any]:
    """The network's outputs as `Problem.outputs` wants them."""
    _, apply = linen_functions(linen_module(size.model, size.net, data))
    flat = size.model == "autoencoder"
    text = isinstance(data, TextDataset)
    preprocess = None if text else make_preprocess(data, standardise=not flat)

    def outputs(params, model_state, inputs, targets):
        if preprocess is not None:
            inputs = preprocess(inputs)
        if flat:
            inputs = targets = inputs.reshape(len(inputs), -1)
        logits, model_state = apply(params, model_state, inputs, True)
        return logits, targets, model_state

    return outputs


def peer_program(problem: Problem) -> tuple[Callable, Callable, Callable]:
    """kfac-jax's optimiser.

    A bound on the step is part of its compiled program; there is an optimiser for each
    that occurs. It has no decoupled weight decay and gets none.
    """
    kfac_jax, reason = import_peer()
    if kfac_jax is None:
        raise ImportError(reason)
    made: dict[float | None, tuple[Any, float]] = {}
    key = jax.random.PRNGKey(1)
    schedule = jax.jit(rate_at)
    _, first_state = jax.jit(problem.task.init)(jax.random.key(0))
    kept = bool(first_state)

    def prepare(values):
        bound = values.get("kl_clip")
        if bound not in made:
            made[bound] = make_optimiser(problem, kfac_jax, bound), 0.0
            seconds = first_calls(problem, values, start, step)
            made[bound] = made[bound][0], seconds
        return made[bound][1]

    def start(params, values):
        with_state = {"func_state": first_state} if kept else {}
        batch = tuple(map(jnp.asarray, problem.example()))
        return made[values.get("kl_clip")][0].init(params, key, batch, **with_state)

    def step(carry, values, number, batch, unused):
        del unused  # it splits a key only to sample labels; raw keys are its habit
        params, model_state, state = carry
        given: dict[str, Any] = {"func_state": model_state} if kept else {}
        if "damping" in values:
            given["learning_rate"] = schedule(values, number)
            for name in ("momentum", "damping"):
                given[name] = jnp.asarray(values[name])
        params, state, *rest = made[values.get("kl_clip")][0].step(
            params,
            state,
            jax.random.fold_in(key, number),
            batch=tuple(map(jnp.asarray, batch)),
            global_step_int=number,
            **given,
        )
        return params, rest[0] if kept else model_state, state

    return prepare, start, step


def make_optimiser(problem: Problem, kfac_jax: Any, bound: float | None) -> Any:
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
    options: dict[str, Any] = {
        "norm_constraint": bound,
        "curvature_ema": chosen.factor_decay,
        "curvature_update_period": chosen.peer_interval,
        "inverse_update_period": chosen.peer_inverse,
    }
    if bound is None:  # steps and damping of its own
        names = ("learning_rate", "momentum", "damping")
        options = {f"use_adaptive_{name}": True for name in names}
        options |= {"initial_damping": 150.0, "min_damping": 1e-5}
    return kfac_jax.Optimizer(
        jax.value_and_grad(whole if kept else stateless, has_aux=kept),
        l2_reg=0.0,
        value_func_has_state=kept,
        num_burnin_steps=0,
        **options,
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


def automatic_program(problem: Problem, names: tuple[str, ...]) -> Program:
    """This package's K-FAC with steps and damping from the quadratic model.

    What is evaluated is the moving average of the parameters.

    References:
        Martens & Grosse, 2015, arXiv:1503.05671, Sec. 6, 7 and 13.
    """
    tagged, every = problem.tagged(), kfac.intervals.every(1)
    rule = kfac.damping.levenberg_marquardt(0.03, 0.85, minimum=3e-3)
    tx = kfac.kfac(
        tagged.layers, "auto", damping=rule, interval=every, inverse_interval=6
    )

    def step(carry, values, number, batch, key):
        del values, number
        average, model_state, (params, state) = carry
        loss, size = problem.task.loss, len(batch[0])
        part, few = [x[-(size // 8) :] for x in batch], [x[: size // 16] for x in batch]
        found = tagged.value_and_grad(
            params, model_state, *part, opt_state=state, key=key
        )
        model = kfac.quadratic_model(tagged, params, model_state, *few)
        grads, model_state = jax.grad(loss, has_aux=True)(params, model_state, *batch)
        given = {"statistics": found[2], "model": model}
        updates, state = tx.update(grads, state, params, **given)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.1)
        return average, model_state, (params, state)

    def start(params):
        return jax.tree.map(jnp.copy, params), tx.init(params)

    return compiled(problem, start, step, names)


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
    if name == "ours_auto":
        return automatic_program(problem, names)
    if name in ("kfac_jax", "kfac_jax_auto"):
        return Program(*peer_program(problem))
    if name == "soap":
        import_soap()
    return optax_program(problem, MAKERS[name], names)


def train(
    problem: Problem,
    program: Program,
    values: dict[str, Any],
    seed: int,
    target: float | None,
) -> dict[str, Any]:
    """Trains once.

    Args:
        problem: what is trained.
        program: the optimiser.
        values: its hyper-parameters.
        seed: of the initial parameters, the order of the data and sampled labels.
        target: the held-out loss at which the run ends; None to use the budget up.

    Returns:
        The curve (step; wall-clock and processor seconds of the steps and of feeding
        them; held-out loss and what else is evaluated), seconds of compiling, and the
        cores that were busy with the steps: 1 where nothing else ran on the only core.
    """
    size, step = problem.size, 0
    params, model_state = jax.jit(problem.task.init)(jax.random.key(seed))
    values = to_step(values, size.steps)
    compiling = program.prepare(values)
    state = jax.block_until_ready(program.start(params, values))
    carry, key = (params, model_state, state), jax.random.key(seed + 1)
    curve: list[dict[str, Any]] = []
    end = -math.inf if target is None else target
    seconds = used = 0.0
    wall, work = time.perf_counter(), time.process_time()
    for batch in batches(problem.data, size.batch, seed, 0, size.steps):
        key, sub = jax.random.split(key)
        carry = program.step(carry, values, step, batch, sub)
        step += 1
        if step % size.eval_every and step < size.steps:
            continue
        jax.block_until_ready(carry)
        seconds += time.perf_counter() - wall
        used += time.process_time() - work
        found = problem.evaluate(*carry[:2])
        times = {"seconds": seconds, "cpu_seconds": used}
        curve.append({"step": step, **times, **found})
        if not math.isfinite(found["loss"]) or found["loss"] <= end:
            break
        wall, work = time.perf_counter(), time.process_time()
    return {
        "curve": curve,
        "best_loss": best_loss(curve),
        "compile_seconds": compiling,
        "cores_busy": used / seconds,
    }


def best_loss(curve: Sequence[Mapping[str, Any]]) -> float | None:
    """The lowest loss of a curve that is a number."""
    losses = [p["loss"] for p in curve if p["loss"] is not None]
    return min(filter(math.isfinite, losses), default=None)


def score(run: Mapping[str, Any], target: float, steps: int) -> float:
    """What a search minimises: the share of the budget that the target takes."""
    point = first_reach(run["curve"], target)
    if point is not None:
        return point["step"] / steps
    if run["best_loss"] is None:
        return 11.0
    return 1 + min(10.0, (run["best_loss"] - target) / abs(target))
