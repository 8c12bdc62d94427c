"""The `longcat` command."""
