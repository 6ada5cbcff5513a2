"""Averages of weights, what each tensor of a model is to them, and batch norm for the result."""
