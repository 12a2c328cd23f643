"""Products with curvature matrices, side by side with curvlinops (PyTorch).

    python -m experiments.benchmarks.matvecs --data-dir … --rounds 15 --threads 1

Both libraries have the same network, weights, data and vectors in one process. Before
anything is timed, their products are compared. In every round each row runs once, ours
and theirs one after the other, in an order that changes from round to round. Set-up is
making the operator: nothing but for K-FAC, which computes its factors then. First calls
compile and are given apart. curvlinops runs as it comes, without ``torch.compile``.
"""

import dataclasses
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import kfac_jax_lite as kfac
from experiments.benchmarks.common import (
    OUT,
    machine,
    quartiles,
    text_table,
    timed,
    without_paths,
    write_json,
)
from experiments.datasets import Dataset, load
from experiments.models.networks import MLP, LeNet5
from experiments.progress import ended
from kfac_jax_lite import curvature
from kfac_jax_lite.curvature.laws import samples
from kfac_jax_lite.curvature.operator import Kept, Operator
from kfac_jax_lite.statistics.outputs import marked_loss

HIDDEN = 512
CLASSES = 10
MC = "MC Fisher"
EMPIRICAL = "empirical Fisher"
KFAC = {"K-FAC, GGN": "type-2", "K-FAC, empirical": "empirical"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weights PyTorch keeps in another order."""

    name: str  # of its parameters in flax
    # Height, width and channels that were flattened before a dense layer; PyTorch
    # flattens channels first.
    image: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that both libraries have."""

    module: nn.Module  # the flax module
    layers: tuple[Layer, ...]  # in the order of the PyTorch module


def mlp(width: int) -> Network:
    """Two hidden layers of this width, rectified linear units."""
    layers = tuple(Layer(f"Dense_{i}") for i in range(3))
    return Network(MLP((width, width), CLASSES), layers)


def lenet5(width: int) -> Network:
    """LeNet-5 on images of 28 x 28 pixels; its widths are its own."""
    del width
    convolutions = Layer("Conv_0"), Layer("Conv_1")
    dense = Layer("Dense_0", (5, 5, 16)), Layer("Dense_1"), Layer("Dense_2")
    return Network(LeNet5(CLASSES), (*convolutions, *dense))


NETWORKS = {"mlp": mlp, "lenet5": lenet5}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network with its loss, at a point, on a data set."""

    name: str  # of the network
    network: Network  # its module and layers
    tagged: kfac.TaggedLoss  # the tagged loss
    params: Any  # the point
    # Images ``[batch, 28, 28, 1]`` in [0, 1], and labels.
    batches: list[tuple[jax.Array, jax.Array]]
    key: jax.Array  # PRNG key of the labels that the MC Fisher draws


def make_problem(
    name: str, data: Dataset, batch_size: int, width: int = HIDDEN
) -> Problem:
    """Builds a network at its initial weights."""
    network = NETWORKS[name](width)
    images = data.x_train.astype(np.float32) / np.float32(data.maximum)
    starts = range(0, len(images), batch_size)
    batches = [
        (
            jnp.asarray(images[i : i + batch_size]),
            jnp.asarray(data.y_train[i:][:batch_size]),
        )
        for i in starts
    ]
    params = network.module.init(jax.random.key(0), batches[0][0][:1])["params"]

    def loss(params, x, y):
        logits: Any = network.module.apply({"params": params}, x)
        logits = kfac.categorical(logits)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tagged = kfac.tag(loss, params, *batches[0])
    return Problem(name, network, tagged, params, batches, jax.random.key(1))


def our_operators(problem: Problem) -> dict[str, Callable[[], Operator]]:
    """Functions that make this package's operators, by matrix."""
    at = problem.tagged, problem.params, problem.batches
    return {
        "Hessian": lambda: curvature.hessian(*at),
        "GGN": lambda: curvature.ggn(*at),
        MC: lambda: curvature.mc_fisher(*at, key=problem.key),
        EMPIRICAL: lambda: curvature.empirical_fisher(*at),
        "K-FAC, GGN": lambda: ready(curvature.ggn(*at, "kronecker")),
        "K-FAC, empirical": lambda: ready(curvature.empirical_fisher(*at, "kronecker")),
    }


def ready(operator: Operator) -> Operator:
    """Waits for the factors of an operator."""
    assert isinstance(operator.form, Kept)
    jax.block_until_ready(operator.form.parts)
    return operator


def drawn_labels(operator: Operator) -> list[np.ndarray]:
    """The labels that our MC Fisher with one sample has drawn, batch by batch."""
    stream = operator.stream
    found = []
    for number, batch in enumerate(stream.batches):
        model = marked_loss(stream.tagged, stream.params, batch)
        outputs = model.outputs(model.values(stream.params)[1])
        key = stream.batch_key(number)
        ((gradient,),) = samples(stream.law, model, stream.params, outputs, key)
        # The gradient is p - e_y: negative at the label only.
        found.append(np.asarray(jnp.argmin(gradient, -1)))
    return found


def with_labels(problem: Problem, labels: Sequence[np.ndarray]) -> Problem:
    """The same problem with other labels."""
    pairs = zip(problem.batches, labels, strict=True)
    batches = [(x, jnp.asarray(y, jnp.int32)) for (x, _), y in pairs]
    return dataclasses.replace(problem, batches=batches)


def normal_vectors(problem: Problem, seed: int, several: int | None = None) -> Any:
    """Standard normal vectors shaped like the parameters."""
    leaves, structure = jax.tree.flatten(problem.params)
    lead = () if several is None else (several,)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    drawn = [jax.random.normal(k, (*lead, *x.shape), x.dtype) for k, x in pairs]
    return jax.tree.unflatten(structure, drawn)


def carried(tree: Any, network: Network, several: bool = False) -> list[np.ndarray]:
    """A tree like our parameters in the shapes and the order of PyTorch's.

    Args:
        tree: kernels ``[in, out]`` or ``[h, w, in, out]``, and biases.
        network: the network.
        several: whether every leaf has a leading axis; it becomes the last.

    Returns:
        Weights ``[out, in]`` or ``[out, in, h, w]`` and biases, layer by layer.
    """
    arrays = []
    for layer in network.layers:
        for part in ("kernel", "bias"):
            x = np.asarray(tree[layer.name][part])
            x = x if several else x[None]
            x = np.moveaxis(turned(x, layer) if part == "kernel" else x, 0, -1)
            arrays.append(np.array(x if several else x[..., 0], order="C"))
    return arrays


def turned(kernels: np.ndarray, layer: Layer) -> np.ndarray:
    """Kernels with a leading axis, output channels first, then input channels."""
    if kernels.ndim == 5:
        return kernels.transpose(0, 4, 3, 1, 2)
    if layer.image is None:
        return kernels.swapaxes(1, 2)
    count, size, width = kernels.shape
    images = kernels.reshape(count, *layer.image, width)
    return images.transpose(0, 4, 3, 1, 2).reshape(count, width, size)


SEED = 5  # of the labels that its MC Fisher draws


def import_torch() -> tuple[Any, Any, str]:
    """Imports PyTorch and curvlinops."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch = importlib.import_module("torch")
            curvlinops = importlib.import_module("curvlinops")
    except Exception as error:  # noqa: BLE001 - a broken installation is no error here
        return None, None, without_paths(f"{type(error).__name__}: {error}")
    return torch, curvlinops, ""


def torch_mlp(nn: Any, width: int) -> Any:
    first, second = nn.Linear(784, width), nn.Linear(width, width)
    last = nn.Linear(width, CLASSES)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


def torch_lenet5(nn: Any, width: int) -> Any:
    del width
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()),
        nn.Linear(84, CLASSES),
    )


TORCH_NETWORKS = {"mlp": torch_mlp, "lenet5": torch_lenet5}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A problem as PyTorch sees it."""

    torch: Any  # the module
    curvlinops: Any  # the module
    problem: Problem  # ours
    network: Any  # the same network with the same weights
    data: list[tuple[Any, Any]]  # the same batches, channels first

    def tensors(self, tree: Any, several: bool = False) -> list[Any]:
        """A tree shaped like our parameters as a list of tensors."""
        found = carried(tree, self.problem.network, several)
        return [self.torch.from_numpy(x) for x in found]

    def operator(self, name: str, **options: Any) -> Any:
        """An operator of the network; the checks for determinism are left out."""
        make = getattr(self.curvlinops, name)
        params = list(self.network.parameters())
        loss = self.torch.nn.CrossEntropyLoss()
        given = self.network, loss, params, self.data
        return make(*given, check_deterministic=False, **options)

    def kfac(self, fisher_type: str) -> Any:
        """K-FAC with its factors; weights and biases are one block, as with us."""
        options = {"fisher_type": fisher_type, "separate_weight_and_bias": False}
        found = self.operator("KFACLinearOperator", **options)
        found.compute_kronecker_factors()
        return found

    def operators(self) -> dict[str, Callable[[], Any]]:
        """Functions that make its operators, by matrix."""
        makers = {
            "Hessian": lambda: self.operator("HessianLinearOperator"),
            "GGN": lambda: self.operator("GGNLinearOperator"),
            MC: lambda: self.operator("FisherMCLinearOperator", seed=SEED),
            EMPIRICAL: lambda: self.operator("EFLinearOperator"),
        }
        more = {name: lambda kind=kind: self.kfac(kind) for name, kind in KFAC.items()}
        return makers | more

    def drawn_labels(self) -> list[np.ndarray]:
        """The labels that its MC Fisher draws for every product, batch by batch."""
        generator = self.torch.Generator().manual_seed(SEED)
        found = []
        with self.torch.no_grad():
            for x, _ in self.data:
                p = self.torch.softmax(self.network(x), 1)
                drawn = p.multinomial(1, replacement=True, generator=generator)
                found.append(drawn[:, 0].numpy())
        return found

    def with_labels(self, labels: Sequence[np.ndarray]) -> "Peer":
        tensor = self.torch.as_tensor
        pairs = zip(self.data, labels, strict=True)
        data = [(x, tensor(np.array(y, np.int64))) for (x, _), y in pairs]
        return dataclasses.replace(self, data=data)


def make_peer(torch: Any, curvlinops: Any, problem: Problem, width: int) -> Peer:
    """Carries a problem over to PyTorch."""
    network = TORCH_NETWORKS[problem.name](torch.nn, width)
    weights = carried(problem.params, problem.network)
    with torch.no_grad():
        for old, new in zip(network.parameters(), weights, strict=True):
            old.copy_(torch.from_numpy(new))
    data = [
        (
            torch.from_numpy(np.array(np.asarray(x).transpose(0, 3, 1, 2), order="C")),
            torch.from_numpy(np.array(y, np.int64)),
        )
        for x, y in problem.batches
    ]
    return Peer(torch, curvlinops, problem, network, data)


PROGRAM = "python -m experiments.benchmarks.matvecs"
SET_UP, ONE = "set-up", "1 vector"
OURS, THEIRS = "ours", "theirs"
# Above this relative difference the products are not those of one matrix.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Times products with curvature matrices, ours and those of curvlinops."""

    models: tuple[Literal["mlp", "lenet5"], ...] = ("mlp", "lenet5")
    """The networks."""
    dataset: Literal["mnist", "mnist5k", "fashion_mnist"] = "mnist"
    """The images; of 28 x 28 pixels."""
    examples: int = 2048
    """How many of them, the first of the training set."""
    batch_size: int = 512
    """Examples per batch."""
    width: int = HIDDEN
    """Width of the MLP's two hidden layers."""
    vectors: int = 16
    """How many vectors are multiplied at once."""
    rounds: int = 15
    """Timed rounds."""
    threads: int | None = None
    """Cores that the process keeps to, a thread for each; all by default."""
    without_peer: bool = False
    """Leave curvlinops out."""
    data_dir: Path | None = None
    """Folder with the images."""
    out: Path = OUT
    """Folder of the result."""


@dataclasses.dataclass
class Row:
    """What is timed, once per round."""

    matrix: str  # which one
    event: str  # set-up or product
    calls: dict[str, Callable[[], Any]]  # what is called, by library
    first: dict[str, float]  # seconds of the first calls, by library
    difference: float | None = None  # of the two products, relative
    # Of the timed calls, by library.
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def run(self, number: int) -> None:
        """Times both libraries, in an order that changes with the round."""
        names = list(self.calls)
        for name in names if number % 2 else names[::-1]:
            self.seconds.setdefault(name, []).append(timed(self.calls[name])[0])

    def record(self) -> dict[str, Any]:
        """The result as JSON values: milliseconds with quartiles."""
        found: dict[str, Any] = {"matrix": self.matrix, "event": self.event}
        for name, seconds in self.seconds.items():
            found[name] = {
                "ms": [1e3 * q for q in quartiles(seconds)],
                "first_seconds": self.first[name],
            }
        if THEIRS in self.seconds:
            pairs = zip(self.seconds[THEIRS], self.seconds[OURS], strict=True)
            found["ratio"] = quartiles([theirs / ours for theirs, ours in pairs])
        if self.difference is not None:
            found["difference"] = self.difference
            found["agree"] = self.difference <= TOLERANCE
        return found


# ------------------------------------------------------------------------- the products


def product(operator: Any, vectors: Any, several: bool) -> Callable[[], Any]:
    apply = operator.mm if several else operator.mv
    return lambda: apply(vectors)


def relative_difference(
    ours: Any, theirs: Sequence[Any], problem: Problem, several: bool
) -> float:
    """``‖ours − theirs‖ / ‖theirs‖`` over all parameters and vectors."""
    pairs = zip(carried(ours, problem.network, several), theirs, strict=True)
    wide = [(a.astype(np.float64), b.detach().double().numpy()) for a, b in pairs]
    apart = sum(float(np.sum((a - b) ** 2)) for a, b in wide)
    return float(np.sqrt(apart / sum(float(np.sum(b**2)) for _, b in wide)))


def comparable(
    matrix: str, ours: Any, theirs: Any, problem: Problem, peer: Peer
) -> list[tuple[Any, Any]]:
    """Pairs of operators that must be the same matrix.

    The two MC Fishers draw other labels; each is the other library's empirical Fisher
    with the labels that it drew.
    """
    if matrix != MC:
        return [(ours, theirs)]
    theirs_on_ours = peer.with_labels(drawn_labels(ours)).operators()[EMPIRICAL]()
    relabelled = with_labels(problem, peer.drawn_labels())
    return [(ours, theirs_on_ours), (our_operators(relabelled)[EMPIRICAL](), theirs)]


def make_rows(
    matrix: str, problem: Problem, peer: Peer | None, vectors: int
) -> list[Row]:
    """Makes the operators of a matrix, multiplies once, and compares."""
    makers: dict[str, Callable[[], Any]] = {OURS: our_operators(problem)[matrix]}
    if peer is not None:
        makers[THEIRS] = peer.operators()[matrix]
    made = {name: timed(make) for name, make in makers.items()}
    operators = {name: operator for name, (_, operator) in made.items()}
    rows = [Row(matrix, SET_UP, makers, {name: s for name, (s, _) in made.items()})]
    for count in (None, vectors):
        drawn, several = normal_vectors(problem, 2, count), count is not None
        calls = {OURS: product(operators[OURS], drawn, several)}
        sent = peer.tensors(drawn, several) if peer is not None else None
        if peer is not None:
            calls[THEIRS] = lambda sent=sent: operators[THEIRS] @ sent
        first = {name: timed(call)[0] for name, call in calls.items()}
        difference = None
        if peer is not None:
            both = operators[OURS], operators[THEIRS]
            difference = max(
                relative_difference(
                    product(ours, drawn, several)(), theirs @ sent, problem, several
                )
                for ours, theirs in comparable(matrix, *both, problem, peer)
            )
        event = f"{count} vectors" if several else ONE
        rows.append(Row(matrix, event, calls, first, difference))
    return rows


def benchmark(name: str, config: Config, torch: Any, curvlinops: Any) -> dict[str, Any]:
    data = load(config.dataset, config.data_dir).first(config.examples)
    problem = make_problem(name, data, config.batch_size, config.width)
    peer = make_peer(torch, curvlinops, problem, config.width) if torch else None
    rows: list[Row] = []
    for matrix in our_operators(problem):
        rows += make_rows(matrix, problem, peer, config.vectors)
        print(f"{name}, {matrix}: ready", flush=True)
    for number in range(config.rounds):
        shift = number % len(rows)
        for row in rows[shift:] + rows[:shift]:
            row.run(number)
    shapes = [x.shape for x in carried(problem.params, problem.network)]
    return {
        "parameters": sum(int(np.prod(shape)) for shape in shapes),
        "images": data.title,
        "source": Path(data.source).name,
        "rows": [row.record() for row in rows],
    }


# -------------------------------------------------------------------------- the program


def keep_to(threads: int | None) -> int:
    """Keeps this process to some of its cores; before JAX and PyTorch make threads."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads is None:
        return len(allowed)
    if not 1 <= threads <= len(allowed):
        raise SystemExit(f"--threads {threads}: wanted 1 to {len(allowed)}.")
    os.sched_setaffinity(0, allowed[:threads])
    return threads


def show(rows: Sequence[dict[str, Any]]) -> str:
    header = ("matrix", "event", "ours ms", "quartiles", "first s", "theirs ms")
    header += ("quartiles", "first s", "theirs/ours", "quartiles", "difference")
    table = []
    for row in rows:
        cells: list[Any] = [row["matrix"], row["event"]]
        for name in (OURS, THEIRS):
            side = row.get(name)
            if side is None:
                cells += [None] * 3
                continue
            low, middle, high = side["ms"]
            cells += [middle, f"{low:.3g}-{high:.3g}", side["first_seconds"]]
        low, middle, high = row.get("ratio", (None, None, None))
        cells += [middle, None if low is None else f"{low:.2f}-{high:.2f}"]
        found = row.get("difference")
        cells.append(None if found is None else f"{found:.0e}")
        table.append(cells)
    return text_table(header, table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the networks and writes ``matvecs_threads_<n>.json``."""
    config = tyro.cli(Config, prog=PROGRAM, args=arguments)
    threads = keep_to(config.threads)
    torch, curvlinops, reason = import_torch()
    if config.without_peer:
        torch, reason = None, "--without-peer"
    versions: dict[str, Any] = {"curvlinops_missing": reason or None}
    if torch:
        torch.set_num_threads(threads)
        for package in ("torch", "curvlinops-for-pytorch"):
            versions[package] = importlib.metadata.version(package)
    values = dataclasses.asdict(config)
    del values["out"], values["data_dir"]
    result: dict[str, Any] = {
        "machine": machine() | versions,
        "settings": values | {"threads": threads},
        "models": {},
    }
    path = config.out / f"matvecs_threads_{threads}.json"
    apart = []
    for name in config.models:
        found = result["models"][name] = benchmark(name, config, torch, curvlinops)
        count, images = found["parameters"], found["images"]
        print(f"\n{name}: {count:,} parameters, {images}, {threads} threads")
        print(show(found["rows"]), flush=True)
        rows = [row for row in found["rows"] if not row.get("agree", True)]
        apart += [f"{name}, {row['matrix']}, {row['event']}" for row in rows]
        write_json(path, result)
    for line in apart:
        print(f"PRODUCTS DIFFER: {line}")
    if reason:
        print(f"curvlinops: missing, {reason}")
    print(f"Written to {path.name}.")
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(ended(main))
