"""What a person does next is never answered with an old result: code, data and folders of a run."""

import dataclasses
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import albumentations as A
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENCODER, KIT, build_once, run, succeed
from PIL import Image

import infer
import train
from kit.cli import parse
from kit.data import samples
from kit.data.names import list_images
from kit.errors import UserError
from kit.network import model
from kit.results import predict
from kit.training import callbacks, loaders, resolve, resume
from train import Config

SMALL = (
    "--encoder", ENCODER, "--encoder_weights", "none",
    "--height", 32, "--width", 96, "--batch_size", 2, "--grow", "false",
)  # fmt: skip
DEFAULTS = dataclasses.asdict(Config())


@pytest.fixture
def fork(tmp_path):
    """A copy of the kit to edit."""
    folder = tmp_path / "fork"
    shutil.copytree(KIT / "kit", folder / "kit", ignore=shutil.ignore_patterns("__pycache__"))
    for path in KIT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """8 small images with masks."""

    def build(root):
        rng = np.random.default_rng(0)
        for number in range(8):
            mask = np.zeros((48, 64), np.uint8)
            mask[20 + number :, 16:48] = 255
            image = rng.integers(0, 255, (48, 64, 3), np.uint8)
            for folder, pixels in (("images", image), ("masks", mask)):
                (root / folder).mkdir(exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"p{number}.png")

    return build_once(tmp_path_factory, "pairs_of_a_run", build)


@pytest.fixture(scope="session")
def trained(pairs, tmp_path_factory):
    """The --out of a run of one epoch."""

    def build(out):
        succeed("train.py", "--data", pairs, "--out", out, "--epochs", 1, *SMALL)

    return build_once(tmp_path_factory, "a_run", build)


def configure(data, *flags):
    """The settings of a command, one epoch with SMALL unless the flags say otherwise."""
    words = ("--data", data, "--epochs", 1, *SMALL, *flags)
    return parse(Config, "", [str(word) for word in words])


def load(config):
    """The samples of a command."""
    return samples.load(config.data, **{name: getattr(config, name) for name in samples.LOADED})[0]


def identify(data, *flags):
    """The identity of the run that a command makes."""
    config = configure(data, *flags)
    collection = load(config)
    resolved, _ = resolve.resolve(config, collection, config.fold, train.RESOLUTIONS)
    return resume.identify(dataclasses.asdict(resolved), collection.samples)


def decide(now, out, choice="auto"):
    """What --resume means for a run in a folder."""
    return resume.decide(now, str(choice), out, out, DEFAULTS)


# --------------------------------------------------------------------------------------------------
#  A forker's day: what `resume.decide` says to the checkpoint of one run
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def same(pairs):
    """The identity of the same command again."""
    return identify(pairs)


def test_the_same_command_goes_on_with_its_run(same, trained):
    """Settings, code and samples have the same digests in another process."""
    assert decide(same, trained) == (
        trained / "last.ckpt",
        resume.read_state(trained / "last.ckpt"),
        [],
    )
    assert decide(same, trained, "none") == (None, {}, ["--resume none"])


def test_other_code_starts_over_and_a_file_resumes_although(same, trained, fork, capsys):
    edit(fork / "train.py", "A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.4)")
    now = same._replace(code=resume.code_digests(fork))
    assert decide(now, trained) == (None, {}, ["train.py differs: augmentation"])
    assert not capsys.readouterr().out
    decision = decide(now, trained, trained / "last.ckpt")
    assert (decision.checkpoint, decision.reasons) == (trained / "last.ckpt", [])
    assert "resumes although train.py differs: augmentation" in capsys.readouterr().out


