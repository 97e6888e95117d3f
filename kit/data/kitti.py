"""KITTI Road: its folders, its colour-coded ground truth, bird's-eye view (BEV), the server's zip.

Delete this file, its imports, its entries in samples.LAYOUTS and infer.SUBMISSIONS, its cell in
notebook.py: the rest works.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.config import IGNORE, Classes
from kit.data.folders import Collection
from kit.data.images import encode_image
from kit.data.masks import MaskFile, Opener, Planes, open_mask
from kit.data.names import list_images
from kit.data.rasters import Layer
from kit.data.readers import open_image
from kit.errors import UserError, first_five, reason_of
from kit.files import write_zip

# --------------------------------------------------------------------------------------------------
#  Layout
# --------------------------------------------------------------------------------------------------


def kitti_road(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """training/image_2 with training/gt_image_2 and training/calib, or one of these folders.

    Training takes only um images for the lane, the car's own; umm and uu have no mask for it.
    """
    places = [root / "training/image_2", root / "image_2", root]
    if not training:
        places.insert(0, root / "testing/image_2")
    folder = next((p for p in places if p.name == "image_2" and list_images(p)), None)
    if not folder or masks.endswith(".csv") or "{stem}" in masks:
        return None
    images, mask_folder = list_images(folder), folder.parent / "gt_image_2"
    if not mask_folder.is_dir() and not any(re.match(r"[a-z]+_", stem) for stem in images):
        return None  # KITTI's other benchmarks
    if masks != "auto":
        named = [path for path in (Path(masks), folder.parent / masks) if path.is_dir()]
        if not named:
            raise UserError(f"--masks {masks}", "not found", "name a folder of masks")
        mask_folder = named[0]
    files = list_images(mask_folder)
    rows = []
    for stem, image in images.items():
        row = {"id": stem, "image": image, "mask": None, "category": "", "views": ()}
        name = re.fullmatch(r"([a-z]+)_(\d+)", stem)
        if not name:
            row["mask"] = Planes((MaskFile(files[stem]),)) if stem in files else None
        elif target == "lane" and name[1] != "um" and training:
            continue
        else:
            file = files.get(f"{name[1]}_{target}_{name[2]}")
            calibration = folder.parent / "calib" / f"{stem}.txt"
            row["mask"] = Planes((KittiMask(file),)) if file else None
            row["category"] = f"{name[1]}_{target}"
            row["views"] = (BirdsEyeView(calibration),) if calibration.is_file() else ()
        rows.append(row)
    return Collection("KITTI Road", pd.DataFrame(rows), top=-1, metric="maxf")


@dataclasses.dataclass(frozen=True)
class KittiMask:
    """A ground truth that is coded by channel, as the official tools read it."""

    path: Path

    def read(self, size: tuple[int, int], opener: Opener = open_image) -> np.ndarray:
        """(h, w) uint8: 1 road (blue > 0), 0 not road, 255 ignored (red = 0). Raises UserError."""
        image = open_mask(Layer(self.path), size, opener=opener)
        if image.mode not in ("RGB", "RGBA", "P"):
            raise UserError(
                self.path,
                "not a KITTI ground truth, which is in colour (blue: road, red: evaluated)",
                "replace it",
            )
        red, _, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        return np.where(red > 0, (blue > 0).astype(np.uint8), np.uint8(IGNORE))


# --------------------------------------------------------------------------------------------------
#  Bird's-eye view: the ground as the server scores it (Fritsch, Kuehnl, Geiger, ITSC 2013)
# --------------------------------------------------------------------------------------------------

BEV_SIZE = (800, 400)  # rows from 46 m to 6 m ahead, columns from 10 m left to 10 m right
BEV_CELL = 0.05  # metres


@dataclasses.dataclass(frozen=True)
class BirdsEyeView:
    """A second view of an image, in which it is scored too."""

    calibration: Path
    name = "bev"

    def check(self) -> None:
        """Raise UserError for a damaged calibration."""
        read_calibration(self.calibration)

    def warp(self, pixels: np.ndarray, outside: int = 0) -> np.ndarray:
        """(h, w) or (h, w, 3) uint8 to (800, 400) or (800, 400, 3); nothing is interpolated."""
        cells = bev_cells(self.calibration, pixels.shape[:2])
        flat = pixels.reshape(-1, *pixels.shape[2:])
        beyond = (cells < 0).reshape(*cells.shape, *[1] * (pixels.ndim - 2))
        return np.where(beyond, np.uint8(outside), flat[cells])


@functools.lru_cache(maxsize=512)
def read_calibration(path: Path) -> np.ndarray:
    """The projection of ground points (x, y, z, 1) in metres to the image, float64 (3, 4).

    P2 R0_rect Tr_cam_to_road^-1. Raises UserError where one is missing or damaged.
    """
    shapes = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_cam_to_road": (3, 4)}
    matrices = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, numbers = line.partition(":")
            if name in shapes:
                rows, columns = shapes[name]
                matrices[name] = np.eye(4)
                values = np.array(numbers.split(), float).reshape(rows, columns)
                matrices[name][:rows, :columns] = values
        missing = [name for name in shapes if name not in matrices]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}")
        to_camera = np.linalg.inv(matrices["Tr_cam_to_road"])
        projection = (matrices["P2"] @ matrices["R0_rect"] @ to_camera)[:3]
        if not np.isfinite(projection).all() or np.linalg.matrix_rank(projection) < 3:
            raise ValueError("projects nothing")
    except (OSError, ValueError, np.linalg.LinAlgError) as error:
        raise UserError(
            path, f"not a KITTI calibration ({reason_of(error)})", "replace it or move it away"
        ) from None
    return projection


@functools.lru_cache(maxsize=32)  # 1.3 MB each
def bev_cells(calibration: Path, size: tuple[int, int]) -> np.ndarray:
    """The flat index of the pixel that each cell of the ground shows, -1 outside.

    `size`: the image's (h, w). Returns int32 (800, 400); row 0 is 46 m ahead, column 0 is 10 m to
    the left. Image coordinates (u, v) count from 1 and are rounded down to a pixel; a cell is
    inside the image where 1 <= u <= width and 1 <= v <= height.
    """
    a = read_calibration(calibration)
    x = BEV_CELL * (np.arange(BEV_SIZE[1]) + 0.5) - 10
    z = 46 - BEV_CELL * (np.arange(BEV_SIZE[0]) + 0.5)[:, None]
    u, v, depth = (a[i, 0] * x + a[i, 2] * z + a[i, 3] for i in range(3))  # the ground: y = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = u / depth, v / depth
    height, width = size
    inside = (depth > 0) & (u >= 1) & (u <= width) & (v >= 1) & (v <= height)
    with np.errstate(invalid="ignore"):
        index = (np.floor(v) - 1) * width + np.floor(u) - 1
    return np.where(inside, index, -1).astype(np.int32)


# --------------------------------------------------------------------------------------------------
#  Submission
# --------------------------------------------------------------------------------------------------


class KittiSubmission:
    """submission_kitti.zip for the KITTI Road server: an 8-bit BEV probability map per image.

    Raises UserError where an image has no calibration: the server rejects an incomplete zip.
    """

    def __init__(self, samples: pd.DataFrame, classes: Classes, *_: str) -> None:
        if classes.several:
            raise UserError(
                "--submission kitti",
                f"needs a model of one class, this one has {len(classes.names)}",
                "take --submission rle or png",
            )
        scored = samples[~samples.category.isin(["", "umm_lane", "uu_lane"])]  # only um has a lane
        lacking = [Path(row.image) for row in scored.itertuples() if not row.views]
        if len(lacking) == len(scored):
            raise UserError(
                "--submission kitti",
                "--data is not in the KITTI layout with image_2 and calib next to it",
            )
        if lacking:
            folder = lacking[0].parents[1] / "calib"
            names = first_five(path.name for path in lacking)
            raise UserError(
                "--submission kitti",
                f"{len(lacking)} of {len(scored)} images have no calibration in {folder}: {names}",
                "the server rejects a zip without them: add them, or move the images away",
            )
        self.ids = set(scored.id)
        self.answers: dict[str, bytes] = {}

    def add(self, sample: Any, probabilities: np.ndarray, mask: np.ndarray) -> None:
        """Keep one image's map, some 20 kB of PNG. `probabilities`: (1, h, w) uint8."""
        if sample.id in self.ids:
            name = f"{sample.category}_{sample.id.split('_')[1]}.png"
            warped = sample.views[0].warp(probabilities[0])
            self.answers[name] = encode_image(warped, ".png")

    def write(self, out: Path) -> None:
        """Write the zip whole; the same maps give the same bytes."""
        write_zip(out / "submission_kitti.zip", self.answers)
        print(f"wrote {out / 'submission_kitti.zip'}: {len(self.answers)} maps")
