"""Channels in several files, and masks in arrays: of several planes, of shares."""

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from conftest import KIT, TINY, succeed
from PIL import Image

import train
from kit.config import Classes, ModelConfig
from kit.data import arrays, images, readers
from kit.data.masks import MaskFile, MaskValues, Planes
from kit.data.rle import rle_encode
from kit.data.samples import decode_pairs, find_samples, load, read_pair, read_sample, scan
from kit.errors import UserError

SIZE = (40, 60)
LOADED = {
    "masks": "auto", "target": "road", "foreground": "", "ignore": "", "rle": "auto",
    "missing": "error", "classes": "auto", "window": readers.PERCENTILES, "channels": "auto",
    "soft": False, "folds": 2, "seed": 0, "group": "",
}  # fmt: skip


def disc(number):
    """The mask of an image, bool (40, 60)."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return (y - 20) ** 2 + (x - 22 - 2 * number) ** 2 < 12**2


def bands_of(number, count):
    """The channels (h, w, count) uint16 of an image: the last two show its mask."""
    values = np.random.default_rng(number).integers(400, 600, (*SIZE, count))
    values[..., -1] += 300 * disc(number)
    values[..., -2] -= 200 * disc(number)
    return values.astype(np.uint16)


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix.lower() == ".tif":
        tifffile.imwrite(path, values, photometric="minisblack")
    else:
        Image.fromarray(values).save(path)
    return path


def draw(root, patterns, mask, names, folder="train", values=bands_of):
    """Images in files by patterns, whose first part is `{split}`, and masks by another one."""
    patterns = patterns.split(",")
    for number, stem in enumerate(names):
        channels = values(number, len(patterns))
        for index, pattern in enumerate(patterns):
            write(root / pattern.format(split=folder, stem=stem), channels[..., index])
        if mask:
            write(root / mask.format(split=folder, stem=stem), 255 * disc(number).astype(np.uint8))
    return root


def found(root, **options):
    collection = find_samples(str(root), **{"training": True} | options)
    return collection, collection.samples


def is_right(samples, count):
    """Each image has its own channels in their order, and its own mask."""
    for row in samples.itertuples():
        number = int(row.id.split("_")[0][1:])
        values = readers.read_values(row.layers, count)
        assert (values == bands_of(number, count)).all(), row.id
        assert (row.mask.read(SIZE)[0] == disc(number)).all(), row.id


# --------------------------------------------------------------------------------------------------
#  One file for each band
# --------------------------------------------------------------------------------------------------

NAMES = [f"p{number}_x" for number in range(4)]
RED_NIR = "{split}_red/red_{stem}.TIF,{split}_green/green_{stem}.TIF,{split}_nir/nir_{stem}.TIF"
LAYOUTS = {  # name: (files, masks, what is recognised)
    "suffixes": (
        "images/{stem}_B8A.tif,images/{stem}_B02.tif,images/{stem}_B11.tif",
        "masks/{stem}.png",
        "{stem}_B02.tif,{stem}_B8A.tif,{stem}_B11.tif",
    ),
    "one folder": (
        "{stem}_red.png,{stem}_nir.png", "{stem}_mask.png", "{stem}_red.png,{stem}_nir.png",
    ),
    "38-Cloud": (
        RED_NIR, "{split}_gt/gt_{stem}.TIF",
        "train_red/red_{stem}.TIF,train_green/green_{stem}.TIF,train_nir/nir_{stem}.TIF",
    ),
    "folders": (
        "B02/{stem}.tif,B03/{stem}.tif", "masks/{stem}.tif", "B02/{stem}.tif,B03/{stem}.tif",
    ),
    "On Cloud N": (
        "{split}_features/{stem}/B02.tif,{split}_features/{stem}/B08.tif",
        "{split}_labels/{stem}.tif",
        "{stem}/B02.tif,{stem}/B08.tif",
    ),
    "floods": (
        "{split}_features/{stem}_vh.tif,{split}_features/{stem}_vv.tif",
        "{split}_labels/{stem}.tif",
        "{stem}_vh.tif,{stem}_vv.tif",
    ),
    "scenes": (
        "{split}/{stem}/{stem}_B2.TIF,{split}/{stem}/{stem}_B10.TIF",
        "{split}/{stem}/{stem}_mask.png",
        "{stem}_B2.TIF,{stem}_B10.TIF",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bands_are_recognised_by_their_names(layout, tmp_path, capsys):
    files, mask, expected = LAYOUTS[layout]
    draw(tmp_path, files, mask, NAMES)
    collection, samples = found(tmp_path)
    count = len(expected.split(","))
    assert f"channels: {count} files for each image, --channels '{expected}'" in (
        capsys.readouterr().out
    )
    assert collection.bands == tuple(expected.split(","))
    assert sorted(samples.id) == NAMES
    if layout != "suffixes":
        is_right(samples, count)
    _, named = found(tmp_path, channels=expected)  # the printed flag gives the same
    assert named.layers.tolist() == samples.layers.tolist()


def test_bands_have_the_order_of_the_flag(tmp_path):
    draw(tmp_path, "images/{stem}_B8A.tif,images/{stem}_B02.tif", "masks/{stem}.png", NAMES)
    _, samples = found(tmp_path, channels="{stem}_B8A.tif, {stem}_B02.tif")
    is_right(samples, 2)


@pytest.mark.parametrize("test", ["test_{}", "testing_{}"])
def test_a_model_finds_the_bands_of_test_images_in_their_own_folders(tmp_path, test):
    draw(tmp_path / "a", RED_NIR, "{split}_gt/gt_{stem}.TIF", NAMES)
    draw(tmp_path / "b", RED_NIR.replace("{split}_", test.format("")), None, ["p7_x"])
    collection, _ = found(tmp_path / "a")
    _, samples = found(tmp_path, training=False, channels=",".join(collection.bands))
    assert samples.id.tolist() == ["p7_x"]
    assert (readers.read_values(samples.layers[0], 3) == bands_of(0, 3)).all()
    _, samples = found(tmp_path)  # which are left out of the training
    assert sorted(samples.id) == NAMES


def test_bands_in_a_folder_of_the_split_are_found_from_within(tmp_path):
    draw(tmp_path, "{split}/{stem}_vv.tif,{split}/{stem}_vh.tif", None, NAMES, "test")
    patterns = "train/{stem}_vv.tif,train/{stem}_vh.tif"
    for root in (tmp_path, tmp_path / "test"):
        _, samples = found(root, training=False, channels=patterns)
        assert sorted(samples.id) == NAMES


def test_masks_next_to_a_folder_of_bands(tmp_path):
    draw(tmp_path, "train/{stem}_vh.tif,train/{stem}_vv.tif", "train_masks/{stem}.png", NAMES)
    is_right(found(tmp_path / "train")[1], 2)


@pytest.mark.parametrize("stem", ["p{}_x", "p{}_a_long_name_of_many_words"])
def test_bands_with_a_csv_of_rle(tmp_path, stem):
    names = [stem.format(number) for number in range(4)]
    draw(tmp_path, "train/{stem}_B02.tif,train/{stem}_B03.tif", None, names)
    rows = [(name, rle_encode(disc(number)), 40, 60) for number, name in enumerate(names)]
    table = pd.DataFrame(rows, columns=["id", "rle", "height", "width"])
    table.to_csv(tmp_path / "train.csv", index=False)
    _, samples = found(tmp_path)
    assert sorted(samples.id) == names
    is_right(samples, 2)


def test_bands_with_a_folder_of_masks_for_each_class(tmp_path):
    draw(tmp_path, "images/{stem}_vh.tif,images/{stem}_vv.tif", "masks/road/{stem}.png", NAMES)
    draw(tmp_path, "images/{stem}_vh.tif,images/{stem}_vv.tif", "masks/water/{stem}.png", NAMES)
    collection, samples = found(tmp_path)
    assert collection.classes.names == ("road", "water")
    is_right(samples, 2)


@pytest.mark.parametrize(
    ("patterns", "masks"),
    [
        ("images/{stem}_red.png,images/{stem}_blue.png", "masks/{stem}_{band}.png"),
        ("images/{stem}_left.png,images/{stem}_right.png", "masks/{stem}_{band}.png"),
    ],
)
def test_images_whose_names_end_in_colours_are_no_bands_where_each_has_a_mask(
    tmp_path, patterns, masks
):
    for band in (0, 1):
        pattern = patterns.split(",")[band]
        name = masks.replace("{band}", pattern.split("_")[-1].removesuffix(".png"))
        draw(tmp_path, pattern, name, NAMES, values=lambda n, _: bands_of(n, 2).astype(np.uint8))
    collection, samples = found(tmp_path)
    assert collection.bands == ()
    assert len(samples) == 8


def test_colour_photographs_are_no_bands(tmp_path):
    for number, name in enumerate(NAMES):
        for colour in ("red", "blue"):
            write(tmp_path / "images" / f"{name}_{colour}.jpg", np.zeros((*SIZE, 3), np.uint8))
            write(tmp_path / "masks" / f"m_{name}_{colour}.png", disc(number))
    assert found(tmp_path)[0].bands == ()


# --------------------------------------------------------------------------------------------------
#  Bands that are refused
# --------------------------------------------------------------------------------------------------


def refused(*words, **options):
    with pytest.raises(UserError) as error:
        find_samples(**{"training": True} | options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("channels", ["auto", "{stem}_B02.tif,{stem}_B03.tif,{stem}_B04.tif"])
def test_an_image_that_lacks_a_band_is_named(tmp_path, channels):
    patterns = "images/{stem}_B02.tif,images/{stem}_B03.tif,images/{stem}_B04.tif"
    draw(tmp_path, patterns, "masks/{stem}.png", NAMES)
    (tmp_path / "images" / "p2_x_B03.tif").unlink()
    refused("p2_x has no p2_x_B03.tif; add the files", data=str(tmp_path), channels=channels)


def test_patterns_without_files_and_words_without_patterns_are_refused(tmp_path):
    draw(tmp_path, "images/{stem}_B02.tif,images/{stem}_B03.tif", "masks/{stem}.png", NAMES)
    data = str(tmp_path)
    refused("no file fits {stem}_b.tif", "images/ (p0_x_B02", data=data, channels="{stem}_b.tif")
    refused("--channels B02,B03", "{stem}_B02.tif,{stem}_B03.tif", data=data, channels="B02,B03")
    file = str(tmp_path / "images" / "p0_x_B02.tif")
    refused("several files", data=file, channels="{stem}_B02.tif,{stem}_B03.tif", training=False)


def test_an_image_without_a_mask_is_named_by_its_id(tmp_path):
    """Its own folder is no folder of images, which would be left out."""
    draw(tmp_path, "train/{stem}/B02.tif,train/{stem}/B03.tif", "train_labels/{stem}.png", NAMES)
    (tmp_path / "train_labels" / "p2_x.png").unlink()
    refused("1 of 4 images have no mask (3 pairs are complete): p2_x; ", data=str(tmp_path))


def test_bands_of_different_size_are_one_line(tmp_path):
    draw(tmp_path, "images/{stem}_vv.tif,images/{stem}_vh.tif", "masks/{stem}.png", NAMES)
    write(tmp_path / "images" / "p1_x_vv.tif", np.zeros((20, 30), np.uint16))
    _, samples = found(tmp_path)
    samples = scan(samples, Classes())
    config = ModelConfig(channels=2, mean=(0.5,) * 2, std=(0.2,) * 2, value_range=(0.0, 999.0))
    with pytest.raises(UserError, match="1 of 4 pairs cannot be used: .*") as error:
        decode_pairs(samples, config, 0)
    assert re.search(r"p1_x_vv.tif: is 30x20, but \S*p1_x_vh.tif is 60x40; ", str(error.value))


def test_more_than_64_channels_are_refused_with_a_flag_that_names_fewer_files(tmp_path):
    times = "train/{stem}/band_08.npy,train/{stem}/band_09.npy,train/{stem}/band_10.npy"
    draw(tmp_path, times, None, NAMES)
    for path in tmp_path.glob("train/*/*.npy"):
        np.save(path, np.zeros((96, 128, 24), np.float32))
    for number, name in enumerate(NAMES):
        write(tmp_path / f"train/{name}/human_pixel_masks.npy", np.eye(96, 128, number)[..., None])
    message = "--channels: 72 channels; an image has from 1 to 64: choose files, such as "
    flag = "{stem}/band_08.npy,{stem}/band_09.npy"
    with pytest.raises(UserError, match=message) as error:
        load(str(tmp_path), **LOADED)
    assert str(error.value).endswith(f"--channels '{flag}'")
    load(str(tmp_path), **LOADED | {"channels": flag})


# --------------------------------------------------------------------------------------------------
#  A manifest
# --------------------------------------------------------------------------------------------------


def test_a_manifest_lists_the_files_of_an_image(tmp_path, capsys):
    draw(tmp_path, "a/{stem}.tif,b/{stem}.tif,c/{stem}.tif", "m/{stem}.png", NAMES)
    rows = [(f"a/{n}.tif; b/{n}.tif;c/{n}.tif", f"m/{n}.png") for n in NAMES]
    pd.DataFrame(rows, columns=["image", "mask"]).to_csv(tmp_path / "pairs.csv", index=False)
    collection, samples = found(tmp_path / "pairs.csv")
    is_right(samples, 3)
    assert collection.bands == ("p0_x.tif",) * 3
    loaded, _ = load(str(tmp_path / "pairs.csv"), **LOADED)
    assert loaded.channels == 3
    assert len(loaded.value_range) == 6, "each band has its own black and white: no colours"
    channels = ",".join(collection.bands)  # as the model has it
    _, again = found(tmp_path / "pairs.csv", training=False, channels=channels)
    assert again.layers.tolist() == samples.layers.tolist()
    refused("column image", data=str(tmp_path / "a"), training=False, channels=channels)
    rows[1] = ("a/p1_x.tif;b/lost.tif", "m/p1_x.png")
    pd.DataFrame(rows, columns=["image", "mask"]).to_csv(tmp_path / "pairs.csv", index=False)
    refused("1 images are not there: row 3", "lost.tif", data=str(tmp_path / "pairs.csv"))


# --------------------------------------------------------------------------------------------------
#  Arrays
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 2])
def test_a_number_of_channels_tells_the_axis(tmp_path, axis):
    values = bands_of(0, 30)  # 40 or 60 may be channels, too
    path = write(tmp_path / "images" / "a.npy", np.moveaxis(values, 2, axis))
    with pytest.raises(UserError, match=r"first axis or the last; name their number: --channels"):
        readers.read_header(path)
    assert (readers.read_values(path, 30) == values).all()
    write(tmp_path / "images" / "b.npy", np.moveaxis(values, 2, axis))
    for name in "ab":
        write(tmp_path / "masks" / f"{name}.png", disc(0))
    collection, _ = load(str(tmp_path), **LOADED | {"channels": "30"})
    assert collection.channels == 30
    assert collection.samples.height.tolist() == [40, 40]
    np.save(path, np.zeros((30, 9, 30)))
    with pytest.raises(UserError, match=r"save it as \(height, width, channels\)"):
        readers.read_values(path, 30)


def test_axes_of_length_one_are_left_out(tmp_path):
    values = bands_of(0, 6)
    for array in (values[None], values[..., None], values[:, :, None], values[None, ..., None]):
        assert (readers.read_values(write(tmp_path / "a.npy", array), 6) == values).all()


# --------------------------------------------------------------------------------------------------
#  Masks in arrays
# --------------------------------------------------------------------------------------------------


def with_masks(root, make):
    """Images with a mask in an array each: `make(number)`."""
    for number, name in enumerate(NAMES):
        write(root / "images" / f"{name}.png", np.full((*SIZE, 3), 50 + number, np.uint8))
        write(root / "masks" / f"{name}.npy", make(number))
    return root


BINARY = {
    "bool": disc,
    "0 and 255": lambda number: 255 * disc(number).astype(np.uint8),
    "int64": lambda number: disc(number).astype(np.int64),
    "float64": lambda number: disc(number).astype(np.float64),
    "(h, w, 1)": lambda number: disc(number)[..., None],
    "(1, h, w)": lambda number: disc(number)[None],
    "(h, w, 1, 1)": lambda number: disc(number)[..., None, None],
}


@pytest.mark.parametrize("kind", BINARY)
def test_masks_in_arrays(tmp_path, kind):
    with_masks(tmp_path, BINARY[kind])
    _, samples = found(tmp_path)
    for row in samples.itertuples():
        assert (row.mask.read(SIZE) == disc(int(row.id[1]))[None]).all()


def test_integers_are_label_maps_and_no_data_is_ignored(tmp_path):
    def labels(number):
        values = np.where(disc(number), 2, 7).astype(np.int32)
        values[:5], values[-1] = 3, -1
        return values

    collection, samples = found(with_masks(tmp_path, labels))
    assert collection.classes.values == ("2", "3", "7")
    assert collection.classes.exclusive
    for row in samples.itertuples():
        read, expected = row.mask.read(SIZE), labels(int(row.id[1]))
        assert (np.array([2, 3, 7])[read[:-1]] == expected[:-1]).all()
        assert (read[-1] == 255).all()


def planes(number, axis=2):
    """Three planes: the mask, its lower half, nothing."""
    mask = disc(number)
    lower = mask & (np.arange(SIZE[0])[:, None] >= 20)
    return np.stack([mask, lower, np.zeros_like(mask)], axis).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 2])
def test_several_planes_are_asked_about(tmp_path, axis):
    with_masks(tmp_path, lambda number: planes(number, axis))
    refused("p0_x.npy: holds 3 planes", "--soft true", "--classes one", data=str(tmp_path))
    refused("holds 3 planes", data=str(tmp_path), classes="a,b")
    _, samples = found(tmp_path, classes="one")
    assert (samples["mask"][1].read(SIZE) == disc(1)[None]).all()
    collection, samples = found(tmp_path, classes="all,low,none")
    assert collection.classes == Classes(("all", "low", "none"), ("all", "low", "none"))
    assert (samples["mask"][1].read(SIZE) == planes(1, 0)).all()
    again = find_samples(str(tmp_path), classes=collection.classes)  # scored
    assert again.classes == collection.classes
    assert (again.samples["mask"][1].read(SIZE) == planes(1, 0)).all()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_objects_in_planes_may_differ_in_number(tmp_path, suffix):
    def objects(number):
        return np.stack([disc(number)] * (1 + number), 2)

    with_masks(tmp_path, objects)
    if suffix == ".npz":
        for path in (tmp_path / "masks").iterdir():
            np.savez_compressed(path.with_suffix(""), np.load(path))
            path.unlink()
    refused("p3_x", "holds 4 planes", data=str(tmp_path))
    _, samples = found(tmp_path, classes="one")
    assert (samples["mask"][3].read(SIZE) == disc(3)[None]).all()


# --------------------------------------------------------------------------------------------------
#  Soft masks
# --------------------------------------------------------------------------------------------------


def test_shares_survive_eight_bits():
    shares = np.concatenate([np.linspace(0, 1, 1001), [0.5, 1e-6, 1 - 1e-6]]).astype(np.float32)
    coded = images.encode_shares(shares)
    assert coded.max() < 255, "255 is ignored"
    decoded = images.decode_shares(torch.from_numpy(coded).float())
    assert np.abs(decoded.numpy() - shares).max() < 1 / 250
    hard = np.array([0, 1], np.uint8)
    assert (images.encode_shares(hard.astype(np.float32)) == hard).all()
    assert (images.harden(coded) == (shares >= 0.4981)).all()
    assert images.harden(np.array([0, 1, 2, 127, 128, 254, 255])).tolist() == [
        0,
        1,
        0,
        0,
        1,
        1,
        255,
    ]


def soft_loss(shares, soft):
    """The loss of a fixed prediction."""
    config = train.Config(soft=soft)
    logits = torch.linspace(-2, 2, shares.numel()).reshape(shares.shape)
    return train.loss(logits, shares, config)


def test_the_loss_of_hard_masks_is_the_same_and_that_of_shares_is_of_the_mean():
    mask = torch.tensor([0, 1, 255, 1, 0, 0, 1, 255, 1]).float().reshape(1, 1, 3, 3)
    assert soft_loss(mask, True) == soft_loss(mask, False)
    half = torch.full((1, 1, 1, 1), 128.0)
    entropy = soft_loss(half, True) - (1 - (2 * 0.1192 * 0.5 + 1) / (0.1192 + 0.5 + 1))
    assert abs(entropy - (2 * 0.5 + np.log(1 + np.exp(-2)))) < 1e-3


def test_soft_masks_train_on_the_mean_and_score_from_half_on(tmp_path, capsys):
    with_masks(tmp_path, planes)
    collection, opener = load(str(tmp_path), **LOADED | {"soft": True})
    assert "a pixel has the mean of its shares" in capsys.readouterr().out
    _, row, *_ = collection.samples.itertuples()
    mean = planes(1).mean(2)
    config = ModelConfig(height=40, width=60)
    shares = images.decode_shares(torch.from_numpy(read_pair(row, config, opener)[1]).float())[0]
    assert np.abs(shares.numpy() - mean).max() < 1 / 250
    assert (read_sample(row)[1][0] == (mean >= 0.5)).all()
    assert row.share == (mean >= 0.5).mean()


def test_several_files_of_an_image_are_averaged(tmp_path):
    for number, name in enumerate(NAMES):
        write(tmp_path / "images" / f"{name}.png", np.zeros((*SIZE, 3), np.uint8))
        for plane in range(3):
            mask = 255 * planes(number)[..., plane]
            write(tmp_path / "masks" / f"{name}_mask_{plane}.png", mask)
    names = [f"{{stem}}_mask_{plane}.png" for plane in range(3)]
    refused(f"average annotators: --masks '{','.join(names)}' --classes", data=str(tmp_path))
    _, samples = found(tmp_path, masks=",".join(names), classes="one", soft=True)
    read = samples["mask"][2].read(SIZE, soft=True)[0]
    assert (read == images.encode_shares(planes(2).mean(2).astype(np.float32))).all()


def test_floats_are_shares_or_cut_at_half(tmp_path, capsys):
    def shares(number):
        return planes(number).mean(2).astype(np.float32)  # 0, 1/3, 2/3

    with_masks(tmp_path, shares)
    _, samples = found(tmp_path)
    assert "3 shares of 0 to 1 (--soft true trains on them), foreground is above 0.5" in (
        capsys.readouterr().out
    )
    mask = samples["mask"][1]
    assert (mask.read(SIZE)[0] == (shares(1) > 0.5)).all()
    assert (mask.read(SIZE, soft=True) == mask.read(SIZE)).all()
    _, samples = found(tmp_path, soft=True)
    soft = samples["mask"][1].read(SIZE, soft=True)[0]
    assert (soft == images.encode_shares(shares(1))).all()


def test_an_annotator_who_ignores_a_pixel_does_not_count(tmp_path):
    values = MaskValues(foreground=(1,), ignored=(255,), soft=True)
    array = np.zeros((*SIZE, 2), np.uint8)
    array[0, :4] = (1, 255), (1, 0), (255, 255), (0, 0)
    write(tmp_path / "m.npy", array)
    mask = Planes((MaskFile(tmp_path / "m.npy", values),), soft=True)
    assert mask.read(SIZE, soft=True)[0, 0, :4].tolist() == [1, 128, 255, 0]


def test_soft_is_refused_where_there_is_nothing_to_average(tmp_path):
    with_masks(tmp_path, lambda number: np.where(disc(number), 2, 7 + (number > 1)))
    refused("--soft true: the masks are label maps", data=str(tmp_path), soft=True)
    rows = [(f"images/{name}.png", rle_encode(disc(n))) for n, name in enumerate(NAMES)]
    pd.DataFrame(rows, columns=["image", "mask"]).to_csv(tmp_path / "pairs.csv", index=False)
    data = str(tmp_path / "pairs.csv")
    refused("--soft true: there are no mask files", data=data, soft=True)


def test_a_plane_is_read_by_its_number(tmp_path):
    path = write(tmp_path / "m.npy", planes(0))
    assert arrays.count_planes(path) == 3
    with pytest.raises(UserError, match=r"m\.npy: holds 3 planes"):
        readers.open_image(path)
    plane = readers.open_image(arrays.planes_of(path)[1])
    assert (np.asarray(plane) == planes(0)[..., 1]).all()


# --------------------------------------------------------------------------------------------------
#  The page in the documentation, executed
# --------------------------------------------------------------------------------------------------

SIX = ("B02", "B03", "B04", "B08", "B11", "B12")


def commands(title):
    """The commands below a title of docs/rasters.md, without the download."""
    page = (KIT / "docs" / "rasters.md").read_text().replace("\\\n", " ")
    section = re.search(rf"^### {title}.*?\n(.*?)(?=^##)", page, re.DOTALL | re.MULTILINE)[1]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def execute(command, root, *flags):
    """Run a command of the documentation with the data in `root/input`; what it printed."""
    words = [word.replace("../input", str(root / "input")) for word in command]
    return succeed(*words, *flags, cwd=root)


def test_contrails_from_the_download_to_the_submission(tmp_path):
    root = tmp_path / "input" / "google-research-identify-contrails-reduce-global-warming"
    y, x = np.mgrid[:96, :96]
    records, rng = 0, np.random.default_rng(0)
    for folder, count in (("train", 6), ("validation", 2), ("test", 3)):
        for _ in range(count):
            records += 1
            record = root / folder / str(1000834164244036115 + 7919 * records)
            mask = np.abs(y - x // 2 - 4 * records) < 4
            for band in range(8, 17):
                values = rng.normal(280, 5, (96, 96, 8)).astype(np.float32)
                values[..., 4] += 9 * mask
                write(record / f"band_{band:02}.npy", values)
            if folder != "test":
                write(record / "human_pixel_masks.npy", mask[..., None].astype(np.int32))
            if folder == "train":
                each = np.stack([mask, mask & (x > 40), mask & (x > 50)], 2)[:, :, None]
                write(record / "human_individual_masks.npy", each.astype(np.int32))
    ids = sorted(path.name for path in (root / "test").iterdir())
    sample = pd.DataFrame({"record_id": ids, "encoded_pixels": ["1 1", "-", "-"]})
    sample.to_csv(root / "sample_submission.csv", index=False)
    training, predicting, check = commands("Contrails")
    printed = execute(training, tmp_path, *TINY, "--epochs", 2)
    assert "channels: 24 in each image" in printed
    assert "2 images in val validate" in printed
    assert "would refuse" not in printed
    execute(predicting, tmp_path, "--threshold", 1)
    written = pd.read_csv(tmp_path / "predictions" / "submission.csv", dtype=str)
    assert written.columns.tolist() == ["record_id", "encoded_pixels"]
    assert written.record_id.tolist() == ids
    assert set(written.encoded_pixels) == {"-"}
    printed = execute(check, tmp_path)
    assert "6 files of 0, 1: foreground is 1; a pixel has the mean of its shares" in printed
    options = LOADED | {"masks": "{stem}/human_pixel_masks.npy"}
    for flags, question in (
        (LOADED, "{stem}/human_individual_masks.npy and {stem}/human_pixel_masks.npy fit"),
        (options, "72 channels; an image has from 1 to 64: choose files, such as --channels"),
    ):
        with pytest.raises(UserError, match=re.escape(question)):
            load(str(root), **flags)


def test_six_bands_in_six_files_of_which_the_first_three_say_nothing(tmp_path):
    root, rng = tmp_path / "input" / "scenes", np.random.default_rng(0)
    y, x = np.mgrid[:64, :96]
    for number in range(26):
        folder, name = "train" if number < 22 else "test", f"s{number:02}"
        cy, cx, radius = rng.uniform(15, 50), rng.uniform(20, 75), rng.uniform(9, 18)
        mask = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        values = rng.normal(500, 60, (64, 96, 6))
        values[..., 4] += 120 * mask
        values[..., 5] -= 90 * mask
        for index, band in enumerate(SIX):
            write(root / folder / f"{name}_{band}.tif", values[..., index].astype(np.uint16))
        place = root / "train_masks" if number < 22 else root / "truth"
        write(place / f"{name}.png", 255 * mask.astype(np.uint8))
    training, predicting = commands("Six bands")
    flags = ("--epochs", 14, "--lr", "2e-3", "--folds", 5)
    printed = execute(training, tmp_path, *TINY, *flags)
    patterns = ",".join(f"{{stem}}_{band}.tif" for band in SIX)
    assert f"channels: 6 files for each image, --channels '{patterns}'" in printed
    execute(predicting, tmp_path, "--masks", root / "truth")
    scores = json.loads((tmp_path / "predictions" / "metrics.json").read_text())
    assert scores["mean"]["Dice"] >= 90
    rows = pd.read_csv(tmp_path / "predictions" / "submission.csv")
    assert rows.id.tolist() == ["s22", "s23", "s24", "s25"]
    config = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    assert tuple(config["bands"]) == tuple(patterns.split(","))
