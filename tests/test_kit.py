"""The real commands from scenes to scores: what a user gets."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import termios
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from commands import Command
from conftest import ENCODER, KIT, TINY, build_once, run, succeed
from PIL import Image

import train
from kit.cli import parse
from kit.config import IGNORE, Classes, ModelConfig
from kit.data import images, readers
from kit.data import samples as data
from kit.data.folds import assign_folds
from kit.data.names import MARKER
from kit.data.rasters import Layer
from kit.errors import UserError, one_line_errors
from kit.network import model
from kit.results import metrics, predict
from kit.training import callbacks
from train import Config, schedule


def read_json(path):
    return json.loads(path.read_text())


def names(folder):
    """The names in a folder, without that of the file that marks it as written by the kit."""
    return {path.name for path in folder.iterdir()} - {MARKER}


def read_files(folder):
    """{path in the folder: bytes}, without the marker."""
    paths = [path for path in folder.rglob("*.*") if path.name != MARKER]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def validation_samples(folder, masks="auto"):
    """The samples of fold 0."""
    found = data.find_samples(str(folder), masks=masks, training=True)
    samples = data.scan(found.samples, found.classes)
    fold = assign_folds(samples, Config.folds, Config.seed).fold
    return samples[fold == Config.fold]


# --------------------------------------------------------------------------------------------------
#  Training
# --------------------------------------------------------------------------------------------------


def test_training_learns_and_writes_what_it_promises(trained):
    assert read_json(trained / "metrics.json")["image"]["all"]["MaxF"] > 88
    assert names(trained) == {
        "model.pt", "last.ckpt", "config.json", "metrics.csv", "metrics.json", "curves.png",
        "scores.csv", "symmetries.csv", "pr_curve.png", "validation.jpg", "examples.jpg",
        "augmented.jpg", "oof.csv", "oof", "report.html",
    }  # fmt: skip
    rows = pd.read_csv(trained / "metrics.csv")
    assert rows.epoch.tolist() == list(range(1, 17))
    assert rows.train_loss.iloc[-1] < 0.5 * rows.train_loss.iloc[0]
    assert rows.lr.iloc[-1] == pytest.approx(0.01 * 5e-4, rel=0.01), "the schedule's floor"
    assert {"val_loss", "MaxF"} <= set(rows)
    for name in ("curves.png", "pr_curve.png", "validation.jpg"):
        assert np.asarray(Image.open(trained / name)).std() > 20
    assert read_json(trained / "config.json")["encoder"] == ENCODER


def test_it_learns_in_16_bits(roads, tmp_path):
    """bf16, which GPUs and newer CPUs take by themselves; small, since some CPUs emulate it."""
    flags = (*TINY, "--precision", "bf16-mixed", "--epochs", 4)
    printed = succeed("train.py", "--data", roads, "--out", tmp_path, *flags)
    assert "in bf16-mixed" in printed
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows.train_loss.iloc[-1] < 0.9 * rows.train_loss.iloc[0]
    state = torch.load(tmp_path / "model.pt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_output_into_a_file_is_one_line_per_epoch(roads, tmp_path):
    done = run("train.py", "--data", roads, "--out", tmp_path, "--epochs", 3, *TINY)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match("epoch", line, re.IGNORECASE)]
    assert len(lines) == 3
    rows = pd.read_csv(tmp_path / "metrics.csv")
    for line, row in zip(lines, rows.itertuples(), strict=True):
        assert f"epoch {row.epoch} of 3" in line
        assert f"{row.train_loss:.4f}" in line
        assert f"{row.MaxF:.2f}" in line
    before = done.stdout.splitlines().index(lines[0])
    assert done.stdout.splitlines()[before : before + 3] == lines, "nothing in between"
    assert not any("%|" in line or "it/s" in line for line in done.stdout.splitlines())


def test_a_terminal_gets_a_progress_bar(roads, tmp_path):
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    os.set_blocking(ours, False)
    flags = ("--data", roads, "--out", tmp_path, *TINY, "--epochs", 2)
    process = Command(KIT / "train.py", flags, terminal=os.ttyname(terminal))
    ended, printed = False, b""
    while not ended:
        ended = process.poll() is not None
        with contextlib.suppress(BlockingIOError):  # nothing new
            printed += os.read(ours, 1 << 16)
        time.sleep(0.02)
    os.close(terminal)
    os.close(ours)
    process.communicate()
    text = printed.decode()
    assert process.returncode == 0, text
    assert re.search(r"Epoch 1: +100%.*MaxF=", text)
    assert "Validation" not in text, "it has no bar of its own"
    assert "epoch 1 of 2" not in text


def test_model_pt_holds_the_last_epoch_unless_it_went_wrong(tmp_path, monkeypatch):
    """The best score of a few images is luck: a later epoch replaces it, unless it is far worse."""
    saved, scores = [], []
    monkeypatch.setattr(callbacks, "save_model", lambda *_: saved.append(scores[-1]))
    evaluation = SimpleNamespace(report=lambda: {"image": {"all": {"MaxF": scores[-1]}}})
    module = SimpleNamespace(
        evaluation=evaluation, ema=SimpleNamespace(module=None), current_config=ModelConfig
    )
    clock = callbacks.Clock(6, 0, time.monotonic())
    samples = pd.DataFrame(columns=["id", "digest", "fold"])
    callback = callbacks.TrainingCallback(tmp_path, tmp_path, clock, {"lr": 5e-4}, samples)
    for score in (80.0, 92.0, 90.5, 86.9, 40.0, 88.0):
        scores.append(score)
        callback.on_validation_start()
        callback.on_validation_end(SimpleNamespace(is_global_zero=True), module)
    assert saved == [80.0, 92.0, 90.5, 88.0]
    rows = [{"epoch": epoch, "MaxF": score} for epoch, score in enumerate(scores, 1)]
    assert callbacks.exported_epoch(rows) == 6
    assert callbacks.exported_epoch(rows[:5]) == 3


def test_batch_norm_is_reestimated_on_many_images_at_once(roads, tmp_path):
    """Batches of 2 miss how images differ; exported is what all training images together give."""
    flags = ("--augment", 0, "--grow", "false", "--epochs", 2, "--batch_size", 2, "--ema", 0)
    succeed("train.py", "--data", roads, "--out", tmp_path, *TINY[:-2], *flags)
    trained = model.load_model(tmp_path / "model.pt", "cpu")
    samples = data.scan(data.find_samples(str(roads), training=True).samples, Classes())
    samples = samples[assign_folds(samples, Config.folds, Config.seed).fold != Config.fold]
    pixels = [readers.read_image(row.image) for row in samples.itertuples()]
    resized = [images.resize_image(image, trained.config) for image in pixels]
    inputs = torch.stack(list(map(images.to_tensor, resized)))
    inputs = images.normalise(inputs, trained.config)
    alone, together = (
        predict.to_probabilities(network(inputs), trained.config)
        for network in (trained.network, trained.network.train())
    )
    assert (alone - together).abs().mean() < 0.02


@pytest.fixture
def quick_clock(monkeypatch):
    """A clock whose second is a quarter of a second of this process's CPU, however busy that is."""
    monkeypatch.setattr(time, "monotonic", lambda: 4 * time.process_time())


