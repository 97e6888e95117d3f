"""Which symmetries the augmentation uses; predictions that are ready in time."""

import statistics
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, run, succeed

import train
from kit.config import ModelConfig
from kit.network.model import TrainedModel, build_network
from kit.results import pace
from kit.results.pace import Level, Pace


def views(flips, draws=60, **settings):
    """How often each flip and turn of an image and its mask comes out of the augmentation."""
    config = train.Config(height=8, width=8, augment=1e-9, flips=flips, **settings)
    augment = train.augmentation(config)
    augment.transforms = [t for t in augment.transforms if type(t).__name__ in SYMMETRIES]
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    mask = np.stack([image[..., 0] % 2, image[..., 1] // 99])
    counts = {}
    for draw in range(draws):
        augment.set_random_seed(7919 * draw)  # as SegmentationDataset does for each item
        changed = augment(image=image, masks=mask)
        assert np.array_equal(changed["masks"][0], changed["image"][..., 0] % 2)
        assert np.array_equal(changed["masks"][1], changed["image"][..., 1] // 99)
        name = next(n for n, change in EIGHT.items() if (change(image) == changed["image"]).all())
        counts[name] = counts.get(name, 0) + 1
    return counts


SYMMETRIES = ("HorizontalFlip", "OneOf", "D4")
EIGHT = {
    "same": lambda image: image,
    "h": lambda image: image[:, ::-1],
    "v": lambda image: image[::-1],
    "hv": lambda image: image[::-1, ::-1],
    "quarter": np.rot90,
    "three quarters": lambda image: np.rot90(image, 3),
    "transposed": lambda image: image.transpose(1, 0, 2),
    "other diagonal": lambda image: image[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize(
    ("flips", "names"),
    [
        ("auto", ["same", "h"]),
        ("h", ["same", "h"]),
        ("hv", ["same", "h", "v", "hv"]),
        ("all", list(EIGHT)),
        ("none", ["same"]),
    ],
)
def test_the_augmentation_uses_the_symmetries_that_are_asked_for(flips, names):
    counts = views(flips)
    assert set(counts) == set(names)
    assert min(counts.values()) >= 60 / len(names) / 4


def test_auto_draws_the_random_numbers_that_h_draws():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (32, 96, 3), np.uint8), np.zeros((1, 32, 96), np.uint8)
    config = train.Config(height=32, width=96)
    results = []
    for flips in ("auto", "h"):
        augment = train.augmentation(replace(config, flips=flips))
        augment.set_random_seed(5)
        results.append([augment(image=image, masks=mask)["image"] for _ in range(20)])
    assert np.array_equal(*results)


def test_quarter_turns_of_an_input_that_is_not_square_are_refused(roads, tmp_path):
    flags = ("--data", roads, "--flips", "all", "--check", "true", "--out", tmp_path / "a")
    done = run("train.py", *flags, *TINY)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --flips all: quarter turns need a square input, it is 32x96; "
        "take --flips hv, or --height 48 --width 48"
    )
    assert run("train.py", *flags, *TINY, "--height", 48, "--width", 48).returncode == 0
    assert run("train.py", *flags, *TINY, "--flips", "hv").returncode == 0


# --------------------------------------------------------------------------------------------------
#  Predictions that are ready in time
# --------------------------------------------------------------------------------------------------

LEVELS = [
    Level("", ["a", "b"], "auto", 1, 4),
    Level("test-time augmentation", ["a", "b"], "false", 1, 2),
    Level("all models but 1 of 2", ["a"], "false", 1, 1),
    Level("half of the height and width", ["a"], "false", 2, 0.5),
]


@pytest.fixture
def predicted(monkeypatch):
    """Predict so many images in a stubbed time: the seconds of each in networks, and all seconds.

    An image takes 0.2 s to read and a second for each pass through a network, a quarter of half
    the size.
    """
    now = [0.0]

    def read(batch, config):
        now[0] += 0.2 * len(batch)
        return [(row, row) for row in batch], []

    def networks(models, images, size, tta, shrink):
        passes = 2 * len(models) if tta == "auto" else len(models)
        now[0] += passes / shrink**2 * len(images)
        return [passes / shrink**2 for _ in images]

    monkeypatch.setattr(pace, "read_batch", read)
    monkeypatch.setattr(pace, "predict_reduced", networks)

    def predict(end, count=200, first=0.0):
        table = [level._replace(models=Named(level.models)) for level in LEVELS]
        now[0] = 0.0
        keeper = Pace(table, end / 60, end, count, lambda: now[0])
        costs, errors = [], []
        for number in range(count):
            now[0] += first if number == 0 else 0.0
            results, failed = keeper.predict_batch([SimpleNamespace(id=f"p{number}")], 1)
            costs += [cost for *_, cost in results]
            errors += [str(error) for _, error in failed]
        return costs, errors, now[0]

    return predict


class Named(list):
    """Names of models that have a configuration."""

    def __getitem__(self, index):
        return SimpleNamespace(config=None)


FULL = 200 * 4.2


@pytest.mark.parametrize(
    ("share", "most", "lowest"),
    [(1.01, 4, 4), (0.9, 4, 2), (0.5, 2, 1), (0.25, 0.25, 0.25), (0.13, 0.25, 0.25)],
)
def test_every_image_is_predicted_in_time(predicted, capsys, share, most, lowest):
    costs, errors, seconds = predicted(share * FULL)
    assert not errors and len(costs) == 200
    assert seconds <= share * FULL
    assert (statistics.mode(costs), min(costs)) == (most, lowest)
    assert seconds >= 0.7 * share * FULL or lowest == 0.25, "no more is dropped than is needed"
    assert costs == sorted(costs, reverse=True)
    printed = capsys.readouterr().out
    assert (
        "dropped in this order: test-time augmentation; all models but 1 of 2; half of" in printed
    )
    drops = [line for line in printed.splitlines() if ": drops " in line]
    assert len(drops) == len(set(costs)) - 1


def test_what_is_too_slow_even_so_is_an_error_for_the_images_that_are_left(predicted):
    costs, errors, seconds = predicted(0.05 * FULL)
    assert len(costs) + len(errors) == 200
    assert seconds <= 0.05 * FULL
    assert errors[-1] == "--max_minutes 0.7: no time was left for p199"
    assert costs.count(0.25) > 50
    assert predicted(-1.0)[0] == []


def test_a_slow_start_drops_nothing(predicted):
    costs, _, _ = predicted(1.02 * FULL, first=4.0)
    assert set(costs) == {4}


def test_it_goes_down_several_levels_at_once(predicted):
    costs, errors, _ = predicted(0.35 * FULL)
    assert not errors
    assert set(costs) == {4, 1}


def trained_model(**settings):
    torch.manual_seed(0)
    config = ModelConfig(encoder="resnet18", height=64, width=96, **settings)
    return TrainedModel(build_network(config).eval(), config, {}, {})


def test_the_levels_of_models():
    models = [trained_model(), *[trained_model(tta=False)] * 4]
    blend = [models[1]._replace(weight=weight) for weight in (0.2, 0.5, 0.3)]
    assert [m.weight for m in pace.levels_of(blend, "auto")[1].models] == [0.5]
    levels = pace.levels_of(models, "auto")
    assert [level.cost for level in levels] == [6, 5, 2, 1, 0.5]
    smaller = levels[-1].models[0]
    assert (smaller.config.height, smaller.config.width) == (32, 48)
    assert levels[-2].models[0].config.height == 64
    assert [level.cost for level in pace.levels_of(models[:1], "false")] == [1, 0.5]
    tiled = pace.levels_of([trained_model(tiles=True)], "true")
    assert [(level.cost, level.shrink) for level in tiled] == [(2, 1), (1, 1), (0.5, 2)]


def test_a_limit_that_is_wide_changes_nothing_and_one_that_is_over_is_said(
    roads, trained, tmp_path
):
    flags = ("infer.py", "--model", trained, "--data", roads / "testing", "--out")
    succeed(*flags, tmp_path / "a")
    printed = succeed(*flags, tmp_path / "b", "--max_minutes", 30)
    assert "dropped in this order: test-time augmentation; half of the height and width" in printed
    for path in (tmp_path / "a" / "masks").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "b" / "masks" / path.name).read_bytes()
    done = run(*flags, tmp_path / "c", "--max_minutes", 0.001)
    assert done.returncode == 2
    assert "3 of 3 could not be used" in done.stderr
    assert "--max_minutes 0.001: no time was left for" in done.stderr
    over = ("--max_minutes", 0.001, "--submission", "rle")
    printed = succeed(*flags, tmp_path / "d", *over)
    assert "3 images failed, their masks are empty in it" in printed
    assert len(pd.read_csv(tmp_path / "d" / "submission.csv")) == 3
