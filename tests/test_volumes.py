"""Slices: volumes in folders, pages and manifests, their neighbours, folds, and stacks of masks."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import ENCODER, KIT
from PIL import Image

import infer
import train
from kit.cli import parse
from kit.config import Classes, ModelConfig
from kit.data import images, rasters, readers, rle, tiffs, volumes
from kit.data.classes import write_mask
from kit.data.folds import assign_folds
from kit.data.rasters import Layer
from kit.data.samples import LOADED, find_samples, load, read_sample
from kit.errors import UserError
from kit.results import predict

SIZE = (24, 32)


def levels(number, size=SIZE):
    """A slice of one grey level, which tells its number."""
    return np.full(size, number, np.uint8)


def square(number=0, size=SIZE):
    mask = np.zeros(size, np.uint8)
    mask[4:14, 4 + number % 8 : 16 + number % 8] = 255
    return mask


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_volumes(root, lengths=(4, 3), name="slice_{}.png", first=1):
    """images/caseV and masks/caseV; slice n of volume v has the grey level 50 * v + n."""
    for volume, length in enumerate(lengths):
        for number in range(first, first + length):
            place = f"case{volume}/{name.format(number)}"
            save(root / "images" / place, levels(50 * volume + number))
            save(root / "masks" / place, square(number))


def write_stacks(root, lengths=(5, 4), **options):
    """Stacks of images and of masks."""
    for kind, draw in (("images", levels), ("masks", square)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for volume, length in enumerate(lengths):
            pages = np.stack([draw(50 * volume + n) for n in range(1, length + 1)])
            tifffile.imwrite(
                root / kind / f"case{volume}.tif", pages, photometric="minisblack", **options
            )


def settings(root, **changes):
    config = train.Config()
    return {name: getattr(config, name) for name in LOADED} | {"data": str(root)} | changes


def found(root, steps=(1,), **options):
    return find_samples(str(root), neighbours=steps, **({"training": True} | options)).samples


def grey_levels(samples):
    """{id: the level of each channel}."""
    sample = {
        row.id: readers.read_values(row.layers, len(row.layers)) for row in samples.itertuples()
    }
    return {name: values[0, 0].tolist() for name, values in sample.items()}


def refused(*words, call):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------------------------------
#  Which slices are neighbours
# --------------------------------------------------------------------------------------------------


def test_steps_of_neighbours():
    assert rasters.parse_steps("") == rasters.parse_steps("0") == ()
    assert rasters.parse_steps("1") == (1,)
    assert rasters.parse_steps("2") == (1, 2)
    assert rasters.parse_steps("3,1") == (1, 3)
    for text in ("a", "-1", "1,", "0,1", "1.5"):
        refused("--neighbours", "such as", call=lambda text=text: rasters.parse_steps(text))


@pytest.mark.parametrize("name", ["slice_{}.png", "{:03d}.png", "slice_{:04d}_266_266_1.50.png"])
def test_neighbours_are_channels_repeated_at_the_ends_and_never_of_another_volume(tmp_path, name):
    write_volumes(tmp_path, (11, 3), name)
    samples = found(tmp_path)
    assert [len(layers) for layers in samples.layers] == [3] * 14
    channels = sorted(grey_levels(samples).values())
    first = [[max(n - 1, 1), n, min(n + 1, 11)] for n in range(1, 12)]  # 9, 10, 11: by number
    assert channels == sorted([*first, [51, 51, 52], [51, 52, 53], [52, 53, 53]])


def test_two_steps_before_and_after(tmp_path):
    write_volumes(tmp_path, (5, 5))
    assert [1, 2, 3, 4, 5] in grey_levels(found(tmp_path, (1, 2))).values()
    assert [1, 1, 1, 2, 3] in grey_levels(found(tmp_path, (1, 2))).values()
    assert [1, 3, 4, 5, 5] in grey_levels(found(tmp_path, (1, 3))).values()


def test_a_slice_without_a_mask_is_still_a_neighbour(tmp_path):
    write_volumes(tmp_path, (5, 5))
    for path in (tmp_path / "masks").rglob("slice_3.png"):
        path.unlink()
    samples = found(tmp_path, missing="leave_out")
    assert len(samples) == 8
    assert [1, 2, 3] in grey_levels(samples).values()


def test_gaps_are_said(tmp_path, capsys):
    write_volumes(tmp_path, (6, 6))
    for kind in ("images", "masks"):
        (tmp_path / kind / "case1/slice_4.png").unlink()
    assert [52, 53, 55] in grey_levels(found(tmp_path)).values()
    printed = capsys.readouterr().out
    assert "gaps in the numbering" in printed
    assert "case1 after 3" in printed
    assert "case0 after" not in printed


def test_every_second_number_is_no_gap(tmp_path, capsys):
    write_volumes(tmp_path, (4, 4))
    for path in sorted((tmp_path).rglob("slice_*.png"), reverse=True):
        path.rename(path.with_name(f"slice_{2 * int(path.stem[6:])}.png"))
    found(tmp_path)
    assert "gaps" not in capsys.readouterr().out


def test_a_manifest_names_volume_and_slice(tmp_path):
    rows = []
    for number, letter in enumerate("bdac"):  # names say nothing
        save(tmp_path / f"i{letter}.png", levels(number + 1))
        save(tmp_path / f"m{letter}.png", square(number))
        rows.append((f"i{letter}.png", f"m{letter}.png", "xy"[number // 2], 10 - number))
    table = pd.DataFrame(rows, columns=["image", "mask", "volume", "slice"])
    table.to_csv(tmp_path / "pairs.csv", index=False)
    channels = grey_levels(found(tmp_path / "pairs.csv"))
    assert channels == {"ib": [2, 1, 1], "id": [2, 2, 1], "ia": [4, 3, 3], "ic": [4, 4, 3]}
    table.assign(slice="top").to_csv(tmp_path / "pairs.csv", index=False)
    refused("column slice", "'top'", call=lambda: found(tmp_path / "pairs.csv"))
    table.drop(columns="slice").to_csv(tmp_path / "pairs.csv", index=False)
    refused("no column slice", call=lambda: found(tmp_path / "pairs.csv"))


# --------------------------------------------------------------------------------------------------
#  Stacks
# --------------------------------------------------------------------------------------------------

KINDS = {
    "pages": {},
    "imagej": {"imagej": True},
    "one header": {"truncate": True},
    "deflate": {"compression": "zlib"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_of_a_tiff_are_slices_and_those_of_its_mask_their_masks(tmp_path, capsys, kind):
    write_stacks(tmp_path, **KINDS[kind])
    samples = found(tmp_path, ())
    assert samples.id.tolist() == [f"case{v}_{n:04d}" for v in (0, 1) for n in range(1, 6 - v)]
    assert "2 files of 4 to 5 slices" in capsys.readouterr().out
    for row in samples.itertuples():
        image, mask = read_sample(row)
        number = int(row.id[4]) * 50 + int(row.id[-4:])
        assert image[0, 0].tolist() == [number] * 3
        assert np.array_equal(mask, (square(number) > 0)[None])
    assert grey_levels(found(tmp_path))["case1_0001"] == [51, 51, 52]


def test_lzw_pages_and_palettes_need_no_imagecodecs(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for stack in range(2):
            drawn = [levels(n) if kind == "images" else square(n) // 255 for n in range(4)]
            pages = [Image.fromarray(page) for page in drawn]
            if kind == "masks":
                pages = [Image.fromarray(page, "P") for page in drawn]
                for page in pages:
                    page.putpalette([0, 0, 0, 255, 0, 0])
            path = tmp_path / kind / f"s{stack}.tif"
            options = {"append_images": pages[1:], "compression": "tiff_lzw"}
            pages[0].save(path, save_all=True, **options)
    samples = found(tmp_path)
    assert grey_levels(samples)["s0_0002"] == [0, 1, 2]
    assert np.array_equal(samples["mask"][1].read(SIZE), (square(1) > 0)[None])


def test_an_array_is_a_volume_where_its_masks_have_its_shape(tmp_path):
    for kind, draw in (("images", levels), ("masks", square)):
        (tmp_path / kind).mkdir()
        for volume in range(2):
            pages = np.stack([draw(50 * volume + n) for n in range(1, 5)])
            np.save(tmp_path / kind / f"v{volume}.npy", pages)
    samples = found(tmp_path)
    assert grey_levels(samples)["v1_0004"] == [53, 54, 54]
    assert np.array_equal(samples["mask"][2].read(SIZE), (square(3) > 0)[None])


def test_channels_of_a_hyperstack_stay_with_their_slice(tmp_path):
    values = np.arange(2 * 5 * 6 * 7, dtype=np.uint8).reshape(5, 2, 6, 7)
    tifffile.imwrite(tmp_path / "zc.tif", values, imagej=True, metadata={"axes": "ZCYX"})
    tifffile.imwrite(tmp_path / "cz.ome.tif", np.swapaxes(values, 0, 1), metadata={"axes": "CZYX"})
    for name in ("zc.tif", "cz.ome.tif"):
        slices = volumes.list_slices(tmp_path / name)
        assert len(slices) == 5
        assert np.array_equal(readers.read_values(slices[3], 2), np.moveaxis(values[3], 0, 2))
    tifffile.imwrite(tmp_path / "tz.tif", values, imagej=True, metadata={"axes": "TZYX"})
    refused("stack of TZ", call=lambda: volumes.list_slices(tmp_path / "tz.tif"))


def test_pages_are_bands_where_the_mask_has_one(tmp_path):
    write_stacks(tmp_path, (3, 3))
    for path in (tmp_path / "masks").iterdir():
        tifffile.imwrite(path, square())
    samples = found(tmp_path, ())
    assert samples.id.tolist() == ["case0", "case1"]
    assert readers.read_header(samples.layers[0]).channels == 3


def test_a_model_takes_pages_as_slices_where_they_are_not_its_channels(tmp_path):
    tifffile.imwrite(
        tmp_path / "s.tif", np.stack([levels(n) for n in range(4)]), photometric="minisblack"
    )
    options = {"training": False}
    assert len(found(tmp_path, (), channels="4", **options)) == 1
    assert len(found(tmp_path, (), channels="3", **options)) == 4
    assert len(found(tmp_path / "s.tif", (1,), channels="3", **options)) == 4
    assert len(found(tmp_path / "s.tif", (1,), channels="4", **options)) == 1


def test_reading_a_page_decodes_no_other(tmp_path, monkeypatch):
    write_stacks(tmp_path, (4,), compression="zlib")
    decoded = []

    def decode(layer, page, original=tiffs.read_page):
        decoded.append(page.index)
        return original(layer, page)

    monkeypatch.setattr(tiffs, "read_page", decode)
    path = tmp_path / "images/case0.tif"
    readers.read_image((Layer(path, 2),))
    readers.open_image(Layer(path, 1))
    assert decoded == [2, 1]


# --------------------------------------------------------------------------------------------------
#  Folds
# --------------------------------------------------------------------------------------------------


def folds_of(samples, capsys, **options):
    table = samples.assign(share=0.2, shares=[(0.2,)] * len(samples))
    assigned = assign_folds(table, **({"folds": 3, "seed": 0} | options))
    return table.join(assigned), capsys.readouterr().out


def test_a_volume_stays_in_one_fold(tmp_path, capsys):
    write_stacks(tmp_path, (5, 4, 6))
    samples, printed = folds_of(found(tmp_path, ()), capsys)
    assert samples.groupby("volume").fold.nunique().eq(1).all()
    assert "groups: a volume stays in one fold" in printed


def test_the_volumes_of_a_patient_stay_together(tmp_path, capsys):
    for patient, day, number in itertools.product(range(4), range(2), range(3)):
        place = f"case{patient}/case{patient}_day{day}/scans/slice_{number}.png"
        save(tmp_path / "images" / place, levels(number))
        save(tmp_path / "masks" / place, square(number))
    samples, printed = folds_of(found(tmp_path), capsys)
    assert "volumes stay whole: 4, such as case0" in printed
    assert samples.groupby(samples.volume.str.split("/").str[1]).fold.nunique().eq(1).all()


def test_one_volume_is_split_into_blocks_of_slices(tmp_path, capsys):
    write_stacks(tmp_path, (12,))
    samples, printed = folds_of(found(tmp_path), capsys)
    assert "one volume alone, 4 consecutive slices" in printed
    assert samples.fold.diff().ne(0).sum() == 3  # as many blocks as folds


def test_the_users_groups_win(tmp_path, capsys):
    write_stacks(tmp_path, (6, 6))
    samples, printed = folds_of(found(tmp_path), capsys, group="none")
    assert "each image by itself (--group none)" in printed
    assert samples.groupby("volume").fold.nunique().gt(1).all()


def test_a_volume_in_two_folds_is_refused(tmp_path, capsys):
    write_volumes(tmp_path, (3, 3))
    paths = [f"case{v}/slice_{n}.png" for v in (0, 1) for n in (1, 2, 3)]
    table = pd.DataFrame({"image": [f"images/{p}" for p in paths]})
    table["mask"] = [f"masks/{p}" for p in paths]
    table.assign(fold=[0, 0, 0, 1, 1, 0]).to_csv(tmp_path / "p.csv", index=False)
    refused(
        "several folds: images/case1",
        call=lambda: folds_of(found(tmp_path / "p.csv"), capsys),
    )


# --------------------------------------------------------------------------------------------------
#  Bad input
# --------------------------------------------------------------------------------------------------


def test_too_many_neighbours_are_refused(tmp_path):
    write_volumes(tmp_path, (5, 3))
    refused("--neighbours 1,2,3", "case1 (3)", call=lambda: found(tmp_path, (1, 2, 3)))


def test_volumes_of_one_slice_are_refused(tmp_path):
    for name in ("cat", "dog", "tree"):
        save(tmp_path / f"images/{name}.png", levels(1))
        save(tmp_path / f"masks/{name}.png", square())
    refused("--neighbours 1", "have one slice", "manifest", call=lambda: found(tmp_path))


def test_a_model_repeats_the_slices_of_a_small_volume_and_says_so(tmp_path, capsys):
    save(tmp_path / "s_1.png", levels(1))
    samples = found(tmp_path, (1, 2), training=False, channels="1")
    assert grey_levels(samples) == {"s_1": [1, 1, 1, 1, 1]}
    assert "few slices, which are repeated" in capsys.readouterr().out


def test_names_that_differ_in_two_numbers_are_asked_about(tmp_path):
    for place in ("p1_s1", "p1_s2", "p2_s1", "p2_s2"):
        save(tmp_path / f"images/{place}.png", levels(1))
        save(tmp_path / f"masks/{place}.png", square())
    refused("2 numbers", "which is the slice?", call=lambda: found(tmp_path))


def test_a_slice_twice_is_refused(tmp_path):
    write_volumes(tmp_path, (3, 3))
    for kind in ("images", "masks"):
        save(tmp_path / kind / "case0/slice_02.png", square())
    refused("slice 2 twice", "slice_02.png", call=lambda: found(tmp_path))


def test_masks_of_another_number_of_pages_are_refused(tmp_path):
    write_stacks(tmp_path)
    tifffile.imwrite(
        tmp_path / "masks/case1.tif", np.stack([square()] * 3), photometric="minisblack"
    )
    refused("case1.tif: has 3 pages", "has 4", call=lambda: found(tmp_path))


def test_a_damaged_page_is_named_with_its_number(tmp_path):
    write_stacks(tmp_path, (5, 4), compression="zlib")
    path = tmp_path / "images/case0.tif"
    with tifffile.TiffFile(path) as file:
        place = file.pages[2].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(content)
    rows = list(found(tmp_path, ()).itertuples())
    refused("case0.tif (page 3)", call=lambda: read_sample(rows[2]))
    assert read_sample(rows[1])[0][0, 0, 0] == 2


def test_a_slice_of_another_size_is_refused(tmp_path):
    write_volumes(tmp_path, (3, 3))
    save(tmp_path / "images/case0/slice_2.png", levels(2, (30, 30)))
    rows = list(found(tmp_path).itertuples())
    refused("slice_2.png: is 30x30", "32x24", call=lambda: read_sample(rows[0]))


# --------------------------------------------------------------------------------------------------
#  The model
# --------------------------------------------------------------------------------------------------


def test_slices_are_not_red_green_and_blue(tmp_path, capsys):
    write_volumes(tmp_path, (4, 4))
    collection, _ = load(**settings(tmp_path, neighbours="1"))
    assert (collection.channels, collection.neighbours) == (3, (1,))
    config = ModelConfig(neighbours=(1,))
    assert not config.rgb
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :, 0], pixels[:, :4, 1] = 200, 200
    picture = images.to_picture(pixels, config)  # the middle slice
    assert (picture[:, :4] > 250).all()
    assert (picture[:, 4:] == 0).all()


def test_deep_slices_share_one_range(tmp_path):
    for volume, number in itertools.product(range(2), range(4)):
        place = f"case{volume}/slice_{number}.png"
        save(tmp_path / "images" / place, np.arange(768, dtype=np.uint16).reshape(SIZE) + 5)
        save(tmp_path / "masks" / place, square(number))
    collection, _ = load(**settings(tmp_path, neighbours="2"))
    assert collection.channels == 5
    assert len(collection.value_range) == 2


def test_models_of_other_neighbours_are_not_averaged():
    configs = [ModelConfig(neighbours=steps) for steps in ((1,), (2,))]
    refused("neighbours", call=lambda: predict.check_agreement(configs))


# --------------------------------------------------------------------------------------------------
#  From volumes to masks
# --------------------------------------------------------------------------------------------------

SMALL = ("--encoder", ENCODER, "--encoder_weights", "none")
SMALL += ("--height", "32", "--width", "32", "--batch_size", "8", "--comparisons", "false")


def flags_of(kind, *flags):
    """The settings of a command line; a flag that it does not have is left out."""
    pairs = zip(SMALL[::2], SMALL[1::2], strict=True)
    names = {field.name for field in dataclasses.fields(kind)}
    shared = [text for pair in pairs if pair[0][2:] in names for text in pair]
    return parse(kind, "", [*shared, *map(str, flags)])


def fit(root, out, *flags):
    return train.train(flags_of(train.Config, "--data", root, "--out", out, *flags))


def predicted(model, data, out, *flags):
    return infer.infer(
        flags_of(infer.Options, "--model", model, "--data", data, "--out", out, *flags)
    )


def test_a_stack_in_gives_a_stack_of_masks_out(tmp_path):
    write_stacks(tmp_path / "data", (5, 4))
    out = fit(tmp_path / "data", tmp_path / "out", "--epochs", 1, "--neighbours", 1)
    stack = tmp_path / "data/images/case0.tif"
    masks = predicted(out, stack, tmp_path / "one", "--comparisons", "true") / "masks"
    assert [path.name for path in masks.glob("*.*")] == ["case0.tif"]
    assert len(list((tmp_path / "one/comparisons").iterdir())) == 5
    pages = tifffile.imread(masks / "case0.tif")
    assert (pages.shape, pages.dtype) == ((5, *SIZE), np.uint8)
    assert set(np.unique(pages)) <= {0, 255}
    masks = predicted(out, tmp_path / "data/images", tmp_path / "all") / "masks"
    assert sorted(path.name for path in masks.glob("*.*")) == ["case0.tif", "case1.tif"]
    assert np.array_equal(tifffile.imread(masks / "case0.tif"), pages)


def test_pages_of_masks_are_in_order_and_keep_their_palette(tmp_path):
    classes = Classes(("a", "b"), ("3", "7"), True)
    write_stacks(tmp_path, (12,))
    samples = found(tmp_path / "images", (), training=False, channels="3")
    for number, name in enumerate(samples.id):
        mask = np.zeros(SIZE, np.uint8)
        mask[number] = 1
        write_mask(tmp_path, name, mask, classes)
    volumes.join_pages(samples, tmp_path, classes, [("case0_0003", "damaged")])
    assert not (tmp_path / "case0.tif").exists()
    volumes.join_pages(samples, tmp_path, classes, [])
    values = np.stack(
        [np.asarray(readers.open_image(Layer(tmp_path / "case0.tif", n))) for n in range(12)]
    )
    assert [int((page == 7).any(1).argmax()) for page in values] == list(range(12))
    assert set(np.unique(values)) == {3, 7}
    assert not list(tmp_path.glob("case0_*.png"))


def test_submission_rows_are_of_slices(tmp_path):
    write_stacks(tmp_path / "data", (5, 4))
    out = fit(tmp_path / "data", tmp_path / "out", "--epochs", 1)
    images = tmp_path / "data/images"
    predictions = predicted(out, images, tmp_path / "predictions", "--submission", "rle")
    ids = pd.read_csv(predictions / "submission.csv").id.tolist()
    assert ids == [f"case{v}_{n:04d}" for v in (0, 1) for n in range(1, 6 - v)]


def write_moving_discs(root, count, size=32, depth=8):
    """Volumes of two discs in noise that look alike: the one that moves is the foreground."""
    y, x = np.mgrid[:size, :size]
    for number in range(count):
        rng = np.random.default_rng(number)
        places = rng.uniform(6, size - 6, (2, 2))
        angle = rng.uniform(0, 2 * np.pi)
        for z in range(depth):
            pixels, mask = rng.normal(80, 8, (size, size)), np.zeros((size, size), bool)
            for place, moves in zip(places, (True, False), strict=True):
                shift = 3 * z * moves * np.array([np.cos(angle), np.sin(angle)])
                centre = (place + shift) % size
                distance = np.abs(np.stack([y, x]) - centre[:, None, None])
                distance = np.minimum(distance, size - distance)  # around the edge
                disc = np.square(distance).sum(0) < 16
                pixels[disc] += 100
                mask = mask & ~disc | disc & moves
            place = f"case{number}/slice_{z}.png"
            save(root / "images" / place, pixels.clip(0, 255).astype(np.uint8))
            save(root / "masks" / place, np.uint8(255 * mask))


def test_neighbours_tell_what_a_slice_alone_does_not(tmp_path):
    """docs/results.md has the same on larger volumes, in equal minutes."""
    write_moving_discs(tmp_path / "data", 12, depth=6)
    dice = {}
    for neighbours in ("0", "1"):
        options = ("--epochs", 8, "--neighbours", neighbours, "--grow", "false", "--folds", 4)
        options += ("--batch_size", 16, "--lr", 0.005, "--augment", 0)
        out = fit(tmp_path / "data", tmp_path / f"out{neighbours}", *options)
        report = json.loads((out / "metrics.json").read_text())["image"]["all"]
        dice[neighbours] = report["F1"]
    assert dice["1"] > dice["0"] + 10, dice


# --------------------------------------------------------------------------------------------------
#  docs/rasters.md: UW-Madison, from download to submission
# --------------------------------------------------------------------------------------------------

ORGANS = ("large_bowel", "small_bowel", "stomach")


def write_uw_madison(root, cases=(123, 124, 125), test=(130,)):
    """Folders, names and csv of the competition; a day of each case, three slices of 16 bits."""
    rows, ids = ["id,class,segmentation"], ["id,class,predicted"]
    for case in (*cases, *test):
        for number in (1, 2, 3):
            day, split = f"case{case}_day20", "test" if case in test else "train"
            name = f"case{case}/{day}/scans/slice_{number:04d}_32_24_1.50_1.50.png"
            save(root / split / name, 100 + 20 * square(number).astype(np.uint16))
            for organ in ORGANS:
                key = f"{day}_slice_{number:04d},{organ}"
                runs = rle.rle_encode(square(number) > 0, "rows") if organ == "stomach" else ""
                (ids if split == "test" else rows).append(
                    f"{key},{runs if split == 'train' else ''}"
                )
    (root / "train.csv").write_text("\n".join(rows))
    (root / "sample_submission.csv").write_text("\n".join(ids))


def test_uw_madison_of_the_documentation(tmp_path, monkeypatch):
    """Its commands, run on a drawn folder in the layout of the competition."""
    root = tmp_path / "uw-madison-gi-tract-image-segmentation"
    write_uw_madison(root)
    monkeypatch.chdir(tmp_path)
    section = (KIT / "docs/rasters.md").read_text().split("## Slices")[1].split("\n## ")[0]
    commands = [line.split() for line in section.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands] == ["train.py", "infer.py"]
    quick = ["--epochs", "1", "--folds", "2"]
    train.train(flags_of(train.Config, *commands[0][2:], *quick))
    infer.infer(flags_of(infer.Options, *commands[1][2:]))
    submission = pd.read_csv("predictions/submission.csv")
    assert submission.columns.tolist() == ["id", "class", "predicted"]
    ids = [f"case130_day20_slice_{n:04d}" for n in (1, 2, 3)]
    assert sorted(submission.id) == sorted(ids * 3)
    samples = find_samples(str(root), training=True, neighbours=(1,)).samples
    assert samples.volume.nunique() == 3
    assert {len(layers) for layers in samples.layers} == {3}
