"""Folders as people have them: which mask belongs to which image, and what a mask's values mean."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFilter

from kit.config import Classes, ModelConfig
from kit.data import images, photos, readers
from kit.data.classes import write_mask
from kit.data.folds import assign_folds
from kit.data.names import list_files
from kit.data.samples import (
    decode_pairs,
    describe,
    find_samples,
    read_sample,
    scan,
)
from kit.errors import UserError
from kit.results.visualize import comparison

COUNT = 8


def pair(index, size=(44, 60)):
    """An image (h, w, 3) uint8 of one bright ellipse, and its mask, bool (h, w)."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[: size[0], : size[1]]
    centre = rng.uniform(0.4, 0.6, 2) * size
    mask = ((y - centre[0]) / (0.25 * size[0])) ** 2 + ((x - centre[1]) / (0.2 * size[1])) ** 2 < 1
    return np.dstack([np.uint8(60 + 120 * mask)] * 3), mask


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def grey(mask, value=255):
    return (mask * value).astype(np.uint8)


def write(root, image="images/p{:02d}.png", mask="masks/p{:02d}.png", convert=grey, numbers=()):
    """Pairs whose names hold their number. `mask`: a pattern, or several of the same mask."""
    for number in numbers or range(COUNT):
        pixels, foreground = pair(number)
        save(root / image.format(number), pixels)
        for pattern in [mask] if isinstance(mask, str) else mask:
            save(root / pattern.format(number), convert(foreground))
    return root


def read(root, training=True, **options):
    """The samples; each mask must be the ellipse of the number in its image's name."""
    samples = find_samples(str(root), training=training, **options).samples
    for row in samples.itertuples():
        number = int(re.findall(r"\d+", row.image.relative_to(root).as_posix())[-1])
        assert np.array_equal(row.mask.read((44, 60)) == 1, [pair(number)[1]]), row.image
    assert samples.id.is_unique
    return samples


def asked(root, *words, training=True, **options):
    """The one line of the refusal, which holds the words."""
    with pytest.raises(UserError) as error:
        find_samples(str(root), training=training, **options)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


# --------------------------------------------------------------------------------------------------
#  Values
# --------------------------------------------------------------------------------------------------


def palette(index, colours):
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette(np.ravel(colours).tolist())
    return image


def blurred(mask):
    return np.asarray(Image.fromarray(grey(mask)).filter(ImageFilter.GaussianBlur(1)))


VALUES = {
    "0 and 1": grey,
    "0 and 255": lambda mask: grey(mask, 1),
    "65535": lambda mask: mask.astype(np.uint16) * 65535,
    "255 in 16 bits": lambda mask: mask.astype(np.uint16) * 255,
    "bool": lambda mask: mask,
    "white is the first colour": lambda mask: palette(~mask, [(255, 255, 255), (0, 0, 0)]),
    "a coloured palette": lambda mask: palette(mask, [(0, 0, 0), (128, 0, 0)]),
    "black is the second colour": lambda mask: palette(~mask, [(128, 0, 0), (0, 0, 0)]),
    "alpha": lambda mask: np.dstack([np.zeros((*mask.shape, 3), np.uint8), grey(mask)]),
    "alpha of one colour": lambda mask: np.dstack(
        [np.full((44, 60, 3), (9, 5, 1), np.uint8), grey(mask)]
    ),
    "grey and alpha": lambda mask: np.dstack([grey(mask), np.full(mask.shape, 255, np.uint8)]),
    "three equal channels": lambda mask: np.dstack([grey(mask)] * 3),
}


@pytest.mark.parametrize("kind", VALUES)
def test_usual_values(tmp_path, kind):
    read(write(tmp_path, convert=VALUES[kind]))


def test_a_full_mask_with_a_palette_of_its_own_is_not_empty(tmp_path):
    """Its only colour has the index 0, which is black in the other files."""
    write(tmp_path, convert=VALUES["a coloured palette"])
    full = palette(np.zeros((44, 60)), [(128, 0, 0)])
    save(tmp_path / "masks" / "p03.png", full)
    found = find_samples(str(tmp_path), training=True)
    assert (found.samples["mask"][3].read((44, 60)) == 1).all()
    assert np.array_equal(found.samples["mask"][2].read((44, 60)) == 1, [pair(2)[1]])


