"""Bad input: one line on stderr that names the file or flag and the remedy, exit status 2, nothing half-written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run
from PIL import Image


def refuse(script, *flags, names=(), out=None):
    """Run a script that must refuse. `names`: what its one line must contain."""
    done = run(script, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for name in names:
        assert str(name) in lines[0], lines[0]
    if out:
        left = [path for path in Path(out).rglob("*") if path.is_file()] if Path(out).is_dir() else []
        assert not left
    return lines[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """8 small pairs in the images and masks layout."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for number in range(8):
        mask = np.zeros((48, 64), np.uint8)
        mask[24:, 16:48] = 255
        for folder, pixels in (("images", rng.integers(0, 255, (48, 64, 3), np.uint8)), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"p{number}.png")
    return root


@pytest.fixture
def broken(pairs, tmp_path):
    """A copy of the pairs to break."""
    return shutil.copytree(pairs, tmp_path / "data")


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """The --out of a training that ended well."""
    out = tmp_path_factory.mktemp("out")
    done = run("train.py", "--data", pairs, "--out", out, *TINY, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    return out


def train_refuses(data, tmp_path, *flags, names=()):
    return refuse("train.py", "--data", data, "--out", tmp_path / "out", *TINY, "--epochs", "1", *flags, names=names,
                  out=tmp_path / "out")  # fmt: skip


FLAGS = [
    (("--epoch", "3"), ["--epoch", "--epochs"]),
    (("--epochs", "-1"), ["--epochs", "from 0"]),
    (("--epochs", "two"), ["--epochs", "whole number"]),
    (("--lr", "fast"), ["--lr", "auto"]),
    (("--lr", "nan"), ["--lr"]),
    (("--batch_size", "-4"), ["--batch_size"]),
    (("--precision", "8"), ["--precision", "bf16-mixed"]),
    (("--target", "sidewalk"), ["--target", "road", "lane"]),
    (("--tta", "maybe"), ["--tta", "true"]),
    (("--mean", "0.5"), ["--mean", "three"]),
    (("--epochs",), ["--epochs"]),
    (("pictures",), ["pictures"]),
]


@pytest.mark.parametrize(("flags", "names"), FLAGS, ids=lambda value: " ".join(value))
def test_flags(flags, names, tmp_path):
    refuse("train.py", "--data", tmp_path, "--out", tmp_path / "out", *flags, names=names, out=tmp_path / "out")


def test_infer_flags(tmp_path):
    refuse("infer.py", "--modle", "x", names=["--modle", "--model"])
    refuse("infer.py", "--threshold", "1.5", names=["--threshold", "from 0 to 1"])


def test_data_folder(tmp_path, pairs):
    train_refuses(tmp_path / "nowhere", tmp_path, names=[tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    train_refuses(tmp_path / "empty", tmp_path, names=["empty", "gt_image_2"])
    shutil.copytree(pairs / "images", tmp_path / "unpaired" / "images")
    train_refuses(tmp_path / "unpaired", tmp_path, names=["8 of 8", "p0.png", "p7.png"])


def test_pictures_without_mask_are_all_listed(broken, tmp_path):
    for number in (2, 5):
        (broken / "masks" / f"p{number}.png").unlink()
    line = train_refuses(broken, tmp_path, names=["p2.png", "p5.png", "6 pairs"])
    assert "p3.png" not in line


def test_damaged_files_are_all_listed(broken, tmp_path):
    whole = (broken / "images" / "p1.png").read_bytes()
    (broken / "images" / "p1.png").write_bytes(whole[: len(whole) // 2])
    (broken / "masks" / "p2.png").write_bytes(b"")
    (broken / "images" / "p3.png").write_text("this is no picture")
    Image.new("L", (64, 47)).save(broken / "masks" / "p4.png")
    Image.fromarray(np.full((48, 64), 70000, np.int32)).save(broken / "images" / "p5.tif")
    (broken / "images" / "p5.png").unlink()
    names = [Path("images") / "p1.png", Path("masks") / "p2.png", "p3.png: not a picture", "p4.png: is 64x47", "p5.tif"]
    line = train_refuses(broken, tmp_path, names=["5 of 8", *names])
    assert "p6" not in line


def test_two_pictures_of_one_name(broken, tmp_path):
    shutil.copy(broken / "images" / "p1.png", broken / "images" / "p1.jpg")
    train_refuses(broken, tmp_path, names=["p1.jpg", "p1.png"])


def test_a_single_pair_is_refused_and_two_are_enough(broken, tmp_path):
    for number in range(2, 8):
        (broken / "images" / f"p{number}.png").unlink()
    done = run("train.py", "--data", broken, "--out", tmp_path / "two", *TINY, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    (broken / "images" / "p1.png").unlink()
    train_refuses(broken, tmp_path, names=["1 pairs", "at least 2"])


def test_a_truth_without_road_is_allowed(broken, tmp_path):
    for path in (broken / "masks").iterdir():
        Image.new("L", (64, 48)).save(path)
    done = run("train.py", "--data", broken, "--out", tmp_path / "out", *TINY, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.pt").exists()


def test_sizes_and_names_of_models(pairs, tmp_path):
    line = train_refuses(pairs, tmp_path, "--arch", "FPN", "--height", "100", names=["--height 100", "96", "128"])
    assert "FPN" in line
    train_refuses(pairs, tmp_path, "--arch", "PAN", "--height", "64", "--width", "64", names=["PAN"])
    train_refuses(pairs, tmp_path, "--encoder", "resnet35", names=["resnet35", "resnet34"])
    train_refuses(pairs, tmp_path, "--arch", "Unett", names=["Unett", "Unet"])
    train_refuses(pairs, tmp_path, "--arch", "DeepLabV3", "--encoder", "vgg11", names=["DeepLabV3", "vgg11"])
    train_refuses(pairs, tmp_path, "--fold", "900", names=["--fold"])


def test_encoder_weights(pairs, tmp_path, trained):
    missing, text = tmp_path / "w.pth", tmp_path / "text.safetensors"
    text.write_text("no weights")
    train_refuses(pairs, tmp_path, "--encoder_weights", missing, names=[missing])
    train_refuses(pairs, tmp_path, "--encoder_weights", text, names=[text])
    train_refuses(pairs, tmp_path, "--encoder_weights", trained / "model.pt", names=["resnet18"])


def test_out(pairs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refuse("train.py", "--data", pairs, "--out", out, *TINY, names=["--out", out])
    assert (tmp_path / "file").read_text() == "mine"


def infer_refuses(model, data, tmp_path, names):
    refuse("infer.py", "--model", model, "--data", data, "--out", tmp_path / "out", names=names, out=tmp_path / "out")


def test_models(trained, pairs, tmp_path):
    import torch

    whole = (trained / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("no model")
    torch.save({"format": 99}, tmp_path / "future.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty").mkdir()
    for name in ("missing.pt", "cut.pt", "text.pt", "future.pt", "list.pt", "empty"):
        infer_refuses(tmp_path / name, pairs / "images", tmp_path, names=["--model", name])
    infer_refuses(
        trained / "last.ckpt", pairs / "images", tmp_path, names=["last.ckpt", "Lightning checkpoint", "model.pt"]
    )


def test_infer_data(trained, broken, tmp_path):
    infer_refuses(trained, tmp_path / "nowhere", tmp_path, names=["nowhere"])
    (tmp_path / "notes.txt").write_text("x")
    infer_refuses(trained, tmp_path / "notes.txt", tmp_path, names=["notes.txt"])


def test_infer_never_overwrites_its_own_data(trained, broken):
    before = {path: path.read_bytes() for path in broken.rglob("*.png")}
    refuse("infer.py", "--model", trained, "--data", broken, "--out", broken, names=["--out", "overwrite"])
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before


def test_infer_does_the_good_pictures_and_names_the_bad(trained, broken, tmp_path):
    whole = (broken / "images" / "p1.png").read_bytes()
    (broken / "images" / "p1.png").write_bytes(whole[: len(whole) // 2])
    (broken / "images" / "p3.png").write_bytes(b"")
    done = run("infer.py", "--model", trained, "--data", broken / "images", "--out", tmp_path / "out")
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert "p1.png" in error
    assert "p3.png: empty file" in error
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 6
