"""How the extension was built and which instruction set it runs."""

def build_info() -> dict[str, str]:
    """Keys isa, compiler, torch_target (least torch version), cuda_targets (empty: none)."""
