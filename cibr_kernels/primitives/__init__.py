"""Operators with kernels: each a folder with op.py, reference.py and a file per backend."""