def train_here(*flags):
    """train.py in this process."""
    train.train(parse(Config, "", list(map(str, flags))))


def test_max_minutes_fits_the_schedule_to_the_time(roads, tmp_path, quick_clock):
    train_here("--data", roads, "--out", tmp_path, "--max_minutes", 0.3, *TINY)
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows.seconds.iloc[-1] <= 18
    assert len(rows) > 1
    assert 0.01 * 5e-4 <= rows.lr.iloc[-1] < 0.05 * 5e-4
    assert (tmp_path / "model.pt").exists()
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("seconds", [6.0, 2.0])
def test_the_clock_stops_within_the_first_epoch_with_time_for_the_end(monkeypatch, seconds):
    """Also in fewer than 20 steps: what the end takes is measured from the third step on."""
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    clock = callbacks.Clock(0, 2, now[0])
    run = callbacks.TrainingCallback(Path(), Path(), clock, {"lr": 1, "seed": 0}, pd.DataFrame())
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer = SimpleNamespace(
        accumulate_grad_batches=1, num_training_batches=30, num_val_batches=[4],
        current_epoch=0, strategy=strategy, should_stop=False,
    )  # fmt: skip
    module = SimpleNamespace(set_progress=lambda progress: None, device="cpu")
    index = 0
    while not trainer.should_stop:
        run.on_train_batch_start(trainer, module, {"name": ["a"] * 8}, index)
        now[0] += seconds * (3 if index == 0 else 1)  # the first one is slow
        index += 1
    end = (4 * 3 + 16) * seconds / 3  # three times the validation images, 128 for BatchNorm
    assert now[0] - 100 + end < 120
    assert now[0] - 100 + 2 * end + 6 > 120


