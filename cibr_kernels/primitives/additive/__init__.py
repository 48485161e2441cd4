"""Reductions of all-pairs scores w . phi(a_i + b_j)."""
