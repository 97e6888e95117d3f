"""The real commands from scenes to scores: what a user gets."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KIT, TINY, run, succeed
from PIL import Image

import infer
import utils
from utils import Config


def read_json(path):
    return json.loads(path.read_text())


def test_training_learns_and_writes_what_it_promises(trained):
    assert read_json(trained / "metrics.json")["image"]["all"]["MaxF"] > 88
    written = {path.name for path in trained.iterdir()}
    assert written == {
        "model.pt",
        "last.ckpt",
        "config.json",
        "metrics.csv",
        "metrics.json",
        "curves.png",
        "pr_curve.png",
        "validation.jpg",
    }
    rows = pd.read_csv(trained / "metrics.csv")
    assert rows.epoch.tolist() == list(range(1, 17))
    assert rows.train_loss.iloc[-1] < 0.5 * rows.train_loss.iloc[0]
    assert rows.lr.iloc[-1] == pytest.approx(0.01 * Config.lr, rel=0.01), "the schedule ends at its floor"
    assert {"val_loss", "MaxF"} <= set(rows)
    for picture in ("curves.png", "pr_curve.png", "validation.jpg"):
        assert np.asarray(Image.open(trained / picture)).std() > 20
    assert read_json(trained / "config.json")["encoder"] == "resnet18"


def test_it_learns_in_16_bits(roads, tmp_path):
    """bf16, which GPUs and newer CPUs take by themselves; where it is only imitated, slowly, hence the size."""
    small = ("--height", 32, "--width", 96, "--precision", "bf16-mixed", "--epochs", 4)
    printed = succeed("train.py", "--data", roads, "--out", tmp_path, *TINY, *small)
    assert "in bf16-mixed" in printed
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows.train_loss.iloc[-1] < 0.9 * rows.train_loss.iloc[0]
    state = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_the_last_weights_are_kept_unless_they_went_wrong(tmp_path, monkeypatch):
    """The best score of few pictures is luck, so a later epoch takes over; one that fell far behind does not."""
    import train

    kept, scores = [], []
    board = SimpleNamespace(report=lambda: {"image": {"all": {"MaxF": scores[-1]}}})
    monkeypatch.setattr(utils, "save_model", lambda *_: kept.append(scores[-1]))
    monkeypatch.setattr(train, "softened", lambda network: network)
    module = SimpleNamespace(scoreboard=board, average=SimpleNamespace(module=None), stage=Config)
    keeper = train.Keeper(Config(out=str(tmp_path)), {}, 0.0)
    for score in (80.0, 92.0, 90.5, 86.9, 40.0, 88.0):
        scores.append(score)
        keeper.on_validation_start()
        keeper.on_validation_end(SimpleNamespace(is_global_zero=True), module)
    assert kept == [80.0, 92.0, 90.5, 88.0]


def test_normalisation_is_measured_on_many_pictures_at_once(roads, tmp_path):
    """Batches of 2 miss how pictures differ; the model must see the training pictures as it sees them all together."""
    flags = ("--augment", 0, "--grow", "false", "--epochs", 2, "--batch_size", 2, "--ema", 0)
    succeed("train.py", "--data", roads, "--out", tmp_path, *TINY[:-2], *flags)
    trained = utils.load_model(tmp_path / "model.pt", "cpu")
    samples = utils.survey(utils.find_samples(str(roads), training=True))
    samples = samples[utils.assign_folds(samples, trained.cfg) != 0]
    images = torch.stack([utils.preprocess(utils.read_sample(row)[0], trained.cfg) for row in samples.itertuples()])
    images = utils.normalise(images, trained.cfg)
    alone, together = trained.model(images).sigmoid(), trained.model.train()(images).sigmoid()
    assert (alone - together).abs().mean() < 0.02


def test_model_file_holds_plain_types_alone(trained):
    content = torch.load(trained / "model.pt", weights_only=True)
    assert set(content) == {"format", "config", "state_dict", "threshold", "metrics"}
    metrics = read_json(trained / "metrics.json")
    assert content["metrics"] == {space: metrics[space] for space in ("image", "bev")}
    assert content["threshold"] == metrics["threshold"]


@pytest.fixture(scope="session")
def validation_folder(trained, roads, tmp_path_factory):
    """The validation pictures of `trained` with their truths, as a KITTI folder of their own."""
    samples = utils.find_samples(str(roads), training=True)
    samples = samples[utils.assign_folds(samples, Config()) == Config.fold]
    root = tmp_path_factory.mktemp("validation")
    for column, folder in (("image", "image_2"), ("mask", "gt_image_2"), ("calib", "calib")):
        (root / folder).mkdir()
        for path in samples[column]:
            shutil.copy(path, root / folder)
    return root


def test_inference_scores_what_training_scored(trained, validation_folder, tmp_path):
    printed = succeed("infer.py", "--model", trained, "--data", validation_folder, "--out", tmp_path)
    assert read_json(tmp_path / "metrics.json") == read_json(trained / "metrics.json")
    assert "a second" in printed


def test_scores_are_those_of_the_files(trained, validation_folder, tmp_path):
    """MaxF and IoU counted again from the written probabilities; the written masks are these at the threshold."""
    succeed("infer.py", "--model", trained, "--data", validation_folder, "--out", tmp_path, "--save_probs", "true")
    metrics = read_json(tmp_path / "metrics.json")
    probability, mask, road, valid = [], [], [], []
    for row in utils.find_samples(str(validation_folder)).itertuples():
        name = os.path.basename(row.image)
        coded = np.asarray(Image.open(row.mask).convert("RGB"))
        probability.append(np.asarray(Image.open(tmp_path / "probs" / name)).ravel())
        mask.append(np.asarray(Image.open(tmp_path / "masks" / name)).ravel())
        road.append((coded[..., 2] > 0).ravel())
        valid.append((coded[..., 0] > 0).ravel())
    valid = np.concatenate(valid)
    probability, mask, road = (np.concatenate(parts)[valid] for parts in (probability, mask, road))
    assert set(np.unique(mask)) == {0, 255}
    assert ((mask > 0) == (probability / 255 >= metrics["threshold"])).all()
    cuts = [probability >= level for level in range(256)]
    f1 = [200 * (cut & road).sum() / (cut.sum() + road.sum()) for cut in cuts]
    iou = [100 * (cut & road).sum() / (cut | road).sum() for cut in cuts]
    assert metrics["image"]["all"]["MaxF"] == pytest.approx(max(f1), abs=1e-3)
    assert metrics["image"]["all"]["IoU"] == pytest.approx(iou[int(np.argmax(f1))], abs=1e-3)


def test_scores_from_above_are_those_of_the_submitted_maps(trained, validation_folder, tmp_path):
    """The maps in the zip, scored beside truths seen from above: the bev block; without calibration, fewer pictures."""
    data = tmp_path / "data"
    shutil.copytree(validation_folder, data)
    (data / "calib" / sorted(os.listdir(data / "calib"))[0]).unlink()
    flags = ("--model", trained, "--data", data, "--bev", "true")
    succeed("infer.py", *flags, "--out", tmp_path, "--submission", "kitti_partial")
    metrics = read_json(tmp_path / "metrics.json")
    board = utils.Scoreboard()
    samples = utils.find_samples(str(data))
    with zipfile.ZipFile(tmp_path / "submission_kitti.zip") as archive:
        maps = {name: np.array(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()}
    assert set(maps) == {Path(row.mask).name for row in samples.itertuples() if row.calib}
    for row in samples[samples.calib != ""].itertuples():
        truth = utils.read_sample(row)[1]
        above = utils.to_bev(truth, utils.bev_cells(row.calib, truth.shape), utils.IGNORE)
        board.add(row.category, {"bev": utils.pixel_counts(maps[Path(row.mask).name], above)})
    assert metrics["bev"] == board.report()["bev"]
    assert metrics["bev"]["all"]["images"] == len(samples) - 1
    assert metrics["image"]["all"]["images"] == len(samples)
    assert {path.stem for path in (tmp_path / "bev").iterdir()} == {Path(path).stem for path in samples.calib if path}


def test_kitti_submission_is_whole_or_not_at_all(trained, roads, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(roads / "testing", data)
    flags = ("--model", trained, "--data", data, "--comparisons", "false", "--submission", "kitti")
    for out in ("a", "b"):
        succeed("infer.py", *flags, "--out", tmp_path / out)
    content = [(tmp_path / out / "submission_kitti.zip").read_bytes() for out in ("a", "b")]
    assert content[0] == content[1]
    with zipfile.ZipFile(tmp_path / "a" / "submission_kitti.zip") as archive:
        names = archive.namelist()
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    stems = [path.stem for path in sorted((data / "image_2").iterdir())]
    assert names == sorted(stem.replace("_", "_road_", 1) + ".png" for stem in stems)
    assert {(p.shape, p.dtype.name) for p in pixels} == {((800, 400), "uint8")}
    for stem in stems[:2]:
        (data / "calib" / f"{stem}.txt").unlink()
    refused = run("infer.py", *flags, "--out", tmp_path / "c")
    assert refused.returncode == 2
    assert all(stem in refused.stderr for stem in stems[:2])
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()
    (data / "calib" / f"{stems[2]}.txt").write_text("P2: nonsense")
    refused = run("infer.py", *flags, "--out", tmp_path / "c")
    assert refused.returncode == 2
    assert f"{stems[2]}.txt" in refused.stderr


def test_lane_submission_holds_um_pictures_alone(roads, tmp_path):
    flags = ("--epochs", 1, "--target", "lane", *TINY)
    succeed("train.py", "--data", roads, "--out", tmp_path, *flags)
    assert set(read_json(tmp_path / "metrics.json")["image"]) == {"all", "um_lane"}
    flags = ("--model", tmp_path, "--data", roads / "training", "--out", tmp_path / "p", "--submission", "kitti")
    succeed("infer.py", *flags, "--comparisons", "false")
    with zipfile.ZipFile(tmp_path / "p" / "submission_kitti.zip") as archive:
        names = set(archive.namelist())
    assert names == {path.name for path in (roads / "training" / "gt_image_2").glob("um_lane_*.png")}


def test_new_defaults_change_no_prediction(trained, roads, tmp_path):
    """model.pt carries all that inference needs; utils.py's defaults may have moved on."""
    changed = (KIT / "utils.py").read_text()
    defaults = {
        'encoder: str = "resnet34"': 'encoder: str = "resnet50"',
        'arch: str = "Unet"': 'arch: str = "FPN"',
        "height: int = 0": "height: int = 96",
        "mean: tuple[float, ...] = ()": "mean: tuple[float, ...] = (0.1, 0.2, 0.3)",
        "tta: bool = True": "tta: bool = False",
    }
    for old, new in defaults.items():
        assert old in changed
        changed = changed.replace(old, new)
    (tmp_path / "utils.py").write_text(changed)
    shutil.copy(KIT / "infer.py", tmp_path)
    for kit, out in ((KIT, "before"), (tmp_path, "after")):
        succeed("infer.py", "--model", trained, "--data", roads / "testing", "--out", tmp_path / out, kit=kit)
    before, after = (
        {p.name: p.read_bytes() for p in (tmp_path / out / "masks").iterdir()} for out in ("before", "after")
    )
    assert len(before) == 3
    assert before == after


