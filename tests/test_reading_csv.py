"""csv files as people have them: the order of RLE, ids, empty masks, classes, submissions."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run, succeed
from PIL import Image

from kit.config import Classes
from kit.data import rle
from kit.data.samples import find_samples
from kit.errors import UserError
from kit.results.submissions import RleSubmission, find_sample_submission

ORDERS = ("columns", "rows", "columns from 0", "rows from 0", "relative")
EMPTY = ("", "-", "-1", "1 0", "0 0", "NaN", "null")


def ellipse(number, size):
    """A noisy image (h, w, 3) with one bright ellipse, and its mask (h, w) bool."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: size[0], : size[1]]
    centre = rng.uniform(0.35, 0.65, 2) * size
    radii = rng.uniform(0.12, 0.28, 2) * size
    mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    mask[0, 0] = number == 0  # a run that starts at the first pixel
    pixels = 60 + 120 * mask[..., None] + rng.normal(0, 20, (*size, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), mask


def write_images(folder, count=8, size=(44, 60), name="p{:02d}.png", first=0):
    """Returns {stem: mask}."""
    folder.mkdir(parents=True)
    masks = {}
    for number in range(first, first + count):
        pixels, mask = ellipse(number, size)
        path = folder / name.format(number)
        Image.fromarray(pixels).save(path)
        masks[path.stem] = mask
    return masks


def plain_encode(mask, order="columns"):
    """RLE pixel by pixel."""
    flat = (mask if order.startswith("rows") else mask.T).ravel().tolist()
    base = 0 if order == "relative" or order.endswith("from 0") else 1
    runs, end, length = [], 0, 0
    for place, inside in enumerate([*flat, False]):
        if inside:
            length += 1
        elif length:
            start = place - length
            runs += [start - end if order == "relative" else start + base, length]
            end, length = place, 0
    return " ".join(map(str, runs))


def write_csv(path, rows, encoding="utf-8", delimiter=","):
    content = io.StringIO()
    csv.writer(content, delimiter=delimiter, lineterminator="\n").writerows(rows)
    path.write_bytes(content.getvalue().encode(encoding))


def read(root, masks, **options):
    """The collection of a folder, whose masks must be these."""
    collection = find_samples(str(root), training=True, **options)
    assert collection.samples.id.tolist() == sorted(masks)
    for row in collection.samples.itertuples():
        mask = masks[row.id]
        assert np.array_equal(row.mask.read(mask.shape), mask[None]), row.id
    return collection


def refused(root, *words, **options):
    with pytest.raises(UserError) as error:
        find_samples(str(root), **({"training": True} | options))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    return message


# --------------------------------------------------------------------------------------------------
#  The order of the runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_equals_a_plain_encoder_and_is_decoded_again(order):
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 7), (7, 1), (5, 9), (31, 17)):
        for density in (0, 0.1, 0.5, 0.9, 1):
            mask = rng.random(shape) < density
            runs = rle.rle_encode(mask, order)
            assert runs == plain_encode(mask, order)
            assert (rle.rle_decode(runs, shape, order=order) == mask).all()


