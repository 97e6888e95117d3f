"""Another competition: csv in, submission.csv out; large pictures; videos."""

import csv
import dataclasses
import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run, succeed
from PIL import Image

import infer
import utils
from utils import Config, UserError

SMALL = ("--encoder", "resnet18", "--encoder_weights", "none")


def plain_encode(mask):
    """Run lengths pixel by pixel, down the columns."""
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
def test_run_lengths_equal_a_plain_encoder_and_come_back(seed):
    rng = np.random.default_rng(seed)
    for shape in ((1, 1), (1, 7), (7, 1), (5, 9), (31, 17)):
        for density in (0, 0.1, 0.5, 0.9, 1):
            mask = rng.random(shape) < density
            assert utils.rle_encode(mask) == plain_encode(mask)
            assert (utils.rle_decode(utils.rle_encode(mask), shape) == mask).all()
    assert utils.rle_encode(np.ones((2, 2), bool)) == "1 4"


@pytest.mark.parametrize(
    "runs", ["1", "1 2 3", "a b", "1 2.5", "0 3", "-1 3", "1 0", "1 -2", "5 9", "13 1", "1 3 3 2", "9" * 30 + " 1"]
)
def test_runs_that_cannot_be_are_refused_by_row(runs):
    with pytest.raises(UserError, match="row 7"):
        utils.rle_decode(runs, (3, 4), "train.csv row 7")


# ---------------------------------------------------------------------------------------------------------------------
#  csv of run lengths


def blobs(folder, count, size=(64, 80), seed=0):
    """Pictures of bright blobs on a dark, noisy ground; returns {stem: mask}, every fifth empty."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    masks = {}
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        for _ in range(0 if number % 5 == 4 else 3):
            centre = (int(rng.integers(10, size[1] - 10)), int(rng.integers(10, size[0] - 10)))
            cv2.circle(mask, centre, int(rng.integers(6, 12)), 1, -1)
        picture = np.clip(60 + 110 * mask[..., None] + rng.normal(0, 20, (*size, 3)), 0, 255).astype(np.uint8)
        stem = f"cell{seed}x{number:03d}"
        Image.fromarray(picture).save(folder / f"{stem}.png")
        masks[stem] = mask
    return masks


def write_csv(path, header, rows, **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([header, *rows])


@pytest.fixture(scope="session")
def competition(tmp_path_factory):
    """train, train.csv (a row an object), test, sample_submission.csv; and the truth of the test pictures."""
    root = tmp_path_factory.mktemp("competition")
    rows = []
    for stem, mask in blobs(root / "train", 40).items():
        _, patches = cv2.connectedComponents(mask)
        rows += [[stem, plain_encode(patches == k)] for k in range(1, patches.max() + 1)] or [[stem, ""]]
    write_csv(root / "train.csv", ["ImageId", "EncodedPixels"], rows)
    truth = blobs(root / "test", 10, size=(70, 90), seed=1)
    write_csv(root / "sample_submission.csv", ["ImageId", "EncodedPixels"], [[s, "1 1"] for s in reversed(truth)])
    return root, truth


@pytest.fixture(scope="session")
def segmenter(competition, tmp_path_factory):
    out = tmp_path_factory.mktemp("segmenter")
    printed = succeed("train.py", "--data", competition[0], "--out", out, "--epochs", 8, "--lr", 2e-3, *SMALL)
    assert "40 pairs" in printed
    return out


def test_a_competition_from_its_folder_to_its_submission(competition, segmenter, tmp_path):
    root, truth = competition
    succeed("infer.py", "--model", segmenter, "--data", root, "--out", tmp_path, "--submission", "rle")
    rows = list(csv.reader((tmp_path / "submission.csv").open()))
    assert rows[0] == ["ImageId", "EncodedPixels"]
    assert [row[0] for row in rows[1:]] == list(reversed(truth)), "the sample's ids in the sample's order"
    dice = []
    for stem, runs in rows[1:]:
        found = utils.rle_decode(runs, (70, 90)) > 0
        assert (found == (np.asarray(Image.open(tmp_path / "masks" / f"{stem}.png")) > 0)).all()
        total = found.sum() + truth[stem].sum()
        dice.append(2 * (found & (truth[stem] > 0)).sum() / total if total else 1)
    assert np.mean(dice) > 0.8
    assert json.loads((segmenter / "config.json").read_text())["metric"] == "dice"
    config = torch.load(segmenter / "model.pt", weights_only=True)["config"]
    assert config["min_pixels"] >= 0, "tuned"


def test_scores_of_a_csv_are_those_of_training(competition, segmenter, tmp_path):
    """The validation pictures with a csv of their own: every number of training's metrics.json again."""
    samples = utils.survey(utils.find_samples(str(competition[0]), training=True))
    valid = samples[utils.assign_folds(samples, Config()) == 0]
    (tmp_path / "train").mkdir()
    for path in valid.image:
        shutil.copy(path, tmp_path / "train")
    shutil.copy(competition[0] / "train.csv", tmp_path)
    succeed("infer.py", "--model", segmenter, "--data", tmp_path / "train", "--out", tmp_path / "out")
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", segmenter)]
    assert scores[0] == scores[1]


