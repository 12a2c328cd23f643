"""Layers whose inputs and cotangents are kept, to make their statistics later.

A tap computes statistics in the backward pass and has to return something where they
are not due. A layer that is only *watched* hands its inputs and its output's cotangent
on, which exist anyway; whoever wants its statistics computes them from those.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_jax_lite.core.pytree import vary
from kfac_jax_lite.core.types import Array, GradientRows, LayerTag
from kfac_jax_lite.kronecker.factors import forms_of
from kfac_jax_lite.statistics import dense
from kfac_jax_lite.statistics.estimators import Recipe
from kfac_jax_lite.statistics.uses import among_copies, estimators
from kfac_jax_lite.tagging.interpreter import Slot, estimated, in_line, tap, watch
from kfac_jax_lite.tagging.sites import DenseGeometry, Site
from kfac_jax_lite.tagging.trace import Trace


@dataclasses.dataclass
class Watched:
    """What is known of the watched layers of one backward pass.

    Attributes:
        recipes: Recipe of every tapped layer.
        phases: How often each layer was refreshed; missing: never.
        slots: Slot of every tapped layer.
        sites: Watched layer to its sites and the shapes of their outputs.
        thin: Layer whose gradient is wanted as rows, to site and shape of its output.
        inputs: Watched layer to its sites' inputs; filled by ``on_site``.
        thin_inputs: The same of the thin layers.
    """

    recipes: dict[str, Recipe]
    phases: dict[str, Array]
    slots: dict[str, Slot]
    sites: dict[str, list[tuple[Site, jax.ShapeDtypeStruct]]]
    thin: dict[str, tuple[Site, jax.ShapeDtypeStruct]]
    inputs: dict[str, dict[int, list[Any]]] = dataclasses.field(default_factory=dict)
    thin_inputs: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def outputs(self) -> dict[str, Array]:
        """Probes of the thin layers' outputs."""
        return {name: jnp.zeros(x.shape, x.dtype) for name, (_, x) in self.thin.items()}

    def filled(
        self, probes: dict[str, Any], outputs: dict[str, Any]
    ) -> dict[str, Slot]:
        """The slots with probes that are differentiated by."""
        return {
            name: slot._replace(probes=probes[name], output=outputs.get(name))
            for name, slot in self.slots.items()
        }

    def probes(self, axes: frozenset[Hashable]) -> dict[str, Any]:
        """Probes of every layer; of a watched one, each shaped like a site's output."""
        probes: dict[str, Any] = {}
        for name, slot in self.slots.items():
            if name in self.sites:
                zeros = [jnp.zeros(x.shape, x.dtype) for _, x in self.sites[name]]
                probes[name] = dict(enumerate(zeros))
            else:
                probes[name] = slot.probes
        return vary(probes, axes)

    def chosen(self, site: Site, inputs: list[Any], slot: Slot) -> tuple[Any, ...]:
        """Estimators that feed a probe, by name; their operands; those probes."""
        recipe = self.recipes[site.slot]
        pairs = tuple(
            (name, among_copies(estimate, site.copies))
            for name, estimate in estimators(recipe, site).items()
            if name in slot.probes
        )
        phase = self.phases.get(recipe.layer.name, jnp.zeros((), jnp.int32))
        probes = {name: slot.probes[name] for name, _ in pairs}
        return pairs, (inputs, slot.basis, phase), probes

    def on_site(
        self, site: Site, output: Array, inputs: list[Any], slot: Slot
    ) -> Array:
        """Watches or taps one site."""
        name = site.slot
        if slot.output is not None:
            self.thin_inputs[name] = inputs
            output = watch(output, slot.output)
        if name not in self.sites:
            if not slot.probes:
                return output
            pairs, operands, probes = self.chosen(site, inputs, slot)
            return tap(pairs, output, operands, slot.due, probes)
        order = [id(other) for other, _ in self.sites[name]]
        number = order.index(id(site))
        self.inputs.setdefault(name, {})[number] = inputs
        probes: dict[Any, Array] = slot.probes
        return watch(output, probes[number])

    def rows(
        self,
        layers: Sequence[LayerTag],
        inputs: dict[str, list[Any]],
        cotangents: dict[str, Array],
        leaves: list[Any],
    ) -> dict[str, GradientRows]:
        """Gradients of the thin layers as rows."""
        return {
            t.name: gradient_rows(
                t, self.thin[t.name][0], inputs[t.name], cotangents[t.name], leaves
            )
            for t in layers
            if t.name in self.thin
        }

    def raw(
        self, raw: dict[str, Any], inputs: dict[str, Any], axes: frozenset[Hashable]
    ) -> dict[str, Any]:
        """What taps would have returned for the watched layers, beside the others'."""
        found = dict(raw)
        for name, pairs in self.sites.items():
            slot = self.slots[name]
            slot = slot._replace(probes=vary(slot.probes, axes))
            parts = []
            for k, (site, _) in enumerate(pairs):
                own, operands, probes = self.chosen(site, inputs[name][k], slot)
                parts.append(estimated(own, operands, raw[name][k], slot.due, probes))
            found[name] = {
                key: functools.reduce(jnp.add, [p[key] for p in parts if key in p])
                for key in dict.fromkeys(key for part in parts for key in part)
            }
        return found


