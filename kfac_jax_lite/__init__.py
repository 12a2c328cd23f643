"""K-FAC (natural gradient with Kronecker factors) as a plain optax transformation.

tagged = kfac.tag(loss_fn, params, *batch)
tx = kfac.kfac(tagged.layers, learning_rate=0.1)
value, grads, statistics = tagged.value_and_grad(params, *batch, opt_state=state)
updates, state = tx.update(grads, state, params, statistics=statistics)
"""

from kfac_jax_lite import bayes, curvature, damping, intervals, logs, ntk, simulate
from kfac_jax_lite.accuracy import choose_ranks, inverse_error
from kfac_jax_lite.adapted import AdaptedState
from kfac_jax_lite.alias import KFACChainState, kfac
from kfac_jax_lite.cost import CostModel, cost_model
from kfac_jax_lite.doctor import doctor
from kfac_jax_lite.factors.estimate import TaggedLoss, tag
from kfac_jax_lite.factors.sampling import Subsample
from kfac_jax_lite.factors.state import Clock, KFACState
from kfac_jax_lite.findings import Finding, Findings
from kfac_jax_lite.flops import Rows, layer_rows
from kfac_jax_lite.guided import GuidedState
from kfac_jax_lite.inverse import low_rank
from kfac_jax_lite.likelihoods import bernoulli, categorical, normal
from kfac_jax_lite.placement import relayout, state_axes, state_specs
from kfac_jax_lite.quadratic import QuadraticModel, quadratic_model
from kfac_jax_lite.reduce import Reduction
from kfac_jax_lite.rescaling import rescale_weights
from kfac_jax_lite.tagging.byhand import (
    register_rule,
    tag_as,
    tag_conv,
    tag_dense,
)
from kfac_jax_lite.telemetry import report
from kfac_jax_lite.threads import provide_threads
from kfac_jax_lite.traffic import Collective, traffic
from kfac_jax_lite.transform import scale_by_kfac
from kfac_jax_lite.types import (
    DiagonalStatistics,
    KroneckerStatistics,
    LayerTag,
    ScaleShiftStatistics,
    TiedStatistics,
)

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
    "simulate",
    "state_axes",
    "state_specs",
    "tag",
    "tag_as",
    "tag_conv",
    "tag_dense",
    "traffic",
]
