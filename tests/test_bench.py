"""What bench.py compares: the same pairs for every system, and recipes that run."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import field
import numpy as np
import peers
import pytest
import reports
import rivals
from conftest import KIT
from test_classes import write_label_maps

import infer
from kit.data.samples import find_samples, read_sample
from kit.errors import UserError

SMALL = "timm-mobilenetv3_small_minimal_100"


def write_plain(root, values):
    """Ten images with masks of two values above 0, in PNG."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(10):
        mask = np.zeros((48, 64), np.uint8)
        mask[10:30, 5 * number : 5 * number + 12] = values[number % 2]
        image = rng.integers(0, 60, (48, 64, 3), np.uint8) + mask[..., None]
        cv2.imwrite(str(root / "images" / f"{number}.png"), image)
        cv2.imwrite(str(root / "masks" / f"{number}.png"), mask)


def folders(root):
    """{name: pixels} of the images and of the masks below train and test."""
    return [
        {path.name: cv2.imread(str(path)) for path in (root / part / "training" / kind).iterdir()}
        for part in ("train", "test")
        for kind in ("images", "masks")
    ]


def test_the_split_holds_every_pair_once_with_the_values_asked_for(tmp_path):
    write_plain(tmp_path / "plain", (3, 7))
    peers.write_split(f"{tmp_path / 'plain'}:3", tmp_path / "split", seed=0)
    train, train_masks, test, test_masks = folders(tmp_path / "split")
    assert (len(train), len(test)) == (8, 2)
    assert sorted(train | test) == sorted(f"{number}.png" for number in range(10))
    assert train.keys() == train_masks.keys() and test.keys() == test_masks.keys()
    for name, mask in (train_masks | test_masks).items():
        given = cv2.imread(str(tmp_path / "plain" / "masks" / name))
        assert ((mask == 255) == (given == 3)).all() and ((mask == 0) == (given != 3)).all()


def test_roads_keep_their_layout(roads, tmp_path):
    peers.write_split(str(roads), tmp_path, seed=0)
    found = [find_samples(str(tmp_path / part)) for part in ("train", "test")]
    assert [one.name for one in found] == ["KITTI Road", "KITTI Road"]
    ids = [set(one.samples.id) for one in found]
    assert len(ids[0] | ids[1]) == 24 and not ids[0] & ids[1]


@pytest.mark.parametrize("name", ["tutorial", "example"])
def test_a_recipe_trains_and_its_model_is_scored(tmp_path, name):
    write_plain(tmp_path / "plain", (255, 255))
    peers.write_split(str(tmp_path / "plain"), tmp_path / "split", seed=0)
    how = SMALL, "none", 0.05, 0
    epochs = peers.train_peer(name, tmp_path / "split" / "train", tmp_path / "out", *how)
    assert epochs >= 1
    paths = {"data": str(tmp_path / "split" / "test"), "out": str(tmp_path / "predictions")}
    infer.infer(infer.Options(model=[str(tmp_path / "out")], **paths))
    report = json.loads((tmp_path / "predictions" / "metrics.json").read_text())
    scores = field.scores_of(report)
    assert scores["mean Dice"] == report["mean"]["Dice"] and 0 <= scores["MaxF"] <= 100


def test_the_recipe_for_classes(tmp_path):
    write_label_maps(tmp_path / "labels")
    peers.write_split(str(tmp_path / "labels"), tmp_path / "split", seed=0)
    train = find_samples(str(tmp_path / "split" / "train"), training=True)
    assert train.classes.exclusive and train.classes.several
    assert len(train.classes.names) > 2
    how = SMALL, "none", 0.02, 0
    peers.train_peer("example", tmp_path / "split" / "train", tmp_path / "out", *how)
    paths = {"data": str(tmp_path / "split" / "test"), "out": str(tmp_path / "predictions")}
    infer.infer(infer.Options(model=[str(tmp_path / "out")], **paths))
    scores = field.scores_of(json.loads((tmp_path / "predictions" / "metrics.json").read_text()))
    assert 0 <= scores["lowest IoU"] <= scores["mIoU"] <= 100


def test_a_class_that_is_not_in_the_images_is_not_the_lowest():
    scores = {"car": {"IoU": 60.0}, "road": {"IoU": 80.0}, "tram": {"IoU": 0.0}}
    report = {
        "image": {"all": {"mIoU": 70.0, "accuracy": 90.0}},
        "classes": {"absent": ["tram"], "per_class": scores},
    }
    assert field.scores_of(report) == {"mIoU": 70, "accuracy": 90, "lowest IoU": 60}


