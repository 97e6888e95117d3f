"""Polygons: predicted masks as pre-labels for Label Studio, CVAT (COCO) and QuPath (GeoJSON).

`infer.py --polygons coco|geojson` writes them. An object is a component of a class, of pixels that
share sides. Outlines run along the sides of pixels, so that they give the same mask when they are
read again. COCO's polygons have no holes: they are cut open along a line that has no area, which
CVAT and Label Studio read; Label Studio reads no RLE.
"""

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from kit.config import Classes
from kit.data.classes import class_colours, is_background, mask_folders, palette
from kit.data.readers import in_parallel, open_image
from kit.files import write_file

Rings = list[np.ndarray]  # of an object: its outline, then its holes, (n, 2) int64 of x, y each
Objects = list[tuple[int, Rings]]  # with the number of the class

# --------------------------------------------------------------------------------------------------
#  Masks to outlines
# --------------------------------------------------------------------------------------------------


def trace(mask: np.ndarray) -> list[Rings]:
    """The objects in a mask, bool (h, w). No point of a ring occurs twice in it."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    objects: list[Rings] = [[] for _ in range(count)]
    for ring in find_rings(mask):
        x, y = ring[np.lexsort(ring.T)[0]]  # the left end of the uppermost side
        outer = bool(mask[y, x])
        ring = ring if (area_of(ring) > 0) == outer else ring[::-1]
        rings = objects[labels[y - (not outer), x]]
        rings.insert(0 if outer else len(rings), ring)
    return objects[1:]


def area_of(ring: np.ndarray) -> float:
    """The area in a ring (n, 2), negative where it runs the other way round."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def find_rings(mask: np.ndarray) -> list[np.ndarray]:
    """The closed lines between a mask, bool (h, w), and its background: their corners, in order.

    In a row of corners each two are joined by a side, and in a column. Where two pixels of the mask
    meet in a corner alone, it occurs twice, and each of them has one.
    """
    padded = np.pad(mask, 1)
    before, above, left, here = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    meet = (before == here) & (above == left) & (here != left)
    y, x = np.nonzero(before ^ above ^ left ^ here | meet)
    corner = np.repeat(np.arange(len(y)), 1 + meet[y, x])
    y, x = y[corner], x[corner]
    second = np.r_[False, corner[1:] == corner[:-1]][: len(corner)]
    order = np.lexsort((second ^ (meet & above)[y, x], y, x))
    partner = np.arange(len(order)) ^ 1
    below = np.empty_like(order)
    below[order] = order[partner]
    points, below = list(zip(x.tolist(), y.tolist(), strict=True)), below.tolist()
    rings, seen = [], [False] * len(points)
    for start in range(0, len(points), 2):
        ring, place = [], start
        while not seen[place]:
            seen[place] = seen[place ^ 1] = True
            ring += [points[place], points[place ^ 1]]
            place = below[place ^ 1]
        rings += split_ring(ring)
    return rings


def split_ring(points: list[tuple[int, int]]) -> list[np.ndarray]:
    """A ring as several that have no point twice."""
    rings, ring, places = [], [], {}
    for point in points:
        if point in places:
            start = places[point]
            rings.append(np.array(ring[start:]))
            for other in ring[start + 1 :]:
                del places[other]
            del ring[start + 1 :]
        else:
            places[point] = len(ring)
            ring.append(point)
    return [*rings, np.array(ring)] if ring else rings


def cut_open(rings: Rings) -> np.ndarray:
    """An object as one ring, which goes to each hole and back from the corner next to it."""
    outline, *holes = rings
    for hole in holes:
        nearest = ((outline - hole[0]) ** 2).sum(1).argmin()
        outline = np.concatenate([outline[: nearest + 1], hole, hole[:1], outline[nearest:]])
    return outline


# --------------------------------------------------------------------------------------------------
#  Files
# --------------------------------------------------------------------------------------------------


def write_polygons(form: str, out: Path, samples: pd.DataFrame, classes: Classes) -> None:
    """Write the masks of samples below `out`: polygons.json, or polygons/ID.geojson for each.

    `form`: coco or geojson. Of exclusive classes the background has no polygons.
    """

    def read(sample: Any) -> tuple[tuple[int, int], Objects]:
        size, objects = read_objects(out / "masks", sample.id, classes)
        if form == "geojson":
            content = json.dumps(geojson(objects, classes))
            write_file(out / "polygons" / f"{sample.id}.geojson", content)
        return size, objects

    found = in_parallel(read, samples.itertuples(), "polygons")
    path = out / "polygons"
    if form == "coco":
        path = out / "polygons.json"
        root = os.path.commonpath([image.parent for image in samples.image] or [out])
        names = [image.relative_to(root).as_posix() for image in samples.image]
        write_file(path, json.dumps(coco(names, found, classes)))
    print(f"wrote {path}: {sum(len(objects) for _, objects in found)} polygons")


def read_objects(folder: Path, name: str, classes: Classes) -> tuple[tuple[int, int], Objects]:
    """The size (h, w) of a written mask, see `classes.write_mask`, and its objects."""
    places = mask_folders(classes)
    planes = [np.asarray(open_image(folder / place / f"{name}.png")) for place in places]
    values = palette(classes)[0] if classes.exclusive else [255] * len(planes)
    planes = planes * len(values) if classes.exclusive else planes
    left_out = [classes.exclusive and is_background(label) for label in classes.names]
    objects = [
        (number, rings)
        for number, (plane, value) in enumerate(zip(planes, values, strict=True))
        if not left_out[number]
        for rings in trace(plane == value)
    ]
    return planes[0].shape, objects


def geojson(objects: Objects, classes: Classes) -> dict[str, Any]:
    """A polygon for each object as QuPath reads it, in pixels from the image's corner."""
    colours = class_colours(classes.names).tolist()
    features = []
    for number, rings in objects:
        closed = [[*ring.tolist(), ring[0].tolist()] for ring in rings]
        label = {"name": classes.names[number], "color": colours[number]}
        properties = {"objectType": "annotation", "classification": label}
        geometry = {"type": "Polygon", "coordinates": closed}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def coco(
    names: list[str], found: list[tuple[tuple[int, int], Objects]], classes: Classes
) -> dict[str, Any]:
    """The content of a COCO json: ids count from 1, as the order of images and classes is."""
    images, annotations = [], []
    for image, (name, ((height, width), objects)) in enumerate(zip(names, found, strict=True), 1):
        images.append({"id": image, "file_name": name, "height": height, "width": width})
        for number, rings in objects:
            low, high = rings[0].min(0), rings[0].max(0)
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": number + 1}
            annotation |= {"segmentation": [cut_open(rings).ravel().tolist()], "iscrowd": 0}
            annotation |= {"bbox": [*low.tolist(), *(high - low).tolist()]}
            annotations.append(annotation | {"area": sum(map(area_of, rings))})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes.names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
