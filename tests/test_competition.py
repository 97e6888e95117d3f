"""Another competition: csv in, submission.csv out; masks elsewhere; large images; videos."""

import csv
import dataclasses
import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENCODER, build_once, run, succeed
from PIL import Image

from kit.config import ModelConfig
from kit.data import images
from kit.data.folders import Collection
from kit.data.folds import assign_folds
from kit.data.names import MARKER
from kit.data.rle import RunLengths, rle_decode, rle_encode
from kit.data.samples import decode_pairs, find_samples, scan
from kit.errors import UserError
from kit.network.model import TrainedModel
from kit.results import metrics, predict, tuning
from kit.training import resolve as resolving
from train import RESOLUTIONS, Config

SMALL = ("--encoder", ENCODER, "--encoder_weights", "none")


def plain_encode(mask):
    """RLE pixel by pixel, down the columns."""
    runs, length = [], 0
    column_major = [bool(mask[y, x]) for x in range(mask.shape[1]) for y in range(mask.shape[0])]
    for place, here in enumerate([*column_major, False], 1):
        if here:
            length += 1
        elif length:
            runs += [place - length, length]
            length = 0
    return " ".join(map(str, runs))


@pytest.mark.parametrize("seed", range(6))
def test_rle_equals_a_plain_encoder_and_is_decoded_again(seed):
    rng = np.random.default_rng(seed)
    for shape in ((1, 1), (1, 7), (7, 1), (5, 9), (31, 17)):
        for density in (0, 0.1, 0.5, 0.9, 1):
            mask = rng.random(shape) < density
            assert rle_encode(mask) == plain_encode(mask)
            assert (rle_decode(rle_encode(mask), shape) == mask).all()
    assert rle_encode(np.ones((2, 2), bool)) == "1 4"


IMPOSSIBLE = [
    "1", "1 2 3", "a b", "1 2.5", "0 3", "-1 3", "1 0", "1 -2", "5 9", "13 1", "1 3 3 2",
    "9" * 30 + " 1",
]  # fmt: skip


@pytest.mark.parametrize("runs", IMPOSSIBLE)
def test_impossible_runs_are_refused_by_row(runs):
    with pytest.raises(UserError, match="row 7"):
        rle_decode(runs, (3, 4), "train.csv row 7")


# --------------------------------------------------------------------------------------------------
#  csv of RLE
# --------------------------------------------------------------------------------------------------


def blobs(folder, count, size=(64, 80), seed=0):
    """Images of bright blobs on a dark, noisy ground; returns {stem: mask}, every fifth empty."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    masks = {}
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        for _ in range(0 if number % 5 == 4 else 3):
            centre = (int(rng.integers(10, size[1] - 10)), int(rng.integers(10, size[0] - 10)))
            cv2.circle(mask, centre, int(rng.integers(6, 12)), 1, -1)
        image = 60 + 110 * mask[..., None] + rng.normal(0, 20, (*size, 3))
        stem = f"cell{seed}x{number:03d}"
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{stem}.png")
        masks[stem] = mask
    return masks


def write_csv(path, header, rows, **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([header, *rows])


def write_masks(path, masks):
    """A csv with one row per image."""
    write_csv(
        path, ["id", "rle_mask"], [[stem, plain_encode(mask)] for stem, mask in masks.items()]
    )


def read_csv(path):
    with path.open() as file:
        return list(csv.reader(file))


def training_samples(root, masks="auto"):
    collection = find_samples(str(root), masks=masks, training=True)
    return scan(collection.samples, collection.classes)


TEST_SIZE = (70, 90)


@pytest.fixture(scope="session")
def competition(tmp_path_factory):
    """train, train.csv (one row per object), test, sample_submission.csv, ground_truth.npz."""

    def build(root):
        rows = []
        for stem, mask in blobs(root / "train", 40).items():
            count, objects = cv2.connectedComponents(mask)
            parts = [[stem, plain_encode(objects == k)] for k in range(1, count)]
            rows += parts or [[stem, ""]]
        write_csv(root / "train.csv", ["ImageId", "EncodedPixels"], rows)
        truth = blobs(root / "test", 10, TEST_SIZE, seed=1)
        rows = [[stem, "1 1"] for stem in reversed(truth)]
        write_csv(root / "sample_submission.csv", ["ImageId", "EncodedPixels"], rows)
        np.savez(root / "ground_truth.npz", **truth)

    root = build_once(tmp_path_factory, "competition", build)
    with np.load(root / "ground_truth.npz") as truth:
        return root, dict(truth)


@pytest.fixture(scope="session")
def segmenter(competition, tmp_path_factory):
    """The --out of a training on the competition's csv."""

    def build(out):
        flags = ("--data", competition[0], "--out", out, "--epochs", 6, "--lr", 2e-3, *SMALL)
        assert "40 pairs" in succeed("train.py", *flags)

    return build_once(tmp_path_factory, "segmenter", build)