def test_pictures_without_truth_and_of_any_kind(trained, roads, tmp_path):
    """A folder of odd sizes, grey, alpha and JPEG: a mask at each picture's own size, no scores."""
    source = Image.open(next((roads / "testing" / "image_2").iterdir()))
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    source.resize((333, 101)).save(data / "odd.jpg")
    source.resize((100, 300)).convert("L").save(data / "grey.png")
    source.resize((50, 20)).convert("RGBA").save(data / "alpha.png")
    succeed("infer.py", "--model", trained, "--data", data, "--out", out)
    sizes = {path.stem: Image.open(path).size for path in (out / "masks").iterdir()}
    assert sizes == {"odd": (333, 101), "grey": (100, 300), "alpha": (50, 20)}
    assert {path.name for path in (out / "comparisons").iterdir()} == {"odd.jpg", "grey.jpg", "alpha.jpg"}
    assert not (out / "metrics.json").exists()


def test_one_picture_and_a_threshold(trained, roads, tmp_path):
    picture = sorted((roads / "testing" / "image_2").iterdir())[0]
    share = {}
    for threshold in ("0", "0.5", "1"):
        flags = ("--threshold", threshold, "--comparisons", "false")
        succeed("infer.py", "--model", trained / "model.pt", "--data", picture, "--out", tmp_path / threshold, *flags)
        share[threshold] = np.asarray(Image.open(tmp_path / threshold / "masks" / picture.name)).mean() / 255
        assert {path.name for path in (tmp_path / threshold).iterdir()} == {"masks"}
    assert share["0"] == 1
    assert 0.05 < share["0.5"] < 0.5
    assert share["1"] < share["0.5"]


