"""Averages of weights, and batch-norm statistics for them."""
