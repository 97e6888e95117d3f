"""Out-of-fold predictions: oof.csv and oof/ of a training and of all folds, and their blends."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, succeed
from PIL import Image

from kit.config import ModelConfig
from kit.data.csvs import holds_masks
from kit.data.names import list_files
from kit.data.rasters import Window
from kit.data.rle import rle_decode
from kit.network.model import TrainedModel
from kit.results import oof, tuning


def model_of(names=("foreground",), exclusive=False, **settings):
    """The settings of a model with these classes."""
    values = tuple(str(index + 1) for index in range(len(names)))
    config = ModelConfig(
        class_names=names,
        class_values=values,
        exclusive=exclusive,
        thresholds=(0.5,) * len(names) * (not exclusive),
        areas=(0,) * len(names) * (not exclusive),
    )
    return TrainedModel(None, config.__class__(**{**vars(config), **settings}), {}, {})


def predicted(name, planes, trained, block=None):
    """The prediction of an image."""
    sample = SimpleNamespace(id=name, image_id=name, block=block, mask=None, layers=())
    prediction = tuning.Prediction.__new__(tuning.Prediction)
    prediction.sample, prediction.config, prediction.size = sample, trained.config, planes.shape[1:]
    prediction.arrays, prediction.pngs = (planes, None), []
    return prediction


def read_planes(path):
    return np.asarray(Image.open(path))


def test_several_planes_have_a_folder_each_and_label_maps_their_probability(tmp_path):
    rng = np.random.default_rng(0)
    trained = model_of(("car", "road/lane"))
    planes = rng.integers(0, 256, (2, 20, 30), np.uint8)
    oof.write_predictions(tmp_path, [predicted("a", planes, trained)], trained)
    for folder, plane in zip(("car", "road_lane"), planes, strict=True):
        assert (read_planes(tmp_path / "oof" / folder / "a.png") == plane).all()
    table = pd.read_csv(tmp_path / "oof.csv", dtype=str)
    assert table.columns.tolist() == ["ImageId", "ClassId", "EncodedPixels"]
    assert table.ClassId.tolist() == ["1", "2"]
    for runs, plane in zip(table.EncodedPixels, planes, strict=True):
        assert (rle_decode(runs, (20, 30)) == (plane >= 128)).all()

    trained = model_of(("sky", "road"), exclusive=True)
    planes = np.stack([rng.integers(0, 2, (20, 30)), rng.integers(0, 256, (20, 30))])
    folder = tmp_path / "labels"
    folder.mkdir()
    oof.write_predictions(folder, [predicted("a", planes.astype(np.uint8), trained)], trained)
    assert (read_planes(folder / "oof" / "a.png") == planes[1]).all()
    table = pd.read_csv(folder / "oof.csv", dtype=str)
    assert (rle_decode(table.EncodedPixels[1], (20, 30)) == planes[0]).all()


def test_reduced_images_are_written_at_their_own_size_and_blocks_are_left_out(tmp_path, capsys):
    trained = model_of(scale=0.5, areas=(3,))  # of reduced pixels: 12 of the image's own
    planes = np.zeros((1, 10, 15), np.uint8)
    planes[0, 5, 5:7] = planes[0, 1:4, 1:4] = 255
    block = Window(0, 0, 19, 30, (19, 30), 2)
    oof.write_predictions(tmp_path, [predicted("a", planes, trained, block)], trained)
    assert read_planes(tmp_path / "oof" / "a.png").shape == (19, 30)
    mask = rle_decode(pd.read_csv(tmp_path / "oof.csv").rle_mask[0], (19, 30))
    assert (mask[2:8, 2:8].all(), mask[10:].any()) == (True, False)
    part = predicted("b", planes, trained, Window(0, 0, 20, 30, (400, 600)))
    folder = tmp_path / "blocks"
    oof.write_predictions(folder, [part], trained)
    assert not folder.exists()
    assert "not written of images that are read in blocks" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_folds(roads, tmp_path_factory):
    """The --out of a training of two folds, both."""
    out = tmp_path_factory.mktemp("folds") / "out"
    flags = ("--data", roads, "--epochs", 1, "--folds", 2, "--fold", "all", *TINY)
    assert "oof.csv: 24 rows" in succeed("train.py", *flags, "--out", out)
    return out


def test_predictions_of_all_folds_are_those_of_infer(two_folds, roads, tmp_path):
    scores = [pd.read_csv(two_folds / f"fold{fold}" / "scores.csv").id for fold in (0, 1)]
    assert len(list((two_folds / "oof").glob("*.png"))) == 24 == sum(map(len, scores))
    answers = pd.read_csv(two_folds / "oof.csv", index_col="id", keep_default_na=False).rle_mask
    for fold, ids in enumerate(scores):
        folder, out = two_folds / f"fold{fold}", tmp_path / str(fold)
        flags = ("--model", folder, "--data", roads / "training", "--save_probs", "true")
        succeed("infer.py", *flags, "--comparisons", "false", "--out", out)
        assert {path.stem for path in (folder / "oof").glob("*.png")} == set(ids)
        for name in ids:
            png = read_planes(two_folds / "oof" / f"{name}.png")
            assert (png == read_planes(folder / "oof" / f"{name}.png")).all()
            assert (png == read_planes(out / "probs" / f"{name}.png")).all()
            mask = read_planes(out / "masks" / f"{name}.png") > 0
            assert (rle_decode(answers[name], mask.shape) == mask).all()


def test_what_is_written_is_never_read_as_data(two_folds):
    assert not [file for file in list_files(two_folds) if "oof" in file.name]
    assert not holds_masks(two_folds / "oof.csv")
