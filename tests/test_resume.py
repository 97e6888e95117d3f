"""What a person does next is never answered with an old result: code, data and folders of a run."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KIT, run, succeed
from PIL import Image

import callbacks
import images
import model
import predict
import resume
import train
from train import Config
from utils import UserError

SMALL = (
    "--encoder", "timm-mobilenetv3_small_minimal_100", "--encoder_weights", "none",
    "--height", 32, "--width", 96, "--batch_size", 2, "--grow", "false",
)  # fmt: skip


@pytest.fixture
def kit(tmp_path):
    """A fork: a copy of the kit to edit."""
    folder = tmp_path / "kit"
    folder.mkdir()
    for path in KIT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """8 small images with masks."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for number in range(8):
        mask = np.zeros((48, 64), np.uint8)
        mask[20 + number :, 16:48] = 255
        for folder, pixels in (
            ("images", rng.integers(0, 255, (48, 64, 3), np.uint8)),
            ("masks", mask),
        ):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"p{number}.png")
    return root


# --------------------------------------------------------------------------------------------------
#  A forker's day
# --------------------------------------------------------------------------------------------------


def test_an_edit_is_trained_and_nothing_is_overwritten(kit, pairs, tmp_path):
    """Run again; edit a comment, the loss, a mask; change a setting; add an image."""
    data, out = shutil.copytree(pairs, tmp_path / "data"), tmp_path / "out"
    flags = ("--data", data, "--out", out, "--epochs", 1, *SMALL)
    succeed("train.py", *flags, kit=kit)
    first = (out / "model.pt").read_bytes()
    again = succeed("train.py", *flags, kit=kit)
    assert again.count("NOTHING WAS TRAINED") == 2
    assert again.strip().splitlines()[-1].startswith("NOTHING WAS TRAINED")
    edit(kit / "train.py", "# Progressive resizing: until", "# A comment: until")
    edit(kit / "visualize.py", "BAR_WIDTH = 310", "BAR_WIDTH = 300")
    assert "NOTHING WAS TRAINED" in succeed("train.py", *flags, kit=kit)
    assert not (tmp_path / "out-1").exists()

    edit(kit / "train.py", "return bce + ", "return 2 * bce + ")
    edited = succeed("train.py", *flags, kit=kit)
    assert "STARTING OVER: train.py differs: loss." in edited
    assert f"kept in {tmp_path / 'out-1'}" in edited
    assert "epoch 1 of 1" in edited
    kept = torch.load(tmp_path / "out-1" / "model.pt", weights_only=True)["state_dict"]
    before = tmp_path / "before.pt"
    before.write_bytes(first)
    expected = torch.load(before, weights_only=True)["state_dict"]
    assert all(torch.equal(kept[key], value) for key, value in expected.items())
    assert any((torch_new(out)[key] != value).any() for key, value in expected.items())

    mask = np.asarray(Image.open(data / "masks" / "p3.png")).copy()
    mask[:4] = 255
    Image.fromarray(mask).save(data / "masks" / "p3.png")
    edited = succeed("train.py", *flags, kit=kit)
    assert "STARTING OVER: 1 masks differ: p3." in edited
    assert (tmp_path / "out-2" / "model.pt").exists()

    refused = run("train.py", *flags, "--lr", 1e-3, "--tiles", "true", kit=kit)
    assert refused.returncode == 2
    assert "take --tiles=False --lr=0.0005, choose" in refused.stderr
    as_there = ("--tiles=False", "--lr=0.0005")
    assert "NOTHING WAS TRAINED" in succeed("train.py", *flags, *as_there, kit=kit)
    started = succeed("train.py", *flags, "--lr", 1e-3, kit=kit, env={"KIT_NOTEBOOK": "1"})
    assert "STARTING OVER: settings differ: lr" in started
    for folder in ("images", "masks"):
        shutil.copy(data / folder / "p0.png", data / folder / "new.png")
    added = succeed("train.py", *flags, "--lr", 1e-3, kit=kit)
    assert "1 images were added: new" in added
    assert {path.name for path in tmp_path.glob("out*")} == {
        "out",
        *(f"out-{n}" for n in range(1, 5)),
    }


