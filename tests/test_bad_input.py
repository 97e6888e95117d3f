"""Bad input: one line on stderr that names file or flag and remedy, status 2, no half files."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KIT, TINY, build_once, run, succeed
from PIL import Image


def refuse(script, *flags, names=(), out=None):
    """Run a script that must refuse; returns its line. `names`: what the line must contain."""
    done = run(script, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for name in names:
        assert str(name) in lines[0], lines[0]
    if out and Path(out).is_dir():
        assert not [path for path in Path(out).rglob("*") if path.is_file()]
    return lines[0]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """8 small pairs in the images and masks layout."""

    def build(root):
        rng = np.random.default_rng(0)
        mask = np.zeros((48, 64), np.uint8)
        mask[24:, 16:48] = 255
        for number in range(8):
            image = rng.integers(0, 255, (48, 64, 3), np.uint8)
            for folder, pixels in (("images", image), ("masks", mask)):
                (root / folder).mkdir(exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"p{number}.png")

    return build_once(tmp_path_factory, "pairs", build)


@pytest.fixture
def broken(pairs, tmp_path):
    """A copy of the pairs to break."""
    return shutil.copytree(pairs, tmp_path / "data")


@pytest.fixture(scope="session")
def trained_on_pairs(pairs, tmp_path_factory):
    """The --out of a training that ended well."""

    def build(out):
        succeed("train.py", "--data", pairs, "--out", out, *TINY, "--epochs", "1")

    return build_once(tmp_path_factory, "trained_on_pairs", build)


def train_refuses(data, tmp_path, *flags, names=()):
    out = tmp_path / "out"
    every = ("--data", data, "--out", out, *TINY, "--epochs", "1", *flags)
    return refuse("train.py", *every, names=names, out=out)


# --------------------------------------------------------------------------------------------------
#  Flags
# --------------------------------------------------------------------------------------------------

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
    (("--tiles", "maybe"), ["--tiles", "true", "auto"]),
    (("--top", "0.95"), ["--top", "0.9", "auto"]),
    (("--metric", "mcc"), ["--metric", "maxf", "dice", "iou"]),
    (("--mean", "0.5"), ["--mean"]),  # no longer a flag
    (("--epochs",), ["--epochs"]),
    (("pictures",), ["pictures"]),
]


@pytest.mark.parametrize(("flags", "names"), FLAGS, ids=lambda value: " ".join(value))
def test_flags(flags, names, tmp_path):
    out = tmp_path / "out"
    refuse("train.py", "--data", tmp_path, "--out", out, *flags, names=names, out=out)


def test_infer_flags():
    refuse("infer.py", "--modle", "x", names=["--modle", "--model"])
    refuse("infer.py", "--threshold", "1.5", names=["--threshold", "from 0 to 1"])
    refuse("infer.py", "--threshold", "nan", names=["--threshold", "from 0 to 1", "auto"])
    refuse("infer.py", "--min_pixels", "-2", names=["--min_pixels", "from -1", "auto"])
    refuse("infer.py", "--submission", "csv", names=["--submission", "rle", "kitti"])


# --------------------------------------------------------------------------------------------------
#  Data for training
# --------------------------------------------------------------------------------------------------


def test_data_folder(tmp_path, pairs):
    train_refuses(tmp_path / "nowhere", tmp_path, names=[tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    train_refuses(tmp_path / "empty", tmp_path, names=["empty", "gt_image_2"])
    train_refuses(pairs / "images" / "p0.png", tmp_path, names=["p0.png", "folder"])
    train_refuses(pairs, tmp_path, "--masks", "nowhere", names=["--masks nowhere"])
    train_refuses(pairs, tmp_path, "--target", "lane", names=["--target lane", "KITTI"])


def test_a_long_list_names_the_first_five_and_the_count(tmp_path, pairs):
    shutil.copytree(pairs / "images", tmp_path / "unpaired" / "images")
    line = train_refuses(tmp_path / "unpaired", tmp_path, names=["8 of 8"])
    for number in range(8):
        assert (f"p{number}.png" in line) == (number < 5), line


def test_a_long_list_of_damaged_files_is_cut_too(broken, tmp_path):
    for number in range(7):
        (broken / "masks" / f"p{number}.png").write_bytes(b"damaged")
    line = train_refuses(broken, tmp_path, names=["7 of 8"])
    for number in range(8):
        assert (f"p{number}.png" in line) == (number < 5), line


def test_images_without_mask_are_all_listed(broken, tmp_path):
    for number in (2, 5):
        (broken / "masks" / f"p{number}.png").unlink()
    line = train_refuses(broken, tmp_path, names=["p2.png", "p5.png", "6 pairs"])
    assert "p3.png" not in line


def test_damaged_files_are_all_listed(broken, tmp_path):
    whole = (broken / "images" / "p1.png").read_bytes()
    (broken / "images" / "p1.png").write_bytes(whole[: len(whole) // 2])
    (broken / "masks" / "p2.png").write_bytes(b"")
    (broken / "images" / "p3.png").write_text("this is no image")
    Image.new("L", (64, 47)).save(broken / "masks" / "p4.png")
    paths = [Path("images") / "p1.png", Path("masks") / "p2.png"]
    names = ["4 of 8", *paths, "p3.png: not an image", "p4.png: is 64x47"]
    line = train_refuses(broken, tmp_path, names=names)
    assert "p6" not in line


def test_two_images_of_one_name(broken, tmp_path):
    shutil.copy(broken / "images" / "p1.png", broken / "images" / "p1.jpg")
    train_refuses(broken, tmp_path, names=["p1.jpg", "p1.png"])


def test_a_single_pair_is_refused_and_two_are_enough(broken, tmp_path):
    for number in range(2, 8):
        (broken / "images" / f"p{number}.png").unlink()
    succeed("train.py", "--data", broken, "--out", tmp_path / "two", *TINY, "--epochs", "1")
    (broken / "images" / "p1.png").unlink()
    train_refuses(broken, tmp_path, names=["1 pairs", "at least 2"])


@pytest.mark.parametrize(("value", "word"), [(0, "empty"), (255, "full")])
def test_masks_that_are_all_alike_are_refused(broken, tmp_path, value, word):
    for path in (broken / "masks").iterdir():
        Image.new("L", (64, 48), value).save(path)
    train_refuses(broken, tmp_path, names=[f"all 8 masks are {word}", "--masks", "--foreground"])


def test_masks_of_which_some_are_empty_are_allowed(broken, tmp_path):
    for number in range(6):
        Image.new("L", (64, 48)).save(broken / "masks" / f"p{number}.png")
    succeed("train.py", "--data", broken, "--out", tmp_path / "out", *TINY, "--epochs", "1")
    assert (tmp_path / "out" / "model.pt").exists()


# --------------------------------------------------------------------------------------------------
#  Model, weights, --out
# --------------------------------------------------------------------------------------------------


def test_sizes_and_names_of_models(pairs, tmp_path):
    sizes = ["--height 100", "96", "128", "FPN"]
    train_refuses(pairs, tmp_path, "--arch", "FPN", "--height", "100", names=sizes)
    train_refuses(
        pairs, tmp_path, "--arch", "PAN", "--height", "64", "--width", "64", names=["PAN"]
    )
    train_refuses(pairs, tmp_path, "--encoder", "resnet35", names=["resnet35", "resnet34"])
    train_refuses(pairs, tmp_path, "--arch", "Unett", names=["Unett", "Unet"])
    both = ("--arch", "DeepLabV3", "--encoder", "vgg11")
    train_refuses(pairs, tmp_path, *both, names=["DeepLabV3", "vgg11"])
    train_refuses(pairs, tmp_path, "--fold", "900", names=["--fold"])


def test_encoder_weights(pairs, tmp_path, trained_on_pairs):
    missing, text = tmp_path / "w.pth", tmp_path / "text.safetensors"
    text.write_text("no weights")
    train_refuses(pairs, tmp_path, "--encoder_weights", missing, names=[missing])
    train_refuses(pairs, tmp_path, "--encoder_weights", text, names=[text])
    other = ("--encoder_weights", trained_on_pairs / "model.pt", "--encoder", "resnet34")
    train_refuses(pairs, tmp_path, *other, names=["resnet34", "0 of 180 tensors fit"])


def test_out(pairs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refuse("train.py", "--data", pairs, "--out", out, *TINY, names=["--out", out])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_programming_error_keeps_its_traceback(pairs, tmp_path):
    """A mistake in a fork's own loss must not look like a mistake in its flags."""
    kit = shutil.copytree(KIT / "kit", tmp_path / "fork" / "kit").parent
    code = (KIT / "train.py").read_text()
    (head,) = re.findall(r'def loss\(.*?\n    """.*?"""\n', code, re.DOTALL)
    code = code.replace(head, f"{head}    mask = mask[:, :, 0, 9999]\n")
    (kit / "train.py").write_text(code)
    flags = ("--data", pairs, "--out", tmp_path / "out", *TINY, "--epochs", "1")
    done = run("train.py", *flags, kit=kit)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "mask[:, :, 0, 9999]" in done.stderr
    assert "IndexError" in done.stderr.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------
