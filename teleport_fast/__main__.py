"""`python -m teleport_fast`."""

import sys

from teleport_fast.cli import main

sys.exit(main())
