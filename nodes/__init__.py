"""ComfyUI nodes of the LongCat-Video pack. Importing this package imports nothing of ComfyUI."""