def test_two_colours_in_any_order_of_the_palette_are_foreground_and_black(tmp_path):
    write(tmp_path, convert=VALUES["a coloured palette"])
    save(tmp_path / "masks" / "p03.png", VALUES["black is the second colour"](pair(3)[1]))
    read(tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_any_type(tmp_path, dtype):
    for full in (dtype(1), dtype(255)):
        root = write(tmp_path / str(full), mask="masks/p{:02d}.tif", convert=full.__mul__)
        read(root)


def test_jpeg_and_soft_levels_are_cut_at_half_and_it_is_said(tmp_path, capsys):
    read(write(tmp_path / "a", mask="masks/p{:02d}.jpg"))
    assert "two peaks" in capsys.readouterr().out
    write(tmp_path / "b", mask="masks/p{:02d}.tif", convert=lambda m: np.float32(0.01 + 0.98 * m))
    read(tmp_path / "b")
    assert "foreground is above 0.5" in capsys.readouterr().out
    root = write(tmp_path / "c", convert=blurred)
    samples = find_samples(str(root), training=True).samples
    [mask] = samples["mask"][3].read((44, 60))
    assert (mask == (np.asarray(Image.open(root / "masks/p03.png")) > 127)).all()
    assert "foreground is above 127.5" in capsys.readouterr().out


def test_255_is_ignored_in_every_file_where_one_file_has_a_1(tmp_path):
    for number in range(4):
        pixels, mask = pair(number)
        values = grey(mask, number % 2)
        values[:4] = 255
        save(tmp_path / f"images/{number}.png", pixels)
        save(tmp_path / f"masks/{number}.png", values)
    masks = find_samples(str(tmp_path), training=True).samples["mask"]
    assert [sorted(set(mask.read((44, 60)).flat)) for mask in masks] == 2 * [[0, 255], [0, 1, 255]]


def labels(*values):
    """A converter: the first value in the ellipse, the others in rows at the top."""

    def convert(mask):
        pixels = grey(mask, values[0])
        for row, value in enumerate(values[1:]):
            pixels[row, :10] = value
        return pixels

    return convert


def half(mask):
    """Its left half."""
    return mask & (np.arange(mask.shape[1]) < 30)


LABEL_MAPS = {
    "classes and ignored": labels(15, 7, 255),
    "trainIds": labels(*range(1, 19), 255),
    "scaled classes": labels(*range(25, 251, 25)),
    "instances": labels(*range(1, 31), *range(200, 210)),
    "colours": lambda mask: np.dstack([grey(mask), grey(mask, 0), labels(128, 7)(mask)]),
    "VOC": lambda mask: palette(labels(15, 20)(mask), [(i, i % 9, 40) for i in range(256)]),
}


TWO_VALUES = {
    "a class": labels(15),
    "grey": labels(120),
    "nearly white": labels(225),
    "16 bits": lambda mask: mask.astype(np.uint16) * 1000,
    "a colour": lambda mask: np.dstack([grey(mask), grey(mask, 0), grey(mask, 128)]),
    "VOC": lambda mask: palette(grey(mask, 15), [(i, i % 9, 40) for i in range(256)]),
}


@pytest.mark.parametrize("kind", TWO_VALUES)
def test_two_values_are_one_class(tmp_path, kind):
    write(tmp_path, convert=TWO_VALUES[kind])
    read(tmp_path)


def test_files_of_1_and_files_of_255_are_read_by_their_own_scale(tmp_path):
    write(tmp_path, numbers=range(4), convert=labels(1))
    write(tmp_path, numbers=range(4, 8), convert=labels(255))
    read(tmp_path)


@pytest.mark.parametrize("number", [-1, -9999, np.nan, np.inf])
def test_no_data_is_ignored(tmp_path, number, capsys):
    def convert(mask):
        values = mask.astype(np.float32 if not number < 0 else np.int32)
        values[:5] = number
        return Image.fromarray(values)

    write(tmp_path, mask="masks/p{:02d}.tif", convert=convert)
    mask = find_samples(str(tmp_path), training=True).samples["mask"][0].read((44, 60))[0]
    assert (mask[:5] == 255).all()
    assert (mask[5:] == pair(0)[1][5:]).all()
    assert f"{number if number < 0 else -9999} is ignored" in capsys.readouterr().out


def test_values_can_be_ignored_by_the_flag(tmp_path):
    write(tmp_path, convert=labels(128, 255))
    mask = find_samples(str(tmp_path), training=True, ignore="128").samples["mask"][0]
    assert set(np.unique(mask.read((44, 60)))) == {0, 1, 255}
    with pytest.raises(UserError, match="--ignore 7: no mask has this value"):
        find_samples(str(tmp_path), training=True, ignore="7")


def test_masks_that_look_inverted_name_the_flag_that_inverts_them(tmp_path, capsys):
    write(tmp_path, convert=lambda mask: grey(~mask))
    find_samples(str(tmp_path), training=True)
    flag = re.search(r"look inverted: --foreground (\S+)", capsys.readouterr().out)
    read(tmp_path, foreground=flag[1])


def numbered(mask, first):
    """Four pieces of a mask, each with a number of its own."""
    values = np.zeros(mask.shape, np.uint16)
    for index, (rows, columns) in enumerate(np.ndindex(2, 2)):
        place = np.s_[rows * 22 + 1 : rows * 22 + 22, columns * 30 + 1 : columns * 30 + 30]
        values[place] = mask[place] * (first + index)
    values[mask & (values == 0)] = first + 4
    return values


def test_numbers_of_objects_are_no_classes(tmp_path, capsys):
    """Each number is one piece; from 1 in each mask, or different ones in each."""
    for folder, firsts in (("from one", [1] * COUNT), ("many", range(1, 8 * COUNT, 8))):
        for number, first in enumerate(firsts):
            image, mask = pair(number)
            objects = numbered(mask, first)
            if number % 2 and first == 1:
                objects[objects == 5] = 0
                mask = objects > 0
            save(tmp_path / folder / "images" / f"p{number:02d}.png", image)
            save(tmp_path / folder / "masks" / f"p{number:02d}.png", objects)
        found = find_samples(str(tmp_path / folder), training=True)
        assert not found.classes.several
        assert "objects: foreground is above 0" in capsys.readouterr().out


def test_numbers_in_red_alone_are_asked_about(tmp_path):
    def red(mask):
        return np.dstack([labels(1, 2, 3)(mask), grey(mask, 0), grey(mask, 0)])

    write(tmp_path, convert=red)
    asked(tmp_path, "objects, or classes?", "--classes one")
    found = find_samples(str(tmp_path), training=True, classes="one")
    assert not found.classes.several
    (tmp_path / "list.csv").write_text("name,r,g,b\nback,0,0,0\na,1,0,0\nb,2,0,0\nc,3,0,0\n")
    assert find_samples(str(tmp_path), training=True, classes="list.csv").classes.several


def test_soft_levels_between_three_name_a_range_that_works(tmp_path):
    def soft(mask):
        return Image.fromarray(grey(mask, 128) + grey(half(mask), 127)).filter(
            ImageFilter.GaussianBlur(1)
        )

    write(tmp_path, convert=soft)
    line = asked(tmp_path, "label map")
    remedy = re.search(r"--foreground ([\d.-]+)", line)[1]
    mask = find_samples(str(tmp_path), training=True, foreground=remedy).samples["mask"][0]
    assert (mask.read((44, 60))[0] == pair(0)[1]).mean() > 0.97


def test_jpeg_masks_of_colours_are_called_so(tmp_path):
    def colours(mask):
        return np.dstack([grey(mask), grey(half(mask)), grey(mask, 30)])

    write(tmp_path, mask="masks/p{:02d}.jpg", convert=colours)
    asked(tmp_path, "JPEG masks of colours", "save PNG files")


@pytest.mark.parametrize("kind", LABEL_MAPS)
def test_a_label_map_is_never_thresholded(tmp_path, kind):
    write(tmp_path, convert=LABEL_MAPS[kind])
    classes = find_samples(str(tmp_path), training=True).classes
    assert classes.exclusive
    one = {"training": False, "classes": Classes()}  # as for a model of one class
    line = asked(tmp_path, "label map", "pixels, 8 images", "--foreground", **one)
    example = re.search(r"--foreground ([^\s,]+)", line)[1]
    assert example in classes.values
    if kind != "instances":  # there it is any of many
        read(tmp_path, foreground=example)
    asked(tmp_path, "--foreground 77", "no mask has this value", foreground="77")


@pytest.mark.parametrize("levels", [(128, 255), (85, 170, 255), range(15, 256, 15)])
def test_255_next_to_grey_levels_is_asked_about(tmp_path, levels):
    """Two structures, or an edge of few levels: never classes with 255 ignored."""
    write(tmp_path, convert=labels(*levels))
    line = asked(tmp_path, "is 255 a class, or ignored?", "--classes FILE")
    remedy = re.search(r"--foreground (\S+)", line)[1]
    mask = find_samples(str(tmp_path), training=True, foreground=remedy).samples["mask"][0]
    assert set(np.unique(mask.read((44, 60)))) == {0, 1}


def masks_of(root, **options):
    """The masks as they are read, of one class."""
    found = find_samples(str(root), training=True, **options)
    assert found.classes == Classes()
    return [mask.read((44, 60))[0] for mask in found.samples["mask"]]


def test_no_data_is_ignored_in_label_maps(tmp_path, capsys):
    def convert(mask):
        pixels = labels(7, 5)(mask).astype(np.int32)
        pixels[4:6] = -1
        return pixels

    write(tmp_path, mask="masks/p{:02d}.tif", convert=convert)
    found = find_samples(str(tmp_path), training=True)
    assert found.classes.values == ("0", "5", "7")
    assert (found.samples["mask"][0].read((44, 60))[4:6] == 255).all()
    assert "-1 is ignored" in capsys.readouterr().out


def test_ignore_names_values(tmp_path):
    write(tmp_path, convert=labels(1, 3, 200, 201))
    for ignore, ignored in (("3,200-201", 3), ("3,200,201", 3), ("3-255", 3)):
        for mask in masks_of(tmp_path, ignore=ignore):
            assert (mask[:ignored, :10] == 255).all()
            assert set(np.unique(mask)) == {0, 1, 255}
    asked(tmp_path, "--ignore 77", "no mask has this value", ignore="77")
    assert find_samples(str(tmp_path), ignore="3,77", foreground="1").samples["mask"].notna().all()
    found = find_samples(str(tmp_path), training=True, ignore="0")
    assert found.classes.values == ("1", "3", "200", "201")
    (tmp_path / "classes.csv").write_text("id,name\n0,no data\n1,road\n3,car\n")
    found = find_samples(str(tmp_path), training=True, ignore="0")
    assert found.classes.names == ("road", "car")
    assert (found.samples["mask"][0].read((44, 60))[10, 0]) == 255


@pytest.mark.parametrize("kind", ["0 and 255", "jpg", "soft"])
def test_inverted_masks_are_said_and_the_flag_inverts_them(tmp_path, capsys, kind):
    convert = {"soft": lambda mask: 255 - blurred(mask)}.get(kind, lambda mask: grey(~mask))
    suffix = "jpg" if kind == "jpg" else "png"
    write(tmp_path, mask=f"masks/p{{:02d}}.{suffix}", convert=convert)
    wrong = masks_of(tmp_path)
    flag = re.search(r"look inverted: --foreground (\S+)", capsys.readouterr().out)[1]
    for mask, before in zip(masks_of(tmp_path, foreground=flag), wrong, strict=True):
        assert (mask == 1 - before).all()
    assert "inverted" not in capsys.readouterr().out


def blobs(mask, values):
    """Squares of these values."""
    pixels = np.zeros(mask.shape, np.uint16 if max(values) > 255 else np.uint8)
    for place, value in enumerate(values):
        y, x = divmod(place, 7)
        pixels[8 * y + 1 : 8 * y + 6, 8 * x + 1 : 8 * x + 6] = value
    return pixels


OBJECTS = {
    "1 to n": lambda number: range(1, 4 + 3 * number),
    "ids of the data set": lambda number: range(1 + 20 * number, 21 + 20 * number),
    "over 255": lambda number: range(1 + 90 * number, 21 + 90 * number),
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("model", [False, True])
def test_numbered_objects_are_one_class_and_it_is_said(tmp_path, capsys, kind, model):
    for number in range(11):
        save(tmp_path / f"images/{number}.png", pair(number)[0])
        values = blobs(pair(number)[1], OBJECTS[kind](number))
        save(tmp_path / f"masks/{number}.png", values)
    options = {"classes": Classes()} if model else {}
    found = find_samples(str(tmp_path), training=not model, **options)
    assert found.classes == Classes()
    for number, mask in enumerate(found.samples["mask"]):
        values = np.asarray(Image.open(tmp_path / f"masks/{number}.png"))
        path = {Path(p).stem: p for p in found.samples.image}
        assert mask.path.stem in path
        assert (mask.read((44, 60))[0] == (np.asarray(Image.open(mask.path)) > 0)).all()
        assert values.max() > 1
    assert "objects: foreground is above 0; if they are classes, list them: --classes FILE" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("colours", [False, True])
def test_few_objects_or_classes_are_asked_about_and_both_flags_work(tmp_path, colours):
    def convert(mask):
        pixels = blobs(mask, (1, 2, 3))
        return np.dstack([pixels, 0 * pixels, 0 * pixels]) if colours else pixels

    write(tmp_path, convert=convert)
    asked(tmp_path, "numbered objects, or classes?", "--classes one", "--classes FILE")
    expected = blobs(pair(0)[1], (1, 2, 3))
    assert (masks_of(tmp_path, classes="one")[0] == (expected > 0)).all()
    rows = ["name,r,g,b", *(f"c{k},{k},0,0" for k in range(4))]
    rows = rows if colours else ["id,name", *(f"{k},c{k}" for k in range(4))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    found = find_samples(str(tmp_path), training=True, classes=str(tmp_path / "list.csv"))
    assert found.classes.names == ("c0", "c1", "c2", "c3")
    assert (found.samples["mask"][0].read((44, 60)) == expected).all()


def test_two_structures_with_soft_edges_name_flags_that_work(tmp_path):
    def disc(mask, suffix):
        y, x = np.mgrid[:44, :60]
        far = (y - 22) ** 2 + (x - 30) ** 2
        levels = Image.fromarray(np.uint8(128 * (far < 300) + 127 * (far < 90)))
        return levels.filter(ImageFilter.GaussianBlur(0 if suffix == "jpg" else 1))

    for suffix in ("png", "jpg"):
        root = tmp_path / suffix
        write(root, mask=f"masks/p{{:02d}}.{suffix}", convert=lambda m, s=suffix: disc(m, s))
        line = asked(root, "levels around 0, 1", ", 255; name the foreground")
        flags = re.findall(r"--foreground (\S+)", line)
        assert len(flags) == 2
        areas = [masks_of(root, foreground=flag)[0] for flag in flags]
        assert [set(np.unique(area)) for area in areas] == [{0, 1}] * 2
        assert abs(areas[0].sum() - 300 * np.pi) < 40
        assert abs(areas[1].sum() - 90 * np.pi) < 30


@pytest.mark.parametrize(
    "table", ["id,name\n0,a\n128,b\n255,c\n", "name,r,g,b\na,0,0,0\nb,128,128,128\nc,255,255,255\n"]
)
def test_255_is_a_class_where_a_file_lists_it(tmp_path, table):
    write(tmp_path, convert=labels(128, 255))
    (tmp_path / "list.csv").write_text(table)
    found = find_samples(str(tmp_path), training=True, classes=str(tmp_path / "list.csv"))
    assert found.classes == Classes(("a", "b", "c"), ("0", "128", "255"), True)
    levels = np.asarray(Image.open(tmp_path / "masks/p03.png"))
    mask = found.samples["mask"][3].read((44, 60))
    assert (np.array([0, 128, 255])[mask] == levels).all()
    write_mask(tmp_path, "x", mask, found.classes)
    assert (np.asarray(Image.open(tmp_path / "x.png")) == levels).all()
    again = find_samples(str(tmp_path), classes=found.classes)
    assert again.samples["mask"].notna().all()
    assert (masks_of(tmp_path, ignore="255")[3][0, :10] == 255).all()


def test_levels_saved_as_jpeg_are_a_label_map(tmp_path):
    write(tmp_path / "a", mask="masks/p{:02d}.jpg", convert=labels(128, *[255] * 10))
    asked(tmp_path / "a", "label map")
    write(tmp_path / "b", mask="masks/p{:02d}.jpg", convert=labels(1))
    asked(tmp_path / "b", "JPEG")


def test_foreground_takes_lists_and_ranges(tmp_path):
    write(tmp_path, convert=labels(15, 20, 255))
    for foreground, expected in (
        ("15", (1, 0, 255)),
        ("15,20", (1, 1, 255)),
        ("20-255", (0, 1, 1)),
    ):
        mask = find_samples(str(tmp_path), foreground=foreground).samples["mask"][0]
        [pixels] = mask.read((44, 60))
        assert (pixels[22, 30], pixels[0, 0], pixels[1, 0]) == expected


@pytest.mark.parametrize(("value", "word"), [(0, "empty"), (1, "full"), (255, "full")])
def test_masks_that_are_all_alike_are_refused_for_training_alone(tmp_path, value, word):
    write(tmp_path, convert=lambda mask: np.full(mask.shape, value, np.uint8))
    asked(tmp_path, f"all 8 masks are {word}", "--masks")
    mask = find_samples(str(tmp_path)).samples["mask"][0].read((44, 60))
    assert (mask == (value > 0)).all()


# --------------------------------------------------------------------------------------------------
#  Pairs
# --------------------------------------------------------------------------------------------------

PAIRS = {
    "Carvana": ("train/a{:02d}.jpg", "train_masks/a{:02d}_mask.gif"),
    "DeepGlobe": ("train/{:02d}_sat.jpg", "train/{:02d}_mask.png"),
    "ISIC": (
        "Part1_Training_Input/I_{:02d}.jpg",
        "Part1_Training_GroundTruth/I_{:02d}_segmentation.png",
    ),
    "VOC": ("VOC2012/JPEGImages/p{:02d}.jpg", "VOC2012/SegmentationClass/p{:02d}.png"),
    "zhixuhao": ("membrane/train/image/{}.png", "membrane/train/label/{}.png"),
    "upper case": ("IMAGES/p{}.JPG", "MASKS/p{}.PNG"),
    "jfif": ("img/p{}.jpg", "gt/p{}.png"),
    "a.jpg and a.png": ("p{:02d}.jpg", "p{:02d}.png"),
    "prefixes": ("imgs/img_{}.png", "annotations/mask_{}.png"),
    "prefixes in one folder": ("data/img_{}.png", "data/mask_{}.png"),
    "x.jpg.png": ("images/{}.jpg", "masks/{}.jpg.png"),
    "a split in each name": ("png_images/0_train_{}_.png", "png_masks/0_train_{}_.png"),
    "mmsegmentation": ("img_dir/train/{}.jpg", "ann_dir/train/{}.png"),
    "KITTI semantics": ("training/image_2/10_{:06d}.png", "training/semantic/10_{:06d}.png"),
    "one annotator": ("Image_{:02d}.jpg", "Image_{:02d}_observer.png"),
    "nnU-Net": ("imagesTr/la_{:03d}.png", "labelsTr/la_{:03d}.png"),
    "DRIVE without its other masks": (
        "training/images/{}_training.tif",
        "training/1st_manual/{}_manual.gif",
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(tmp_path, kind, capsys):
    image, mask = PAIRS[kind]
    write(tmp_path, image, mask, numbers=range(3, 15))
    if kind == "jfif":
        for path in (tmp_path / "img").iterdir():
            path.rename(path.with_suffix(".jfif"))
    assert len(read(tmp_path)) == 12
    assert "pairs: 12 images, such as" in capsys.readouterr().out


def test_a_mask_that_is_missing_is_named_although_names_differ(tmp_path):
    write(tmp_path, "images/img_{}.png", "masks/mask_{}.png", numbers=range(1, 13))
    (tmp_path / "masks/mask_12.png").unlink()
    asked(tmp_path, "1 of 12 images have no mask", "img_12.png")


def test_masks_of_single_objects_are_united(tmp_path):
    for root, mask in (("dsb", "train/{0}/masks/{1}.png"), ("flat", "masks/{0}/{1}.png")):
        for number in range(4):
            pixels, whole = pair(number)
            image = (
                f"train/{number}/images/{number}.png" if root == "dsb" else f"images/{number}.png"
            )
            save(tmp_path / root / image, pixels)
            for part, columns in enumerate((slice(0, 30), slice(30, 60))):
                values = np.zeros_like(whole)
                values[:, columns] = whole[:, columns]
                save(tmp_path / root / mask.format(number, part), grey(values))
        assert len(read(tmp_path / root)) == 4


def test_a_folder_for_each_patient_is_a_group(tmp_path):
    for patient in range(4):
        folder = f"scans/patient_{patient}"
        write(tmp_path, folder + "/s{:02d}.tif", folder + "/s{:02d}_mask.tif", numbers=range(3))
    samples = scan(read(tmp_path), Classes())
    folds = assign_folds(samples, 4, 0)
    assert folds.groupby("group").size().tolist() == [3] * 4
    assert (folds.groupby("group").fold.nunique() == 1).all()


@pytest.mark.parametrize(
    "pattern", ["images/{}/p{{:02d}}.png", "{}/images/{{:02d}}.png", "{}/{{}}.png"]
)
def test_a_given_split_is_the_fold_and_test_images_are_left_out(tmp_path, capsys, pattern):
    mask = pattern.replace("images", "masks").replace("{}/{{}}", "{}annot/{{}}")
    for split, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 11))):
        write(tmp_path, pattern.format(split), mask.format(split), numbers=numbers)
    samples = read(tmp_path)
    assert sorted(assign_folds(scan(samples, Classes()), 10, 0).fold) == [0, 0, *[1] * 6]
    assert "2 images in val validate" in capsys.readouterr().out
    assert len(read(tmp_path, training=False)) == 3


def test_test_images_never_get_training_masks(tmp_path):
    write(tmp_path, "train/image/{}.png", "train/label/{}.png")
    for number in range(3):
        save(tmp_path / f"test/{number}.png", pair(9)[0])
    samples = find_samples(str(tmp_path)).samples
    assert len(samples) == 3
    assert samples["mask"].isna().all()


def test_both_lungs_are_classes_or_united(tmp_path):
    lungs(tmp_path)
    asked(tmp_path, "--masks 'leftMask,rightMask' (and --classes one: united)")
    found = find_samples(str(tmp_path), training=True, masks="leftMask,rightMask")
    assert found.classes.names == ("leftMask", "rightMask")
    read(tmp_path, masks="leftMask,rightMask", classes="one")


def test_parts_of_faces_are_classes_and_never_by_another_number(tmp_path):
    parts_of_faces(tmp_path)
    line = asked(tmp_path, "take each for a class with --masks")
    names = re.search(r"--masks '(\S+,\S+)'", line)[1]
    found = find_samples(str(tmp_path), training=True, masks=names)
    assert found.classes.names == ("hair", "hat", "skin")
    read(tmp_path, masks=names, classes="one")


@pytest.mark.parametrize(
    ("image", "mask"),
    [("benign/b ({}).png", "benign/b ({})_mask{}.png"), ("images/{}.png", "masks/{}{}.png")],
)
def test_further_masks_of_an_image_are_united_and_it_is_said(tmp_path, capsys, image, mask):
    for number in range(1, 7):
        pixels, whole = pair(number)
        save(tmp_path / image.format(number), pixels)
        halves = [whole.copy(), whole.copy()]
        halves[0][:, 30:] = halves[1][:, :30] = False
        tails = [""] if number % 2 else ["", "_1"]
        for tail, half in zip(tails, [whole] if number % 2 else halves, strict=True):
            save(tmp_path / mask.format(number, tail), grey(half))
    assert len(read(tmp_path)) == 6
    assert "and 1 more, united" in capsys.readouterr().out


def test_names_with_and_without_a_word_for_masks_are_pairs(tmp_path):
    write(tmp_path, "CXR_png/C_{:04d}.png", "masks/C_{:04d}_mask.png", numbers=range(10))
    write(tmp_path, "CXR_png/M_{:04d}.png", "masks/M_{:04d}.png", numbers=range(5))
    assert len(read(tmp_path)) == 15


@pytest.mark.parametrize(
    ("data", "sibling", "numbers", "taken"),
    [
        ("my-photos", "other-labels", range(COUNT), False),
        ("images", "nerve-segmentation", range(COUNT), False),
        ("images", "masks", range(4, 20), False),
        ("images", "masks", range(COUNT), True),
        ("my-photos", "my-labels", range(COUNT), True),
        ("train", "train_masks", range(COUNT), True),
    ],
)
def test_masks_of_a_sibling_folder_belong_to_it_by_all_names(
    tmp_path, data, sibling, numbers, taken
):
    write(tmp_path, data + "/{}.png", ())
    write(tmp_path / "x", "{}.png", "../" + sibling + "/{}.png", numbers=numbers)
    if taken:
        assert len(read(tmp_path / data)) == COUNT
    else:
        asked(tmp_path / data, "8 of 8 images have no mask")
    if taken or numbers == range(COUNT):
        read(tmp_path / data, masks=sibling)


def test_masks_that_fit_two_folders_are_proposed_for_neither(tmp_path):
    """The authentic images have no masks, those of the forged ones have the same names."""
    for folder in ("train_images/authentic", "train_images/forged"):
        write(tmp_path, folder + "/{:02d}.png", "train_masks/{:02d}.png")
    line = asked(tmp_path, "no mask", "csv")
    assert "--data " not in line.split(";", 1)[1]


@pytest.mark.parametrize(
    "suffixes", [("tif", "png"), ("png", "bmp"), ("bmp", "tif"), ("jpg", "png")]
)
def test_which_suffix_is_the_mask_is_seen(tmp_path, suffixes):
    for number in range(COUNT):
        pixels, mask = pair(number)
        noise = np.random.default_rng(number).integers(0, 40, pixels.shape, np.uint8)
        save(tmp_path / f"p{number}.{suffixes[0]}", pixels + noise)
        save(tmp_path / f"p{number}.{suffixes[1]}", grey(mask))
    assert {path.suffix[1:] for path in read(tmp_path).image} == {suffixes[0]}


SPLITS = {
    "CRACK500": ("{}crop/{{}}.jpg", "{}crop/{{}}.png"),
    "GlaS": ("{}_{{}}.bmp", "{}_{{}}_anno.bmp"),
    "images in one folder": ("images/{}_{{}}.png", "masks/{}_{{}}.png"),
    "lower case": ("{}images/{{}}.png", "{}masks/{{}}.png"),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_splits_in_words_of_folders_and_files(tmp_path, kind):
    for split, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 11))):
        image, mask = (pattern.format(split) for pattern in SPLITS[kind])
        write(tmp_path, image, mask, numbers=numbers)
    samples = read(tmp_path)
    assert sorted(samples.fold) == [0, 0, *[1] * 6]


