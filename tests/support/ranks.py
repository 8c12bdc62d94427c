"""What the workers of tests do, named by the messages of rank 0."""

from __future__ import annotations

from importlib import import_module

from longcat_core.parallel.group import Group

# For `start(devices, SERVE)`.
SERVE = __name__


def serve(group: Group) -> None:
    """Call the function that each message names, `module.function`, with the group and the message's arguments."""
    while (message := group.receive()) is not None:
        name, *arguments = message
        module, function = name.rsplit(".", 1)
        getattr(import_module(module), function)(group, *arguments)
