"""csv files as people have them: the order of RLE, ids, empty masks, classes, submissions."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENCODER, run, succeed
from PIL import Image

from kit.config import Classes
from kit.data import rle
from kit.data.samples import find_samples
from kit.errors import UserError
from kit.results.submissions import RleSubmission, check_sample, find_sample_submission

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


COUNTERS = {
    "from 1": (("", "name", "rle"), 1, 12),
    "from 0": (("", "name", "rle"), 0, 12),
    "with gaps": (("", "name", "rle"), 3, 12),
    "of annotations": (("annotation_id", "image_id", "rle"), 1, 9),
    "without a name": (("id", "photo", "rle"), 1, 12),
    "of a part": (("id", "image_id", "rle"), 1, 9),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_a_counter_is_no_id_of_images_that_are_numbers(tmp_path, name):
    """Rows in another order than the images; of annotations two rows for each image."""
    header, first, filled = COUNTERS[name]
    masks = write_images(tmp_path / "train", 12, name="{}.png", first=1)
    stems = sorted(masks, key=lambda stem: int(stem) * 5 % 13)[:filled]
    for stem in set(masks) - set(stems):
        masks[stem] = np.zeros_like(masks[stem])
    rows = [(stem, plain_encode(masks[stem])) for stem in stems]
    if name == "of annotations":
        rows = [row for row in rows for _ in range(2)]
    step = 2 if name == "with gaps" else 1
    rows = [(first + step * number, *row) for number, row in enumerate(rows)]
    write_csv(tmp_path / "train.csv", [header, *rows])
    read(tmp_path, masks)


def test_names_are_ids_before_numbers(tmp_path):
    masks = write_images(tmp_path / "train", 12, name="{}.png", first=1)
    rows = [(n, f"train/{stem}.png", plain_encode(masks[stem])) for n, stem in enumerate(masks)]
    write_csv(tmp_path / "train.csv", [("id", "file", "rle"), *rows])
    read(tmp_path, masks)


def test_two_columns_of_ids_are_asked_about(tmp_path):
    masks = write_images(tmp_path / "train", 8, name="{}.png", first=1)
    rows = [(s, 1 + (int(s) - 1) * 5 // 8, plain_encode(m)) for s, m in masks.items()]
    write_csv(tmp_path / "train.csv", [("number", "organ", "rle"), *rows])
    refused(tmp_path, "train.csv", "'number'", "'organ'", "image_id")
    write_csv(tmp_path / "train.csv", [("image_id", "organ", "rle"), *rows])
    read(tmp_path, masks)


@pytest.mark.parametrize("place", ["train_v2", "train_img", "train_images/train_images"])
def test_images_in_folders_of_any_name(tmp_path, place):
    root = tmp_path / "data"
    masks = write_images(root / place)
    write_images(root / place.replace("train", "test"), first=40)
    write_images(root / "unlabelled", name="u{}.png")
    (tmp_path / "other_masks").mkdir()  # of something else
    rows = [(f"./{place}/{stem}.png", plain_encode(mask)) for stem, mask in masks.items()]
    write_csv(root / "train_runs.csv", [("img_path", "mask_rle"), *rows])
    read(root, masks)
    found = find_samples(str(root)).samples
    assert found.id[0] == "p40", "infer.py predicts the test"


@pytest.mark.parametrize(
    "path",
    [
        "{case}/{case}_day0/scans/slice_{n:04d}_60_44_1.50.png",
        "{case}_day0/images/slice_{n:04d}.png",
    ],
)
def test_ids_that_a_rule_makes_of_folders(tmp_path, path):
    drawn, rows, masks = write_images(tmp_path / "drawn"), [], {}
    for number, (stem, mask) in enumerate(drawn.items()):
        case, n = f"case{number // 4}", number % 4
        target = tmp_path / "data" / "train" / path.format(case=case, n=n)
        target.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "drawn" / f"{stem}.png").rename(target)
        masks[f"{case}_day0_slice_{n:04d}"] = mask
        rows += [(f"{case}_day0_slice_{n:04d}", label, plain_encode(mask)) for label in "ab"]
    write_csv(tmp_path / "data" / "train.csv", [("id", "class", "segmentation"), *rows])
    found = find_samples(str(tmp_path / "data"), training=True)
    assert found.samples.id.tolist() == sorted(masks)
    for row in found.samples.itertuples():
        assert np.array_equal(row.mask.read((44, 60)), 2 * [masks[row.id]])


@pytest.mark.parametrize("header", [("Left Lung", "Right Lung"), ("EncodedPixels_1", "rle_2")])
def test_columns_of_runs_are_classes(tmp_path, header):
    masks = write_images(tmp_path / "images")
    rows = [(s, 0.9, plain_encode(m) * (s > "p05"), plain_encode(m)) for s, m in masks.items()]
    write_csv(tmp_path / "train.csv", [("image_id", "quality", *header), *rows])
    found = find_samples(str(tmp_path), training=True)
    assert found.classes == Classes(header, header)
    for row in found.samples.itertuples():
        expected = [masks[row.id] * (row.id > "p05"), masks[row.id]]
        assert np.array_equal(row.mask.read((44, 60)), expected)


def test_a_flag_is_no_class(tmp_path, capsys):
    masks = write_images(tmp_path / "train")
    for stem in list(masks)[::2]:
        masks[stem] = np.zeros_like(masks[stem])
    rows = [(s, plain_encode(m) or "-1", int(m.any())) for s, m in masks.items()]
    write_csv(tmp_path / "train.csv", [("ImageId", "EncodedPixels", "label"), *rows])
    assert read(tmp_path, masks).classes == Classes()
    assert "no classes" in capsys.readouterr().out


@pytest.mark.parametrize("joined", [False, True])
def test_the_class_of_a_label_with_attributes(tmp_path, joined):
    masks = write_images(tmp_path / "train")
    labels = {stem: ("6_20_116", "6", "23")[n % 3] for n, stem in enumerate(masks)}
    rows = [(s, labels[s], plain_encode(m)) for s, m in masks.items()]
    if joined:
        rows = [(f"{stem}.png_{label}", runs) for stem, label, runs in rows]
    header = ("Image_Label", "rle") if joined else ("ImageId", "ClassId", "EncodedPixels")
    write_csv(tmp_path / "train.csv", [header, *rows])
    found = find_samples(str(tmp_path), training=True)
    assert found.classes.values == ("6", "23")
    for row in found.samples.itertuples():
        number = int(labels[row.id] == "23")
        assert np.array_equal(row.mask.read((44, 60))[number], masks[row.id])


def test_joined_ids_of_images_of_which_few_are_there(tmp_path, capsys):
    masks = write_images(tmp_path / "train", 12)
    rows = [(f"{s}.jpg_{c}", plain_encode(m)) for s, m in masks.items() for c in ("Fish", "Sugar")]
    write_csv(tmp_path / "train.csv", [("Image_Label", "EncodedPixels"), *rows])
    for stem in list(masks)[4:]:
        (tmp_path / "train" / f"{stem}.png").unlink()
    found = find_samples(str(tmp_path), training=True)
    assert found.classes.names == ("Fish", "Sugar")
    assert len(found.samples) == 4
    assert "8 ids have no image" in capsys.readouterr().out


def test_lists_of_runs_and_a_word_for_empty_masks(tmp_path, capsys):
    masks = write_images(tmp_path / "train")
    rows = []
    for stem, mask in masks.items():
        runs = plain_encode(mask).split()
        rows.append((stem, "[9, 9, 30, 40]", f"[{', '.join(runs[20:])}];[{', '.join(runs[:20])}]"))
    for stem in list(masks)[::2]:
        rows[int(stem[1:])] = (stem, "[9, 9, 30, 40]", "authentic")
        masks[stem] = np.zeros_like(masks[stem])
    write_csv(tmp_path / "train.csv", [("case_id", "box", "annotation"), *rows])
    assert read(tmp_path, masks).rle == "columns"
    assert "annotation is 'authentic' in 4 rows" in capsys.readouterr().out


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


def answers_of(root, rows, masks, classes=Classes(), order="columns", **options):  # noqa: B008
    """submission.csv, and what it holds: {(id, ...): masks} by a plain decoder.

    `masks`: {path of a test image below `root`: planes (K, h, w)}.
    """
    write_csv(root / "sample_submission.csv", rows)
    samples = pd.DataFrame({"id": [p.replace("/", "_")[:-4] for p in masks]})
    samples["image"] = [root / path for path in masks]
    for path, planes in zip(samples.image, masks.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(planes[0])).save(path)
    found = find_sample_submission(samples.image[0].parent, samples.id, root)
    submission = RleSubmission(samples, classes, found, "error", order, **options)
    for row, planes in zip(samples.itertuples(), masks.values(), strict=True):
        submission.add(row, None, planes)
    submission.write(root)
    with (root / "submission.csv").open() as file:
        return [tuple(row) for row in csv.reader(file)]


def two_objects(size=(24, 30), shift=0):
    mask = np.zeros((1, *size), bool)
    mask[0, 3 : 9 + shift, 4:11] = mask[0, 14:20, 15 : 22 + shift] = True
    return mask


@pytest.mark.parametrize("order", ORDERS)
def test_instances_are_rows(tmp_path, capsys, order):
    masks = {f"test/t{n}.png": two_objects(shift=n) for n in range(3)}
    masks["test/t1.png"][:] = False
    rows = [("ImageId", "EncodedPixels"), *((f"t{n}.png", "-1") for n in (2, 1, 0))]
    written = answers_of(tmp_path, rows, masks, order=order, instances="rows")
    assert [row[0] for row in written[1:]] == ["t2.png", "t2.png", "t1.png", "t0.png", "t0.png"]
    assert written[3] == ("t1.png", "-1"), "one row where there is no object"
    for number, pair in ((2, written[1:3]), (0, written[4:])):
        both = [rle.rle_decode(runs, (24, 30), order=order) for _, runs in pair]
        assert not (both[0] & both[1]).any()
        assert ((both[0] | both[1]) == two_objects(shift=number)[0]).all()
    assert "--instances union" in capsys.readouterr().out
    united = answers_of(tmp_path, rows, masks, order=order)
    assert united[1:] == [
        (f"t{n}.png", plain_encode(masks[f"test/t{n}.png"][0], order) or "-1") for n in (2, 1, 0)
    ]


def test_the_size_of_the_masks(tmp_path, capsys):
    masks = {f"test/t{n}.png": np.kron(two_objects(shift=n), np.ones((4, 4))) > 0 for n in (0, 1)}
    rows = [("id", "rle"), ("t0", "1 1"), ("t1", "1 1")]
    small = [(f"t{n}", plain_encode(two_objects(shift=n)[0])) for n in (0, 1)]
    assert answers_of(tmp_path, rows, masks, size=(24, 30))[1:] == small
    assert "30x24" in capsys.readouterr().out
    own = [(f"t{n}", plain_encode(masks[f"test/t{n}.png"][0])) for n in (0, 1)]
    assert answers_of(tmp_path, rows, masks)[1:] == own
    full = [("id", "rle"), ("t0", f"1 {24 * 30}"), ("t1", f"1 {24 * 30}")]
    assert answers_of(tmp_path, full, masks)[1:] == small, "told by the sample's full masks"
    beyond = [("id", "rle"), ("t0", "1 4"), ("t1", "99999 4")]
    with pytest.raises(UserError, match=r"120x96; .*--submission_size"):
        answers_of(tmp_path, beyond, masks)


@pytest.mark.parametrize("separator", [", ", ",", " "])
def test_lists_of_runs_as_in_the_sample(tmp_path, separator):
    masks = {f"test/t{n}.png": two_objects(shift=n) for n in range(3)}
    masks["test/t1.png"][:] = False
    rows = [("case_id", "annotation"), ("t0", "authentic"), ("t1", "authentic")]
    with pytest.raises(UserError, match=r"'authentic', not RLE; .*such as 1 2 or \[1, 2\]"):
        answers_of(tmp_path, [*rows, ("t2", "authentic")], masks)
    example = f"[1{separator}2];[9{separator}2]"
    written = dict(answers_of(tmp_path, [*rows, ("t2", example)], masks)[1:])
    assert written["t1"] == "authentic"
    for name in ("t0", "t2"):
        parts = [part.strip("[]").split(separator) for part in written[name].split(";")]
        both = [rle.rle_decode(" ".join(part), (24, 30)) for part in parts]
        assert len(both) == 2
        assert ((both[0] | both[1]) == masks[f"test/{name}.png"][0]).all()
    words = answers_of(tmp_path, [*rows, ("t2", "1 2")], masks)
    assert words[1:] == [
        (f"t{n}", plain_encode(masks[f"test/t{n}.png"][0]) or "authentic") for n in range(3)
    ]


@pytest.mark.parametrize(
    "answers", [("predictions/t0_mask.png", "predictions/t1_mask.png"), ("0", "0"), ("0", "1")]
)
def test_what_is_no_rle_is_not_overwritten(tmp_path, answers):
    masks = {f"test/t{n}.png": two_objects() for n in range(2)}
    with pytest.raises(UserError, match="prediction holds .*, not RLE; "):
        answers_of(tmp_path, [("id", "prediction"), ("t0", answers[0]), ("t1", answers[1])], masks)


@pytest.mark.parametrize("place", ["test/kidney_{}/images", "test/case{0}/case{0}_day1/scans"])
def test_ids_of_a_sample_that_a_rule_makes(tmp_path, place):
    masks = {}
    for number in (5, 6):
        for part in range(3):
            name = f"{part:04d}" if "kidney" in place else f"slice_{part:04d}_30_24"
            masks[f"{place.format(number)}/{name}.png"] = two_objects(shift=part + number - 5)
    start, slices = ("kidney_{}", "") if "kidney" in place else ("case{}_day1", "slice_")
    names = [f"{start.format(n)}_{slices}{part:04d}" for n in (6, 5) for part in range(3)]
    written = answers_of(tmp_path, [("id", "rle"), *((name, "1 0") for name in names)], masks)
    expected = [two_objects(shift=part + n - 5)[0] for n in (6, 5) for part in range(3)]
    assert written[1:] == list(zip(names, map(plain_encode, expected), strict=True))


def test_ids_of_a_sample_that_another_table_names(tmp_path):
    masks = {f"test/p{n}7.png": two_objects(shift=n) for n in range(3)}
    (tmp_path / "test").mkdir()
    files = [(12, "p17.png"), (13, "p27.png"), (14, "p07.png")]
    write_csv(tmp_path / "test.csv", [("id", "image_filename"), *files])
    rows = [("id", "rle"), (14, "1 1"), (13, "1 1"), (12, "1 1")]
    written = answers_of(tmp_path, rows, masks)
    expected = [plain_encode(two_objects(shift=n)[0]) for n in (0, 2, 1)]
    assert written[1:] == list(zip(("14", "13", "12"), expected, strict=True))


CLASSES_OF_A_MODEL = Classes(("1", "2"), ("1", "2"))


@pytest.mark.parametrize("label", ["0", ""])
def test_a_class_that_is_none_stands_for_all(tmp_path, capsys, label):
    mask = np.concatenate([two_objects(), two_objects(shift=2)])
    rows = [("ImageId", "EncodedPixels", "ClassId"), ("t0.png", "1 720", label)]
    written = answers_of(tmp_path, rows, {"test/t0.png": mask}, CLASSES_OF_A_MODEL)
    assert written[1:] == [("t0.png", plain_encode(mask[k]), str(k + 1)) for k in (0, 1)]
    assert f"instead of {label!r}" in capsys.readouterr().out


def test_samples_of_fewer_classes_of_one_column_and_of_several(tmp_path, capsys):
    mask = {"test/t0.png": np.concatenate([two_objects(), two_objects(shift=2)])}
    rows = [("ImageId", "ClassId", "rle"), ("t0", "2.0", "")]
    assert answers_of(tmp_path, rows, mask, CLASSES_OF_A_MODEL)[1:] == [
        ("t0", "2.0", plain_encode(mask["test/t0.png"][1]))
    ]
    assert "1 classes are not asked for and left out: 1" in capsys.readouterr().out
    for rows, words in (
        ([("ImageId",), ("t0",)], "one column"),
        ([("id", "a", "b"), ("t0", "1 1", "1 1")], "several columns"),
        ([("id", "rle"), ("t0", "")], "name no class"),
    ):
        with pytest.raises(UserError, match=f"{words}.*--sample_submission none"):
            answers_of(tmp_path, rows, mask, CLASSES_OF_A_MODEL)
    rows = [("ImageId", "ClassId", "rle"), ("t0", "1", ""), ("t0", "2", "")]
    with pytest.raises(UserError, match="asks for classes 1, 2, the model has one"):
        answers_of(tmp_path, rows, {"test/t0.png": two_objects()})


def test_a_submission_of_empty_masks_alone_is_refused_and_in_the_rerun_said(tmp_path, capsys):
    write_csv(tmp_path / "sample.csv", [("id", "rle"), ("x", ""), ("y", "")])
    samples, sample = pd.DataFrame({"id": STEMS}), str(tmp_path / "sample.csv")
    for on_missing in ("error", "empty"):
        with pytest.raises(UserError, match="2 ids without an image"):
            RleSubmission(samples, Classes(), sample, on_missing)
    RleSubmission(samples, Classes(), sample, "rerun").write(tmp_path)
    assert "ALL MASKS ARE EMPTY" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["", "test", "test/stage1", "test/t0/images", "test_images/a"])
def test_the_sample_is_found_from_nested_folders(tmp_path, place):
    sample = tmp_path / "data" / "sample_submission.csv"
    folder = tmp_path / "data" / "test" / place
    folder.mkdir(parents=True)
    write_csv(sample, [("id", "rle"), ("t00", "")])
    assert find_sample_submission(folder, STEMS, tmp_path / "data") == str(sample)
    folder = tmp_path / "data" / place
    folder.mkdir(parents=True, exist_ok=True)
    if "t0" not in place and "/a" not in place:
        assert find_sample_submission(folder, STEMS) == str(sample)


def test_the_order_of_a_csv_next_to_mask_files(tmp_path, capsys):
    masks = write_images(tmp_path / "train", name="p{:02d}.jpg")
    (tmp_path / "train_masks").mkdir()
    rows = []
    for stem, mask in masks.items():
        Image.fromarray(mask).save(tmp_path / "train_masks" / f"{stem}_mask.gif")
        upper = mask & (np.arange(44) < 22)[:, None]
        rows += [(f"{stem}.jpg", plain_encode(m, "rows")) for m in (upper, mask & ~upper)]
    write_csv(tmp_path / "train_masks.csv", [("img", "rle_mask"), *rows])
    found = find_samples(str(tmp_path), training=True)
    assert (found.rle, found.instances) == ("rows", True)
    assert "train_masks.csv: RLE rows (equals 8 of 8 mask files)" in capsys.readouterr().out
    assert find_samples(str(tmp_path), training=True, rle="columns").rle == "columns"


def test_a_sample_that_cannot_be_filled_is_said_before_training(tmp_path, capsys, monkeypatch):
    write_csv(tmp_path / "sample_submission.csv", [("ImageId",), ("t00",)])
    check_sample(str(tmp_path), CLASSES_OF_A_MODEL)
    assert "one column" in capsys.readouterr().out
    write_csv(tmp_path / "sample_submission.csv", [("id", "ClassId", "rle"), ("t00", "1", "")])
    check_sample(str(tmp_path), CLASSES_OF_A_MODEL)  # its images may be hidden
    check_sample(str(tmp_path / "nowhere"), CLASSES_OF_A_MODEL)
    assert not capsys.readouterr().out
    write_images(tmp_path / "test")
    check_sample(str(tmp_path), CLASSES_OF_A_MODEL)
    assert "1 ids without an image" in capsys.readouterr().out
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")  # there their masks are empty
    check_sample(str(tmp_path), CLASSES_OF_A_MODEL)
    assert not capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
#  The commands
# --------------------------------------------------------------------------------------------------


def test_the_order_of_training_is_that_of_the_submission(tmp_path):
    masks = write_images(tmp_path / "train", 6)
    rows = [(f"{stem}.png", plain_encode(mask, "rows")) for stem, mask in masks.items()]
    write_csv(tmp_path / "train_masks.csv", [("img", "rle_mask"), *rows])
    out = tmp_path / "out"
    flags = ("--data", tmp_path, "--encoder", ENCODER, "--encoder_weights", "none")
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
