"""The configuration of the PINN study, and its sizes; JAX is not needed."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.configs.checks import (
    check_choice,
    check_integer,
    check_number,
    digest,
    json_values,
)

SizeName = Literal["tiny", "small"]
MethodName = Literal["adam", "lbfgs", "kfac", "dual"]
ADAM, LBFGS, KFAC, DUAL = METHODS = ("adam", "lbfgs", "kfac", "dual")

# Which cells are run and where files lie decides nothing about a run.
NOT_IN_FINGERPRINT = ("size", "only", "seeds", "out")


@dataclasses.dataclass(frozen=True)
class PinnStudy:
    """Poisson's equation on the unit square by a network, at equal processor time."""

    size: SizeName = "small"
    """Rung of the ladder; decides the defaults of all other options."""
    only: tuple[MethodName, ...] = METHODS
    """Methods to run."""
    seconds: float = 5.0
    """Processor seconds of a run, without compiling and evaluations."""
    seeds: int = 3
    """Runs with the best setting; settings are judged on another seed."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates tried for Adam."""
    memories: tuple[int, ...] = (10, 30, 100)
    """Numbers of pairs tried for L-BFGS."""
    kfac_dampings: tuple[float, ...] = (1e-6, 1e-4, 1e-2)
    """Dampings tried for K-FAC."""
    dual_dampings: tuple[float, ...] = (1e-10, 1e-8, 1e-6)
    """Dampings tried for the dual natural gradient."""
    solver: Literal["cholesky", "qr"] = "cholesky"
    """How the dual is solved."""
    factor_decay: float = 0.9
    """Weight of the old statistics of K-FAC."""
    hidden: int = 2
    """Hidden layers."""
    width: int = 64
    """Units of each."""
    interior: int = 16
    """Points inside along each axis, on a grid."""
    boundary: int = 16
    """Points on each of the four sides."""
    boundary_weight: float = 100.0
    """Weight of the mean square on the boundary, beside that of the equation."""
    step_sizes: int = 16
    """Step sizes 1, 1/2, 1/4, … among which K-FAC and the dual take the best."""
    precision: Literal["float32", "float64"] = "float64"
    """Of everything."""
    out: Path = Path("runs/studies/pinn")
    """Folder of the finished runs, a file for each method, and of the page."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in self.only:
            check_choice("only", name, METHODS)
        check_number("seconds", self.seconds, above=0)
        check_number("boundary-weight", self.boundary_weight, above=0)
        check_number("factor-decay", self.factor_decay, at_least=0, below=1)
        for name in ("seeds", "hidden", "width", "interior", "boundary", "step_sizes"):
            check_integer(name.replace("_", "-"), getattr(self, name), at_least=1)
        for memory in self.memories:
            check_integer("memories", memory, at_least=1)
        for name in ("rates", "kfac_dampings", "dual_dampings"):
            for value in getattr(self, name):
                check_number(name.replace("_", "-"), value, above=0)

    def settings(self, method: str) -> tuple[float, ...]:
        """The values that are tried of a method's one hyper-parameter."""
        return {
            ADAM: self.rates,
            LBFGS: self.memories,
            KFAC: self.kfac_dampings,
            DUAL: self.dual_dampings,
        }[method]

    def shared(self) -> dict[str, Any]:
        """What decides a run beside its method, setting and seed, as JSON values."""
        return json_values(self, NOT_IN_FINGERPRINT)

    def fingerprint(self) -> str:
        """Short digest of `shared`."""
        return digest(self.shared())


TINY = PinnStudy(
    size="tiny",
    seconds=0.2,
    seeds=1,
    rates=(1e-3, 1e-2),
    memories=(10,),
    kfac_dampings=(1e-4,),
    dual_dampings=(1e-8, 1e-6),
    width=8,
    interior=4,
    boundary=4,
)
SMALL = PinnStudy()
SIZES: dict[str, PinnStudy] = {config.size: config for config in (TINY, SMALL)}


@dataclasses.dataclass(frozen=True)
class PinnReport:
    """Makes the page and the plot of the PINN study from its finished runs."""

    folder: Path = Path("experiments/studies/results/pinn")
    """The study's results."""
    out: Path | None = None
    """Folder of page and plot; that of the results if not given."""
