"""Kronecker factors, their inverses, and the state that holds both."""
