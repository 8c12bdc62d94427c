"""Errors for users to read: one clear sentence that names the input and the remedy."""

from __future__ import annotations

# ComfyUI shows a class with its module, for which it takes the path of the pack on disk.
MODULE = "longcat_core.errors"


class LongCatError(ValueError):
    """Bad input of any kind. The command line prints the message alone, without a traceback."""

    __module__ = MODULE


class CheckpointError(LongCatError):
    """A file that cannot be read as a LongCat-Video checkpoint, or does not fit the network."""

    __module__ = MODULE


class BackendUnavailable(LongCatError):
    """An unknown attention backend, or one that this machine lacks."""

    __module__ = MODULE