def watchable(
    found: Trace, slots: dict[str, Slot]
) -> dict[str, list[tuple[Site, jax.ShapeDtypeStruct]]]:
    """Layers all of whose sites are in line, with those sites."""
    here = {id(site): (site, x) for site, x in in_line(found.plan, found.closed.jaxpr)}
    sites = {}
    for name, slot in slots.items():
        own = found.slots[name]
        if slot.probes and all(id(site) in here for site in own):
            sites[name] = [here[id(site)] for site in own]
    return sites


# What must be gained: rows have to be copied for the ones of a bias.
GAIN = 0.9


def few(rows: int, n_in: int, n_out: int) -> bool:
    """Whether the order by rows is clearly the cheaper one."""
    by_rows = rows * (n_in**2 + n_out**2 + n_in * n_out)
    return by_rows < GAIN * n_in * n_out * (n_in + n_out)


def thin_layers(found: Trace) -> dict[str, tuple[Site, jax.ShapeDtypeStruct]]:
    """The layers with few rows.

    Their gradient must be the product of these rows and nothing else: no other use of
    their parameters, no scaled weight, no loop.
    """
    outputs = {id(s): x for s, x in in_line(found.plan, found.closed.jaxpr)}
    thin = {}
    for layer in found.layers:
        sites = found.sites.get(layer.name, [])
        if len(sites) == 1 and id(sites[0]) in outputs and is_thin(layer, sites[0]):
            thin[layer.name] = sites[0], outputs[id(sites[0])]
    return thin


def is_thin(layer: LayerTag, site: Site) -> bool:
    """Whether a layer's gradient is the product of a site's rows, and these are few."""
    geometry = site.geometry
    if layer.kind != "dense" or not isinstance(geometry, DenseGeometry):
        return False
    plain = not (layer.note or layer.stack or layer.blocks or geometry.scales)
    once = site.repeat == 1 and not (site.branch or site.by_hand or site.reverse)
    once = once and not (site.complex or site.spread)
    full = all(form.whole for form in forms_of(layer))
    rows = math.prod(geometry.rows)
    return plain and once and full and few(rows, *layer.sizes)


def gradient_rows(
    layer: LayerTag, site: Site, inputs: list[Any], cotangent: Array, leaves: list[Any]
) -> GradientRows:
    """The rows of a layer's gradient."""
    geometry: Any = site.geometry
    x = dense.input_rows(geometry, inputs)
    if layer.bias:
        x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], -1)
    own = tuple(leaves[view.leaf] for view in layer.views)
    return GradientRows(x, dense.output_rows(geometry, inputs, cotangent), own)
