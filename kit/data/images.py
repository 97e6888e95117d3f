"""Images (h, w, C): resize, cut into tiles, to the network's input and back, write.

Pixels are uint8, or uint16 where the images have more than 8 bits: 0 is black, 65535 white.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from kit.config import IGNORE, ModelConfig
from kit.errors import UserError
from kit.files import write_file

# --------------------------------------------------------------------------------------------------
#  From pixels to the network, and back
# --------------------------------------------------------------------------------------------------


def each_plane(change: Callable[[np.ndarray], np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Call a function of (h, w) for a label map (h, w), or for each of the planes (K, h, w)."""
    planes = mask.reshape(-1, *mask.shape[-2:])
    changed = np.stack([change(plane) for plane in planes])
    return changed.reshape(*mask.shape[:-2], *changed.shape[1:])


def prepare_pair(
    image: np.ndarray, mask: np.ndarray, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask at the network's size; for tiles as they are, to be cut later."""
    if config.tiles:
        return image, mask
    return resize_image(image, config), resize_mask(mask, config)


def resize_image(image: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Cut off the top and resize the rest: (h, w, C) to (height, width, C)."""
    image = image[round(config.top * image.shape[0]) :]
    smaller = image.shape[0] > config.height and image.shape[1] > config.width
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR  # area: thin lines stay
    return resize(image, (config.width, config.height), method)


def resize(image: np.ndarray, size: tuple[int, int], method: int) -> np.ndarray:
    """Resize (h, w, C) to (width, height), of OpenCV's methods, which take up to 4 channels."""
    parts = [
        cv2.resize(image[..., start : start + 4], size, interpolation=method)
        for start in range(0, image.shape[2], 4)
    ]
    return parts[0] if parts[0].ndim == 3 and len(parts) == 1 else np.dstack(parts)


def resize_mask(mask: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The same for a mask, (h, w) or (K, h, w) uint8, by the nearest pixel."""
    size, nearest = (config.width, config.height), cv2.INTER_NEAREST_EXACT
    top = round(config.top * mask.shape[-2])
    return each_plane(lambda plane: cv2.resize(plane[top:], size, interpolation=nearest), mask)


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """Pixels as albumentations takes them: uint16 as float32 of 0..1, others as they are."""
    return pixels.astype(np.float32) / 65535 if pixels.dtype == np.uint16 else pixels


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(h, w, C) to (C, h, w) of 0..255: uint8, or float32 of uint16 and of float32 of 0..1."""
    tensor = torch.from_numpy(np.array(cv2.split(to_unit(pixels))))
    return tensor if tensor.dtype == torch.uint8 else 255 * tensor


def from_tensor(tensor: torch.Tensor) -> np.ndarray:
    """The way back from `to_tensor`: (C, h, w) to (h, w, C), uint8 or uint16."""
    pixels = np.moveaxis(tensor.numpy(), 0, -1)
    return (
        pixels
        if pixels.dtype == np.uint8
        else (257 * pixels + 0.5).clip(0, 65535).astype(np.uint16)
    )


def encode_shares(shares: np.ndarray) -> np.ndarray:
    """Shares of 0..1, (h, w) float32, as uint8: 0 and 1 as they are, 2 to 254 between them.

    Half is 128. `decode_shares` is the way back.
    """
    between = np.clip(1 + np.round(254 * shares), 2, 254)
    return np.where((shares > 0) & (shares < 1), between, shares).astype(np.uint8)


def decode_shares(mask: torch.Tensor) -> torch.Tensor:
    """The shares of planes of `encode_shares`, float32; of 0 and 1 these; ignored pixels are 1."""
    return torch.where(mask > 1, (mask - 1) / 254, mask)


def harden(planes: np.ndarray) -> np.ndarray:
    """Planes of `encode_shares` without shares: from half on they are foreground."""
    return np.where(planes == IGNORE, IGNORE, (planes == 1) | (planes > 127)).astype(np.uint8)


def normalise(images: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """(N, C, h, w) of 0..255 to float32, channels_last, (x - mean) / std, on the same device."""
    mean = 255 * torch.tensor(config.mean, device=images.device)[:, None, None]
    std = 255 * torch.tensor(config.std, device=images.device)[:, None, None]
    return (images.to(memory_format=torch.channels_last) - mean) / std


def restore(
    probabilities: torch.Tensor, size: tuple[int, int], config: ModelConfig
) -> torch.Tensor:
    """(K, height, width) float32 probabilities to the image's own (K, h, w), linearly.

    What was cut off at the top is 0.
    """
    assert probabilities.shape[1:] == (config.height, config.width), probabilities.shape
    top = round(config.top * size[0])
    seen = F.interpolate(probabilities[None], (size[0] - top, size[1]), mode="bilinear")[0]
    return F.pad(seen, (0, 0, top, 0))


# --------------------------------------------------------------------------------------------------
#  Tiles
# --------------------------------------------------------------------------------------------------


def tile_corners(
    size: Iterable[int], config: ModelConfig, overlap: float = 0.0
) -> list[tuple[int, int]]:
    """The upper left corners (y, x) of the tiles that cover an image of `size` (h, w)."""

    def starts(whole: int, tile: int) -> list[int]:
        count = max(1, -int(-(whole - overlap * tile) // (tile * (1 - overlap))))
        return np.linspace(0, max(0, whole - tile), count).round().astype(int).tolist()

    return list(itertools.product(*map(starts, size, (config.height, config.width))))


def cut_tile(
    pixels: np.ndarray, corner: tuple[int, int], config: ModelConfig, outside: int | None = None
) -> np.ndarray:
    """The tile of (h, w) or (h, w, C) at a corner. Outside the image: its edge, or a value."""
    y, x = corner
    tile = pixels[y : y + config.height, x : x + config.width]
    below, right = config.height - tile.shape[0], config.width - tile.shape[1]
    if not (below or right):
        return tile
    border = cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT
    tile = cv2.copyMakeBorder(tile, 0, below, 0, right, border, value=outside or 0)
    return tile.reshape(*tile.shape[:2], *pixels.shape[2:])  # a single channel keeps its axis


def cut_pair(
    image: np.ndarray, mask: np.ndarray, corner: tuple[int, int], config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The tile at a corner of an image and of its mask, which is ignored outside of the image."""
    tiles = each_plane(lambda plane: cut_tile(plane, corner, config, IGNORE), mask)
    return cut_tile(image, corner, config), tiles


def item_places(
    samples: pd.DataFrame, config: ModelConfig
) -> list[tuple[int, tuple[int, int] | None]]:
    """The items of a dataset: an image each, or with tiles an image and a corner (y, x) each."""
    if not config.tiles:
        return [(index, None) for index in range(len(samples))]
    sizes = enumerate(zip(samples.height, samples.width, strict=True))
    return [(index, corner) for index, size in sizes for corner in tile_corners(size, config)]


# --------------------------------------------------------------------------------------------------
#  For the eye, and write
# --------------------------------------------------------------------------------------------------


def shown_channels(text: str, channels: int) -> tuple[int, ...]:
    """The channels that --show names, from 1: three, one, or of "" none. Raises UserError."""
    if not text:
        return ()
    numbers = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if len(numbers) not in (1, 3) or not all(1 <= number <= channels for number in numbers):
        problem = f"takes one or three channels, from 1 to {channels}, such as 3,2,1"
        raise UserError(f"--show {text}", problem)
    return numbers


def to_picture(pixels: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Three channels of pixels (h, w, C) as RGB (h, w, 3) uint8 for people.

    Those that `show` names, else the first three of the middle slice, of fewer the first. What is
    not RGB is stretched.
    """
    if config.rgb and not config.show:
        return pixels if pixels.dtype == np.uint8 else (pixels // 257).astype(np.uint8)
    last = pixels.shape[2] - 1
    own = pixels.shape[2] // (2 * len(config.neighbours) + 1)
    first = len(config.neighbours) * own
    chosen = [n - 1 for n in config.show] or [first + n for n in range(3 if own >= 3 else 1)]
    seen = pixels[..., [min(n, last) for n in chosen]].astype(np.float32)
    low, high = np.percentile(seen[::4, ::4], (1, 99), axis=(0, 1))
    seen = np.clip((seen - low) * (255 / np.maximum(high - low, 1)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(seen, (*seen.shape[:2], 3)))


def encode_image(pixels: np.ndarray, suffix: str) -> bytes:
    """(h, w) or (h, w, 3) RGB uint8 as the bytes of a PNG or JPEG."""
    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else []
    done, content = cv2.imencode(suffix, bgr, options)
    assert done, suffix
    return content.tobytes()


def decode_image(content: bytes) -> np.ndarray:
    """The (h, w) uint8 of a grey image from `encode_image`."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write (h, w) or (h, w, 3) RGB uint8 as PNG or JPEG, by the suffix, whole or not at all."""
    write_file(path, encode_image(pixels, path.suffix))


def write_palette_image(path: Path, ids: np.ndarray, colours: np.ndarray) -> None:
    """Write (h, w) uint8 as a PNG with a palette, uint8 (256, 3): ids that are seen as colours."""
    image = Image.fromarray(ids, "P")
    image.putpalette(colours.ravel().tolist())
    write_file(path, lambda part: image.save(part, "PNG"))
