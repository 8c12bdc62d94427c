"""The nano avatar: a small network of LongCat-Video-Avatar's architecture and its world of talking faces."""
