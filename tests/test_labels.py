"""Annotations from labelling tools, as they export them, and predictions as polygons for them."""

import json
import math
import re

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import TINY, succeed
from PIL import Image

from kit.config import Classes
from kit.data.annotations import decode_counts, decompress, fill
from kit.data.classes import write_mask
from kit.data.names import MARKER
from kit.data.rasters import Window
from kit.data.rle import decode_runs
from kit.data.samples import find_samples
from kit.errors import UserError
from kit.extra import polygons
from kit.network.model import load_model

SIZE = (44, 60)  # h, w of the drawn images
COUNT = 6


def box(x, y, width, height):
    """The corners of a rectangle, and its mask, bool of `SIZE`."""
    mask = np.zeros(SIZE, bool)
    mask[y : y + height, x : x + width] = True
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)], mask


def draw(number):
    """The objects of an image, [(class, corners)], and {class: mask}: two cars, and a road."""
    objects, masks = [], {}
    places = [("car", (2 + number, 3, 9, 7)), ("car", (30, 8 + number, 12, 10))]
    for label, place in [*places, ("road", (5, 15, 50, 20))]:
        corners, mask = box(*place)
        objects.append((label, corners))
        masks[label] = masks.get(label, False) | mask
    return objects, masks


def save_image(path, masks):
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = 40 + 90 * masks["car"] + 60 * masks["road"] if masks else np.full(SIZE, 40)
    Image.fromarray(np.dstack([grey.astype(np.uint8)] * 3)).save(path)


def flat(corners):
    return [float(number) for point in corners for number in point]


def counts_of(mask):
    """COCO's uncompressed RLE."""
    pixels = np.r_[0, mask.T.ravel(), 2]
    edges = np.flatnonzero(np.diff(pixels))
    return np.diff(np.r_[0, edges]).tolist()


def coco(names, labels, first=1):
    """A COCO json of images {file name: [(class, segmentation, iscrowd)]}."""
    categories = [{"id": first + n, "name": name} for n, name in enumerate(names)]
    images, annotations = [], []
    for number, (file, objects) in enumerate(labels.items(), first):
        entry = {"id": number, "file_name": file, "height": SIZE[0], "width": SIZE[1]}
        images.append(entry | {"license": 1, "date_captured": ""})
        for label, shape, crowd in objects:
            keys = {"id": len(annotations), "image_id": number, "iscrowd": crowd, "area": 9}
            keys |= {"category_id": first + names.index(label), "bbox": [0, 0, 9, 9]}
            annotations.append(keys | {"segmentation": shape})
    info = {"description": "Exported"}
    return {"info": info, "categories": categories, "images": images, "annotations": annotations}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------
#  As the tools export
# --------------------------------------------------------------------------------------------------


def roboflow_coco(root):
    """A json in each split, a root category that nothing has, images without objects."""
    for split, numbers in (("train", range(4)), ("valid", [4]), ("test", [5])):
        labels = {}
        for number in numbers:
            objects, masks = draw(number)
            name = f"p{number}_png.rf.0a1b{number}.jpg"
            save_image(root / split / name, masks)
            labels[name] = [(label, [flat(corners)], 0) for label, corners in objects]
        save_image(root / split / f"none_{split}.jpg", {})
        labels[f"none_{split}.jpg"] = []
        content = coco(["scene", "car", "road"], labels, first=0)
        write_json(root / split / "_annotations.coco.json", content)
    (root / "README.roboflow.txt").write_text("scene > 2024-01-01\n7 images\n")


def roboflow_yolo(root, images="{}/images", labels="{}/labels"):
    for split, numbers in (("train", range(4)), ("valid", [4]), ("test", [5])):
        for number in numbers:
            objects, masks = draw(number)
            save_image(root / images.format(split) / f"p{number}.jpg", masks)
            lines = [
                " ".join(map(str, [["car", "road"].index(label), *relative(corners)]))
                for label, corners in objects
            ]
            text = root / labels.format(split) / f"p{number}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("\n".join(lines) + "\n")
        save_image(root / images.format(split) / f"none_{split}.jpg", {})
    (root / labels.format("train") / "none_train.txt").write_text("")
    (root / "README.dataset.txt").write_text("1 scene\n")
    names = "names: ['car', 'road']" if images == "{}/images" else "names:\n  0: car\n  1: road"
    (root / "data.yaml").write_text(f"train: ../train/images\nnc: 2\n{names}\n")


