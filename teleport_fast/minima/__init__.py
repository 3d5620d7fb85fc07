"""How a minimum looks: sharpness of the loss around it, eigenvalues of its Hessian, curvature of the symmetry's curves through it."""

from teleport_fast.minima.ball import worst_sharpness
from teleport_fast.minima.curvature_mean import curvature, random_generators
from teleport_fast.minima.curve_autograd import curvature_at, lie_curve
from teleport_fast.minima.directions import orthant_directions, sphere_directions
from teleport_fast.minima.lanczos import Spectrum, hessian_spectrum
from teleport_fast.minima.lie_curve import curve_derivatives
from teleport_fast.minima.sharpness_mean import losses_around, sharpness

__all__ = [
    "Spectrum",
    "curvature",
    "curvature_at",
    "curve_derivatives",
    "hessian_spectrum",
    "lie_curve",
    "losses_around",
    "orthant_directions",
    "random_generators",
    "sharpness",
    "sphere_directions",
    "worst_sharpness",
]
