"""Masks: planes and label maps, and the files that they are read from.

A mask is planes (K, h, w) of 0, 1 and 255 (ignored), one for each class, or a label map (h, w) of
class numbers and 255. Both are uint8. What trains may have shares between 0 and 1, see
`images.encode_shares`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from kit.config import IGNORE, Classes
from kit.data.arrays import count_planes, planes_of
from kit.data.classes import ClassRequest, choose_planes
from kit.data.images import encode_shares, harden
from kit.data.rasters import Layer, Window, reduce_mask
from kit.data.readers import no_data, open_image, open_layers, read_header
from kit.errors import UserError, first_five

# Decodes a file, or a plane of it: `open_image`, or a `DecodedFiles`
Opener = Callable[[Path | Layer], Image.Image]
NO_DATA = -9999  # what is no number counts as this value; negative values are ignored
DECODED_BYTES = 1 << 30  # of mask files that stay decoded while a data set is loaded

# --------------------------------------------------------------------------------------------------
#  The two kinds
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planes:
    """A mask for each class."""

    parts: tuple[Any, ...]  # for each class an object with `read(size, opener)`; None: empty
    united: bool = False  # into one class
    image: tuple[Layer, ...] = ()  # its image where that may have pixels without data: ignored
    soft: bool = False  # pixels have shares

    @property
    def path(self) -> Path:
        """One of the files; an empty path where there is none."""
        return next((part.path for part in self.parts if part), Path())

    @property
    def source(self) -> str:
        """The files or rows of all classes."""
        sources = (str(getattr(part, "source", part.path)) for part in self.parts if part)
        return "; ".join(dict.fromkeys(sources))

    def read(
        self, size: tuple[int, int], opener: Opener = open_image, soft: bool = False
    ) -> np.ndarray:
        """(K, h, w) uint8. `size`: its image's (h, w); `soft`: with shares. Raises UserError."""
        planes = np.zeros((len(self.parts), *size), np.uint8)
        for plane, part in zip(planes, self.parts, strict=True):
            if part:
                plane[:] = part.read(size, opener)
        if self.united:
            united = np.where((planes == 1).any(0), 1, planes.max(0))
            planes = united.astype(np.uint8)[None]
        planes = planes if soft or not self.soft else harden(planes)
        return ignore_no_data(planes, self.image)

    def change(self, kind: type, **changes: Any) -> "Planes":
        """The same with some fields of all parts of one kind replaced."""
        parts = (replace(p, **changes) if isinstance(p, kind) else p for p in self.parts)
        return replace(self, parts=tuple(parts))


@dataclass(frozen=True)
class MaskValues:
    """What the values in mask files mean. What is neither foreground nor ignored is background."""

    channel: str = "grey"  # grey (or a palette's level), index, colour (as 0xRRGGBB), alpha
    foreground: tuple[float, ...] = ()
    ignored: tuple[float, ...] = ()
    cut: float | None = None  # where levels are soft: what is above is foreground
    soft: bool = False  # a pixel has a share: the mean of its annotators, or of soft levels

    def covers(self, value: float) -> bool:
        """Whether a value is foreground."""
        return value in self.foreground or (self.cut is not None and value > self.cut)


