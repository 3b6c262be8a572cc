"""Camera frames: what a client may send, and how openpi and lerobot make the model's square input of it (SPEC 2.2)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import InputError

ImageLayout = Literal["auto", "chw"]
ResizeName = Literal["openpi", "lerobot"]

_ADVICE = "send RGB frames as height × width × 3, uint8 (0 to 255) or float (0.0 to 1.0)"
_ADVICE_CHW = "send RGB frames as 3 × height × width, uint8 (0 to 255) or float (0.0 to 1.0)"


def parse_image(value: Any, name: str, layout: ImageLayout = "auto", *, keep_float: bool = False) -> np.ndarray:
    """Check one camera frame and bring it to height × width × 3.

    Args:
        value: RGB pixels, uint8 or floating point in [0, 1].
        name: the observation's key, for messages.
        layout: "chw" demands 3 × height × width (ALOHA); "auto" takes either, and reads a first axis of 3 as channels.
        keep_float: leave floats as they are, as float32 (lerobot); otherwise they become uint8 as 255·x cut to an
            integer (openpi).

    Returns:
        (height, width, 3) uint8, or float32 where `keep_float` applies. Contiguous memory is not promised.

    Raises:
        InputError: wrong shape or dtype, NaN, or floats that 255·x cannot bring to 0..255.
    """
    image = np.asarray(value)
    advice = _ADVICE_CHW if layout == "chw" else _ADVICE
    expected = "(3, height, width)" if layout == "chw" else "(height, width, 3)"
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise InputError(f"{name} has dtype {image.dtype}, expected uint8 or floating point; {advice}")
    channels_first = image.ndim == 3 and image.shape[0] == 3
    channels_last = image.ndim == 3 and image.shape[-1] == 3 and layout == "auto"
    if not (channels_first or channels_last) or 0 in image.shape:
        raise InputError(f"{name} has shape {image.shape}, expected {expected}; {advice}")
    if channels_first:
        image = image.transpose(1, 2, 0)
    if image.dtype == np.uint8:
        return image
    _check_float_range(image, name, advice)
    if keep_float:
        return np.clip(image.astype(np.float32), 0.0, 1.0)
    # A float16 just below 256 is rounded to it by the product, and 256 would become 0.
    return np.clip(255 * image, 0, 255).astype(np.uint8)


def _check_float_range(image: np.ndarray, name: str, advice: str) -> None:
    lowest, highest = float(image.min()), float(image.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise InputError(f"{name} has NaN or infinite values; {advice}")
    # Exactly the floats that 255·x, cut to an integer, brings to 0..255: rounding noise at the ends is let pass.
    if 255 * lowest <= -1 or 255 * highest >= 256:
        raise InputError(f"{name} has float values from {lowest:.4g} to {highest:.4g}, expected 0.0 to 1.0; {advice}")


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of a frame scaled to fit size × size with its aspect kept; both ports cut to integers."""
    ratio = max(width / size, height / size)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(image: np.ndarray, size: int, name: str = "image") -> np.ndarray:
    """openpi's resize: PIL bilinear (antialiased when shrinking) on uint8, centred on black.

    Args:
        image: (height, width, 3) uint8.
        size: side of the square result, in pixels. A frame of that size is returned unchanged.
        name: the observation's key, for messages.

    Returns:
        (size, size, 3) uint8.

    Raises:
        InputError: the frame is so elongated that a side would shrink to nothing.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    new_height, new_width = _checked_shape(height, width, size, name)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (new_width, new_height), resample=Image.Resampling.BILINEAR
    )
    canvas = Image.new("RGB", (size, size), 0)
    canvas.paste(resized, (int((size - new_width) / 2), int((size - new_height) / 2)))
    return np.asarray(canvas)


def resize_with_pad_float(image: np.ndarray, size: int, name: str = "image") -> np.ndarray:
    """lerobot's resize: torch bilinear without antialiasing on floats, centred on 0, an odd pixel to the end.

    Args:
        image: (height, width, 3) float32 in [0, 1].
        size: side of the square result, in pixels. A frame of that size is returned unchanged.
        name: the observation's key, for messages.

    Returns:
        (size, size, 3) float32 in [0, 1].

    Raises:
        InputError: the frame is so elongated that a side would shrink to nothing.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    new_height, new_width = _checked_shape(height, width, size, name)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=(new_height, new_width), mode="bilinear", align_corners=False)
    canvas = np.zeros((size, size, 3), np.float32)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = resized[0].clamp(0.0, 1.0).permute(1, 2, 0).numpy()
    return canvas


def _checked_shape(height: int, width: int, size: int, name: str) -> tuple[int, int]:
    shape = resized_shape(height, width, size)
    if 0 in shape:
        raise InputError(
            f"{name} is {height} × {width} pixels: scaled to fit {size} × {size} it would lose a side; "
            "send frames of ordinary proportions"
        )
    return shape


def to_model(image: np.ndarray) -> np.ndarray:
    """Bring a frame to the model's range and layout.

    Args:
        image: (S, S, 3), uint8 or float32 in [0, 1].

    Returns:
        (3, S, S) float32 in [-1, 1]. Black is -1. A true division: a product with 1/255 is 1 ulp off (trap 35).
    """
    if image.dtype == np.uint8:
        image = image.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((image * np.float32(2) - np.float32(1)).transpose(2, 0, 1))


def fit_image(
    value: Any, name: str, size: int, *, resize: ResizeName = "openpi", layout: ImageLayout = "auto"
) -> np.ndarray:
    """A client's frame at the model's size, in one port's way: parse, resize with padding.

    Returns:
        (size, size, 3): uint8 for openpi, float32 in [0, 1] for lerobot.

    Raises:
        InputError: as `parse_image` and the two resizes.
    """
    image = parse_image(value, name, layout, keep_float=resize == "lerobot")
    if resize == "openpi":
        return resize_with_pad(image, size, name)
    if image.dtype == np.uint8:
        image = image.astype(np.float32) / np.float32(255)
    return resize_with_pad_float(image, size, name)


def image_to_model(
    value: Any, name: str, size: int, *, resize: ResizeName = "openpi", layout: ImageLayout = "auto"
) -> np.ndarray:
    """A client's frame to the model's input: `fit_image`, scaled.

    Returns:
        (3, size, size) float32 in [-1, 1].

    Raises:
        InputError: as `fit_image`.
    """
    return to_model(fit_image(value, name, size, resize=resize, layout=layout))
