"""Several GPUs: a group of processes of which rank 0 runs the command and the others serve its network and its VAE."""