def ultralytics(root):
    roboflow_yolo(root, "images/{}", "labels/{}")


def relative(corners):
    return [
        round(c / side, 6) for point in corners for c, side in zip(point, SIZE[::-1], strict=True)
    ]


def cvat(root):
    """Polygons, and masks as crowds in RLE; compressed as datumaro writes it."""
    labels = {}
    for number in range(COUNT):
        objects, masks = draw(number)
        save_image(root / "images" / "default" / f"p{number}.png", masks)
        (_, first), (_, second), (_, road) = objects
        rle = {"counts": counts_of(masks["road"]), "size": list(SIZE)}
        labels[f"p{number}.png"] = [("car", [flat(first), flat(second)], 0), ("road", rle, 1)]
    write_json(root / "annotations" / "instances_default.json", coco(["car", "road"], labels))


def label_studio(root):
    labels = {}
    for number in range(COUNT):
        objects, masks = draw(number)
        save_image(root / "images" / f"1f2e-p{number}.png", masks)
        shapes = [(label, [flat(corners)], 0) for label, corners in objects]
        labels[f"images\\1f2e-p{number}.png"] = shapes
    write_json(root / "result.json", coco(["car", "road"], labels, first=0))


def labelme(root):
    for number in range(COUNT):
        objects, masks = draw(number)
        save_image(root / f"p{number}.png", masks)
        shapes = [
            {"label": label, "points": corners, "shape_type": "polygon", "flags": {}}
            for label, corners in objects
        ]
        shapes[0] |= {"shape_type": "rectangle", "points": [objects[0][1][2], objects[0][1][0]]}
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imageData": "iVBORw0KGgo"}
        content |= {"imagePath": f"p{number}.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        write_json(root / f"p{number}.json", content)


TOOLS = {
    "Roboflow COCO": roboflow_coco,
    "Roboflow YOLO": roboflow_yolo,
    "Ultralytics": ultralytics,
    "CVAT": cvat,
    "Label Studio": label_studio,
    "labelme": labelme,
}


def understood(root, training=True, **options):
    """{image's stem: {class: mask}} as the kit reads a folder."""
    collection = find_samples(str(root), training=training, **options)
    masks = {}
    for row in collection.samples.itertuples():
        planes = row.mask.read(SIZE)
        names = collection.classes.names
        masks[row.image.stem] = {
            name: plane == 1 for name, plane in zip(names, planes, strict=True)
        }
    return masks


def number_of(stem):
    return int(re.search(r"p(\d)", stem)[1])


@pytest.mark.parametrize("tool", TOOLS)
def test_exports_are_read_as_they_were_drawn(tmp_path, tool):
    TOOLS[tool](tmp_path)
    found = understood(tmp_path)
    splits = tool.startswith(("Roboflow", "Ultra"))
    assert len(found) == (7 if splits else COUNT)  # without test, with two without objects
    for stem, masks in found.items():
        assert list(masks) == ["car", "road"]
        drawn = {} if "none" in stem else draw(number_of(stem))[1]
        for label, mask in masks.items():
            assert np.array_equal(mask, drawn.get(label, np.zeros(SIZE, bool))), (stem, label)


@pytest.mark.parametrize("tool", ["Roboflow COCO", "Roboflow YOLO", "Ultralytics"])
def test_the_given_split_validates_and_test_images_are_predicted(tmp_path, capsys, tool):
    TOOLS[tool](tmp_path)
    samples = find_samples(str(tmp_path), training=True).samples
    assert set(samples.image[samples.fold == 0].map(lambda p: p.stem[:2])) == {"p4", "no"}
    found = understood(tmp_path, training=False)
    assert {stem[:2] for stem in found} == {"p5", "no"}
    assert "split: as given, 2 images in val validate" in capsys.readouterr().out


def test_classes_are_chosen_and_ordered(tmp_path):
    cvat(tmp_path)
    assert list(understood(tmp_path, classes="road,car")["p0"]) == ["road", "car"]
    (united,) = understood(tmp_path, classes="one")["p0"].values()
    drawn = draw(0)[1]
    assert np.array_equal(united, drawn["car"] | drawn["road"])
    with pytest.raises(UserError, match="there is no class lorry"):
        understood(tmp_path, classes="road,lorry")


def test_a_split_is_told_by_the_name_of_a_json_and_of_a_folder(tmp_path):
    """As COCO itself; the names of the images repeat."""
    for split, count in (("train", 3), ("val", 2)):
        labels = {}
        for number in range(count):
            objects, masks = draw(number + 3 * (split == "val"))
            save_image(tmp_path / f"{split}2017" / f"{number:06d}.jpg", masks)
            shapes = [(label, [flat(corners)], 0) for label, corners in objects]
            labels[f"{number:06d}.jpg"] = shapes
        write_json(
            tmp_path / f"annotations/instances_{split}2017.json", coco(["car", "road"], labels)
        )
    write_json(tmp_path / "annotations/captions_train2017.json", {"images": [], "annotations": []})
    samples = find_samples(str(tmp_path), training=True).samples
    assert len(samples) == 5
    for row in samples.itertuples():
        number = int(row.image.stem) + 3 * ("val" in str(row.image.parent))
        assert np.array_equal(row.mask.read(SIZE)[0], draw(number)[1]["car"])
    keypoints = tmp_path / "annotations/person_keypoints_val2017.json"
    keypoints.write_text((tmp_path / "annotations/instances_val2017.json").read_text())
    assert "has annotations of 000000.jpg, and so has" in asked(tmp_path, "--masks")
    files = [f"annotations/instances_{split}2017.json" for split in ("train", "val")]
    assert len(find_samples(str(tmp_path), training=True, masks=",".join(files)).samples) == 5
    assert "gone.json not found" in asked(tmp_path, "name a json", masks="gone.json")


def test_masks_next_to_annotations_are_taken_first_and_json_on_request(tmp_path):
    label_studio(tmp_path)
    for number in range(COUNT):
        pixels = draw(number)[1]["car"].astype(np.uint8) * 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"masks/1f2e-p{number}.png")
    assert list(understood(tmp_path)["1f2e-p0"]) == ["foreground"]
    assert list(understood(tmp_path, masks="result.json")["1f2e-p0"]) == ["car", "road"]
    assert list(understood(tmp_path / "images", masks="result.json")["1f2e-p0"]) == ["car", "road"]