def test_a_split_that_only_one_side_names(tmp_path, capsys):
    """LIP, ISIC: masks of train and val in one folder; validation images without masks."""
    for split, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 11))):
        write(tmp_path / "a", split + "/{}.jpg", (), numbers=numbers)
        write(tmp_path / "b", split + "_Input/{}.jpg", (), numbers=numbers)
    write(tmp_path / "x", "{}.png", "../a/TrainVal_masks/{}.png")
    write(
        tmp_path / "x", "{}.png", "../b/Training_GroundTruth/{}_segmentation.png", numbers=range(6)
    )
    assert sorted(read(tmp_path / "a").fold) == [0, 0, *[1] * 6]
    capsys.readouterr()
    samples = read(tmp_path / "b")
    assert len(samples) == 6
    assert "fold" not in samples
    assert "left out: 2 images without a mask: 2 of val_Input" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "copy"),
    [
        ("images/{}.png", "collage/{}.png"),
        ("images/{}.png", "extra/{}.png"),
        ("images/{}.png", "images/{}_overlay.png"),
        ("hr/{}.png", "lr/{}.png"),
        ("rgb/{}.png", "nir/{}.png"),
        ("x/{}.png", "x/previews/{}.jpg"),
    ],
)
def test_what_is_made_of_images_is_left_out_and_it_is_said(tmp_path, capsys, image, copy):
    write(tmp_path, image, "masks/{}.png")
    write(tmp_path, copy, ())
    assert len(read(tmp_path)) == COUNT
    assert f"not used: 8 files, 8 in {copy.rsplit('/', 1)[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("image", ["train_v2/{}.jpg", "train_data/train_data/{}.jpg", "x/{}.jpg"])
