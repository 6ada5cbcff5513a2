"""Recipes: what to run, as a validated TOML file."""
