"""`python -m longcat_core`: the same as the command `longcat`."""

from __future__ import annotations

import sys

from .cli.main import main

sys.exit(main())
