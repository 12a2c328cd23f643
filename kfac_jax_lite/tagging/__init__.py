"""Finds the layers of a loss function in its jaxpr and taps them."""
