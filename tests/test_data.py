"""From files to tensors and back: pairs, folds, truths, sizes, augmentations."""

import dataclasses
import re
import shutil
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import utils
from utils import Config, UserError

CFG = Config(height=64, width=192, top=0, tiles="false", mean=utils.IMAGENET_MEAN, std=utils.IMAGENET_STD)


def numbers(path):
    return re.fullmatch(r"([a-z]+)_(?:(road|lane)_)?(\d+)", Path(path).stem)


def test_every_picture_gets_its_own_mask(roads):
    samples = utils.find_samples(str(roads), "road", training=True)
    assert len(samples) == 24
    for row in samples.itertuples():
        picture, mask = numbers(row.image), numbers(row.mask)
        assert (picture[1], picture[3], "road") == (mask[1], mask[3], mask[2])
        assert row.category == f"{picture[1]}_road"


def test_lane_takes_um_pictures_alone(roads):
    samples = utils.find_samples(str(roads), "lane", training=True)
    assert len(samples) == 8
    assert set(samples.category) == {"um_lane"}
    assert all("_lane_" in mask for mask in samples["mask"])


def test_images_and_masks_layout_pairs_by_stem(tmp_path):
    for stem, suffix in (("b", ".jpg"), ("a", ".PNG"), ("c", ".png")):
        for folder, ending in (("images", suffix), ("masks", ".png")):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("L", (8, 6)).save(tmp_path / folder / (stem + ending))
    samples = utils.find_samples(str(tmp_path), training=True)
    assert [(Path(r.image).stem, Path(r.mask).stem) for r in samples.itertuples()] == [(s, s) for s in "abc"]


def kitti_names(count):
    names = [f"{category}_{number:06d}" for category in ("um", "umm", "uu") for number in range(count)]
    return pd.DataFrame({"image": names, "mask": names, "category": [name.split("_")[0] for name in names], "share": 0})


def folds_of(samples, **settings):
    return utils.assign_folds(samples, Config(**settings))


