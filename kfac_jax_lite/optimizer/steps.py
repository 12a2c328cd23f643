"""What a step is made of, once the gradient is preconditioned.

``bounded``: the trust region, then momentum, weight decay and learning rate by optax.

``guided``: steps chosen by the quadratic model. ``d = −α u + μ d_prev`` with ``u`` the
preconditioned gradient. ``α, μ`` minimise ``M(d) = ∇Lᵀ d + ½ dᵀ (C + λ I) d``, a system
of two unknowns, and ``λ`` follows the Levenberg-Marquardt rule. The model is asked at
every step; a part of the batch may be enough for it.

``adapted``: the damping follows the slopes at both ends of a step, which may be taken
back.

References:
    Martens & Grosse, 2015, arXiv:1503.05671, Secs. 6.4, 6.5, 7; Ba et al., 2017 (the
    trust region).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kfac_jax_lite.core.control import apart
from kfac_jax_lite.core.linalg import LARGEST
from kfac_jax_lite.core.mesh import automatic
from kfac_jax_lite.core.pytree import choose, find_states
from kfac_jax_lite.core.types import Array, accumulation_dtype
from kfac_jax_lite.kronecker.state import KFACState
from kfac_jax_lite.optimizer.damping import Adaptive, LevenbergMarquardt, value_at
from kfac_jax_lite.optimizer.line_search import keep_from_searches


class KFACChainState(NamedTuple):
    """State of ``kfac``.

    Attributes:
        kfac: State of ``scale_by_kfac``.
        tail: State of the optax transformations behind it.
        trust: Factor ``ν`` of the trust region at the last step; 1 where it is slack.
    """

    kfac: KFACState
    tail: Any
    trust: Array


def bounded(
    precondition: optax.GradientTransformationExtraArgs,
    tail: optax.GradientTransformationExtraArgs,
    learning_rate: Any,
    kl_clip: Any,
) -> optax.GradientTransformationExtraArgs:
    """Preconditioning, the trust region, and what optax does behind them."""

    def init_fn(params: Any):
        inner: Any = precondition.init(params)
        return KFACChainState(inner, tail.init(params), jnp.ones((), jnp.float32))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        grads = updates
        inner: Any
        updates, inner = precondition.update(grads, state.kfac, params, **extra_args)
        accepted, count = inner.skipped == state.kfac.skipped, state.kfac.count
        trust = jnp.ones((), jnp.float32)
        if kl_clip is not None:
            rate = value_at(learning_rate, count)
            clip = value_at(kl_clip, count) if callable(kl_clip) else kl_clip
            trust = automatic(region, accepted, updates, grads, rate, clip)
            # In their own dtype: the momentum's must not change.
            updates = jax.tree.map(lambda u: (trust * u).astype(u.dtype), updates)
        updates, new_tail = tail.update(updates, state.tail, params, count=count)
        kept = without_velocity(state.tail, extra_args.get("reject", False))
        new_tail = choose(accepted, new_tail, kept)
        updates = jax.tree.map(lambda u: jnp.where(accepted, u, 0), updates)
        trust = jnp.where(accepted, trust, state.trust).astype(jnp.float32)
        return updates, KFACChainState(inner, new_tail, trust)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def heavy_ball(momentum: Any) -> optax.GradientTransformation:
    """``optax.trace``, whose decay may be a schedule.

    ``optax.inject_hyperparams(optax.trace)`` would do, but for its state, another than
    that of a number, and for a decay in the widest type of the parameters, which then
    becomes the type of every velocity.
    """
    if not callable(momentum):
        return optax.trace(momentum)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        count: Any = None,
        **extra_args: Any,
    ):
        del params, extra_args
        decay = value_at(momentum, count)
        velocity = jax.tree.map(
            lambda u, v: u + decay.astype(v.dtype) * v, updates, state.trace
        )
        return velocity, optax.TraceState(velocity)

    return optax.GradientTransformationExtraArgs(optax.trace(0.0).init, update_fn)


def without_velocity(tail: Any, flag: Any) -> Any:
    """The state of ``tail`` with a velocity of zero where ``flag``."""
    if flag is False:
        return tail

    def is_velocity(x: Any):
        return isinstance(x, optax.TraceState)

    def forget(x: Any):
        return jax.tree.map(lambda v: jnp.where(flag, 0, v), x) if is_velocity(x) else x

    return jax.tree.map(forget, tail, is_leaf=is_velocity)


def region(accepted: Array, updates: Any, grads: Any, rate: Any, clip: Any) -> Array:
    """The trust region's factor, 1 for a batch that was rejected."""

    def factor():
        return trust_region(updates, grads, rate, clip)

    return apart(accepted, factor, 1, updates)


