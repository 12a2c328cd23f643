"""A physics-informed network for Poisson's equation, by four optimisers."""
