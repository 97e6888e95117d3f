"""Images larger than memory: windows, blocks, folds by place, mosaics, scale, GeoTIFFs."""

import csv
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from conftest import TINY, succeed
from PIL import Image

import infer
import train
from kit.cli import parse
from kit.config import Classes, ModelConfig
from kit.data import blocks, rasters, readers, samples
from kit.data.masks import MaskFile, Planes
from kit.data.rasters import Layer, Window
from kit.data.rle import ORDERS, RunLengths, block_runs, join_runs, rle_decode, rle_encode
from kit.errors import UserError
from kit.network.model import TrainedModel
from kit.results import mosaics
from kit.results.predict import predict, predict_images
from utils import load_model

SIZE = (1300, 1560)  # of a small slide: 2 x 2 blocks of 768 or 512 and 792
GEO = {
    33550: ("d", (0.5, 0.5, 0.0)),
    33922: ("d", (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0)),
    34735: ("H", (1, 1, 0, 1, 1024, 0, 1, 1)),
    34737: ("s", "WGS 84 / UTM 11N|"),
}
TAGS = [(code, kind, 0 if kind == "s" else len(v), v, True) for code, (kind, v) in GEO.items()]
KINDS = {
    "tiles": {"tile": (256, 256), "compression": "zlib"},
    "strips": {"rowsperstrip": 37, "compression": "zlib"},
    "planes": {"tile": (128, 256), "planarconfig": "separate"},
    "mapped": {},
}


@pytest.fixture
def small(monkeypatch):
    """Images of over a million pixels are large, and blocks small."""
    monkeypatch.setattr(rasters, "LARGE", 1_000_000)
    monkeypatch.setattr(blocks, "BLOCK", 800)


def draw(seed=0, size=SIZE, count=14):
    """An image with dark discs on bright noise (h, w, 3) uint8, and its mask, bool (h, w)."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(170, 250, (-(-size[0] // 4), -(-size[1] // 4), 3), np.uint8)
    image = cv2.resize(noise, size[::-1])
    mask = np.zeros(size, np.uint8)
    for _ in range(count):
        centre = rng.integers(0, size[1]), rng.integers(0, size[0])
        cv2.circle(mask, tuple(map(int, centre)), int(rng.integers(40, 90)), 1, -1)
    image[mask == 1] //= 3
    return image, mask == 1


def write(path, pixels, **options):
    """A TIFF of (h, w, 3) or (h, w) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photometric = "rgb" if pixels.ndim == 3 else "minisblack"
    pixels = np.moveaxis(pixels, 2, 0) if "planarconfig" in options else pixels
    tifffile.imwrite(path, pixels, photometric=photometric, metadata=None, **options)


def damage(path, tile):
    """Overwrite the start of a tile."""
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].dataoffsets[tile]
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)


def windows(shrink=1):
    rows, columns = (list(blocks.cut_length(length, shrink)) for length in SIZE)
    return [Window(y, x, h, w, SIZE, shrink) for y, h in rows for x, w in columns]


# --------------------------------------------------------------------------------------------------
#  Windows
# --------------------------------------------------------------------------------------------------


def test_blocks_cover_a_length_once_and_none_is_thin():
    for shrink in (1, 3, 4):
        for length in (1, 255, 2048, 2049, 4097, 30000, 40961, 123456):
            cut = list(blocks.cut_length(length, shrink))
            assert cut[0][0] == 0 and sum(size for _, size in cut) == length
            for (start, size), (after, _) in zip(cut, cut[1:], strict=False):
                assert start + size == after and after % (blocks.STEP * shrink) == 0
            assert min(size for _, size in cut) >= min(length, 700 * shrink)
            assert max(size for _, size in cut) <= 2400 * shrink


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_of_a_large_tiff_equals_the_same_of_the_whole(kind, small, tmp_path):
    image, _ = draw()
    write(tmp_path / "a.tif", image, **KINDS[kind])
    for window in [*windows(), Window(5, 300, 700, 1, SIZE), Window(1299, 0, 1, 1560, SIZE)]:
        values = readers.read_values((Layer(tmp_path / "a.tif", window=window),), 3)
        assert np.array_equal(values, window.cut(image))