def torch_new(out):
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


def test_a_file_resumes_although_the_code_differs(kit, pairs, tmp_path):
    flags = ("--data", pairs, "--out", tmp_path / "out", *SMALL)
    succeed("train.py", *flags, "--epochs", 1, kit=kit)
    edit(kit / "train.py", "A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.4)")
    file = tmp_path / "out" / "last.ckpt"
    printed = succeed("train.py", *flags, "--epochs", 2, "--resume", file, kit=kit)
    assert "resumes although train.py differs: augmentation" in printed
    assert pd.read_csv(tmp_path / "out" / "metrics.csv").epoch.tolist() == [1, 2]
    assert "epoch 1 of" not in printed
    elsewhere = ("--data", pairs, "--out", tmp_path / "other", *SMALL, "--epochs", 1)
    succeed("train.py", *elsewhere, kit=kit)
    printed = succeed("train.py", *elsewhere, "--epochs", 3, "--resume", file, kit=kit)
    assert f"kept in {tmp_path / 'other-1'}" in printed
    assert pd.read_csv(tmp_path / "other" / "metrics.csv").epoch.tolist() == [1, 2, 3]
    assert (tmp_path / "other-1" / "model.pt").exists()


def test_folds_of_another_split_are_not_averaged_in(pairs, tmp_path):
    out = tmp_path / "out"
    flags = ("--data", pairs, "--out", out, "--epochs", 1, *SMALL)
    succeed("train.py", *flags, "--fold", "all", "--folds", 3, "--resume", "none")
    printed = succeed("train.py", *flags, "--fold", "all", "--folds", 2, "--resume", "none")
    assert f"kept in {tmp_path / 'out-1'}" in printed
    assert sorted(path.name for path in out.glob("fold*")) == ["fold0", "fold1"]
    single = succeed("train.py", *flags, "--folds", 2)
    assert "STARTING OVER: folds differ" in single
    assert not list(out.glob("fold*"))
    shutil.copytree(tmp_path / "out-1" / "fold2", tmp_path / "out-2" / "fold2")
    mixed = run("infer.py", "--model", tmp_path / "out-2", "--data", pairs, "--out", tmp_path / "p")
    assert mixed.returncode == 2
    assert "models of different splits" in mixed.stderr


def test_a_second_training_into_one_folder_is_refused(pairs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(KIT)!r}); import resume, pathlib, time\n"
            f"resume.lock_folder(pathlib.Path({str(out)!r})); print('held', flush=True)\n"
            "time.sleep(300)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        done = run("train.py", "--data", pairs, "--out", out, "--epochs", 1, *SMALL)
    finally:
        holder.kill()
        holder.wait()
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: --out {out}: another training writes there now; wait for it, "
        "or choose another --out"
    ]
    assert not any(out.iterdir())


# --------------------------------------------------------------------------------------------------
#  The identity of a run
# --------------------------------------------------------------------------------------------------


def test_comments_docstrings_and_layout_are_no_code(tmp_path):
    file = tmp_path / "train.py"
    file.write_text('import a\nX = 1\n\ndef f(x):\n    """One."""\n    return x + 1\n')
    before = resume.code_digests([file])
    assert set(before) == {"train.py: X", "train.py: f"}
    file.write_text(
        'import b\nX = (1)  # why\n\n\ndef f(x):\n    """Two.\n\n    More."""\n    return (\n'
        "        x + 1\n    )\n"
    )
    assert resume.code_digests([file]) == before
    file.write_text("X = 2\n\ndef f(x):\n    return x - 1\n\ndef main():\n    pass\n")
    after = resume.code_digests([file])
    assert set(after) == set(before)
    assert all(after[key] != before[key] for key in before)


def test_the_layouts_own_file_counts(roads):
    import data

    samples = data.scan_dataset(data.find_samples(str(roads), training=True).samples)
    identity = resume.identify({}, samples.assign(fold=0))
    files = {key.split(": ")[0] for key in identity.code}
    names = {
        "train",
        "data",
        "images",
        "model",
        "encoders",
        "callbacks",
        "losses",
        "loaders",
        "trial",
        "kitti",
    }
    assert files == {f"{name}.py" for name in names}
    assert not any("Config" in key and "train" in key for key in identity.code)


