"""Lets pytest find a benchmark's neighbours, which it imports by path; `python bench/ops/X.py` finds them by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
