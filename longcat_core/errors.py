"""Errors that a person is meant to read: one clear sentence that names the input and the remedy."""

from __future__ import annotations


class LongCatError(ValueError):
    """Bad input of any kind. The command line prints the message alone, without a traceback."""


class CheckpointError(LongCatError):
    """A file that is no readable LongCat-Video checkpoint, or does not fit the network."""


class BackendUnavailable(LongCatError):
    """An unknown attention backend, or one that this machine lacks."""
