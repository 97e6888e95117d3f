"""From files to tensors and back: layouts, folds, masks, sizes, augmentation, identity."""

import dataclasses
import os
import re
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENCODER
from PIL import Image

import train
from kit.config import IGNORE, Classes, ModelConfig, plane_settings
from kit.data import images, masks, photos, readers
from kit.data.folders import Collection
from kit.data.folds import BLOCK, assign_folds
from kit.data.kitti import KittiMask
from kit.data.masks import LabelMap, MaskFile, Planes
from kit.data.names import list_images
from kit.data.rle import RunLengths
from kit.data.samples import (
    LAYOUTS,
    LOADED,
    decode_pairs,
    find_samples,
    load,
    read_sample,
    scan,
)
from kit.data.values import decide_values
from kit.errors import UserError
from kit.network.model import best_device
from kit.results import visualize
from kit.training import resume
from kit.training.loaders import Cached
from kit.training.resolve import resolve

MODEL = ModelConfig(height=64, width=192)
CONFIG = train.Config(height=64, width=192, top=0.0, tiles=False)


def training_samples(root, **options):
    """The samples of a folder as train.py finds them."""
    return find_samples(str(root), training=True, **options).samples


def with_pairs(samples, memory=train.CACHE):
    """The samples with decoded images and masks at the network's size."""
    return decode_pairs(scan(samples, Classes()), MODEL, memory)


def write_pairs(root, stems, size=(6, 8), image_suffix=".png"):
    """Grey images and masks with a foreground of one row, in the images and masks layout."""
    for stem in stems:
        mask = np.zeros(size, np.uint8)
        mask[-1] = 255
        for folder, pixels, suffix in (("images", mask, image_suffix), ("masks", mask, ".png")):
            (root / folder).mkdir(exist_ok=True, parents=True)
            Image.fromarray(pixels).save(root / folder / (stem + suffix))
    return root


# --------------------------------------------------------------------------------------------------
#  Layouts
# --------------------------------------------------------------------------------------------------


def numbers(path):
    return re.fullmatch(r"([a-z]+)_(?:(road|lane)_)?(\d+)", path.stem)


def test_every_image_gets_its_own_mask(roads):
    samples = training_samples(roads)
    assert len(samples) == 24
    for row in samples.itertuples():
        image, mask = numbers(row.image), numbers(row.mask.path)
        assert (image[1], image[3], "road") == (mask[1], mask[3], mask[2])
        assert row.category == f"{image[1]}_road"
        assert row.id == row.image.stem


def test_lane_takes_um_images_alone(roads):
    samples = training_samples(roads, target="lane")
    assert len(samples) == 8
    assert set(samples.category) == {"um_lane"}
    assert all("_lane_" in mask.path.name for mask in samples["mask"])


def test_images_and_masks_layout_pairs_by_stem(tmp_path):
    for stem, suffix in (("b", ".jpg"), ("a", ".PNG"), ("c", ".png")):
        write_pairs(tmp_path, [stem], image_suffix=suffix)
    pairs = [
        (row.image.stem, row.mask.path.stem) for row in training_samples(tmp_path).itertuples()
    ]
    assert pairs == [(stem, stem) for stem in "abc"]


def test_a_mask_is_none_or_an_object_that_reads_itself(roads, tmp_path):
    """One column, one meaning: no paths, empty strings or glued csv rows."""
    write_pairs(tmp_path / "folder", ["a", "b"])
    (tmp_path / "csv").mkdir()
    for stem in "ab":
        Image.new("L", (8, 6)).save(tmp_path / "csv" / f"{stem}.png")
    (tmp_path / "csv" / "train.csv").write_text("id,rle_mask\na,6 1\nb,\n")
    kinds = {roads: KittiMask, tmp_path / "folder": MaskFile, tmp_path / "csv": RunLengths}
    for root, kind in kinds.items():
        samples = training_samples(root)
        assert {type(mask) for mask in samples["mask"]} == {Planes}
        for row in samples.itertuples():
            [part] = row.mask.parts
            assert type(part) is kind
            assert row.mask.path == part.path
            size = readers.read_header(row.image).size
            planes, plane = row.mask.read(size), part.read(size)
            assert (planes.shape, planes.dtype) == ((1, *size), np.uint8)
            assert np.array_equal(planes, plane[None])
            with pytest.raises(dataclasses.FrozenInstanceError):
                row.mask.parts = ()
            with pytest.raises(dataclasses.FrozenInstanceError):
                part.path = "other"
    assert set(find_samples(str(roads / "testing")).samples["mask"]) == {None}


