"""The MNIST autoencoder: Adam, kfac-jax and this package, one after the other.

    python -m experiments.benchmarks.autoencoder --optimizers adam,ours --data-dir …

784-1000-500-250-30-250-500-1000-784, tanh, linear code, Glorot-uniform, Bernoulli loss
summed over the pixels, batches of 1,000. All start from the same parameters and see the
same batches. The clock counts the steps, the first calls (compiling) included; making
the optimiser and evaluating are outside it. This package's run is evaluated twice: at
its parameters, and at their moving average, which its step also computes.

References:
    Hinton & Salakhutdinov, 2006, Science 313(5786); Martens & Grosse, 2015,
    arXiv:1503.05671, Sec. 13 (the task, and the averaging of iterates).
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    OUT,
    PEER,
    TITLES,
    CompileCounter,
    comma_list,
    compile_seconds,
    first_reach,
    import_peer,
    machine,
    make_parser,
    positive_int,
    save_curves,
    settings,
    text_table,
    timed,
    write_json,
)
from experiments.datasets import load
from experiments.metrics import MetricsFile
from experiments.progress import ended

CODE = (1000, 500, 250, 30)
OPTIMIZERS = ("adam", PEER, "ours")
AVERAGED = "ours_averaged"
ADAM_STEPS, ADAM_RATE, PEER_DAMPING = 480, 1e-3, 150.0
FIXED_TARGET = 58.0

# ``(params, state, batch, key, number of the step) -> (params, state)``
Step = Callable[..., tuple[Any, Any]]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--optimizers", type=comma_list(OPTIMIZERS), default=",".join(OPTIMIZERS))
    add("--steps", type=positive_int, default=240, help="of the K-FACs")
    add("--adam-steps", type=positive_int, default=ADAM_STEPS)
    add("--eval-every", type=positive_int, default=10)
    add("--dataset", default="mnist")
    add("--batch-size", type=positive_int, default=1000)
    add("--damping", type=float, default=0.03, help="ours: first damping")
    add("--damping-factor", type=float, default=0.85, help="ours: per step")
    add("--minimum-damping", type=float, default=3e-3, help="ours")
    add("--factor-decay", type=float, default=0.98, help="ours")
    add("--factor-interval", type=positive_int, default=1, help="ours")
    add("--inverse-interval", type=positive_int, default=6, help="ours")
    add("--factor-batch", type=positive_int, default=125, help="ours: statistics")
    add("--model-batch", type=positive_int, default=64, help="ours: quadratic model")
    add("--average", type=float, default=0.1, help="ours: weight of the newest iterate")
    add("--data-dir", type=Path, default=None, help="else KFAC_DATA_DIR")
    add("--out", type=Path, default=OUT, help="folder of the results")
    return parser.parse_args(argv)


def initial(key: jax.Array, widths: tuple[int, ...]) -> list[tuple[jax.Array, ...]]:
    """Glorot-uniform weights and zero biases, a pair per layer."""
    params = []
    for rows, columns in zip(widths[:-1], widths[1:], strict=True):
        key, sub = jax.random.split(key)
        limit = (6 / (rows + columns)) ** 0.5
        weight = jax.random.uniform(sub, (rows, columns), minval=-limit, maxval=limit)
        params.append((weight, jnp.zeros(columns)))
    return params


def logits(params: list, x: Any) -> jax.Array:
    """The network's output; its code (in the middle) and output are linear."""
    linear = (len(params) // 2 - 1, len(params) - 1)
    for number, (weight, bias) in enumerate(params):
        x = x @ weight + bias
        x = x if number in linear else jnp.tanh(x)
    return x


def bernoulli(z: jax.Array, x: Any) -> jax.Array:
    """Mean over the images of the cross-entropy summed over the pixels."""
    return optax.sigmoid_binary_cross_entropy(z, x).sum(-1).mean()


def make_evaluate(train: np.ndarray, test: np.ndarray) -> Callable:
    """Returns the evaluation: loss on training images, squared error on test images."""

    @jax.jit
    def evaluate(params):
        difference = jax.nn.sigmoid(logits(params, test)) - test
        loss = bernoulli(logits(params, train), train)
        return loss, jnp.mean(jnp.sum(difference**2, -1))

    return evaluate


def batches(train: np.ndarray, size: int, steps: int) -> Iterator[np.ndarray]:
    """Yields as many batches as steps: one permutation per epoch, always the same."""
    rng, given = np.random.default_rng(0), 0
    while given < steps:
        order = rng.permutation(len(train))
        for start in range(0, len(train) - size + 1, size):
            if given == steps:
                return
            yield train[order[start : start + size]]
            given += 1


def make_adam(params: Any, args: argparse.Namespace, batch: Any) -> tuple[Any, Step]:
    """Adam: its state and its step."""
    del args, batch
    tx = optax.adam(ADAM_RATE)

    def step(params, state, x, key, number):
        del key, number
        grads = jax.grad(lambda p: bernoulli(logits(p, x), x))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init(params), jax.jit(step, donate_argnums=(0, 1))


def make_peer(params: Any, args: argparse.Namespace, batch: Any) -> tuple[Any, Step]:
    """kfac-jax with adaptive damping, learning rate and momentum."""
    del args
    kfac_jax, reason = import_peer()
    if kfac_jax is None:
        raise ImportError(reason)

    def loss(params, x):
        z = logits(params, x)
        kfac_jax.register_sigmoid_cross_entropy_loss(z, x)
        return bernoulli(z, x)

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=PEER_DAMPING,
        min_damping=1e-5,
        num_burnin_steps=0,
        inverse_update_period=5,
        curvature_ema=0.95,
    )
    fixed = jax.random.PRNGKey(1)

    def step(params, state, x, key, number):
        # It splits a key only to sample labels; one for all steps is its habit.
        del key
        return optimizer.step(params, state, fixed, batch=x, global_step_int=number)[:2]

    return optimizer.init(params, fixed, batch), step


