"""A colour for each class, which the colour-blind can tell, too; label maps as they are written."""

import functools

import numpy as np

from classes import Classes

BACKGROUND = {"background", "unlabelled", "unlabeled", "void"}  # drawn black

# How people with protanopia, deuteranopia and tritanopia see linear RGB (Machado, Oliveira,
# Fernandes, IEEE TVCG 2009, severity 1).
COLOUR_BLIND = np.array([
    [1, 0, 0, 0, 1, 0, 0, 0, 1],
    [0.1523, 1.0526, -0.2049, 0.1145, 0.7863, 0.0992, -0.0039, -0.0481, 1.0520],
    [0.3673, 0.8606, -0.2280, 0.2801, 0.6725, 0.0474, -0.0118, 0.0429, 0.9689],
    [1.2555, -0.0767, -0.1788, -0.0784, 0.9308, 0.1476, 0.0047, 0.6914, 0.3039],
]).reshape(4, 3, 3)  # fmt: skip
TO_XYZ = np.array([
    [0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505],
])  # fmt: skip


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Colours (n, 3) of 0..255 in CIE Lab as each kind of eye sees them, (n, 4, 3)."""
    values = rgb / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    seen = np.einsum("kij,nj->nki", COLOUR_BLIND, linear).clip(0, 1)
    xyz = seen @ TO_XYZ.T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@functools.cache
def class_colours(names: tuple[str, ...]) -> np.ndarray:
    """A colour for each class, uint8 (K, 3) RGB, that the colour-blind can tell, too.

    Each next colour is the one furthest from all before, for the eye that tells it least.
    """
    levels = np.linspace(0, 255, 8).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    lab = to_lab(candidates)
    taken = to_lab(np.array([[0, 0, 0], [255, 255, 255]]))  # of the background and of the panels
    nearest = np.stack([np.linalg.norm(lab - one, axis=-1).min(1) for one in taken]).min(0)
    colours = np.zeros((len(names), 3), np.uint8)
    for index, name in enumerate(names):
        if name.lower().strip("_") in BACKGROUND:
            continue
        chosen = int(nearest.argmax())
        colours[index] = candidates[chosen]
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[chosen], axis=-1).min(1))
    return colours


def palette(classes: Classes) -> tuple[np.ndarray, np.ndarray]:
    """How exclusive classes are written: the value of each class, uint8 (K,), and 256 colours.

    The value is that of the label maps; for masks in colours the number of the class, from 0.
    """
    grey = all(value.isdecimal() and int(value) < 255 for value in classes.values)
    values = np.array([int(v) for v in classes.values] if grey else range(len(classes.names)))
    colours = np.zeros((256, 3), np.uint8)
    colours[values] = class_colours(classes.names)
    return values.astype(np.uint8), colours


def mask_colours(
    mask: np.ndarray, classes: Classes
) -> list[tuple[str, tuple[int, int, int], np.ndarray]]:
    """(name, colour, bool (h, w)) of each class in a mask: ids (h, w), or bool (K, h, w)."""
    found = []
    for index, (name, colour) in enumerate(
        zip(classes.names, class_colours(classes.names).tolist(), strict=True)
    ):
        one = mask == index if classes.exclusive else mask[index]
        if one.any():
            found.append((name, tuple(colour), one))
    return found
