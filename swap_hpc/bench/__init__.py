"""Measurements of the package's own parts, one module and one command each."""
