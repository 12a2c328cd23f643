"""The interval study: factor traffic and accuracy, for every rule and threshold.

    python -m experiments.main study intervals --size small --data-dir <folder>

Each cell trains the same residual network, data-parallel over the devices by
``shard_map``: the state is replicated, gradients are averaged, statistics are averaged
where a layer is due. Batch norm uses the statistics of each device's share of the
batch; its running averages are averaged over the devices. A finished cell is one line
of the results, and the same command goes on with the cells that are missing.

References:
    Osawa et al., 2019, arXiv:1811.12019 (distributed K-FAC with the empirical Fisher).
"""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

import kfac_jax_lite as kfac
from experiments import datasets, metrics
from experiments.datasets import Dataset
from experiments.errors import ConfigError
from experiments.models import Task, architectures
from experiments.models.networks import ResNet
from experiments.models.task import classifier, linen_functions
from experiments.studies.images import load_data
from experiments.studies.intervals.config import Cell, IntervalStudy
from experiments.studies.records import Cells

AXIS = "batch"
BLOCKS_OF_RESNET50 = (3, 4, 6, 3)
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()


class Carry(NamedTuple):
    """What a step takes and returns, the same on every device."""

    params: Any
    opt_state: Any
    model_state: Any


class Program(NamedTuple):
    """A compiled rule."""

    start: Callable[[int], Carry]  # seed to the carry before the first step
    # ``(carry, images, labels) -> (carry, mean loss)``; the carry is donated.
    step: Callable[..., tuple[Carry, jax.Array]]


def make_task(config: IntervalStudy, data: Dataset) -> Task:
    """The network of a study, with its loss."""
    if config.model == "resnet50":
        blocks = BLOCKS_OF_RESNET50
        module = architectures.ImageNetResNet(blocks, classes=data.num_classes)
    else:
        module = ResNet(config.blocks, config.width, data.num_classes)
    return classifier(*linen_functions(module), data)


def make_interval(cell: Cell) -> kfac.intervals.Interval:
    if cell.threshold is None:
        return kfac.intervals.every(1)
    if cell.rule == "staleness":
        return kfac.intervals.staleness(cell.threshold)
    return kfac.intervals.adaptive(cell.threshold, rule=cell.rule)


def make_mesh(config: IntervalStudy) -> Mesh:
    count = jax.device_count()
    if config.host_devices not in (None, count):
        raise ConfigError(
            f"host-devices is {config.host_devices}; JAX has {count} devices. It "
            "splits the CPU when it starts: leave XLA_FLAGS and JAX_PLATFORMS unset."
        )
    if config.batch_size % count:
        raise ConfigError(
            f"batch-size is {config.batch_size}; wanted a multiple of the number of "
            f"devices, {count}."
        )
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,))


def tag_share(
    config: IntervalStudy, task: Task, data: Dataset, devices: int
) -> kfac.TaggedLoss:
    """Tags the loss for one device's share of the batch; nothing is computed."""
    share = config.batch_size // devices
    images = jax.ShapeDtypeStruct((share, *data.image_shape), data.x_train.dtype)
    labels = jax.ShapeDtypeStruct((share,), data.y_train.dtype)
    start = jax.eval_shape(task.init, jax.random.key(0))
    return kfac.tag(task.loss, *start, images, labels, fisher="empirical", has_aux=True)


def make_program(
    config: IntervalStudy, cell: Cell, task: Task, data: Dataset, mesh: Mesh
) -> Program:
    tagged = tag_share(config, task, data, mesh.size)
    tx = kfac.kfac(
        tagged.layers,
        optax.polynomial_schedule(
            config.learning_rate, 0.0, config.decay_power, config.steps
        ),
        damping=config.damping,
        momentum=config.momentum,
        kl_clip=None,
        factor_decay=config.factor_decay,
        interval=make_interval(cell),
        axis_name=AXIS,
    )

    def step(carry: Carry, images: jax.Array, labels: jax.Array):
        params, opt_state, model_state = carry
        (loss, model_state), grads, statistics = tagged.value_and_grad(
            params, model_state, images, labels, opt_state=opt_state
        )
        # shard_map has summed the gradient of replicated parameters already.
        grads = jax.tree.map(lambda g: g / mesh.size, grads)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        params = optax.apply_updates(params, updates)
        loss, model_state = jax.lax.pmean((loss, model_state), AXIS)
        return Carry(params, opt_state, model_state), loss

    def start(seed: int) -> Carry:
        params, model_state = task.init(jax.random.key(seed))
        carry = Carry(params, tx.init(params), model_state)
        return jax.device_put(carry, NamedSharding(mesh, WHOLE))

    inputs = WHOLE, SPLIT, SPLIT
    mapped = jax.shard_map(step, mesh=mesh, in_specs=inputs, out_specs=WHOLE)
    return Program(start, jax.jit(mapped, donate_argnums=0))


