"""Images and masks: read, write, resize, cut into tiles, to the network's input and back."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from classes import ONE_CLASS, Classes
from model import ModelConfig
from utils import UserError, check_file, reason_of, write_file

IGNORE = 255  # the value of a mask's pixels that count neither in the loss nor in a score
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp",
)  # fmt: skip
INPUT_PIXELS = {"cuda": 384 * 1248, "mps": 192 * 640, "cpu": 72 * 320, "cpu bf16": 112 * 352}
TILES_FROM = 2e6  # pixels of the median image
TRAINING_FOLDERS = ("training", "images", "train/images", "train_images", "train", ".")
TEST_FOLDERS = ("testing", "test/images", "test_images", "test")
MARKER = ".written_by_segmentation_kit"  # in every --out
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "TIFF",
    "WEBP",
)  # others, such as EPS, could run a program

warnings.filterwarnings("ignore", module="torch._weights_only_unpickler")  # hostile model files
warnings.filterwarnings("ignore", module="PIL")  # large images, damaged EXIF: reading decides


def strict_augmentation(build: Callable[[], Any]) -> Any:
    """Call `build`. Raises UserError for an argument that albumentations does not know.

    albumentations itself only warns, and takes the default. Not for threads: filters are global.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not valid for transform")
        try:
            return build()
        except UserWarning as warning:
            raise UserError(f"augmentation in train.py: {reason_of(warning)}") from None


class Collection(NamedTuple):
    """A folder of images as a layout understood it."""

    name: str  # of the layout, for people
    samples: pd.DataFrame  # a row for each image, see `data.find_samples`
    top: float = 0.0  # default of --top
    metric: str = "dice"  # default of --metric
    rle: str = "columns"  # order of RLE in submission.csv, see rle.py
    classes: Classes = ONE_CLASS  # that the masks tell apart


# --------------------------------------------------------------------------------------------------
#  Read
# --------------------------------------------------------------------------------------------------


def image_paths(folder: Path) -> list[Path]:
    """The images in a folder, sorted.

    What the kit has written is no data: a folder with, or next to, its `MARKER` counts as empty.
    """
    if not folder.is_dir() or (folder / MARKER).exists() or (folder.parent / MARKER).exists():
        return []
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def list_images(folder: Path) -> dict[str, Path]:
    """{stem: path} of the images in a folder, sorted. Raises UserError where two share a stem."""
    found: dict[str, Path] = {}
    for path in image_paths(folder):
        if path.stem in found:
            both = f"{found[path.stem].name} and {path.name}"
            raise UserError(f"{folder}: {both} share a name; rename one of them")
        found[path.stem] = path
    return found


def image_folder(root: Path, training: bool) -> Path | None:
    """The folder of images in `root`; test images first where they are not for training."""
    names = TRAINING_FOLDERS if training else TEST_FOLDERS + TRAINING_FOLDERS
    return next((root / name for name in names if image_paths(root / name)), None)


def open_header(path: str | Path) -> Image.Image:
    """Open an image without decoding it. Raises UserError."""
    try:
        check_file(path)
        return Image.open(path, formats=IMAGE_FORMATS)
    except Exception as error:  # Pillow raises anything on a damaged file
        raise unreadable(path, error) from None


def open_image(path: str | Path) -> Image.Image:
    """Decode an image as a whole and turn it upright (EXIF). Raises UserError.

    Pillow, not OpenCV: it refuses what is cut off or damaged, and reads palettes.
    """
    image = open_header(path)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # Pillow raises anything on a damaged file
        raise unreadable(path, error) from None


