"""LongCat-mini: the model on which lossy options are measured, its richer procedural world and its scorer."""
