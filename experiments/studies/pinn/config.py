"""The configuration of the PINN study, and its sizes; JAX is not needed."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.configs.checks import (
    check,
)
from experiments.studies.study import RESULTS, Report, Study

SizeName = Literal["tiny", "small"]
MethodName = Literal["adam", "lbfgs", "kfac", "dual"]
ADAM, LBFGS, KFAC, DUAL = METHODS = ("adam", "lbfgs", "kfac", "dual")


@dataclasses.dataclass(frozen=True)
class PinnStudy(Study):
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
        check(
            self,
            counts="seeds hidden width interior boundary step_sizes memories",
            positive="seconds boundary_weight rates kfac_dampings dual_dampings",
            decays="factor_decay",
        )

    def settings(self, method: str) -> tuple[float, ...]:
        """The values that are tried of a method's one hyper-parameter."""
        return {
            ADAM: self.rates,
            LBFGS: self.memories,
            KFAC: self.kfac_dampings,
            DUAL: self.dual_dampings,
        }[method]


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
class PinnReport(Report):
    """Makes the page and the plot of the PINN study from its finished runs."""

    folder: Path = RESULTS / "pinn"
