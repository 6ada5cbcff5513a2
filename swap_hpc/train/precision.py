"""A recipe's precision: the type of forward passes, and the loss scale that float16 needs.

Gradients below 6e-8 are zero in float16, and above 65504 they are infinite. So the loss is
multiplied by a scale before the backward pass, and the gradients are divided by it before they are
used. The scale follows them: a step with an infinite gradient is skipped and halves it, and a
number of steps without one doubles it (Micikevicius et al., arXiv 1710.03740).
"""

import torch
from torch.amp.grad_scaler import GradScaler

from swap_hpc.recipe.values import Precision

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# torch's own choices
FIRST_SCALE = 2.0**16  # at the beginning of a phase
GROWTH_INTERVAL = 2000  # steps in a row without an overflow, after which the scale doubles

# Gradients that overflow at smaller scales are larger than float16 can hold by themselves.
SMALLEST_SCALE = 1.0

UNSCALED = GradScaler(enabled=False)  # leaves losses and gradients as they are


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context of forward passes in a precision; it does nothing for fp32."""
    dtype = _TYPES.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=precision in _TYPES)


def loss_scaler(
    precision: Precision, device: torch.device, optimizer: torch.optim.Optimizer
) -> GradScaler:
    """Return the loss scaling of a phase in a precision; it does nothing but for fp16.

    Args:
        precision: the recipe's.
        device: of the model.
        optimizer: whose steps are skipped where a gradient is not finite.
    """
    if precision != "fp16":
        return UNSCALED
    # The host decides which steps are skipped, for every optimizer. torch would leave it to the
    # kernels of fused ones, and the momentum of its fused SGD is uninitialised memory if the first
    # step is skipped (seen with torch 2.14).
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return GradScaler(device.type, init_scale=FIRST_SCALE, growth_interval=GROWTH_INTERVAL)