def make_ours(params: Any, args: argparse.Namespace, batch: Any) -> tuple[Any, Step]:
    """This package, with steps and damping from the quadratic model."""

    def loss(params, x):
        return bernoulli(kfac.bernoulli(logits(params, x)), x)

    tagged = kfac.tag(loss, params, batch, fisher="mc")
    tx = kfac.kfac(
        tagged.layers,
        "auto",
        damping=kfac.damping.levenberg_marquardt(
            args.damping, args.damping_factor, minimum=args.minimum_damping
        ),
        factor_decay=args.factor_decay,
        interval=kfac.intervals.every(args.factor_interval),
        inverse_interval=args.inverse_interval,
    )

    def step(params, state, x, key, number):
        del number
        state, average = state
        grads = jax.grad(loss)(params, x)
        part = x[-args.factor_batch :]
        *_, statistics = tagged.value_and_grad(params, part, opt_state=state, key=key)
        model = kfac.quadratic_model(tagged, params, x[: args.model_batch])
        updates, state = tx.update(
            grads, state, params, statistics=statistics, model=model
        )
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, args.average)
        return params, (state, average)

    state = tx.init(params), jax.tree.map(jnp.copy, params)
    return state, jax.jit(step, donate_argnums=(0, 1))


MAKERS = {"adam": make_adam, PEER: make_peer, "ours": make_ours}


