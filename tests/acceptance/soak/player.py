"""The optimisers of the soak: options, jitted steps, states and their oracles."""

import functools
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import kfac_jax_lite as kfac
from tests.acceptance.soak import oracle
from tests.acceptance.soak.record import Step, kfac_state, packed, unpacked

DECAY = 0.95


def players() -> dict[str, dict[str, Any]]:
    """Options of the optimisers that take turns, by name."""
    every, adaptive = kfac.intervals.every, kfac.intervals.adaptive
    stale = kfac.intervals.staleness(0.5, max_interval=40)
    return {
        "cholesky every 1": {"inverse": "cholesky", "interval": every(1)},
        "cholesky adaptive": {
            "inverse": "cholesky", "interval": adaptive(1.5), "momentum": None
        },
        "newton_schulz elapsed": {
            "inverse": "newton_schulz",
            "interval": adaptive(1.0, rule="elapsed", max_interval=20),
        },
        "eigh staleness": {"inverse": "eigh", "interval": stale},
        "eigh every 7": {"inverse": "eigh", "interval": every(7), "momentum": None},
        "ekfac elapsed": {
            "inverse": "ekfac",
            "interval": adaptive(1.0, rule="elapsed", max_interval=30),
        },
        "ekfac every 3": {"inverse": "ekfac", "interval": every(3), "momentum": None},
        "low_rank staleness": {
            "inverse": kfac.low_rank(3), "interval": stale, "momentum": 0.5
        },
        "low_rank every 2": {
            "inverse": kfac.low_rank(3), "interval": every(2), "momentum": None
        },
    }  # fmt: skip


def plus(tree: Any, amount: Any) -> Any:
    """The tree with something added to its first number."""
    (first, *rest), structure = jax.tree.flatten(tree)
    first = first.at[(0,) * first.ndim].add(amount)
    return jax.tree.unflatten(structure, [first, *rest])


def make_step(tagged: Any, tx: Any) -> Any:
    """The jitted training step of an optimiser, whose buffers are donated."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, spoil):
        value, grads, found = tagged.value_and_grad(params, *batch, opt_state=state)
        grads, found = plus(grads, spoil[0]), plus(found, spoil[1])
        updates, state = tx.update(grads, state, params, statistics=found)
        params = optax.apply_updates(params, updates)
        return params, state, packed(value, grads, found, params, state)

    return step


class Player:
    """An optimiser, its state and its oracle.

    Attributes:
        errors: largest errors seen since the last look, by name.
    """

    def __init__(self, name: str, tagged: Any, params: Any, first_count: int) -> None:
        """Makes the state, its step count moved to ``first_count``."""
        options = players()[name]
        self.name, self.layers = name, tagged.layers
        self.tx = optax.inject_hyperparams(kfac.kfac)(
            tagged.layers, learning_rate=0.1, damping=0.1, weight_decay=1e-4,
            inverse_interval=1, factor_decay=DECAY, **options,
        )  # fmt: skip
        self.step = make_step(tagged, self.tx)
        state = self.tx.init(params)
        self.state = moved(state, first_count)
        self.shapes = [(t.a_shape, t.g_shape) for t in sorted_layers(tagged)]
        method = options["inverse"]
        self.oracle = oracle.Oracle(
            [t.name for t in sorted_layers(tagged)],
            method if isinstance(method, str) else method.name,
            float(np.float32(DECAY)),
            first_count,
            options["interval"],
        )
        self.failures = np.zeros(len(self.shapes), np.int32)
        self.steps, self.refused = 0, 0
        self.errors: dict[str, float] = {}
        self.wrong: list[str] = []

    def set(self, **values: float) -> None:
        """Changes hyper-parameters, each in its dtype."""
        held = dict(self.state.hyperparams)
        for name, value in values.items():
            held[name] = jnp.asarray(value, held[name].dtype)
        self.state = self.state._replace(hyperparams=held)

    def take(
        self, params: Any, batch: Any, spoil: Any, watch: bool
    ) -> tuple[Any, Step]:
        """One step, followed by the oracle."""
        held = self.state.hyperparams
        damping = float(held["damping"]), int(held["inverse_interval"])
        before = self.kept(params) if watch else None
        params, self.state, record = self.step(params, self.state, batch, spoil)
        due = np.array(self.oracle.due)
        step = unpacked(record, self.shapes, due, self.failures)
        self.failures = self.failures + step.failed
        accepted = self.oracle.follow(step, *damping)
        self.steps += 1
        self.refused += not accepted
        if not step.sound:
            self.note("numbers that are not finite")
        if before is not None and not accepted:
            same = zip(before, self.kept(params), strict=True)
            if not all(np.array_equal(x, y, equal_nan=True) for x, y in same):
                self.note("a refused batch changed something")
        return params, step

    def note(self, text: str) -> None:
        """Keeps the first few complaints."""
        if len(self.wrong) < 20:
            self.wrong.append(f"count {self.oracle.count}: {text}")

    def kept(self, params: Any) -> list[np.ndarray]:
        """Copies of all that a refused batch must leave as it was."""
        held = self.state.inner_state
        held = optax.tree.set(held, skipped=jnp.zeros((), jnp.int32))
        return [np.array(leaf) for leaf in jax.tree.leaves((params, held))]

    def check(self) -> None:
        """Compares averages, inverses and flags with the oracle's."""
        held, found = kfac_state(self.state), []
        due = np.asarray(held.clock.due).tolist()
        self.oracle.compare("due", due, self.oracle.due)
        for i, name in enumerate(self.oracle.names):
            if not self.oracle.refreshes[i]:
                continue
            for seen, wanted in zip(
                held.factors[name][:2], self.oracle.factors(i), strict=True
            ):
                found.append(oracle.factor_errors(seen, wanted))
            if self.oracle.inverted[i] is not None:
                cached = held.inverses[name]
                inverted = self.oracle.inverted[i]
                found.append(oracle.inverse_errors(cached, inverted))
        self.errors = oracle.largest([self.errors, *found])

    def restore(self, params: Any, folder: Path | None) -> Any:
        """Saves parameters and state and goes on from what was restored."""
        saved = params, self.state
        if folder is None:
            data = flax.serialization.to_bytes(saved)
            restored = flax.serialization.from_bytes(saved, data)
        else:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder, saved)
                checkpointer.wait_until_finished()
                restored = checkpointer.restore(folder, saved)
        restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), restored)
        pairs = zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True)
        if not all(
            x.dtype == y.dtype and np.array_equal(x, y, equal_nan=True)
            for x, y in pairs
        ):
            self.note("a restored state is another")
        params, self.state = restored
        return params


def sorted_layers(tagged: Any) -> list[Any]:
    """The layers by name, as the state has them."""
    return sorted(tagged.layers, key=lambda layer: layer.name)


def moved(state: Any, count: int) -> Any:
    """The state with K-FAC's step count at ``count``."""
    held = kfac_state(state)._replace(count=jnp.asarray(count, jnp.int32))
    return optax.tree.set(state, KFACState=held)
