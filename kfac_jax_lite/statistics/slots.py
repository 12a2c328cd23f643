"""What the taps of every layer get: probes, due flag, eigenbases."""

from typing import Any

import jax.numpy as jnp

from kfac_jax_lite.core.pytree import find_states, leaves_by_path
from kfac_jax_lite.core.types import Array, LayerTag
from kfac_jax_lite.statistics.estimators import Recipe, zero_probes
from kfac_jax_lite.tagging.taps import Slot


def read_state(
    opt_state: Any, layers: tuple[LayerTag, ...]
) -> tuple[dict[str, Array] | None, dict[str, tuple[Any, ...]]]:
    """Due flags and EKFAC bases by layer name; (None, {}) without a state.

    Where several states name a layer it is due if one of them wants it.
    """
    if opt_state is None:
        return None, {}
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            f"opt_state ({type(opt_state).__name__}) contains no KFACState: pass the "
            "state of the optimiser made by kfac.kfac or kfac.scale_by_kfac."
        )
    known = {layer.name for layer in layers}
    due: dict[str, Array] = {}
    bases: dict[str, tuple[Any, ...]] = {}
    for state in states:
        for i, name in enumerate(sorted(state.factors)):
            if name not in known:
                raise ValueError(
                    f"opt_state is of another model: it holds a layer {name}, which "
                    "this loss does not have."
                )
            # Wrappers that choose between states by a sum make numbers of flags.
            flag = state.clock.due[i].astype(bool)
            due[name] = due[name] | flag if name in due else flag
            inverse = state.inverses[name]
            if getattr(state.factors[name], "s", None) is not None:
                if name in bases:
                    raise ValueError(f"two EKFAC states share the layer {name}.")
                bases[name] = (inverse.q_a, inverse.q_g)
    return due, bases


def make_slots(
    recipes: dict[str, Recipe],
    params: Any,
    due: dict[str, Array] | None,
    bases: dict[str, tuple[Any, ...]],
) -> dict[str, Slot]:
    """Probes, due flag and bases, by slot."""
    dtypes = {k: leaf.dtype for k, leaf in leaves_by_path(params).items()}
    slots = {}
    for slot, recipe in recipes.items():
        name = recipe.layer.name
        if due is not None and name not in due:
            slots[slot] = Slot(jnp.zeros((), bool), {})
            continue
        dtype = dtypes[recipe.layer.params[0]]
        probes = zero_probes(recipe, dtype, name in bases)
        flag = None if due is None else due[name]
        slots[slot] = Slot(flag, probes, bases.get(name, ()))
    return slots


def read_phases(opt_state: Any, recipes: dict[str, Recipe]) -> dict[str, Array]:
    """How often each layer was refreshed; 0 without a state."""
    phases = {slot: jnp.zeros((), jnp.int32) for slot in recipes}
    for state in [] if opt_state is None else find_states(opt_state):
        numbers = {name: i for i, name in enumerate(sorted(state.factors))}
        for slot, recipe in recipes.items():
            if recipe.layer.name in numbers:
                number = numbers[recipe.layer.name]
                phases[slot] = state.clock.refreshes[number].astype(jnp.int32)
    return phases
