"""Bayesian deep learning from the same factors.

tx = kfac.bayes.noisy_kfac(tagged.layers, num_data, learning_rate)
value, grads, statistics = kfac.bayes.value_and_grad(
    tagged, params, *batch, opt_state=state, key=key)
updates, state = tx.update(grads, state, params, statistics=statistics)
weights = kfac.bayes.sample(state, params, key)
probabilities = kfac.bayes.predict(apply_fn, state, params, inputs, key)
"""

from kfac_jax_lite.bayes.diagonal import (
    IVONState,
    ReparameterisedStatistics,
    VOGNState,
    ivon,
    squares,
    vogn,
)
from kfac_jax_lite.bayes.laplace import LaplacePosterior, laplace
from kfac_jax_lite.bayes.noisy import NoisyKFACState, noisy_kfac
from kfac_jax_lite.bayes.posterior import sample, value_and_grad
from kfac_jax_lite.bayes.predictive import (
    Normal,
    linearised_outputs,
    predict,
    predict_each,
    predict_glm,
)

__all__ = [
    "IVONState",
    "LaplacePosterior",
    "Normal",
    "NoisyKFACState",
    "ReparameterisedStatistics",
    "VOGNState",
    "ivon",
    "laplace",
    "linearised_outputs",
    "noisy_kfac",
    "predict",
    "predict_each",
    "predict_glm",
    "sample",
    "squares",
    "value_and_grad",
    "vogn",
]