def test_a_window_at_a_lower_scale_is_the_mean_of_its_pixels(small, tmp_path):
    image, mask = draw()
    write(tmp_path / "a.tif", image, **KINDS["tiles"])
    Image.fromarray(image).save(tmp_path / "a.png")  # is no TIFF, and read as a whole
    whole = rasters.reduce_values(image, 4)
    means = image.reshape(325, 4, 390, 4, 3).mean((1, 3))
    assert np.abs(whole - means).max() <= 0.5
    nearest = mask[2::4, 2::4]
    write(tmp_path / "m.tif", 255 * mask.astype(np.uint8), **KINDS["tiles"])
    for window in windows(4):
        small_part = slice(window.y // 4, None), slice(window.x // 4, None)
        part = MaskFile(tmp_path / "m.tif", window=window)
        part = Planes((part,)).change(MaskFile, values=part.values.__class__(foreground=(255,)))
        read = part.read(window.size)[0]
        assert np.array_equal(read, nearest[small_part][: window.size[0], : window.size[1]])
        for name in ("a.tif", "a.png"):
            values = readers.read_values((Layer(tmp_path / name, window=window),), 3)
            h, w = window.size
            assert np.array_equal(values, whole[small_part][:h, :w])


def test_pages_of_a_large_tiff_are_its_channels(small, tmp_path):
    image, _ = draw()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for band in range(3):
            file.write(image[..., band], metadata=None, **KINDS["tiles"])
    window = windows()[3]
    values = readers.read_values((Layer(tmp_path / "a.tif", window=window),), 3)
    assert np.array_equal(values, window.cut(image))


def test_a_damaged_tile_is_named(small, tmp_path):
    image, _ = draw()
    write(tmp_path / "a.tif", image, **KINDS["tiles"])
    damage(tmp_path / "a.tif", 29)
    good, *_, bad = windows()
    readers.read_values((Layer(tmp_path / "a.tif", window=good),), 3)
    with pytest.raises(UserError, match=r"a.tif: tile 30 of 42 cannot be decoded"):
        readers.read_values((Layer(tmp_path / "a.tif", window=bad._replace(x=0)),), 3)


def test_what_needs_imagecodecs_and_what_is_one_piece_is_refused_with_the_way_out(small, tmp_path):
    image, _ = draw()
    Image.fromarray(image).save(tmp_path / "a.tif", compression="tiff_lzw")
    with pytest.raises(UserError, match="pip install imagecodecs"):
        readers.read_values((Layer(tmp_path / "a.tif", window=windows()[0]),), 3)
    write(tmp_path / "b.tif", image, rowsperstrip=SIZE[0], compression="zlib")
    with pytest.raises(UserError, match="pieces of 1560x1300; save it in tiles of 256x256"):
        readers.open_layers(tmp_path / "b.tif")
    palette = np.zeros((3, 256), np.uint16)
    grey = image[..., 0]
    tifffile.imwrite(tmp_path / "c.tif", grey, photometric="palette", colormap=palette)
    with pytest.raises(UserError, match="PALETTE.*save it as grey or RGB"):
        readers.open_layers(tmp_path / "c.tif")


# --------------------------------------------------------------------------------------------------
#  RLE by blocks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_rle_is_read_and_written_by_blocks_as_the_whole(order, small):
    _, mask = draw()
    mask[:, 400:440] = True  # runs that go on over columns and blocks
    mask[600:660] = True
    text = rle_encode(mask, order)
    assert np.array_equal(rle_decode(text, SIZE, order=order), mask)
    runs = []
    for window in windows():
        block = rle_decode(text, SIZE, order=order, window=window)
        assert np.array_equal(block, window.cut(mask))
        runs.append(block_runs(block == 1, window, order))
    assert join_runs(runs, order) == text
    assert join_runs([run[:0] for run in runs], order) == ""


def test_rle_of_a_huge_image_is_not_expanded():
    size = (1_000_000, 2_000_000)
    text = "1 5 3000003 1000000 999999999990 11"
    window = Window(0, 2, 6, 4, size)
    assert rle_decode(text, size, window=window)[:, 1:3].tolist() == [[0, 1], [0, 1], *[[1, 0]] * 4]


# --------------------------------------------------------------------------------------------------
#  Blocks of a data set
# --------------------------------------------------------------------------------------------------


def hubmap(root, slides=3, train_size=SIZE):
    """The layout of HuBMAP - Hacking the Kidney; returns the masks of the training images."""
    masks, rows, ids = {}, [["id", "encoding"]], [["id", "predicted"]]
    for number in range(slides):
        image, mask = draw(number, train_size)
        name = f"{number}abc{number}f08"
        write(root / "train" / f"{name}.tiff", image, **KINDS["tiles"])
        (root / "train" / f"{name}.json").write_text("[]")
        rows.append([name, rle_encode(mask)])
        masks[name] = mask
    for number in range(2):
        write(root / "test" / f"t{number}.tiff", draw(50 + number)[0], **KINDS["tiles"])
        ids.append([f"t{number}", ""])
    for name, table in (("train", rows), ("sample_submission", ids)):
        with (root / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(table)
    return masks


LOAD = {
    "masks": "auto", "target": "road", "foreground": "", "ignore": "", "rle": "auto",
    "missing": "error", "classes": "auto", "window": "0.5,99.5", "channels": "auto",
    "scale": 1.0, "neighbours": "", "soft": False, "folds": 10, "seed": 0, "group": "",
}  # fmt: skip


def test_slides_are_rows_of_blocks_and_a_slide_is_in_one_fold(small, tmp_path, capsys):
    masks = hubmap(tmp_path)
    collection, opener = samples.load(str(tmp_path), **LOAD)
    table = collection.samples
    assert len(table) == 3 * 4 and table.id.is_unique
    assert table.groupby("image_id").fold.nunique().tolist() == [1, 1, 1]
    assert table.fold.nunique() == 3
    for row in table.itertuples():
        image, mask = samples.read_sample(row)
        assert image.shape[:2] == row.block.size == (row.height, row.width)
        assert np.array_equal(mask[0], row.block.cut(masks[row.image_id]))
    printed = capsys.readouterr().out
    assert "slides: 3 of 3 images (1560x1300), read in blocks" in printed
    assert "RLE columns" in printed
    assert samples.decode_pairs(table, ModelConfig(tiles=True), 0, opener).pair.isna().all()


def test_one_slide_is_split_by_place(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 300)
    image, mask = draw(count=40)
    write(tmp_path / "images/a.tif", image, **KINDS["tiles"])
    write(tmp_path / "masks/a.tif", 255 * mask.astype(np.uint8), **KINDS["tiles"])
    table = samples.load(str(tmp_path), **LOAD)[0].samples
    places = table.block.map(lambda block: block.x)
    assert table.groupby(places).fold.nunique().max() == 1  # whole strips
    strips = table.groupby(places).fold.first().tolist()
    assert strips == sorted(strips)  # neighbours
    assert (table.groupby("fold").share.max() > 0).all()
    assert "split: one slide" in capsys.readouterr().out
    for row in table.itertuples():
        assert np.array_equal(samples.read_sample(row)[1][0], row.block.cut(mask))


def test_blocks_without_foreground_train_as_often_as_those_with(small, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 300)
    for number in range(2):
        image, mask = draw(number, count=1)
        write(tmp_path / f"images/{number}.tif", image, **KINDS["tiles"])
        Image.fromarray(mask).save(tmp_path / f"images/{number}_mask.png")
    table = samples.load(str(tmp_path), **LOAD)[0].samples
    filled = table.share > 0
    assert table.trains[filled].all()
    assert table.trains[~filled].sum() == filled.sum() < (~filled).sum()


def test_scale_reads_all_images_reduced(tmp_path):
    for number in range(4):
        image, mask = draw(number, (203, 304))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"images/{number}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{number}.png")
    table = samples.load(str(tmp_path), **(LOAD | {"scale": 0.33}))[0].samples
    assert {(row.height, row.width) for row in table.itertuples()} == {(68, 102)}
    image, mask = samples.read_sample(next(table.itertuples()))
    assert image.shape == (68, 102, 3) and mask.shape == (1, 68, 102)
    with pytest.raises(UserError, match=r"--scale 0.4: is not 1, 1/2, 1/3"):
        samples.load(str(tmp_path), **(LOAD | {"scale": 0.4}))


# --------------------------------------------------------------------------------------------------
#  Prediction
# --------------------------------------------------------------------------------------------------


def blurring_model(**changes):
    """A model that sees 41 pixels around each, along columns and rows: dark is foreground."""
    options = {"padding_mode": "replicate", "bias": False}
    columns = torch.nn.Conv2d(3, 1, (41, 1), padding=(20, 0), **options)
    rows = torch.nn.Conv2d(1, 1, (1, 41), padding=(0, 20), **options)
    torch.nn.init.constant_(columns.weight, -1 / (3 * 41))
    torch.nn.init.constant_(rows.weight, 1 / 41)
    network = torch.nn.Sequential(columns, rows)
    config = ModelConfig(height=256, width=256, tiles=True, tta=False, precision="32", **changes)
    return TrainedModel(network, config, {}, {})


def predicted(path, model):
    """The mosaic of the file, and the predictions of its blocks put together."""
    table = samples.find_samples(str(path), scale=model.config.scale).samples
    table = mosaics.add_margins(table, [model])
    mosaic = mosaics.Mosaic(list(table.block), model.config, "columns")
    whole = np.zeros((1, *mosaic.size), np.uint8)
    for sample, image, prediction in predict([model], table):
        image, planes, mask = mosaics.finish(sample, image, prediction, model.config)
        assert image.shape[:2] == sample.block.size
        sample.block.cut(whole[0])[:] = planes[0]
        mosaic.add(sample, image, mask)
        finished = mosaic.done(path.parent, sample, comparisons=True)
    assert finished
    return mosaic, whole


def test_blocks_with_margins_are_predicted_as_the_whole(small, tmp_path):
    image, _ = draw()
    write(tmp_path / "a.tif", image, extratags=TAGS, **KINDS["tiles"])
    for folder in ("masks", "comparisons"):
        (tmp_path / folder).mkdir()
    model = blurring_model()
    (expected,) = predict_images([model], [image], 8)
    mosaic, whole = predicted(tmp_path / "a.tif", model)
    difference = np.abs(whole.astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.02
    with tifffile.TiffFile(tmp_path / "masks/a.tif") as file:
        page = file.pages[0]
        mask = page.asarray()
        assert page.is_tiled and page.tilewidth == 256
        for code, (_, value) in GEO.items():
            assert page.tags[code].value == value
    assert set(np.unique(mask)) == {0, 255}
    assert np.array_equal(mask == 255, whole[0] >= 128)
    assert mosaic.answers() == {"1": [rle_encode(mask == 255)]}
    assert Image.open(tmp_path / "comparisons/a.jpg").width > 1000


def test_a_reduced_prediction_comes_back_at_the_size_of_the_image(small, tmp_path):
    image, truth = draw()
    write(tmp_path / "a.tif", image, **KINDS["tiles"])
    for folder in ("masks", "comparisons"):
        (tmp_path / folder).mkdir()
    model = blurring_model(scale=0.5)
    _, whole = predicted(tmp_path / "a.tif", model)
    (small_plane,) = predict_images([model], [rasters.reduce_values(image, 2)], 8)
    expected = cv2.resize(small_plane[0], SIZE[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(whole[0].astype(int) - expected).max() <= 2
    assert tifffile.imread(tmp_path / "masks/a.tif").shape == SIZE
    assert truth.shape == SIZE


FLAGS = (*TINY[:4], "--height", 64, "--width", 64, "--batch_size", 4, "--epochs", 1)


def command(script, *flags):
    """Run a script in this process, whose images are large from a million pixels on."""
    if script == "train.py":
        train.train(parse(train.Config, "", list(map(str, flags))))
    else:
        infer.infer(parse(infer.Options, "", list(map(str, flags))))


def test_from_hubmap_to_a_submission(small, tmp_path, capsys, monkeypatch):
    """docs/rasters.md, section Slides."""
    monkeypatch.setattr(blocks, "BLOCK", 300)
    hubmap(tmp_path / "hubmap")
    out, predictions = tmp_path / "out", tmp_path / "predictions"
    command("train.py", "--data", tmp_path / "hubmap", "--out", out, "--scale", 0.25, *FLAGS)
    printed = capsys.readouterr().out
    assert "slides: 3 of 3 images" in printed and "in tiles" in printed
    flags = ("--data", tmp_path / "hubmap", "--out", predictions, "--submission", "rle")
    command("infer.py", "--model", out, *flags)
    printed = capsys.readouterr().out
    assert "2 images, 0 with ground truth" in printed
    table = pd.read_csv(predictions / "submission.csv", keep_default_na=False)
    assert list(table.columns) == ["id", "predicted"] and table.id.tolist() == ["t0", "t1"]
    for row in table.itertuples():
        mask = tifffile.imread(predictions / "masks" / f"{row.id}.tif")
        assert mask.shape == SIZE
        assert rle_encode(mask == 255) == row.predicted
    flags = ("--data", tmp_path / "hubmap/train", "--masks", tmp_path / "hubmap/train.csv")
    flags = (*flags, "--out", tmp_path / "scores")
    command("infer.py", "--model", out, *flags)
    printed = capsys.readouterr().out
    assert "3 images, 3 with ground truth" in printed and "(3 images)" in printed
    page = (tmp_path / "scores" / "report.html").read_text()  # of whole images, masks alone
    assert page.count('"probability": false') == page.count('"scores": [') == 3
    with pytest.raises(UserError, match="predicted in blocks; take false"):
        command("infer.py", "--model", out, *flags, "--save_probs", "true")
    damage(tmp_path / "hubmap/test/t1.tiff", 29)
    flags = ("--data", tmp_path / "hubmap/test", "--out", tmp_path / "damaged")
    with pytest.raises(UserError, match=r"1 of 2 could not be used, .*t1.tiff: tile 30 of 42"):
        command("infer.py", "--model", out, *flags)
    assert [path.name for path in (tmp_path / "damaged/masks").glob("*.tif")] == ["t0.tif"]


def test_a_small_geotiff_gives_a_png_and_a_tiff_with_its_place(tmp_path, trained):
    image, _ = draw(size=(120, 150))
    write(tmp_path / "geo" / "a.tif", image, extratags=TAGS)
    succeed("infer.py", "--model", trained, "--data", tmp_path / "geo", "--out", tmp_path / "p")
    png = np.asarray(Image.open(tmp_path / "p/masks/a.png"))
    with tifffile.TiffFile(tmp_path / "p/masks/a.tif") as file:
        assert np.array_equal(file.pages[0].asarray(), png)
        for code, (_, value) in GEO.items():
            assert file.pages[0].tags[code].value == value


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """--out of a model that was trained on small images at half of their scale."""
    root = tmp_path_factory.mktemp("small")
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number in range(4):
        image, mask = draw(number, (130, 190))
        Image.fromarray(image).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    succeed("train.py", "--data", root, "--out", root / "out", "--scale", 0.5, *FLAGS)
    return root / "out"


def test_small_images_at_a_lower_scale_get_masks_of_their_size(tmp_path, trained):
    flags = ("--data", trained.parent / "images", "--masks", trained.parent / "masks")
    succeed("infer.py", "--model", trained, *flags, "--out", tmp_path / "p")
    mask = np.asarray(Image.open(tmp_path / "p/masks/0.png"))
    assert mask.shape == (130, 190)
    again = load_model(trained).predict(trained.parent / "images/0.png")
    assert np.array_equal(again, mask == 255)
    assert len(list((tmp_path / "p/masks").iterdir())) == 4
    assert (tmp_path / "p/metrics.json").exists()


# --------------------------------------------------------------------------------------------------
#  OpenSlide
# --------------------------------------------------------------------------------------------------


def test_without_openslide_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / "a.svs").write_bytes(b"x")
    with pytest.raises(UserError, match="pip install openslide-python openslide-bin"):
        readers.open_layers(tmp_path / "a.svs")


def test_a_slide_is_read_by_windows_at_the_level_that_fits(small, tmp_path):
    pytest.importorskip("openslide")
    image, _ = draw()
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:  # OpenSlide: generic tiled TIFF
        for shrink in (1, 2):
            pixels = rasters.reduce_values(image, shrink)
            options = {"photometric": "rgb", "metadata": None, "subfiletype": shrink - 1}
            file.write(pixels, **options, **KINDS["tiles"])
    for shrink in (1, 2, 4):
        expected = rasters.reduce_values(image, shrink).astype(int)
        for window in windows(shrink):
            values = readers.read_values((Layer(tmp_path / "a.svs", window=window),), 3)
            part = expected[window.y // shrink :, window.x // shrink :]
            assert np.abs(values - part[: window.size[0], : window.size[1]]).max() <= 2
    table = blocks.cut_into_blocks(
        pd.DataFrame({
            "id": ["a"], "image": [tmp_path / "a.svs"], "mask": [None],
            "layers": [(Layer(tmp_path / "a.svs"),)],
        }),
        1.0, reduced=True,
    )  # fmt: skip
    assert len(table) == 4 and RunLengths and Classes