def test_session_minutes_end_a_session_in_time_and_the_same_command_resumes(
    roads, tmp_path, capsys, quick_clock
):
    flags = ("--data", roads, "--out", tmp_path, "--epochs", 500, "--session_minutes", 0.25)
    ends = []
    reached = 0
    for session in (1, 2):
        started = time.monotonic()
        train_here(*flags, *TINY)
        assert time.monotonic() - started <= 15
        printed = capsys.readouterr().out
        assert ("resume: from" in printed) == (session == 2)
        assert f"after epoch {reached}" in printed or session == 1
        rows = pd.read_csv(tmp_path / "metrics.csv")
        assert rows.epoch.tolist() == list(range(1, len(rows) + 1))
        assert reached < len(rows) < 500
        reached = len(rows)
        ends.append(reached)
        assert read_json(tmp_path / "metrics.json")["image"]["all"]["images"] == 3
        assert model.load_model(tmp_path / "model.pt", "cpu").config.thresholds[0] > 0
    rates = np.array([5e-4 * schedule((5 * epoch - 1) / (5 * 500 - 1)) for epoch in rows.epoch])
    missing, last = rates - rows.lr, rows.epoch.isin(ends)  # the time ends within an epoch
    assert missing[~last].abs().max() < 1e-9, "of 500 epochs, in both sessions"
    assert missing[last].abs().max() < rates[1] - rates[0], "an epoch"
    assert rows.seconds.is_monotonic_increasing


def test_lr_finder_ends_and_says_what_it_chose(roads, tmp_path):
    flags = ("--epochs", 1, "--lr", "auto", *TINY)
    printed = succeed("train.py", "--data", roads, "--out", tmp_path, *flags)
    chosen = re.search(r"--lr auto: chose (\S+) after (\d+) steps", printed)
    assert int(chosen[2]) < 60
    assert 1e-6 < float(chosen[1]) < 0.1
    last = pd.read_csv(tmp_path / "metrics.csv").lr.iloc[-1]
    assert last == pytest.approx(0.01 * float(chosen[1]), rel=0.01)
    suffixes = {Path(name).suffix for name in names(tmp_path) - {"oof"}}
    assert suffixes == {".pt", ".ckpt", ".json", ".csv", ".png", ".jpg", ".html"}