@dataclass(frozen=True)
class MaskFile:
    """The mask of a class in a file, or in several planes or files of an object each."""

    path: Path
    values: MaskValues = MaskValues()  # decided over all masks, see `values.py`
    more: tuple[Path, ...] = ()  # files of further objects of the same image
    image: Path | None = None  # its image: a mask of the stored size is turned like it (EXIF)
    page: int = -1  # the plane of an array, from 0; -1: all
    window: Window | None = None  # what is read of it; None: all

    @property
    def source(self) -> str:
        """The files."""
        return "; ".join(map(str, (self.path, *self.more)))

    @property
    def planes(self) -> list[Path | Layer]:
        """What is decoded: each file, or its planes."""
        if self.page >= 0:
            return [Layer(self.path, self.page)]
        return [plane for path in (self.path, *self.more) for plane in planes_of(path)]

    def pixels(self, size: tuple[int, int], opener: Opener) -> Iterator[np.ndarray]:
        """The values of each plane, (h, w). Raises UserError."""
        for plane in self.planes:
            image = open_mask(plane, size, self.image, opener, self.window)
            yield mask_pixels(image, self.values.channel)

    def read(self, size: tuple[int, int], opener: Opener = open_image) -> np.ndarray:
        """(h, w) uint8: 1 foreground, 0 background, 255 ignored; or shares. Raises UserError."""
        size = (self.window.height, self.window.width) if self.window else size
        mask, values = np.zeros(size, np.uint8), self.values
        if values.soft:
            return reduce_mask(self.read_shares(size, opener), self.window)
        for pixels in self.pixels(size, opener):
            for ignored in values.ignored:
                mask[(pixels == ignored) & (mask == 0)] = IGNORE
            for foreground in values.foreground:
                mask[pixels == foreground] = 1
            if values.cut is not None:
                mask[pixels > values.cut] = 1
        return reduce_mask(mask, self.window)

    def read_shares(self, size: tuple[int, int], opener: Opener) -> np.ndarray:
        """The mean of the planes that do not ignore a pixel, as of `encode_shares`. UserError."""
        total, count = np.zeros((2, *size), np.float32)
        for pixels in self.pixels(size, opener):
            share = np.isin(pixels, self.values.foreground)
            if self.values.cut is not None:
                share = np.clip(pixels / (2 * self.values.cut or 1), 0, 1)
            known = ~np.isin(pixels, self.values.ignored)
            total += share * known
            count += known
        return np.where(count > 0, encode_shares(total / np.maximum(count, 1)), IGNORE)


@dataclass(frozen=True)
class LabelMap:
    """A file whose values are the labels of exclusive classes."""

    file: MaskFile
    channel: str
    labels: tuple[float, ...]  # the value of each class; others are ignored
    image: tuple[Layer, ...] = ()  # as of `Planes`

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def read(
        self, size: tuple[int, int], opener: Opener = open_image, soft: bool = False
    ) -> np.ndarray:
        """(h, w) uint8: the number of the class, from 0; 255 ignored. Raises UserError."""
        if self.file.more:
            raise UserError(
                self.path,
                f"one of {1 + len(self.file.more)} label maps of one image",
                "keep one, or name it with --masks",
            )
        window = self.file.window
        size = (window.height, window.width) if window else size
        image = open_mask(self.file.planes[0], size, self.file.image, opener, window)
        numbers = class_numbers(mask_pixels(image, self.channel), self.labels)
        return ignore_no_data(reduce_mask(numbers, window), self.image)


def ignore_no_data(mask: np.ndarray, image: tuple[Layer, ...]) -> np.ndarray:
    """A mask, (K, h, w) or (h, w), ignored where its image has no data. Raises UserError."""
    missing = no_data(image) if image else None
    if missing is not None:
        mask[..., missing] = IGNORE
    return mask


def class_numbers(pixels: np.ndarray, labels: tuple[float, ...]) -> np.ndarray:
    """The values of a label map (h, w) as numbers of classes, uint8; 255 for any other value."""
    if pixels.dtype == np.uint8:
        table = np.full(256, IGNORE, np.uint8)
        table[np.array(labels, int)] = range(len(labels))
        return table[pixels]
    order = np.argsort(labels)
    ordered = np.array(labels)[order]
    place = np.searchsorted(ordered, pixels).clip(max=len(ordered) - 1)
    return np.where(ordered[place] == pixels, order[place], IGNORE).astype(np.uint8)


def plane(mask: np.ndarray, index: int) -> np.ndarray:
    """One class of planes (K, h, w) or of a label map (h, w): (h, w) of 0, 1 and 255 (ignored)."""
    if mask.ndim == 3:
        return mask[index]
    return np.where(mask == IGNORE, IGNORE, mask == index).astype(np.uint8)


