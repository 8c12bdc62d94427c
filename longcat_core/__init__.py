"""LongCat-Video without a user interface: network, checkpoints, sampling, tasks, training, benchmark.

Importing this package imports nothing heavy, downloads nothing and prints nothing.
"""

__version__ = "0.1.0"
