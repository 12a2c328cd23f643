"""Bayesian deep learning from the same factors.

tx = kfac.bayes.noisy_kfac(tagged.layers, num_data, learning_rate)
value, grads, statistics = kfac.bayes.value_and_grad(
    tagged, params, *batch, opt_state=state, key=key)
updates, state = tx.update(grads, state, params, statistics=statistics)
weights = kfac.bayes.sample(state, params, key)
"""

from kfac_jax_lite.bayes.gradients import value_and_grad
from kfac_jax_lite.bayes.ivon import IVONState, ReparameterisedStatistics, ivon
from kfac_jax_lite.bayes.noisy import NoisyKFACState, noisy_kfac
from kfac_jax_lite.bayes.posterior import sample
from kfac_jax_lite.bayes.vogn import VOGNState, squares, vogn

__all__ = [
    "IVONState",
    "NoisyKFACState",
    "ReparameterisedStatistics",
    "VOGNState",
    "ivon",
    "noisy_kfac",
    "sample",
    "squares",
    "value_and_grad",
    "vogn",
]
