"""The optax transformations, and when they refresh, invert and step."""
