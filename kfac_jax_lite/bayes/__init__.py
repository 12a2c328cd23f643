"""Bayesian deep learning from the same factors.

tx = kfac.bayes.noisy_kfac(tagged.layers, num_data, learning_rate)
value, grads, statistics = kfac.bayes.value_and_grad(
    tagged, params, *batch, opt_state=state, key=key)
updates, state = tx.update(grads, state, params, statistics=statistics)
weights = kfac.bayes.sample(state, params, key)
probabilities = kfac.bayes.predict(apply_fn, state, params, inputs, key)
"""

from kfac_jax_lite.bayes import metrics
from kfac_jax_lite.bayes.gradients import value_and_grad
from kfac_jax_lite.bayes.ivon import IVONState, ReparameterisedStatistics, ivon
from kfac_jax_lite.bayes.laplace import laplace
from kfac_jax_lite.bayes.laplace_posterior import LaplacePosterior
from kfac_jax_lite.bayes.laplace_predictive import linearised_outputs, predict_glm
from kfac_jax_lite.bayes.noisy import NoisyKFACState, noisy_kfac
from kfac_jax_lite.bayes.posterior import sample
from kfac_jax_lite.bayes.predictive import Normal, predict, predict_each
from kfac_jax_lite.bayes.vogn import VOGNState, squares, vogn

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
    "metrics",
    "noisy_kfac",
    "predict",
    "predict_each",
    "predict_glm",
    "sample",
    "squares",
    "value_and_grad",
    "vogn",
]
