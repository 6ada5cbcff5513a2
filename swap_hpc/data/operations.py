"""Operations on the pixels of one image, in DALI's graphs: uint8 (H, W, 3) in and out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug.core import select

# (image, parameter) -> image, in a graph. The parameter is a number on the host.
Operation = Callable[[Any, Any], Any]

GREY = 128  # where an operation moves the image away

IDENTITY_KERNEL = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32)
BLUR_KERNEL = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13


def operated(image: Any, rounds: Sequence[tuple[tuple[str, ...], Any, Any]]) -> Any:
    """Put images through rounds of operations; the pipeline must be built with branches.

    Args:
        image: uint8 (H, W, 3).
        rounds: the names of the operations of each round, the number of the chosen one (unused
            where there is only one), and its parameter.
    """
    for names, chosen, parameter in rounds:
        functions = [OPERATIONS[name] for name in names]
        if len(functions) == 1:
            image = functions[0](image, parameter)
        else:
            image = select(functions, chosen, image, parameter)
    return image


def _identity(image: Any, parameter: Any) -> Any:
    return image


def _shear_x(image: Any, shear: Any) -> Any:
    """Move each row to the right, by `shear` pixels per pixel from the top edge."""
    return augmentations.shear_x.op(image, fn.stack(shear, shear * 0.0), fill_value=GREY)


def _shear_y(image: Any, shear: Any) -> Any:
    return augmentations.shear_y.op(image, fn.stack(shear * 0.0, shear), fill_value=GREY)


def _translate_x(image: Any, pixels: Any) -> Any:
    offset = fn.stack(pixels, pixels * 0.0)
    return augmentations.translate_x_no_shape.op(image, offset, fill_value=GREY)


def _translate_y(image: Any, pixels: Any) -> Any:
    offset = fn.stack(pixels * 0.0, pixels)
    return augmentations.translate_y_no_shape.op(image, offset, fill_value=GREY)


def _rotate(image: Any, degrees: Any) -> Any:
    """Rotate about the centre, counter-clockwise."""
    return augmentations.rotate.op(image, degrees, fill_value=GREY)


def _sharpness(image: Any, factor: Any) -> Any:
    """Blend with a blurred image: 0 is the blurred one, 1 the image, 2 is sharper."""
    blur, identity = types.Constant(BLUR_KERNEL), types.Constant(IDENTITY_KERNEL)
    kernel = factor * identity + (1.0 - factor) * blur
    return fn.filter(image, _beside(image, kernel))


def _posterize(image: Any, mask: Any) -> Any:
    """Keep the bits that are set in `mask`."""
    return augmentations.posterize.op(image, _beside(image, fn.cast(mask, dtype=types.UINT8)))


def _solarize(image: Any, threshold: Any) -> Any:
    """Invert the pixels from a threshold on."""
    return augmentations.solarize.op(image, _beside(image, threshold))


def _equalize(image: Any, parameter: Any) -> Any:
    """Spread the histogram of each channel, by the formula of OpenCV."""
    return fn.equalize(image)


def _hue(image: Any, turn: Any) -> Any:
    """Turn the hue of HSV by a part of the circle, from -0.5 to 0.5."""
    pixels = fn.cast(image, dtype=types.FLOAT)
    red, green, blue = (pixels[:, :, channel : channel + 1] for channel in range(3))
    value = math.max(red, math.max(green, blue))
    chroma = value - math.min(red, math.min(green, blue))
    width = math.max(chroma, 1.0)  # whole numbers: only a grey pixel has less than 1
    is_red, is_green = value == red, value == green
    sixth = fn.cast(is_red, dtype=types.FLOAT) * (green - blue) / width
    rest = 1.0 - fn.cast(is_red, dtype=types.FLOAT)
    as_green = fn.cast(is_green, dtype=types.FLOAT) * (2.0 + (blue - red) / width)
    as_blue = (1.0 - fn.cast(is_green, dtype=types.FLOAT)) * (4.0 + (red - green) / width)
    hue = sixth + rest * (as_green + as_blue) + 6.0 * _beside(image, turn)
    channels = [_channel(hue, value, chroma, first) for first in (5.0, 3.0, 1.0)]
    return fn.cast_like(fn.cat(*channels, axis=2), image)


def _channel(hue: Any, value: Any, chroma: Any, first: float) -> Any:
    """Return a channel of an HSV colour whose hue is in sixths of the circle."""
    place = hue + first
    place = place - 6.0 * math.floor(place / 6.0)
    return value - chroma * math.max(0.0, math.min(math.min(place, 4.0 - place), 1.0))


def _beside(image: Any, value: Any) -> Any:
    """Return a value on the device of an image."""
    return value.gpu() if image.device == "gpu" else value


OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": augmentations.brightness.op,
    "saturation": augmentations.color.op,
    "contrast": augmentations.contrast.op,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": augmentations.auto_contrast.op,
    "equalize": _equalize,
    "hue": _hue,
}
