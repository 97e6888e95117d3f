"""Out-of-fold predictions: oof.csv and oof/ of a training and of all folds, and their blends."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, run, succeed
from PIL import Image

from kit.config import Classes, ModelConfig, plane_settings
from kit.data.csvs import holds_masks
from kit.data.names import list_files
from kit.data.rasters import Window
from kit.data.rle import rle_decode
from kit.errors import UserError
from kit.extra import blends, runs
from kit.network.model import TrainedModel
from kit.results import oof, predict, tuning
from kit.results.metrics import count_image
from kit.results.tuning import scores_by_threshold


def model_of(names=("foreground",), exclusive=False, **settings):
    """The settings of a model with these classes."""
    values = tuple(str(index + 1) for index in range(len(names)))
    classes = {"class_names": names, "class_values": values, "exclusive": exclusive}
    planes = plane_settings(Classes(names, values, exclusive))
    return TrainedModel(None, ModelConfig(**classes | planes | settings), {}, {})


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
    for encoded, plane in zip(table.EncodedPixels, planes, strict=True):
        assert (rle_decode(encoded, (20, 30)) == (plane >= 128)).all()

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
    succeed("train.py", *flags, "--out", out)
    assert len(pd.read_csv(out / "oof.csv")) == 24
    return out


def test_predictions_of_all_folds_are_those_of_infer(two_folds, roads, tmp_path):
    scores = [pd.read_csv(two_folds / f"fold{fold}" / "scores.csv").id for fold in (0, 1)]
    assert len(list((two_folds / "oof").glob("*.png"))) == 24 == sum(map(len, scores))
    pages = [folder / "report.html" for folder in (two_folds, two_folds / "fold0")]
    assert [page.read_text().count('"image": "') for page in pages] == [24, 12]
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


# --------------------------------------------------------------------------------------------------
#  --fold none, and the reasons in config.json
# --------------------------------------------------------------------------------------------------


def test_all_images_train_with_what_the_folds_found(two_folds, tmp_path):
    """As after a run by minutes, which has no epochs in its settings."""
    settings = json.loads((two_folds / "fold1" / "config.json").read_text())
    assert (settings["fold"], settings["epochs_done"]) == (1, 1)
    changes = {"epochs": 0, "epochs_done": 2, "max_minutes": 9, "thresholds": [0.3], "areas": [7]}
    changes["symmetries"] = ["v", "180"]
    path, out = tmp_path / "tuned.json", tmp_path / "out"
    path.write_text(json.dumps(settings | changes))
    printed = succeed("train.py", "--config", path, "--fold", "none", "--out", out)
    assert f"--fold none: epochs 2, thresholds, areas, symmetries of {path}; no scores" in printed
    assert "fold none: 24 pairs to train and 0 to validate on" in printed
    assert "threshold 0.300, minimum component area 7 pixels" in printed
    assert {file.name for file in out.iterdir()} == {
        "model.pt", "last.ckpt", "config.json", "metrics.csv", "examples.jpg", "augmented.jpg",
    }  # fmt: skip
    assert list(pd.read_csv(out / "metrics.csv")) == ["epoch", "seconds", "lr", "train_loss"]
    found = json.loads((out / "config.json").read_text())
    assert (found["fold"], found["epochs_done"], found["max_minutes"]) == ("none", 2, 0)
    assert (found["thresholds"], found["areas"]) == ([0.3], [7])
    assert found["symmetries"] == ["v", "180"]
    again = succeed("train.py", "--config", path, "--fold", "none", "--out", out)
    assert "NOTHING WAS TRAINED" in again
    more = ("--config", path, "--fold", "none", "--out", out, "--epochs", 3, "--min_pixels", 5)
    assert "resume: from" in succeed("train.py", *more)
    found = json.loads((out / "config.json").read_text())
    assert (found["epochs_done"], found["thresholds"], found["areas"]) == (3, [0.3], [5])
    predicted = tmp_path / "predicted"
    flags = ("--model", out, "--data", Path(settings["data"]) / "testing", "--out", predicted)
    assert "threshold 0.300" in succeed("infer.py", *flags)


def test_the_last_epoch_without_validation_is_that_with_it(roads, tmp_path):
    """On the same images: those of the first fold, which for the other are all."""
    images = sorted((roads / "training" / "image_2").glob("um_*.png"))[:8]
    folder = roads / "training" / "gt_image_2"
    rows = [f"{file},{folder / file.name.replace('_', '_road_', 1)}" for file in images]
    flags = ("--epochs", 2, "--top", 0.4, "--batch_size", 2, *TINY)
    states = []
    for name, chosen, fold in (("half", 8, 1), ("all", 4, "none")):
        table = tmp_path / f"{name}.csv"
        lines = [f"{row},{index // 4}" for index, row in enumerate(rows[:chosen])]
        lines = ["image,mask,fold", *lines]
        if fold == "none":
            lines = ["image,mask", *(line.rpartition(",")[0] for line in lines[1:])]
        table.write_text("\n".join(lines))
        out = tmp_path / name
        succeed("train.py", "--data", table, "--fold", fold, "--out", out, *flags)
        states.append(torch.load(out / "model.pt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_without_config_the_threshold_is_half_and_other_classes_are_refused(roads, tmp_path):
    flags = ("--data", roads, "--epochs", 1, "--fold", "none", *TINY)
    printed = succeed("train.py", *flags, "--out", tmp_path / "out")
    assert "--fold none: epochs 1, threshold 0.5, nothing tells a better one" in printed
    path = tmp_path / "out" / "config.json"
    settings = json.loads(path.read_text())
    assert settings["thresholds"] == [0.5]
    path.write_text(json.dumps(settings | {"class_names": ["lane"]}))
    refused = run("train.py", "--config", path, "--out", tmp_path / "other")
    assert refused.returncode == 2
    assert "what its run found is of another class_names: ['lane']" in refused.stderr
    assert "name the config.json of a run like this one" in refused.stderr
    for name, value in (("symmetries", ["x"]), ("areas", 5), ("thresholds", [0.4, 0.5])):
        path.write_text(json.dumps(settings | {name: value}))
        refused = run("train.py", "--config", path, "--out", tmp_path / "other")
        assert "does not fit one class (" in refused.stderr
        assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
    refused = run("train.py", "--config", tmp_path / "config.json", "--fold", "none")
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)


def test_config_json_says_why(two_folds, roads, tmp_path):
    why = json.loads((two_folds / "fold0" / "config.json").read_text())["why"]
    assert "pixels" in why["tiles"]
    assert why["metric"] == "what KITTI Road is scored by"
    assert why["lr"] == "usual for AdamW"
    assert "12 validation images" in why["thresholds"]
    assert "h unless it harms" in why["symmetries"]
    assert "plans" not in why  # KITTI is scored by maxf, which masks do not change
    assert not {"height", "width", "epochs", "batch_size"} & set(why)  # given
    flags = ("--config", two_folds / "fold0" / "config.json", "--fold", 1, "--out", tmp_path)
    succeed("train.py", *flags)
    replayed = json.loads((tmp_path / "config.json").read_text())["why"]
    assert set(replayed) == {"thresholds", "precision", "symmetries", "data", "fold"}
    succeed("train.py", *flags, "--metric", "dice", "--resume", "none")
    replayed = json.loads((tmp_path / "config.json").read_text())["why"]
    assert "kept where it gains" in replayed["plans"]


# --------------------------------------------------------------------------------------------------
#  Blends
# --------------------------------------------------------------------------------------------------


def drawn_values(noises, images=60, seed=0):
    """`score_weightings` of models with independent errors of these strengths."""
    rng = np.random.default_rng(seed)
    targets = rng.random((images, 1, 24, 24)) < 0.3
    logits = np.stack([3.0 * targets - 1.5 + rng.normal(0, s, targets.shape) for s in noises])
    planes = 255 / (1 + np.exp(-logits))
    values = {}
    for weights in blends.weightings(len(noises)):
        mixed = np.rint(np.tensordot(weights, planes, 1)).astype(np.uint8)
        pairs = zip(mixed, targets.astype(np.uint8), strict=True)
        counts = np.stack([count_image(*pair, Classes()).counts.numpy() for pair in pairs])
        values[weights] = scores_by_threshold(counts[:, 0], "dice")[None]
    return values


def test_weights_are_taken_where_they_help_beyond_chance():
    parts = np.arange(60) % blends.FOLDS
    for seed in range(5):
        weights, text = blends.choose(drawn_values((1.5, 1.5, 1.5), seed=seed), parts)
        assert weights == (1 / 3, 1 / 3, 1 / 3), text
        assert text.endswith("equal ones")
    weights, text = blends.choose(drawn_values((1.0, 1.0, 30.0)), parts)
    assert weights[2] == 0
    assert 0.25 <= weights[0] <= 0.75
    assert text.endswith("taken")
    weights, _ = blends.choose(drawn_values((1.0, 30.0)), parts)
    assert weights == (1.0, 0.0)


def test_the_score_of_a_blend_is_not_chosen_on_its_own_images():
    """Of weights and thresholds that mean nothing the nested score gains nothing."""
    rng = np.random.default_rng(0)
    values = {w: rng.normal(0.5, 0.1, (1, 40, 256)) for w in blends.weightings(3)}
    nested = blends.nested(values, np.arange(40) % blends.FOLDS)
    assert abs(nested.mean() - 0.5) < 0.05
    chosen = max(v[0].mean(0).max() for v in values.values())
    assert chosen > 0.54


@pytest.fixture(scope="module")
def two_runs(roads, tmp_path_factory):
    """A folder with two runs on the same images, and the table of them, which is printed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, lr in (("a", 2e-3), ("b", 1e-3)):
        flags = ("--data", roads, "--epochs", 3, "--folds", 2, "--lr", lr, *TINY)
        succeed("train.py", *flags, "--out", folder / name)
    flags = ("--compare", folder / "a", folder / "b", "--out", folder / "table")
    return folder, succeed("train.py", *flags)