def test_masks_that_are_named_are_taken_whatever_else_is_there(tmp_path, image):
    write(tmp_path, image, ["drawn/{}_x.png", "masks/{}.png"])
    write(tmp_path, "more/a{}.jpg", (), numbers=range(20, 25))
    for name in ("drawn", "masks", "drawn/{stem}_x.png"):
        assert len(read(tmp_path, masks=name)) == COUNT


def test_copies_in_another_format_are_left_out(tmp_path, capsys):
    """CVC-ClinicDB on Kaggle; previews of TIFF files."""
    for suffix in ("png", "tif"):
        write(
            tmp_path / "a",
            f"{suffix}/Original/{{}}.{suffix}",
            f"{suffix}/Ground Truth/{{}}.{suffix}",
        )
        write(tmp_path / "b", f"images/{{}}.{suffix}", "masks/{}.png")
    for root in ("a", "b"):
        assert len(read(tmp_path / root)) == COUNT
        assert "not used" in capsys.readouterr().out


def test_masks_of_test_images_are_none_of_training_images(tmp_path):
    defects(tmp_path)
    asked(
        tmp_path, "8 of 8 images have no mask", f"--data {tmp_path}/test --masks {tmp_path}/ground"
    )
    samples = find_samples(
        f"{tmp_path}/test", training=True, masks=f"{tmp_path}/ground_truth"
    ).samples
    assert {path.parent.name for path in samples.image} == {"crack", "cut"}