def trust_region(updates: Any, grads: Any, rate: Any, kl_clip: Any) -> Array:
    """``ν = min(1, √(κ / (η² Σ uᵀ∇L)))``.

    Args:
        grads: ``∇L``.
    """

    def product(u: Any, g: Any):
        dtype = accumulation_dtype(u.dtype)
        return jnp.sum(u.astype(dtype) * g.astype(dtype))

    products = jax.tree.map(product, updates, grads)
    size = jnp.square(rate) * sum(jax.tree.leaves(products))
    bounded = jnp.sqrt(kl_clip / jnp.where(size > 0, size, 1))
    return jnp.where(size > 0, jnp.minimum(1.0, bounded), 1.0)


class GuidedState(NamedTuple):
    """State of K-FAC with steps from the quadratic model.

    Attributes:
        kfac: State of ``scale_by_kfac``.
        velocity: Last update ``d``.
        damping: ``λ``.
        learning_rate: ``α`` in force.
        momentum: ``μ`` in force.
        ratio: Reduction ratio ``ρ`` when the damping was last adapted; before,
            the most negative float32.
    """

    kfac: KFACState
    velocity: Any
    damping: Array
    learning_rate: Array
    momentum: Array
    ratio: Array


@dataclasses.dataclass(frozen=True)
class Guide:
    """What the quadratic model decides, and the values that it does not.

    Attributes:
        automatic: Whether the model chooses ``α`` and ``μ``.
        damping: A number, a schedule, or the Levenberg-Marquardt rule.
        learning_rate: ``α`` where it is not automatic, a number or a schedule.
        momentum: ``μ`` where the learning rate is not automatic, a number or a
            schedule; or None.
        weight_decay: Decoupled, multiplied by ``α``.
        mask: Which parameters decay, as in ``optax.add_decayed_weights``.
        axis_name: Mapped axes over which the model is averaged.
    """

    automatic: bool
    damping: Any
    learning_rate: Any
    momentum: Any
    weight_decay: Any
    mask: Any
    axis_name: Any

    @property
    def rule(self) -> LevenbergMarquardt | None:
        """The rule that adapts the damping, if any."""
        return self.damping if isinstance(self.damping, LevenbergMarquardt) else None

    def init(self, kfac: Any, params: Any) -> GuidedState:
        """The state before the first step."""
        first = self.rule.initial if self.rule else 0
        numbers = [jnp.asarray(x, jnp.float32) for x in (first, 0, 0, -LARGEST)]
        velocity = jax.tree.map(jnp.zeros_like, params)
        return GuidedState(kfac, velocity, *numbers)

    def given(self, state: GuidedState) -> GuidedState:
        """The state with the values in force that the model does not choose."""
        count, values = state.kfac.count, {}
        if not self.rule:
            values["damping"] = value_at(self.damping, count)
        if not self.automatic:
            values["learning_rate"] = value_at(self.learning_rate, count)
            momentum = 0 if self.momentum is None else self.momentum
            values["momentum"] = value_at(momentum, count)
        values = {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}
        return state._replace(**values)

    def consult(
        self, state: GuidedState, due: Any, model: Any, params: Any, grads: Any, u: Any
    ) -> GuidedState:
        """Asks the quadratic model for ``α``, ``μ``, ``ρ``; adapts ``λ`` where due."""
        vectors = (jax.tree.map(jnp.negative, u), state.velocity)
        loss, slopes, gram = mean(model.products(vectors), self.axis_name)
        squares = [[inner(v, w) for w in vectors] for v in vectors]
        curvature = gram + state.damping * jnp.array(squares)
        weights = jnp.stack([state.learning_rate, state.momentum])
        if self.automatic:
            weights = minimise(curvature, jnp.stack([inner(grads, v) for v in vectors]))
        rate, momentum = weights.astype(jnp.float32)
        state = state._replace(learning_rate=rate, momentum=momentum)
        rule = self.rule
        if rule is None:
            return state
        predicted = slopes @ weights + 0.5 * weights @ curvature @ weights

        def judged(state: GuidedState):
            new = optax.apply_updates(params, combine(weights, vectors))
            change = mean(model.loss(new), self.axis_name) - loss
            # A model that predicts no decrease is not to be trusted, whatever the loss.
            ratio = change / jnp.where(predicted < 0, predicted, 1)
            ratio = jnp.where(predicted < 0, ratio, -LARGEST)
            damping = rule.adjust(state.damping, ratio)
            return state._replace(
                damping=damping.astype(jnp.float32), ratio=ratio.astype(jnp.float32)
            )

        return lax.cond(due, judged, lambda state: state, state)

    def direction(self, state: GuidedState, velocity: Any, params: Any, u: Any) -> Any:
        """``d = −α u + μ d_prev``, less the decayed weights."""
        weights = jnp.stack([state.learning_rate, state.momentum])
        d = combine(weights, (jax.tree.map(jnp.negative, u), velocity))
        if isinstance(self.weight_decay, (int, float)) and self.weight_decay == 0:
            return d
        rate = self.weight_decay * state.learning_rate
        decay = optax.add_decayed_weights(-rate, self.mask)
        decayed, _ = decay.update(d, decay.init(params), params)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), decayed, d)


