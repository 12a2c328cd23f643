"""Bayesian deep learning from the same factors (to be replaced)."""