def test_a_speed_run_resumes_and_draws_what_is_measured(tmp_path, monkeypatch):
    for module in (field, reports):
        monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", "speedrun"])
    monkeypatch.setattr(rivals, "environment", lambda name: made.append(name))
    (tmp_path / "docs").mkdir()
    made, measured, stop = [], [], 1
    options = Namespace(command="speedrun", data="roads", minutes=6.6, rivals="")

    def in_turn(command, variants, options, data, minutes):
        if minutes > stop:
            raise KeyboardInterrupt
        measured.append(f"{data} {variants[0]} {minutes}")
        return {variants[0]: {"mIoU" if data == "streets" else "MaxF": [10.0 * len(measured)]}}

    monkeypatch.setattr(field, "in_turn", in_turn)
    with pytest.raises(KeyboardInterrupt):
        field.speedrun(options)
    systems = ("tutorial", "example", "kit")
    first = [f"roads {name} {minutes}" for minutes in (0.5, 1.0) for name in systems]
    assert measured == first
    picture = tmp_path / "docs" / "speedrun.png"
    assert cv2.imread(str(picture)).std() > 0
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        field.speedrun(options)
    assert measured == [*first, *(f"roads {name} 2.0" for name in systems)], "no row twice"
    kept = reports.load_report("speedrun")["numbers"]
    assert kept["roads kit 0.5"] == {"MaxF": [30.0]} and kept["roads kit 2"] == {"MaxF": [90.0]}
    monkeypatch.setattr(sys, "argv", ["bench.py", "speedrun", "--data=other"])
    measured, stop = [], 30
    field.speedrun(options)
    assert len(measured) == 15, "another call takes no numbers of this one"
    field.speedrun(options)
    assert len(measured) == 30, "a finished one is measured anew"
    measured, width = [], cv2.imread(str(picture)).shape[1]
    monkeypatch.setattr(sys, "argv", ["bench.py", "speedrun", "--rivals=nnunet"])
    two = {"data": "roads,streets", "minutes": 30.0, "rivals": "nnunet"}
    field.speedrun(Namespace(command="speedrun", **two))
    assert len(measured) == 2 * 7 * 4 and measured[-1] == "streets nnunet 30.0"
    assert made == ["nnunet"]
    assert cv2.imread(str(picture)).shape[1] == 2 * width, "a panel for each folder"


# --------------------------------------------------------------------------------------------------
#  Rivals
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    """The root of a split of ten images of one class."""
    write_plain(tmp_path / "plain", (255, 255))
    peers.write_split(str(tmp_path / "plain"), tmp_path / "split", seed=0)
    return tmp_path / "split"


@pytest.fixture
def labels(tmp_path):
    """The root of a split of label maps, one pixel of each ignored."""
    write_label_maps(tmp_path / "labels")
    peers.write_split(str(tmp_path / "labels"), tmp_path / "split", seed=0)
    for file in (tmp_path / "split" / "train" / "training" / "masks").iterdir():
        mask = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        mask[0, 0] = 255
        cv2.imwrite(str(file), mask)
    return tmp_path / "split"


def files_of(folder):
    """{path below the folder: pixels} of its PNG files."""
    paths = sorted(folder.rglob("*.png"))
    return {
        path.relative_to(folder).as_posix(): cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for path in paths
    }


def test_a_split_as_a_dataset_of_ultralytics(plain, tmp_path):
    split = rivals.load_split(plain)
    rivals.write_ultralytics(split, tmp_path / "data")
    data, files = json.loads((tmp_path / "data" / "data.yaml").read_text()), files_of(tmp_path)
    assert data["names"] == {"0": "foreground"} and data["masks_dir"] == "masks"
    written = files_of(tmp_path / "data")
    counts = {name: len(list((tmp_path / "data" / name).iterdir())) for name in ("images", "masks")}
    assert counts == {"images": 3, "masks": 2}, "no mask of a test image"
    assert sum(name.startswith("images/train") for name in written) == 7
    assert sum(name.startswith("images/test") for name in written) == 2
    row = split.train.iloc[0]  # the first of ten is kept to choose the epoch
    image = files[f"split/train/training/images/{row.id}.png"]
    mask = files[f"split/train/training/masks/{row.id}.png"]
    assert (written["images/val/000000.png"] == image).all()
    assert (written["masks/val/000000.png"] == (mask > 0)).all()


