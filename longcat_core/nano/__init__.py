"""LongCat-nano: a small embedded model of the same architecture, its procedural world and its scorer."""
