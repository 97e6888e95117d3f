"""What bench.py compares: the same pairs for every system, and recipes that run."""

import json

import bench
import cv2
import numpy as np
import peers
import pytest
from test_classes import write_label_maps

import infer
from kit.data.samples import find_samples

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
    scores = bench.scores_of(report)
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
    scores = bench.scores_of(json.loads((tmp_path / "predictions" / "metrics.json").read_text()))
    assert 0 <= scores["lowest IoU"] <= scores["mIoU"] <= 100


def test_a_class_that_is_not_in_the_images_is_not_the_lowest():
    scores = {"car": {"IoU": 60.0}, "road": {"IoU": 80.0}, "tram": {"IoU": 0.0}}
    report = {
        "image": {"all": {"mIoU": 70.0, "accuracy": 90.0}},
        "classes": {"absent": ["tram"], "per_class": scores},
    }
    assert bench.scores_of(report) == {"mIoU": 70, "accuracy": 90, "lowest IoU": 60}


def test_a_speed_run_resumes_and_draws_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", "speedrun"])
    (tmp_path / "docs").mkdir()
    measured, stop = [], 1

    def in_turn(command, variants, options, minutes):
        if minutes > stop:
            raise KeyboardInterrupt
        measured.append(f"{variants[0]} {minutes}")
        return {variants[0]: {"MaxF": [10.0 * len(measured)]}}

    monkeypatch.setattr(bench, "in_turn", in_turn)
    with pytest.raises(KeyboardInterrupt):
        bench.speedrun(None)
    first = ["tutorial 0.5", "example 0.5", "kit 0.5", "tutorial 1.0", "example 1.0", "kit 1.0"]
    assert measured == first
    assert cv2.imread(str(tmp_path / "docs" / "speedrun.png")).std() > 0
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        bench.speedrun(None)
    assert measured == [*first, "tutorial 2.0", "example 2.0", "kit 2.0"], "no row twice"
    kept = bench.load_report("speedrun")["numbers"]
    assert kept["kit 0.5"] == {"MaxF": [30.0]} and kept["kit 2.0"] == {"MaxF": [90.0]}
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", "speedrun", "--data=other"])
    measured, stop = [], 9
    bench.speedrun(None)
    assert len(measured) == 15, "another call takes no numbers of this one"
    bench.speedrun(None)
    assert len(measured) == 30, "a finished one is measured anew"
