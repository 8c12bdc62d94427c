"""Numbers and pictures that nodes may use: clock, results, fidelity, verification."""
