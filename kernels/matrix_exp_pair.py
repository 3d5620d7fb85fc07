"""matrix_exp_pair under its own name, where the backends look for it; kernels/matrix_exp.py holds the kernel."""

from teleport_fast.kernels.matrix_exp import matrix_exp_pair

__all__ = ["matrix_exp_pair"]
