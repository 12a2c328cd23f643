"""Measurements that the README quotes: time per step, steps to a loss.

Importing `experiments` keeps OpenBLAS to one thread, for every optimiser in the
process alike; the results record it.
"""
