"""Classes: exclusive and overlapping ones, from the masks to the submission."""

import csv
import itertools
import json
import zipfile
from dataclasses import replace

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ENCODER, run, succeed
from PIL import Image

import train
from kit.config import IGNORE, Classes, ModelConfig, plane_settings
from kit.data import classes, folds, images
from kit.data import samples as data
from kit.errors import UserError
from kit.network import model
from kit.results import metrics, predict, submissions, tuning, visualize

SIZE = (44, 60)
EXCLUSIVE = Classes(("sky", "road", "car"), ("0", "1", "2"), True)
OVERLAPPING = Classes(("1", "3"), ("1", "3"))


def labels(index):
    """A synthetic label map: sky above, road below, a car at a random place, a row ignored."""
    rng = np.random.default_rng(index)
    mask = np.zeros(SIZE, np.uint8)
    mask[20:] = 1
    y, x = rng.integers(14, 24), rng.integers(0, 40)
    mask[y : y + 12, x : x + 16] = 2
    mask[0] = 255
    return mask


def picture(mask):
    """An image whose colours tell the classes."""
    colour = np.array([[90, 140, 220], [90, 90, 90], [200, 40, 30]], np.uint8)
    return colour[np.where(mask == 255, 0, mask)]


def plane_of(found, index, k):
    """A class's plane of one of the masks."""
    return found.samples["mask"][index].read(SIZE)[k]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_label_maps(root, count=12, convert=lambda mask: mask):
    for index in range(count):
        save(root / f"images/p{index:02d}.png", picture(labels(index)))
        save(root / f"masks/p{index:02d}.png", convert(labels(index)))
    return root


def column_runs(mask):
    """RLE down the columns from 1, plainly."""
    flat = np.r_[0, mask.T.ravel().astype(int), 0]
    starts, ends = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    pairs = zip(starts + 1, ends - starts, strict=True)
    return " ".join(f"{start} {length}" for start, length in pairs)