def test_compare_blends_the_best_runs_and_infer_predicts_with_it(two_runs, roads, tmp_path):
    folder, printed = two_runs
    assert "blend: maxf on 12 images: " in printed
    path = folder / "table" / "blend.json"
    content = json.loads(path.read_text())
    files = [(path.parent / name).resolve() for name in content["models"]]
    assert set(files) <= {(folder / name / "model.pt").resolve() for name in "ab"}
    assert sum(content["weights"]) == pytest.approx(1)
    content = {"models": ["../a/model.pt", "../b/model.pt"], "thresholds": [0.4]}
    images = roads / "testing"
    probs = {}
    blended = [f"{name}.json" for name in ("equal", "mostly_a")]
    for name, weights in zip(blended, ([0.5, 0.5], [0.75, 0.25]), strict=True):
        (path.parent / name).write_text(json.dumps(content | {"weights": weights}))
    for name in ("a", "b", "both", *blended):
        models = {"both": ("a/model.pt", "b/model.pt")}.get(name, (name,))
        models = [path.parent / name if ".json" in name else folder / name for name in models]
        flags = ("--data", images, "--save_probs", "true", "--out", tmp_path / name)
        printed = succeed("infer.py", "--model", *models, *flags)
        assert ("threshold 0.400" in printed) == (name in blended)
        files = sorted((tmp_path / name / "probs").glob("*.png"))
        probs[name] = np.concatenate([read_planes(file).ravel().astype(float) for file in files])
    assert (probs["equal.json"] == probs["both"]).all()
    assert np.abs(probs["both"] - (probs["a"] + probs["b"]) / 2).max() <= 1
    assert np.abs(probs["mostly_a.json"] - (3 * probs["a"] + probs["b"]) / 4).max() <= 1
    assert np.abs(probs["a"] - probs["b"]).max() > 10