LAYOUTS = {
    "salt": ("train/images", ["id", "rle_mask"], {}, "{}"),
    "hubmap": ("train_images", ["img", "pixels"], {}, "{}.png"),
    "contrails": ("images", ["record_id", "encoded_pixels"], {"delimiter": ";"}, "{}"),
    "by position": ("train", ["picture", "runs"], {"encoding": "utf-8-sig"}, "{}"),
    "more columns": ("train", ["fold", "rle", "ImageId"], {"quoting": csv.QUOTE_ALL}, "{}"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_usual_csv_layouts(tmp_path, name):
    folder, header, options, spelling = LAYOUTS[name]
    masks = blobs(tmp_path / folder, 6)
    empty = iter(["", "-"])
    rows = []
    for stem, mask in list(masks.items())[:-1] if name != "by position" else masks.items():  # the last: no row at all
        runs = plain_encode(mask) or next(empty)
        rows.append([spelling.format(stem), runs] if len(header) == 2 else ["0", runs, spelling.format(stem)])
    write_csv(tmp_path / "train.csv", header, rows, **options)
    if name == "by position":
        shutil.move(tmp_path / "train.csv", tmp_path / "truth.csv")
    samples = utils.find_samples(str(tmp_path), training=True)
    assert len(samples) == 6
    for row, (stem, mask) in zip(samples.itertuples(), masks.items(), strict=True):
        found = utils.read_truth(row.mask, row.layout, mask.shape)
        assert (found == (mask if name == "by position" or stem != list(masks)[-1] else 0)).all()


def refused_training(data, tmp_path, *flags):
    done = run("train.py", "--data", data, "--out", tmp_path / "out", "--epochs", 1, *SMALL, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    return done.stderr


def test_faults_of_the_csv_are_named_by_row(competition, tmp_path):
    shutil.copytree(competition[0] / "train", tmp_path / "train")
    stems = sorted(path.stem for path in (tmp_path / "train").iterdir())
    good = [[stem, "1 4"] for stem in stems]
    header = ["id", "rle_mask"]

    def refuse(rows, *names):
        write_csv(tmp_path / "train.csv", header, rows)
        with pytest.raises(UserError) as refused:
            utils.read_all(utils.survey(utils.find_samples(str(tmp_path), training=True)), TILED)
        assert all(name in str(refused.value) for name in names), refused.value

    refuse([*good[:5], [stems[5], "1 4 3 2"], *good[6:]], "row 7", "overlap")
    refuse([*good[:5], [stems[5], "5000 4000"], [stems[6], "x"], *good[7:]], "row 7", "row 8")
    refuse([*good[:5], [stems[5], "1 4", "more"], *good[6:]], "row 7", "3 fields")
    refuse([["../../elsewhere", "1 4"]], "elsewhere", "none of its ids")
    (tmp_path / "train.csv").write_bytes(b"id,rle_mask\n\xff\xfe,1 2\n")
    assert "train.csv" in refused_training(tmp_path, tmp_path)
    (tmp_path / "train.csv").write_text("")
    assert "have no mask" in refused_training(tmp_path, tmp_path)
    (tmp_path / "train.csv").unlink()
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name, header, good)
    assert "--masks" in refused_training(tmp_path, tmp_path)
    found = utils.find_samples(str(tmp_path), masks="b.csv", training=True)
    assert found["mask"][0].startswith("b.csv row 2: ")


def test_the_sample_submission_decides(competition, segmenter, tmp_path):
    root, truth = competition
    flags = ("--model", segmenter, "--data", root / "test", "--out", tmp_path / "out", "--submission", "rle")
    sample = tmp_path / "sample.csv"
    for ids, name in (([*truth, "unknown"], "unknown"), ([*truth, next(iter(truth))], next(iter(truth)))):
        write_csv(sample, ["id", "x"], [[stem, "-"] for stem in ids])
        done = run("infer.py", *flags, "--sample_submission", sample)
        assert done.returncode == 2
        assert name in done.stderr
        assert not (tmp_path / "out").exists()
    write_csv(sample, ["id", "note", "pixels"], [[f"{stem}.png", "kept", "-"] for stem in list(truth)[:6]])
    succeed("infer.py", *flags, "--sample_submission", sample, "--threshold", 1)
    rows = list(csv.reader((tmp_path / "out" / "submission.csv").open()))
    assert [row[0] for row in rows] == ["id", *(f"{stem}.png" for stem in list(truth)[:6])]
    assert {row[1] for row in rows[1:]} == {"kept"}
    assert "-" in {row[2] for row in rows[1:]}, "an empty mask is written as the sample does"


def test_groups_stay_together_and_shares_are_even(tmp_path):
    masks = blobs(tmp_path / "train", 40)
    rows = [[stem, plain_encode(mask), f"patient{k % 7}"] for k, (stem, mask) in enumerate(masks.items())]
    write_csv(tmp_path / "train.csv", ["id", "rle_mask", "patient"], rows)
    samples = utils.survey(utils.find_samples(str(tmp_path), training=True))
    assert (samples.share > 0).sum() == 32
    assert samples.above[samples.share == 0].min() == 1
    samples["fold"] = utils.assign_folds(samples, Config(folds=5))
    empty = samples.assign(empty=samples.share == 0).groupby("fold")["empty"].sum()
    assert empty.max() - empty.min() <= 1
    samples["fold"] = utils.assign_folds(samples, Config(folds=5, group="patient"))
    patients = samples.assign(patient=[group["patient"] for group in samples.group]).groupby("patient").fold.nunique()
    assert (patients == 1).all()
    assert "--group" in refused_training(tmp_path, tmp_path, "--group", "hospital")


def test_scores_by_threshold_and_small_patches():
    rng = np.random.default_rng(0)
    truths = [rng.random((20, 30)) < share for share in (0.3, 0.5, 0)]
    maps = [np.clip(90 * truth + rng.normal(80, 40, truth.shape), 0, 255).astype(np.uint8) for truth in truths]
    counts = [utils.pixel_counts(p, t.astype(np.uint8)).numpy() for p, t in zip(maps, truths, strict=True)]
    for column, metric in enumerate(("dice", "iou")):
        found = utils.scores_by_threshold(counts, metric)
        for level in (0, 60, 128, 255):
            each = [
                utils.mask_scores(p >= level, t.astype(np.uint8))[column] for p, t in zip(maps, truths, strict=True)
            ]
            assert found[:, level] == pytest.approx(each)
    found = utils.scores_by_threshold(counts, "maxf")
    pooled = utils.scores(sum(counts))
    assert 100 * found.mean(0).max() == pytest.approx(pooled["MaxF"], abs=1e-3)
    assert found.mean(0).argmax() / 255 == pooled["threshold"]
    without = [utils.scores_by_threshold(counts[:k] + counts[k + 1 :], "maxf").mean(0)[128] for k in range(3)]
    order = np.argsort(found[:, 128])
    assert np.argsort(without).tolist() == order[::-1].tolist(), "who pulls F1 up lowers it by leaving"
    mask = np.zeros((9, 9), bool)
    mask[0, 0] = mask[4:7, 4:7] = True
    assert utils.drop_small(mask, 2).sum() == 9
    assert utils.drop_small(mask, 10).sum() == 0
    assert utils.drop_small(mask, 0).sum() == 10


def test_the_threshold_leaves_one_half_only_for_a_gain_that_is_no_luck():
    levels = np.arange(256)
    peak = 1 - np.abs(levels - 200) / 255
    tent = 1 - np.abs(levels - 100) / 255
    many = np.stack([peak + shift for shift in np.random.default_rng(0).normal(0, 0.1, 50)])
    assert utils.choose_threshold(many) == 200 / 255, "all pictures agree"
    lucky = np.stack([tent, tent, 4 * peak])
    assert lucky.mean(0).argmax() == 200
    assert abs(utils.choose_threshold(lucky) - 0.5) < 0.01, "one of three decides"
    assert utils.choose_threshold(peak[None]) == 200 / 255
    few = np.stack([peak, peak, peak, tent])
    assert few.mean(0).argmax() == 200
    assert abs(utils.choose_threshold(few) - 0.5) < 0.01, "within two standard errors"
    assert abs(utils.choose_threshold(np.ones((4, 256))) - 0.5) < 0.01, "all are equal"


# ---------------------------------------------------------------------------------------------------------------------
#  large pictures and videos

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
TILED = Config(height=32, width=48, tiles="true", top=0, tta=False, precision="32", **PLAIN)


@pytest.mark.parametrize("size", [(100, 130), (32, 48), (20, 30), (33, 200), (64, 10)])
def test_tiles_of_a_pointwise_model_blend_to_the_whole(size):
    """For a model that looks at single pixels, tiles must make no difference."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 1, 1)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    blended = infer.predict_tiles(utils.Trained(network, TILED, 0.5, {}), picture, 3, False)
    whole = network(utils.normalise(utils.to_tensor(picture)[None], TILED)).sigmoid()[0, 0]
    assert torch.allclose(blended, whole, atol=1e-5)


@pytest.mark.parametrize("size", [(100, 130), (32, 48), (20, 30), (33, 200)])
def test_tiles_cover_every_pixel(size):
    seen = np.zeros(size, bool)
    for overlap in (0, 0.25):
        for y, x in utils.tile_places(size, TILED, overlap):
            assert y >= 0
            assert x >= 0
            seen[y : y + 32, x : x + 48] = True
    assert seen.all()


def test_training_and_prediction_in_tiles(tmp_path):
    rng = np.random.default_rng(0)
    masks = blobs(tmp_path / "train", 6, size=(150, 200))
    write_csv(tmp_path / "train.csv", ["id", "rle_mask"], [[stem, plain_encode(mask)] for stem, mask in masks.items()])
    flags = ("--tiles", "true", "--height", 64, "--width", 64, "--epochs", 4, "--lr", 2e-3, *SMALL)
    succeed("train.py", "--data", tmp_path, "--out", tmp_path / "out", *flags)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["image"]["all"]["MaxF"] > 70
    large = tmp_path / "large.png"
    Image.fromarray(rng.integers(0, 90, (500, 700, 3), np.uint8)).save(large)
    succeed("infer.py", "--model", tmp_path / "out", "--data", large, "--out", tmp_path / "p")
    assert Image.open(tmp_path / "p" / "masks" / "large.png").size == (700, 500)


def test_pictures_over_two_megapixels_are_cut(tmp_path):
    import train

    Image.new("RGB", (2000, 1500)).save(tmp_path / "large.png")
    samples = utils.find_samples(str(tmp_path)).assign(fold=1, height=1500, width=2000, above=1.0)
    network = utils.build_model(Config(encoder="resnet18"))
    resolved = train.resolve(Config(encoder="resnet18", encoder_weights="none"), samples, network)
    assert resolved.tiles == "true"
    assert resolved.height * resolved.width < 400_000
    small = dataclasses.replace(resolved, tiles="false", top=-1, height=0, width=0)
    assert train.resolve(small, samples.assign(above=0.4), network).top == 0.35


@pytest.mark.parametrize(("precision", "usual"), [("32", 4), ("bf16-mixed", 8)])
def test_many_small_pictures_make_larger_batches_on_a_cpu(monkeypatch, precision, usual):
    import train

    monkeypatch.setattr(utils, "precision", lambda *_, **__: precision)
    monkeypatch.setattr(utils, "best_device", lambda: "cpu")
    network, cfg = utils.build_model(Config(encoder="resnet18")), Config(encoder="resnet18", encoder_weights="none")

    def batch(count, size):
        samples = pd.DataFrame({"fold": 1, "height": size, "width": size, "above": 1.0, "category": ""}, range(count))
        return train.resolve(cfg, samples, network).batch_size

    assert batch(4000, 64) == 16
    assert batch(4000, 512) == usual
    assert batch(30, 64) == usual, "few pictures: rather more steps"


def write_video(path, frames, size=(96, 64)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    for number in range(frames):
        writer.write(np.full((*size[::-1], 3), 10 * number % 256, np.uint8))
    writer.release()


def test_a_video_becomes_an_overlay(segmenter, tmp_path):
    write_video(tmp_path / "drive.mp4", 19)
    printed = succeed("infer.py", "--model", segmenter, "--data", tmp_path / "drive.mp4", "--out", tmp_path / "out")
    assert "19 frames" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["overlay.mp4"]
    video = cv2.VideoCapture(str(tmp_path / "out" / "overlay.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 19
    assert video.get(cv2.CAP_PROP_FPS) == 10
    assert video.read()[1].shape == (64, 96, 3)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "drive.mp4").read_bytes()[:300])
    for name in ("empty.mp4", "text.mp4", "cut.mp4"):
        done = run("infer.py", "--model", segmenter, "--data", tmp_path / name, "--out", tmp_path / "no")
        assert done.returncode == 2
        assert name in done.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "no").exists()