def decode(runs):
    mask = np.zeros(SIZE[0] * SIZE[1], bool)
    numbers = [int(word) for word in runs.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        mask[start - 1 : start - 1 + length] = True
    return mask.reshape(SIZE[::-1]).T


def write_competition(root, count=12, joined=False):
    """Train and test images, a csv of the classes 1 (road) and 3 (car), and a sample."""
    rows = []
    for index in range(count):
        folder = "train_images" if index < count - 3 else "test_images"
        save(root / folder / f"p{index:02d}.png", picture(labels(index)))
        for value, number in (("3", 2), ("1", 1)):
            mask = labels(index) == number
            if index < count - 3 and not (index == 2 and value == "3"):
                rows.append((f"p{index:02d}.png", value, column_runs(mask)))
    names = [f"p{index:02d}.png" for index in range(count - 1, count - 4, -1)]
    sample = [(name, value, "1 1") for name in names for value in ("3", "1")]
    for file, some in (("train.csv", rows), ("sample_submission.csv", sample)):
        with (root / file).open("w") as target:
            writer = csv.writer(target)
            if joined:
                writer.writerow(["ImageId_ClassId", "EncodedPixels"])
                writer.writerows((f"{name}_{value}", runs) for name, value, runs in some)
            else:
                writer.writerow(["ImageId", "ClassId", "EncodedPixels"])
                writer.writerows(some)
    return root


def settings(found):
    """The fields of a `ModelConfig` that say which classes it has."""
    fields = {"class_names": found.names, "class_values": found.values}
    return fields | {"exclusive": found.exclusive} | plane_settings(found)


def find(root, **options):
    return data.find_samples(str(root), training=True, **options)


def refused(root, *words, **options):
    with pytest.raises(UserError) as error:
        find(root, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


# --------------------------------------------------------------------------------------------------
#  Reading
# --------------------------------------------------------------------------------------------------


def test_a_label_map_is_read_with_the_names_of_its_file(tmp_path, capsys):
    write_label_maps(tmp_path)
    assert find(tmp_path).classes.names == ("class 0", "class 1", "class 2")
    (tmp_path / "classes.csv").write_text("id,name\n2,car\n0,sky\n")
    found = find(tmp_path)
    assert found.classes == Classes(("car", "sky"), ("2", "0"), True)
    assert "not listed and ignored: 1 (" in capsys.readouterr().out
    expected = np.full(SIZE, 255, np.uint8)
    expected[labels(3) == 2] = 0
    expected[labels(3) == 0] = 1
    assert (found.samples["mask"][3].read(SIZE) == expected).all()
    assert find(tmp_path, classes="sky,car").classes.names == ("sky", "car")
    merged = find(tmp_path, classes="one")
    assert merged.classes == Classes()
    values = np.where(labels(3) == 255, 255, labels(3) > 0)
    assert (plane_of(merged, 3, 0) == values).all()


TABLES = {
    "id,name": "id,name\n0,sky\n1,road\n2,car\n",
    "class_id,class_name": "class_id,class_name\n0,sky\n1,road\n2,car\n",
    "value,class": "value,class\n0,sky\n1,road\n2,car\n",
    "Pixel Value, Class": "Pixel Value, Class\n0, sky\n1, road\n2, car\n",
    "label,id": "label,id\ncar,2\nsky,0\nroad,1\n",
    "class,label": "class,label\n0,sky\n1,road\n2,car\n",
    "Class ID;Name": "Class ID;Name\n0;sky\n1;road\n2;car\n",
    "Name,R,G,B": "Name,R,G,B\nsky,0,0,0\nroad,128,64,128\ncar,0,0,255\n",
    "id and colours": "id,name,r,g,b\n0,sky,0,0,0\n1,road,128,64,128\n2,car,0,0,255\n",
    "hex": "Label,Color\nsky,#000000\nroad,#804080\ncar,#0000ff\n",
    "CVAT": "# label:color_rgb:parts:actions\nsky:0,0,0::\nroad:128,64,128::\ncar:0,0,255::\n",
    "CamVid": "0 0 0\tsky\n128 64 128\troad\n0 0 255\tcar\n",
    "no header": "0,sky\n1,road\n2,car\n",
    "no header, colours": "sky,0,0,0\nroad,128,64,128\ncar,0,0,255\n",
    "names": "sky\nroad\ncar\n",
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("name", ["classes.csv", "_classes.csv", "Labels and Colors.csv"])
def test_the_columns_of_a_list_of_classes_are_told_by_name_and_content(tmp_path, kind, name):
    colours = any(word in TABLES[kind].lower() for word in ("128,64", "128 64", "#804080"))
    write_label_maps(tmp_path, 4, in_colour if colours else lambda mask: mask.clip(max=2))
    if colours:  # no ignored ones: #090909 is not listed
        for index in range(4):
            save(tmp_path / f"masks/p{index:02d}.png", in_colour(labels(index).clip(max=2)))
    (tmp_path / name).write_text(TABLES[kind])
    found = find(tmp_path)
    assert sorted(found.classes.names) == ["car", "road", "sky"]
    mask = found.samples["mask"][1].read(SIZE)
    names = np.array(found.classes.names)[mask]
    assert (names == np.array(["sky", "road", "car"])[labels(1).clip(max=2)]).all()


def test_a_list_that_is_not_understood_or_does_not_fit_is_said(tmp_path, capsys):
    write_label_maps(tmp_path, 4)
    for text, word in (("0,a\n7,b\n", "does not list 1, 2"), ("0,a\n0,b\n", "listed twice")):
        (tmp_path / "class_dict_seg.csv").write_text(text)
        assert find(tmp_path).classes.names == ("class 0", "class 1", "class 2")
        out = capsys.readouterr().out
        assert f"class_dict_seg.csv is not used ({word}".replace("(listed", "(id 0 is listed") in (
            out.replace("it ", "")
        )
        assert "--classes FILE with id,name" in out


def test_the_list_of_classes_lies_above_the_images(tmp_path):
    """Kaggle mounts a data set one folder deeper than it was packed."""
    write_label_maps(tmp_path / "data" / "CamVid" / "train")
    for place in ("CamVid", "CamVid/train", ""):
        table = tmp_path / "data" / place / "classes.csv"
        table.write_text("id,name\n0,sky\n1,road\n2,car\n")
        assert find(tmp_path / "data").classes.names == ("sky", "road", "car")
        table.unlink()


def in_colour(mask):
    return np.array([[0, 0, 0], [128, 64, 128], [0, 0, 255], [9, 9, 9]], np.uint8)[mask.clip(max=3)]


def indexed(mask):
    image = Image.fromarray(mask, "P")
    image.putpalette([7, 0, 0, 0, 0, 0, 200, 0, 0] + [0] * 759)  # black is the second colour
    return image


def test_colours_and_palettes_are_label_maps(tmp_path, capsys):
    write_label_maps(tmp_path / "a", convert=in_colour)
    (tmp_path / "a/class_dict.csv").write_text(
        "name,r,g,b\nsky,0,0,0\nroad,128,64,128\ncar,0,0,255\n"
    )
    found = find(tmp_path / "a")
    assert found.classes.names == EXCLUSIVE.names
    assert (found.samples["mask"][5].read(SIZE) == labels(5)).all()
    assert "#090909 (720 pixels, such as in p00.png)" in capsys.readouterr().out
    root = tmp_path / "b"
    for index in range(4):
        save(root / f"images/p{index}.png", picture(labels(index)))
        (root / "masks").mkdir(exist_ok=True)
        indexed(labels(index)).save(root / f"masks/p{index}.png")
    assert (find(root).samples["mask"][2].read(SIZE) == labels(2)).all()


def own_palette(mask):
    """Colours in the order of their occurrence, as tools that optimise PNG files leave them."""
    order = list(dict.fromkeys(mask.ravel().tolist()))[:: -1 if mask[13, 0] % 2 else 1]
    image = Image.fromarray(np.vectorize(order.index)(mask).astype(np.uint8), "P")
    colours = in_colour(np.array(order))
    image.putpalette(np.concatenate([colours, np.full((9, 3), 1, np.uint8)]).ravel().tolist())
    return image


def test_palettes_that_differ_are_read_by_colour(tmp_path):
    """By index a class would be road in one file and car in the next."""
    for listed in (False, True):
        root = tmp_path / str(listed)
        for index in range(6):
            save(root / f"images/p{index}.png", picture(labels(index)))
            (root / "masks").mkdir(exist_ok=True)
            shifted = np.roll(labels(index), index % 3, axis=0)  # begins with another class
            own_palette(shifted).save(root / f"masks/p{index}.png")
        if listed:
            (root / "class_dict.csv").write_text(
                "name,r,g,b\nsky,0,0,0\nroad,128,64,128\ncar,0,0,255\n"
            )
        found = find(root)
        assert found.classes.values == (
            ("#000000", "#804080", "#0000ff") if listed
            else ("#000000", "#0000ff", "#090909", "#804080")
        )  # fmt: skip
        for index, mask in enumerate(found.samples["mask"]):
            expected = np.roll(labels(index), index % 3, axis=0)
            numbers = np.array([0, 1, 2, 255] if listed else [0, 3, 1, 2])
            assert (mask.read(SIZE) == numbers[expected.clip(max=3)]).all()


def test_listed_colours_are_found_in_a_palette_of_another_order(tmp_path):
    def reordered(mask):
        image = Image.fromarray(np.array([2, 0, 1, 3], np.uint8)[mask.clip(max=3)], "P")
        colours = in_colour(np.array([1, 2, 0, 3]))
        image.putpalette(colours.ravel().tolist())
        return image

    root = tmp_path
    for index in range(4):
        save(root / f"images/p{index}.png", picture(labels(index)))
        (root / "masks").mkdir(exist_ok=True)
        reordered(labels(index)).save(root / f"masks/p{index}.png")
    (root / "class_dict.csv").write_text("name,r,g,b\nsky,0,0,0\nroad,128,64,128\ncar,0,0,255\n")
    found = find(root)
    assert found.classes.names == EXCLUSIVE.names
    assert (found.samples["mask"][2].read(SIZE) == labels(2)).all()
    again = find(root, classes=found.classes)
    assert again.samples["mask"].notna().all(), "a model of these classes is scored"


def test_what_the_kit_writes_it_reads_again(tmp_path):
    values, table = classes.palette(Classes(("a", "b", "c"), ("0", "7", "2"), True))
    numbers = labels(0).clip(max=2)
    images.write_palette_image(tmp_path / "x.png", values[numbers], table)
    image = Image.open(tmp_path / "x.png")
    assert image.mode == "P"
    assert (np.asarray(image) == np.array([0, 7, 2])[numbers]).all()
    seen = np.asarray(image.convert("RGB"))
    assert (seen == classes.class_colours(("a", "b", "c"))[numbers]).all()


@pytest.mark.parametrize("joined", [False, True])
def test_classes_of_a_csv_may_overlap(tmp_path, joined):
    found = find(write_competition(tmp_path, joined=joined))
    assert found.classes == OVERLAPPING
    samples = data.scan(found.samples, found.classes)
    for row in samples.itertuples():
        index = int(row.id[1:])
        mask = row.mask.read(SIZE)
        assert mask.shape == (2, *SIZE)
        assert (mask[0] == (labels(index) == 1)).all()
        assert (mask[1] == (labels(index) == 2) * (index != 2)).all()
        assert row.shares == tuple((mask == 1).mean((1, 2)))
    assert find(tmp_path, classes="3,1").classes.names == ("3", "1")
    merged = find(tmp_path, classes="one")
    assert merged.classes == Classes()
    assert (plane_of(merged, 0, 0) == ((labels(0) == 1) | (labels(0) == 2))).all()
    (tmp_path / "names.csv").write_text("id,name\n1,road\n2,tree\n3,car\n")
    named = find(tmp_path, classes="names.csv")
    assert named.classes == Classes(("road", "tree", "car"), ("1", "2", "3"))
    assert plane_of(named, 0, 1).sum() == 0
    (tmp_path / "names.csv").write_text("id,name\n1,road\n2,tree\n")
    refused(tmp_path, "class 3", "road, tree", classes="names.csv")


def test_a_folder_for_each_class(tmp_path, capsys):
    for index in range(6):
        save(tmp_path / f"images/p{index}.png", picture(labels(index)))
        for name, number in (("road", 1), ("car", 2)):
            if (index, name) != (4, "car"):
                mask = np.uint8(255 * (labels(index) == number))
                save(tmp_path / f"masks/{name}/p{index}.png", mask)
    found = find(tmp_path)
    assert found.classes == Classes(("car", "road"), ("car", "road"))
    assert (plane_of(found, 3, 0) == (labels(3) == 2)).all()
    assert plane_of(found, 4, 0).sum() == 0
    assert "1 masks of a class are not there" in capsys.readouterr().out
    save(tmp_path / "masks/car/p1.png", np.zeros((5, 5), np.uint8))
    found = find(tmp_path)
    samples = data.scan(found.samples, found.classes)
    with pytest.raises(UserError, match="is 5x5, but its image is 60x44"):
        data.decode_pairs(samples, ModelConfig(), 0)


def test_a_class_column_of_a_manifest(tmp_path):
    rows = []
    for index in range(4):
        save(tmp_path / f"i{index}.png", picture(labels(index)))
        for number in (1, 2):
            save(tmp_path / f"m{index}_{number}.png", np.uint8(255 * (labels(index) == number)))
            rows.append((f"i{index}.png", f"m{index}_{number}.png", "abc"[number]))
    table = pd.DataFrame(rows, columns=["image", "mask", "class"])
    table.to_csv(tmp_path / "pairs.csv", index=False)
    found = find(tmp_path / "pairs.csv")
    assert found.classes.names == ("b", "c")
    assert (plane_of(found, 1, 1) == (labels(1) == 2)).all()


@pytest.mark.parametrize("kind", ["joined", "column", "manifest"])
def test_a_mask_without_a_class_is_refused(tmp_path, kind):
    if kind == "manifest":
        test_a_class_column_of_a_manifest(tmp_path)
        file, where = tmp_path / "pairs.csv", tmp_path / "pairs.csv"
        file.write_text(file.read_text().replace("i1.png,m1_2.png,c", "i1.png,m1_2.png,"))
    else:
        where = write_competition(tmp_path, joined=kind == "joined")
        file = tmp_path / "train.csv"
        old, new = ("p01.png_3", "p01.png") if kind == "joined" else ("p01.png,3", "p01.png,")
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    refused(where, f"{file.name}: a mask without a class in row", "give it a class")


FAULTS = {
    "colour twice": ("name,r,g,b\na,1,2,3\nb,1,2,3\n", "#010203 is listed twice (a and b)"),
    "id twice": ("id,name\n0,a\n0,b\n", "id 0 is listed twice"),
    "name twice": ("id,name\n0,a\n1,a\n", "name a is listed twice"),
    "no number": ("name,r,g,b\na,x,0,0\nb,1,1,1\n", "r,g,b are x,0,0"),
    "one": ("id,name\n0,a\n", "at least two"),
    "too short": ("sky\nroad\n", "2 names, from 0, but label maps have ids to 2"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_list_of_classes_is_refused_in_a_line(tmp_path, kind):
    write_label_maps(tmp_path, 2)
    (tmp_path / "list.csv").write_text(FAULTS[kind][0])
    refused(tmp_path, "list.csv", FAULTS[kind][1], classes="list.csv")


def test_other_wrong_uses_of_classes_are_refused(tmp_path):
    write_label_maps(tmp_path / "a", 2)
    refused(tmp_path / "a", "ids to 2", classes="sky,road")
    refused(tmp_path / "a", "no such file", classes="none.csv")
    refused(tmp_path / "a", "at least two", classes="sky")
    write_label_maps(tmp_path / "b", 2, lambda mask: np.full_like(mask, 3))
    refused(tmp_path / "b", "class 3 alone")
    write_label_maps(tmp_path / "c", 2, lambda mask: np.uint8(mask == 2))
    (tmp_path / "c/list.csv").write_text("id,name\n4,a\n5,b\n")
    refused(tmp_path / "c", "none of a, b", classes="list.csv")


def test_a_model_is_scored_with_masks_of_its_kind_alone(tmp_path, capsys):
    write_label_maps(tmp_path)
    for own, scored in ((EXCLUSIVE, True), (OVERLAPPING, False)):
        named = own._replace(names=("class 0", "class 1", "class 2")[: len(own.names)])
        samples = data.find_samples(str(tmp_path), classes=named).samples
        assert samples["mask"].notna().all() == scored
    assert "no scores: the model has classes that may overlap" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
#  Training
# --------------------------------------------------------------------------------------------------


def test_the_loss_of_exclusive_classes_is_its_definition():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, 5, requires_grad=True)
    mask = torch.randint(0, 3, (2, 1, 6, 5)).float()  # class 3 does not occur
    mask[:, :, :2] = 255
    known = mask[:, 0] != 255
    p = logits.softmax(1)
    pixels = -torch.log(p.gather(1, mask.clamp(max=3).long()))[:, 0][known].mean()
    dice = []
    for k in range(3):
        one, target = p[:, k][known], (mask[:, 0] == k)[known].float()
        dice.append((2 * (one * target).sum() + 1) / (one.sum() + target.sum() + 1))
    expected = pixels + 0.5 * (1 - torch.stack(dice)).mean()
    config = train.Config(loss="bce=1,dice=0.5")
    value = train.loss(logits, mask, config)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    assert (logits.grad[:, :, :2] == 0).all(), "ignored pixels have no gradient"
    assert torch.isfinite(train.loss(logits, torch.full_like(mask, 255), config))
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0])
    each = F.cross_entropy(logits, mask[:, 0].long().clamp(max=3), weights, reduction="none")
    heavier = train.loss(logits, mask, train.Config(loss="bce=1"), weights)
    assert heavier.item() == pytest.approx(each[known].mean().item(), rel=1e-5)


def test_the_loss_of_overlapping_classes_is_the_mean_of_each():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 3, 8, 8)).float()
    mask[0, 1, :3] = 255
    config = train.Config()
    each = [train.loss(logits[:, k, None], mask[:, k, None], config).item() for k in range(3)]
    assert train.loss(logits, mask, config).item() == pytest.approx(np.mean(each), rel=1e-5)
    mask[:, 2] = 0  # a class that does not occur counts in BCE alone
    pixels = [
        train.loss(logits[:, k, None], mask[:, k, None], train.Config(loss="bce=1"))
        for k in (0, 1, 2)
    ]
    both = [train.loss(logits[:, k, None], mask[:, k, None], config) for k in (0, 1)]
    dice = sum(a - b for a, b in zip(both, pixels, strict=False)) / 2
    expected = sum(pixels) / 3 + dice
    assert train.loss(logits, mask, config).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("count", [2, 7])
