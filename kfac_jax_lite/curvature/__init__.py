"""Curvature matrices as matrix-free operators, and their spectra."""
