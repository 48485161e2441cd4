"""Reductions of all-pairs dot products."""