def test_augmentation_fills_masks_of_classes_with_ignored(count):
    config = train.Config(height=64, width=96, tiles=False)
    planes = np.ones((count, 64, 96), np.uint8)
    planes[1] = 0
    augment = A.Compose([step for step in train.augmentation(config) if isinstance(step, A.Affine)])
    augment.transforms[0].p = 1
    seen = set()
    for seed in range(5):
        augment.set_random_seed(seed)
        changed = augment(image=np.zeros((64, 96, 3), np.uint8), masks=planes)["masks"]
        assert changed.shape == planes.shape
        borders = changed == 255
        assert (borders == borders[:1]).all(), "in all classes alike"
        assert set(np.unique(changed[1])) <= {0, 255}
        seen |= set(np.unique(changed))
    assert seen == {0, 1, 255}


def test_augmented_items_are_ignored_at_the_border_in_every_plane(tmp_path):
    """OpenCV fills with one number the first one of two channels alone."""
    found = find(write_competition(tmp_path))
    shape = {"height": 64, "width": 96}
    config = ModelConfig(**shape, **settings(found.classes))
    table = data.decode_pairs(data.scan(found.samples, found.classes), config, 0)
    augment = train.augmentation(train.Config(**shape, tiles=False))
    dataset = train.SegmentationDataset(table, config, 0, augment)
    shares = []
    for epoch in range(4):
        dataset.epoch.fill_(epoch)
        for item in map(dataset.__getitem__, range(len(dataset))):
            borders = item["mask"] == IGNORE  # the masks themselves ignore nothing
            assert borders.shape == (2, 64, 96)
            assert (borders[0] == borders[1]).all()
            shares.append(borders[1].float().mean().item())
    assert max(shares) > 0.05
    assert np.mean(np.array(shares) > 0) > 0.5, "most items are moved"


