"""Tests of the nodes. Those of the folder `inside` run in a process of their own, in ComfyUI's Python."""

from __future__ import annotations

import os

from .checkout import INSIDE

collect_ignore = [] if os.environ.get(INSIDE) else ["inside"]