def test_folds_keep_streets_together_and_categories_even():
    samples = kitti_names(96)
    samples["fold"] = folds_of(samples)
    valid = samples[samples.fold == 0]
    assert 0.07 < len(valid) / len(samples) < 0.13
    assert set(valid.category.value_counts()) <= {utils.BLOCK, 2 * utils.BLOCK}
    assert set(valid.category) == {"um", "umm", "uu"}
    street = samples.image.map(lambda name: (name[:-6], int(name[-6:]) // utils.BLOCK))
    assert (samples.groupby(street).fold.nunique() == 1).all()
    assert set(samples.fold) == set(range(10))


def test_folds_follow_the_seed():
    samples = kitti_names(96)
    same, again, other = (folds_of(samples, seed=seed) for seed in (3, 3, 4))
    assert (same == again).all()
    assert (same != other).any()


@pytest.mark.parametrize("names", [["um_000000", "um_000001"], ["um_000000", "uu_000000"], ["a", "b"], ["7", "8", "9"]])
def test_a_handful_still_splits(names):
    samples = pd.DataFrame({"image": names, "category": [name.rpartition("_")[0] for name in names], "share": 0})
    assert set(folds_of(samples)) >= {0, 1}


def test_a_small_set_validates_on_every_category():
    samples = kitti_names(20)
    samples["fold"] = folds_of(samples)
    assert samples[samples.fold == 0].category.value_counts().to_dict() == {"um": 2, "umm": 2, "uu": 2}


def test_kitti_truth_is_read_by_channel(tmp_path):
    colours = [(255, 0, 255), (255, 0, 0), (0, 0, 0), (0, 0, 255), (1, 0, 1)]  # road, not, invalid, invalid road, road
    Image.fromarray(np.uint8([colours])).save(tmp_path / "t.png")
    truth = utils.read_truth(str(tmp_path / "t.png"), "kitti", (1, 5))
    assert truth.dtype == np.uint8
    assert truth.tolist() == [[1, 0, 255, 255, 1]]


@pytest.mark.parametrize("kind", ["01", "0255", "bool", "16", "rgb", "palette", "alpha", "empty"])
def test_masks_of_every_usual_kind(tmp_path, kind):
    road = np.zeros((5, 7), bool)
    road[2:, 1:4] = kind != "empty"
    palette = Image.fromarray(road.astype(np.uint8), "P") if kind == "palette" else None
    if palette:
        palette.putpalette([0, 0, 0, 128, 0, 0])
    picture = {
        "01": lambda: Image.fromarray(road.astype(np.uint8)),
        "0255": lambda: Image.fromarray(road.astype(np.uint8) * 255),
        "bool": lambda: Image.fromarray(road),
        "16": lambda: Image.fromarray(road.astype(np.uint16) * 65535),
        "rgb": lambda: Image.fromarray(np.dstack([road.astype(np.uint8) * 255] * 3)),
        "palette": lambda: palette,
        "alpha": lambda: Image.fromarray(np.dstack([road.astype(np.uint8) * 255, np.full(road.shape, 255, np.uint8)])),
        "empty": lambda: Image.fromarray(road.astype(np.uint8)),
    }[kind]()
    picture.save(tmp_path / "m.png")
    assert (utils.read_truth(str(tmp_path / "m.png"), "masks", (5, 7)) == road).all()


def test_255_beside_1_is_not_valid(tmp_path):
    Image.fromarray(np.uint8([[0, 1, 255]])).save(tmp_path / "m.png")
    assert utils.read_truth(str(tmp_path / "m.png"), "masks", (1, 3)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(("name", "pixels"), [("labels", np.uint8([[0, 1, 5]])), ("red", np.uint8([[[255, 0, 0]]]))])
def test_masks_that_are_not_binary_are_refused(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=name):
        utils.read_truth(str(tmp_path / f"{name}.png"), "masks", pixels.shape[:2])


def test_pictures_of_every_usual_kind(tmp_path):
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
    for name, (picture, expected) in cases.items():
        picture.save(tmp_path / f"{name}.png")
        read = utils.read_image(str(tmp_path / f"{name}.png"))
        assert read.dtype == np.uint8, name
        assert (read == expected).all(), name


def test_a_turned_photograph_is_read_upright(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "phone.jpg", exif=exif)
    assert utils.read_image(str(tmp_path / "images" / "phone.jpg")).shape == (8, 4, 3)
    (tmp_path / "train.csv").write_text("id,rle_mask\nphone,29 4\nother,1 1\n")
    Image.fromarray(pixels).save(tmp_path / "images" / "other.png")
    _, sample = utils.survey(utils.find_samples(str(tmp_path), training=True)).itertuples()
    assert (sample.height, sample.width, sample.share) == (8, 4, 4 / 32)


@pytest.mark.parametrize("size", [(375, 1242), (370, 1226), (101, 101), (33, 501), (64, 192), (40, 100)])
def test_restore_inverts_preprocess(size):
    """A blob keeps its place and its size, within half a pixel of the coarser grid."""
    v, u = np.mgrid[0 : size[0], 0 : size[1]]
    centre = 0.37 * size[0], 0.61 * size[1]
    blob = np.exp(-(((v - centre[0]) / size[0]) ** 2 + ((u - centre[1]) / size[1]) ** 2) / 0.02)
    image = np.dstack([(255 * blob).astype(np.uint8)] * 3)
    tensor = utils.preprocess(image, CFG)
    assert tensor.shape == (3, 64, 192)
    assert str(tensor.dtype) == "torch.uint8"
    back = utils.restore(tensor[0].float() / 255, size, CFG).numpy()
    assert back.shape == size
    assert back.dtype == np.float32
    weight = back.clip(0) ** 2
    found = (v * weight).sum() / weight.sum(), (u * weight).sum() / weight.sum()
    assert abs(found[0] - centre[0]) <= 0.5 * max(1, size[0] / 64)
    assert abs(found[1] - centre[1]) <= 0.5 * max(1, size[1] / 192)
    assert np.abs(back - blob).mean() < 0.02


def test_normalise_takes_the_mean_and_divides_by_the_std():
    image = np.random.default_rng(0).integers(0, 256, (64, 192, 3), np.uint8)
    found = utils.normalise(utils.preprocess(image, CFG)[None], CFG)
    assert str(found.dtype) == "torch.float32"
    expected = (image / 255 - CFG.mean) / CFG.std
    assert np.abs(found[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_truths_are_never_interpolated():
    truth = np.random.default_rng(0).choice(np.uint8([0, 1, 255]), (375, 1242))
    assert set(np.unique(utils.shrink_truth(truth, CFG))) <= {0, 1, 255}


def test_shrunk_truth_lies_where_the_shrunk_picture_lies():
    """A nearest neighbour that takes the corner of each cell would shift the truth by half a cell."""
    step = np.zeros((384, 1152), np.uint8)
    step[:, 576:] = 1
    assert utils.shrink_truth(step, CFG)[0].tolist() == [0] * 96 + [1] * 96
    ramp = np.tile(np.arange(1152, dtype=np.float32) / 8, (384, 1)).astype(np.uint8)
    seen = utils.shrink_truth(ramp, CFG)[0].astype(float)
    meant = utils.shrink(np.dstack([ramp] * 3), CFG)[0, :, 0].astype(float)
    assert abs((seen - meant).mean()) < 0.25


def items(roads, augment, **changes):
    samples = utils.find_samples(str(roads), training=True)
    return utils.RoadDataset(samples, utils.read_all(samples, CFG) if augment else None, CFG, augment)


def test_items_are_tensors_of_the_promised_kind(roads):
    import train

    for augment in (None, train.augmentation(CFG)):
        item = items(roads, augment)[0]
        assert item["image"].shape == (3, 64, 192)
        assert item["mask"].shape == (1, 64, 192)
        assert {str(item["image"].dtype), str(item["mask"].dtype)} == {"torch.uint8"}
        assert set(np.unique(item["mask"])) <= {0, 1, 255}
        assert ("truth" in item) == (augment is None)


@pytest.mark.parametrize("fits", [True, False])
def test_validation_pictures_are_decoded_once_where_memory_allows(roads, monkeypatch, fits):
    if not fits:
        monkeypatch.setattr(utils, "KEEP_BYTES", 8000)
    validation, reads = items(roads, None), []
    whole = utils.read_sample
    monkeypatch.setattr(utils, "read_sample", lambda row: reads.append(row) or whole(row))
    first, again = validation[3], validation[3]
    assert len(reads) == (1 if fits else 2)
    assert (first["image"] == again["image"]).all()
    assert first["name"] == again["name"]
    assert validation[4]["name"] != first["name"]


def test_augmentation_takes_its_arguments_and_fills_with_ignore():
    """albumentations only warns of an argument that it does not know."""
    import train

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment = train.augmentation(CFG)
        augment.set_random_seed(0)
        seen = [
            augment(image=np.full((64, 192, 3), 128, np.uint8), mask=np.ones((64, 192), np.uint8)) for _ in range(40)
        ]
    borders = [pair["mask"] == utils.IGNORE for pair in seen]
    assert any(border.any() for border in borders)
    assert all(set(np.unique(pair["mask"])) <= {1, utils.IGNORE} for pair in seen)
    bare = [pair["image"][border] for pair, border in zip(seen, borders, strict=True)]
    assert np.concatenate(bare).mean() < 60, "what is filled in is not told from what was seen"


def test_workers_and_epochs_draw_different_augmentations(roads):
    import torch

    import train

    samples = utils.find_samples(str(roads), training=True).iloc[[0] * 8].copy()
    samples["fold"] = [0] + [1] * 7
    cfg = dataclasses.replace(CFG, batch_size=1, workers=2)

    def draw(workers):
        settings = dataclasses.replace(cfg, workers=workers)
        loader, _ = train.loaders(samples, utils.read_all(samples, settings), settings)
        images = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            images += [batch["image"] for batch in loader]
        return images  # the same picture 14 times

    drawn = draw(workers=2)
    assert len(drawn) == 14
    different = {tuple(image.flatten()[::97].tolist()) for image in drawn}
    assert len(different) >= 12, "workers or epochs repeat each other"
    assert all(map(torch.equal, drawn, draw(workers=0))), "whichever worker draws it, the seed decides"


def test_pixels_that_are_not_valid_change_no_loss():
    import torch

    import train

    torch.manual_seed(0)
    logits, mask = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 1, 8, 8)).float()
    mask[:, :, :4] = utils.IGNORE
    elsewhere = logits.clone()
    elsewhere[:, :, :4] = 50
    assert train.loss(logits, mask, 1.0).item() == pytest.approx(train.loss(elsewhere, mask, 1.0).item())
    assert train.loss(logits, mask, 1.0).item() == pytest.approx(
        train.loss(logits[:, :, 4:], mask[:, :, 4:], 1.0).item(), rel=1e-5)  # fmt: skip
    assert torch.isfinite(train.loss(logits, torch.full_like(mask, utils.IGNORE), 1.0))


def test_auto_finds_kitti_at_any_depth(roads, tmp_path, monkeypatch):
    work = tmp_path / "working"
    work.mkdir()
    shutil.copytree(roads, tmp_path / "input" / "datasets" / "owner" / "slug" / "data_road")
    monkeypatch.chdir(work)
    assert len(utils.find_samples("auto", training=True)) == 24


def test_comparison_shows_each_error_in_its_colour():
    picture = np.full((100, 620, 3), 90, np.uint8)
    truth, mask = np.zeros((100, 620), np.uint8), np.zeros((100, 620), bool)
    truth[:, :400], mask[:, 200:500] = 1, True
    drawn = utils.comparison(picture, truth, mask, "street", "um_road")
    errors = drawn[130 + 30 + 50, 626:].astype(int)
    for column, colour in ((100, utils.BLUE), (300, utils.GREEN), (450, utils.RED)):
        assert np.abs(errors[column] - (0.6 * np.array(colour) + 0.4 * 90)).max() < 3
    assert np.ptp(errors[600]) == 0
    assert cv2.imencode(".jpg", drawn)[0]