def unreadable(path: str | Path, error: Exception) -> UserError:
    """The message for a file that is no image."""
    unknown = isinstance(error, Image.UnidentifiedImageError)
    reason = "not an image" if unknown else reason_of(error)
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        reason = "empty file"
    return UserError(f"{path}: {reason}; replace the file or move it away")


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image once it is upright, from its header. Raises UserError."""
    with open_header(path) as image:
        try:
            turned = image.getexif().get(0x0112, 1) > 4  # EXIF: the camera was held upright
        except Exception as error:  # Pillow raises anything on damaged EXIF
            raise unreadable(path, error) from None
        return image.size if turned else image.size[::-1]


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (h, w, 3) uint8 RGB: also grey, palette, alpha, 16-bit and turned ones.

    Raises UserError where it is damaged, empty, over 179 million pixels, or no image.
    """
    image = open_image(path)
    if image.mode in ("I", "F", "I;16", "I;16B"):
        values = np.asarray(image)
        if values.dtype == np.float32 or values.min() < 0 or values.max() > 65535:
            remedy = "save it with 8 or 16 bits per channel"
            raise UserError(f"{path}: grey values outside 0 to 65535; {remedy}")
        return cv2.cvtColor((values // 257).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    return np.asarray(image.convert("RGB"))


def outline_length(image: np.ndarray, mask: np.ndarray) -> float:
    """How many pairs of neighbours in a mask (h, w) differ."""
    return float((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


def edge_contrast(image: np.ndarray, mask: np.ndarray) -> float:
    """The mean gradient of an image (h, w, 3) uint8 along the outline of a mask (h, w) uint8."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    gradient = cv2.magnitude(*(cv2.Sobel(grey, cv2.CV_32F, x, 1 - x) for x in (0, 1)))
    band = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    return cv2.mean(gradient, band)[0]


# --------------------------------------------------------------------------------------------------
#  From pixels to the network, and back
# --------------------------------------------------------------------------------------------------


def preprocess(image: np.ndarray, config: ModelConfig) -> torch.Tensor:
    """(h, w, 3) uint8 RGB to (3, height, width) uint8, which `normalise` takes on the device."""
    return to_tensor(resize_image(image, config))


def prepare_pair(
    image: np.ndarray, mask: np.ndarray, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask at the network's size; for tiles as they are, to be cut later."""
    if config.tiles:
        return image, mask
    return resize_image(image, config), resize_mask(mask, config)


def input_pixels(device: str, fast_cpu: bool, double: bool) -> int:
    """How many pixels the input has by default; twice as many for tiles and exclusive classes."""
    return INPUT_PIXELS["cpu bf16" if fast_cpu else device] * (2 if double else 1)


def resolve_top(top: float, above: pd.Series) -> float:
    """The share of the height that is cut off at the top; -1: down to the highest mask.

    `above`: from `data.scan_dataset`, of the training images.
    """
    if top >= 0:
        return top
    highest = float(above.min())
    return min(0.9, round(highest - 0.05, 2)) if 0.15 < highest < 1 else 0.0  # less is not worth it


def resize_image(image: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Cut off the top and resize the rest: (h, w, 3) to (height, width, 3) uint8."""
    image = image[round(config.top * image.shape[0]) :]
    smaller = image.shape[0] > config.height and image.shape[1] > config.width
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR  # area: thin lines stay
    return cv2.resize(image, (config.width, config.height), interpolation=method)


def resize_mask(mask: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The same for a mask, by the nearest pixel: (h, w) to (height, width), or (h, w, K), uint8."""
    mask = mask[round(config.top * mask.shape[0]) :]
    size = (config.width, config.height)
    return cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)


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
    """(height, width) float32 probabilities to the image's own (h, w), interpolated linearly.

    The same for (K, height, width). The part that was cut off at the top is 0.
    """
    own = (config.height, config.width)
    assert probabilities.shape[-2:] == own, probabilities.shape
    top, planes = round(config.top * size[0]), probabilities.reshape(1, -1, *own)
    seen = F.interpolate(planes, (size[0] - top, size[1]), mode="bilinear")
    return F.pad(seen, (0, 0, top, 0)).reshape(*probabilities.shape[:-2], *size)


# --------------------------------------------------------------------------------------------------
#  Tiles
# --------------------------------------------------------------------------------------------------


def tile_corners(
    size: Iterable[int], config: ModelConfig, overlap: float = 0.0
) -> list[tuple[int, int]]:
    """The upper left corners (y, x) of the tiles that cover an image of `size` (h, w)."""
    starts = []
    for whole, tile in zip(size, (config.height, config.width), strict=True):
        count = max(1, -int(-(whole - overlap * tile) // (tile * (1 - overlap))))
        places = np.linspace(0, max(0, whole - tile), count).round().astype(int)
        starts.append(places.tolist())
    return [(y, x) for y in starts[0] for x in starts[1]]


def cut_tile(
    pixels: np.ndarray, corner: tuple[int, int], config: ModelConfig, outside: int | None = None
) -> np.ndarray:
    """The tile at a corner, (height, width, ...). Outside the image: its edge, or a value."""
    y, x = corner
    tile = pixels[y : y + config.height, x : x + config.width]
    below, right = config.height - tile.shape[0], config.width - tile.shape[1]
    if not (below or right):
        return tile
    border = cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT
    return cv2.copyMakeBorder(tile, 0, below, 0, right, border, value=outside)


def item_places(
    samples: pd.DataFrame, config: ModelConfig
) -> list[tuple[int, tuple[int, int] | None]]:
    """The items of a dataset: an image each, or with tiles an image and a corner (y, x) each."""
    if not config.tiles:
        return [(index, None) for index in range(len(samples))]
    places = []
    for index, size in enumerate(zip(samples.height, samples.width, strict=True)):
        places += [(index, corner) for corner in tile_corners(size, config)]
    return places


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
