"""The rehearsal of a code competition names each fault; what is needed offline is one data set."""

import csv
import itertools
import json
import shutil
import types
from pathlib import Path

import hidden as hidden_tests
import kernel
import nbformat
import numpy as np
import psutil
import pytest
import rehearse
import torch
from conftest import KIT
from PIL import Image
from requests.exceptions import ConnectionError, HTTPError
from test_kernel import SMALL, Client, client, command, is_one_line, outputs, with_settings

from kit import kaggle
from kit.errors import UserError
from kit.network import encoders

__all__ = ["client", "command"]  # fixtures

# --------------------------------------------------------------------------------------------------
#  Three drawn competitions, and notebooks of two cells
# --------------------------------------------------------------------------------------------------


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def runs_of(mask):
    """RLE down the columns, from 1."""
    flat = np.pad(mask.T.ravel().astype(np.int8), 1)
    starts, ends = (np.flatnonzero(np.diff(flat) == step) + 1 for step in (1, -1))
    return " ".join(f"{start} {end - start}" for start, end in zip(starts, ends, strict=True))


def draw(path, rng):
    """A bright disc on dark noise, (40, 48); returns its RLE."""
    y, x = np.ogrid[:40, :48]
    cy, cx = rng.integers(12, 28, 2)
    disc = (y - cy) ** 2 + (x - cx) ** 2 < 80
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rng.integers(0, 90, (40, 48)) + 150 * disc).astype(np.uint8)).save(path)
    return runs_of(disc)


def discs(root):
    """id, rle_mask: flat folders, numbered names."""
    rng = np.random.default_rng(0)
    rows = [[f"im_{n:02d}", draw(root / f"train/im_{n:02d}.png", rng)] for n in range(12)]
    test = [[f"im_{n:02d}", draw(root / f"test/im_{n:02d}.png", rng)] for n in range(90, 94)]
    write_csv(root / "train.csv", ["id", "rle_mask"], *rows)
    write_csv(
        root / "sample_submission.csv", ["id", "rle_mask"], *([name, "1 1"] for name, _ in test)
    )


def clouds(root):
    """Classes joined to the ids, a table of the test images next to the sample."""
    rng, labels = np.random.default_rng(1), ("Fish", "Sugar")
    rows, sample, about = [], [], []
    for n in range(13):
        split, name = ("train", "test")[n > 9], f"{rng.integers(1 << 30):08x}.png"
        runs = draw(root / f"{split}_images" / name, rng)
        (rows if split == "train" else sample).extend([f"{name}_{label}", runs] for label in labels)
        about += [[name, "noon"]] * (split == "test")
    write_csv(root / "train.csv", ["Image_Label", "EncodedPixels"], *rows)
    write_csv(root / "test.csv", ["name", "time"], *about)
    empty = ([name, ""] for name, _ in sample)
    write_csv(root / "sample_submission.csv", ["Image_Label", "EncodedPixels"], *empty)


