"""One file for each part of the benchmark, with its record `PART`."""