@pytest.mark.parametrize("count", [2, 7])
def test_outside_an_image_a_tile_is_ignored_in_every_class(count):
    config = ModelConfig(height=64, width=64, tiles=True)
    mask, image = np.ones((count, *SIZE), np.uint8), np.ones((*SIZE, 3), np.uint8)
    image, tile = images.cut_pair(image, mask, (0, 0), config)
    assert tile.shape == (count, 64, 64)
    assert (tile[:, :44, :60] == 1).all()
    assert (tile[:, 44:] == IGNORE).all()
    assert (tile[..., 60:] == IGNORE).all()
    assert image.shape == (64, 64, 3)
    assert (image == 1).all()


def test_the_memory_of_decoded_pairs_counts_every_class(tmp_path):
    found = find(write_competition(tmp_path))
    samples = data.scan(found.samples, found.classes)
    config = ModelConfig(height=32, width=64, **settings(found.classes))
    needed = len(samples) * 32 * 64 * (3 + 2)
    assert data.decode_pairs(samples, config, needed).pair[0] is None
    image, mask = data.decode_pairs(samples, config, needed + 1).pair[0]
    assert image.nbytes + mask.nbytes == 32 * 64 * (3 + 2)


def test_a_mask_of_many_classes_is_resized_by_the_nearest_pixel():
    mask = np.random.default_rng(0).integers(0, 2, (9, *SIZE), np.uint8)
    small = images.resize_mask(mask, ModelConfig(height=32, width=32))
    each = [cv2.resize(plane, (32, 32), interpolation=cv2.INTER_NEAREST_EXACT) for plane in mask]
    assert (small == np.stack(each)).all()


