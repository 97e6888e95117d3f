"""Many images: how far reading is, decoded pairs on disk, and what is seen of them."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from commands import Command
from conftest import KIT, TINY, run, succeed
from PIL import Image

import train
from kit.config import ModelConfig
from kit.data import cache, images, readers, samples
from kit.errors import UserError

GIGABYTE = 1e9


def folder_of(root, count=12, size=(40, 60)):
    """16-bit grey images with a lighter ellipse, and masks of it."""
    y, x = np.mgrid[: size[0], : size[1]]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        mask = ((y - 20) / 9) ** 2 + ((x - 20 - 2 * number) / 12) ** 2 < 1
        values = np.random.default_rng(number).integers(3000, 4000, size, np.uint16)
        values += (500 * mask).astype(np.uint16)
        Image.fromarray(values).save(root / "images" / f"p{number}.png")
        Image.fromarray(255 * mask.astype(np.uint8)).save(root / "masks" / f"p{number}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("many") / "data")


@pytest.fixture(autouse=True)
def files():
    """No test leaves a file of pairs."""
    yield
    cache.remove_files()


def train_on(data, out, *flags):
    return ("train.py", "--data", data, "--out", out, "--epochs", 2, *TINY, *flags)


def weights_of(out):
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


# --------------------------------------------------------------------------------------------------
#  How far it is
# --------------------------------------------------------------------------------------------------


def test_reading_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(readers, "SAY_SECONDS", 0)
    assert readers.in_parallel(lambda n: n * n, range(5), "scan") == [0, 1, 4, 9, 16]
    assert capsys.readouterr().out.splitlines()[-1] == "scan: 5 of 5 images"
    monkeypatch.setattr(readers, "SAY_SECONDS", 60)
    readers.in_parallel(str, range(5), "scan")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(readers, "SAY_SECONDS", 0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    readers.in_parallel(str, range(5), "scan")
    printed = capsys.readouterr()
    assert "scan:" in printed.err
    assert not printed.out


# --------------------------------------------------------------------------------------------------
#  Pairs on disk
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_a_pair_comes_back_from_disk(tmp_path, kind, shape):
    rng, store = np.random.default_rng(0), cache.choose_store(str(tmp_path), 100, fits=True)
    pairs = [
        (rng.integers(0, 255, (5, 7, 3)).astype(kind), rng.integers(0, 2, shape).astype(np.uint8))
        for _ in range(3)
    ]
    stored = [store(pair) for pair in pairs]
    for pair, kept in zip(pairs, stored, strict=True):
        for before, after in zip(pair, kept, strict=True):
            assert after.dtype == before.dtype
            assert np.array_equal(after, before)
            after[:] = 0  # an augmentation in place must not reach the file
        assert all(map(np.array_equal, pair, kept))


def test_where_pairs_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "TEMPORARY", tmp_path / "kaggle" / "temp")
    assert cache.choose_store("none", GIGABYTE, fits=False) is None
    assert cache.choose_store("auto", GIGABYTE, fits=False) is None  # not on Kaggle
    (tmp_path / "kaggle").mkdir()
    assert cache.choose_store("auto", GIGABYTE, fits=True) is None
    assert not capsys.readouterr().out
    assert cache.choose_store("auto", GIGABYTE, fits=False)
    assert capsys.readouterr().out == f"cache: 1.0 GB in {cache.TEMPORARY}\n"
    assert cache.choose_store("auto", 1e18, fits=False) is None  # larger than the disk
    assert "cache: none, --cache" in capsys.readouterr().out
    with pytest.raises(UserError, match="the decoded images take 1000000000.0 GB"):
        cache.choose_store(str(tmp_path), 1e18, fits=False)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"):
            cache.choose_store(str(folder), GIGABYTE, fits=True)


def test_a_full_disk_ends_in_one_line(tmp_path):
    store = cache.choose_store(str(tmp_path), 10, fits=True)
    cache.FILES[0].file = Path("/dev/full").open("wb")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot be written .No space left on device.; name anoth"):
        store((np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)))


def test_training_from_disk_is_training_from_files(data, tmp_path):
    succeed(*train_on(data, tmp_path / "files"))
    for flags in ((), ("--workers", 2)):
        out = tmp_path / f"disk{len(flags)}"
        printed = succeed(*train_on(data, out, "--cache", tmp_path / "cache", *flags))
        assert f"cache: 0.0 GB in {tmp_path / 'cache'}" in printed
        ours, theirs = weights_of(out), weights_of(tmp_path / "files")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert not list((tmp_path / "cache").iterdir())


def test_tiles_are_cut_from_disk(data, tmp_path, monkeypatch):
    table = samples.scan(samples.find_samples(str(data), training=True).samples, train.Config())
    config = ModelConfig(height=16, width=16, tiles=True, value_range=(3000, 4500))
    items = {}
    for where in ("none", str(tmp_path)):
        pairs = samples.decode_pairs(table, config, 1 << 30, cache=where)
        augment = train.augmentation(train.Config(height=16, width=16, tiles=True))
        dataset = train.SegmentationDataset(pairs, config, 0, augment)
        items[where] = [dataset[place]["image"] for place in range(5)]
    assert all(map(torch.equal, *items.values()))


def test_ctrl_c_removes_the_file_and_a_killed_run_leaves_it_to_the_next(data, tmp_path):
    folder = tmp_path / "cache"
    flags = train_on(data, tmp_path / "out", "--epochs", 1000, "--cache", folder)

    def start():
        command = Command(KIT / flags[0], flags[1:])
        while not (tmp_path / "out" / "metrics.csv").exists():
            assert command.poll() is None
            time.sleep(0.05)
        return command

    command = start()
    assert len(list(folder.iterdir())) == 1
    command.send_signal(signal.SIGINT)
    command.communicate(60)
    assert not list(folder.iterdir())
    (tmp_path / "out" / "metrics.csv").unlink()
    start().kill()
    (left,) = folder.iterdir()
    succeed(*train_on(data, tmp_path / "other", "--cache", folder))
    assert not left.exists()


def test_a_file_that_another_run_has_open_is_left_alone(tmp_path):
    file = cache.PairFile(tmp_path)
    (tmp_path / "segmentation-old.pairs").touch()
    (tmp_path / "mine.txt").touch()
    cache.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {os.path.basename(file.path), "mine.txt"}


@pytest.mark.parametrize("where", ["/proc/cache", "{data}/images/p0.png"])
def test_a_folder_that_cannot_be_written_is_one_line(data, tmp_path, where):
    where = where.format(data=data)
    done = run(*train_on(data, tmp_path / "out", "--cache", where))
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: --cache {where}: cannot be written")


# --------------------------------------------------------------------------------------------------
#  Augmentation, and what is seen
# --------------------------------------------------------------------------------------------------


def augmented(pixels, channels, draws=60):
    """An image as the augmentation gives it, so many times, and the names of the changes."""
    augment = train.augmentation(train.Config(height=32, width=32, channels=channels))
    drawn = []
    for seed in range(draws):
        augment.set_random_seed(seed)
        mask = np.zeros((1, *pixels.shape[:2]), np.uint8)
        drawn.append(augment(image=images.to_unit(pixels), masks=mask)["image"])
    return drawn, {type(change).__name__ for change in augment}


def test_the_network_gets_augmented_images_of_16_bits_as_they_are(tmp_path):
    """Not divided by 65535 once more: the training would see black images."""
    data = folder_of(tmp_path / "data")
    table = samples.find_samples(str(data), training=True).samples
    config = ModelConfig(height=32, width=32, value_range=(3000, 4500))
    settings = train.Config(height=32, width=32, augment=0)
    table = samples.scan(table, config.classes)
    for pairs in (table.assign(pair=None), samples.decode_pairs(table, config, 1 << 30)):
        trains = train.SegmentationDataset(pairs, config, 0, train.augmentation(settings))[0]
        validates = train.SegmentationDataset(pairs, config, 0, None)[0]
        assert torch.allclose(trains["image"], validates["image"], atol=1e-3)
        assert trains["image"].std() > 10
        again = images.to_tensor(images.from_tensor(trains["image"]))
        assert torch.allclose(again, trains["image"], atol=1e-2)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_three_bands_that_are_no_colours_are_read(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 250, (20, 30, 3)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    assert np.array_equal(readers.read_values(tmp_path / "a.tif", 3), values)


COLOURS = {"HueSaturationValue", "RandomShadow"}


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 64])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_other_than_rgb_gets_brightness_contrast_and_channel_dropout(channels, kind):
    pixels = np.random.default_rng(0).uniform(0.2, 0.8, (32, 32, channels))
    drawn, changes = augmented((np.iinfo(kind).max * pixels).astype(kind), str(channels))
    assert not COLOURS & changes
    assert "RandomBrightnessContrast" in changes
    assert ("ChannelDropout" in changes) == (channels not in (1, 3))
    assert {image.shape for image in drawn} == {pixels.shape}
    if kind == np.uint16:  # 0..1, and more levels than 8 bits have
        assert all(image.dtype == np.float32 for image in drawn)
        assert 0 <= min(image.min() for image in drawn) <= max(image.max() for image in drawn) <= 1
        assert min(len(np.unique(image)) for image in drawn) > 500
        means = [image.mean() for image in drawn]
        assert min(means) < 0.4 < 0.6 < max(means)  # brightness is of 0..1


def test_rgb_gets_colour_changes_where_it_has_8_bits():
    config = train.Config(height=32, width=32, encoder_weights="none")
    table = {"height": [32] * 9, "width": [32] * 9}
    table = pd.DataFrame(table | {"fold": range(9), "above": [0.0] * 9, "thickness": [9.0] * 9})
    table["layers"], table["block"], table["trains"] = [()] * 9, None, True
    fields = {"samples": table, "classes": ModelConfig().classes, "metric": "dice", "top": 0.0}
    fields |= {"rle": "columns", "instances": False, "channels": 3, "bands": (), "neighbours": ()}
    pixels = np.full((32, 32, 3), 99, np.uint8)
    for value_range, expected in (((), COLOURS), ((0.0, 4000.0), set())):
        collection = SimpleNamespace(**fields, value_range=value_range)
        resolved, _ = train.resolving.resolve(config, collection, 0, train.RESOLUTIONS)
        assert COLOURS & augmented(pixels, resolved.channels, 1)[1] == expected


@pytest.mark.parametrize("text", ["4,3", "0,1,2", "1,2,7", "7", "red,green,blue", "1,2,3,4", "-1"])
def test_channels_that_cannot_be_shown(text):
    with pytest.raises(UserError, match=f"--show {text}: takes one or three channels, from 1 to 6"):
        images.shown_channels(text, 6)


def test_channels_that_are_shown():
    assert images.shown_channels("", 6) == ()
    assert images.shown_channels("4,3,2", 6) == (4, 3, 2)
    assert images.shown_channels("6", 6) == (6,)


def test_show_is_checked_by_both_commands(data, tmp_path):
    done = run(*train_on(data, tmp_path / "out", "--show", "4,3,2"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--show 4,3,2: takes one or three channels, from 1 to 3" in done.stderr
    succeed(*train_on(data, tmp_path / "out", "--show", "3"))
    flags = ("--model", tmp_path / "out", "--data", data, "--out", tmp_path / "predictions")
    succeed("infer.py", *flags, "--show", "3,2,1")
    done = run("infer.py", *flags, "--show", "2,1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--show 2,1: takes one or three channels, from 1 to 3" in done.stderr
