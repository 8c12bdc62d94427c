"""The Wan 2.1 VAE: its network, run over clips of any length a few frames at a time."""
