"""Which estimators a site is tapped with."""

from kfac_jax_lite.factors import conv, dense, scale_shift
from kfac_jax_lite.tagging.layers import ConvGeometry, ScaleShiftGeometry, Site
from kfac_jax_lite.tagging.taps import Slot, tap
from kfac_jax_lite.types import Array, LayerTag


def tap_site(
    layers: dict[str, LayerTag],
    scalings: dict[str, dense.Scaling],
    num_examples: int,
    site: Site,
    output: Array,
    inputs: list,
    slot: Slot,
) -> Array:
    """Taps one site with the estimators of its layer's kind."""
    if not slot.probes:
        return output
    layer, geometry = layers[site.layer or ""], site.geometry
    if isinstance(geometry, ScaleShiftGeometry):

        def blocks(inputs, c):
            factors, _ = inputs
            return scale_shift.unit_blocks(
                geometry, factors, c, layer.roles, num_examples
            )

        return tap((blocks,), output, (inputs, ()), slot.due, slot.probes)
    scaling, rows = scalings[layer.name], geometry.rows

    def x_rows(inputs):
        if isinstance(geometry, ConvGeometry):
            return conv.patches(geometry, conv.channels_last(geometry, inputs))
        return dense.input_rows(geometry, inputs)

    def c_rows(c):
        if isinstance(geometry, ConvGeometry):
            return conv.conv_output_rows(geometry, c)
        return dense.output_rows(geometry, c)

    def a(inputs, c):
        del c
        if isinstance(geometry, ConvGeometry):
            return conv.conv_input_factor(geometry, inputs[0], scaling)
        return dense.input_factor(x_rows(inputs[0]), scaling, rows)

    def g(inputs, c):
        return dense.output_factor(c_rows(c), scaling, rows)

    def s(inputs, c):
        x, basis = x_rows(inputs[0]), inputs[1]
        return dense.eigenbasis_moment(x, c_rows(c), basis, scaling, rows)

    estimators = (a, g, s)[: len(slot.probes)]
    return tap(estimators, output, (inputs, slot.basis), slot.due, slot.probes)