def test_other_data_starts_over(pairs, trained, tmp_path):
    data = shutil.copytree(pairs, tmp_path / "data")
    assert decide(identify(data), trained).checkpoint, "a copy"
    mask = np.asarray(Image.open(data / "masks" / "p3.png")).copy()
    mask[:4] = 255
    Image.fromarray(mask).save(data / "masks" / "p3.png")
    assert decide(identify(data), trained) == (None, {}, ["1 masks differ: p3"])
    shutil.copy(pairs / "masks" / "p3.png", data / "masks")
    for folder in ("images", "masks"):
        shutil.copy(data / folder / "p0.png", data / folder / "new.png")
    assert decide(identify(data), trained) == (None, {}, ["1 images were added: new"])


def test_other_settings_are_refused_with_those_of_the_run(pairs, trained, monkeypatch):
    now = identify(pairs, "--lr", 1e-3, "--tiles", "true")
    for choice in ("auto", trained / "last.ckpt"):
        with pytest.raises(UserError, match="take --tiles=False --lr=0.0005, choose") as refused:
            decide(now, trained, choice)
        assert "\n" not in str(refused.value)
    as_there = identify(pairs, "--lr", 1e-3, "--tiles", "true", "--tiles=False", "--lr=0.0005")
    assert decide(as_there, trained).checkpoint
    monkeypatch.setenv("KIT_NOTEBOOK", "1")
    reasons = decide(identify(pairs, "--lr", 1e-3), trained).reasons
    assert reasons == ["settings differ: lr"]
    with pytest.raises(UserError, match="--lr"):
        decide(now, trained, trained / "last.ckpt")


# --------------------------------------------------------------------------------------------------
#  A forker's day: whole runs
# --------------------------------------------------------------------------------------------------


