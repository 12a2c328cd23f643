"""Laplace approximations: a normal posterior around trained weights.

posterior = kfac.bayes.laplace(tagged, params, batches).tune_prior()
weights = posterior.draw(params, key)
probabilities = kfac.bayes.predict_glm(apply_fn, posterior, params, inputs)

The blocks of the curvature are kept in their eigenbases, where damping is exact: ``M =
Q diag(λ) Qᵀ`` with ``Q = Q_A ⊗ Q_G`` gives ``(a M + p I)^(-1/2) = Q diag((a λ +
p)^(-1/2)) Qᵀ`` for every ``a`` and ``p``, so that another prior needs no factorisation.

The marginal likelihood is ``log p(D) ≈ 1/τ log p(D | μ) + log p(μ) + P/2 log 2π − ½ log
det(N/τ F + p I)`` with ``log p(μ) = P/2 log(p/2π) − p/2 ‖μ‖²``, exact for a linear
model with normal noise at its maximum a posteriori. With one prior precision for every
layer it is ``1/τ log p(D | μ)`` and a sum over the layers of

``½ (P_l log p_l − p_l ‖μ_l‖² − Σ_i log(N/τ λ_i + p_l))``.

References:
    MacKay, 1992, "Bayesian interpolation", Neural Computation 4(3), 415-447, and "A
    practical Bayesian framework for backpropagation networks", 448-472; Ritter, Botev &
    Barber, 2018, "A scalable Laplace approximation for neural networks" (Kronecker);
    Immer et al., 2021, arXiv:2104.04975; Daxberger et al., 2021, arXiv:2106.14806.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from kfac_jax_lite.bayes.predictive import mean_nll, predict_glm
from kfac_jax_lite.core.likelihoods import masked_rows
from kfac_jax_lite.core.linalg import eigh
from kfac_jax_lite.core.types import Array
from kfac_jax_lite.curvature import matrices
from kfac_jax_lite.curvature.blocks import DensePart, EigenPart, Part
from kfac_jax_lite.curvature.laws import Law, kernel
from kfac_jax_lite.curvature.layout import Layout, make_layout
from kfac_jax_lite.curvature.operator import Kept
from kfac_jax_lite.curvature.products import static, wide
from kfac_jax_lite.curvature.stream import Stream, ravel
from kfac_jax_lite.statistics.outputs import marked_loss
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss
from kfac_jax_lite.tagging.interpreter import in_line

KEPT = ("diagonal", "kronecker", "ekfac", "unit_wise")
STRUCTURES = (*KEPT, "full", "last_layer")
METHODS = ("marginal_likelihood", "validation")
BOUNDS = (1e-6, 1e6)
# Most parameters of which a covariance is formed.
LARGEST = 8192
# Unit vectors pushed through the last layer together.
AT_ONCE = 256
# Of a field that is hashed where the posterior is traced.
STATIC = {"static": True}


class Eigenblocks(NamedTuple):
    """Blocks ``(Q_A ⊗ Q_G) diag(λ) (Q_A ⊗ Q_G)ᵀ`` of one size.

    They are at positions ``place [n, in, out]`` of the ravelled uncertain leaves, in
    the layers of numbers ``group [n]``. ``λ [n, in, out]`` is not negative; a basis,
    ``[n, in, in]`` or ``[n, out, out]``, is None where it is the identity.
    """

    place: Array
    values: Array
    q_a: Array | None
    q_g: Array | None
    group: Array

    def turn(self, x: Array) -> Array:
        """``Q_A X Q_Gᵀ``: from the eigenbasis, ``[*k, n, in, out]``."""
        x = x if self.q_a is None else self.q_a @ x
        return x if self.q_g is None else x @ jnp.swapaxes(self.q_g, -1, -2)

    def back(self, x: Array) -> Array:
        """``Q_Aᵀ X Q_G``: into the eigenbasis, ``[*k, n, in, out]``."""
        x = x if self.q_a is None else jnp.swapaxes(self.q_a, -1, -2) @ x
        return x if self.q_g is None else x @ self.q_g


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
        leaves: Numbers of the parameters' leaves that hold uncertain entries.
        structure: As given to ``laplace``.
    """

    blocks: tuple[Eigenblocks, ...]
    mean: Any
    num_data: Any
    temperature: Any
    prior_precision: Any
    log_likelihood: Any
    squared_norms: Any
    names: tuple[str, ...] = dataclasses.field(metadata=STATIC)
    leaves: tuple[int, ...] = dataclasses.field(metadata=STATIC)
    structure: str = dataclasses.field(metadata=STATIC)

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
        size = sum(leaf.size for leaf in self.uncertain(params))
        dtype = jnp.result_type(*[block.values.dtype for block in self.blocks])
        return self.moved(params, jax.random.normal(key, (size,), dtype))

    def moved(self, params: Any, noise: Array) -> Any:
        """``μ + R ε``, ``R Rᵀ = Σ``, of ``ε [D]`` for the ravelled uncertain leaves.

        Block by block ``R ε = Q ((N/τ λ + p)^(-1/2) ∘ ε)``.
        """
        own, offset = self.uncertain(params), jnp.zeros_like(noise)
        for block, deviations in self.scaled():
            turned = block.turn(deviations * noise[block.place])
            offset = offset.at[block.place].set(turned.astype(noise.dtype))
        parts = jnp.split(offset, np.cumsum([leaf.size for leaf in own])[:-1])
        values = [
            (leaf + part.reshape(leaf.shape)).astype(leaf.dtype)
            for leaf, part in zip(own, parts, strict=True)
        ]
        return self.replaced(params, values)

    def output_covariance(self, jacobian: Array) -> Array:
        """``J Σ Jᵀ`` of ``J [C, D]`` over the ravelled uncertain leaves."""
        found = [b.back(jacobian[:, b.place]) * scale for b, scale in self.scaled()]
        rows = jnp.concatenate([x.reshape(len(x), -1) for x in found], 1)
        return rows @ rows.T

    def scaled(self) -> list[tuple[Eigenblocks, Array]]:
        """Every block with its deviations ``(N/τ λ + p)^(-1/2)`` in the eigenbasis."""
        scale = self.num_data / self.temperature
        found = []
        for block in self.blocks:
            added = jnp.asarray(self.prior_precision)[block.group][:, None, None]
            precision = scale * block.values + added.astype(block.values.dtype)
            found.append((block, jax.lax.rsqrt(precision)))
        return found

    def uncertain(self, params: Any) -> list[Array]:
        """The leaves in ``leaves`` of parameters of the posterior's shapes."""
        wanted, _ = jax.tree_util.tree_flatten_with_path(self.mean)
        given = jax.tree.leaves(params)
        if len(given) != len(wanted):
            raise ValueError(
                f"the posterior is of parameters of {len(wanted)} leaves, got "
                f"{len(given)}."
            )
        for number in self.leaves:
            path, mean = wanted[number]
            if jnp.shape(given[number]) != jnp.shape(mean):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} has shape "
                    f"{jnp.shape(given[number])}, wanted {jnp.shape(mean)}, that of "
                    "the posterior."
                )
        return [given[number] for number in self.leaves]

    def replaced(self, params: Any, values: Sequence[Array]) -> Any:
        """The parameters with other values of the leaves in ``leaves``."""
        return replace_numbered(params, self.leaves, values)

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
        values = self.precisions(prior_precision).reshape(len(self.names))
        return dataclasses.replace(self, prior_precision=jnp.asarray(values))

    def precisions(self, prior: Any) -> np.ndarray:
        """``p`` of every layer in ``names``, ``[*k, layers]``; it must be positive."""
        if isinstance(prior, Mapping):
            if set(prior) != set(self.names):
                raise ValueError(
                    f"laplace: prior_precision names {tuple(prior)}, wanted all of "
                    f"{self.names}."
                )
            prior = np.asarray([prior[name] for name in self.names], np.float64)
        else:
            prior = np.asarray(prior, np.float64)[..., None].repeat(len(self.names), -1)
        check_positive(prior)
        return prior

    def log_marginal_likelihood(
        self, prior_precision: Any = None, temperature: int | float = 1.0
    ) -> Any:
        """``log p(D)``, approximately; the head of this file has the formula.

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
        table = np.asarray(self.prior_precision, np.float64)
        if prior_precision is not None:
            table = self.precisions(prior_precision)
        terms, rows = self.evidence_terms(temperature), np.atleast_2d(table)
        total = np.sum([term(rows[:, i]) for i, term in enumerate(terms)], axis=0)
        total = total + float(self.log_likelihood) / temperature
        return total if table.ndim == 2 else float(total[0])

    def evidence_terms(self, temperature: float) -> list[Callable[[Any], Any]]:
        """Every layer's term of the marginal likelihood, functions of ``p [k]``."""
        values: list[list[np.ndarray]] = [[] for _ in self.names]
        for block in self.blocks:
            own, owner = np.asarray(block.values, np.float64), np.asarray(block.group)
            for group in np.unique(owner):
                values[group].append(own[owner == group].ravel())
        scale = float(self.num_data) / temperature
        return [
            functools.partial(layer_evidence, np.concatenate(own), float(norm), scale)
            for own, norm in zip(values, np.asarray(self.squared_norms), strict=True)
        ]

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
        check_positive(np.asarray(bounds))
        if validation is None:
            terms = self.evidence_terms(1.0)
            if layerwise:
                best = [maximise(term, bounds, num_points) for term in terms]
                return self.with_prior(dict(zip(self.names, best, strict=True)))

            def total(p: Any):
                return np.sum([term(p) for term in terms], axis=0)

            return self.with_prior(maximise(total, bounds, num_points))
        grid = np.geomspace(*bounds, num_points)
        losses = [self.validation_loss(p, validation, options) for p in grid]
        if np.isnan(losses).all():
            raise ValueError("tune_prior: every validation loss is NaN.")
        return self.with_prior(grid[int(np.nanargmin(losses))])

    def validation_loss(
        self, prior: float, validation: tuple[Any, ...], options: dict[str, Any]
    ) -> float:
        """Mean negative log-likelihood of ``predict_glm`` under a prior."""
        apply_fn, inputs, labels = validation
        posterior, likelihood = self.with_prior(prior), options.get("likelihood")
        found = predict_glm(apply_fn, posterior, self.mean, inputs, **options)
        return float(mean_nll(likelihood or "categorical", found, jnp.asarray(labels)))