def test_weights_are_inverse_to_the_share_of_pixels():
    samples = pd.DataFrame({"shares": [(0.75, 0.25, 0.0)] * 3, "fold": [0, 1, 1]})
    weights = train.resolving.class_weights(samples, 0, "inverse")
    assert weights.tolist() == pytest.approx([2 / 3, 2, 0])
    assert train.resolving.class_weights(samples, 0, "none") is None


def test_folds_are_stratified_by_the_rarest_class():
    shares = np.zeros((40, 3))
    shares[:, 0] = 0.5
    shares[::4, 1] = 0.1
    shares[[3, 8, 21, 36], 2] = 0.01  # 8 and 36 have all three
    rows = {"id": [f"p{8 * i}" for i in range(40)], "category": "", "share": shares.sum(1)}
    samples = pd.DataFrame(rows).assign(shares=[tuple(row) for row in shares], fields=None)
    assert folds.strata_of_shares(samples).tolist().count(2) == 4
    fold = folds.assign_folds(samples, 4, 0).fold
    assert sorted(fold[[3, 8, 21, 36]]) == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------------
#  Prediction and scores
# --------------------------------------------------------------------------------------------------


def trained(found, **options):
    """A model with random weights."""
    torch.manual_seed(0)
    config = {"encoder": ENCODER, "height": 64, "width": 64, "precision": "32"} | options
    config = ModelConfig(**config, **settings(found))
    network = model.build_network(config).eval()
    return model.TrainedModel(network, config, {}, {})


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("found", [EXCLUSIVE, OVERLAPPING], ids=["exclusive", "overlapping"])
def test_probabilities_of_flips_models_and_tiles_are_averaged(found, tiles):
    one, image = trained(found, tiles=tiles), picture(labels(0))
    if tiles:
        image = np.tile(image, (2, 2, 1))
    plain = predict.predict_images([one], [image], 4, "false")[0]
    twice = predict.predict_images([one, one], [image], 4, "false")[0]
    assert (plain == twice).all()
    both = predict.predict_images([one], [image], 4, "true")[0]
    flipped = predict.predict_images([one], [image[:, ::-1]], 4, "true")[0][..., ::-1]
    assert both.shape == (2, *image.shape[:2])
    if found.exclusive:
        assert (both[0] != flipped[0]).mean() < 0.01
        assert (predict.postprocess(both, one.config) == both[0]).all()
        assert both[0].max() < 3
        assert both[1].min() >= 84  # a third at least
    else:
        assert np.abs(both.astype(int) - flipped).max() <= 1


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("tiles", [[False], [True], [True, True], [False, True], [False, False]])
def test_many_classes_are_predicted_in_blocks_as_at_once(exclusive, tiles, monkeypatch):
    names = tuple(map(str, range(40)))
    found = Classes(names, names, exclusive)
    models = [trained(found, tiles=is_tiled) for is_tiled in tiles]
    image = np.random.default_rng(0).integers(0, 255, (150, 90, 3), np.uint8)
    [blocks] = predict.predict_images(models, [image], 4)
    monkeypatch.setattr(predict, "CHANNELS", 99)
    monkeypatch.setattr(predict, "row_blocks", lambda *a: iter([predict.join(rows(*a))]))
    [whole] = predict.predict_images(models, [image], 4)
    assert blocks.shape == (2 if exclusive else 40, 150, 90)
    assert (blocks != whole).mean() < 1e-4
    assert np.abs(blocks.astype(int) - whole).max() <= 1 or exclusive


rows = predict.row_blocks


def test_models_of_other_classes_are_not_averaged(tmp_path):
    paths = []
    for number, found in enumerate((EXCLUSIVE, EXCLUSIVE._replace(exclusive=False), Classes())):
        paths.append(str(tmp_path / f"{number}.pt"))
        model.save_model(tmp_path / f"{number}.pt", trained(found))
    assert len(predict.load_models([paths[0], paths[0]], "cpu")) == 2
    for pair, words in (
        (paths[:2], "exclude each other and may overlap"),
        (paths[1:], "classes, "),
    ):
        with pytest.raises(UserError, match=f"--model: the models have different .*{words}"):
            predict.load_models(pair, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": ("car", "road")}, "classes, road, car and car, road"),
        ({"class_values": ("2", "3")}, "values of the classes, 1 and 3"),
        ({"target": "lane"}, "targets, road and lane"),
        ({"value_range": (0.0, 900.0)}, "ranges of values .--window., none, none and 0.0, 900.0"),
        ({"rle": "rows"}, "orders of RLE, columns and rows"),
    ],
)
def test_all_that_an_ensemble_must_agree_in_is_checked(tmp_path, changes, words):
    """Refused in a line that names what differs and both values."""
    classes = Classes(("road", "car"), ("2", "1"))
    for name, other in (("a", {}), ("b", changes)):
        found = trained(classes)
        found = found._replace(config=replace(found.config, **other))
        model.save_model(tmp_path / f"{name}.pt", found)
    paths = [str(tmp_path / f"{name}.pt") for name in "ab"]
    with pytest.raises(UserError, match=f"^--model: the models have different {words}; ") as error:
        predict.load_models(paths, "cpu")
    assert "\n" not in str(error.value)


def test_each_overlapping_class_has_its_threshold_and_area():
    tuned = {"thresholds": (0.2, 0.8), "areas": (0, 5)}
    config = ModelConfig(**settings(OVERLAPPING) | tuned)
    probability = np.zeros((2, 9, 9), np.uint8)
    probability[:, 1:3, 1:3] = 100
    probability[1, 5:8, 5:8] = 230
    mask = predict.postprocess(probability, config)
    assert mask.sum((1, 2)).tolist() == [4, 9]
    probability[1, 5:8, 5:7] = 0
    assert predict.postprocess(probability, config).sum((1, 2)).tolist() == [4, 0]