def test_several_models_are_averaged(trained, roads, tmp_path):
    data = roads / "testing"
    other = tmp_path / "other"
    succeed("train.py", "--data", roads, "--out", other, "--epochs", 1, "--arch", "FPN", "--encoder", "mobilenet_v2",
            "--encoder_weights", "none", "--height", 96, "--width", 128)  # fmt: skip
    for name, models in (("a", [trained]), ("b", [other]), ("both", [trained / "model.pt", other])):
        succeed("infer.py", "--model", *models, "--data", data, "--out", tmp_path / name, "--save_probs", "true")
    for path in (tmp_path / "both" / "probs").iterdir():
        a, b, both = (
            np.asarray(Image.open(tmp_path / n / "probs" / path.name)).astype(int) for n in ("a", "b", "both")
        )
        assert np.abs(both - (a + b) / 2).max() <= 1


def test_the_cores_share_a_batch_and_keep_its_order(roads, trained, tmp_path, monkeypatch):
    models = infer.load_models([str(trained)], "cpu")
    samples = utils.find_samples(str(roads / "training"), training=True)
    alone = {row.image: (picture, probability) for row, picture, probability in infer.predict(models, samples)}
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(Path(samples.image[5]).read_bytes()[:5000])
    samples.loc[5, "image"] = str(damaged)
    for cores, batch_size in ((3, 8), (8, 2), (2, 1), (2, 100)):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        bad, threads = [], threading.active_count()
        shared = list(infer.predict(models, samples, batch_size, bad=bad))
        assert [row.image for row, *_ in shared] == [path for path in samples.image if path != str(damaged)]
        for row, picture, probability in shared:
            assert np.array_equal(picture, alone[row.image][0])
            assert np.abs(probability.astype(int) - alone[row.image][1]).max() <= 1
        assert len(bad) == 1
        assert "damaged.png" in bad[0]
        with pytest.raises(utils.UserError, match=r"damaged\.png"):
            list(infer.predict(models, samples, batch_size))
        assert threading.active_count() == threads


