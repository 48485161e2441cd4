"""Estimates of mutual information and what they are made of."""