# --------------------------------------------------------------------------------------------------
#  Shapes
# --------------------------------------------------------------------------------------------------


def filled(points, size=SIZE):
    runs = fill(np.array(points, float), size)
    return decode_runs(runs, Window(0, 0, *size, size), "columns from 0") == 1


def test_a_pixel_is_of_a_polygon_where_its_centre_is():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for corners in range(3, 40):  # they cross themselves, and leave the image
        points = rng.uniform(-5, 65, (corners, 2))
        inside = np.zeros(SIZE, bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            crosses = (x0 <= x) != (x1 <= x)
            inside ^= crosses & (y >= y0 + (x - x0) / (x1 - x0) * (y1 - y0))
        assert np.array_equal(filled(points), inside)
    assert not filled([(3, 3), (9, 9)]).any()
    assert filled([(0, 0), (60, 0), (60, 44), (0, 44)]).all()


RING = (  # pycocotools 2.0 on 6 < r < 17 around (20, 31)
    "Se0;o04L4M2M4N0O2N2O0O2O@D0;NK04ON02O00000000000O20N1000000000001N021L052E0<`01N"
    "101N2N102L3N3L4LS`0"
)


def test_compressed_rle_is_that_of_pycocotools():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    radius = np.hypot(y - 20, x - 31)
    ring = (radius < 17) & (radius > 6)
    assert decompress(RING).tolist() == counts_of(ring)
    runs = decode_counts(RING, list(SIZE), SIZE, "")
    assert np.array_equal(decode_runs(runs, Window(0, 0, *SIZE, SIZE), "columns from 0"), ring)


def one_label(root, shapes, names=("car", "road"), label="car"):
    """Two images with these COCO shapes of one class, and a small road."""
    road = ("road", [flat(box(50, 0, 3, 3)[0])], 0)
    labels = {f"p{n}.png": [*((label, shape, 0) for shape in shapes), road] for n in range(2)}
    for name in labels:
        save_image(root / name, {})
    write_json(root / "a.json", coco(list(names), labels))
    return labels


def test_holes_parts_and_overlapping_objects(tmp_path):
    outer, inner = box(4, 4, 20, 20)[0], box(10, 10, 6, 6)[0]
    slit = [*outer, outer[0], *inner, inner[0]]  # as YOLO's converters join them
    ring = box(4, 4, 20, 20)[1] & ~box(10, 10, 6, 6)[1]
    parts = [flat(box(30, 5, 5, 5)[0]), flat(box(33, 8, 9, 9)[0])]  # they overlap: united
    rle = {"counts": counts_of(ring), "size": list(SIZE)}
    right = box(30, 5, 5, 5)[1] | box(33, 8, 9, 9)[1]
    for shapes, mask in (
        ([[flat(slit)]], ring),
        ([rle], ring),
        ([parts], right),
        ([[part] for part in parts], right),
        ([rle, [flat(box(12, 12, 2, 2)[0])]], ring | box(12, 12, 2, 2)[1]),
    ):
        one_label(tmp_path, shapes)
        assert np.array_equal(understood(tmp_path)["p0"]["car"], mask)


def test_rows_are_objects_and_an_object_without_a_pixel_is_said(tmp_path, capsys):
    one_label(tmp_path, [[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], [flat(box(1, 1, 9, 9)[0])]])
    collection = find_samples(str(tmp_path), training=True, rle="rows")
    assert collection.instances and collection.rle == "rows"
    assert [len(part.rows) for part in collection.samples["mask"][0].parts] == [2, 1]
    printed = capsys.readouterr().out
    assert "COCO: 6 objects in 2 images, 0 of them empty; 2 objects cover the centre" in printed
    assert "RLE rows" not in printed


def test_a_circle_of_labelme(tmp_path):
    labelme(tmp_path)
    content = json.loads((tmp_path / "p0.json").read_text())
    circle = {"label": "sun", "points": [[20, 20], [20, 30]], "shape_type": "circle"}
    write_json(tmp_path / "p0.json", content | {"shapes": [*content["shapes"], circle]})
    masks = understood(tmp_path)
    assert list(masks["p0"]) == ["car", "road", "sun"]
    assert abs(masks["p0"]["sun"].sum() / (math.pi * 100) - 1) < 0.03
    assert not masks["p1"]["sun"].any()


def test_images_without_annotations(tmp_path):
    """Listed they are empty; not listed they have none."""
    label_studio(tmp_path)
    save_image(tmp_path / "images/other.png", {})
    line = asked(tmp_path, "1 of 7 images have no mask")
    assert "--missing leave_out" in line and "--missing empty" in line
    assert len(understood(tmp_path, missing="leave_out")) == COUNT
    assert not any(mask.any() for mask in understood(tmp_path, missing="empty")["other"].values())


def test_a_yolo_image_without_a_file_is_empty_and_named(tmp_path, capsys):
    roboflow_yolo(tmp_path)
    (tmp_path / "train/labels/p2.txt").unlink()
    assert not any(mask.any() for mask in understood(tmp_path)["p2"].values())
    assert "2 images have no text file: p2.jpg, none_valid.jpg; read as" in capsys.readouterr().out


def test_yolo_without_a_yaml_has_names_of_classes_txt_or_numbers(tmp_path):
    ultralytics(tmp_path)
    (tmp_path / "data.yaml").unlink()
    assert list(understood(tmp_path)["p0"]) == ["0", "1"]
    (tmp_path / "classes.txt").write_text("car\nroad\n")  # of Label Studio
    assert list(understood(tmp_path)["p0"]) == ["car", "road"]


# --------------------------------------------------------------------------------------------------
#  Refusals
# --------------------------------------------------------------------------------------------------


def asked(root, *words, training=True, **options):
    """The message of the one-line error."""
    with pytest.raises(UserError) as error:
        find_samples(str(root), training=training, **options)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    for word in words:
        assert word in line
    return line


def change_coco(root, change):
    label_studio(root)
    content = json.loads((root / "result.json").read_text())
    change(content)
    write_json(root / "result.json", content)


def change_yolo(root, text):
    roboflow_yolo(root)
    for name in ("train/labels/p1.txt", "test/labels/p5.txt"):
        (root / name).write_text(text)


def first(content):
    return content["annotations"][0]


BROKEN = {
    "an image is not there": (
        lambda root: (label_studio(root), (root / "images/1f2e-p3.png").unlink()),
        ("result.json", "1 of 6 images with annotations are not there: 1f2e-p3.png", "add them"),
    ),
    "an image is not there, but one of its name in the test": (
        lambda root: (
            roboflow_coco(root),
            (root / "train/p1_png.rf.0a1b1.jpg").rename(root / "test/p1_png.rf.0a1b1.jpg"),
        ),
        ("images with annotations are not there: p1_png.rf.0a1b1.jpg", "add them"),
    ),
    "an unknown image id": (
        lambda root: change_coco(root, lambda c: first(c).update(image_id=77)),
        ("result.json", "annotation 0 has image_id 77, which is not in the file", "export it"),
    ),
    "an unknown category": (
        lambda root: change_coco(root, lambda c: first(c).update(category_id=9)),
        ("annotation 0 has category_id 9", "take the annotation out"),
    ),
    "a box": (
        lambda root: change_coco(root, lambda c: first(c).update(segmentation=[])),
        ("annotation 0 is a box", "export polygons or masks"),
    ),
    "a point outside": (
        lambda root: change_coco(
            root, lambda c: first(c).update(segmentation=[[1, 1, 90, 1, 9, 9]])
        ),
        ("result.json object 0", "the point 90,1 is outside of the image, 60x44", "fix the point"),
    ),
    "a point that is no number": (
        lambda root: change_coco(
            root, lambda c: first(c).update(segmentation=[[1, 1, math.nan, 1, 9, 9]])
        ),
        ("result.json object 0", "outside of the image"),
    ),
    "an odd count": (
        lambda root: change_coco(root, lambda c: first(c).update(segmentation=[[1, 1, 9, 1, 9]])),
        ("result.json", "cannot be read as annotations", "export it again"),
    ),
    "another size": (
        lambda root: change_coco(root, lambda c: c["images"][2].update(height=88, width=120)),
        ("1f2e-p2.png is 120x88 there, but the image is 60x44", "take the images"),
    ),
    "RLE of another size": (
        lambda root: change_coco(
            root, lambda c: first(c).update(segmentation={"counts": [9, 7], "size": [4, 4]})
        ),
        ("its RLE is damaged, or not of an image of 60x44", "export it again"),
    ),
    "damaged RLE": (
        lambda root: change_coco(
            root, lambda c: first(c).update(segmentation={"counts": "", "size": list(SIZE)})
        ),
        ("its RLE is damaged", "export it again"),
    ),
    "half a json": (
        lambda root: (
            label_studio(root),
            (root / "result.json").write_text((root / "result.json").read_text()[:-90]),
        ),
        ("result.json", "cannot be read as annotations (JSONDecodeError", "export it again"),
    ),
    "no category id": (
        lambda root: change_coco(root, lambda c: first(c).pop("category_id")),
        ("result.json", "cannot be read as annotations (KeyError: 'category_id')"),
    ),
    "YOLO boxes": (
        lambda root: change_yolo(root, "0 0.5 0.5 0.2 0.2\n"),
        ("labels/p", "line 1 is a box (5 numbers), not a polygon", "export polygons"),
    ),
    "a YOLO line cut short": (
        lambda root: change_yolo(root, "0 0.1 0.1 0.2 0.1 0.2\n"),
        ("labels/p", "line 1 has 5 numbers for x and y", "export it again"),
    ),
    "YOLO text": (
        lambda root: change_yolo(root, "0 0.1 .1 2e-1 0.1 0.2 0.2\n0 0.1 0.1 0.2.1 1 2 2\n"),
        ("labels/p", "line 2 is no number of a class and numbers"),
    ),
    "YOLO text at the start": (
        lambda root: change_yolo(root, "car 1 1 2 2\n"),
        ("labels/p", "line 1 is no number of a class and numbers"),
    ),
    "YOLO in pixels": (
        lambda root: change_yolo(root, "0 10 10 20 10 20 20\n"),
        ("labels/p1.txt object 1", "outside of the image"),
    ),
    "a YOLO class without a name": (
        lambda root: change_yolo(root, "7 0.1 0.1 0.2 0.1 0.2 0.2\n"),
        ("labels/p", "line 1 is of class 7", "names in data.yaml"),
    ),
    "half a yaml": (
        lambda root: (roboflow_yolo(root), (root / "data.yaml").write_text("names: [a, 'b")),
        ("data.yaml", "cannot be read", "fix it"),
    ),
    "a YOLO file without an image": (
        lambda root: (roboflow_yolo(root), (root / "train/images/p1.jpg").unlink()),
        ("p1.txt", "1 of 7 images with annotations are not there: p1.txt", "add them"),
    ),
    "a line of labelme": (
        lambda root: (
            labelme(root),
            write_json(
                root / "p2.json",
                {"shapes": [{"label": "a", "points": [[1, 1], [5, 5]], "shape_type": "line"}]},
            ),
        ),
        ("p2.json", "shape 1 (a) is a line of 2 points", "draw it as a polygon"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_annotations_are_named_with_the_remedy(tmp_path, capsys, kind):
    build, words = BROKEN[kind]
    build(tmp_path)
    asked(tmp_path, *words)
    samples = find_samples(str(tmp_path), training=False).samples  # nobody named them
    assert len(samples) and samples["mask"].isna().all()
    assert "no scores: " in capsys.readouterr().out


def test_predictions_below_the_data_are_no_annotations(tmp_path):
    label_studio(tmp_path)
    (tmp_path / "p/masks").mkdir(parents=True)
    (tmp_path / "p/masks" / MARKER).touch()
    (tmp_path / "p/polygons.json").write_text((tmp_path / "result.json").read_text())
    assert len(understood(tmp_path)) == COUNT
    assert len(understood(tmp_path, masks="p/polygons.json")) == COUNT


def test_other_json_and_text_files_are_left_alone(tmp_path):
    for number in range(2):
        save_image(tmp_path / f"images/{number}.png", {})
        (tmp_path / f"images/{number}.txt").write_text("A photograph of 3 cars.\n")
    (tmp_path / "meta.json").write_text('{"images": [1, 2], "annotations": []}')
    (tmp_path / "list.json").write_text('["images"]')
    asked(tmp_path, "2 of 2 images have no mask")
    assert len(find_samples(str(tmp_path), training=False).samples) == 2


# --------------------------------------------------------------------------------------------------
#  Predictions as polygons
# --------------------------------------------------------------------------------------------------


def shapes():
    """Masks, thin, small, with holes and pixels that meet in a corner."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :50]
    radius = np.hypot(y - 18, x - 22)
    yield "empty", np.zeros((9, 7), bool)
    yield "full", np.ones((9, 7), bool)
    yield "a pixel", np.pad([[True]], 3)
    yield "a pixel in the corner", np.pad([[True]], ((0, 5), (0, 5)))
    yield "a line of one pixel", np.abs(y - 0.7 * x).round() == 3
    yield "a column", x == 20
    yield "rings", np.sin(radius) > 0.2
    yield "a diagonal", x == y
    yield "a chessboard", (x + y) % 2 == 0
    for share in (0.1, 0.5, 0.9):
        yield f"noise {share}", rng.random((40, 50)) < share


SHAPES = dict(shapes())


@pytest.mark.parametrize("name", SHAPES)
def test_outlines_give_the_mask_again(name):
    mask = SHAPES[name]
    union, cut = np.zeros_like(mask), np.zeros_like(mask)
    for rings in polygons.trace(mask):
        own = np.zeros_like(mask)
        for ring in rings:
            assert len({*map(tuple, ring.tolist())}) == len(ring)  # no point twice
            own ^= filled(ring, mask.shape)
        assert polygons.area_of(rings[0]) > 0 > sum(map(polygons.area_of, rings[1:]), -1)
        assert sum(map(polygons.area_of, rings)) == own.sum() > 0
        assert not (union & own).any()
        assert cv2.connectedComponents(own.astype(np.uint8), connectivity=4)[0] == 2
        union |= own
        cut |= filled(polygons.cut_open(rings), mask.shape)
    assert np.array_equal(union, mask) and np.array_equal(cut, mask)


@pytest.mark.parametrize("background", ["background", "_background_"])
def test_background_has_no_polygons(tmp_path, background):
    classes = Classes((background, "car", "road"), ("0", "1", "2"), True)
    labels = np.zeros(SIZE, np.uint8)
    labels[5:20, 8:30], labels[10:15, 12:20], labels[30:40, 2:9] = 1, 2, 255
    (tmp_path / "masks").mkdir()
    write_mask(tmp_path / "masks", "a", labels, classes)
    samples = pd.DataFrame({"id": ["a"], "image": [tmp_path / "images" / "a.jpg"]})
    polygons.write_polygons("coco", tmp_path, samples, classes)
    content = json.loads((tmp_path / "polygons.json").read_text())
    found = {each["category_id"]: each for each in content["annotations"]}
    assert [each["name"] for each in content["categories"]] == [background, "car", "road"]
    assert {key: each["area"] for key, each in found.items()} == {2: 15 * 22 - 40, 3: 40}
    assert found[2]["bbox"] == [8, 5, 22, 15]
    for key, each in found.items():
        (numbers,) = each["segmentation"]
        assert np.array_equal(filled(np.reshape(numbers, (-1, 2))), labels == key - 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The --out of a training on Roboflow's export, and the export."""
    root = tmp_path_factory.mktemp("model")
    roboflow_coco(root / "data")
    printed = succeed(
        "train.py", "--data", root / "data", "--out", root / "out", *TINY, "--epochs", 1
    )
    assert "data: COCO annotations · 7 pairs" in printed
    assert "2 classes that may overlap: car" in printed
    return root


def test_predictions_come_back_as_annotations(model, tmp_path):
    flags = ("--model", model / "out", "--data", model / "data", "--threshold", 0.5)
    printed = succeed("infer.py", *flags, "--out", tmp_path / "a", "--polygons", "coco")
    assert "2 images, 2 with ground truth" in printed
    assert (tmp_path / "a/metrics.json").exists()
    assert f"wrote {tmp_path / 'a/polygons.json'}: " in printed
    content = json.loads((tmp_path / "a/polygons.json").read_text())
    assert content["annotations"]
    assert [image["file_name"] for image in content["images"]] == [
        "none_test.jpg", "p5_png.rf.0a1b5.jpg",
    ]  # fmt: skip
    classes = load_model(model / "out" / "model.pt", "cpu").config.classes
    path = str(tmp_path / "a/polygons.json")
    again = understood(model / "data" / "test", masks=path, classes=classes)
    for stem, masks in again.items():
        assert masks
        for label, mask in masks.items():
            written = np.asarray(Image.open(tmp_path / "a/masks" / label / f"{stem}.png"))
            assert np.array_equal(mask, written == 255)
    succeed("infer.py", *flags, "--out", tmp_path / "b", "--polygons", "geojson")
    for path in (tmp_path / "a/masks/car").glob("*.png"):
        file = tmp_path / "b/polygons" / f"{path.stem}.geojson"
        union = np.zeros(SIZE, bool)
        for feature in json.loads(file.read_text())["features"]:
            assert feature["properties"]["objectType"] == "annotation"
            assert feature["geometry"]["type"] == "Polygon"
            if feature["properties"]["classification"]["name"] == "car":
                for ring in feature["geometry"]["coordinates"]:
                    assert ring[0] == ring[-1]
                    union ^= filled(ring[:-1])
        assert np.array_equal(union, np.asarray(Image.open(path)) == 255)
