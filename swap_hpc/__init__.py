"""SWAP, Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312)."""

__version__ = "0.1.0"
