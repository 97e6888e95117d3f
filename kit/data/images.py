"""Images: read, write, resize, cut into tiles, to the network's input and back."""

import io
import itertools
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from kit.config import IGNORE, ModelConfig
from kit.errors import UserError, reason_of
from kit.files import check_file, write_file

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm",
)  # fmt: skip
PAGED_FORMATS = ("PNG", "GIF", "TIFF", "WEBP")
IMAGE_FORMATS = (*PAGED_FORMATS, "JPEG", "BMP", "PPM")  # others, such as EPS, could run a program
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's, of more than 8 bits

warnings.filterwarnings("ignore", module="torch._weights_only_unpickler")  # hostile model files
warnings.filterwarnings("ignore", module="PIL")  # large images, damaged EXIF: reading decides
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # as the warnings

# --------------------------------------------------------------------------------------------------
#  Read
# --------------------------------------------------------------------------------------------------


def open_header(path: str | Path) -> Image.Image:
    """Open an image without decoding it. Raises UserError."""
    try:
        check_file(path)
        try:
            return Image.open(path, formats=IMAGE_FORMATS)
        except Image.UnidentifiedImageError:
            return Image.open(without_damaged_extras(path), formats=("PNG",))
    except Exception as error:  # Pillow raises anything on a damaged file
        raise unreadable(path, error) from None


def without_damaged_extras(path: str | Path) -> io.BytesIO:
    """The bytes of a file; of a PNG without ancillary chunks (resolution) of a bad checksum."""
    content = Path(path).read_bytes()
    kept, place = [content[:8]], 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunk = content[place:end]
        ancillary = chunk[4:5].islower()
        if not ancillary or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big"):
            kept.append(chunk)
        place = end
    return io.BytesIO(b"".join(kept))


def open_image(path: str | Path) -> Image.Image:
    """Decode an image as a whole and turn it upright (EXIF). Raises UserError.

    Pillow, not OpenCV: it refuses what is cut off or damaged, and reads palettes.
    """
    return decode(path, open_header(path))


