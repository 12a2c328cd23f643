"""Value, gradient and statistics at weights drawn from a posterior."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kfac_jax_lite.bayes.posterior import find
from kfac_jax_lite.core.types import Deferred, DiagonalStatistics, computed
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss


def value_and_grad(
    tagged: TaggedLoss | Callable[..., Any],
    params: Any,
    *args: Any,
    opt_state: Any,
    key: Any,
    num_samples: int = 1,
    has_aux: bool = False,
    axis_name: Any = None,
    deferred: bool = False,
) -> tuple[Any, Any, Any]:
    """Averages over weights drawn from the posterior around ``params``.

    ``(1/S) Σ_s`` of ``L(w_s)``, ``∇L(w_s)`` and the statistics there, ``w_s`` from
    ``kfac.bayes.sample``: an estimate of ``E_q[L]`` and of its gradient in the mean.
    Call it inside ``jax.jit``.

    Args:
        tagged: The tagged loss; for ``ivon`` any loss ``(params, *args) -> mean loss``.
        params: The mean ``μ``.
        *args: Further arguments of the loss.
        opt_state: State of an optimiser of ``kfac.bayes``; K-FAC's layers that are not
            due return zeros and cost nothing.
        key: PRNG key of the weights and of sampled labels.
        num_samples: ``S``.
        has_aux: Whether a loss that is not tagged returns ``(loss, aux)``.
        axis_name: Mapped axes along which every device draws weights of its own; None:
            all devices that share the key draw the same.
        deferred: Leave K-FAC's statistics to ``update``, see
            ``TaggedLoss.value_and_grad``.

    Returns:
        ``(value, grads, statistics)``, to be used like those of
        ``TaggedLoss.value_and_grad``: gradients are to be averaged over devices,
        ``update`` averages the statistics. With ``has_aux``, ``value`` is
        ``(loss, aux)`` with the aux of the last draw.

    Raises:
        ValueError: ``num_samples`` is not positive; no posterior in the state.
        TypeError: A loss that is not tagged where statistics of layers are wanted.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    posterior = find(opt_state)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    has_aux = tagged.has_aux if isinstance(tagged, TaggedLoss) else has_aux

    def one(key: Any):
        of_weights, of_labels = jax.random.split(key)
        weights = posterior.draw(params, of_weights)
        if hasattr(posterior, "observed"):
            loss = tagged.loss_fn if isinstance(tagged, TaggedLoss) else tagged
            value, grads = jax.value_and_grad(loss, has_aux=has_aux)(weights, *args)
            return value, grads, posterior.observed(params, weights, grads)
        if not isinstance(tagged, TaggedLoss):
            raise TypeError(
                f"{type(posterior).__name__} wants statistics of layers: pass what "
                "kfac.tag returns."
            )
        options = {"opt_state": opt_state, "key": of_labels, "deferred": deferred}
        return tagged.value_and_grad(weights, *args, **options)

    # Not a scan: jaxlib 0.10.2 runs convolutions in loops ten times slower on CPUs.
    found = [one(k) for k in jax.random.split(key, num_samples)]
    if num_samples == 1:
        return found[0]
    values, grads, statistics = zip(*found, strict=True)
    losses = [v[0] for v in values] if has_aux else list(values)
    loss = mean(losses)
    value = (loss, values[-1][1]) if has_aux else loss
    return value, mean(grads), mean_statistics(statistics)


def mean(trees: Any) -> Any:
    """The mean of trees."""
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]) / len(xs), *trees)


def mean_statistics(found: Sequence[Any]) -> Any:
    """The mean of draws' statistics; of deferred ones, deferred."""
    if any(isinstance(one, Deferred) for one in found):
        return Deferred(
            lambda gated: mean_statistics([computed(one, gated) for one in found])
        )
    return jax.tree.map(mean_of, *found, is_leaf=is_diagonal)


def is_diagonal(x: Any) -> bool:
    """Whether it is the statistics of a parameter without a rule."""
    return isinstance(x, DiagonalStatistics)


def mean_of(*values: Any) -> Any:
    """The mean; of diagonals, whose examples add up, that of the gradients."""
    if not is_diagonal(values[0]):
        return mean(values)
    count = jnp.sum(jnp.stack([v.num_examples for v in values]))
    return DiagonalStatistics(mean([v.gradient for v in values]), count)