#  infer.py
# --------------------------------------------------------------------------------------------------


def infer_refuses(model, data, tmp_path, names, *flags):
    out = tmp_path / "out"
    refuse("infer.py", "--model", model, "--data", data, "--out", out, *flags, names=names, out=out)


def test_models(trained_on_pairs, pairs, tmp_path):
    whole = (trained_on_pairs / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("no model")
    torch.save({"format": 99}, tmp_path / "future.pt")
    torch.save({"format": 1, "config": {}, "state_dict": {}}, tmp_path / "earlier.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty").mkdir()
    names = ("missing.pt", "cut.pt", "text.pt", "future.pt", "earlier.pt", "list.pt", "empty")
    for name in names:
        infer_refuses(tmp_path / name, pairs / "images", tmp_path, ["--model", name])
    infer_refuses(tmp_path / "earlier.pt", pairs, tmp_path, ["format 3", "train again"])
    checkpoint = trained_on_pairs / "last.ckpt"
    wanted = ["last.ckpt", "Lightning checkpoint", "model.pt"]
    infer_refuses(checkpoint, pairs / "images", tmp_path, wanted)


def test_infer_data(trained_on_pairs, pairs, tmp_path):
    infer_refuses(trained_on_pairs, tmp_path / "nowhere", tmp_path, ["nowhere"])
    (tmp_path / "notes.txt").write_text("x")
    infer_refuses(trained_on_pairs, tmp_path / "notes.txt", tmp_path, ["notes.txt"])
    masks = ("--masks", tmp_path / "nowhere")
    infer_refuses(trained_on_pairs, pairs, tmp_path, ["--masks", "nowhere"], *masks)


def test_infer_never_overwrites_its_own_data(trained_on_pairs, broken):
    before = {path: path.read_bytes() for path in broken.rglob("*.png")}
    flags = ("--model", trained_on_pairs, "--data", broken, "--out", broken)
    refuse("infer.py", *flags, names=["--out", broken, "name another folder"])
    after = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    assert after == before


def test_infer_predicts_the_good_images_and_names_the_bad(trained_on_pairs, broken, tmp_path):
    whole = (broken / "images" / "p1.png").read_bytes()
    (broken / "images" / "p1.png").write_bytes(whole[: len(whole) // 2])
    (broken / "images" / "p3.png").write_bytes(b"")
    flags = ("--data", broken / "images", "--out", tmp_path / "out")
    done = run("infer.py", "--model", trained_on_pairs, *flags)
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "p1.png" in error
    assert "p3.png: empty file" in error
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 6