def test_memory_that_runs_out_halves_the_batch(roads, trained, capsys):
    class Small(torch.nn.Module):
        """A device that holds `most` pictures."""

        def __init__(self, most):
            super().__init__()
            self.model, self.most = model.model, most

        def forward(self, images):
            if len(images) > self.most:
                raise torch.OutOfMemoryError("made up")
            return self.model(images)

    [model] = infer.load_models([str(trained)], "cpu")
    samples = utils.find_samples(str(roads / "training"), training=True)[:7]
    usual = [probability for *_, probability in infer.predict([model], samples)]
    small = [probability for *_, probability in infer.predict([model._replace(model=Small(3))], samples)]
    for a, b in zip(usual, small, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    assert capsys.readouterr().out.count("memory ran out") == 2  # with 7, then 4
    with pytest.raises(utils.UserError, match="memory holds no picture of 64x192"):
        list(infer.predict([model._replace(model=Small(0))], samples))


def test_all_folds_score_every_pair_by_the_model_that_did_not_see_it(roads, tmp_path):
    flags = ("--data", roads, "--out", tmp_path, "--epochs", 2, "--folds", 2, "--fold", "all", *TINY)
    assert "out of fold" in succeed("train.py", *flags)
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["image"]["all"]["images"] == 24
    assert metrics["image"]["um_road"]["images"] == 8
    models = [utils.load_model(tmp_path / f"fold{fold}" / "model.pt", "cpu") for fold in (0, 1)]
    assert {model.threshold for model in models} == {metrics["threshold"]}
    assert [model.cfg.fold for model in models] == [0, 1]
    data = ("--data", roads / "testing", "--out", tmp_path / "p", "--profile", "true")
    printed = succeed("infer.py", "--model", tmp_path, *data)
    assert "2 model(s)" in printed
    assert "models: " in printed
    before = (tmp_path / "metrics.json").read_bytes()
    assert "finished" in succeed("train.py", *flags)
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_killed_training_goes_on_where_it_was(roads, tmp_path):
    flags = ("--data", roads, "--out", tmp_path, "--epochs", 3, *TINY)
    process = subprocess.Popen([sys.executable, str(KIT / "train.py"), *map(str, flags)], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    until = time.monotonic() + 300
    while not (tmp_path / "last.ckpt").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "last.ckpt").exists()
    utils.load_model(tmp_path / "model.pt", "cpu")
    succeed("train.py", *flags)
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows.epoch.tolist() == [1, 2, 3]
    assert rows.seconds.is_monotonic_increasing
    assert rows.lr.iloc[-1] == pytest.approx(0.01 * Config.lr, rel=0.01)
    assert "finished" in succeed("train.py", *flags)
    assert pd.read_csv(tmp_path / "metrics.csv").equals(rows)
    refused = run("train.py", *flags, "--lr", "0.01")
    assert refused.returncode == 2
    assert "--lr" in refused.stderr
    assert "--resume none" in refused.stderr


def test_max_minutes_fits_the_schedule_to_the_time(roads, tmp_path):
    succeed("train.py", "--data", roads, "--out", tmp_path, "--max_minutes", 0.5, *TINY)
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows.seconds.iloc[-1] <= 30
    assert len(rows) > 1
    assert 0.01 * Config.lr <= rows.lr.iloc[-1] < 0.05 * Config.lr
    assert (tmp_path / "model.pt").exists()
    assert (tmp_path / "metrics.json").exists()


def test_lr_finder_ends_and_says_what_it_chose(roads, tmp_path):
    printed = succeed("train.py", "--data", roads, "--out", tmp_path, "--epochs", 1, "--lr", "auto", *TINY)
    found = re.search(r"--lr auto: chose (\S+) after (\d+) steps", printed)
    assert int(found[2]) < 60
    assert 1e-6 < float(found[1]) < 0.1
    last = pd.read_csv(tmp_path / "metrics.csv").lr.iloc[-1]
    assert last == pytest.approx(0.01 * float(found[1]), rel=0.01)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".ckpt", ".json", ".csv", ".png", ".jpg"}