CANDIDATES = {
    "a field of view": (
        "training/images/{}.tif",
        ["training/1st_manual/{}.gif", "training/mask/{}.gif"],
    ),
    "annotators": ("Image_{:02d}L.jpg", ["Image_{:02d}L_1stHO.png", "Image_{:02d}L_2ndHO.png"]),
    "annotators in a folder": ("images/{}.jpg", ["masks/{}_A.png", "masks/{}_B.png"]),
    "two folders": ("images/{}.jpg", ["labels/{}.png", "masks/{}.png"]),
}


@pytest.mark.parametrize("kind", CANDIDATES)
def test_two_candidates_are_asked_about_and_both_flags_work(tmp_path, kind, capsys):
    image, masks = CANDIDATES[kind]
    write(tmp_path, image, masks, numbers=range(1, 9))
    names = re.search(r": (\S+) and (\S+) fit", asked(tmp_path, "--masks"))
    for name in names.groups():
        read(tmp_path, masks=name)
    assert find_samples(str(tmp_path)).samples["mask"].isna().all()
    assert "fit the images" in capsys.readouterr().out


def test_masks_takes_a_pattern(tmp_path):
    write(tmp_path, "photos/{}.jpg", "drawn/{}_x.png")
    read(tmp_path, masks="drawn/{stem}_x.png")
    asked(tmp_path, "no file fits", "drawn/ (0_x.png", masks="drawn/{stem}_y.png")
    asked(tmp_path, "{stem}", masks="drawn/x.png")