NUMBERS = itertools.count()


class Sample:
    """A row of the samples table, as far as `Evaluation` looks at it."""

    def __init__(self, category="", views=()):
        self.id, self.category, self.views = "", category, views
        self.image_id = next(NUMBERS)


def test_scores_of_exclusive_classes_equal_their_definition(tmp_path):
    rng = np.random.default_rng(0)
    found = Classes(("a", "b", "c", "d"), tuple("0123"), True)
    evaluation, parts = (metrics.Evaluation(found) for _ in range(2))
    pairs = []
    for _ in range(4):
        target = rng.choice(np.uint8([0, 1, 2, 255]), SIZE)  # d does not occur
        mask = np.where(rng.random(SIZE) < 0.6, target % 255, rng.integers(0, 4, SIZE)).astype(
            np.uint8
        )
        pairs.append((mask, target))
        prediction = np.stack([mask, mask])
        evaluation.add(Sample(), prediction, mask, target)
        parts.count(torch.as_tensor(prediction), torch.as_tensor(target))
    mask, target = (np.hstack(some) for some in zip(*pairs, strict=True))
    known = target != 255
    ious = [
        ((mask == k) & (target == k)).sum() / (((mask == k) | (target == k)) & known).sum()
        for k in range(3)
    ]
    block = evaluation.class_report()
    assert block["absent"] == ["d"]
    assert block["mIoU"] == pytest.approx(100 * np.mean(ious), abs=1e-3)
    assert block["per_class"]["b"]["IoU"] == pytest.approx(100 * ious[1], abs=1e-3)
    assert block["accuracy"] == pytest.approx(100 * (mask == target)[known].mean(), abs=1e-3)
    recall = ((mask == 2) & (target == 2)).sum() / (target == 2).sum()
    assert block["per_class"]["c"]["recall"] == pytest.approx(100 * recall, abs=1e-3)
    assert parts.class_report() == block
    report = evaluation.write(tmp_path, ())
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["classes"] == block
    assert written["threshold"] is None
    assert report["image"]["all"]["images"] == 4
    assert (tmp_path / "confusion.png").stat().st_size > 5000


def test_scores_of_overlapping_classes_equal_those_of_one(tmp_path):
    rng = np.random.default_rng(0)
    evaluation, *halves = (metrics.Evaluation(OVERLAPPING, "skip") for _ in range(3))
    alone = [metrics.Evaluation(Classes(), "skip") for _ in range(2)]
    for index in range(4):
        target = rng.choice(np.uint8([0, 1, 255]), (2, *SIZE))
        target[1] *= index > 0
        probability = rng.integers(0, 256, (2, *SIZE), np.uint8)
        mask = probability >= 100
        mask[1] &= index > 0
        for one in (evaluation, halves[index % 2]):
            one.add(Sample(), probability, mask, target)
        for k in range(2):
            alone[k].add(Sample(), probability[k, None], mask[k, None], target[k, None])
    report = evaluation.report()["image"]
    for k, name in enumerate(OVERLAPPING.names):
        own = alone[k].report()["image"]["all"]
        assert {key: report[name][key] for key in own} == own
    hits = [one for alone_of in alone for one in alone_of.image_hits]
    both = np.concatenate([metrics.mask_scores(one, "skip") for one in hits])
    assert np.isnan(both).sum() == 2, "one mask is empty, and right"
    assert evaluation.mean()["Dice"] == pytest.approx(100 * np.nanmean(both, 0)[0], abs=1e-3)
    halves[0].merge(halves[1])
    assert halves[0].report() == evaluation.report()
    assert halves[0].mean() == evaluation.mean()
    evaluation.write(tmp_path, (0.4, 0.5))
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["threshold"] == {"1": 0.4, "3": 0.5}
    assert (tmp_path / "pr_curve.png").exists()


class LowerPart:
    """A view that sees the lower part of an image, and beyond its right edge."""

    name = "below"

    def warp(self, pixels, outside=0):
        return np.pad(np.uint8(pixels[20:]), ((0, 0), (0, 9)), constant_values=outside)


@pytest.mark.parametrize("found", [EXCLUSIVE, OVERLAPPING], ids=["exclusive", "overlapping"])
def test_categories_and_views_of_several_classes_are_scored(tmp_path, found):
    rng = np.random.default_rng(0)
    whole, seen, half = (metrics.Evaluation(found) for _ in range(3))
    for index in range(4):
        if found.exclusive:
            target = rng.choice(np.uint8([0, 1, 2, 255]), SIZE)
            mask = rng.integers(0, 3, SIZE, np.uint8)
            prediction = np.stack([mask, mask + 100])
        else:
            target = rng.choice(np.uint8([0, 1, 255]), (2, *SIZE))
            prediction = rng.integers(0, 256, (2, *SIZE), np.uint8)
            mask = prediction >= 100
        category = ("day", "night")[index % 2]
        whole.add(Sample(category, (LowerPart(),)), prediction, mask, target)
        seen.add(Sample(category), *(array[..., 20:, :] for array in (prediction, mask, target)))
        if category == "night":
            half.add(Sample(), prediction, mask, target)
    report = whole.report()
    assert report["below"] == seen.report()["image"], "beyond the edge nothing counts"
    assert report["image"]["night"] == half.report()["image"]["all"]
    assert report["image"]["night"]["mIoU"] != report["image"]["all"]["mIoU"]
    assert {name: block["images"] for name, block in report["below"].items()} == {
        "all": 4, "day": 2, "night": 2, **({} if found.exclusive else {"1": 4, "3": 4}),
    }  # fmt: skip
    whole.write(tmp_path, plane_settings(found)["thresholds"])
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {view: written[view] for view in ("image", "below")} == report
    assert "below: mIoU" in whole.summary()


