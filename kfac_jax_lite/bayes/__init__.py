"""Posteriors over the weights from the same factors, and their predictions."""