def test_a_new_layout_is_one_function_and_one_entry(tmp_path, monkeypatch):
    """Only `id`, `image` and `mask` are needed; crop and metric are the layout's."""

    def label_folder(root, masks, target, training):
        paths = list_images(root / "tiles")
        if not paths:
            return None
        found = [Planes((MaskFile(root / "drawn" / f"{stem}.png"),)) for stem in paths]
        rows = {"id": list(paths), "image": list(paths.values()), "mask": found}
        return Collection("tiles and drawings", pd.DataFrame(rows), top=0.25, metric="iou")

    write_pairs(tmp_path, ["a", "b", "c"])
    (tmp_path / "images").rename(tmp_path / "tiles")
    (tmp_path / "masks").rename(tmp_path / "drawn")
    with pytest.raises(UserError, match=r"no mask.*drawn/ \(a\.png, b\.png, c\.png\), tiles/"):
        training_samples(tmp_path)
    monkeypatch.setattr("kit.data.samples.LAYOUTS", [label_folder, *LAYOUTS])
    collection = find_samples(str(tmp_path), training=True)
    samples = scan(collection.samples, collection.classes)
    samples["fold"] = assign_folds(samples, 10, 0).fold
    assert collection.name == "tiles and drawings"
    assert samples.id.tolist() == ["a", "b", "c"]
    assert samples.share.tolist() == [1 / 6] * 3
    config = dataclasses.replace(CONFIG, top="auto", encoder="resnet18", encoder_weights="none")
    resolved, _ = resolve(config, collection._replace(samples=samples), 0, train.RESOLUTIONS)
    assert (resolved.top, resolved.metric) == (0.25, "iou")


def test_auto_finds_kitti_at_any_depth(roads, tmp_path, monkeypatch):
    work = tmp_path / "working"
    work.mkdir()
    shutil.copytree(roads, tmp_path / "input" / "datasets" / "owner" / "slug" / "data_road")
    monkeypatch.chdir(work)
    assert len(training_samples("auto")) == 24


# --------------------------------------------------------------------------------------------------
#  Folds
# --------------------------------------------------------------------------------------------------


def kitti_names(count):
    names = [f"{kind}_{number:06d}" for kind in ("um", "umm", "uu") for number in range(count)]
    categories = [name.split("_")[0] for name in names]
    return pd.DataFrame(
        {"id": names, "category": categories, "share": 0, "shares": [(0,)] * len(names)}
    )


def folds_of(samples, folds=10, seed=0, group=""):
    return assign_folds(samples, folds, seed, group).fold.to_numpy()


