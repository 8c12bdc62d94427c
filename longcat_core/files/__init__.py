"""Reading and writing: tensor files, media, places, atomic writes, locks."""