def test_differences_are_named():
    settings = dataclasses.asdict(Config())
    before = resume.Identity(settings, {"train.py: loss": "1"}, {"a": [1, 0], "b": [2, 1]})
    now = resume.Identity(
        settings | {"lr": 1.0, "epochs": 9}, {"train.py: f": "2"}, {"a": [9, 0], "c": [3, 1]}
    )
    names, words = resume.differences(now, before)
    assert names == ["lr"], "epochs may differ"
    assert words == [
        "train.py differs: f, loss",
        "1 images were added: c",
        "1 images are gone: b",
        "1 masks differ: a",
    ]
    moved = before._replace(samples={"a": [1, 1], "b": [2, 0]})
    assert resume.differences(moved, before) == ([], ["the folds differ"])
    assert resume.differences(before, before) == ([], [])


def test_folders_are_set_aside_under_the_first_free_name(tmp_path):
    for name in ("out", "out-1"):
        (tmp_path / name).mkdir()
    assert resume.set_aside(tmp_path / "out") == tmp_path / "out-2"
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="choose another --out"):
        resume.set_aside(Path())


# --------------------------------------------------------------------------------------------------
#  Errors reach the person
# --------------------------------------------------------------------------------------------------


def test_a_mistyped_argument_of_an_augmentation_is_an_error(kit, pairs, tmp_path):
    edit(kit / "train.py", "A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(prob=0.5)")
    done = run(
        "train.py", "--data", pairs, "--out", tmp_path / "out", "--epochs", 1, *SMALL, kit=kit
    )
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: augmentation in train.py: ")
    assert "prob" in line


def test_filters_of_warnings_are_as_before():
    before = list(warnings.filters)
    config = Config(height=32, width=32, tiles=False)
    images.strict_augmentation(lambda: train.augmentation(config))
    assert list(warnings.filters) == before


def test_a_gpu_without_kernels_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    with pytest.raises(UserError, match="P100.*GPU T4 x2"):
        model.check_gpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    model.check_gpu()


def test_more_gpus_than_there_are_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert model.resolve_devices(2, "cuda") == 1
    assert "--devices 2: there is only 1" in capsys.readouterr().out
    assert model.resolve_devices(2, "cpu") == 2


def test_shared_memory_that_runs_out_names_the_flag():
    def fit(parts):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is ...")

    with pytest.raises(UserError, match="--workers 0"):
        callbacks.with_gradient_accumulation(fit, 4, "cuda")


def test_more_processes_than_images_is_one_line(pairs, tmp_path):
    flags = ("--data", pairs, "--out", tmp_path / "out", "--epochs", 1, "--devices", 8, *SMALL)
    done = run("train.py", *flags)
    assert done.returncode == 2
    assert "8 processes, but 7 training images" in done.stderr.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------
#  Predictions and submissions
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "out"
    succeed("train.py", "--data", pairs, "--out", out, "--epochs", 1, *SMALL)
    return out


def submit(trained, data, out, *flags, **options):
    return run(
        "infer.py", "--model", trained, "--data", data, "--out", out, "--submission", "rle",
        *flags, **options,
    )  # fmt: skip


def test_a_sample_without_rows_gives_a_header(trained, pairs, tmp_path):
    """As on Kaggle before the hidden images are there; training images are never predicted."""
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / "train")
    (data / "sample_submission.csv").write_text("ImageId,EncodedPixels\n")
    for name in ("missing", "empty"):
        if name == "empty":
            (data / "test").mkdir()
        done = submit(trained, data, tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "no test images" in done.stdout
        assert (tmp_path / name / "submission.csv").read_text() == "ImageId,EncodedPixels\n"
        assert not list((tmp_path / name / "masks").iterdir())
    flags = ("--model", trained, "--data", data, "--out", tmp_path / "png", "--submission", "png")
    assert "no test images" in succeed("infer.py", *flags)
    with zipfile.ZipFile(tmp_path / "png" / "submission.zip") as archive:
        assert archive.namelist() == []


@pytest.mark.parametrize("place", ["test/CITY", "Test", "stage1_test/ID/images", "CITY"])
def test_test_images_are_found_in_any_folder_for_a_submission(trained, pairs, tmp_path, place):
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / place)
    if place != "CITY":
        shutil.copytree(pairs / "images", data / "Train" / "CITY")
    for kind, file in (("rle", "submission.csv"), ("png", "submission.zip")):
        flags = ("--data", data, "--out", tmp_path / kind, "--submission", kind)
        succeed("infer.py", "--model", trained, *flags)
        assert (tmp_path / kind / file).exists()
        assert len(list((tmp_path / kind / "masks").glob("*.png"))) == 8