def test_masks_are_no_images_to_predict(tmp_path):
    write(tmp_path, "test/{:02d}_sat.jpg", "test/{:02d}_mask.png")
    assert len(read(tmp_path, training=False)) == COUNT


# --------------------------------------------------------------------------------------------------
#  Refusals
# --------------------------------------------------------------------------------------------------


def test_a_refusal_names_what_is_there_and_the_flag(tmp_path):
    write(tmp_path, "a/{:02d}.png", "b/{:02d}.png")
    shown = (f"{folder}/ (00.png, 01.png, 02.png, ... (8 files))" for folder in "ab")
    asked(tmp_path, "name them with --masks", *shown)
    read(tmp_path, masks="b")


def test_a_zip_is_named_with_the_command_that_unpacks_it(tmp_path):
    (tmp_path / "train.csv").write_text("id,rle\na,1 1\n")
    (tmp_path / "train.zip").write_bytes(b"")
    asked(tmp_path, f"unzip -q {tmp_path}/train.zip -d {tmp_path}/train")


@pytest.mark.parametrize("name", ["a.h5", "a.nii.gz", "a.nii", "a.dcm"])
def test_arrays_and_volumes_are_named_as_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    asked(tmp_path, f"{name[1:]} is not read: save each image as a PNG or TIFF")


def flags_of(line):
    """The commands that a refusal names: {flag: value} each."""
    pattern = r"--(masks|data|missing|classes|foreground) (?:'([^']+)'|([^\s,;()]+))"
    named = [(flag, quoted or plain) for flag, quoted, plain in re.findall(pattern, line)]
    named = named[named[0][0] == "data" and ": " in line :]  # where the line starts
    flags, place = [], ""
    for flag, value in named:
        if flag == "data":
            place = value
        elif value == "FILE":
            continue  # the user's own
        elif flag == "classes" and flags:
            flags.append(flags[-1] | {flag: value.rstrip(":")})
        else:
            flags.append({flag: value, **({"data": place} if place and flag == "masks" else {})})
    return flags


def lungs(root):
    for number in range(COUNT):
        pixels, whole = pair(number)
        save(root / f"CXR_png/{number}.png", pixels)
        for side, columns in (("left", slice(0, 30)), ("right", slice(30, 60))):
            half = np.zeros_like(whole)
            half[:, columns] = whole[:, columns]
            save(root / f"ManualMask/{side}Mask/{number}.png", grey(half))


def parts_of_faces(root):
    """CelebAMask: numbers with zeros in folders that are no ids; a part that most lack."""
    for number in range(COUNT):
        pixels, whole = pair(number)
        save(root / f"CelebA-HQ-img/{number}.jpg", pixels)
        for row, part in enumerate(("skin", "hair", "hat")[: 3 if number % 3 else 2]):
            rows = np.zeros_like(whole)
            rows[22 * min(row, 1) : 22 * (row + 1)] = row < 2 and True
            values = grey(rows & whole) if row < 2 else grey(np.zeros_like(whole))
            save(root / f"mask-anno/{number // 4}/{number:05d}_{part}.png", values)


def defects(root):
    """MVTec: the masks are those of test images."""
    write(root, "train/good/{:03d}.png", ())
    write(root, "test/good/{:03d}.png", ())
    for kind in ("crack", "cut"):
        write(root, f"test/{kind}/{{:03d}}.png", f"ground_truth/{kind}/{{:03d}}_mask.png")


def layout(image, mask, without=0, convert=grey):
    """A layout of pairs of which the first `without` have no mask."""

    def make(root):
        write(root, image, mask, convert)
        for path in sorted(root.rglob("*"))[: 0 if not without else None]:
            numbers = re.findall(r"\d+", path.name)
            is_mask = any(path.match(pattern.split("{")[0] + "*") for pattern in [mask])
            if numbers and is_mask and int(numbers[0]) < without:
                path.unlink()

    return make


