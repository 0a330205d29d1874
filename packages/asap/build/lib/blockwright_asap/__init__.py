"""Aligning Simulation and Real-World Physics (ASAP, arXiv 2502.01143) in small, as a package of its own."""