def nuclei(root):
    """A folder for each image, a row for each object, "-" for an empty mask."""
    rng = np.random.default_rng(2)
    rows, test = [], []
    for n in range(12):
        split, name = ("stage1_train", "stage1_test")[n > 8], f"{rng.integers(1 << 30):x}a"
        runs = draw(root / split / name / "images" / f"{name}.png", rng).split()
        halves = (runs[: len(runs) // 4 * 2], runs[len(runs) // 4 * 2 :])
        rows += [[name, " ".join(half)] for half in halves if split == "stage1_train"]
        test += [[name, "-"]] * (split == "stage1_test")
    write_csv(root / "train.csv", ["ImageId", "EncodedPixels"], *rows)
    write_csv(root / "sample_submission.csv", ["ImageId", "EncodedPixels"], *test)


COMPETITIONS = (discs, clouds, nuclei)


@pytest.fixture(params=COMPETITIONS, ids=lambda draw: draw.__name__)
def competition(request, tmp_path):
    request.param(tmp_path / "data" / request.param.__name__)
    return tmp_path / "data" / request.param.__name__


def read(path):
    with path.open() as file:
        return list(csv.reader(file))


def rehearsed(competition, tmp_path, *cells, **options):
    """The verdict on a notebook of these cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    verdict = rehearse.rehearse(notebook, competition, tmp_path / "rehearsal", **options)
    left = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    assert not [line for line in left if "ipykernel" in line], "no kernel is left"
    return verdict


# What a sound notebook does: an answer for each id of the sample, whatever becomes of its image.
READ = """
import csv, os, re
from pathlib import Path
import numpy as np
from PIL import Image
assert os.environ["KAGGLE_IS_COMPETITION_RERUN"]
root = next(path for path in (Path("/kaggle/input"), Path("../input")) if path.is_dir())
[sample] = root.glob("competitions/*/sample_submission.csv")
images = {path.stem: path for path in sample.parent.rglob("*.png") if "test" in str(path.parent)}
header, *rows = csv.reader(sample.open())
empty = "-" if rows[0][1] == "-" else ""
"""
PREDICT = """
answers = []
for name, _ in rows:
    try:
        pixels = np.asarray(Image.open(images[re.match(r"\\w+?(?=[.]|$)", name)[0]])) > 120
        flat = np.pad(pixels.T.ravel().astype(np.int8), 1)
        starts, ends = (np.flatnonzero(np.diff(flat) == step) + 1 for step in (1, -1))
        answers.append(" ".join(f"{a} {b - a}" for a, b in zip(starts, ends)) or empty)
    except (KeyError, OSError):
        answers.append(empty)
"""
WRITE = """
with open("submission.csv", "w", newline="") as file:
    csv.writer(file).writerows([header, *([row[0], answer] for row, answer in zip(rows, answers))])
"""


def test_a_sound_notebook_succeeds(competition, tmp_path, capsys):
    before = {path: path.read_bytes() for path in competition.rglob("*") if path.is_file()}
    verdict = rehearsed(competition, tmp_path, READ, PREDICT, WRITE, hours=9, images=1000)
    assert verdict.name == rehearse.OK, verdict
    assert "hours for 1000 images" in capsys.readouterr().out
    filled = [
        row for row in read(tmp_path / "rehearsal/working/submission.csv")[1:] if row[1] > "-"
    ]
    assert len(filled) > 4, "the notebook saw the images"
    assert {path: path.read_bytes() for path in before} == before


FAULTS = {
    "writes to the input": (
        [READ, "(sample.parent / 'new.csv').write_text('')", PREDICT, WRITE],
        rehearse.EXCEPTION, "new.csv",
    ),
    "counts the images": (
        [READ, "assert len(images) in (3, 4), 'as in the public test set'", PREDICT, WRITE],
        rehearse.EXCEPTION, "AssertionError: as in the public test set",
    ),
    "needs the network": (
        ["import socket; socket.create_connection(('1.1.1.1', 80), 5)", READ, PREDICT, WRITE],
        rehearse.EXCEPTION, "there is no network",
    ),
    "opens every image": (
        [READ, "[np.asarray(Image.open(path)) for path in images.values()]", PREDICT, WRITE],
        rehearse.EXCEPTION, "Error",
    ),
    "is too slow": (
        [READ, "import time", "for path in images: time.sleep(0.1)", PREDICT, WRITE],
        rehearse.TIMEOUT, "hours of 9",
    ),
    "fills the memory": (
        [READ, "hog = np.ones((1 << 28,)); import time; time.sleep(60)"],
        rehearse.COMPUTE, "GB of memory, there are 1",
    ),
    "fills the disk": (
        [READ, "open('big', 'wb').truncate(3 << 30); import time; time.sleep(60)"],
        rehearse.COMPUTE, "GB of disk, there are 2",
    ),
    "writes no csv": (
        [READ, PREDICT, WRITE.replace("submission.csv", "my_submission.csv")],
        rehearse.NO_CSV, "my_submission.csv",
    ),
    "has the public ids": (
        [READ, PREDICT, "rows = [(f'public{n}', '') for n, _ in enumerate(rows)]", WRITE],
        rehearse.SCORING, "ids of the sample are missing",
    ),
    "has overlapping runs": (
        [READ, PREDICT, "answers = ['1 5 3 9' for _ in answers]", WRITE],
        rehearse.SCORING, "runs overlap",
    ),
    "encodes at another size": (
        [READ, PREDICT, "answers = [f'{200 * 200 - 9} 10' for _ in answers]", WRITE],
        rehearse.SCORING, "a run leaves the image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=FAULTS)
def test_each_fault_is_named(tmp_path, number):
    draw_competition = COMPETITIONS[number % 3]
    draw_competition(tmp_path / "data")
    cells, name, reason = list(FAULTS.values())[number]
    images = 10**6 if name == rehearse.TIMEOUT else 100
    verdict = rehearsed(tmp_path / "data", tmp_path, *cells, images=images, gigabytes=(1, 2))
    assert verdict.name == name, verdict
    assert reason in verdict.reason
    assert "\n" not in verdict.reason


@pytest.mark.parametrize("fault", ["", "writes to the input", "needs the network"])
def test_where_namespaces_are_not_allowed(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(rehearse, "namespace", lambda *_: [])
    discs(tmp_path / "data")
    cells, name, reason = FAULTS[fault] if fault else ([READ, PREDICT, WRITE], rehearse.OK, "each")
    verdict = rehearsed(tmp_path / "data", tmp_path, *cells)
    assert verdict.name == name, verdict
    assert reason in verdict.reason
    assert "by proxies and sockets" in capsys.readouterr().out
    assert not (tmp_path / "data/new.csv").exists()


@pytest.mark.parametrize(
    "slow", ["for _ in range(9): time.sleep(0.2)", "for _ in rows: time.sleep(0.2)"]
)
def test_a_second_run_shows_what_grows_with_the_images(tmp_path, capsys, slow):
    discs(tmp_path / "data")
    cells = [READ, f"import time\n{slow}", PREDICT, WRITE]
    verdict = rehearsed(tmp_path / "data", tmp_path, *cells, images=1000, hours=0.04)
    assert "again with 27 images" in capsys.readouterr().out
    assert verdict.name == (rehearse.TIMEOUT if "rows" in slow else rehearse.OK), verdict


def test_a_notebook_that_cannot_be_started_is_an_error_of_kaggle(tmp_path, monkeypatch):
    discs(tmp_path / "data")
    monkeypatch.setattr(rehearse.sys, "executable", str(tmp_path / "no-python"))
    assert rehearsed(tmp_path / "data", tmp_path, READ).name == rehearse.KAGGLE


def test_a_notebook_that_does_not_end_is_stopped(tmp_path):
    discs(tmp_path / "data")
    verdict = rehearsed(tmp_path / "data", tmp_path, "import time; time.sleep(90)", hours=4 / 3600)
    assert verdict.name == rehearse.TIMEOUT


# --------------------------------------------------------------------------------------------------
#  The hidden test set and the scorer, without a notebook
# --------------------------------------------------------------------------------------------------


def hide(competition, tmp_path):
    return hidden_tests.make_hidden(competition.resolve(), tmp_path / "mount")


def images_of_test(root):
    return [path for path in root.rglob("*.png") if "test" in str(path.relative_to(root))]


def sizes(paths):
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(image.size)
    return found


def test_the_hidden_test_set_differs_from_the_public_one(competition, tmp_path):
    hidden, mount = hide(competition, tmp_path), tmp_path / "mount"
    public = {path.stem for path in images_of_test(competition)}
    images = images_of_test(mount)
    stems = {path.stem for path in images}
    assert len(stems) == hidden.count != len(public)
    assert not stems & {path.stem for path in competition.rglob("*.png")}
    damaged = [path for path in images if path.name in hidden.words]
    assert len(set(sizes(images))) == 2
    assert len(damaged) == 1
    with pytest.raises(OSError, match="truncated"):
        np.asarray(Image.open(damaged[0]))
    header, *rows = read(mount / "sample_submission.csv")
    per_image = len(read(competition / "sample_submission.csv")[1:]) // len(public)
    assert header == read(competition / "sample_submission.csv")[0]
    assert len(rows) == per_image * (len(images) + 1), "one id has no image"
    named = {stem for stem in stems if any(stem in name for name, _ in rows)}
    assert named == stems
    assert (mount / "train.csv").read_bytes() == (competition / "train.csv").read_bytes()
    if (competition / "test.csv").exists():
        assert {name.split(".")[0] for name, _ in read(mount / "test.csv")[1:]} == stems


def test_without_public_images_training_images_are_hidden(tmp_path):
    discs(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test")
    write_csv(tmp_path / "data" / "sample_submission.csv", ["id", "rle_mask"], ["im_00", ""])
    hidden = hide(tmp_path / "data", tmp_path)
    assert len(list((tmp_path / "mount/test").glob("*.png"))) == hidden.count == 3
    assert len(list((tmp_path / "mount/train").glob("*.png"))) == 12
    assert len(read(tmp_path / "mount/sample_submission.csv")) == 1 + 4
    assert len(read(tmp_path / "mount/train.csv")) == 13


def test_ids_that_a_rule_makes_of_folders_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for case, number in itertools.product((1, 2), range(3)):
        draw(tmp_path / f"data/test/case{case}/scans/slice_{number}_48.png", rng)
        draw(tmp_path / f"data/train/case{case + 5}/scans/slice_{number}_48.png", rng)
        rows.append([f"case{case}_slice_{number}", ""])
    write_csv(tmp_path / "data" / "sample_submission.csv", ["id", "predicted"], *rows)
    hidden = hide(tmp_path / "data", tmp_path)
    images = list((tmp_path / "mount/test").rglob("*.png"))
    assert len(images) == len(hidden.answers) == 5
    assert len(set(sizes(images))) == 2


def test_a_csv_that_cannot_be_read_and_one_with_a_row_for_each_object(tmp_path):
    nuclei(tmp_path / "data")
    header, *rows = read(tmp_path / "data/train.csv")
    write_csv(tmp_path / "data/train.csv", ["ImageId", "annotation"], *rows)
    (tmp_path / "data/notes.csv").write_text("a,b\n1\n")
    hidden = hide(tmp_path / "data", tmp_path)
    assert hidden.objects
    assert (tmp_path / "mount/notes.csv").read_text() == "a,b\n1\n"


def change(rows, number, answer):
    return [*rows[:number], [rows[number][0], answer], *rows[number + 1 :]]


SUBMISSIONS = {
    "sound": (lambda rows: rows, ""),
    "in another order": (lambda rows: rows[::-1], ""),
    "full": (lambda rows: [[name, "1 1920"] for name, _ in rows], ""),
    "one is missing": (lambda rows: rows[1:], "1 ids of the sample are missing: im_"),
    "twice": (lambda rows: [*rows, rows[0]], "1 ids occur twice: im_"),
    "another": (lambda rows: [*rows, ["im_x", ""]], "1 ids are not in the sample: im_x"),
    "not sorted": (lambda rows: change(rows, 1, "9 2 1 2"), "row 3 (im_"),
    "overlapping": (lambda rows: change(rows, 1, "1 5 5 2"), "runs overlap"),
    "outside": (lambda rows: change(rows, 0, "1920 2"), "a run leaves the image of 48x40"),
    "from 0": (lambda rows: change(rows, 1, "0 2"), "a run leaves"),
    "odd": (lambda rows: change(rows, 1, "1 2 3"), "an odd count of numbers"),
    "floats": (lambda rows: change(rows, 1, "1.0 2"), "no whole number"),
    "nan": (lambda rows: change(rows, 1, "nan"), "is nan"),
    "three columns": (lambda rows: [[*row, "x"] for row in rows], "fields, the header 2"),
}


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_the_scorer_stops_at(tmp_path, name):
    discs(tmp_path / "data")
    hidden = hide(tmp_path / "data", tmp_path)
    edit, problem = SUBMISSIONS[name]
    rows = edit([list(row) for row, _ in hidden.answers])
    write_csv(tmp_path / "submission.csv", ["id", "rle_mask"], *rows)
    said = hidden_tests.check_submission(tmp_path / "submission.csv", hidden)
    assert problem in said if problem else not said


def test_the_scorer_knows_headers_objects_and_words_for_empty_masks(tmp_path):
    nuclei(tmp_path / "data")
    hidden, path = hide(tmp_path / "data", tmp_path), tmp_path / "submission.csv"
    rows = [list(row) for row, _ in hidden.answers]
    name = rows[0][0]

    def check(*rows, header=("ImageId", "EncodedPixels")):
        write_csv(path, header, *rows)
        return hidden_tests.check_submission(path, hidden)

    assert not check(*rows)
    assert not check([name, "1 5"], [name, "9 5"], *rows[1:]), "a row for each object"
    assert "overlap" in check([name, "1 5"], [name, "3 5"], *rows[1:])
    assert "NaN: empty; the sample writes '-'" in check([name, ""], *rows[1:])
    said = check(*(["0", *row] for row in rows), header=("", "ImageId", "EncodedPixels"))
    assert said == "its header is ,ImageId,EncodedPixels, the sample's ImageId,EncodedPixels"


def test_the_clock_counts_the_training_once_and_what_grows_for_each_image():
    seconds = {"setup": 10, "run-train": 100, "run-infer": 20, "look": 2}
    run = rehearse.Run(seconds, "look", "", "", False, "8 images in 10.0 s, 0.8 per second")
    times = rehearse.times_of(run)
    assert (times["run-infer"], times["prediction"]) == (10, 10)
    assert rehearse.growth(times, 8) == {
        "setup": 10 / 8, "run-infer": 10 / 8, "look": 2 / 8, "prediction": 10 / 8,
    }  # fmt: skip
    again = {"setup": 9, "run-train": 1, "run-infer": 10, "look": 4, "prediction": 99}
    each = rehearse.growth(times, 8, again, 28)
    assert (each["look"], each["prediction"]) == (2 / 20, 10 / 8)
    assert max(each["setup"], each["run-infer"], each["run-train"]) <= 0

    def needed(images, own, changes):
        return rehearse.estimate(times, each, 8, images, {"TRAIN": True} | own, changes)

    seconds, words = needed(1000, {}, {})
    assert seconds == pytest.approx(10 + 100 + 10 + (2 - 0.8) + 1250 + 100)
    assert "121 s once, 100 s of it training, 1.350 s for each image" in words
    rest = 10 + 10 + 1.2
    assert needed(8, {"EPOCHS": 50}, {"EPOCHS": 2})[0] == pytest.approx(rest + 2500 + 10.8)
    own = {"MAX_MINUTES": 60, "PREDICT_MINUTES": 5}
    assert needed(9999, own, {"EPOCHS": 2})[0] == pytest.approx(rest + 3600 + 300 + 999.9)


# --------------------------------------------------------------------------------------------------
#  The kit's own notebook, and the command
# --------------------------------------------------------------------------------------------------


def test_the_kits_notebook_is_rehearsed(command, tmp_path):
    """A damaged image and an id without one get empty masks; smp comes from an attached wheel."""
    discs(tmp_path / "discs")
    options = SMALL | {"EPOCHS": 1, "HEIGHT": 0, "WIDTH": 0}
    words = [f"{name}={value}" for name, value in options.items()]
    flags = ("--data", tmp_path / "discs", "--out", tmp_path / "build", "--settings", *words)
    done = command("rehearse", *flags, "--images", 500)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, verdict, first, second, third = done.stdout.splitlines()
    assert verdict == "Succeeded: submission.csv has each of the 8 rows of the sample"
    assert first.startswith('before you submit: set SUBMISSION = "rle"')
    assert "kernel.py bundle" in second
    assert "enable_internet" in third
    notebook = nbformat.read(tmp_path / "build/rehearsal/executed.ipynb", as_version=4)
    printed = outputs(notebook, "run-infer")
    assert "1 images failed, their masks are empty" in printed
    assert "1 ids without an image" in printed
    answers = dict(read(tmp_path / "build/rehearsal/working/submission.csv")[1:])
    assert sum(not answer for answer in answers.values()) >= 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--data FOLDER"),
        (("--data", "{0}/absent"), "is no folder"),
        (("--data", "{0}/empty"), "has no images"),
        (("--data", "{0}/none"), "no sample submission"),
        (("--data", "{0}/discs", "--settings", "EPOCHS"), "write NAME=VALUE"),
        (("--data", "{0}/discs", "--attach", "{0}/absent"), "--attach"),
        (("--data", "{0}/discs", "--images", "0"), "--images"),
    ],
    ids=["no folder", "absent", "empty", "no sample", "settings", "attach", "images"],
)
def test_a_rehearsal_that_cannot_be_is_one_line(command, tmp_path, flags, words):
    for name in ("discs", "none"):
        discs(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none/sample_submission.csv").unlink()
    flags = [flag.format(tmp_path) for flag in flags]
    done = command("rehearse", *flags, "--out", tmp_path / "build")
    assert (done.returncode, is_one_line(done.stderr)) == (2, True)
    assert words in done.stderr


# --------------------------------------------------------------------------------------------------
#  Bundle
# --------------------------------------------------------------------------------------------------


class DatasetClient(Client):
    """Kaggle's client for data sets; `there`: whether the data set exists."""

    def __init__(self):
        super().__init__()
        self.there, self.calls = False, []
        self.answer = types.SimpleNamespace(status="ok", error="", url="https://kaggle.com/d")

    def dataset_status(self, name):
        if isinstance(self.there, Exception):
            raise self.there
        if not self.there:
            raise HTTPError("404")
        return "ready"

    def upload(self, kind, folder, dir_mode):
        self.calls.append((kind, folder, dir_mode))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def dataset_create_new(self, folder, quiet, dir_mode):
        return self.upload("new", folder, dir_mode)

    def dataset_create_version(self, folder, version_notes, quiet, dir_mode):
        return self.upload("version", folder, dir_mode)


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The stand-in for Kaggle's client, and a copy of the files that a bundle reads or writes."""
    client = DatasetClient()
    monkeypatch.setattr(kernel, "log_in", lambda: client)
    kit = tmp_path / "kit"
    kit.mkdir()
    for name in ("kernel-metadata.json", "notebook.py"):
        shutil.copy(KIT / name, kit / name)
    monkeypatch.setattr(kernel, "HERE", kit)
    monkeypatch.setattr(
        kernel,
        "download_wheel",
        lambda folder: (folder / "segmentation_models_pytorch-0.6.0-py3-none-any.whl").touch(),
    )
    client.kit = kit
    return client


def choose(site, **settings):
    path = site.kit / "notebook.py"
    path.write_text(with_settings(path.read_text(), settings))


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_bundle_is_uploaded_and_attached(site, command, tmp_path):
    choose(site, ENCODER_WEIGHTS="none")
    (site.kit / "out").mkdir()
    (site.kit / "out" / "model.pt").write_bytes(b"model")
    done = command("bundle", "alice/kit-offline", "--out", tmp_path / "build")
    assert done.returncode == 0, done.stderr
    bundle = tmp_path / "build" / "bundle"
    wheel = "segmentation_models_pytorch-0.6.0-py3-none-any.whl"
    assert names(bundle) == ["dataset-metadata.json", "model.pt", wheel]
    assert json.loads((bundle / "dataset-metadata.json").read_text())["id"] == "alice/kit-offline"
    metadata = json.loads((site.kit / "kernel-metadata.json").read_text())
    assert metadata["dataset_sources"][-1] == "alice/kit-offline"
    assert "attached it to the notebook" in done.stdout
    site.there = True
    done = command("bundle", "alice/kit-offline", "--out", tmp_path / "build")
    assert "uploaded a new version: https://kaggle.com/d" in done.stdout
    assert site.calls == [("new", str(bundle), "zip"), ("version", str(bundle), "zip")]
    again = json.loads((site.kit / "kernel-metadata.json").read_text())
    assert again == metadata, "attached once"


def test_own_files_are_taken_and_the_notebook_finds_them(site, command, tmp_path, monkeypatch):
    """The weights with their mean and deviation; those of another encoder are refused."""
    network = encoders.build("Unet", "resnet18", 1)
    weights = tmp_path / "weights.pth"
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    torch.save({"state_dict": network.encoder.state_dict(), "pretrained_cfg": statistics}, weights)
    wheel, model = tmp_path / "segmentation_models_pytorch-9.whl", tmp_path / "model.pt"
    for path in (wheel, model):
        path.write_bytes(b"content")
    flags = ("bundle", "alice/kit-offline", "--out", tmp_path, "--files", weights, wheel, model)
    done = command(*flags)
    assert (done.returncode, is_one_line(done.stderr)) == (2, True)
    assert "not the weights of resnet34" in done.stderr
    assert not (tmp_path / "bundle").exists()
    choose(site, ENCODER="resnet18")
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    files = ["config.json", "model.safetensors"]
    files = [
        "dataset-metadata.json",
        "model.pt",
        *(f"resnet18/{name}" for name in files),
        wheel.name,
    ]
    assert names(tmp_path / "bundle") == files
    shutil.copytree(tmp_path / "bundle", tmp_path / "input/datasets/alice/kit-offline")
    monkeypatch.setattr(kaggle, "MOUNTS", (str(tmp_path / "input"),))
    monkeypatch.setattr(kaggle, "is_online", lambda: False)
    file = kaggle.Session().encoder_weights("resnet18", "imagenet")
    other = encoders.build("Unet", "resnet18", 1)
    encoders.load_weights(other, "Unet", "resnet18", str(file))
    for key, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, other.encoder.state_dict()[key])
    assert encoders.normalisation("Unet", "resnet18", str(file)) == statistics
    done = command("bundle", "alice/kit-offline", "--files", tmp_path / "absent.pth")
    assert (done.returncode, is_one_line(done.stderr)) == (2, True)


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (
            {"answer": types.SimpleNamespace(status="error", error="no quota", url="")},
            1,
            "no quota",
        ),
        ({"answer": None}, 1, "no reason given"),
        ({"answer": HTTPError("403 Forbidden")}, 1, "403 Forbidden"),
        ({"answer": ValueError("The dataset slug must be\nlong")}, 2, "slug must be long"),
        ({"there": ConnectionError("no route")}, 1, "cannot be reached"),
    ],
    ids=["error", "nothing", "http", "slug", "network"],
)
def test_a_bundle_that_kaggle_rejects_is_one_line(site, command, tmp_path, fault, status, words):
    choose(site, ENCODER_WEIGHTS="none")
    vars(site).update(fault)
    done = command("bundle", "alice/kit-offline", "--out", tmp_path / "build")
    assert (done.returncode, is_one_line(done.stderr)) == (status, True)
    assert words in done.stderr
    assert "next:" not in done.stdout
    metadata = json.loads((site.kit / "kernel-metadata.json").read_text())
    assert "alice/kit-offline" not in metadata["dataset_sources"]


def test_without_the_hub_or_pip_the_way_out_is_named(site, command, tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("ImageNet weights for resnet34", "cannot be had", "three ways out")

    monkeypatch.setattr(encoders, "load_weights", refuse)
    flags = ("bundle", "alice/kit-offline", "--out", tmp_path / "build")
    done = command(*flags)
    assert (done.returncode, is_one_line(done.stderr)) == (2, True)
    assert "ImageNet weights for resnet34: cannot be had" in done.stderr
    assert "--files FILE.pth" in done.stderr
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit):
        kernel.download_wheel(Path(tmp_path))


def test_without_credentials_the_bundle_is_built_for_the_rehearsal(
    site, command, tmp_path, monkeypatch
):
    choose(site, ENCODER_WEIGHTS="none")
    monkeypatch.setattr(kernel, "log_in", lambda: None)
    done = command("bundle", "alice/kit-offline", "--out", tmp_path / "build")
    assert (done.returncode, is_one_line(done.stderr)) == (2, True)
    assert (tmp_path / "build/bundle/dataset-metadata.json").exists()