def test_a_class_may_have_the_name_of_a_category(tmp_path):
    found = Classes(("all", "car"), ("all", "car"))
    named, other = metrics.Evaluation(found), metrics.Evaluation(OVERLAPPING)
    prediction = np.random.default_rng(0).integers(0, 256, (2, *SIZE), np.uint8)
    target = np.stack([labels(0) == 1, labels(0) == 2]).astype(np.uint8)
    for evaluation in (named, other):
        evaluation.add(Sample("car"), prediction, prediction >= 128, target)
    blocks = [evaluation.report()["image"] for evaluation in (named, other)]
    assert blocks[0] == {name: blocks[1][name] for name in ("all", "car")}
    assert "mIoU" in named.summary()
    named.write(tmp_path, (0.5, 0.5))
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert set(written["classes"]["per_class"]) == {"all", "car"}


@pytest.mark.parametrize(("score", "expected"), [("1", 1), ("0", 0), ("skip", np.nan)])
def test_an_empty_mask_that_is_right_scores_as_asked(score, expected):
    empty = np.zeros((1, *SIZE), bool)

    def dice_of(mask):
        hits = metrics.count_hits(mask, np.zeros((1, *SIZE), np.uint8))
        return metrics.mask_scores(hits, score)[0, 0]

    assert dice_of(empty) == expected or np.isnan([dice_of(empty), expected]).all()
    assert dice_of(~empty) == 0
    counts = [metrics.pixel_counts(np.full(SIZE, 9, np.uint8), np.zeros(SIZE, np.uint8)).numpy()]
    full = metrics.pixel_counts(np.full(SIZE, 200, np.uint8), np.ones(SIZE, np.uint8)).numpy()
    values = tuning.scores_by_threshold(np.stack([*counts, full]), "dice", score)
    assert values[0, 5] == 0, "a false alarm"
    assert values[0, 50] == {"1": 1, "0": 0, "skip": 1}[score], "skipped, it changes no mean"
    assert not np.isnan(values).any()


# --------------------------------------------------------------------------------------------------
#  Pictures and submissions
# --------------------------------------------------------------------------------------------------


# How people with protanopia, deuteranopia and tritanopia see linear RGB (Machado, Oliveira,
# Fernandes, IEEE TVCG 2009, severity 1).
COLOUR_BLIND = np.array([
    [1, 0, 0, 0, 1, 0, 0, 0, 1],
    [0.1523, 1.0526, -0.2049, 0.1145, 0.7863, 0.0992, -0.0039, -0.0481, 1.0520],
    [0.3673, 0.8606, -0.2280, 0.2801, 0.6725, 0.0474, -0.0118, 0.0429, 0.9689],
    [1.2555, -0.0767, -0.1788, -0.0784, 0.9308, 0.1476, 0.0047, 0.6914, 0.3039],
]).reshape(4, 3, 3)  # fmt: skip
TO_XYZ = np.array([
    [0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505],
])  # fmt: skip


def to_lab(rgb):
    """Colours (n, 3) of 0..255 in CIE Lab as each kind of eye sees them, (n, 4, 3)."""
    values = rgb / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    seen = np.einsum("kij,nj->nki", COLOUR_BLIND, linear).clip(0, 1)
    xyz = seen @ TO_XYZ.T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@pytest.mark.parametrize("count", [2, 11, 19])
def test_the_colour_blind_tell_the_colours(count):
    table = classes.class_colours(tuple(map(str, range(count))))
    lab = to_lab(table.astype(float))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e9 * np.eye(count)[..., None]
    assert distance.min() > 15, "in Lab; 2 is just noticeable"
    assert (classes.class_colours(("background", "car"))[0] == 0).all()


