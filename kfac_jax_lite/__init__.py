"""K-FAC (natural gradient with Kronecker factors) as a plain optax transformation.

tagged = kfac.tag(loss_fn, params, *batch)
tx = kfac.kfac(tagged.layers, learning_rate=0.1)
value, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
updates, state = tx.update(grads, state, params, statistics=statistics)
"""

from kfac_jax_lite import bayes, curvature, ntk
from kfac_jax_lite.core.likelihoods import bernoulli, categorical, normal
from kfac_jax_lite.core.threads import provide_threads
from kfac_jax_lite.core.types import (
    DiagonalStatistics,
    KroneckerStatistics,
    LayerTag,
    ScaleShiftStatistics,
    TiedStatistics,
)
from kfac_jax_lite.diagnostics import logs
from kfac_jax_lite.diagnostics.accuracy import choose_ranks, inverse_error
from kfac_jax_lite.diagnostics.cost import CostModel, Rows, cost_model, layer_rows
from kfac_jax_lite.diagnostics.doctor.doctor import doctor
from kfac_jax_lite.diagnostics.doctor.findings import Finding, Findings
from kfac_jax_lite.diagnostics.report import report
from kfac_jax_lite.distributed.layout import relayout, state_axes, state_specs
from kfac_jax_lite.distributed.reduction import Reduction
from kfac_jax_lite.distributed.traffic import Collective, traffic
from kfac_jax_lite.kronecker.inverses import low_rank
from kfac_jax_lite.kronecker.state import Clock, KFACState
from kfac_jax_lite.optimizer import damping, intervals
from kfac_jax_lite.optimizer.kfac import kfac
from kfac_jax_lite.optimizer.rescaling import rescale_weights
from kfac_jax_lite.optimizer.steps import AdaptedState, GuidedState, KFACChainState
from kfac_jax_lite.optimizer.transform import scale_by_kfac
from kfac_jax_lite.statistics.outputs import QuadraticModel, quadratic_model
from kfac_jax_lite.statistics.subsample import Subsample
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss, tag
from kfac_jax_lite.tagging.manual import register_rule, tag_as, tag_conv, tag_dense

__version__ = "0.1.0"

provide_threads()

__all__ = [
    "AdaptedState",
    "Clock",
    "Collective",
    "CostModel",
    "DiagonalStatistics",
    "Finding",
    "Findings",
    "GuidedState",
    "KFACChainState",
    "KFACState",
    "KroneckerStatistics",
    "LayerTag",
    "QuadraticModel",
    "Reduction",
    "Rows",
    "ScaleShiftStatistics",
    "Subsample",
    "TaggedLoss",
    "TiedStatistics",
    "bayes",
    "bernoulli",
    "categorical",
    "choose_ranks",
    "cost_model",
    "curvature",
    "damping",
    "doctor",
    "intervals",
    "inverse_error",
    "kfac",
    "layer_rows",
    "logs",
    "low_rank",
    "normal",
    "ntk",
    "quadratic_model",
    "register_rule",
    "relayout",
    "report",
    "rescale_weights",
    "scale_by_kfac",
    "state_axes",
    "state_specs",
    "tag",
    "tag_as",
    "tag_conv",
    "tag_dense",
    "traffic",
]


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
