"""The simulator lies beside the package: `bench` is made known alone, since with its parent the top-level `kernels` would be too."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if "bench" not in sys.modules:
    sys.modules["bench"] = types.ModuleType("bench")
    sys.modules["bench"].__path__ = [str(ROOT / "bench")]