def measure(mask: np.ndarray, classes: Classes) -> dict[str, Any]:
    """What a mask covers: `share`, `shares`, `above` and `thickness`, see `samples.scan`."""
    if mask.ndim == 2:  # one pass, however many classes there are
        counts = np.bincount(mask.ravel(), minlength=256)[: len(classes.names)]
        foreground, thick = mask != IGNORE, math.inf
    else:
        counts, foreground = (mask == 1).sum((1, 2)), (mask == 1).any(0)
        thick = thickness(foreground)
    rows = foreground.any(1)
    return {
        "share": float(foreground.mean()),
        "shares": tuple((counts / foreground.size).tolist()),
        "above": float(rows.argmax() / len(rows)) if rows.any() else 1.0,
        "thickness": thick,
    }


def outline_length(mask: np.ndarray) -> float:
    """How many pairs of neighbours in a mask (h, w) differ."""
    return float((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


def thickness(foreground: np.ndarray) -> float:
    """The mean thickness in pixels of a mask, bool (h, w), or of its background where thinner.

    Twice the area over the length of the outline; 0 where there is no outline.
    """
    outline = outline_length(foreground)
    area = min(foreground.sum(), foreground.size - foreground.sum())
    return float(2 * area / outline) if outline else 0.0


# --------------------------------------------------------------------------------------------------
#  Files to pixels
# --------------------------------------------------------------------------------------------------


class DecodedFiles:
    """Decodes files, and keeps them up to so many bytes: loading a data set asks several times."""

    def __init__(self, limit: int = DECODED_BYTES) -> None:
        self.free, self.images = limit, {}

    def __call__(self, path: Path | Layer) -> Image.Image:
        if path in self.images:
            return self.images[path]
        image = open_image(path)
        size = image.width * image.height * (1 if image.mode in ("1", "L", "P") else 4)
        if size < self.free:
            decoded = image.copy()  # without the open file of formats with pages
            decoded.format = image.format
            self.free -= size
            self.images[path] = decoded
        return image


# What turns an image of EXIF's orientations 5 to 8 upright.
TURNS = {
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def open_part(path: Path | Layer, opener: Opener, window: Window | None) -> Image.Image:
    """Decode a mask file, or a window of it, of a large TIFF nothing else. Raises UserError.

    Also where the file does not have the size of the window's image.
    """
    if not window:
        return opener(path)
    raster = open_layers((path,) if isinstance(path, Layer) else path)[0]
    if raster.size != window.whole:
        raise unlike_image(path, raster.size, window.whole)
    if raster.part:
        values = raster.part(window)
        return Image.fromarray(values[..., 0] if raster.bands == 1 else values)
    y, x, height, width, *_ = window
    return opener(path).crop((x, y, x + width, y + height))


def unlike_image(path: Path, size: tuple[int, int], photo_size: tuple[int, int]) -> UserError:
    """The message for a mask that does not have its image's (h, w)."""
    mask, photo = ("x".join(map(str, s[::-1])) for s in (size, photo_size))
    return UserError(path, f"is {mask}, but its image is {photo}", "replace one of them")


def open_mask(
    path: Path | Layer,
    size: tuple[int, int],
    photo: Path | None = None,
    opener: Opener = open_image,
    window: Window | None = None,
) -> Image.Image:
    """Decode a mask file, or a page of it. Raises UserError, also for another size than (h, w).

    `photo`: its image. If EXIF turns that, a mask of the stored size was drawn on the stored pixels
    and is turned, too. `window`: what is decoded, of `size`.
    """
    image = open_part(path, opener, window)
    if photo and not window and image.size == size != size[::-1]:
        turn = read_header(photo).turn
        image = image.transpose(TURNS[turn]) if turn in TURNS else image
    if image.size != size[::-1]:
        raise unlike_image(path, image.size[::-1], size)
    return image


def mask_pixels(image: Image.Image, channel: str) -> np.ndarray:
    """One channel of a mask as numbers (h, w); see `MaskValues.channel`."""
    if channel == "alpha":
        return np.asarray(image.convert("RGBA"))[..., 3]
    if channel == "colour":
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int32), -1, 0)
        return red << 16 | green << 8 | blue
    if image.mode == "P" and channel == "grey":
        return palette_levels(image)[np.asarray(image)]
    if len(image.getbands()) > 1:
        return np.asarray(image.convert("RGB"))[..., 0]
    if image.mode == "F":
        return np.nan_to_num(image, nan=NO_DATA, posinf=NO_DATA, neginf=NO_DATA)
    return np.asarray(image, np.uint8 if image.mode == "1" else None)


def palette_levels(image: Image.Image) -> np.ndarray:
    """What each index of a palette counts as, uint8 (256,).

    The grey level where all colours are grey; otherwise the index, and 0 for black.
    """
    colours = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    levels = np.arange(256, dtype=np.uint8)
    if (colours == colours[:, :1]).all():
        levels[: len(colours)] = colours[:, 0]
        return levels
    black = np.flatnonzero((colours == 0).all(1))
    if len(black):
        levels[[0, black[0]]] = levels[[black[0], 0]]
    return levels


# --------------------------------------------------------------------------------------------------
#  --classes with a mask for each class
# --------------------------------------------------------------------------------------------------


def choose_planes_of_arrays(
    masks: list[Planes | None], classes: Classes, request: ClassRequest, soft: bool
) -> tuple[list[Planes | None], Classes]:
    """The masks of arrays with several planes, a class each where as many are asked for.

    Raises UserError where nothing says whether they are classes, annotators or objects.
    """
    parts = (part for mask in masks if mask for part in mask.parts)
    files = [part for part in parts if isinstance(part, MaskFile) and part.page < 0]
    counts = {path: count_planes(path) for file in files for path in (file.path, *file.more)}
    most = max(counts, key=counts.__getitem__, default=None)
    if soft or request.merged or most is None or counts[most] == 1:
        return masks, classes
    names = request.names or tuple(entry.name for entry in request.listed)
    if classes.several or {*counts.values()} != {len(names)}:
        raise UserError(
            most,
            f"holds {counts[most]} planes: are they annotators, objects, or classes?",
            "take their mean with --soft true, unite them with --classes one, or name as many "
            "classes with --classes",
        )

    def split(mask: Planes) -> Planes:
        return Planes(tuple(replace(mask.parts[0], page=page) for page in range(len(names))))

    values = request.model.values if request.model else names
    return [mask and split(mask) for mask in masks], Classes(names, values)


def choose_masks(
    masks: Iterable[Planes | None], classes: Classes, request: ClassRequest, soft: bool = False
) -> tuple[list[Planes | None], Classes]:
    """The masks of the classes that --classes asks for, and these classes. Raises UserError.

    `soft`: masks that are merged are annotators.
    """
    masks, classes = choose_planes_of_arrays(list(masks), classes, request, soft)
    if classes == Classes() or (request.model and request.asks_for_labels):
        return masks, classes
    if not (classes.several or request.model or request.strict):
        return masks, Classes()
    if request.merged:
        print(f"classes: {first_five(classes.names)} are merged into one", flush=True)
        unite = average if soft else lambda mask: replace(mask, united=True)
        return [mask and unite(mask) for mask in masks], Classes()
    chosen = choose_planes(classes, request)
    places = [classes.values.index(v) if v in classes.values else None for v in chosen.values]

    def choose(mask: Planes) -> Planes:
        return Planes(tuple(None if place is None else mask.parts[place] for place in places))

    return [mask and choose(mask) for mask in masks], chosen


def average(mask: Planes) -> Planes:
    """A mask of one class whose files are those of all classes. Raises UserError for no files."""
    files = [part for part in mask.parts if part]
    if not all(isinstance(file, MaskFile) for file in files):
        raise UserError("--soft true", "masks that are no files", "leave the flag out")
    more = tuple(path for file in files for path in (file.path, *file.more))[1:]
    return Planes((replace(files[0], more=more),))
