"""Workers of which rank 1 does something wrong, which rank 0 names: `group.send(FAULTS' key)`, and "" for nothing."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

from longcat_core.parallel import known, mirror
from longcat_core.parallel.group import Group
from longcat_core.parallel.mirror import Follower
from longcat_core.parallel.sequence import SequenceSharing
from longcat_core.parallel.vae import Strip

# For `start(devices, FAULTY)`.
FAULTY = __name__


def _placed(plain: Any) -> Any:
    def place(self: Follower, network: Any) -> None:
        plain(self, network)
        weight = network.blocks[1].ffn.down.weight
        if not weight.is_meta:
            weight.view(-1)[0] += 1

    return place


FAULTS: dict[str, Any] = {
    "bytes": (known, "_bytes", lambda plain: lambda sender, to: plain(sender, to) + (sender == 1)),
    "weights": (Follower, "_place", _placed),
    "tokens": (SequenceSharing, "gather", lambda plain: lambda self, x, *given: plain(self, 2 * x, *given)),
    "rows": (Strip, "fill", lambda plain: lambda self, x, above: plain(self, x, above) or x[:, :, 0].zero_()),
    "late": (mirror, "wrong_bytes", lambda plain: lambda group: time.sleep(600)),
}


def serve(group: Group) -> None:
    receive, faults = group.receive, []

    def received() -> Any:
        while isinstance(message := receive(), str):
            while faults:
                faults.pop().stop()
            if message and group.rank == 1:
                owner, name, wrong = FAULTS[message]
                faults.append(patch.object(owner, name, wrong(getattr(owner, name))))
                faults[-1].start()
        return message

    group.receive = received  # type: ignore[method-assign]
    mirror.serve(group)