def guided(
    precondition: optax.GradientTransformationExtraArgs, guide: Guide
) -> optax.GradientTransformationExtraArgs:
    """K-FAC whose step the quadratic model decides, wholly or in part.

    Args:
        precondition: ``scale_by_kfac(…)``.
    """

    def init_fn(params: Any):
        return guide.init(precondition.init(params), params)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        model: Any = None,
        **extra_args: Any,
    ):
        if model is None or params is None:
            raise ValueError(
                'learning_rate="auto" and levenberg_marquardt need params and model=: '
                "pass tx.update(grads, opt_state, params, statistics=statistics, "
                "model=kfac.quadratic_model(tagged, params, *batch))."
            )
        keep_from_searches({**extra_args, "model": model})
        state = guide.given(state)
        if "damping" in extra_args:  # of a rule around this
            state = state._replace(damping=extra_args["damping"])
        extra_args["damping"] = state.damping
        old: Any = state.kfac
        new: Any
        u, new = precondition.update(updates, old, params, **extra_args)
        accepted = new.skipped == old.skipped
        due = guide.rule is not None and old.count % guide.rule.interval == 0
        asked = guide.consult(state, due, model, params, updates, u)
        asked = choose(accepted, asked, state)
        d = guide.direction(asked, state.velocity, params, u)
        none = jax.tree.map(jnp.zeros_like, d)
        kept = choose(extra_args.get("reject", False), none, state.velocity)
        velocity = choose(accepted, d, kept)
        d = jax.tree.map(lambda x: jnp.where(accepted, x, 0), d)
        return d, asked._replace(kfac=new, velocity=velocity)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def inner(x: Any, y: Any) -> Array:
    """``xᵀ y`` of two trees, in float32 or better."""
    return jnp.asarray(automatic(optax.tree.vdot, x, y))