def test_a_competition_from_its_folder_to_its_submission(competition, segmenter, tmp_path):
    root, truth = competition
    flags = ("--model", segmenter, "--data", root, "--out", tmp_path, "--submission", "rle")
    succeed("infer.py", *flags)
    rows = read_csv(tmp_path / "submission.csv")
    assert rows[0] == ["ImageId", "EncodedPixels"]
    assert [row[0] for row in rows[1:]] == list(reversed(truth)), "the sample's ids, in its order"
    dice = []
    for stem, runs in rows[1:]:
        mask = rle_decode(runs, TEST_SIZE) > 0
        written = np.asarray(Image.open(tmp_path / "masks" / f"{stem}.png"))
        assert (mask == (written > 0)).all()
        total = mask.sum() + truth[stem].sum()
        dice.append(2 * (mask & (truth[stem] > 0)).sum() / total if total else 1)
    assert np.mean(dice) > 0.8
    assert json.loads((segmenter / "config.json").read_text())["metric"] == "dice"
    content = torch.load(segmenter / "model.pt", weights_only=True)
    assert len(content["model"]["areas"]) == 1
    assert content["model"]["areas"][0] >= 0
    assert content["config"]["min_pixels"] == -1, "tuned"


def test_scores_of_a_csv_are_those_of_training(competition, segmenter, tmp_path):
    """The validation images next to the csv: each number of training's metrics.json again."""
    samples = training_samples(competition[0])
    (tmp_path / "train").mkdir()
    for path in samples.image[assign_folds(samples, Config.folds, Config.seed).fold == 0]:
        shutil.copy(path, tmp_path / "train")
    shutil.copy(competition[0] / "train.csv", tmp_path)
    out = tmp_path / "out"
    succeed("infer.py", "--model", segmenter, "--data", tmp_path / "train", "--out", out)
    found, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (out, segmenter)
    )
    assert found == expected


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_masks_that_are_elsewhere_train_and_score(tmp_path, kind):
    """--masks means the same to both scripts; without it infer.py scores nothing."""
    masks = blobs(tmp_path / "photos" / "a", 12)
    elsewhere = tmp_path / "elsewhere" / ("annotations.csv" if kind == "csv" else "annotations")
    elsewhere.parent.mkdir()
    if kind == "csv":
        write_masks(elsewhere, masks)
    else:
        elsewhere.mkdir()
        for stem, mask in masks.items():
            Image.fromarray(mask * 255).save(elsewhere / f"{stem}.png")
    photos, out = tmp_path / "photos" / "a", tmp_path / "out"
    flags = ("--masks", elsewhere, "--epochs", 1, "--folds", 3, *SMALL)
    succeed("train.py", "--data", photos, "--out", out, *flags)
    expected = json.loads((out / "metrics.json").read_text())
    samples = training_samples(photos, str(elsewhere))
    (tmp_path / "valid").mkdir()
    for path in samples.image[assign_folds(samples, 3, Config.seed).fold == 0]:
        shutil.copy(path, tmp_path / "valid")
    flags = ("--model", out, "--data", tmp_path / "valid")
    succeed("infer.py", *flags, "--out", tmp_path / "scored", "--masks", elsewhere)
    assert json.loads((tmp_path / "scored" / "metrics.json").read_text()) == expected
    assert expected["image"]["all"]["images"] == len(list((tmp_path / "valid").iterdir()))
    succeed("infer.py", *flags, "--out", tmp_path / "plain")
    assert not (tmp_path / "plain" / "metrics.json").exists()
    done = run("infer.py", *flags, "--out", tmp_path / "no", "--masks", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "--masks" in done.stderr
    assert "nowhere" in done.stderr


LAYOUTS = {
    "salt": ("train/images", ["id", "rle_mask"], {}, "{}"),
    "hubmap": ("train_images", ["img", "pixels"], {}, "{}.png"),
    "contrails": ("images", ["record_id", "encoded_pixels"], {"delimiter": ";"}, "{}"),
    "by position": ("train", ["photo", "runs"], {"encoding": "utf-8-sig"}, "{}"),
    "more columns": ("train", ["fold", "rle", "ImageId"], {"quoting": csv.QUOTE_ALL}, "{}"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_csv_layouts_of_competitions(tmp_path, name):
    folder, header, options, spelling = LAYOUTS[name]
    masks = blobs(tmp_path / folder, 6)
    with_rows = masks if name == "by position" else dict(list(masks.items())[:-1])
    empty = iter(["", "-"])
    rows = []
    for stem, mask in with_rows.items():
        runs, image = plain_encode(mask) or next(empty), spelling.format(stem)
        rows.append([image, runs] if len(header) == 2 else ["0", runs, image])
    path = tmp_path / ("annotations.csv" if name == "by position" else "train.csv")
    write_csv(path, header, rows, **options)
    samples = find_samples(str(tmp_path), training=True).samples
    assert len(samples) == 6
    for row, (stem, mask) in zip(samples.itertuples(), masks.items(), strict=True):
        [part] = row.mask.parts
        assert isinstance(part, RunLengths)
        assert row.mask.path == part.path == path
        assert (row.mask.read(mask.shape) == (mask[None] if stem in with_rows else 0)).all()


def refused_training(folder, tmp_path, *flags):
    out = tmp_path / "out"
    done = run("train.py", "--data", folder, "--out", out, "--epochs", 1, *SMALL, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not out.exists()
    return done.stderr


def test_faults_of_the_csv_are_named_by_row(competition, tmp_path):
    shutil.copytree(competition[0] / "train", tmp_path / "train")
    stems = sorted(path.stem for path in (tmp_path / "train").iterdir())
    good = [[stem, "1 4"] for stem in stems]
    header = ["id", "rle_mask"]

    def refuse(rows, *names):
        write_csv(tmp_path / "train.csv", header, rows)
        with pytest.raises(UserError) as refused:
            decode_pairs(training_samples(tmp_path), TILED, 0)
        assert all(name in str(refused.value) for name in names), refused.value
        assert "\n" not in str(refused.value)

    refuse([*good[:5], [stems[5], "1 4 3 2"], *good[6:]], "row 7", "overlap")
    two = [[stems[5], "5000 4000"], [stems[6], "x"]]
    refuse([*good[:5], *two, *good[7:]], "row 7", "row 8")
    refuse([*good[:5], [stems[5], "1 4", "more"], *good[6:]], "row 7", "3 fields")
    refuse([["../../elsewhere", "1 4"]], "elsewhere", "none of its ids")
    refuse([[stem, "x"] for stem in stems], "row 2", "row 6", "40 in all")
    (tmp_path / "train.csv").write_bytes(b"id,rle_mask\n\xff\xfe,1 2\n")
    assert "train.csv" in refused_training(tmp_path, tmp_path)
    (tmp_path / "train.csv").write_text("")
    assert "have no mask" in refused_training(tmp_path, tmp_path)
    (tmp_path / "train.csv").unlink()
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name, header, good)
    assert "--masks" in refused_training(tmp_path, tmp_path)
    chosen = find_samples(str(tmp_path), masks="b.csv", training=True).samples["mask"][0]
    assert chosen.path.name == "b.csv"
    assert chosen.parts[0].rows == ((2, "1 4"),)


def test_the_sample_submission_decides(competition, segmenter, tmp_path):
    root, truth = competition
    flags = ("--model", segmenter, "--data", root / "test", "--out", tmp_path / "out")
    sample, stems = tmp_path / "sample.csv", list(truth)
    flags = (*flags, "--submission", "rle", "--sample_submission", sample)
    for ids, name in (([*stems, "unknown"], "unknown"), ([*stems, stems[0]], stems[0])):
        write_csv(sample, ["id", "x"], [[stem, "-"] for stem in ids])
        done = run("infer.py", *flags)
        assert done.returncode == 2
        assert name in done.stderr
        assert not (tmp_path / "out").exists()
    rows = [[f"{stem}.png", "as it was", "-"] for stem in stems[:6]]
    write_csv(sample, ["id", "note", "pixels"], rows)
    succeed("infer.py", *flags, "--threshold", 1)
    rows = read_csv(tmp_path / "out" / "submission.csv")
    assert [row[0] for row in rows] == ["id", *(f"{stem}.png" for stem in stems[:6])]
    assert {row[1] for row in rows[1:]} == {"as it was"}
    assert "-" in {row[2] for row in rows[1:]}, "an empty mask is written as in the sample"


def test_an_unreadable_image_costs_its_own_mask_alone(competition, segmenter, tmp_path):
    """Of hidden test images one may be damaged: the submission needs a row for it too."""
    root, truth = competition
    shutil.copytree(root / "test", tmp_path / "test")
    stems = sorted(truth)
    for stem in stems[:2]:
        path = tmp_path / "test" / f"{stem}.png"
        path.write_bytes(path.read_bytes()[:300])
    flags = ("--model", segmenter, "--data", tmp_path / "test")
    submission = (*flags, "--submission", "rle", "--out", tmp_path / "a")
    sample = ("--sample_submission", root / "sample_submission.csv")
    done = run("infer.py", *submission, *sample)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert all(f"{stem}.png" in printed for stem in stems[:2])
    assert "Traceback" not in printed
    answers = dict(read_csv(tmp_path / "a" / "submission.csv")[1:])
    assert set(answers) == set(stems)
    assert [answers[stem] for stem in stems[:2]] == ["", ""]
    assert sum(answer != "" for answer in answers.values()) >= 6
    done = run("infer.py", *flags, "--out", tmp_path / "b")
    assert done.returncode == 2, "without a submission nothing is lost by saying so"
    [last] = done.stderr.strip().splitlines()[-1:]
    assert "2 of 10 could not be used" in last
    assert all(f"{stem}.png" in last for stem in stems[:2])
    written = {path.stem for path in (tmp_path / "b" / "masks").iterdir()}
    assert written == set(stems[2:])


def test_ids_without_an_image_get_empty_masks_on_request(competition, segmenter, tmp_path):
    root, truth = competition
    sample, stems = tmp_path / "sample.csv", sorted(truth)
    write_csv(sample, ["id", "rle_mask"], [[stem, ""] for stem in [*stems, "hidden"]])
    flags = ("--model", segmenter, "--data", root / "test", "--submission", "rle")
    flags = (*flags, "--sample_submission", sample, "--out", tmp_path / "out")
    done = run("infer.py", *flags)
    assert done.returncode == 2
    assert "hidden" in done.stderr
    assert "--on_missing empty" in done.stderr
    succeed("infer.py", *flags, "--on_missing", "empty")
    answers = dict(read_csv(tmp_path / "out" / "submission.csv")[1:])
    assert list(answers) == [*stems, "hidden"]
    assert answers["hidden"] == ""
    assert sum(answer != "" for answer in answers.values()) >= 7


def test_groups_stay_together_and_folds_are_stratified(tmp_path):
    masks = blobs(tmp_path / "train", 40)
    rows = []
    for number, (stem, mask) in enumerate(masks.items()):
        rows.append([stem, plain_encode(mask), f"patient{number % 7}"])
    write_csv(tmp_path / "train.csv", ["id", "rle_mask", "patient"], rows)
    samples = training_samples(tmp_path)
    assert (samples.share > 0).sum() == 32
    assert samples.above[samples.share == 0].min() == 1
    fold = assign_folds(samples, 5, 0).fold
    empty = (samples.share == 0).groupby(fold).sum()
    assert len(empty) == 5
    assert empty.max() - empty.min() <= 1
    fold = assign_folds(samples, 5, 0, "patient").fold
    patients = [fields["patient"] for fields in samples.fields]
    assert (pd.Series(fold).groupby(patients).nunique() == 1).all()
    assert len(set(fold)) == 5
    assert "--group" in refused_training(tmp_path, tmp_path, "--group", "hospital")


# --------------------------------------------------------------------------------------------------
#  Threshold and minimum component area
# --------------------------------------------------------------------------------------------------


def mask_scores(mask, truth):
    """Dice and IoU of a mask, bool (h, w)."""
    return metrics.mask_scores(metrics.count_hits(mask[None], truth[None]))[0]


def test_scores_by_threshold_and_small_components():
    rng = np.random.default_rng(0)
    truths = [(rng.random((20, 30)) < share).astype(np.uint8) for share in (0.3, 0.5, 0)]
    maps = []
    for truth in truths:
        noisy = 90 * truth + rng.normal(80, 40, truth.shape)
        maps.append(np.clip(noisy, 0, 255).astype(np.uint8))
    pairs = list(zip(maps, truths, strict=True))
    counts = np.stack([metrics.pixel_counts(*pair) for pair in pairs])
    for column, metric in enumerate(("dice", "iou")):
        found = tuning.scores_by_threshold(counts, metric)
        for level in (0, 60, 128, 255):
            each = [mask_scores(p >= level, truth)[column] for p, truth in pairs]
            assert found[:, level] == pytest.approx(each)
    found = tuning.scores_by_threshold(counts, "maxf")
    pooled = metrics.scores(counts.sum(0))
    assert 100 * found.mean(0).max() == pytest.approx(pooled["MaxF"], abs=1e-3)
    assert found.mean(0).argmax() / 255 == pooled["threshold"]
    without = []
    for k in range(3):
        rest = np.delete(counts, k, 0)
        without.append(tuning.scores_by_threshold(rest, "maxf").mean(0)[128])
    order = np.argsort(found[:, 128])
    assert np.argsort(without).tolist() == order[::-1].tolist(), (
        "who raises F1 lowers it by leaving"
    )
    mask = np.zeros((9, 9), bool)
    mask[0, 0] = mask[4:7, 4:7] = True
    for area, left in ((2, 9), (10, 0), (0, 10)):
        assert predict.remove_small(mask, area).sum() == left
        config = ModelConfig(thresholds=(0.5,), areas=(area,))
        assert predict.postprocess(mask[None].astype(np.uint8) * 128, config).sum() == left


def test_the_threshold_leaves_one_half_only_for_a_gain_that_is_no_luck():
    levels = np.arange(256)
    peak = 1 - np.abs(levels - 200) / 255
    tent = 1 - np.abs(levels - 100) / 255
    shifts = np.random.default_rng(0).normal(0, 0.1, 50)
    many = np.stack([peak + shift for shift in shifts])
    assert tuning.choose_threshold(many) == 199.5 / 255, "all images agree"
    lucky = np.stack([tent, tent, 4 * peak])
    assert lucky.mean(0).argmax() == 200
    assert tuning.choose_threshold(lucky) == 0.5, "one of three decides"
    assert tuning.choose_threshold(peak[None]) == 0.5, "one image"
    assert tuning.choose_threshold(np.stack([peak, peak])) == 0.5, "two images"
    assert tuning.choose_threshold(np.stack([peak, peak, peak])) == 199.5 / 255
    few = np.stack([peak, peak, peak, tent])
    assert few.mean(0).argmax() == 200
    assert tuning.choose_threshold(few) == 0.5, "within two standard errors"
    assert tuning.choose_threshold(np.ones((4, 256))) == 0.5, "all are equal"


# --------------------------------------------------------------------------------------------------
#  Large images
# --------------------------------------------------------------------------------------------------

TILED = ModelConfig(
    height=32, width=48, tiles=True, tta=False, precision="32", temperature=1.0,
    mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
)  # fmt: skip


@pytest.mark.parametrize("size", [(100, 130), (32, 48), (20, 30), (33, 200), (64, 10)])
def test_tiles_of_a_pointwise_model_blend_to_the_whole(size):
    """For a model that looks at single pixels, tiles must make no difference."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 1, 1)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    blocks = predict.row_blocks(TrainedModel(network, TILED, {}, {}), image, 3, ())
    _, _, blended = predict.join(blocks)
    inputs = images.normalise(images.to_tensor(image)[None], TILED)
    assert torch.allclose(blended, network(inputs).sigmoid()[0], atol=1e-5)


@pytest.mark.parametrize("size", [(100, 130), (32, 48), (20, 30), (33, 200)])
def test_tiles_cover_every_pixel(size):
    seen = np.zeros(size, bool)
    for overlap in (0, 0.25):
        for y, x in images.tile_corners(size, TILED, overlap):
            assert y >= 0
            assert x >= 0
            seen[y : y + 32, x : x + 48] = True
    assert seen.all()


def test_training_and_prediction_in_tiles(tmp_path):
    rng = np.random.default_rng(0)
    write_masks(tmp_path / "train.csv", blobs(tmp_path / "train", 6, size=(150, 200)))
    flags = ("--tiles", "true", "--height", 64, "--width", 64, "--epochs", 3, "--lr", 2e-3, *SMALL)
    out = tmp_path / "out"
    succeed("train.py", "--data", tmp_path, "--out", out, *flags)
    assert json.loads((out / "metrics.json").read_text())["image"]["all"]["MaxF"] > 70
    large = tmp_path / "large.png"
    Image.fromarray(rng.integers(0, 90, (500, 700, 3), np.uint8)).save(large)
    succeed("infer.py", "--model", out, "--data", large, "--out", tmp_path / "p")
    assert Image.open(tmp_path / "p" / "masks" / "large.png").size == (700, 500)


# --------------------------------------------------------------------------------------------------
#  What follows from data and device
# --------------------------------------------------------------------------------------------------

NO_WEIGHTS = Config(encoder=ENCODER, encoder_weights="none")


def resolve(config, collection):
    """The settings for fold 0 of samples that are all in fold 1."""
    return resolving.resolve(config, collection, 0, RESOLUTIONS)


def test_images_over_two_megapixels_are_cut_into_tiles(tmp_path):
    Image.new("RGB", (2000, 1500)).save(tmp_path / "large.png")
    collection = find_samples(str(tmp_path))
    sizes = {
        "fold": 1,
        "height": 1500,
        "width": 2000,
        "above": 1.0,
        "thickness": 50.0,
        "block": None,
    }
    samples = collection.samples.assign(**sizes)
    config, model_config = resolve(NO_WEIGHTS, collection._replace(samples=samples))
    assert config.tiles is True
    assert model_config.tiles is True
    assert config.height * config.width < 400_000
    with pytest.raises(UserError, match=r"--top -1: .*; take --tiles false, or leave --top out"):
        resolve(dataclasses.replace(NO_WEIGHTS, top=-1), collection._replace(samples=samples))
    samples = samples.assign(above=0.4)
    cropped = dataclasses.replace(config, tiles=False, top=-1, height=0, width=0)
    config, model_config = resolve(cropped, collection._replace(samples=samples))
    assert config.top == model_config.top == 0.35


@pytest.mark.parametrize(("default", "expected"), [(0, 0), (-1, 0.35)])
def test_the_crop_and_the_metric_are_the_layouts_own(default, expected):
    columns = {
        "fold": 1,
        "height": 300,
        "width": 900,
        "above": 0.4,
        "thickness": 50.0,
        "block": None,
    }
    samples = pd.DataFrame(columns, range(9))
    collection = Collection("", samples, top=default, metric="iou")
    config, model_config = resolve(NO_WEIGHTS, collection)
    assert config.top == model_config.top == expected
    assert config.metric == "iou"


@pytest.mark.parametrize(("precision", "default"), [("32", 4), ("bf16-mixed", 8)])
def test_many_small_images_make_larger_batches_on_a_cpu(monkeypatch, precision, default):
    monkeypatch.setattr(resolving, "resolve_precision", lambda *_, **__: precision)
    monkeypatch.setattr(resolving, "best_device", lambda: "cpu")

    def batch(count, size, **settings):
        columns = {
            "fold": 1,
            "height": size,
            "width": size,
            "above": 1.0,
            "thickness": 50.0,
            "block": None,
        }
        collection = Collection("", pd.DataFrame(columns, range(count)))
        config = dataclasses.replace(NO_WEIGHTS, **settings)
        return resolve(config, collection)[0].batch_size

    assert batch(4000, 64) == 16
    assert batch(4000, 512) == default
    assert batch(150, 64) == default, "few images: rather more steps"
    assert batch(60, 64) == 4, "and more still"
    assert batch(60, 64, extra="predictions") == default, "with extras they are many"
    assert batch(30, 1500) == default, "images in many tiles"


# --------------------------------------------------------------------------------------------------
#  Videos
# --------------------------------------------------------------------------------------------------


def write_video(path, frames, size=(96, 64)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    for number in range(frames):
        writer.write(np.full((*size[::-1], 3), 10 * number % 256, np.uint8))
    writer.release()


def test_a_video_becomes_an_overlay(segmenter, tmp_path):
    write_video(tmp_path / "drive.mp4", 19)
    flags = ("--model", segmenter, "--data", tmp_path / "drive.mp4", "--out", tmp_path / "out")
    assert "19 frames" in succeed("infer.py", *flags)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written - {MARKER} == {"overlay.mp4"}
    video = cv2.VideoCapture(str(tmp_path / "out" / "overlay.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 19
    assert video.get(cv2.CAP_PROP_FPS) == 10
    assert video.read()[1].shape == (64, 96, 3)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "drive.mp4").read_bytes()[:300])
    for name in ("empty.mp4", "text.mp4", "cut.mp4"):
        flags = ("--model", segmenter, "--data", tmp_path / name, "--out", tmp_path / "no")
        done = run("infer.py", *flags)
        assert done.returncode == 2
        assert name in done.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "no").exists()