def decode(path: str | Path, image: Image.Image) -> Image.Image:
    """The same for an image from `open_header`."""
    try:
        pages = count_pages(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow raises anything on a damaged file
        raise unreadable(path, error) from None
    if pages > 1:
        raise UserError(path, f"has {pages} pages", "save the one that is meant as an image")
    return image


def is_deep(image: Image.Image) -> bool:
    """Whether an image from `open_header` has more than 8 bits per channel."""
    return image.mode in DEEP_MODES or ";16" in str(image.tile)  # RGB;16B: Pillow has no mode


def count_pages(image: Image.Image) -> int:
    """The pages of an opened image; a photograph's preview and a TIFF's smaller copies are none."""
    pages = getattr(image, "n_frames", 1) if image.format in PAGED_FORMATS else 1
    if pages == 1 or image.format != "TIFF":
        return pages
    full_size = 0
    for page in range(pages):
        image.seek(page)
        full_size += not image.tag_v2.get(254, 0) & 1  # NewSubfileType
    image.seek(0)
    return full_size


def unreadable(path: str | Path, error: Exception) -> UserError:
    """The message for a file that is no image."""
    unknown = isinstance(error, Image.UnidentifiedImageError)
    problem = "not an image" if unknown else reason_of(error)
    empty = os.path.isfile(path) and os.path.getsize(path) == 0
    return UserError(path, "empty file" if empty else problem, "replace it or move it away")


class Header(NamedTuple):
    """What an image's header says."""

    size: tuple[int, int]  # (height, width) once it is upright
    turn: int  # EXIF's orientation: 1 for upright, over 4 where height and width are swapped
    deep: bool  # more than 8 bits per channel


def read_header(path: str | Path) -> Header:
    """Read an image's header. Raises UserError."""
    with open_header(path) as image:
        deep = is_deep(image)  # first: EXIF may decode the image
        try:
            turn = image.getexif().get(0x0112, 1)
        except Exception as error:  # Pillow raises anything on damaged EXIF
            raise unreadable(path, error) from None
        tags = image.tag_v2 if image.format == "TIFF" else {}  # its size may be turned already
        width, height = tags.get(256, image.width), tags.get(257, image.height)
        return Header((width, height) if turn > 4 else (height, width), turn, deep)


def read_image(path: str | Path, value_range: tuple[float, ...] = ()) -> np.ndarray:
    """Read an image as (h, w, 3) uint8 RGB: also grey, palette, alpha, 16-bit and turned ones.

    `value_range`: the values that become black and white where it has more than 8 bits; () for a
    model that was trained on 8 bits: 0 and 65535, or 0 and 255 where no value is larger. Raises
    UserError where it is damaged, empty, over 179 million pixels, has several pages, or is no
    image.
    """
    image = open_header(path)
    deep = is_deep(image)
    image = decode(path, image)
    if not deep:
        return np.asarray(image.convert("RGB"))
    values = deep_values(path, image)
    if not value_range and (values.min() < 0 or values.dtype.kind == "f"):
        raise UserError(
            path,
            "values that 8-bit images do not have",
            "save it with 8 or 16 bits per channel, or train on such images",
        )
    black, white = value_range or (0, 255 if values.max() <= 255 else 65535)
    values = np.nan_to_num(values.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    levels = (values - black) * (255 / (white - black))  # no data is black
    pixels = np.clip(levels + 1e-6, 0, 255).astype(np.uint8)  # rounded down, as // 257 would
    return pixels if pixels.ndim == 3 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)


def deep_values(path: str | Path, image: Image.Image) -> np.ndarray:
    """The values of a decoded image of more than 8 bits: (h, w), or (h, w, 3) RGB. UserError."""
    if image.mode in DEEP_MODES:
        return np.asarray(image)
    values = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # Pillow drops 8 bits
    if values is None or values.shape[:2] != image.size[::-1]:
        raise UserError(path, "16 bits that cannot be read", "save it as a 16-bit PNG")
    return cv2.cvtColor(values, cv2.COLOR_BGR2RGB)


# --------------------------------------------------------------------------------------------------
#  Black and white of images with more than 8 bits
# --------------------------------------------------------------------------------------------------

PERCENTILES = "0.5,99.5"  # default of --window
SAMPLED_PIXELS = 50_000  # of each image, for the percentiles


def find_value_range(paths: Iterable[Path], window: str) -> tuple[float, ...]:
    """The values that become black and white in these images of more than 8 bits; () for none.

    `window`: two percentiles of all their pixels. By default 0.5 and 99.5, but 0 and 65535 where
    whole numbers reach the upper half of 16 bits. Prints what is taken. Raises UserError.
    """
    low, _, high = window.partition(",")
    try:
        percentiles = float(low), float(high)
    except ValueError:
        percentiles = (0.0, 0.0)
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise UserError(
            f"--window {window}", f"takes two percentiles from 0 to 100, such as {PERCENTILES}"
        )
    samples = [sample_pixels(path) for path in paths]
    values, without = leave_out_no_data(np.concatenate([np.zeros(0), *samples]))
    if not len(values):
        return ()
    black, white = np.percentile(values, percentiles).tolist()
    reason = f"percentiles {percentiles[0]:g} and {percentiles[1]:g}"
    whole = (values == values.round()).all()
    if window == PERCENTILES and whole and values.min() >= 0 and 32768 <= values.max() <= 65535:
        black, white, reason = 0.0, 65535.0, "all 16 bits are used"
    white = white if white > black else black + 1
    levels = f"{black:g} is black, {white:g} white ({reason})"
    print(f"images: {len(samples)} of more than 8 bits, {levels}{without}")
    return black, white


def leave_out_no_data(values: np.ndarray) -> tuple[np.ndarray, str]:
    """The values (n,) without no-data, and which that is, for people.

    No-data is not finite, or a negative value further below the others than these are apart.
    """
    left, without = values[np.isfinite(values)], []
    if len(left) < len(values):
        without = ["NaN or infinity"]
    others = left[left > left.min()] if len(left) else left
    if len(others) and left.min() < 0 and others.min() - left.min() > np.ptp(others):
        left, without = others, [*without, f"{left.min():g}"]
    return left, f"; {' and '.join(without)}: no data, black (infinity: white)" * bool(without)


def sample_pixels(path: Path) -> np.ndarray:
    """Some values of an image of more than 8 bits; none of one that cannot be read."""
    try:
        values = deep_values(path, open_image(path)).ravel()
    except UserError:  # `samples.decode_pairs` names it
        return np.zeros(0)
    return values[:: -(-len(values) // SAMPLED_PIXELS)].astype(np.float64)


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
    """Cut off the top and resize the rest: (h, w, 3) to (height, width, 3) uint8."""
    image = image[round(config.top * image.shape[0]) :]
    smaller = image.shape[0] > config.height and image.shape[1] > config.width
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR  # area: thin lines stay
    return cv2.resize(image, (config.width, config.height), interpolation=method)


def resize_mask(mask: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The same for a mask, (h, w) or (K, h, w) uint8, by the nearest pixel."""
    size, nearest = (config.width, config.height), cv2.INTER_NEAREST_EXACT
    top = round(config.top * mask.shape[-2])
    return each_plane(lambda plane: cv2.resize(plane[top:], size, interpolation=nearest), mask)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(h, w, 3) uint8 to (3, h, w) uint8."""
    return torch.from_numpy(np.array(cv2.split(pixels)))


def normalise(images: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """(N, 3, h, w) of 0..255 to float32, channels_last, (x - mean) / std, on the same device."""
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
    """The tile of (h, w) or (h, w, 3) at a corner. Outside the image: its edge, or a value."""
    y, x = corner
    tile = pixels[y : y + config.height, x : x + config.width]
    below, right = config.height - tile.shape[0], config.width - tile.shape[1]
    if not (below or right):
        return tile
    border = cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT
    return cv2.copyMakeBorder(tile, 0, below, 0, right, border, value=outside or 0)


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
#  Write
# --------------------------------------------------------------------------------------------------


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