def test_a_comparison_shows_classes_and_errors_with_a_legend():
    mask, image = labels(0).clip(max=2), picture(labels(0))
    wrong = mask.copy()
    wrong[30:, :20] = 0
    drawn = visualize.comparison(image, labels(0), wrong, "x", EXCLUSIVE)
    overlapping = np.stack([mask == 1, mask == 2])
    truth = np.stack([labels(0) == 1, labels(0) == 2]).astype(np.uint8)
    again = visualize.comparison(image, truth, overlapping, "x", OVERLAPPING)
    height = visualize.comparison(image, truth[:1], overlapping[:1], "x", Classes()).shape[0]
    for one in (drawn, again):
        assert one.shape[0] == height + 26, "a row with the names"
    panel = drawn[height // 2 + 30 : height, drawn.shape[1] // 2 + 3 :][: SIZE[0], : SIZE[1]]
    red = (panel[..., 0] > 150) & (panel[..., 1] < 120)
    assert (red == (wrong != mask)).mean() > 0.98


def test_the_colours_of_an_image_do_not_mix_with_those_of_classes():
    image = picture(labels(0))
    in_colour, in_grey = (
        visualize.comparison(one, labels(0), labels(1), "x", EXCLUSIVE)
        for one in (image, visualize.greyed(image))
    )
    right = in_colour.shape[1] // 2
    assert (in_colour[:, right:] == in_grey[:, right:]).all(), "prediction and errors"
    assert (in_colour[:, :right] != in_grey[:, :right]).any(), "the image is shown as it is"


def answers(path):
    with path.open() as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("joined", [False, True])
def test_a_submission_answers_each_image_and_class_of_the_sample_once(tmp_path, joined):
    write_competition(tmp_path, joined=joined)
    samples = pd.DataFrame({"id": ["p09", "p10", "p11"]})
    sample = str(tmp_path / "sample_submission.csv")
    submission = submissions.RleSubmission(samples, OVERLAPPING, sample)
    for row in samples.itertuples():
        target = labels(int(row.id[1:]))
        submission.add(row, None, np.stack([target == 1, (target == 2) & (row.id != "p10")]))
    submission.write(tmp_path)
    written, asked = (
        answers(tmp_path / "submission.csv"),
        answers(tmp_path / "sample_submission.csv"),
    )
    assert [row[:-1] for row in written] == [row[:-1] for row in asked]
    for row in written[1:]:
        name, value = row[0].rsplit("_", 1) if joined else row[:2]
        target = labels(int(name[1:3])) == {"1": 1, "3": 2}[value]
        expected = target & ((name, value) != ("p10.png", "3"))
        assert (decode(row[-1]) == expected).all()


def test_a_sample_that_does_not_fit_the_classes_is_refused(tmp_path):
    samples = pd.DataFrame({"id": ["p09"]})
    for text, words in (
        ("ImageId,ClassId,EncodedPixels\np09,1,\np09,4,\n", "does not have: 4"),
        ("ImageId,EncodedPixels\np09,\n", "rows name no class"),
        ("ImageId,ClassId,EncodedPixels\np09,1,\np09,1,\n", "twice"),
        ("ImageId,ClassId,EncodedPixels\np08,1,\n", "without an image"),
    ):
        (tmp_path / "sample.csv").write_text(text)
        sample = str(tmp_path / "sample.csv")
        with pytest.raises(UserError, match=words):
            submissions.RleSubmission(samples, OVERLAPPING, sample)


# --------------------------------------------------------------------------------------------------
#  From end to end
# --------------------------------------------------------------------------------------------------

SMALL = (
    "--encoder", ENCODER, "--encoder_weights", "none", "--height", 32, "--width", 64,
    "--batch_size", 4, "--folds", 3,
)  # fmt: skip


def test_exclusive_classes_from_end_to_end(tmp_path):
    write_label_maps(tmp_path / "data")
    (tmp_path / "data/classes.csv").write_text("id,name\n0,sky\n1,road\n2,car\n")
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out")
    printed = succeed("train.py", *flags, *SMALL, "--epochs", 2, "--class_weights", "inverse")
    assert "3 classes that exclude each other: sky" in printed
    assert "mIoU" in printed
    rows = pd.read_csv(tmp_path / "out/metrics.csv")
    assert {"mIoU", "mDice", "accuracy"} <= set(rows)
    for name in ("confusion.png", "validation.jpg", "curves.png", "examples.jpg", "augmented.jpg"):
        assert (tmp_path / "out" / name).exists()
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "p", "--submission", "png")
    succeed("infer.py", "--model", tmp_path / "out", *flags)
    scores = json.loads((tmp_path / "p/metrics.json").read_text())["classes"]
    total = np.zeros((3, 3), int)
    for index in range(12):
        own = np.asarray(Image.open(tmp_path / f"p/masks/p{index:02d}.png"))
        with zipfile.ZipFile(tmp_path / "p/submission.zip") as archive:
            grey = np.asarray(Image.open(archive.open(f"p{index:02d}.png")))
        assert (own == grey).all()
        known = labels(index) < 3
        np.add.at(total, (labels(index)[known], own[known]), 1)
    ious = total.diagonal() / (total.sum(0) + total.sum(1) - total.diagonal())
    assert scores["mIoU"] == pytest.approx(100 * ious.mean(), abs=1e-3)
    done = run("infer.py", "--model", tmp_path / "out", *flags[:4], "--submission", "kitti")
    assert done.returncode == 2
    assert "needs a model of one class, this one has 3" in done.stderr


def test_overlapping_classes_from_end_to_end(tmp_path):
    write_competition(tmp_path / "data")
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--folds", 2)
    printed = succeed("train.py", *flags, *SMALL[:-2], "--epochs", 1, "--fold", "all")
    assert "2 classes that may overlap: 1" in printed
    assert "out of fold: mIoU" in printed
    config = json.loads((tmp_path / "out/fold1/config.json").read_text())
    assert len(config["thresholds"]) == len(config["areas"]) == 2
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "p", "--submission", "rle")
    succeed("infer.py", "--model", tmp_path / "out", *flags)
    written = answers(tmp_path / "p/submission.csv")
    model_file = tmp_path / "out/fold1/model.pt"  # as a killed training leaves it: nothing tuned
    content = torch.load(model_file, weights_only=True)
    content["model"] |= {"thresholds": (0.5, 0.5), "areas": (0, 0)}
    torch.save(content, model_file)
    assert "thresholds and minimum areas: 1 from" in succeed(
        "infer.py", "--model", tmp_path / "out", *flags[:2], "--out", tmp_path / "q"
    )
    asked = answers(tmp_path / "data/sample_submission.csv")
    assert [row[:2] for row in written] == [row[:2] for row in asked]
    for name, value, runs in written[1:]:
        mask = np.asarray(Image.open(tmp_path / "p/masks" / value / name))
        assert (decode(runs) == (mask == 255)).all()


LISTS = {
    "id,name": "id,name\n0,sky\n5,road\n",
    "class_id,class_name": "class_id,class_name\n0,sky\n5,road\n",
    "value,class": "value,class\n0,sky\n5,road\n",
    "Pixel Value, Class": "Pixel Value, Class\n0, sky\n5, road\n",
    "label,id": "label,id\nsky,0\nroad,5\n",
    "label,name": "label,name\n0,sky\n5,road\n",
    "without titles": "0,sky\n5,road\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_columns_of_a_list_of_classes_are_told_by_titles_or_content(tmp_path, kind):
    (tmp_path / "classes.csv").write_text(LISTS[kind])
    listed = classes.read_classes(tmp_path / "classes.csv")
    assert [(entry.name, entry.id) for entry in listed] == [("sky", "0"), ("road", "5")]


@pytest.mark.parametrize(
    "text",
    [
        "Name,R,G,B\nsky,1,2,3\nroad,4,5,6\n",
        " name, r, g, b\nsky,1,2,3\nroad,4,5,6\n",
        "class,red,green,blue\nsky,1,2,3\nroad,4,5,6\n",
        "sky,1,2,3\nroad,4,5,6\n",
    ],
)
def test_colours_of_a_list_of_classes(tmp_path, text):
    (tmp_path / "class_dict.csv").write_text(text)
    listed = classes.read_classes(tmp_path / "class_dict.csv")
    assert listed == (("sky", "", "#010203"), ("road", "", "#040506"))