def test_training_images_are_never_submitted(trained, pairs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / "train_images")
    shutil.copytree(pairs / "images", data / "Test")
    done = submit(trained, data, tmp_path / "out")
    assert done.returncode == 2
    assert "8 training images would be submitted: p0.png" in done.stderr
    assert "name the folder of the test images" in done.stderr
    assert submit(trained, data / "Test", tmp_path / "out").returncode == 0


def test_an_unreadable_image_leaves_no_zip_of_label_maps_behind(trained, pairs, tmp_path):
    shutil.copytree(pairs / "images", tmp_path / "data" / "test")
    (tmp_path / "data" / "test" / "p1.png").write_bytes(b"damaged")
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--submission", "png")
    done = run("infer.py", "--model", trained, *flags)
    assert done.returncode == 2
    assert "1 of 8 could not be used" in done.stderr
    assert not (tmp_path / "out" / "submission.zip").exists()


def test_what_is_missing_or_damaged_does_not_cost_the_submission(trained, pairs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / "test")
    (data / "test" / "p1.png").write_bytes(b"damaged")
    rows = ["ImageId,EncodedPixels", *(f"p{n},1 1" for n in range(7)), "hidden,1 1"]
    (data / "sample_submission.csv").write_text("\n".join(rows) + "\n")
    refused = submit(trained, data, tmp_path / "a")
    assert refused.returncode == 2
    assert "hidden" in refused.stderr
    for flags, env in ((("--on_missing", "empty"), {}), ((), {"KAGGLE_IS_COMPETITION_RERUN": "1"})):
        done = submit(trained, data, tmp_path / "b", *flags, env=env)
        assert done.returncode == 0, done.stderr
        assert "p1.png" in done.stdout
        assert "1 images are not asked for and left out: p7" in done.stdout
        lines = (tmp_path / "b" / "submission.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == [
            *(f"p{n}" for n in range(7)),
            "hidden",
        ]
        assert {"p1,", "hidden,"} <= set(lines)


