"""What workers do with the messages of rank 0."""

from __future__ import annotations

from .group import Group


def serve(group: Group) -> None:
    """Take part in the work of rank 0 until it sends None."""
    while group.receive() is not None:
        pass
