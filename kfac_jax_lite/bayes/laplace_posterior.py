"""The posterior that ``laplace`` makes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.bayes.laplace_blocks import Eigenblocks, Leaves
from kfac_jax_lite.bayes.laplace_evidence import (
    group_eigenvalues,
    layer_evidence,
    maximise,
)
from kfac_jax_lite.bayes.laplace_predictive import mean_nll, predict_glm
from kfac_jax_lite.core.types import Array

METHODS = ("marginal_likelihood", "validation")
BOUNDS = (1e-6, 1e6)


def static() -> Any:
    """A field that is hashed where the posterior is traced."""
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaplacePosterior:
    """``N(μ, (N/τ F + p I)⁻¹)``, in the eigenbases of the blocks of ``F``.

    A pytree: it can be an argument of a jitted function, and another prior or
    temperature does not compile anew.

    Attributes:
        blocks: The blocks of ``F``.
        mean: ``μ``, all parameters.
        num_data: ``N``.
        temperature: ``τ``.
        prior_precision: ``p`` of every layer in ``names``.
        log_likelihood: ``log p(D | μ)``, for ``N`` data.
        squared_norms: ``‖μ_l‖²`` of every layer in ``names``.
        names: The uncertain layers; ``("all",)`` where one matrix joins them.
        leaves: The leaves that hold the uncertain parameters.
        structure: As given to ``laplace``.
    """

    blocks: tuple[Eigenblocks, ...]
    mean: Any
    num_data: Any
    temperature: Any
    prior_precision: Any
    log_likelihood: Any
    squared_norms: Any
    names: tuple[str, ...] = static()
    leaves: Leaves = static()
    structure: str = static()

    @property
    def size(self) -> int:
        """``P``: how many parameters are uncertain."""
        return sum(block.place.size for block in self.blocks)

    def __repr__(self) -> str:
        """What it is: structure, parameters, layers."""
        return (
            f"<Laplace posterior, {self.structure}, of {self.size:,} parameters in "
            f"{len(self.names)} layer{'s' * (len(self.names) != 1)}: "
            f"{', '.join(self.names)}>"
        )

    # ---------------------------------------------------------------- weights

    def draw(self, params: Any, key: Any) -> Any:
        """One draw of the weights, ``μ + Σ^(1/2) ε``.

        Args:
            params: ``μ``.
            key: PRNG key.

        Returns:
            Shaped like ``params``; what is not uncertain is as it was.
        """
        dtype = jnp.result_type(*[block.values.dtype for block in self.blocks])
        noise = jax.random.normal(key, (self.leaves.size,), dtype)
        return self.leaves.moved(params, self.root_product(noise))

    def root_product(self, noise: Array) -> Array:
        """``R ε`` with ``R Rᵀ = Σ``: block by block ``Q ((N/τ λ + p)^(-1/2) ∘ ε)``.

        Args:
            noise: ``ε [D]``, one for every entry of the leaves in ``leaves``.

        Returns:
            ``[D]``, in the order of the ravelled leaves; zero where nothing is
            uncertain.
        """
        offset = jnp.zeros_like(noise)
        for block, deviations in self.scaled():
            turned = block.turn(deviations * noise[block.place])
            offset = offset.at[block.place].set(turned.astype(noise.dtype))
        return offset

    def scaled(self) -> list[tuple[Eigenblocks, Array]]:
        """Every block with its deviations in the eigenbasis."""
        scale = self.num_data / self.temperature
        precision = jnp.asarray(self.prior_precision)
        return [(b, b.deviations(scale, precision)) for b in self.blocks]

    def output_covariance(self, jacobian: Array) -> Array:
        """``J Σ Jᵀ``.

        Args:
            jacobian: ``J [C, D]`` over the ravelled leaves in ``leaves``.

        Returns:
            ``[C, C]``.
        """
        rows = [
            (block.back(jacobian[:, block.place]) * deviations).reshape(
                len(jacobian), -1
            )
            for block, deviations in self.scaled()
        ]
        whole = jnp.concatenate(rows, 1)
        return whole @ whole.T

    # ---------------------------------------------------------------- the prior

    def with_prior(self, prior_precision: Any) -> "LaplacePosterior":
        """The posterior under another prior; nothing is factorised again.

        Args:
            prior_precision: ``p``, or one for every layer in ``names``, by name.

        Returns:
            The posterior.

        Raises:
            ValueError: A precision that is not positive; names that are not the
                layers'.
        """
        if isinstance(prior_precision, Mapping):
            values = self.by_layer(prior_precision)
        else:
            values = np.full(len(self.names), prior_precision, np.float64)
        check_positive(values)
        return dataclasses.replace(self, prior_precision=jnp.asarray(values))

    def by_layer(self, precisions: Mapping[str, float]) -> np.ndarray:
        """Precisions in the order of ``names``."""
        if set(precisions) != set(self.names):
            raise ValueError(
                f"laplace: prior_precision names {tuple(precisions)}, wanted all of "
                f"{self.names}."
            )
        return np.asarray([precisions[name] for name in self.names], np.float64)

    def log_marginal_likelihood(
        self, prior_precision: Any = None, temperature: int | float = 1.0
    ) -> Any:
        """``log p(D)``, approximately; see ``laplace_evidence`` for the formula.

        On the host, in float64, from eigenvalues that are known. With another
        temperature it is that of the likelihood to the power ``1/τ``.

        Args:
            prior_precision: ``p``; several ``[k]``; one for every layer, by name; None:
                the posterior's own.
            temperature: ``τ``; one, whatever the posterior's is.

        Returns:
            A float; ``[k]`` for several precisions.

        Raises:
            ValueError: A precision or temperature that is not positive; names that are
                not the layers'.
        """
        check_positive(np.asarray(temperature))
        count = len(self.names)
        if prior_precision is None:
            table = np.asarray(self.prior_precision, np.float64)[None]
        elif isinstance(prior_precision, Mapping):
            table = self.by_layer(prior_precision)[None]
        else:
            table = np.asarray(prior_precision, np.float64).reshape(-1, 1)
            table = np.repeat(table, count, 1)
        check_positive(table)
        terms = self.evidence_terms(temperature)
        total = np.sum([term(table[:, i]) for i, term in enumerate(terms)], axis=0)
        total = total + float(self.log_likelihood) / temperature
        several = not isinstance(prior_precision, Mapping | None)
        return total if several and np.ndim(prior_precision) else float(total[0])

    def evidence_terms(self, temperature: float) -> list[Callable[[Any], Any]]:
        """Every layer's term of the marginal likelihood, functions of ``p [k]``."""
        scale = float(self.num_data) / temperature
        values = group_eigenvalues(self.blocks, len(self.names))
        norms = np.asarray(self.squared_norms, np.float64)

        def term(group: int) -> Callable[[Any], Any]:
            return lambda p: layer_evidence(
                values[group], float(norms[group]), scale, p
            )

        return [term(group) for group in range(len(values))]

    def tune_prior(
        self,
        method: str = "marginal_likelihood",
        *,
        layerwise: bool = False,
        validation: tuple[Any, ...] | None = None,
        bounds: tuple[float, float] = BOUNDS,
        num_points: int = 61,
        **options: Any,
    ) -> "LaplacePosterior":
        """The posterior under the prior that suits the data best.

        Args:
            method: ``"marginal_likelihood"``: maximises it at temperature one.
                ``"validation"``: minimises the mean negative log-likelihood of
                ``predict_glm`` over a grid, at the posterior's temperature.
            layerwise: One precision for every layer; the marginal likelihood is a sum
                over the layers, so that each is maximised by itself.
            validation: ``(apply_fn, inputs, labels)`` for ``"validation"``.
            bounds: Least and largest precision.
            num_points: Of the grid, even in the logarithm; the marginal likelihood is
                then refined between its best point's neighbours.
            **options: Those of ``predict_glm``, for ``"validation"``.

        Returns:
            The posterior; at a bound, where a better prior lies beyond it.

        Raises:
            ValueError: An unknown method; validation data that are missing or not
                asked for; precisions by layer where there is one matrix or by
                validation.
        """
        self.check_tuning(method, layerwise, validation, options)
        check_positive(np.asarray(bounds))
        if validation is not None:
            grid = np.geomspace(*bounds, num_points)
            losses = [self.validation_loss(p, validation, options) for p in grid]
            if np.isnan(losses).all():
                raise ValueError("tune_prior: every validation loss is NaN.")
            return self.with_prior(grid[int(np.nanargmin(losses))])
        terms = self.evidence_terms(1.0)
        if layerwise:
            best = [maximise(term, bounds, num_points) for term in terms]
            return self.with_prior(dict(zip(self.names, best, strict=True)))

        def total(p: Any):
            return np.sum([term(p) for term in terms], axis=0)

        return self.with_prior(maximise(total, bounds, num_points))

    def check_tuning(
        self, method: str, layerwise: bool, validation: Any, options: dict[str, Any]
    ) -> None:
        """The method must be known, and have what it needs."""
        if method not in METHODS:
            raise ValueError(
                f"tune_prior: method must be one of {METHODS}, got {method!r}."
            )
        if (method == "validation") != (validation is not None):
            raise ValueError(
                "tune_prior: method='validation' and validation=(apply_fn, inputs, "
                f"labels) belong together, got {method!r} and "
                f"{'none' if validation is None else 'data'}."
            )
        if layerwise and (validation is not None or self.names == ("all",)):
            raise ValueError(
                "tune_prior: layerwise wants the marginal likelihood of a structure "
                f"whose layers are independent, got {method!r} of {self!r}."
            )
        if options and validation is None:
            raise ValueError(
                f"tune_prior: {tuple(options)} are of method='validation' only."
            )

    def validation_loss(
        self,
        prior_precision: float,
        validation: tuple[Any, ...],
        options: dict[str, Any],
    ) -> float:
        """Mean negative log-likelihood of ``predict_glm`` under a prior."""
        apply_fn, inputs, labels = validation
        posterior = self.with_prior(prior_precision)
        found = predict_glm(apply_fn, posterior, self.mean, inputs, **options)
        likelihood = options.get("likelihood", "categorical")
        return float(mean_nll(likelihood, found, jnp.asarray(labels)))


def check_positive(values: np.ndarray) -> None:
    """Precisions and temperatures must be positive and finite."""
    if not all(v > 0 and math.isfinite(v) for v in values.ravel()):
        raise ValueError(
            f"laplace: precisions and temperatures must be positive, got {values}."
        )