def test_all_folds_score_every_pair_by_the_model_that_did_not_see_it(roads, tmp_path):
    flags = ("--epochs", 2, "--folds", 2, "--fold", "all", *TINY)
    assert "out of fold" in succeed("train.py", "--data", roads, "--out", tmp_path, *flags)
    report = read_json(tmp_path / "metrics.json")
    assert report["image"]["all"]["images"] == 24
    assert report["image"]["um_road"]["images"] == 8
    models = [model.load_model(tmp_path / f"fold{fold}" / "model.pt", "cpu") for fold in (0, 1)]
    assert {trained.config.thresholds for trained in models} == {(report["threshold"],)}
    assert [trained.settings["fold"] for trained in models] == [0, 1]
    predicting = ("--data", roads / "testing", "--out", tmp_path / "p")
    assert "2 model(s)" in succeed("infer.py", "--model", tmp_path, *predicting)
    before = (tmp_path / "metrics.json").read_bytes()
    assert "finished" in succeed("train.py", "--data", roads, "--out", tmp_path, *flags)
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_a_killed_training_resumes_where_it_was(roads, tmp_path):
    flags = ("--data", roads, "--out", tmp_path, "--epochs", 3, *TINY)
    process = Command(KIT / "train.py", flags)
    until = time.monotonic() + 300
    while not (tmp_path / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate(0)
        time.sleep(0.02)
    process.kill()
    model.load_model(tmp_path / "model.pt", "cpu")
    succeed("train.py", *flags)
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert rows.epoch.tolist() == [1, 2, 3]
    assert rows.seconds.is_monotonic_increasing
    assert rows.lr.iloc[-1] == pytest.approx(0.01 * 5e-4, rel=0.01)
    assert "finished" in succeed("train.py", *flags)
    assert pd.read_csv(tmp_path / "metrics.csv").equals(rows)
    refused = run("train.py", *flags, "--lr", "0.01")
    assert refused.returncode == 2
    assert "--lr" in refused.stderr
    assert "--resume none" in refused.stderr


@pytest.mark.parametrize("training", [True, False])
def test_masks_that_are_nowhere_are_refused(roads, training):
    with pytest.raises(UserError, match="--masks nowhere: "):
        data.find_samples(str(roads), masks="nowhere", training=training)


# --------------------------------------------------------------------------------------------------
#  The model file
# --------------------------------------------------------------------------------------------------


def test_the_model_file_holds_built_in_types_alone(trained):
    content = torch.load(trained / "model.pt", weights_only=True)
    names = {"format", "version", "model", "config", "state_dict", "metrics", "seen"}
    assert set(content) == names
    newest = re.search(r"^## (\S+)$", (KIT / "CHANGELOG.md").read_text(), re.M)
    assert content["version"] == newest[1]
    assert content["format"] == 3
    report = read_json(trained / "metrics.json")
    assert content["metrics"] == {view: report[view] for view in ("image", "bev")}
    assert content["model"]["thresholds"] == (report["threshold"],)


def test_a_model_file_of_format_1_is_refused_in_one_line(trained, roads, tmp_path):
    content = torch.load(trained / "model.pt", weights_only=True)
    old = {"format": 1, "config": content["config"], "state_dict": content["state_dict"]}
    old |= {"threshold": 0.5, "metrics": content["metrics"]}
    torch.save(old, tmp_path / "model.pt")
    flags = ("--model", tmp_path / "model.pt", "--data", roads / "testing")
    done = run("infer.py", *flags, "--out", tmp_path / "out")
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert f"{tmp_path / 'model.pt'}: " in line
    assert "format 3" in line
    assert "train again" in line
    assert not (tmp_path / "out").exists()


def test_new_defaults_change_no_prediction(trained, roads, tmp_path):
    """model.pt holds all that inference needs; defaults may change, train.py may be missing."""
    for path in (KIT / "infer.py", KIT / "train.py", *(KIT / "kit").rglob("*.py")):
        missing = path.name == "train.py" or path.parent.name == "training"
        copy = tmp_path / path.relative_to(KIT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("raise ImportError" if missing else path.read_text())
    changed = (KIT / "kit/config.py").read_text()
    defaults = {
        'encoder: str = "resnet34"': 'encoder: str = "resnet50"',
        'arch: str = "Unet"': 'arch: str = "FPN"',
        "height: int = 256": "height: int = 96",
        "mean: tuple[float, ...] = (0.485, 0.456, 0.406)": "mean: tuple[float, ...] = (0.1, 1, 1)",
        "top: float = 0.0": "top: float = 0.5",
        "tta: bool = True": "tta: bool = False",
        "temperature: float = 3.0": "temperature: float = 1.0",
        "thresholds: tuple[float, ...] = (0.5,)": "thresholds: tuple[float, ...] = (0.9,)",
        "areas: tuple[int, ...] = (0,)": "areas: tuple[int, ...] = (99,)",
    }
    for old, new in defaults.items():
        assert old in changed
        changed = changed.replace(old, new)
    (tmp_path / "kit/config.py").write_text(changed)
    flags = ("--model", trained, "--data", roads / "testing", "--save_probs", "true")
    for kit, out in ((KIT, "before"), (tmp_path, "after")):
        succeed("infer.py", *flags, "--out", tmp_path / out, kit=kit)
    before, after = (read_files(tmp_path / out) for out in ("before", "after"))
    for files in (before, after):
        del files[Path("report.html")]  # says the time and the folder
    assert len(before) == 3 * 3 + 1, "of each image, and probs.json"
    assert before == after


# --------------------------------------------------------------------------------------------------
#  Inference
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def validation_folder(trained, roads, tmp_path_factory):
    """The validation images of `trained` with ground truths, as a KITTI folder of their own."""

    def build(root):
        for folder in ("image_2", "gt_image_2", "calib"):
            (root / folder).mkdir()
        for row in validation_samples(roads).itertuples():
            shutil.copy(row.image, root / "image_2")
            shutil.copy(row.mask.path, root / "gt_image_2")
            shutil.copy(row.views[0].calibration, root / "calib")

    return build_once(tmp_path_factory, "validation", build)


def test_inference_scores_what_training_scored(trained, validation_folder, tmp_path):
    """In a fresh Python, from start to end as a user has it."""
    flags = ("--model", trained, "--data", validation_folder, "--out", tmp_path)
    printed = succeed("infer.py", *flags, fresh=True)
    assert read_json(tmp_path / "metrics.json") == read_json(trained / "metrics.json")
    assert "per second" in printed


def test_scores_are_those_of_the_files(trained, validation_folder, tmp_path):
    """MaxF and IoU again from the written probabilities; masks are these at the threshold."""
    flags = ("--model", trained, "--data", validation_folder, "--out", tmp_path)
    succeed("infer.py", *flags, "--save_probs", "true")
    report = read_json(tmp_path / "metrics.json")
    probability, mask, road, evaluated = [], [], [], []
    for row in data.find_samples(str(validation_folder)).samples.itertuples():
        coded = np.asarray(Image.open(row.mask.path).convert("RGB"))
        name = row.image.name
        probability.append(np.asarray(Image.open(tmp_path / "probs" / name)).ravel())
        mask.append(np.asarray(Image.open(tmp_path / "masks" / name)).ravel())
        road.append((coded[..., 2] > 0).ravel())
        evaluated.append((coded[..., 0] > 0).ravel())
    evaluated = np.concatenate(evaluated)
    probability, mask, road = (
        np.concatenate(parts)[evaluated] for parts in (probability, mask, road)
    )
    assert set(np.unique(mask)) == {0, 255}
    assert ((mask > 0) == (probability / 255 >= report["threshold"])).all()
    cuts = [probability >= level for level in range(256)]
    f1 = [200 * (cut & road).sum() / (cut.sum() + road.sum()) for cut in cuts]
    iou = [100 * (cut & road).sum() / (cut | road).sum() for cut in cuts]
    assert report["image"]["all"]["MaxF"] == pytest.approx(max(f1), abs=1e-3)
    assert report["image"]["all"]["IoU"] == pytest.approx(iou[int(np.argmax(f1))], abs=1e-3)


def test_bev_scores_are_those_of_the_submitted_maps(trained, validation_folder, tmp_path):
    """The zip's maps against warped ground truths give the bev block; less without calibration."""
    folder = tmp_path / "data"
    shutil.copytree(validation_folder, folder)
    flags = ("--model", trained, "--data", folder)
    succeed("infer.py", *flags, "--out", tmp_path / "all", "--submission", "kitti")
    with zipfile.ZipFile(tmp_path / "all" / "submission_kitti.zip") as archive:
        content = {name: io.BytesIO(archive.read(name)) for name in archive.namelist()}
    maps = {name: np.array(Image.open(file)) for name, file in content.items()}
    samples = data.find_samples(str(folder)).samples
    assert set(maps) == {row.mask.path.name for row in samples.itertuples()}

    def check(samples, out):
        evaluation = metrics.Evaluation(Classes())
        for row in samples.itertuples():
            [truth] = row.mask.read(readers.read_header(row.image).size)
            for view in row.views:
                warped = view.warp(truth, IGNORE)
                counts = metrics.pixel_counts(maps[row.mask.path.name], warped)
                for category in ("all", row.category):
                    sums = metrics.Sums(counts[None], np.zeros((3, 1)), 0)
                    evaluation.add_sums("bev", category, sums)
        report = read_json(out / "metrics.json")
        assert report["bev"] == evaluation.report()["bev"]
        assert report["bev"]["all"]["images"] == sum(map(len, samples.views))
        assert report["image"]["all"]["images"] == len(samples)

    check(samples, tmp_path / "all")
    (folder / "calib" / sorted(os.listdir(folder / "calib"))[0]).unlink()
    succeed("infer.py", *flags, "--out", tmp_path / "some", "--bev", "true")
    some = data.find_samples(str(folder)).samples
    assert sum(map(len, some.views)) == len(samples) - 1
    check(some, tmp_path / "some")
    written = {path.stem for path in (tmp_path / "some" / "bev").iterdir()}
    assert written == {row.id for row in some.itertuples() if row.views}


def test_a_kitti_submission_is_whole_or_not_at_all(trained, roads, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(roads / "testing", folder)
    flags = ("--model", trained, "--data", folder, "--comparisons", "false")
    flags = (*flags, "--submission", "kitti")
    for out in ("a", "b"):
        succeed("infer.py", *flags, "--out", tmp_path / out)
    content = [(tmp_path / out / "submission_kitti.zip").read_bytes() for out in ("a", "b")]
    assert content[0] == content[1]
    with zipfile.ZipFile(tmp_path / "a" / "submission_kitti.zip") as archive:
        maps = archive.namelist()
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in maps]
    stems = [path.stem for path in sorted((folder / "image_2").iterdir())]
    assert maps == sorted(stem.replace("_", "_road_", 1) + ".png" for stem in stems)
    assert {(p.shape, p.dtype.name) for p in pixels} == {((800, 400), "uint8")}
    for stem in stems[:2]:
        (folder / "calib" / f"{stem}.txt").unlink()
    refused = run("infer.py", *flags, "--out", tmp_path / "c")
    assert refused.returncode == 2
    assert all(stem in refused.stderr for stem in stems[:2])
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()
    (folder / "calib" / f"{stems[2]}.txt").write_text("P2: nonsense")
    refused = run("infer.py", *flags, "--out", tmp_path / "c")
    assert refused.returncode == 2
    assert f"{stems[2]}.txt" in refused.stderr


def test_a_lane_submission_holds_um_images_alone(roads, tmp_path):
    flags = ("--epochs", 1, "--target", "lane", *TINY)
    succeed("train.py", "--data", roads, "--out", tmp_path, *flags)
    assert set(read_json(tmp_path / "metrics.json")["image"]) == {"all", "um_lane"}
    flags = ("--model", tmp_path, "--data", roads / "training", "--out", tmp_path / "p")
    succeed("infer.py", *flags, "--submission", "kitti", "--comparisons", "false")
    with zipfile.ZipFile(tmp_path / "p" / "submission_kitti.zip") as archive:
        maps = set(archive.namelist())
    masks = (roads / "training" / "gt_image_2").glob("um_lane_*.png")
    assert maps == {path.name for path in masks}


def test_images_of_any_kind_without_ground_truth(trained, roads, tmp_path):
    """Odd sizes, grey, alpha and JPEG: a mask at each image's own size, no scores."""
    source = Image.open(next((roads / "testing" / "image_2").iterdir()))
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    source.resize((333, 101)).save(folder / "odd.jpg")
    source.resize((100, 300)).convert("L").save(folder / "grey.png")
    source.resize((50, 20)).convert("RGBA").save(folder / "alpha.png")
    succeed("infer.py", "--model", trained, "--data", folder, "--out", out)
    sizes = {path.stem: Image.open(path).size for path in (out / "masks").iterdir()}
    assert sizes == {"odd": (333, 101), "grey": (100, 300), "alpha": (50, 20)}
    assert names(out / "comparisons") == {"odd.jpg", "grey.jpg", "alpha.jpg"}
    assert not (out / "metrics.json").exists()


def test_one_image_and_a_threshold(trained, roads, tmp_path):
    image = sorted((roads / "testing" / "image_2").iterdir())[0]
    flags = ("--model", trained / "model.pt", "--data", image, "--comparisons", "false")
    share = {}
    for threshold in ("0", "0.5", "1"):
        out = tmp_path / threshold
        succeed("infer.py", *flags, "--out", out, "--threshold", threshold)
        share[threshold] = np.asarray(Image.open(out / "masks" / image.name)).mean() / 255
        assert names(out) == {"masks"}
    assert share["0"] == 1
    assert 0.05 < share["0.5"] < 0.5
    assert share["1"] < share["0.5"]


def test_several_models_are_averaged(trained, roads, tmp_path):
    other = tmp_path / "other"
    flags = ("--epochs", 1, "--arch", "FPN", "--encoder", "mobilenet_v2", "--height", 96)
    flags = (*flags, "--width", 128, "--encoder_weights", "none")
    succeed("train.py", "--data", roads, "--out", other, *flags)
    flags = ("--data", roads / "testing", "--save_probs", "true")
    for name, models in (("a", [trained]), ("b", [other]), ("both", [trained / "model.pt", other])):
        succeed("infer.py", "--model", *models, *flags, "--out", tmp_path / name)
    for path in (tmp_path / "both" / "probs").iterdir():
        found = [Image.open(tmp_path / name / "probs" / path.name) for name in ("a", "b", "both")]
        a, b, both = (np.asarray(image).astype(int) for image in found)
        assert np.abs(both - (a + b) / 2).max() <= 1


def test_the_cores_share_a_batch_and_keep_its_order(roads, trained, tmp_path, monkeypatch):
    models = predict.load_models([str(trained)], "cpu")
    samples = data.find_samples(str(roads / "training"), training=True).samples[:9]
    alone = {row.id: (image, found) for row, image, found in predict.predict(models, samples)}
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(Path(samples.image[5]).read_bytes()[:5000])
    samples.loc[5, "image"] = damaged
    samples.at[5, "layers"] = (Layer(damaged),)
    for cores, batch_size in ((3, 8), (8, 2), (2, 1), (2, 100)):
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        failed, threads = [], threading.active_count()
        shared = list(predict.predict(models, samples, batch_size, failed=failed))
        expected = [path for path in samples.image if path != damaged]
        assert [row.image for row, *_ in shared] == expected
        for row, image, probability in shared:
            assert np.array_equal(image, alone[row.id][0])
            assert np.abs(probability.astype(int) - alone[row.id][1]).max() <= 1
        [(row, error)] = failed
        assert row.image == damaged
        assert "damaged.png" in str(error)
        with pytest.raises(UserError, match=r"damaged\.png"):
            list(predict.predict(models, samples, batch_size))
        assert threading.active_count() == threads


def test_memory_that_runs_out_halves_the_batch(roads, trained, capsys):
    class Small(torch.nn.Module):
        """A device that holds so many images."""

        def __init__(self, most):
            super().__init__()
            self.network, self.most = loaded.network, most

        def forward(self, inputs):
            if len(inputs) > self.most:
                raise torch.OutOfMemoryError("made up")
            return self.network(inputs)

    [loaded] = predict.load_models([str(trained)], "cpu")
    samples = data.find_samples(str(roads / "training"), training=True).samples[:7]
    predict.print_once.cache_clear()
    plain = [probability for *_, probability in predict.predict([loaded], samples)]
    small = predict.predict([loaded._replace(network=Small(3))], samples)
    for a, (*_, b) in zip(plain, small, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    assert capsys.readouterr().out.count("out of memory") == 2  # with 7, then 4
    with pytest.raises(UserError, match="memory: cannot hold one image of 64x192"):
        list(predict.predict([loaded._replace(network=Small(0))], samples))


# --------------------------------------------------------------------------------------------------
#  Encoder weights
# --------------------------------------------------------------------------------------------------


def encoder_file(folder, name="weights.safetensors", **extra):
    """Random weights of a resnet18 encoder, as smp's Hub stores them."""
    import segmentation_models_pytorch as smp
    from safetensors.torch import save_file

    torch.manual_seed(7)
    state = smp.encoders.get_encoder("resnet18", weights=None).state_dict() | extra
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, str(folder / name))
    return folder / name, state


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_encoder_weights_from_a_file(tmp_path, name):
    extra = {"fc.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(3)}
    path, state = encoder_file(tmp_path, name, **extra)
    network = model.build_network(ModelConfig(encoder="resnet18"), str(path))
    own = network.encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_imagenet_weights_from_the_hub_cache_without_a_network(roads, tmp_path, monkeypatch):
    """smp asks the Hub's library, which finds a cache folder such as one attached on Kaggle."""
    import segmentation_models_pytorch as smp

    settings = smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]
    name = f"models--{settings['repo_id'].replace('/', '--')}"
    cache = tmp_path / "hub" / name / "snapshots" / settings["revision"]
    cache.mkdir(parents=True)
    _, state = encoder_file(cache, "model.safetensors")
    own = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    (cache / "config.json").write_text(json.dumps(own))
    flags = ("--epochs", 1, *TINY, "--encoder", "resnet18", "--encoder_weights", "imagenet")
    flags += ("--lr", 1e-9)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "out"
    train_here("--data", roads, "--out", out, *flags)
    trained = model.load_model(out / "model.pt", "cpu")
    assert trained.config.mean == (0.4, 0.5, 0.6)
    weights = trained.network.encoder.state_dict()["layer1.0.conv1.weight"]
    assert float((weights - state["layer1.0.conv1.weight"]).abs().max()) < 1e-6


def test_without_encoder_weights_nothing_is_done(roads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as end, one_line_errors():
        train_here("--data", roads, "--out", tmp_path / "out")
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1
    for remedy in ("internet", "--encoder_weights FILE", "--encoder_weights none"):
        assert remedy in printed
    assert not (tmp_path / "out").exists()
