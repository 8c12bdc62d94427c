"""Flow-matching training and LoRA training."""