def test_the_score_of_a_blend_is_that_of_infer(two_runs, roads):
    """Equal weights, in a table of Dice at 0.5: on the images that validated, from files."""
    folder, _ = two_runs
    read = [runs.read_run(folder / name) for name in "ab"]
    settings = read[0].settings | {"metric": "dice"}
    table = blends.read_samples(read)
    assert len(table) == 12
    values = blends.score_weightings([folder / name for name in "ab"], table, settings)
    for weights, name in (((1.0, 0.0), "a"), ((0.0, 1.0), "b")):
        for value, sample in zip(values[weights][0, :, 128], table.itertuples(), strict=True):
            positive = read_planes(folder / name / "oof" / f"{sample.id}.png") >= 128
            target = sample.mask.read(positive.shape)[0]
            hits = (positive & (target == 1)).sum()
            both = (positive & (target < 2)).sum() + (target == 1).sum()
            assert value == pytest.approx(2 * hits / both, abs=1e-5)


def test_bad_blends_are_refused_and_missing_data_is_said(two_runs, roads, tmp_path, capsys):
    folder, _ = two_runs
    blend = {"models": ["../a/model.pt"], "weights": [1.0], "thresholds": [0.5]}
    for name, change in (
        ("weights", {"weights": [-1.0]}), ("short", {"weights": []}), ("text", {"weights": ["x"]}),
        ("classes", {"thresholds": [0.5, 0.5]}), ("gone", {"models": ["../c/model.pt"]}),
    ):  # fmt: skip
        path = folder / "table" / f"{name}.json"
        path.write_text(json.dumps(blend | change))
        with pytest.raises(UserError, match="is no blend" if name != "gone" else "no such file"):
            predict.load_models([str(path)], "cpu")
    read = [runs.read_run(folder / name) for name in "ab"]
    gone = [run._replace(settings=run.settings | {"data": str(tmp_path / "x")}) for run in read]
    blends.blend(gone, tmp_path)
    exclusive = [run._replace(settings=run.settings | {"exclusive": True}) for run in read]
    blends.blend(exclusive, tmp_path)
    printed = capsys.readouterr().out
    assert "no blend: --data" in printed
    assert "no blend: classes that exclude each other: oof/ does not tell" in printed
    assert not (tmp_path / "blend.json").exists()