def mean(tree: Any, axis_name: Any) -> Any:
    """Mean over devices, if there are mapped axes."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def combine(weights: Array, vectors: tuple[Any, ...]) -> Any:
    """``Σ w_i v_i``."""
    return jax.tree.map(
        lambda *xs: sum(
            (w * x).astype(x.dtype) for w, x in zip(weights, xs, strict=True)
        ),
        *vectors,
    )


def minimise(curvature: Array, slopes: Array) -> Array:
    """Minimises ``slopesᵀ w + ½ wᵀ K w`` over two weights.

    Where the second direction vanishes or is parallel to the first, only the first is
    used.

    Args:
        curvature: ``K [2, 2]``.
        slopes: ``[2]``.

    Returns:
        ``w [2]``; zeros where the curvature along the first direction is not positive.
    """
    (a, b), (_, d) = curvature
    determinant = a * d - b * b
    proper = determinant > 1e-6 * a * d
    safe = jnp.where(proper, determinant, 1)
    both = jnp.stack([b * slopes[1] - d * slopes[0], b * slopes[0] - a * slopes[1]])
    alone = jnp.stack([-slopes[0] / jnp.where(a > 0, a, 1), jnp.zeros_like(a)])
    w = jnp.where(proper, both / safe, alone)
    return jnp.where(a > 0, w, 0)


# Weight of the greatest slope before: that of a step long ago is no measure.
MEMORY = 0.9


class AdaptedState(NamedTuple):
    """State of an optimiser whose damping is adapted.

    Attributes:
        inner: State of the optimiser.
        step: ``d``, the last update.
        damping: ``λ`` in force.
        slope: ``dᵀ∇L`` where ``d`` began, on its own batch; 0 before the first step and
            after one that was taken back.
        scale: The greatest ``|dᵀ∇L|`` of late: ``σ ← max(|dᵀ∇L|, 0.9 σ)``.
        agreement: ``r`` of the last step; the largest float32 where there is none, and
            the most negative where the step began uphill.
        retreats: Steps that were taken back.
    """

    inner: Any
    step: Any
    damping: Array
    slope: Array
    scale: Array
    agreement: Array
    retreats: Array


def adapted(
    inner: optax.GradientTransformationExtraArgs,
    rule: Adaptive,
    lag: Any = 1,
    sign: int = -1,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose damping follows a rule.

    Args:
        inner: It takes ``damping=`` and ``reject=`` in ``update``.
        sign: That of ``dᵀ∇L`` for a step downhill: −1 for updates that are added to
            parameters, 1 for preconditioned gradients, which cannot be taken back.
    """
    retreats = rule.retreat is not None and sign < 0

    def init_fn(params: Any):
        return AdaptedState(
            inner=inner.init(params),
            step=jax.tree.map(jnp.zeros_like, params),
            damping=jnp.asarray(rule.initial, jnp.float32),
            slope=jnp.zeros((), jnp.float32),
            scale=jnp.zeros((), jnp.float32),
            agreement=jnp.asarray(LARGEST, jnp.float32),
            retreats=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        grads = updates
        end = slope_along(state.step, grads)
        began, downhill = state.slope != 0, state.slope * sign > 0
        agreement = jnp.where(
            downhill, end / jnp.where(began, state.slope, 1), -LARGEST
        )
        agreement = jnp.where(began, agreement, LARGEST)
        damping, back = rule.adjust(state.damping, agreement, lag), jnp.asarray(False)
        if retreats:
            back = began & (end > state.scale)
            scale = jnp.where(began, state.scale, 1)
            raised = rule.raised(state.damping, end / scale)
            damping = jnp.where(back, raised, damping)
            extra_args["reject"] = back
        extra_args["damping"] = damping
        d, new = inner.update(grads, state.inner, params, **extra_args)
        pairs = zip(find_states(new), find_states(state.inner), strict=True)
        accepted = jnp.all(jnp.stack([n.skipped == o.skipped for n, o in pairs]))
        if retreats:
            d = choose(back, jax.tree.map(jnp.negative, state.step), d)
        slope = slope_along(d, grads)
        scale = jnp.maximum(jnp.abs(slope), MEMORY * state.scale)
        slope = jnp.where(back, 0, slope)
        scale = jnp.where(back, state.scale, scale)
        times = state.retreats + back
        found = AdaptedState((), d, damping, slope, scale, agreement, times)
        kept = choose(accepted | back, found, state._replace(inner=()))
        return d, kept._replace(inner=new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def slope_along(step: Any, grads: Any) -> Array:
    """``dᵀ∇L``, a float32 scalar."""
    return jnp.asarray(automatic(optax.tree.vdot, step, grads), jnp.float32)
