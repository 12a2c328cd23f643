"""The empirical tangent kernel, and the natural gradient solved in its space.

With ``J [D, P]`` the Jacobian of the marked outputs of a batch (``D = n·C`` numbers,
``n`` rows), ``S Sᵀ = Λ`` the square root of the output's Fisher information, and
``K = Sᵀ J / √n``, the Fisher matrix is ``Kᵀ K [P, P]`` and its dual ``K Kᵀ [D, D]``:
both have the same non-zero eigenvalues, and where ``D ≪ P`` the dual is the smaller
one. ``JJᵀ`` is the tangent kernel of a network of finite width.

How ``J`` is had: in general any output may depend on every example, so a row takes a
backward pass over the whole batch; the kernel then takes ``D`` of them and as many
forward passes, ``chunk`` at a time, and never holds more than ``chunk`` rows. With
``independent=True`` (the user's word that an output depends on its own example alone) a
row takes a backward pass over one example, ``n`` times less.

References:
    Jacot et al., 2018, arXiv:1806.07572; Zhang et al., 2019, "Fast convergence of
    natural gradient descent for over-parameterized neural networks", arXiv:1905.10961,
    Sec. 3; Ren & Goldfarb, 2019, arXiv:1906.02353; Martens, 2020, arXiv:1412.1193.
"""

from kfac_jax_lite.ntk.dual import DualState, dual_natural_gradient
from kfac_jax_lite.ntk.jacobian import eigenvalues, kernel

__all__ = ["DualState", "dual_natural_gradient", "eigenvalues", "kernel"]
