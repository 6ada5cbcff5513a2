"""Seeding of the global random generators that a user's code may draw from."""

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (CPU and current GPU), `numpy.random` and `random`.

    Args:
        seed: an unsigned 64-bit number.
    """
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed() would record a stack trace, 1 ms each time, in a process without CUDA
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes 32 bits
    random.seed(seed)