def test_folds_keep_sequences_together_and_categories_even():
    samples = kitti_names(96)
    samples["fold"] = folds_of(samples)
    validation = samples[samples.fold == 0]
    assert 0.07 < len(validation) / len(samples) < 0.13
    assert set(validation.category.value_counts()) <= {BLOCK, 2 * BLOCK}
    assert set(validation.category) == {"um", "umm", "uu"}
    sequence = samples.id.map(lambda name: (name[:-6], int(name[-6:]) // BLOCK))
    assert (samples.groupby(sequence).fold.nunique() == 1).all()
    assert set(samples.fold) == set(range(10))


def described(names, share=0.2, **columns):
    """Samples as `scan` leaves them, of these names."""
    share = np.broadcast_to(share, len(names))
    table = pd.DataFrame({"id": names, "category": "", "fields": None, "share": share, **columns})
    return table.assign(shares=[(value,) for value in table.share])


@pytest.mark.parametrize(
    ("names", "groups"),
    {
        "views": ([f"a{c}f_{v:02d}" for c in range(20) for v in range(16)], 20),
        "slices": ([f"TCGA_{p}_1996_{s}" for p in range(12) for s in range(9)], 12),
        "tiles of few slides": (
            [f"s{n}_{x}_{y}" for n in "123" for x in range(9) for y in "789"],
            3,
        ),
        "copies": ([f"img{n}{end}" for n in range(30) for end in ("", "_aug1", "_aug2")], 30),
        "eyes": ([f"{n}_{side}" for n in range(30) for side in ("left", "right")], 30),
        "eyes, side first": ([f"{side}_{n}" for n in range(30) for side in ("OD", "OS")], 30),
        "years": ([f"20{y:02d}_{n:06d}" for y in range(7, 13) for n in range(0, 99, 9)], None),
        "breeds": ([f"{kind * 4}_{n}" for kind in "abcdefgh" for n in range(0, 900, 9)], None),
        "hashes": ([f"{n * 7919 % 99991:x}-{n:x}" for n in range(90)], None),
    }.values(),
)
def test_names_that_share_a_start_are_a_group(names, groups, capsys):
    table = assign_folds(described(names), 5, 0)
    by_name = "by the start of the name" in capsys.readouterr().out
    assert by_name == (groups is not None)
    if groups:
        assert table.group.nunique() == groups
    assert (table.groupby("group").fold.nunique() == 1).all()


def test_folds_are_the_same_with_every_version_of_scikit_learn():
    samples = described([f"x{n * 7919 % 991}" for n in range(12)], [0.1, 0.2, 0.0] * 4)
    fold = assign_folds(samples, 4, 0).fold
    assert fold.tolist() == [2, 1, 3, 3, 2, 0, 0, 3, 2, 1, 0, 1]


def test_folders_of_kinds_are_no_groups_and_those_of_patients_are(capsys):
    kinds = ["blowhole"] * 20 + ["crack"] * 20 + ["free"] * 40
    names = [f"x{n * 7919 % 991}" for n in range(80)]
    samples = described(names, [0.1] * 40 + [0.0] * 40, folder=kinds)
    fold = assign_folds(samples, 5, 0).fold
    assert (samples.share.gt(0).groupby(fold).sum() == 8).all()
    samples["folder"] = [f"scans/case{n % 12}/day{n % 24}" for n in range(80)]
    table = assign_folds(samples, 5, 0)
    assert table.group.nunique() == 12
    assert "by folder" in capsys.readouterr().out
    assert assign_folds(samples, 5, 0, "none").group.tolist() == names


def test_no_fold_lacks_the_foreground_that_others_have(capsys):
    share = [0.3] * 3 + [0.0] * 57
    samples = described([f"n{n * 7919 % 991}" for n in range(60)], share)
    fold = assign_folds(samples, 10, 0).fold
    assert sorted(fold[:3]) == [0, 1, 2]
    assert fold.nunique() == 3
    samples["fields"] = [
        {"kind": "full" if value else f"no{n % 9}"} for n, value in enumerate(share)
    ]
    assign_folds(samples, 10, 0, "kind")
    assert "split: no foreground in fold" in capsys.readouterr().out


def test_a_column_of_groups_may_have_gaps_but_not_one_value_alone():
    samples = described([f"n{n * 7919 % 991}" for n in range(12)])
    samples["fields"] = [{"patient": "" if n < 6 else "p1", "site": "a"} for n in range(12)]
    groups = assign_folds(samples, 5, 0, "patient").group
    assert groups.nunique() == 7
    with pytest.raises(UserError, match="--group site: all 12 images have the value a"):
        assign_folds(samples, 5, 0, "site")


def test_folds_follow_the_seed():
    samples = kitti_names(96)
    same, again, other = (folds_of(samples, seed=seed) for seed in (3, 3, 4))
    assert (same == again).all()
    assert (same != other).any()


@pytest.mark.parametrize(
    "names",
    [["um_000000", "um_000001"], ["um_000000", "uu_000000"], ["a", "b"], ["7", "8", "9"]],
)
def test_a_handful_still_splits(names):
    categories = [name.rpartition("_")[0] for name in names]
    samples = pd.DataFrame({"id": names, "category": categories, "share": 0.0})
    samples["shares"] = [(0.0,)] * len(names)
    assert set(folds_of(samples)) >= {0, 1}


def test_a_small_set_validates_on_every_category():
    samples = kitti_names(20)
    samples["fold"] = folds_of(samples)
    counts = samples[samples.fold == 0].category.value_counts()
    assert counts.to_dict() == {"um": 2, "umm": 2, "uu": 2}


# --------------------------------------------------------------------------------------------------
#  Masks and images
# --------------------------------------------------------------------------------------------------


def test_kitti_ground_truth_is_read_by_channel(tmp_path):
    # road, not road, ignored, ignored road, road
    colours = [(255, 0, 255), (255, 0, 0), (0, 0, 0), (0, 0, 255), (1, 0, 1)]
    Image.fromarray(np.uint8([colours])).save(tmp_path / "t.png")
    truth = KittiMask(tmp_path / "t.png").read((1, 5))
    assert truth.dtype == np.uint8
    assert truth.tolist() == [[1, 0, 255, 255, 1]]


def read_alone(path, size):
    """A mask file whose values are decided from it alone."""
    file = MaskFile(path)
    return dataclasses.replace(file, values=decide_values([file], "", "", False)[0]).read(size)


@pytest.mark.parametrize("kind", ["01", "0255", "bool", "16", "rgb", "palette", "alpha", "empty"])
def test_masks_of_every_usual_kind(tmp_path, kind):
    road = np.zeros((5, 7), bool)
    road[2:, 1:4] = kind != "empty"
    binary, full = road.astype(np.uint8), road.astype(np.uint8) * 255
    palette = Image.fromarray(binary, "P") if kind == "palette" else None
    if palette:
        palette.putpalette([0, 0, 0, 128, 0, 0])
    image = {
        "01": lambda: Image.fromarray(binary),
        "0255": lambda: Image.fromarray(full),
        "bool": lambda: Image.fromarray(road),
        "16": lambda: Image.fromarray(road.astype(np.uint16) * 65535),
        "rgb": lambda: Image.fromarray(np.dstack([full] * 3)),
        "palette": lambda: palette,
        "alpha": lambda: Image.fromarray(np.dstack([full, np.full(road.shape, 255, np.uint8)])),
        "empty": lambda: Image.fromarray(binary),
    }[kind]()
    image.save(tmp_path / "m.png")
    assert (read_alone(tmp_path / "m.png", (5, 7)) == road).all()


def test_255_next_to_1_is_ignored(tmp_path):
    Image.fromarray(np.uint8([[0, 1, 255]])).save(tmp_path / "m.png")
    assert read_alone(tmp_path / "m.png", (1, 3)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(
    ("example", "pixels"),
    [("5", np.uint8([[0, 1, 5, 5]])), ("#ff0000", np.uint8([[[255, 0, 0]]]))],
)
def test_masks_that_are_not_binary_are_refused(tmp_path, example, pixels):
    Image.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=f"label map.*--foreground {example}"):
        read_alone(tmp_path / "m.png", pixels.shape[:2])


def test_images_of_every_usual_kind(tmp_path):
    grey = (np.arange(48, dtype=np.uint8) * 5).reshape(6, 8)
    colour = np.dstack([grey, grey[::-1], grey[:, ::-1]])
    alpha = np.dstack([colour, np.full((6, 8), 7, np.uint8)])
    cases = {
        "grey": (Image.fromarray(grey), np.dstack([grey] * 3)),
        "colour": (Image.fromarray(colour), colour),
        "alpha": (Image.fromarray(alpha), colour),
        "palette": (Image.fromarray(grey).convert("P"), np.dstack([grey] * 3)),
        "16bit": (Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        pixels = readers.read_image(tmp_path / f"{name}.png")
        assert pixels.dtype == np.uint8, name
        assert (pixels == expected).all(), name


def test_a_turned_photograph_is_read_upright(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "phone.jpg", exif=exif)
    assert readers.read_image(tmp_path / "images" / "phone.jpg").shape == (8, 4, 3)
    (tmp_path / "train.csv").write_text("id,rle_mask\nphone,29 4\nother,1 1\n")
    Image.fromarray(pixels).save(tmp_path / "images" / "other.png")
    _, sample = scan(training_samples(tmp_path), Classes()).itertuples()
    assert (sample.height, sample.width, sample.share) == (8, 4, 4 / 32)


@pytest.mark.parametrize("error", [TypeError, AttributeError, ValueError, OSError])
def test_the_scan_lets_a_programming_error_through(tmp_path, error):
    """Only a file that cannot be read, a UserError, is left to `decode_pairs`."""

    class Mask:
        def read(self, size, opener):
            raise error("a slip in a fork's own mask")

    samples = training_samples(write_pairs(tmp_path, ["a", "b"]))
    samples["mask"] = [Mask(), Mask()]
    with pytest.raises(error, match="a slip"):
        scan(samples, Classes())


def test_the_scan_leaves_damaged_files_to_the_check(tmp_path):
    samples = training_samples(write_pairs(tmp_path, ["a", "b", "c"]))
    (tmp_path / "images" / "a.png").write_bytes(b"damaged")
    (tmp_path / "masks" / "b.png").write_bytes(b"")
    scanned = scan(samples, Classes())
    assert scanned[["height", "width", "share", "above"]].values.tolist() == [
        [1, 1, 0, 1],
        [1, 1, 0, 1],
        [6, 8, 1 / 6, 5 / 6],
    ]
    with pytest.raises(UserError, match=r"2 of 3 pairs .*a\.png: not an image.*b\.png: empty file"):
        decode_pairs(scanned, MODEL, train.CACHE)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_reading_in_threads_leaves_the_warning_filters_alone(tmp_path, monkeypatch):
    """`warnings.catch_warnings` is not safe in threads (cpython #128384)."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # the images count as large: Pillow warns
    samples = training_samples(write_pairs(tmp_path, [f"p{n:02d}" for n in range(64)], (8, 10)))
    before, threads = list(warnings.filters), set()
    for name in ("catch_warnings", "simplefilter", "filterwarnings"):
        original = getattr(warnings, name)

        def record(*args, original=original, **options):
            threads.add(threading.current_thread())
            return original(*args, **options)

        monkeypatch.setattr(warnings, name, record)
    with_pairs(samples)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(readers.read_image, samples.image))
    assert threads <= {threading.main_thread()}
    assert warnings.filters == before


COLOURS = np.uint8([(0, 0, 0), (30, 30, 200), (200, 30, 30)])
KINDS = {  # of 0, 1, 2 (h, w): an image, what the masks are read as, and how many classes
    "grey": (lambda pixels: Image.fromarray(255 * (pixels > 0).astype(np.uint8)), Planes, 1),
    "colours": (lambda pixels: Image.fromarray(COLOURS[pixels]), LabelMap, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_mask_file_is_decoded_once(tmp_path, monkeypatch, kind):
    """Values are counted (in colours again), masks measured, then resized."""
    convert, read_as, count = KINDS[kind]
    pixels = np.zeros((6, 8), np.uint8)
    pixels[3:], pixels[5, 2:] = 1, 2
    write_pairs(tmp_path, "abcd")
    files = [tmp_path / f"masks/{stem}.png" for stem in "abcd"]
    for path in files:
        convert(pixels).save(path)
    opened, decoded = [], []

    def open_mask_file(path):
        opened.append(path)
        return photos.open_image(path)

    def decode(path, *args, original=photos.decode):
        decoded.append(path)
        return original(path, *args)

    monkeypatch.setattr(masks, "open_image", open_mask_file)
    monkeypatch.setattr(photos, "decode", decode)  # what reads past it counts, too
    settings = {name: getattr(train.Config(), name) for name in ("data", *LOADED)}
    settings["data"] = str(tmp_path)
    collection, opener = load(**settings)
    classes = dict(
        zip(("class_names", "class_values", "exclusive"), collection.classes, strict=True)
    )
    config = dataclasses.replace(MODEL, **classes, **plane_settings(collection.classes))
    samples = decode_pairs(collection.samples, config, train.CACHE, opener)
    assert sorted(opened) == sorted(path for path in decoded if path in files) == files
    assert {type(mask) for mask in samples["mask"]} == {read_as}
    assert len(collection.classes.names) == count
    expected = images.resize_mask(pixels if count > 1 else 1 * (pixels > 0)[None], config)
    assert all(np.array_equal(mask, expected) for _, mask in samples.pair)


# --------------------------------------------------------------------------------------------------
#  To the network's input and back
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(375, 1242), (370, 1226), (101, 101), (33, 501), (64, 192), (40, 100)]
)
def test_restore_inverts_the_way_to_the_input(size):
    """A blob keeps its place and its size, within half a pixel of the coarser grid."""
    v, u = np.mgrid[0 : size[0], 0 : size[1]]
    centre = 0.37 * size[0], 0.61 * size[1]
    blob = ((v - centre[0]) / size[0]) ** 2 + ((u - centre[1]) / size[1]) ** 2
    blob = np.exp(-blob / 0.02)
    image = np.dstack([(255 * blob).astype(np.uint8)] * 3)
    tensor = images.to_tensor(images.resize_image(image, MODEL))
    assert tensor.shape == (3, 64, 192)
    assert str(tensor.dtype) == "torch.uint8"
    back = images.restore(tensor[:1].float() / 255, size, MODEL).numpy()
    assert back.shape == (1, *size)
    assert back.dtype == np.float32
    [back] = back
    weight = back.clip(0) ** 2
    at = (v * weight).sum() / weight.sum(), (u * weight).sum() / weight.sum()
    assert abs(at[0] - centre[0]) <= 0.5 * max(1, size[0] / 64)
    assert abs(at[1] - centre[1]) <= 0.5 * max(1, size[1] / 192)
    assert np.abs(back - blob).mean() < 0.02


def test_normalise_subtracts_the_mean_and_divides_by_the_std():
    image = np.random.default_rng(0).integers(0, 256, (64, 192, 3), np.uint8)
    pixels = images.normalise(images.to_tensor(image)[None], MODEL)
    assert str(pixels.dtype) == "torch.float32"
    expected = (image / 255 - MODEL.mean) / MODEL.std
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_masks_are_never_interpolated():
    mask = np.random.default_rng(0).choice(np.uint8([0, 1, 255]), (2, 375, 1242))
    resized = images.resize_mask(mask, MODEL)
    assert resized.shape == (2, 64, 192)
    assert set(np.unique(resized)) <= {0, 1, 255}
    assert np.array_equal(images.resize_mask(mask[1], MODEL), resized[1]), "a label map"


def test_a_resized_mask_fits_the_resized_image():
    """The nearest pixel must be the centre of each cell: its corner would shift by half a cell."""
    step = np.zeros((384, 1152), np.uint8)
    step[:, 576:] = 1
    assert images.resize_mask(step, MODEL)[0].tolist() == [0] * 96 + [1] * 96
    ramp = np.tile(np.arange(1152, dtype=np.float32) / 8, (384, 1)).astype(np.uint8)
    mask = images.resize_mask(ramp, MODEL)[0].astype(float)
    image = images.resize_image(np.dstack([ramp] * 3), MODEL)[0, :, 0].astype(float)
    assert abs((mask - image).mean()) < 0.25


# --------------------------------------------------------------------------------------------------
#  Datasets and loaders
# --------------------------------------------------------------------------------------------------


def make_dataset(roads, augment):
    samples = training_samples(roads)
    samples = with_pairs(samples) if augment else samples
    return train.SegmentationDataset(samples, MODEL, CONFIG.seed, augment)


def test_items_are_tensors_of_the_promised_kind(roads):
    for augment in (None, train.augmentation(CONFIG)):
        item = make_dataset(roads, augment)[0]
        assert item["image"].shape == (3, 64, 192)
        assert item["mask"].shape == (1, 64, 192)
        assert {str(item["image"].dtype), str(item["mask"].dtype)} == {"torch.uint8"}
        assert set(np.unique(item["mask"])) <= {0, 1, 255}
        assert ("ground_truth" in item) == (augment is None)


def test_training_items_are_the_same_from_memory_and_from_files(roads):
    samples = training_samples(roads)[:2]
    from_memory, from_files = (
        train.SegmentationDataset(rows, MODEL, CONFIG.seed, train.augmentation(CONFIG))
        for rows in (with_pairs(samples), with_pairs(samples, memory=8000))
    )
    assert from_memory.rows[0].pair is not None
    assert from_files.rows[0].pair is None
    for index in range(2):
        item, other = from_memory[index], from_files[index]
        assert torch.equal(item["image"], other["image"])
        assert torch.equal(item["mask"], other["mask"])


@pytest.mark.parametrize("fits", [True, False])
def test_validation_images_are_decoded_once_where_memory_allows(roads, monkeypatch, fits):
    validation = Cached(make_dataset(roads, None), 4 << 30 if fits else 8000)
    reads = []

    def read(*args):
        reads.append(args)
        return read_sample(*args)

    monkeypatch.setattr("kit.data.samples.read_sample", read)
    first, other, again = validation[3], validation[4], validation[3]
    assert len(reads) == (2 if fits else 3)
    assert (first["image"] == again["image"]).all()
    assert first["name"] == again["name"]
    assert other["name"] != first["name"]


def test_augmentation_takes_its_arguments_and_fills_with_ignore():
    """albumentations only warns of an argument that it does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment = train.augmentation(CONFIG)
        augment.set_random_seed(0)
        grey, road = np.full((64, 192, 3), 128, np.uint8), np.ones((1, 64, 192), np.uint8)
        changed = [augment(image=grey, masks=road) for _ in range(40)]
    borders = [pair["masks"][0] == IGNORE for pair in changed]
    assert any(border.any() for border in borders)
    assert all(set(np.unique(pair["masks"])) <= {1, IGNORE} for pair in changed)
    filled = [pair["image"][border] for pair, border in zip(changed, borders, strict=True)]
    assert np.concatenate(filled).mean() < 60, "the filled border looks like the image"


def test_workers_and_epochs_draw_different_augmentations(roads):
    samples = with_pairs(training_samples(roads).iloc[[0] * 8].reset_index(drop=True))
    samples["fold"] = [0] + [1] * 7

    def draw(workers):
        config = dataclasses.replace(CONFIG, batch_size=1, workers=workers)
        loader, _ = train.make_loaders(config, MODEL, samples)
        batches = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches += [batch["image"] for batch in loader]
        return batches  # the same image 14 times

    drawn = draw(workers=2)
    assert len(drawn) == 14
    different = {tuple(batch.flatten()[::97].tolist()) for batch in drawn}
    assert len(different) >= 12, "workers or epochs repeat each other"
    assert all(map(torch.equal, drawn, draw(workers=0))), "the seed decides, not the worker"


def test_ignored_pixels_change_no_loss():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 1, 8, 8)).float()
    mask[:, :, :4] = IGNORE
    changed = logits.clone()
    changed[:, :, :4] = 50
    value = train.loss(logits, mask, CONFIG).item()
    assert value == pytest.approx(train.loss(changed, mask, CONFIG).item())
    without = train.loss(logits[:, :, 4:], mask[:, :, 4:], CONFIG).item()
    assert value == pytest.approx(without, rel=1e-5)
    assert torch.isfinite(train.loss(logits, torch.full_like(mask, IGNORE), CONFIG))


# --------------------------------------------------------------------------------------------------
#  Defaults that belong to the layout
# --------------------------------------------------------------------------------------------------


def resolved(collection, times=1, **changes):
    """What `resolve` makes of a collection, of images so many times as large, for fold 0."""
    samples = scan(collection.samples, collection.classes)
    samples[["height", "width", "thickness"]] *= times
    samples["fold"] = assign_folds(samples, 10, 0).fold
    config = train.Config(**{"encoder": ENCODER, "encoder_weights": "none"} | changes)
    return resolve(config, collection._replace(samples=samples), 0, train.RESOLUTIONS)


@pytest.fixture
def low_masks(tmp_path):
    """Pairs whose foreground is the lower quarter of the image, as on a road."""
    for stem in "abcd":
        mask = np.zeros((100, 100), np.uint8)
        mask[75:] = 255
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(mask).save(tmp_path / folder / f"{stem}.png")
    return tmp_path


def test_pretrained_weights_have_a_recipe_of_their_own(roads):
    """A higher rate, no progressive resizing, larger inputs on a CPU; what is given stays."""
    collection = find_samples(str(roads), training=True)
    kitti = {"times": 3}  # KITTI's sizes: smaller images are not enlarged
    weights = {"encoder": "timm-mobilenetv3_small_minimal_100", "encoder_weights": "imagenet"}
    weights |= kitti
    scratch, pretrained = (resolved(collection, **more)[0] for more in (kitti, weights))
    assert (scratch.lr, scratch.grow, pretrained.lr, pretrained.grow) == (5e-4, True, 2e-3, False)
    if best_device() == "cpu":
        assert pretrained.height * pretrained.width > 1.5 * scratch.height * scratch.width
    no_batch_norm, _ = resolved(collection, **weights | {"encoder": "tu-convnext_atto"})
    assert no_batch_norm.lr == 5e-4
    patient, _ = resolved(collection, **weights, max_minutes=30.0)
    if best_device() == "cpu":
        assert patient.height * patient.width > 1.5 * pretrained.height * pretrained.width
    shared, _ = resolved(collection, **weights, max_minutes=30.0, fold="all")
    assert shared.max_minutes < 11, "of one fold"
    assert (shared.height, shared.width) == (pretrained.height, pretrained.width)
    given, _ = resolved(collection, **weights, lr=1e-4, grow=True, height=64, width=192)
    assert (given.lr, given.grow, given.height, given.width) == (1e-4, True, 64, 192)


def test_the_crop_at_the_top_is_the_default_for_kitti_alone(roads, low_masks):
    config, model_config = resolved(find_samples(str(roads), training=True))
    assert 0.15 < config.top < 0.6, "the sky is cut off"
    assert model_config.top == config.top
    folder = find_samples(str(low_masks), training=True)
    config, model_config = resolved(folder)
    assert (config.top, model_config.top) == (0, 0)
    assert resolved(folder, top=-1)[1].top == 0.7, "on request: 5 % above the highest mask"
    assert resolved(folder, top=0.3)[1].top == 0.3
    assert resolved(find_samples(str(roads), training=True), top=0)[1].top == 0


def striped(folder, size, width, gap):
    """Four pairs with vertical stripes of so many pixels; the samples."""
    for stem in "abcd":
        mask = np.zeros((size, size), np.uint8)
        for left in range(0, size, width + gap):
            mask[:, left : left + width] = 255
        for kind in ("images", "masks"):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / kind / f"{stem}.png")
    return find_samples(str(folder), training=True)


@pytest.mark.parametrize(
    ("width", "gap", "tiles", "size"),
    [
        (40, 60, False, 160),  # large enough for the device's usual input
        (16, 40, False, 192),  # a larger input
        (40, 8, True, 224),  # thin background, such as cell membranes
        (3, 40, True, 224),  # tiles of the image's own size
    ],
)
def test_the_size_follows_the_thinnest_parts_of_the_masks(
    tmp_path, monkeypatch, width, gap, tiles, size
):
    monkeypatch.setattr("kit.training.resolve.best_device", lambda: "cpu")
    monkeypatch.setattr("kit.network.model.cpu_has_bf16", lambda: False)
    collection = striped(tmp_path, 576, width, gap)
    config = resolved(collection)[1]
    assert (config.tiles, config.height, config.width) == (tiles, size, size)
    assert not resolved(collection, height=96, width=96)[1].tiles, "a size that was asked for stays"
    assert resolved(collection, tiles=False)[1].tiles is False


def test_the_default_metric_belongs_to_the_layout(roads, low_masks):
    kitti_road = find_samples(str(roads), training=True)
    assert resolved(kitti_road)[0].metric == "maxf"
    assert resolved(kitti_road, metric="iou")[0].metric == "iou"
    folder = find_samples(str(low_masks), training=True)
    assert resolved(folder)[0].metric == "dice"
    folder.samples["category"] = ["left", "left", "right", "right"]  # a group, scored by itself
    assert resolved(folder)[0].metric == "dice"


def test_resolve_leaves_no_auto_but_the_learning_rate(low_masks):
    collection = find_samples(str(low_masks), training=True)
    config, model_config = resolved(collection, lr="auto")
    settings = dataclasses.asdict(config)
    for name in ("data", "masks", "resume", "cache"):  # where files are, not what is computed
        settings.pop(name)
    assert [name for name, value in settings.items() if value == "auto"] == ["lr"]
    for field in dataclasses.fields(ModelConfig):  # fields of one name are copied
        if field.name in settings and field.name not in (
            "precision",
            "channels",
            "neighbours",
            "show",
        ):
            assert getattr(model_config, field.name) == settings[field.name], field.name
    assert (config.channels, model_config.channels, model_config.show) == ("rgb", 3, ())


# --------------------------------------------------------------------------------------------------
#  Identity of a run's data
# --------------------------------------------------------------------------------------------------


def identity_of(root):
    """What a run remembers of its data: {id: [digest of the mask, fold]}."""
    samples = scan(training_samples(root), Classes())
    samples["fold"] = assign_folds(samples, 2, 0).fold
    return resume.identify({}, samples)


def what_differs(before, after):
    settings, words = resume.differences(after, before)
    assert not settings
    return words


def test_a_run_knows_its_masks_and_folds_and_not_its_folder(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    before = identity_of(write_pairs(here, [f"p{number}" for number in range(6)]))
    assert what_differs(before, identity_of(shutil.copytree(here, there))) == []
    os.utime(here / "masks" / "p2.png", (0, 0))
    Image.open(here / "masks" / "p2.png").save(here / "masks" / "p2.png", compress_level=0)
    assert what_differs(before, identity_of(here)) == [], "the same pixels in another file"

    mask = np.zeros((6, 8), np.uint8)
    mask[-2:, :4] = 255  # another mask with as many pixels of foreground
    Image.fromarray(mask).save(there / "masks" / "p3.png")
    assert what_differs(before, identity_of(there)) == ["1 masks differ: p3"]

    for folder in ("images", "masks"):
        (here / folder / "p3.png").rename(here / folder / "q3.png")
    words = what_differs(before, identity_of(here))
    assert words == ["1 images were added: q3", "1 images are gone: p3"]


def test_a_run_knows_its_folds(tmp_path):
    samples = scan(training_samples(write_pairs(tmp_path, ["a", "b", "c"])), Classes())
    before = resume.identify({}, samples.assign(fold=[0, 1, 1]))
    after = resume.identify({}, samples.assign(fold=[1, 0, 1]))
    assert what_differs(before, after) == ["the folds differ"]


def test_a_run_knows_the_run_lengths_of_a_csv(tmp_path):
    (tmp_path / "train").mkdir()
    for stem in "abcd":
        Image.new("L", (8, 6)).save(tmp_path / "train" / f"{stem}.png")

    def identity(a):
        (tmp_path / "train.csv").write_text(f"id,rle_mask\na,{a}\nb,1 1\nc,\nd,-\n")
        return identity_of(tmp_path)

    before = identity("3 4")
    assert what_differs(before, identity("3 4")) == []
    assert what_differs(before, identity("3 2 5 2")) == [], "the same pixels in other words"
    assert what_differs(before, identity("3 5")) == ["1 masks differ: a"]
    assert what_differs(before, identity("")) == ["1 masks differ: a"]


# --------------------------------------------------------------------------------------------------
#  Comparisons
# --------------------------------------------------------------------------------------------------


def test_a_comparison_shows_each_error_in_its_colour():
    image = np.full((100, 620, 3), 90, np.uint8)
    truth, mask = np.zeros((1, 100, 620), np.uint8), np.zeros((1, 100, 620), bool)
    truth[..., :400], mask[..., 200:500] = 1, True
    drawn = visualize.comparison(image, truth, mask, "street", Classes())
    errors = drawn[130 + 30 + 50, 626:].astype(int)
    colours = ((100, visualize.BLUE), (300, visualize.GREEN), (450, visualize.RED))
    for column, colour in colours:
        assert np.abs(errors[column] - (0.6 * np.array(colour) + 0.4 * 90)).max() < 3
    assert np.ptp(errors[600]) == 0
    assert cv2.imencode(".jpg", drawn)[0]
