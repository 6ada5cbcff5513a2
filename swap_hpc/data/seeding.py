"""The generators that a user's code may draw from, seeded all at once."""

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seeds the global generators of torch (on the CPU and the current GPU), numpy.random and random. `seed`: of 64 bits, not negative."""
    torch.default_generator.manual_seed(seed)
    if (
        torch.cuda.is_initialized()
    ):  # torch.manual_seed notes a stack trace where it is not: a millisecond each
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)  # all that it takes
    random.seed(seed)
