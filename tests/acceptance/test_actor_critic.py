"""Proximal policy optimisation: clipped ratios, a value head, an entropy bonus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_jax_lite as kfac
from tests.acceptance.clients import (
    check_factors,
    coverage,
    linear,
    make_linear,
    notes,
    train,
    unseen,
)

N = 8
PARAMS = {
    "trunk": make_linear(0, 3, 6),
    "policy": make_linear(1, 6, 4),
    "value": make_linear(2, 6, 1),
}
RNG = np.random.default_rng(0)
STATES = jnp.asarray(RNG.normal(size=(N, 3)))
ACTIONS = jnp.asarray(RNG.integers(0, 4, N))
OLD = jnp.asarray(RNG.uniform(-2, -1, N))
ADVANTAGE, RETURNS = jnp.asarray(RNG.normal(size=(2, N)))
ARGS = STATES, ACTIONS, OLD, ADVANTAGE, RETURNS


def network(p, x, see=unseen):
    h = jnp.tanh(linear(p, "trunk", x, see))
    return linear(p, "policy", h, see), linear(p, "value", h, see)[..., 0]


def surrogate(logits, value, actions, old, advantage, returns):
    logp = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logp, actions[:, None], 1)[:, 0]
    ratio = jnp.exp(own - old)
    clipped = jnp.clip(ratio, 0.8, 1.2) * advantage
    policy = -jnp.minimum(ratio * advantage, clipped).mean()
    entropy = -(jnp.exp(logp) * logp).sum(-1).mean()
    return policy + 0.5 * ((value - returns) ** 2).mean() - 0.01 * entropy


def marks(p, states, *_):
    """The Fisher matrix of the policy, and half that of the value."""
    logits, value = network(p, states)
    return kfac.categorical(logits, weight=1.0), kfac.normal(value, weight=1.0)


def plain(p, states, *rest):
    return surrogate(*network(p, states), *rest)


def marked(p, states, *rest):
    return surrogate(*marks(p, states), *rest)


@pytest.mark.parametrize("form", ["marks", "curvature"])
def test_blocks(form):
    loss, own = (plain, {"curvature": marks}) if form == "curvature" else (marked, {})
    tagged = kfac.tag(loss, PARAMS, *ARGS, fisher="exact", **own)
    assert coverage(tagged) == 1
    assert notes(tagged) == {}
    statistics, losses = train(loss, PARAMS, ARGS, tagged)
    assert losses[-1] < losses[0]
    actor = lambda x, see: network(PARAMS, x, see)[0]  # noqa: E731
    critic = lambda x, see: network(PARAMS, x, see)[1]  # noqa: E731
    actor = 1 / N, actor, STATES, "categorical"
    critic = 1 / N, critic, STATES, "normal"
    check_factors(statistics, "policy", [actor])
    check_factors(statistics, "value", [critic])
    check_factors(statistics, "trunk", [actor, critic])


def test_critic_with_its_own_rows():
    """The value function is fitted on another batch than the policy."""
    more = jnp.asarray(RNG.normal(size=(13, 3)))
    target = jnp.asarray(RNG.normal(size=13))

    def loss(p, states, actions, advantage, more, target):
        logits = kfac.categorical(network(p, states)[0], weight=1.0)
        value = kfac.normal(network(p, more)[1], weight=0.5)
        logp = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logp, actions[:, None], 1)[:, 0]
        critic = ((value - target) ** 2 / 2).mean()
        return -(advantage * own).mean() + 0.5 * critic

    args = STATES, ACTIONS, ADVANTAGE, more, target
    tagged = kfac.tag(loss, PARAMS, *args, fisher="exact")
    assert coverage(tagged) == 1 and notes(tagged) == {}
    statistics, _ = train(loss, PARAMS, args, tagged)
    actor = lambda x, see: network(PARAMS, x, see)[0]  # noqa: E731
    critic = lambda x, see: network(PARAMS, x, see)[1]  # noqa: E731
    parts = [(1 / N, actor, STATES, "categorical"), (0.5 / 13, critic, more, "normal")]
    check_factors(statistics, "trunk", parts)
    check_factors(statistics, "policy", parts[:1])
    check_factors(statistics, "value", parts[1:])
