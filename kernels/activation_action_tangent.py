"""activation_action_tangent under its own name, where the backends look for it; kernels/activation_action.py holds the kernel."""

from teleport_fast.kernels.activation_action import activation_action_tangent

__all__ = ["activation_action_tangent"]