def encoder_file(folder, name="weights.safetensors", **extra):
    """Random weights of a resnet18 encoder, as smp's Hub stores them."""
    import segmentation_models_pytorch as smp
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(7)
    state = smp.encoders.get_encoder("resnet18", weights=None).state_dict() | extra
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, str(folder / name))
    return folder / name, state


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_encoder_weights_from_a_file(tmp_path, name):
    import torch

    path, state = encoder_file(tmp_path, name, **{"fc.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(3)})
    model = utils.build_model(Config(encoder="resnet18"), str(path))
    assert all(torch.equal(value, state[key]) for key, value in model.encoder.state_dict().items())


def test_imagenet_weights_from_the_hub_cache_without_a_network(roads, tmp_path):
    """The real loading path: smp asks the Hub's library, which finds a cache folder such as one attached on Kaggle."""
    import segmentation_models_pytorch as smp

    settings = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
    cache = tmp_path / "hub" / f"models--{settings['repo_id'].replace('/', '--')}" / "snapshots" / settings["revision"]
    cache.mkdir(parents=True)
    _, state = encoder_file(cache, "model.safetensors")
    (cache / "config.json").write_text(json.dumps({"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}))
    flags = (
        "--data",
        roads,
        "--out",
        tmp_path / "out",
        "--epochs",
        1,
        *TINY,
        "--encoder_weights",
        "imagenet",
        "--lr",
        1e-9,
    )
    succeed("train.py", *flags, env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    trained = utils.load_model(tmp_path / "out" / "model.pt", "cpu")
    assert trained.cfg.mean == (0.4, 0.5, 0.6)
    kept = trained.model.encoder.state_dict()["layer1.0.conv1.weight"]
    assert float((kept - state["layer1.0.conv1.weight"]).abs().max()) < 1e-6


def test_without_weights_nothing_is_done(roads, tmp_path):
    done = run("train.py", "--data", roads, "--out", tmp_path / "out", env={"HF_HUB_CACHE": str(tmp_path / "none")})
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for way in ("internet", "--encoder_weights FILE", "--encoder_weights none"):
        assert way in done.stderr
    assert not (tmp_path / "out").exists()
