"""The same operators of curvlinops (PyTorch), if it can be imported."""

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.common import without_paths
from experiments.benchmarks.matvec_cases import (
    CLASSES,
    EMPIRICAL,
    KFAC,
    MC,
    Problem,
    carried,
)

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


def mlp(nn: Any, width: int) -> Any:
    """The MLP of `matvec_cases`."""
    first, second = nn.Linear(784, width), nn.Linear(width, width)
    last = nn.Linear(width, CLASSES)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), last)


def lenet5(nn: Any, width: int) -> Any:
    """The LeNet-5 of `matvec_cases`."""
    del width
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()),
        nn.Linear(84, CLASSES),
    )


NETWORKS = {"mlp": mlp, "lenet5": lenet5}


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
        """The same with other labels."""
        tensor = self.torch.as_tensor
        pairs = zip(self.data, labels, strict=True)
        data = [(x, tensor(np.array(y, np.int64))) for (x, _), y in pairs]
        return dataclasses.replace(self, data=data)


def make_peer(torch: Any, curvlinops: Any, problem: Problem, width: int) -> Peer:
    """Carries a problem over to PyTorch."""
    network = NETWORKS[problem.name](torch.nn, width)
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
