"""What makes the network fast without changing what it computes."""