@pytest.mark.parametrize("size", [(44, 60), (48, 48)], ids=["oblong", "square"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_is_found_and_said(tmp_path, capsys, order, size):
    masks = write_images(tmp_path / "train", size=size)
    rows = [(stem, plain_encode(mask, order)) for stem, mask in masks.items()]
    write_csv(tmp_path / "train.csv", [("id", "rle"), *rows])
    assert read(tmp_path, masks).rle == order
    [line] = capsys.readouterr().out.strip().splitlines()
    assert f"train.csv: RLE {order} (" in line


def test_where_nothing_tells_columns_are_taken_and_said(tmp_path, capsys):
    masks = write_images(tmp_path / "train", size=(48, 48))
    for path in (tmp_path / "train").iterdir():
        Image.new("RGB", (48, 48)).save(path)
    rows = [(stem, plain_encode(mask)) for stem, mask in masks.items()]
    write_csv(tmp_path / "train.csv", [("id", "rle"), *rows])
    assert read(tmp_path, masks).rle == "columns"
    assert "neither outlines nor edges tell" in capsys.readouterr().out


def test_the_order_can_be_named(tmp_path):
    masks = write_images(tmp_path / "train", size=(48, 48))
    for order in ("rows", "columns from 0", "relative"):
        rows = [(stem, plain_encode(mask, order)) for stem, mask in masks.items()]
        write_csv(tmp_path / "train.csv", [("id", "rle"), *rows])
        assert read(tmp_path, masks, rle=order.split()[0]).rle == order
    rows = [(stem, plain_encode(mask)) for stem, mask in masks.items()]
    write_csv(tmp_path / "train.csv", [("id", "rle"), *rows])
    refused(tmp_path, "--rle relative", "train.csv", "absolute", rle="relative")


def test_unsorted_runs_are_asked_about(tmp_path):
    masks = write_images(tmp_path / "train")
    rows = []
    for stem, mask in masks.items():
        numbers = plain_encode(mask).split()
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        rows.append((stem, " ".join(f"{start} {length}" for start, length in reversed(pairs))))
    write_csv(tmp_path / "train.csv", [("id", "rle"), *rows])
    refused(tmp_path, "train.csv", "--rle")
    assert read(tmp_path, masks, rle="columns").rle == "columns"


def test_masks_in_files_keep_the_order_of_the_flag(tmp_path):
    for stem, mask in write_images(tmp_path / "images").items():
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "masks" / f"{stem}.png")
    assert find_samples(str(tmp_path), training=True).rle == "columns"
    assert find_samples(str(tmp_path), training=True, rle="rows").rle == "rows"


# --------------------------------------------------------------------------------------------------
#  Reading
# --------------------------------------------------------------------------------------------------

FORMS = {  # encoding, delimiter, header, a row of an image's stem, its number, and its RLE
    "utf-16 with tabs": ("utf-16", "\t", ["id", "rle"], lambda s, n, r: [s, r]),
    "semicolons": ("utf-8-sig", ";", ["id", "rle"], lambda s, n, r: [s, r]),
    "paths of Windows": ("utf-8", ",", ["id", "rle"], lambda s, n, r: [rf"train\{s}.png", r]),
    "paths of Unix": ("utf-8", ",", ["id", "rle"], lambda s, n, r: [f"../x/{s}.png", r]),
    "another suffix": ("utf-8", ",", ["id", "rle"], lambda s, n, r: [f"{s}.tiff", r]),
    "upper case": ("utf-8", ",", ["ID", "RLE"], lambda s, n, r: [f"{s.upper()}.PNG", r]),
    "index": ("utf-8", ",", ["", "photo", "runs"], lambda s, n, r: [n, s, r]),
    "trailing commas": ("utf-8", ",", ["id", "rle", "", ""], lambda s, n, r: [s, r, "", ""]),
    "rows that end in commas": ("utf-8", ",", ["id", "rle"], lambda s, n, r: [s, r, ""]),
    "ids last": ("utf-8", ",", ["rle", "size", "id"], lambda s, n, r: [r, 7, s]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_csv(tmp_path, form):
    encoding, delimiter, header, make_row = FORMS[form]
    masks = write_images(tmp_path / "train")
    rows = [make_row(s, n, plain_encode(m)) for n, (s, m) in enumerate(masks.items())]
    name = "TRAIN.CSV" if form == "upper case" else "train.csv"
    write_csv(tmp_path / name, [header, *rows], encoding, delimiter)
    read(tmp_path, masks)


@pytest.mark.parametrize("empty", EMPTY)
def test_ways_to_write_an_empty_mask(tmp_path, empty):
    masks = write_images(tmp_path / "train")
    for stem in list(masks)[::2]:
        masks[stem] = np.zeros_like(masks[stem])
    rows = [(stem, plain_encode(mask) or empty) for stem, mask in masks.items()]
    write_csv(tmp_path / "train.csv", [("id", "rle"), *rows])
    read(tmp_path, masks)


def test_ids_that_lost_their_zeros(tmp_path):
    masks = write_images(tmp_path / "train", 12, name="{:03d}.png", first=5)
    rows = [(n, int(s), plain_encode(m)) for n, (s, m) in enumerate(masks.items())]
    write_csv(tmp_path / "train.csv", [("", "image", "rle"), *rows])
    read(tmp_path, masks)
    Image.new("RGB", (60, 44)).save(tmp_path / "train" / "5.png")
    masks["5"] = masks["005"]
    masks["005"] = np.zeros((44, 60), bool)
    read(tmp_path, masks)  # an image with exactly this name comes first


def test_rows_and_images_that_are_both_unmatched_are_refused(tmp_path):
    masks = write_images(tmp_path / "train")
    rows = [(stem.replace("p03", "q03"), plain_encode(mask)) for stem, mask in masks.items()]
    write_csv(tmp_path / "train.csv", [("id", "rle"), *rows])
    refused(tmp_path, "train.csv", "q03", "p03")
    masks["p03"] = np.zeros_like(masks["p03"])
    write_csv(tmp_path / "train.csv", [("id", "rle"), *rows[:3], *rows[4:]])
    read(tmp_path, masks)


def test_a_csv_that_nobody_named_stops_nothing(tmp_path, capsys):
    masks = write_images(tmp_path / "photos")
    (tmp_path / "addresses.csv").write_bytes("Name;Straße\nX;Y\n".encode("latin-1"))
    (tmp_path / "photos" / "broken.csv").write_bytes(b'a,"b\nc\x00')
    (tmp_path / "._train.csv").write_bytes(b"\x00\x05\x16\x07id,rle\nx,1 2\n")
    write_csv(tmp_path / "sizes.csv", [("name", "size"), ("p00", "60x44")])
    assert set(find_samples(str(tmp_path / "photos")).samples["mask"]) == {None}
    assert not capsys.readouterr().out
    for rows in (["other,1 2"], [b"p\xff,1 2"], ["p00,1 2", "other,1 2"], ["p00,1 2,3"]):
        lines = [row if isinstance(row, bytes) else row.encode() for row in rows]
        (tmp_path / "train.csv").write_bytes(b"\n".join([b"id,rle", *lines]))
        assert set(find_samples(str(tmp_path / "photos")).samples["mask"]) == {None}
        assert "no scores: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train\.csv"):
        find_samples(str(tmp_path / "photos"), masks=str(tmp_path / "train.csv"))
    for stem, mask in masks.items():
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{stem}.png")
    paths = [(f"photos/{stem}.png", f"masks/{stem}.png") for stem in masks]
    write_csv(tmp_path / "train.csv", [("image", "mask"), *paths])
    read(tmp_path / "photos", masks)


@pytest.mark.parametrize("names", [("height", "width"), ("img_height", "img_width")])
def test_columns_of_another_size_are_refused(tmp_path, names):
    masks = write_images(tmp_path / "train")
    header, runs = ("id", *names, "rle"), {s: plain_encode(m) for s, m in masks.items()}
    write_csv(tmp_path / "train.csv", [header, *((s, 44, 60, r) for s, r in runs.items())])
    read(tmp_path, masks)
    write_csv(tmp_path / "train.csv", [header, *((s, 60, 44, r) for s, r in runs.items())])
    message = refused(tmp_path, "train.csv", "p00.png is 60x44, not 44x60", "8 in all")
    assert "p06.png" not in message


CLASSES = {
    "ClassId": lambda stem, label: (stem, label),
    "class": lambda stem, label: (stem, f"kind {label}"),
    "": lambda stem, label: (f"{stem}.jpg_{label}",),
    "joined": lambda stem, label: (f"{stem}_kind_{label}",),
}


def test_numbers_of_classes_are_no_ids_of_images_that_are_numbered(tmp_path):
    masks = write_images(tmp_path / "train", name="{}.png")
    rows = [(f"{stem}.png", label, plain_encode(masks[stem])) for stem in masks for label in (1, 3)]
    write_csv(tmp_path / "train.csv", [("ImageId", "ClassId", "EncodedPixels"), *rows])
    collection = find_samples(str(tmp_path), training=True)
    assert collection.classes.names == ("1", "3")
    for row in collection.samples.itertuples():
        assert np.array_equal(row.mask.read((44, 60)), 2 * [masks[row.id]]), row.id


@pytest.mark.parametrize("name", CLASSES)
def test_several_classes_are_found_and_one_alone_is_none(tmp_path, name):
    masks = write_images(tmp_path / "train")
    rows = [
        (*CLASSES[name](stem, label), plain_encode(mask))
        for label in (1, 3)
        for stem, mask in list(masks.items())[: 5 * label]
    ]
    header = ("id", name, "rle") if len(rows[0]) == 3 else ("Image_Label", "rle")
    write_csv(tmp_path / "train.csv", [header, *rows])
    found = find_samples(str(tmp_path), training=True)
    assert [value[-1] for value in found.classes.values] == ["1", "3"]
    assert not found.classes.exclusive
    for number, row in enumerate(found.samples.itertuples()):
        pixels = row.mask.read((44, 60))
        assert (pixels[1] == masks[row.id]).all()
        assert (pixels[0] == masks[row.id] * (number < 5)).all()
    if len(rows[0]) == 3:  # one class alone
        write_csv(tmp_path / "train.csv", [header, *rows[5:]])
        read(tmp_path, masks)


# --------------------------------------------------------------------------------------------------
#  Submissions
# --------------------------------------------------------------------------------------------------

STEMS = ["t00", "t01", "t02", "t03"]


def submission_of(root, name, rows, order="columns"):
    """What is written after the sample, with one mask that is not empty, t00's."""
    (root / "test").mkdir(exist_ok=True)
    if rows:
        write_csv(root / name, rows)
    samples = pd.DataFrame({"id": STEMS})
    found = find_sample_submission(root / "test", STEMS)
    submission = RleSubmission(samples, Classes(), found, "error", order)
    mask = np.zeros((1, 4, 6), bool)
    for row in samples.itertuples():
        mask[0, 1, 2:] = row.id == "t00"
        submission.add(row, mask, mask)
    submission.write(root)
    with (root / "submission.csv").open() as file:
        return [tuple(row) for row in csv.reader(file)]


SAMPLES = {
    "the last column": ("id", "height", "width", "prediction_string", [("{}", "44", "60", "")], 3),
    "an index": ("", "ImageId", "EncodedPixels", [("{n}", "{}", "1 1")], 2),
    "by value": ("answer", "note", "image", [("1 1", "pixels", "{}.tif")], 0),
    "by name": ("EncodedPixels", "image", "weight", [("", "{}", "1.0")], 0),
    "the last": ("photo", "remark", "answer", [("{}", "", "")], 2),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_column_of_the_sample(tmp_path, name):
    *header, [row], column = SAMPLES[name]
    rows = [[field.format(s, n=n) for field in row] for n, s in enumerate(reversed(STEMS))]
    written = submission_of(tmp_path, "sample_submission.csv", [header, *rows])
    assert written[0] == tuple(header)
    for before, after in zip(rows, written[1:], strict=True):
        answer = "10 1 14 1 18 1 22 1" if any("t00" in field for field in before) else ""
        before[column] = answer
        assert after == tuple(before)


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_mask_is_written_as_in_the_sample(tmp_path, capsys, empty):
    rows = [("id", "rle"), *((stem, empty) for stem in STEMS)]
    written = submission_of(tmp_path, "SampleSubmission.csv", rows, "rows")
    assert written == [("id", "rle"), ("t00", "9 4"), *((stem, empty) for stem in STEMS[1:])]
    assert f"SampleSubmission.csv (ids in id, RLE in rle, by rows, empty: {empty!r})" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "name", ["SampleSubmission.csv", "submission_format.csv", "stage1_sample_submission.CSV"]
)
def test_names_of_the_sample(tmp_path, name):
    rows = [("id", "rle"), *((stem, "") for stem in reversed(STEMS))]
    assert [row[0] for row in submission_of(tmp_path, name, rows)[1:]] == STEMS[::-1]


def test_of_several_samples_the_one_with_the_ids(tmp_path, capsys):
    write_csv(tmp_path / "a_sample_submission.csv", [("id", "rle"), ("x", ""), ("y", "")])
    (tmp_path / "._sample_submission.csv").write_bytes(b"\x00\xff")
    rows = [("id", "rle"), *((stem, "-") for stem in STEMS)]
    assert submission_of(tmp_path, "sample_submission_2.csv", rows)[2] == ("t01", "-")
    assert "sample submission: " in capsys.readouterr().out


def test_no_sample_is_said(tmp_path, capsys):
    write_csv(tmp_path / "scores.csv", [("id", "rle"), ("x", "1 1")])
    written = submission_of(tmp_path, "", [])
    assert written[1:] == [("t00", "10 1 14 1 18 1 22 1"), *((stem, "") for stem in STEMS[1:])]
    assert "sample submission: none found" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
#  The commands
# --------------------------------------------------------------------------------------------------


def test_the_order_of_training_is_that_of_the_submission(tmp_path):
    masks = write_images(tmp_path / "train", 6)
    rows = [(f"{stem}.png", plain_encode(mask, "rows")) for stem, mask in masks.items()]
    write_csv(tmp_path / "train_masks.csv", [("img", "rle_mask"), *rows])
    out = tmp_path / "out"
    flags = ("--data", tmp_path, "--encoder", "resnet18", "--encoder_weights", "none")
    done = run("train.py", *flags, "--out", out, "--rle", "relative")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --rle relative")
    assert not out.exists()
    printed = succeed("train.py", *flags, "--out", out, "--epochs", 1, "--folds", 3)
    assert "train_masks.csv: RLE rows (" in printed
    content = torch.load(out / "model.pt", weights_only=True)
    assert content["model"]["rle"] == content["config"]["rle"] == "rows"
    assert content["model"]["thresholds"] == (0.5,), "two validation images"
    write_images(tmp_path / "test", 2)
    flags = ("--model", out, "--data", tmp_path, "--submission", "rle", "--threshold", 0)
    for more, expected in (((), "rows"), (("--rle", "columns"), "columns")):
        printed = succeed("infer.py", *flags, "--out", tmp_path / "p", *more)
        assert "sample submission: none found" in printed
        for path in (tmp_path / "p" / "masks").iterdir():
            mask = np.asarray(Image.open(path)) > 0
            assert f"{path.stem},{plain_encode(mask, expected)}\n" in (
                (tmp_path / "p" / "submission.csv").read_text()
            )
