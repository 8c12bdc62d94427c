"""Headless tasks: text encoder, VAE, media, and the chain from prompt to frames."""
