"""--data pairs.csv: a manifest of images and masks."""

import numpy as np
import pandas as pd
import pytest
from conftest import KIT, run
from PIL import Image
from test_reading import grey, pair, save

from kit.config import Classes
from kit.data.folds import assign_folds
from kit.data.rle import rle_encode
from kit.data.samples import find_samples, scan
from kit.errors import UserError

COUNT = 6


@pytest.fixture
def folder(tmp_path):
    """Six images in two folders, the same names in both, and their masks."""
    for number in range(COUNT):
        image, mask = pair(number)
        place = f"case{number % 2}/slice_{number // 2}"
        save(tmp_path / "scans" / f"{place}.png", image)
        save(tmp_path / "drawn" / f"{place}.png", grey(mask))
    return tmp_path


def rows(**columns):
    """A table of the folder's pairs."""
    places = [f"case{number % 2}/slice_{number // 2}.png" for number in range(COUNT)]
    table = pd.DataFrame({"image": [f"scans/{p}" for p in places]})
    return table.assign(mask=[f"drawn/{p}" for p in places], **columns)


def write(folder, table):
    table.to_csv(folder / "pairs.csv", index=False)
    return str(folder / "pairs.csv")


def read(folder, table, training=True):
    """The samples; each mask must be its image's."""
    samples = find_samples(write(folder, table), training=training).samples
    for row in samples.itertuples():
        number = 2 * int(row.image.stem[-1]) + int(row.image.parent.name[-1])
        assert np.array_equal(row.mask.read((44, 60)), pair(number)[1][None]), row.image
    return samples