REFUSED = {
    "lungs": lungs,
    "parts of faces": parts_of_faces,
    "defects": defects,
    "annotators": layout(*CANDIDATES["annotators"]),
    "field of view": layout(*CANDIDATES["a field of view"]),
    "two folders": layout(*CANDIDATES["two folders"]),
    "unknown words": layout("a/{:02d}.png", "b/{:02d}.png"),
    "PH2": layout(
        "D/{0:02d}/{0:02d}_derm/{0:02d}.bmp", "D/{0:02d}/{0:02d}_lesion/{0:02d}_lesion.bmp"
    ),
    "some missing": layout("images/{}.png", "masks/{}.png", 3),
    "most missing": layout("images/{}.png", "masks/{}.png", 6),
    "label maps missing": layout("images/{}.png", "masks/{}.png", 2, labels(1, 2)),
    "COCO-stuff": layout("train2017/{:06d}.jpg", "stuffthingmaps/train2017/{:06d}.png"),
    "BDD100K": layout(
        "images/10k/train/{}.jpg",
        ["labels/sem_seg/masks/train/{}.png", "labels/sem_seg/colormaps/train/{}.png"],
    ),
    "one image in two folders": layout("train_images/forged/{}.png", "train_masks/{}.png"),
    "grey levels": layout("images/{}.png", "masks/{}.png", 0, labels(128, 255)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_each_flag_that_a_refusal_names_reads_or_asks_something_else(tmp_path, kind):
    REFUSED[kind](tmp_path)
    if kind == "one image in two folders":
        write(tmp_path, "train_images/authentic/{}.png", ())
    if kind in ("unknown words", "COCO-stuff"):  # photographs have many colours
        for path in [*tmp_path.glob("a/*"), *tmp_path.glob("train2017/*")]:
            noise = np.random.default_rng(0).integers(0, 9, (44, 60, 3), np.uint8)
            save(path, np.asarray(Image.open(path)) + noise)
    line = asked(tmp_path)
    flags = flags_of(line)
    assert flags, line
    for options in flags:
        data = options.pop("data", str(tmp_path))
        found = find_samples(data, training=True, **options)
        assert len(found.samples) > 1, (options, line)
        assert not any("good" in str(path) for path in found.samples.image)


# --------------------------------------------------------------------------------------------------
#  Comparisons
# --------------------------------------------------------------------------------------------------


def panels(image, mask):
    """The prediction and the ground truth panel of a prediction without an error."""
    drawn = comparison(image, grey(mask, 1)[None], mask[None], "", Classes())
    across = 2 if image.shape[1] >= image.shape[0] else 4
    height, width = drawn.shape[0] // (4 // across), (drawn.shape[1] - 6 * (across - 1)) // across
    places = [(0, 1), (1, 0)] if across == 2 else [(0, 1), (0, 2)]
    return [
        drawn[row * height + 30 : (row + 1) * height, column * (width + 6) :][:, :width]
        for row, column in places
    ]


@pytest.mark.parametrize("size", [(300, 620), (584, 565), (40, 60), (1500, 2400)])
def test_prediction_and_ground_truth_are_drawn_alike_and_lines_survive(size):
    mask = np.zeros(size, bool)
    mask[:, 17::40] = True  # vessels of one pixel
    prediction, truth = panels(np.full((*size, 3), 90, np.uint8), mask)
    assert (prediction == truth).all()
    row = np.abs(prediction[5].astype(int) - 90)[:, 1]
    row = row[: min(size[1], 620)]
    lines = np.flatnonzero((row[1:-1] >= row[:-2]) & (row[1:-1] > row[2:]) & (row[1:-1] > 20))
    assert len(lines) == mask[0].sum()
    if size[1] <= 620:
        assert ((row > 0) == mask[5]).all(), "pixel for pixel"


def test_a_strip_makes_no_endless_comparison():
    for size in ((70000, 24), (24, 70000)):
        mask = np.zeros((1, *size), bool)
        drawn = comparison(np.zeros((*size, 3), np.uint8), None, mask, "", Classes())
        assert images.encode_image(drawn, ".jpg")


def test_files_that_start_with_a_dot_are_no_files(tmp_path):
    write(tmp_path)
    (tmp_path / "images/._p00.png").write_bytes(b"Mac OS X")
    (tmp_path / ".cache").mkdir()
    save(tmp_path / ".cache/masks/p00.png", grey(pair(0)[1]))
    assert len(list_files(tmp_path)) == 2 * COUNT
    read(tmp_path)


def test_the_inner_folder_says_what_is_in_it(tmp_path):
    root = write(tmp_path, "Kvasir-SEG/images/c{:02d}.png", "Kvasir-SEG/masks/c{:02d}.png")
    assert len(read(root)) == COUNT


def test_portable_pixmaps(tmp_path):
    read(write(tmp_path, "stare-images/im{:04d}.ppm", "labels-ah/im{:04d}.ah.ppm"))


def test_kinds_of_masks_next_to_each_other_are_asked_about_by_their_endings(tmp_path):
    """Cityscapes."""
    masks = [f"gtFine/train/a/a_{{:06d}}_gtFine_{kind}.png" for kind in ("color", "labelIds")]
    write(tmp_path, "leftImg/train/a/a_{:06d}_leftImg.png", masks)
    asked(tmp_path, "{stem}_gtFine_color.png and {stem}_gtFine_labelIds.png fit the images")
    assert len(read(tmp_path, masks="{stem}_gtFine_labelIds.png")) == COUNT


def test_a_doubt_of_the_training_folder_is_one_of_the_test_folder(tmp_path, capsys):
    """DRIVE: next to test images lie field-of-view masks alone."""
    masks = ["training/1st_manual/{}_manual1.gif", "training/mask/{}_training_mask.gif"]
    write(tmp_path, "training/images/{}_training.tif", masks, numbers=range(21, 29))
    write(tmp_path, "test/images/{}_test.tif", "test/mask/{}_test_mask.gif", numbers=range(1, 5))
    samples = find_samples(str(tmp_path)).samples
    assert len(samples) == 4
    assert samples["mask"].isna().all()
    printed = capsys.readouterr().out
    assert f"no scores: --data {tmp_path}: 1st_manual and mask fit the images" in printed
    assert len(read(tmp_path, masks="1st_manual")) == 8


# --------------------------------------------------------------------------------------------------
#  Images
# --------------------------------------------------------------------------------------------------


def deep_image(path, number, black, white):
    """A 16-bit grey image whose ellipse is white; returns its mask."""
    mask = pair(number)[1]
    save(path, Image.fromarray(np.where(mask, white, black).astype(np.uint16)))
    return mask


@pytest.mark.parametrize(
    ("black", "white", "window"),
    [(20, 200, (20, 200)), (100, 4000, (100, 4000)), (0, 60000, (0, 65535))],
)
def test_images_of_16_bits_are_scaled_as_the_data_set_needs(tmp_path, capsys, black, white, window):
    paths = [tmp_path / f"{number}.tif" for number in range(3)]
    for number, path in enumerate(paths):
        deep_image(path, number, black, white)
    assert readers.find_value_range(paths, "0.5,99.5") == window
    assert "3 of more than 8 bits" in capsys.readouterr().out
    pixels = readers.read_image(paths[0], 3, window)
    mask = pair(0)[1]
    assert pixels.dtype == np.uint16
    assert pixels[mask].min() == (65535 if window[0] else white)
    assert pixels[~mask].max() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -9999, -3.4e38])
def test_no_data_in_images_is_left_out_and_said(tmp_path, capsys, value):
    """It becomes black, and does not move what is black and white; what is no number is ignored."""
    levels = np.random.default_rng(0).uniform(-25, -5, (44, 60)).astype(np.float32)
    ranges = []
    for name in ("clean", "holes"):
        pixels = levels.copy()
        pixels[:9] = value if name == "holes" else pixels[:9]
        save(tmp_path / f"{name}.tif", pixels)
        ranges.append(readers.find_value_range([tmp_path / f"{name}.tif"], readers.PERCENTILES))
    finite, printed = np.isfinite(value), capsys.readouterr().out
    assert ("no data, black" if finite else "NaN and infinity: ignored") in printed
    assert np.allclose(*ranges, atol=0.5)
    seen = readers.read_image(tmp_path / "holes.tif", 3, ranges[1])
    assert (seen[:9] == (65535 if value == np.inf else 0)).all()
    assert 100 * 257 < seen[9:].mean() < 150 * 257
    missing = readers.no_data(tmp_path / "holes.tif")
    assert missing is None if finite else (missing == (np.arange(44) < 9)[:, None]).all()
    with pytest.raises(UserError, match="values that 8-bit images do not have"):
        readers.read_image(tmp_path / "holes.tif")


