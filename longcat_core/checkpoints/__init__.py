"""Checkpoint files: forms as tables of names, loading, LoRA."""