def refused(folder, table, *words, training=True):
    with pytest.raises(UserError) as error:
        find_samples(write(folder, table), training=training)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_manifest_in_the_documentation_is_read(tmp_path, monkeypatch):
    """Its code, run on a synthetic folder in the layout of UW-Madison GI Tract."""
    root = tmp_path / "input" / "uw-madison-gi-tract-image-segmentation"
    lines = ["id,class,segmentation"]
    for number in range(COUNT):
        day = f"case{number % 2}_day{number // 2}"
        name = "slice_0001_60_44_1.50_1.50.png"
        save(root / "train" / day.split("_")[0] / day / "scans" / name, pair(number)[0])
        runs = rle_encode(pair(number)[1], "rows")
        lines += [f"{day}_slice_0001,stomach,{runs}", f"{day}_slice_0001,large_bowel,"]
    (root / "train.csv").write_text("\n".join(lines))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    code = (KIT / "docs" / "data.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, {})
    collection = find_samples("pairs.csv", training=True)
    assert collection.rle == "rows"
    assert sorted(collection.samples.group) == ["case0"] * 3 + ["case1"] * 3
    for row in collection.samples.itertuples():
        number = int(row.id[4]) + 2 * int(row.id[9])
        assert np.array_equal(row.mask.read((44, 60)), pair(number)[1][None]), row.id


@pytest.mark.parametrize("training", [True, False])
def test_files_of_a_manifest_start_from_its_folder_and_names_stay_apart(folder, training):
    samples = read(folder, rows(), training)
    assert samples.id.tolist()[:2] == ["scans_case0_slice_0", "scans_case1_slice_0"]


def test_paths_of_another_system_and_upper_case_columns(folder):
    table = rows()
    table = table.assign(image=table["image"].str.replace("/", "\\"))
    read(folder, table.rename(columns=str.upper))


def test_masks_may_be_rle_or_empty(folder):
    runs = [rle_encode(pair(number)[1]) for number in range(COUNT)]
    read(folder, rows().assign(mask=runs))
    samples = find_samples(
        write(folder, rows().assign(mask=["", "-1", *runs[2:]])), training=True
    ).samples
    assert [mask.read((44, 60)).any() for mask in samples["mask"]] == [False] * 2 + [True] * 4


def test_several_rows_are_objects_of_one_image(folder):
    halves = []
    for number in range(COUNT):
        mask = pair(number)[1]
        left = mask & (np.arange(60) < 30)
        halves += [rle_encode(left), rle_encode(mask & ~left)]
    table = rows().loc[np.repeat(range(COUNT), 2)].assign(mask=halves)
    assert len(read(folder, table)) == COUNT


def test_the_optional_columns_are_what_their_names_say(folder):
    names = [f"n{number}" for number in range(COUNT)]
    extra = {"id": names, "group": list("aabbcc"), "fold": [0, 0, 1, 1, 2, 2]}
    samples = read(folder, rows(**extra, category=list("xyxyxy")))
    assert samples.id.tolist() == names
    assert samples.group.tolist() == list("aabbcc")
    assert samples.category.tolist() == list("xyxyxy")
    assert assign_folds(scan(samples, Classes()), 10, 0).fold.tolist() == [0, 0, 1, 1, 2, 2]


def test_other_columns_can_be_groups(folder):
    samples = scan(read(folder, rows(patient=list("aaabbb"))), Classes())
    fold = assign_folds(samples, 2, 0, "patient").fold
    assert len(set(fold[:3])) == len(set(fold[3:])) == 1


def test_prediction_needs_no_masks(folder):
    for table in (rows().drop(columns="mask"), rows().assign(mask="")):
        samples = find_samples(write(folder, table)).samples
        assert samples["mask"].isna().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop(columns="mask"), ("no column mask", "image and mask")),
        (lambda t: t.rename(columns={"image": "file"}), ("no column image", "file")),
        (lambda t: t.assign(image=["gone.png", *t["image"][1:]]), ("row 2", "gone.png")),
        (lambda t: t.assign(mask=["gone.png", *t["mask"][1:]]), ("row 2", "gone.png", "RLE")),
        (lambda t: t.assign(id=list("aabcde")), ("ids stand twice", "'a'")),
        (lambda t: t.assign(id=["../a", *"bcdef"]), ("no names of files", "'../a'")),
        (lambda t: t.assign(id=["/tmp/a", *"bcdef"]), ("no names of files", "'/tmp/a'")),
        (lambda t: t.assign(id=["..", *"bcdef"]), ("no names of files",)),
        (lambda t: t.assign(fold=list("01x011")), ("column fold", "'x'")),
        (lambda t: t.assign(fold=0), ("column fold", "one value")),
        (lambda t: t[:0], ("no row",)),
    ],
)
def test_a_faulty_manifest_is_refused_in_a_line(folder, change, words):
    refused(folder, change(rows()), *words)


def test_a_manifest_names_its_own_masks(folder):
    with pytest.raises(UserError, match="--masks drawn: pairs.csv names the masks itself"):
        find_samples(write(folder, rows()), masks="drawn", training=True)


def check(folder, out):
    """`train.py --check true` with the manifest of the folder's pairs."""
    return run("train.py", "--data", write(folder, rows()), "--check", "true", "--out", out)


def test_a_mask_of_another_size_is_named(folder, tmp_path):
    save(folder / "drawn" / "case0" / "slice_0.png", np.zeros((10, 10), np.uint8))
    done = check(folder, tmp_path / "out")
    assert done.returncode == 2
    assert "is 10x10, but its image is 60x44" in done.stderr.splitlines()[-1]


def test_check_shows_the_data_and_stops(folder, tmp_path):
    done = check(folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["augmented.jpg", "examples.jpg", "masks", "samples.csv"]
    table = pd.read_csv(tmp_path / "out" / "samples.csv")
    assert table.id.str.fullmatch(r"scans_case\d_slice_\d").all()
    assert set(table.fold) == set(range(COUNT))
    for row in table.itertuples():
        _, mask = pair(int(row.id[-1]) * 2 + int(row.id[10]))
        written = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{row.id}.png"))
        assert (written == 255 * mask).all()
        assert row.masks == row.image.replace("scans", "drawn")