def check_positive(values: np.ndarray) -> None:
    """Precisions and temperatures must be positive and finite."""
    if not all(v > 0 and math.isfinite(v) for v in values.ravel()):
        raise ValueError(
            f"laplace: precisions and temperatures must be positive, got {values}."
        )


def layer_evidence(
    values: np.ndarray, squared_norm: float, scale: float, precisions: np.ndarray
) -> np.ndarray:
    """``½ (P_l log p − p ‖μ_l‖² − Σ_i log(N/τ λ_i + p)) [k]`` for ``p [k]``."""
    found = [
        len(values) * np.log(p) - p * squared_norm - np.log(scale * values + p).sum()
        for p in precisions
    ]
    return np.asarray(found) / 2


def maximise(
    function: Callable[[np.ndarray], np.ndarray],
    bounds: tuple[float, float],
    num_points: int,
) -> float:
    """The argument between bounds at which a function of ``[k]`` is largest.

    A grid in the logarithm finds the highest of several maxima, Brent's bounded search
    between the best point's neighbours refines it.
    """
    grid = np.log(np.geomspace(*bounds, num_points))
    values = function(np.exp(grid))
    best = int(np.argmax(values))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, num_points - 1)]
    found = scipy.optimize.minimize_scalar(
        lambda x: -function(np.exp([x]))[0],
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-8},
    )
    inner = -found.fun > values[best]
    return float(np.exp(found.x if inner else grid[best]))