def train_one(
    name: str,
    args: argparse.Namespace,
    data: tuple[np.ndarray, ...],
    counter: CompileCounter,
    file: MetricsFile,
) -> dict[str, dict[str, Any]]:
    """Trains with one optimiser.

    Args:
        name: the optimiser.
        args: the command line.
        data: training and test images ``[n, 784]``.
        counter: counts compilations.
        file: where the evaluations go.
    """
    train, test = data
    params = initial(jax.random.key(0), widths(train.shape[1]))
    example = train[: args.batch_size]
    setup, (state, step) = timed_maker(MAKERS[name], params, args, example)
    evaluate, key = make_evaluate(train[:10000], test), jax.random.key(1)
    evaluate(params)
    steps = args.adam_steps if name == "adam" else args.steps
    durations, compiled, curves = [], [], {}
    for number, x in enumerate(batches(train, args.batch_size, steps)):
        x = jax.block_until_ready(jnp.asarray(x))
        key, sub = jax.random.split(key)
        seen = counter.count
        seconds, (params, state) = timed(step, params, state, x, sub, number)
        durations.append(seconds)
        compiled.append(counter.count > seen)
        if (number + 1) % args.eval_every and number + 1 < steps:
            continue
        points = {name: params} | ({AVERAGED: state[1]} if name == "ours" else {})
        for which, point in points.items():
            loss, error = map(float, evaluate(point))
            record = {"seconds": sum(durations), "loss": loss, "test_error": error}
            file.append("eval", number + 1, optimizer=which, **record)
            curves.setdefault(which, []).append({"step": number + 1, **record})
            print(
                f"{which}: step {number + 1} seconds {sum(durations):.1f} "
                f"loss {loss:.3f} test error {error:.3f}",
                flush=True,
            )
        if not np.isfinite(curves[name][-1]["loss"]):
            break
    facts = {
        "setup_seconds": setup,
        "compile_seconds": compile_seconds(durations, compiled),
        "step_ms_median": 1e3 * statistics.median(durations),
        "step_ms_mean": 1e3 * statistics.mean(durations[1:] or durations),
    }
    return {which: {"curve": curve, **facts} for which, curve in curves.items()}


def timed_maker(maker: Callable, *args: Any) -> tuple[float, tuple[Any, Step]]:
    """Makes an optimiser: the seconds, its state, its step."""
    kept: dict[str, Step] = {}

    def make():
        state, kept["step"] = maker(*args)
        return state

    seconds, state = timed(make)
    return seconds, (state, kept["step"])


def widths(pixels: int) -> tuple[int, ...]:
    """Widths of all layers, from the image to the image."""
    return (pixels, *CODE, *reversed(CODE[:-1]), pixels)


def targets(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """When each run reaches Adam's final loss and the fixed target."""
    found: dict[str, dict[str, Any]] = {}
    adam = runs["adam"]["curve"][-1]["loss"] if "adam" in runs else None
    for name, run in runs.items():
        found[name] = {
            "adam_final": None if adam is None else first_reach(run["curve"], adam),
            "fixed": first_reach(run["curve"], FIXED_TARGET),
        }
    return found


def show(runs: dict[str, dict[str, Any]]) -> str:
    """The table at the end."""
    rows = []
    for name, when in targets(runs).items():
        last = runs[name]["curve"][-1]
        reached = []
        for record in when.values():
            reached += [record["step"], record["seconds"]] if record else [None, None]
        rows.append(
            (
                TITLES[name],
                last["step"],
                last["seconds"],
                runs[name]["compile_seconds"],
                last["loss"],
                last["test_error"],
                *reached,
            )
        )
    header = (
        "optimiser",
        "steps",
        "seconds",
        "compiling",
        "final loss",
        "test error",
        "steps to Adam's",
        "seconds",
        f"steps to {FIXED_TARGET}",
        "seconds",
    )
    return text_table(header, rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains with every optimiser asked for; writes records, summary and plot."""
    args = arguments(argv)
    found = load(args.dataset, args.data_dir)
    data = tuple(
        (x.reshape(len(x), -1) / found.maximum).astype(np.float32)
        for x in (found.x_train, found.x_test)
    )
    lines = args.out / "autoencoder.jsonl"
    lines.unlink(missing_ok=True)
    file, counter = MetricsFile(lines), CompileCounter()
    facts = {
        "machine": machine(),
        "settings": settings(args),
        "data": {"title": found.title, "train": len(data[0]), "test": len(data[1])},
    }
    file.append("config", 0, **facts)
    runs: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name in args.optimizers:
        try:
            runs |= train_one(name, args, data, counter, file)
        except ImportError as error:
            missing[name] = str(error)
            file.append("note", 0, optimizer=name, text=str(error))
    file.append("end", 0)
    file.close()
    result = {**facts, "runs": runs, "targets": targets(runs), "missing": missing}
    write_json(args.out / "autoencoder.json", result)
    curves = {name: run["curve"] for name, run in runs.items()}
    save_curves(args.out / "autoencoder.png", f"Autoencoder, {found.title}", curves)
    print(show(runs))
    for name, reason in missing.items():
        print(f"{TITLES[name]}: missing, {reason}")
    return result


if __name__ == "__main__":
    raise SystemExit(ended(main))