@pytest.mark.parametrize("chunk", [b"pHYs", b"IHDR"])
def test_a_png_with_a_bad_checksum_is_read_where_it_does_not_matter(tmp_path, chunk):
    save(tmp_path / "p.png", pair(0)[0], dpi=(72, 72))
    content = bytearray((tmp_path / "p.png").read_bytes())
    place = content.index(chunk)
    content[place + 4 + int.from_bytes(content[place - 4 : place], "big")] ^= 255
    (tmp_path / "p.png").write_bytes(content)
    if chunk == b"pHYs":
        assert (readers.read_image(tmp_path / "p.png") == pair(0)[0]).all()
        assert readers.read_header(tmp_path / "p.png").size == (44, 60)
    else:
        with pytest.raises(UserError, match=r"p\.png"):
            readers.read_image(tmp_path / "p.png")


def test_colours_of_16_bits_keep_their_low_bits(tmp_path):
    colours = np.dstack([np.full((4, 6), value, np.uint16) for value in (100, 300, 500)])
    cv2.imwrite(str(tmp_path / "a.png"), colours[..., ::-1])
    assert readers.read_header(tmp_path / "a.png").deep
    assert readers.read_image(tmp_path / "a.png", 3, (100.0, 500.0))[0, 0].tolist() == [
        0,
        32767,
        65535,
    ]


def test_levels_between_0_and_1_are_an_image(tmp_path):
    values = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    save(tmp_path / "a.tif", Image.fromarray(values))
    window = readers.find_value_range([tmp_path / "a.tif"], "0,100")
    assert window == (0, 1)
    pixels = readers.read_image(tmp_path / "a.tif", 3, window)
    assert pixels[..., 0].ravel().tolist()[::23] == [0, 65535]
    with pytest.raises(UserError, match="values that 8-bit images do not have"):
        readers.read_image(tmp_path / "a.tif")


def test_16_bits_that_use_8_are_not_black_for_a_model_of_8_bits(tmp_path):
    deep_image(tmp_path / "a.tif", 0, 10, 250)
    assert readers.read_image(tmp_path / "a.tif").max() == 250


def test_images_of_8_bits_have_no_window(tmp_path):
    assert readers.find_value_range([], "0.5,99.5") == ()


@pytest.mark.parametrize("wanted", ["5", "a,b", "-1,50", "50,101", "60,40", "nan,50"])
def test_percentiles_out_of_range_are_refused(wanted):
    with pytest.raises(UserError, match=f"--window {wanted}: takes two percentiles"):
        readers.find_value_range([], wanted)


def test_several_pages_are_asked_about(tmp_path):
    pages = [Image.fromarray(pair(number)[0]) for number in range(3)]
    pages[0].save(tmp_path / "a.webp", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"a\.webp: has 3 pages; save the one"):
        readers.read_image(tmp_path / "a.webp")
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"a\.tif: has 9 channels, 3 are needed"):
        readers.read_image(tmp_path / "a.tif")


def test_a_smaller_copy_in_a_tiff_is_no_page(tmp_path):
    page = pair(0)[0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(page)
        file.write(page[::2, ::2], subfiletype=1)  # NewSubfileType: reduced
    assert photos.open_header(tmp_path / "a.tif").n_frames == 2
    assert readers.read_image(tmp_path / "a.tif").shape == (44, 60, 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_stored_size_is_turned_with_its_image(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number in range(COUNT):
        image, mask = pair(number)
        file = tmp_path / "images" / f"{number}.{suffix}"
        save(file, Image.fromarray(image), exif=exif)
        assert readers.read_header(file) == ((60, 44), orientation, False, False, 3)
        save(tmp_path / "masks" / f"{number}.png", grey(mask))
    samples = scan(find_samples(str(tmp_path), training=True).samples, Classes())
    for row in samples.itertuples():
        pixels, [mask] = read_sample(row)
        assert pixels.shape == (60, 44, 3)
        assert ((pixels[..., 0] > 120) == (mask == 1)).all()


def test_turns_that_no_size_tells_are_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    write(tmp_path)
    save(tmp_path / "images" / "p00.png", Image.fromarray(pair(0)[0]), exif=exif)
    collection = find_samples(str(tmp_path), training=True)
    scanned = scan(collection.samples, collection.classes)
    line = describe(collection._replace(samples=scanned))
    assert "1 images are turned by EXIF, their masks are taken as upright: see examples.jpg" in line


def test_images_without_a_mask_are_left_out_or_empty_when_that_is_said(tmp_path, capsys):
    write(tmp_path)
    for number in range(3):
        (tmp_path / "masks" / f"p{number:02d}.png").unlink()
    line = asked(tmp_path, "3 of 8 images have no mask", "--missing empty")
    assert line.index("--missing leave_out") < line.index("--missing empty")
    samples = find_samples(str(tmp_path), training=True, missing="empty").samples
    shares = scan(samples, Classes()).share
    assert [share > 0 for share in shares] == [False] * 3 + [True] * 5
    capsys.readouterr()
    assert len(read(tmp_path, missing="leave_out")) == 5
    assert "left out: 3 images without a mask: 3 of images" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["few masks", "label maps"])
def test_empty_is_no_remedy_for_few_masks_or_label_maps(tmp_path, kind):
    write(tmp_path, convert=labels(7, 2, 3) if kind == "label maps" else grey)
    for number in range(2 if kind == "label maps" else 4):
        (tmp_path / "masks" / f"p{number:02d}.png").unlink()
    assert "--missing empty" not in asked(tmp_path, "--missing leave_out")
    samples = find_samples(str(tmp_path), training=True, missing="leave_out").samples
    assert samples["mask"].notna().all()


@pytest.mark.parametrize("full", [False, True])
def test_a_csv_of_masks_without_foreground_or_background_is_refused(tmp_path, full):
    lines = [f"p{number:02d},{'1 2640' if full else ''}" for number in range(COUNT)]
    for number in range(COUNT):
        save(tmp_path / "train" / f"p{number:02d}.png", pair(number)[0])
    (tmp_path / "train.csv").write_text("\n".join(["id,rle_mask", *lines]))
    collection = find_samples(str(tmp_path), training=True)
    samples = scan(collection.samples, Classes())
    with pytest.raises(UserError, match=f"all 8 masks are {'full' if full else 'empty'}"):
        decode_pairs(samples, ModelConfig(), 0)


def test_nothing_is_left_where_no_image_has_a_mask(tmp_path):
    for number in range(3):
        save(tmp_path / "images" / f"p{number}.png", pair(number)[0])
    with pytest.raises(UserError, match="0 pairs; at least 2 are needed"):
        find_samples(str(tmp_path), training=True, missing="leave_out")
