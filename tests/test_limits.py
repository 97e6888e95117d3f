"""Which symmetries the augmentation uses; predictions that are ready in time."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY, run

import train


def views(flips, draws=60, **settings):
    """How often each flip and turn of an image and its mask comes out of the augmentation."""
    config = train.Config(height=8, width=8, augment=1e-9, flips=flips, **settings)
    augment = train.augmentation(config)
    augment.transforms = [t for t in augment.transforms if type(t).__name__ in SYMMETRIES]
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    mask = np.stack([image[..., 0] % 2, image[..., 1] // 99])
    counts = {}
    for draw in range(draws):
        augment.set_random_seed(7919 * draw)  # as SegmentationDataset does for each item
        changed = augment(image=image, masks=mask)
        assert np.array_equal(changed["masks"][0], changed["image"][..., 0] % 2)
        assert np.array_equal(changed["masks"][1], changed["image"][..., 1] // 99)
        name = next(n for n, change in EIGHT.items() if (change(image) == changed["image"]).all())
        counts[name] = counts.get(name, 0) + 1
    return counts


SYMMETRIES = ("HorizontalFlip", "OneOf", "D4")
EIGHT = {
    "same": lambda image: image,
    "h": lambda image: image[:, ::-1],
    "v": lambda image: image[::-1],
    "hv": lambda image: image[::-1, ::-1],
    "quarter": np.rot90,
    "three quarters": lambda image: np.rot90(image, 3),
    "transposed": lambda image: image.transpose(1, 0, 2),
    "other diagonal": lambda image: image[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize(
    ("flips", "names"),
    [
        ("auto", ["same", "h"]),
        ("h", ["same", "h"]),
        ("hv", ["same", "h", "v", "hv"]),
        ("all", list(EIGHT)),
        ("none", ["same"]),
    ],
)
def test_the_augmentation_uses_the_symmetries_that_are_asked_for(flips, names):
    counts = views(flips)
    assert set(counts) == set(names)
    assert min(counts.values()) >= 60 / len(names) / 4


def test_auto_draws_the_random_numbers_that_h_draws():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (32, 96, 3), np.uint8), np.zeros((1, 32, 96), np.uint8)
    config = train.Config(height=32, width=96)
    results = []
    for flips in ("auto", "h"):
        augment = train.augmentation(replace(config, flips=flips))
        augment.set_random_seed(5)
        results.append([augment(image=image, masks=mask)["image"] for _ in range(20)])
    assert np.array_equal(*results)


def test_quarter_turns_of_an_input_that_is_not_square_are_refused(roads, tmp_path):
    flags = ("--data", roads, "--flips", "all", "--check", "true", "--out", tmp_path / "a")
    done = run("train.py", *flags, *TINY)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --flips all: quarter turns need a square input, it is 32x96; "
        "take --flips hv, or --height 48 --width 48"
    )
    assert run("train.py", *flags, *TINY, "--height", 48, "--width", 48).returncode == 0
    assert run("train.py", *flags, *TINY, "--flips", "hv").returncode == 0