def test_an_edit_is_trained_and_nothing_is_overwritten(fork, pairs, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    flags = ("--data", pairs, "--out", out, "--epochs", 1, *SMALL)
    edit(fork / "train.py", "# Progressive resizing: until", "# A comment: until")
    edit(fork / "kit" / "results" / "visualize.py", "BAR_WIDTH = 310", "BAR_WIDTH = 300")
    again = succeed("train.py", *flags, kit=fork)
    assert again.count("NOTHING WAS TRAINED") == 2
    assert again.strip().splitlines()[-1].startswith("NOTHING WAS TRAINED")
    assert not (tmp_path / "out-1").exists()

    edit(fork / "train.py", "dice = 1 - (2 * hits", "dice = 1 - (3 * hits")
    edited = succeed("train.py", *flags, kit=fork)
    assert "STARTING OVER: train.py differs: loss." in edited
    assert f"kept in {tmp_path / 'out-1'}" in edited
    assert "epoch 1 of 1" in edited
    first, kept, new = map(weights, (trained, tmp_path / "out-1", out))
    assert all(torch.equal(kept[key], value) for key, value in first.items())
    assert any((new[key] != value).any() for key, value in first.items())
    assert {path.name for path in tmp_path.glob("out*")} == {"out", "out-1"}


def weights(out):
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


def test_a_file_resumes_in_another_folder_although_the_code_differs(fork, pairs, trained, tmp_path):
    edit(fork / "train.py", "A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.4)")
    file, other = trained / "last.ckpt", shutil.copytree(trained, tmp_path / "other")
    flags = ("--data", pairs, "--out", other, *SMALL, "--epochs", 3, "--resume", file)
    printed = succeed("train.py", *flags, kit=fork)
    assert "resumes although train.py differs: augmentation" in printed
    assert f"kept in {tmp_path / 'other-1'}" in printed
    assert "epoch 1 of" not in printed
    assert pd.read_csv(other / "metrics.csv").epoch.tolist() == [1, 2, 3]
    assert (tmp_path / "other-1" / "model.pt").exists()


def test_folds_of_another_split_are_not_averaged_in(pairs, trained, tmp_path, capsys):
    out = tmp_path / "out"
    for fold in range(3):
        shutil.copytree(trained, out / f"fold{fold}")
    flags = ("--data", pairs, "--out", out, "--epochs", 1, *SMALL, "--folds", 2)
    printed = succeed("train.py", *flags, "--fold", "all", "--resume", "none")
    assert f"kept in {tmp_path / 'out-1'}" in printed
    assert sorted(path.name for path in out.glob("fold*")) == ["fold0", "fold1"]
    clock, single = callbacks.Clock(1, 0, 0.0), identify(pairs, "--folds", 2)
    callback = callbacks.TrainingCallback(out, out, clock, single.settings, None)
    callback.identity = single
    callback.find_checkpoint("auto", DEFAULTS)
    callback.prepare_out()
    assert "STARTING OVER: folds differ" in capsys.readouterr().out
    assert not list(out.glob("fold*"))
    shutil.copytree(tmp_path / "out-1" / "fold2", tmp_path / "out-2" / "fold2")
    with pytest.raises(UserError, match="models of different splits"):
        predict.load_models([str(tmp_path / "out-2")], "cpu")


def test_a_second_training_into_one_folder_is_refused(pairs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    resume.lock_folder(out)
    try:
        done = run("train.py", "--data", pairs, "--out", out, "--epochs", 1, *SMALL)
    finally:
        os.close(resume.LOCKS.pop(out.stat().st_ino))
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
    file.write_text('import a\nX = 1\n\ndef make_loaders(x):\n    """One."""\n    return x + X\n')
    before = resume.code_digests(tmp_path)
    assert set(before) == {"train.py: X", "train.py: make_loaders"}
    file.write_text(
        "import b\nX = (1)  # why\n\n\ndef make_loaders(x: int) -> int:\n"
        '    """Two.\n\n    More."""\n    return (\n        x + X\n    )\n'
    )
    assert resume.code_digests(tmp_path) == before
    file.write_text("X = 2\n\ndef make_loaders(x):\n    return x - X\n\ndef main():\n    pass\n")
    after = resume.code_digests(tmp_path)
    assert set(after) == set(before)
    assert all(after[key] != before[key] for key in before)


def test_all_that_weights_follow_from_is_there():
    """A definition that is renamed or moved must not drop out of the identity unseen."""
    assert set(resume.WEIGHTS_FOLLOW_FROM) <= set(resume.code_digests(KIT))


def test_code_is_what_a_training_step_reaches(same):
    """Reading masks is no part of it: their digests show what it gives."""
    names = {"train", "kit/config", "kit/files", "kit/data/images", "kit/data/samples"}
    readers = ("readers", "photos", "slides", "tiffs", "arrays", "rasters")
    names |= {f"kit/data/{name}" for name in ("cache", "blocks", *readers)}
    names |= {f"kit/network/{name}" for name in ("model", "encoders")}
    names |= {f"kit/training/{name}" for name in ("callbacks", "loaders", "losses", "resolve")}
    assert {key.split(": ")[0] for key in same.code} == {f"{name}.py" for name in names}
    assert not any("Config" in key for key in same.code)


WORDS = [  # printed lines, messages of errors, docstrings, pictures, scores
    ("kit/data/readers.py", 'print(f"images: {', 'print(f"pictures: {'),
    ("train.py", 'print(f"--session_minutes: over', 'print(f"--session_minutes: done'),
    ("kit/training/callbacks.py", "the weights so far are kept: try", "take"),
    ("kit/network/encoders.py", '"no such file"', '"is not there"'),
    ("kit/network/encoders.py", "(much weaker)", "(weaker)"),
    ("kit/errors.py", 'f"; {self.remedy}"', 'f". {self.remedy}"'),
    ("train.py", '"""BCE (of exclusive', '"""CE (of exclusive'),
    ("kit/training/callbacks.py", '"validation loss"', '"loss of validation"'),
    ("kit/results/visualize.py", "BAR_WIDTH = 310", "BAR_WIDTH = 300"),
    ("kit/results/visualize.py", "def stack(", "def stacked("),
    ("train.py", 'self.log("val_loss", value', 'self.log("val_loss", 2 * value'),
    ("train.py", "    seed: int = 0", "    pos_weight: float = 1.0\n    seed: int = 1"),
]


def test_an_edit_of_what_is_said_or_shown_is_no_edit_of_the_code(same, fork):
    for file, old, new in WORDS:
        edit(fork / file, old, new)
    assert resume.code_digests(fork) == same.code


STEPS = {
    "train.py: loss": ("dice = 1 - (2 * hits", "dice = 1 - (3 * hits"),
    "kit/training/losses.py: focal": ("torch.exp(-entropy)) ** 2", "torch.exp(-entropy)) ** 3"),
    "kit/training/loaders.py: Plan": ("self.positives + (natural", "self.positives + 2 * (natural"),
    "train.py: augmentation": ("A.HorizontalFlip(p=0.5)", "A.HorizontalFlip(p=0.4)"),
    "train.py: schedule": ("0.1 + progress / 0.05", "0.1 + progress / 0.06"),
    "kit/training/resolve.py: class_weights": ("(share, 1e-3)", "(share, 1e-2)"),
    "kit/data/images.py: resize_image": ("cv2.INTER_AREA if smaller", "cv2.INTER_CUBIC if smaller"),
    "kit/network/encoders.py: STATISTICS": ('"inception": HALF', '"inception": IMAGENET'),
    "kit/network/model.py: reestimate_batch_norm": ("norm.momentum = None", "norm.momentum = 0.1"),
    "kit/training/callbacks.py: TrainingCallback.on_train_batch_start": (
        "torch.manual_seed(seed)", "torch.manual_seed(seed + 1)",
    ),
}  # fmt: skip


def test_an_edit_of_what_a_training_step_does_is_one_of_the_code(same, fork):
    for key, (old, new) in STEPS.items():
        edit(fork / key.split(": ")[0], old, new)
    edited = resume.code_digests(fork)
    assert {key for key in edited if edited[key] != same.code.get(key)} == set(STEPS)
    assert edited.keys() == same.code.keys()


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


def test_a_mistyped_argument_of_an_augmentation_is_an_error(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "augmentation", lambda _: A.Compose([A.HorizontalFlip(prob=0.5)]))
    with pytest.raises(UserError, match="^augmentation in train.py: .*prob") as refused:
        train.train(configure(pairs, "--out", tmp_path / "out"))
    assert "\n" not in str(refused.value)


def test_filters_of_warnings_are_as_before():
    before = list(warnings.filters)
    with loaders.strictly():
        train.augmentation(Config(height=32, width=32, tiles=False))
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
    assert resolve.resolve_devices(2, "cuda") == 1
    assert "--devices 2: there is only 1" in capsys.readouterr().out
    assert resolve.resolve_devices(2, "cpu") == 2


def test_shared_memory_that_runs_out_names_the_flag():
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is ...")
    with pytest.raises(UserError, match="--workers 0"), callbacks.clear_loader_errors():
        raise error
    with pytest.raises(RuntimeError, match="other"), callbacks.clear_loader_errors():
        raise RuntimeError("other")


def test_more_processes_than_images_is_one_line(pairs):
    with pytest.raises(UserError, match="8 processes, but 7 training images") as refused:
        identify(pairs, "--devices", 8)
    assert "\n" not in str(refused.value)


# --------------------------------------------------------------------------------------------------
#  Predictions and submissions
# --------------------------------------------------------------------------------------------------


def predict_with(trained, data, out, **options):
    """Infer as the command does."""
    return infer.infer(infer.Options([str(trained)], data=str(data), out=str(out), **options))


def submit(trained, data, out, **options):
    return predict_with(trained, data, out, submission="rle", **options)


def test_a_sample_without_rows_gives_a_header(trained, pairs, tmp_path, capsys):
    """As on Kaggle before the hidden images are there; training images are never predicted."""
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / "train")
    (data / "sample_submission.csv").write_text("ImageId,EncodedPixels\n")
    for name in ("missing", "empty"):
        if name == "empty":
            (data / "test").mkdir()
        submit(trained, data, tmp_path / name)
        assert "no test images" in capsys.readouterr().out
        assert (tmp_path / name / "submission.csv").read_text() == "ImageId,EncodedPixels\n"
        assert not list((tmp_path / name / "masks").iterdir())
    predict_with(trained, data, tmp_path / "png", submission="png")
    assert "no test images" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "png" / "submission.zip") as archive:
        assert archive.namelist() == []