def test_a_split_as_a_dataset_of_nnunet(plain, tmp_path):
    rivals.write_nnunet(rivals.load_split(plain), tmp_path / "data")
    (dataset,) = (tmp_path / "data" / "raw").iterdir()
    content = json.loads((dataset / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "foreground": 1} and content["numTraining"] == 8
    files = files_of(tmp_path / "data")
    images = {Path(name).name for name in files if "/imagesTr/" in name}
    assert images == {f"{number:06d}_0000.png" for number in range(8)}
    masks = {Path(name).name: pixels for name, pixels in files.items() if "/labelsTr/" in name}
    assert masks.keys() == {f"{number:06d}.png" for number in range(8)}
    assert set(np.unique(np.stack(list(masks.values())))) == {0, 1}
    assert (
        sorted(path.name for path in (tmp_path / "data" / "test").iterdir())[1] == "000001_0000.png"
    )


def test_the_ignored_pixels_of_label_maps(labels, tmp_path):
    split = rivals.load_split(labels)
    count = len(split.classes.names)
    rivals.write_nnunet(split, tmp_path / "nnunet")
    (dataset,) = (tmp_path / "nnunet" / "raw").iterdir()
    written = json.loads((dataset / "dataset.json").read_text())["labels"]
    assert list(written.values()) == list(range(count + 1)), "consecutive, as nnU-Net wants it"
    assert list(written)[0] == "background" and list(written)[-1] == "ignore"
    masks = files_of(dataset / "labelsTr").values()
    assert all(mask[0, 0] == count and mask.max() == count for mask in masks)
    rivals.write_ultralytics(split, tmp_path / "ultralytics")
    masks = files_of(tmp_path / "ultralytics" / "masks").values()
    assert all(mask[0, 0] == 255 and set(np.unique(mask)) <= {0, 1, 2, 255} for mask in masks)


@pytest.fixture
def kitti(roads, tmp_path):
    """The root of a split in KITTI's layout, with its categories."""
    peers.write_split(str(roads), tmp_path / "split", seed=0)
    return tmp_path / "split"


@pytest.mark.parametrize("kind", ["plain", "labels", "kitti"])
def test_the_masks_of_a_rival_are_scored(kind, request, tmp_path):
    split = rivals.load_split(request.getfixturevalue(kind))
    several = split.classes.several
    for name, right in (("right", True), ("wrong", False)):
        (tmp_path / name).mkdir()
        for number, row in enumerate(split.test.itertuples()):
            mask = read_sample(row)[1]
            mask = mask if several else np.where(mask[0] == 1, 255, 0).astype(np.uint8)
            other = (mask + 1) % len(split.classes.names) if several else 255 - mask
            cv2.imwrite(str(tmp_path / name / f"{number:06d}.png"), mask if right else other)
        scores = field.scores_of(rivals.score(split, tmp_path / name))
        kinds = {"labels": ["mIoU"], "kitti": ["IoU50"], "plain": ["IoU50", "mean Dice"]}
        assert [scores[key] for key in kinds[kind]] == [100.0 * right] * len(kinds[kind])
        assert ("worst category" in scores) == (kind == "kitti")
    assert several or scores["MaxF"] > 0, "of probabilities that are the wrong way round"


DRIVER = """
import json, sys
from pathlib import Path
import cv2
folder = Path(sys.argv[1])
(folder / "predicted").mkdir()
for file in (folder / "images" / "test").iterdir():  # the foreground of `write_plain` is brighter
    cv2.imwrite(str(folder / "predicted" / file.name), cv2.imread(str(file))[..., 0])
numbers = {"epochs": float(sys.argv[2]), "seconds": float(sys.argv[3]), "pretrained": 0}
(folder / "numbers.json").write_text(json.dumps(numbers))
"""


def test_a_rival_is_a_system_like_any_other(tmp_path, monkeypatch):
    write_plain(tmp_path / "plain", (150, 150))
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "rivals_bright.py").write_text(DRIVER)
    rival = rivals.Rival("bright==1.0", rivals.write_ultralytics)
    monkeypatch.setattr(rivals, "RIVALS", {"bright": rival})
    monkeypatch.setattr(rivals, "HERE", tmp_path)
    monkeypatch.setattr(rivals, "environment", lambda name: Path(sys.executable))
    options = Namespace(data=str(tmp_path / "plain"), seed=3, minutes=2.0, encoder="", weights="")
    numbers = field.accuracy_variant("bright", options)
    assert numbers["IoU50"] == numbers["mean Dice"] == 100
    assert [numbers[name] for name in ("epochs", "seconds", "pretrained")] == [2, 3, 0]


def test_every_rival_has_its_file():
    files = {path.name for path in (KIT / "tools").glob("rivals_*.py")}
    assert files == {f"rivals_{name}.py" for name in rivals.RIVALS}


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        Path(command[-1]).mkdir(exist_ok=True, parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rivals, "HERE", tmp_path)
    monkeypatch.setattr(rivals.subprocess, "run", run)
    python = rivals.environment("nnunet")
    assert python == tmp_path / ".venv-nnunet" / "bin" / "python"
    assert [command[2] for command in calls] == ["venv", "pip"]
    assert rivals.environment("nnunet") == python and len(calls) == 2
    monkeypatch.setitem(rivals.RIVALS, "nnunet", rivals.Rival("nnunetv2==9", rivals.write_nnunet))
    rivals.environment("nnunet")
    assert len(calls) == 4, "another version is installed anew"


def test_what_is_said_without_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "HERE", tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: a\nERROR: No matching distribution\n")
    monkeypatch.setattr(rivals.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="ultralytics==.* installed: ERROR: No matching"):
        field.systems(Namespace(command="field", rivals="ultralytics"))
    with pytest.raises(UserError, match="--rivals yolo: is no rival; .*nnunet"):
        field.systems(Namespace(command="field", rivals="yolo"))
    assert field.systems(Namespace(command="field", rivals="")) == ("example", "example512", "kit")