def run_cell(
    config: IntervalStudy,
    cell: Cell,
    program: Program,
    data: Dataset,
    evaluate: Callable[[Any, Any], dict[str, float]],
    tell: Callable[[int], None],
) -> dict[str, Any]:
    began, losses = time.perf_counter(), []
    carry = program.start(cell.seed)
    records, evaluations = [], []
    for at, (images, labels) in enumerate(
        datasets.batches(data, config.batch_size, cell.seed, 0, config.steps), start=1
    ):
        carry, loss = program.step(carry, images, labels)
        losses.append(loss)
        if at % config.record_every == 0:
            records.append(record(at, carry.opt_state, losses))
            losses = []
            tell(at)
        if at % config.eval_every == 0 or at == config.steps:
            values = evaluate(on_first(carry.params), on_first(carry.model_state))
            evaluations.append({"step": at, **values})
    layers = kfac.report(on_first(carry.opt_state))
    return {
        "accuracy": evaluations[-1]["accuracy"],
        "test_loss": evaluations[-1]["loss"],
        "train_loss": records[-1]["loss"],
        "ratio": total(layers, "bytes_reduced") / total(layers, "bytes_if_every_step"),
        "bytes_reduced": total(layers, "bytes_reduced"),
        "bytes_if_every_step": total(layers, "bytes_if_every_step"),
        "skipped": layers[0]["skipped"],
        "seconds": time.perf_counter() - began,
        "layers": [
            {k: row[k] for k in ("name", "elements", "refreshes", "inversions")}
            for row in layers
        ],
        "records": records,
        "evaluations": evaluations,
    }


def record(step: int, opt_state: Any, losses: list[jax.Array]) -> dict[str, Any]:
    """The state of every layer's interval, layers as in `kfac.report`."""
    layers = kfac.report(on_first(opt_state))
    changes = [row["diff"] for row in layers]
    return {
        "step": step,
        "loss": round(float(np.mean(jax.device_get(losses))), 5),
        "bytes": total(layers, "bytes_reduced"),
        "interval": [row["interval"] for row in layers],
        "refreshes": [row["refreshes"] for row in layers],
        "change": [None if x is None else round(x, 3) for x in changes],
    }


def total(layers: list[dict[str, Any]], field: str) -> int:
    """Sum of a number over the layers."""
    return sum(row[field] for row in layers)


def on_first(tree: Any) -> Any:
    """The first device's copy of replicated arrays, without moving them."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def run_intervals(config: IntervalStudy, console: Console) -> Path:
    """Runs the cells that are missing."""
    files, cells = Cells(config), config.cells()
    done = [Cell(**line["cell"]) for line in files.read("")]
    missing = [cell for cell in cells if cell not in done]
    console.print(
        f"{len(cells) - len(missing)} cells finished, {len(missing)} to run: "
        f"{config.out}",
        soft_wrap=True,
    )
    if not missing:
        return config.out
    data, mesh = load_data(config), make_mesh(config)
    console.print(f"Data: {data.title}, {data.source}; {mesh.size} devices")
    task = make_task(config, data)
    evaluate = metrics.make_evaluate(task, data.x_test, data.y_test)
    programs: dict[tuple[str, float | None], Program] = {}
    files.machine |= {"device_count": jax.device_count()}
    # A file's name, without the folders of this machine.
    facts = {"title": data.title, "source": re.sub(r"\S*/", "", data.source)}
    columns = TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        whole = bar.add_task("cells", total=len(missing))
        for cell in missing:
            key = cell.rule, cell.threshold
            if key not in programs:
                programs[key] = make_program(config, cell, task, data, mesh)
            now = bar.add_task(cell.title, total=config.steps)
            result = run_cell(
                config, cell, programs[key], data, evaluate,
                lambda at, now=now: bar.update(now, completed=at),
            )  # fmt: skip
            own = {"size": config.size, "cell": dataclasses.asdict(cell), "data": facts}
            files.append("", "cell", config.steps, **own, **result)
            bar.remove_task(now)
            bar.advance(whole)
            console.print(
                f"{cell.title}: accuracy {result['accuracy']:.4f}, traffic "
                f"{result['ratio']:.3f}, {result['seconds']:.0f} s"
            )
    return config.out