@pytest.mark.parametrize("place", ["test/CITY", "Test", "stage1_test/ID/images", "CITY"])
def test_test_images_are_found_in_any_folder_for_a_submission(trained, pairs, tmp_path, place):
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / place)
    if place != "CITY":
        shutil.copytree(pairs / "images", data / "Train" / "CITY")
    for kind, file in (("rle", "submission.csv"), ("png", "submission.zip")):
        predict_with(trained, data, tmp_path / kind, submission=kind)
        assert (tmp_path / kind / file).exists()
        assert len(list((tmp_path / kind / "masks").glob("*.png"))) == 8


def test_training_images_are_never_submitted(trained, pairs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / "train_images")
    shutil.copytree(pairs / "images", data / "Test")
    words = "8 training images would be submitted: p0.png.*name the folder of the test images"
    with pytest.raises(UserError, match=words):
        submit(trained, data, tmp_path / "out")
    assert submit(trained, data / "Test", tmp_path / "out")


def test_an_unreadable_image_leaves_no_zip_of_label_maps_behind(trained, pairs, tmp_path):
    shutil.copytree(pairs / "images", tmp_path / "data" / "test")
    (tmp_path / "data" / "test" / "p1.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="1 of 8 could not be used"):
        predict_with(trained, tmp_path / "data", tmp_path / "out", submission="png")
    assert not (tmp_path / "out" / "submission.zip").exists()


def test_what_is_missing_or_damaged_does_not_cost_the_submission(
    trained, pairs, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "data"
    shutil.copytree(pairs / "images", data / "test")
    (data / "test" / "p1.png").write_bytes(b"damaged")
    rows = ["ImageId,EncodedPixels", *(f"p{n},1 1" for n in range(7)), "hidden,1 1"]
    (data / "sample_submission.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match="hidden"):
        submit(trained, data, tmp_path / "a")
    for options, rerun in (({"on_missing": "empty"}, ""), ({}, "1")):
        monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", rerun)
        capsys.readouterr()
        submit(trained, data, tmp_path / "b", **options)
        printed = capsys.readouterr().out
        assert "p1.png" in printed
        assert "1 images are not asked for and left out: p7" in printed
        lines = (tmp_path / "b" / "submission.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == [
            *(f"p{n}" for n in range(7)),
            "hidden",
        ]
        assert {"p1,", "hidden,"} <= set(lines)


def test_a_submission_without_a_sample_says_so(trained, pairs, tmp_path, capsys):
    submit(trained, pairs / "images", tmp_path / "out")
    assert "sample submission: none found" in capsys.readouterr().out


def test_predictions_are_never_ground_truth(trained, pairs, tmp_path):
    data = shutil.copytree(pairs / "images", tmp_path / "data" / "images").parent
    for out in (data, data / "images"):
        with pytest.raises(UserError, match="would be read as ground truth"):
            predict_with(trained, data, out)
        assert not list(data.rglob("*.jpg"))
    predict_with(trained, data, tmp_path / "out")
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 8
    for folder in ("masks", "comparisons"):
        assert list_images(tmp_path / "out" / folder) == {}
    with pytest.raises(UserError, match="8 of 8 images have no mask"):
        load(configure(data, "--masks", tmp_path / "out" / "masks"))


def test_pictures_of_the_kit_are_never_data(trained, tmp_path, capsys):
    """With --out below the data, and with the data below --out."""
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
        mask = np.zeros((48, 64), np.uint8)
        mask[20 + number :] = 255
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.jpg")
        Image.fromarray(mask).save(tmp_path / "data" / f"{number}_mask.png")
    data = tmp_path / "data"

    def check(out):
        train.train(configure(data, "--out", out, "--check", "true"))
        return capsys.readouterr().out

    for _ in range(2):
        for out in (data / "out", tmp_path):
            assert "6 pairs" in check(out)
    predict_with(trained, data, data / "p")
    assert "6 pairs" in check(tmp_path / "t")
    (tmp_path / "other" / "images").mkdir(parents=True)
    shutil.copy(data / "1.jpg", tmp_path / "other" / "images")
    for _ in range(2):  # masks/ is next to other/
        predict_with(trained, tmp_path / "other", tmp_path)
        assert "1 images, 0 with ground truth" in capsys.readouterr().out


def test_a_fold_that_the_session_cut_short_is_the_last_one(pairs, tmp_path, monkeypatch, capsys):
    trained = []

    def train_fold(config, model_config, run, opener):
        trained.append(config.fold)
        run.clock.reserve = 700  # the end takes long: it was cut short although minutes are left
        return []

    monkeypatch.setattr(train, "train_fold", train_fold)
    config = configure(pairs, "--out", tmp_path, "--fold", "all", "--folds", 3)
    train.train(dataclasses.replace(config, session_minutes=10))
    assert trained == [0]
    assert "--session_minutes: over after fold 0" in capsys.readouterr().out
    train.train(config)
    assert trained == [0, 0, 1, 2]


def test_a_finished_run_is_tuned_anew_for_another_metric(pairs, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    flags = ("--data", pairs, "--out", out, "--epochs", 1, *SMALL)
    printed = succeed("train.py", *flags, "--metric", "iou", "--min_pixels", 7)
    assert "NOTHING WAS TRAINED" in printed
    assert "minimum component area 7 pixels" in printed
    after = weights(out)
    assert all(torch.equal(value, after[key]) for key, value in weights(trained).items())
    assert not (tmp_path / "out-1").exists()


@pytest.mark.parametrize("first", [0, 1])
def test_all_folds_start_over_with_the_first_one(pairs, first):
    """A manifest may count its folds from 1."""
    config = configure(pairs, "--fold", "all", "--resume", "none")
    collection = load(config)
    table = collection.samples.assign(fold=[first + number % 3 for number in range(8)])
    collection = collection._replace(samples=table)

    def wanted(config, fold):
        return resolve.resolve(config, collection, fold, train.RESOLUTIONS)[0].resume

    assert [wanted(config, first + n) for n in range(3)] == ["none", "auto", "auto"]
    assert wanted(dataclasses.replace(config, fold=first + 1), first + 1) == "none"


def test_memory_that_runs_out_first_keeps_the_run_that_is_resumed(tmp_path):
    """--resume OTHER/last.ckpt, and the first batch does not fit: it is tried again from there."""
    clock = callbacks.Clock(3, 0, 0.0)
    run = callbacks.TrainingCallback(tmp_path, tmp_path, clock, {"lr": 1e-3}, pd.DataFrame())
    assert run.restart() is None
    assert clock.started == 0
    run.checkpoint = tmp_path / "other" / "last.ckpt"
    assert run.restart() == run.checkpoint
    assert clock.started > 0
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert run.restart() == tmp_path / "last.ckpt"


def test_the_models_used_are_named(trained, pairs, tmp_path, capsys):
    predict_with(trained, pairs, tmp_path / "out")
    line = rf"^model: {re.escape(str(trained / 'model.pt'))}$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)
    assert os.environ.get("KIT_NOTEBOOK") is None
    assert predict.load_models([str(trained)], "cpu")[0].settings["encoder"] == ENCODER
