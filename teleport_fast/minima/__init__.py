"""How a minimum looks: its sharpness, its Hessian's eigenvalues, the curvature of the symmetry's curves; and teleports to others."""

from teleport_fast.minima.alignment import Alignment, hessian_alignment
from teleport_fast.minima.ball import worst_sharpness
from teleport_fast.minima.curvature_mean import curvature, random_generators
from teleport_fast.minima.curve_autograd import curvature_at, lie_curve
from teleport_fast.minima.directions import orthant_directions, sphere_directions
from teleport_fast.minima.lanczos import Spectrum, hessian_spectrum
from teleport_fast.minima.lie_curve import curve_derivatives
from teleport_fast.minima.measures import MeanCurvature, MeanSharpness, Measure
from teleport_fast.minima.published import PublishedTrace, published_curvature, published_sharpness
from teleport_fast.minima.pullback import lie_pullback
from teleport_fast.minima.sharpness_mean import losses_around, sharpness
from teleport_fast.minima.teleport_to import MinimumReport, TeleportedTo, teleport_to

__all__ = [
    "Alignment",
    "MeanCurvature",
    "MeanSharpness",
    "Measure",
    "MinimumReport",
    "PublishedTrace",
    "Spectrum",
    "TeleportedTo",
    "curvature",
    "curvature_at",
    "curve_derivatives",
    "hessian_alignment",
    "hessian_spectrum",
    "lie_curve",
    "lie_pullback",
    "losses_around",
    "orthant_directions",
    "published_curvature",
    "published_sharpness",
    "random_generators",
    "sharpness",
    "sphere_directions",
    "teleport_to",
    "worst_sharpness",
]