def laplace(
    tagged: TaggedLoss,
    params: Any,
    batches: Any,
    structure: str = "kronecker",
    *,
    num_data: int | float | None = None,
    prior_precision: Any = 1.0,
    temperature: int | float = 1.0,
    last_layer: str | None = None,
    variance: Any = 1.0,
    key: Any = None,
    progress: bool = False,
) -> LaplacePosterior:
    """The posterior ``N(μ, (N/τ F + p I)⁻¹)`` around the weights ``μ``.

    ``F`` is the generalised Gauss-Newton matrix of the mean loss, ``p`` the precision
    of the prior ``N(0, I/p)``: with ``δ = τ p / N`` the covariance is ``(τ/N)
    (F + δ I)⁻¹``. ``μ`` ought to be near a maximum a posteriori; weights that training
    left elsewhere are taken for one.

    Args:
        tagged: The tagged loss, the mean of ``−log p(y | x, w)`` alone, with the output
            marked. The prior belongs to ``prior_precision``: what a loss adds to its
            likelihood would be counted as part of it by the marginal likelihood.
        params: ``μ``.
        batches: Tuples of the loss's other arguments, as for ``kfac.curvature.ggn``.
        structure: ``"kronecker"`` (each layer's ``A ⊗ G``, damped exactly, in the
            factors' eigenbases), ``"ekfac"``, ``"diagonal"``, ``"unit_wise"`` (see
            ``kfac.curvature.ggn`` for their costs), ``"full"`` (one matrix) or
            ``"last_layer"`` (one matrix of the last layer's parameters).
        num_data: ``N``; None: the rows of all batches (terms of the mean loss that
            count). More than those where batches are a sample of the data, or data are
            augmented.
        prior_precision: ``p``; or one for every layer, by name.
        temperature: ``τ``: one for Bayes, less for a cold posterior.
        last_layer: Name of the only layer that is uncertain, of ``tagged.layers``; the
            other parameters stay at ``μ``. None: all of them, and for ``"last_layer"``
            the layer that runs last before the marked output.
        variance: Of a normal output's noise, as given to ``kfac.normal``; only the
            constant of the likelihood needs it.
        key: PRNG key: ``F`` is estimated with one label per row drawn from the model
            (``kfac.curvature.mc_fisher``), cheaper where there are many outputs.
        progress: Whether to show a bar over the batches (needs rich).

    Returns:
        The posterior.

    Raises:
        ValueError: An unknown structure or layer; a precision, temperature or ``N``
            that is not positive; more parameters than a matrix is formed of; no output
            marked.
        FloatingPointError: The curvature is not finite.
    """
    if structure not in STRUCTURES:
        raise ValueError(
            f"laplace: structure must be one of {STRUCTURES}, got {structure!r}."
        )
    law = Law("ggn", "exact") if key is None else Law("mc_fisher", "mc")
    matrices.check_batches(law, batches)
    layout = make_layout(tagged, params)
    if structure == "last_layer" and last_layer is None:
        last_layer = last_layer_name(tagged, params, tuple(next(iter(batches))))
    names, owner = owners(layout, last_layer)
    covered = owner >= 0
    if structure == "full" and last_layer is None:
        names, owner = ("all",), 0 * owner
    if structure not in KEPT and covered.sum() > LARGEST:
        what = "the network" if last_layer is None else f"layer {last_layer}"
        raise ValueError(
            f"laplace: structure={structure!r} forms the matrix of {what}, of "
            f"{covered.sum():,} parameters, more than the {LARGEST:,} that are formed: "
            "use structure='kronecker' or 'diagonal'."
        )
    leaves, moved = uncertain_leaves(params, covered)
    stream = Stream(tagged, law, params, batches, key, progress, None)
    if structure in KEPT:
        form = matrices.APPROXIMATIONS[structure](stream)
        assert isinstance(form, Kept)
        parts = form.parts
    else:
        place = np.flatnonzero(covered)

        def moment(number: int, args: tuple[Any, ...]):
            index = jnp.asarray(moved[place])
            return block_moment(*stream.batch_of(number, args), index, leaves)

        block = stream.mean(moment, "last layer")
        parts = [DensePart(jnp.asarray(place)[None], (block + block.T)[None] / 2)]
    total, rows = stream.total(
        lambda _, args: negative_log_likelihood(tagged, params, args, variance),
        "likelihood",
    )
    n = int(rows) if num_data is None else num_data
    for name, value in (("num_data", n), ("temperature", temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"laplace: {name} must be positive, got {value!r}.")
    squares = np.square(np.asarray(ravel(params), np.float64)[covered])
    posterior = LaplacePosterior(
        blocks=eigenblocks(parts, moved, owner, names),
        mean=params,
        num_data=float(n),
        temperature=temperature,
        prior_precision=jnp.ones(len(names)),
        log_likelihood=-n * float(total) / int(rows),
        squared_norms=np.bincount(owner[covered], squares, len(names)),
        names=names,
        leaves=leaves,
        structure=structure,
    )
    return posterior.with_prior(prior_precision)


def last_layer_name(tagged: TaggedLoss, params: Any, args: tuple[Any, ...]) -> str:
    """The layer that runs last before the marked output."""
    found = tagged.trace(params, args, True)
    sites = in_line(found.plan, found.closed.jaxpr)
    names = [site.layer for site, _ in sites if site.layer is not None]
    if not names:
        raise ValueError(
            "no layer outside loops and branches produces the marked output: name one, "
            f"last_layer=…, of {tuple(layer.name for layer in tagged.layers)}."
        )
    return names[-1]


def uncertain_leaves(
    params: Any, covered: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray]:
    """Numbers of the leaves that hold covered entries, ``covered`` a bool ``[P]``.

    And the position ``[P]`` of every entry among these leaves' (-1: in none).
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    parts = np.split(covered, np.cumsum(sizes)[:-1])
    held = np.array([part.any() for part in parts])
    kept = np.repeat(held, sizes)
    moved = np.where(kept, np.cumsum(kept) - 1, -1)
    return tuple(np.flatnonzero(held).tolist()), moved


def replace_numbered(
    params: Any, numbers: Sequence[int], values: Sequence[Array]
) -> Any:
    """The parameters with other values of some leaves."""
    leaves, structure = jax.tree.flatten(params)
    for number, value in zip(numbers, values, strict=True):
        leaves[number] = value
    return jax.tree.unflatten(structure, leaves)


def owners(layout: Layout, only: str | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the uncertain layers, and the number of every entry's, ``[P]``, or -1.

    All layers are, and the entries that none reads; or ``only`` one.
    """
    layers = {layer.name: index for layer, index in layout.layers}
    if only is not None and only not in layers:
        raise ValueError(
            f"laplace: last_layer={only!r} is not a layer of the tagged loss, wanted "
            f"one of {tuple(layers)}."
        )
    names, owner = tuple(layers) if only is None else (only,), np.full(layout.size, -1)
    for number, name in enumerate(names):
        owner[layers[name]] = number
    if only is None and (owner < 0).any():
        owner[owner < 0], names = len(names), (*names, "rest")
    return names, owner


def eigenblocks(
    parts: Sequence[Part], moved: np.ndarray, owner: np.ndarray, names: tuple[str, ...]
) -> tuple[Eigenblocks, ...]:
    """The uncertain blocks of all parts in their eigenbases; they must be finite."""
    found = []
    for part in parts:
        group = owner[np.asarray(part.place).reshape(len(part.place), -1)[:, 0]]
        inside = group >= 0
        if not inside.any():
            continue
        group, part = group[inside], jax.tree.map(lambda x, i=inside: x[i], part)
        place, q_g = np.asarray(part.place), None
        if isinstance(part, DensePart):
            place = place[..., None]
            values, q_a = part.eigen()
            q_a = None if place.shape[1] == 1 else q_a
        elif isinstance(part, EigenPart):
            values, q_a, q_g = part.eigen()
        else:
            (d_a, q_a), (d_g, q_g) = (
                (x, None) if x.ndim == 2 else eigh(x) for x in (part.a, part.g)
            )
            values = d_a[:, :, None] * d_g[:, None]
        values = jnp.maximum(values.reshape(place.shape), 0)
        finite = np.isfinite(np.asarray(values)).all((1, 2))
        if not finite.all():
            bad = sorted({names[number] for number in group[~finite]})
            raise FloatingPointError(
                f"laplace: the curvature of {', '.join(bad)} is not finite: are the "
                "parameters and the batches?"
            )
        where, group = jnp.asarray(moved[place]), jnp.asarray(group, jnp.int32)
        found.append(Eigenblocks(where, values, q_a, q_g, group))
    return tuple(found)


@static("tagged")
def negative_log_likelihood(
    tagged: TaggedLoss, params: Any, args: tuple[Any, ...], variance: Any
) -> tuple[Any, Any]:
    """``(Σ_n −log p(y_n | z_n), N)`` on one batch, constants included."""
    model = marked_loss(tagged, params, args)
    loss, marks = model.values(params)
    n = jnp.asarray(model.num_terms(marks))
    total = n * wide(loss)
    for output in model.outputs(marks):
        if output.likelihood == "normal":
            each = jnp.log(2 * jnp.pi * jnp.asarray(variance, total.dtype)) / 2
            each = jnp.broadcast_to(each, output.value.shape)
            total = total + masked_rows(output, each).sum()
    return total, n


@static("tagged", "law", "numbers")
def block_moment(
    tagged: TaggedLoss,
    law: Law,
    params: Any,
    args: tuple[Any, ...],
    key: Any,
    index: Array,
    numbers: tuple[int, ...],
) -> tuple[Array, Any]:
    """One block ``[k, k]`` of ``N M = Σ_n J_nᵀ K_n J_n``, and ``N``, on one batch.

    It is at positions ``index [k]`` of the ravelled leaves ``numbers``. What does not
    depend on those is computed once; a unit vector then passes through what follows
    them only. For a last layer that is one product, so that the block costs about what
    forming it from the layer's inputs would.
    """
    model = marked_loss(tagged, params, args)
    leaves = jax.tree.leaves(params)
    flat, unravel = jax.flatten_util.ravel_pytree([leaves[i] for i in numbers])

    def values(own: Any):
        return model.values(replace_numbered(params, numbers, own))[1]

    marks, forward = jax.linearize(values, unravel(flat))
    curve = kernel(law, model, params, marks, key)

    def images(position: Array):
        moved = forward(unravel(jnp.zeros_like(flat).at[position].set(1)))
        both = wide((moved, curve(moved)))
        return [jnp.concatenate([x.ravel() for x in side]) for side in both]

    pushed, curved = jax.lax.map(images, index, batch_size=AT_ONCE)
    return pushed @ curved.T, model.num_terms(marks)