def test_a_submission_without_a_sample_says_so(trained, pairs, tmp_path):
    done = submit(trained, pairs / "images", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "sample submission: none found" in done.stdout


def test_predictions_are_never_ground_truth(trained, pairs, tmp_path):
    data = shutil.copytree(pairs / "images", tmp_path / "data" / "images").parent
    for out in (data, data / "images"):
        done = run("infer.py", "--model", trained, "--data", data, "--out", out)
        assert done.returncode == 2
        assert "would be read as ground truth" in done.stderr
        assert not list(data.rglob("*.jpg"))
    succeed("infer.py", "--model", trained, "--data", data, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 8
    for own in ("masks", "comparisons"):
        assert images.list_images(tmp_path / "out" / own) == {}
    done = run(
        "train.py", "--data", data, "--masks", tmp_path / "out" / "masks", "--out",
        tmp_path / "trained", "--epochs", 1, *SMALL,
    )  # fmt: skip
    assert done.returncode == 2
    assert "8 of 8 images have no mask" in done.stderr


def test_pictures_of_the_kit_are_never_data(trained, tmp_path):
    """With --out below the data, and with the data below --out."""
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
        mask = np.zeros((48, 64), np.uint8)
        mask[20 + number :] = 255
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.jpg")
        Image.fromarray(mask).save(tmp_path / "data" / f"{number}_mask.png")
    data = ("--data", tmp_path / "data")
    for _ in range(2):
        for out in (tmp_path / "data" / "out", tmp_path):
            assert "6 pairs" in succeed("train.py", *data, "--out", out, "--check", "true")
    succeed("infer.py", "--model", trained, *data, "--out", tmp_path / "data" / "p")
    assert "6 pairs" in succeed("train.py", *data, "--out", tmp_path / "t", "--check", "true")
    (tmp_path / "other" / "images").mkdir(parents=True)
    shutil.copy(tmp_path / "data" / "1.jpg", tmp_path / "other" / "images")
    data = ("--data", tmp_path / "other")
    for _ in range(2):  # masks/ is next to other/
        printed = succeed("infer.py", "--model", trained, *data, "--out", tmp_path)
        assert "1 images, 0 with ground truth" in printed


def test_a_fold_that_the_session_cut_short_is_the_last_one(pairs, tmp_path, monkeypatch, capsys):
    trained = []

    def train_fold(config, model_config, samples, root, clock):
        trained.append(config.fold)
        clock.reserve = 700  # the end takes long: it was cut short although minutes are left
        return []

    monkeypatch.setattr(train, "train_fold", train_fold)
    settings = {"encoder": "resnet18", "encoder_weights": "none", "height": 32, "width": 32}
    config = Config(data=str(pairs), out=str(tmp_path), fold="all", folds=3, **settings)
    train.train(dataclasses.replace(config, session_minutes=10))
    assert trained == [0]
    assert "--session_minutes: over after fold 0" in capsys.readouterr().out
    train.train(config)
    assert trained == [0, 0, 1, 2]


def test_a_finished_run_is_tuned_anew_for_another_metric(pairs, tmp_path):
    flags = ("--data", pairs, "--out", tmp_path / "out", "--epochs", 1, *SMALL)
    succeed("train.py", *flags)
    before = torch_new(tmp_path / "out").items()
    printed = succeed("train.py", *flags, "--metric", "iou", "--min_pixels", 7)
    assert "NOTHING WAS TRAINED" in printed
    assert "minimum component area 7 pixels" in printed
    after = torch_new(tmp_path / "out")
    assert all(torch.equal(value, after[key]) for key, value in before)
    assert not (tmp_path / "out-1").exists()


@pytest.mark.parametrize("first", [0, 1])
def test_all_folds_start_over_with_the_first_one(pairs, first):
    """A manifest may count its folds from 1."""
    collection = train.data.find_samples(str(pairs), training=True)
    samples = train.data.scan_dataset(collection.samples)
    samples["fold"] = [first + number % 3 for number in range(len(samples))]
    collection = collection._replace(samples=samples)
    config = Config(encoder="resnet18", encoder_weights="none", fold="all", resume="none")
    wanted = [train.resolve(config, collection, first + n)[0].resume for n in range(3)]
    assert wanted == ["none", "auto", "auto"]
    one = dataclasses.replace(config, fold=first + 1)
    assert train.resolve(one, collection, first + 1)[0].resume == "none"


def test_memory_that_runs_out_first_keeps_the_run_that_is_resumed(tmp_path):
    """--resume OTHER/last.ckpt, and the first batch does not fit: it is tried again from there."""
    samples = pd.DataFrame()
    clock = callbacks.Clock(3, 0, 0.0)
    run = callbacks.TrainingCallback(tmp_path, tmp_path, clock, {"lr": 1e-3}, samples)
    assert run.restart() is None
    assert clock.started == 0
    run.checkpoint = tmp_path / "other" / "last.ckpt"
    assert run.restart() == run.checkpoint
    assert clock.started > 0
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert run.restart() == tmp_path / "last.ckpt"


def test_the_models_used_are_named(trained, pairs, tmp_path):
    printed = succeed("infer.py", "--model", trained, "--data", pairs, "--out", tmp_path / "out")
    assert re.search(rf"^model: {re.escape(str(trained / 'model.pt'))}$", printed, re.MULTILINE)
    assert os.environ.get("KIT_NOTEBOOK") is None
    assert (
        predict.load_models([str(trained)], "cpu")[0].settings["encoder"]
        == "timm-mobilenetv3_small_minimal_100"
    )
