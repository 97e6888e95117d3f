"""The competition's own metric, a file with Kaggle's signature."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, run, succeed

from kit.config import Classes, ModelConfig
from kit.errors import UserError
from kit.results import metric_file, metrics, tuning
from kit.results.predict import postprocess

DICE = """
import numpy as np
import pandas as pd


class ParticipantVisibleError(Exception):
    pass


def pixels(text):
    numbers = [] if pd.isna(text) else list(map(int, text.split()))
    runs = zip(numbers[::2], numbers[1::2], strict=True)
    return {pixel for start, length in runs for pixel in range(start, start + length)}


def score(solution: pd.DataFrame, submission: pd.DataFrame, row_id_column_name: str) -> float:
    if list(solution[row_id_column_name]) != list(submission[row_id_column_name]):
        raise ParticipantVisibleError("other ids")
    values = []
    for truth, found in zip(solution.iloc[:, -1], submission.iloc[:, -1], strict=True):
        truth, found = pixels(truth), pixels(found)
        whole = len(truth) + len(found)
        values.append(2 * len(truth & found) / whole if whole else 1.0)
    return float(np.mean(values))
"""


@pytest.fixture
def dice(tmp_path):
    path = tmp_path / "dice.py"
    path.write_text(DICE)
    return path


def drawn(count, classes=1, seed=0, size=(24, 32)):
    """Predictions of discs, every third image empty."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    predictions = []
    for number in range(count):
        planes, targets = [], []
        for _ in range(classes):
            distance = np.hypot(y - rng.integers(4, 20), x - rng.integers(4, 28))
            target = (distance < rng.integers(3, 9)) & (number % 3 > 0)
            shifted = 255 / (1 + np.exp(distance - rng.integers(3, 9)))
            plane = shifted * (0.3 if number % 3 == 0 else 1) + rng.normal(0, 20, size)
            planes.append(plane.clip(0, 255).astype(np.uint8))
            targets.append(target.astype(np.uint8))
            targets[-1][:2] = 255 if number % 4 == 0 else targets[-1][:2]
        truth = np.stack(targets)
        mask = SimpleNamespace(read=lambda _, truth=truth: truth)
        sample = SimpleNamespace(id=f"{number:03}", image_id=f"{number:03}", mask=mask)
        sample.views, sample.category = [], ""
        predictions.append(tuning.Prediction(sample, np.stack(planes), config_of(classes), True))
    return predictions


def config_of(classes=1, **settings):
    names = ("foreground",) if classes == 1 else tuple("abc"[:classes])
    each = {"thresholds": (0.4,) * classes, "areas": (3,) * classes}
    return ModelConfig(class_names=names, class_values=names, **each, **settings)


@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_file_that_computes_dice_gives_the_kits_dice(dice, classes, order):
    predictions, config = drawn(12, classes), config_of(classes, rle=order)
    evaluation = metrics.Evaluation(config.classes)
    for prediction in predictions:
        mask = postprocess(prediction.planes, config)
        parts = (prediction.planes, mask, prediction.ground_truth)
        evaluation.add(prediction.sample, *parts)
    metric = metric_file.find_metric(str(dice))
    score = metric_file.score_predictions(metric, predictions, config)
    assert 100 * score == pytest.approx(evaluation.mean()["Dice"], abs=1e-4)  # which is rounded
    hits = [metrics.count_hits(postprocess(p.planes, config), p.ground_truth) for p in predictions]
    exact = np.mean([metrics.mask_scores(each)[:, 0] for each in hits])
    assert score == pytest.approx(exact, abs=1e-9)


def test_of_exclusive_classes_each_has_a_row(dice):
    config = ModelConfig(
        class_names=("sky", "road"),
        class_values=("0", "7"),
        exclusive=True,
        thresholds=(),
        areas=(),
    )
    truth, found = np.zeros((4, 6), np.uint8), np.zeros((2, 4, 6), np.uint8)
    truth[2:], truth[0, 0], found[0, 1:] = 1, 255, 1
    mask = SimpleNamespace(read=lambda _: truth)
    sample = SimpleNamespace(id="a", image_id="a", mask=mask)
    predictions = [tuning.Prediction(sample, found, config, True)]
    metric = metric_file.find_metric(str(dice))
    metric_file.try_out(metric, config.classes)
    score = metric_file.score_predictions(metric, predictions, config)
    assert score == pytest.approx((2 * 5 / (11 + 5) + 2 * 12 / (12 + 18)) / 2)


def test_the_tables_have_the_form_of_the_submission():
    rows = [("1", "a", "1 3"), ("1", "b", ""), ("2", "a", "")]
    solution = metric_file.make_solution(rows, Classes(("a", "b"), ("a", "b")))
    assert list(solution.columns) == ["ImageId", "ClassId", "EncodedPixels"]
    assert solution.ImageId.tolist() == [1, 1, 2], "as pandas reads them"
    assert solution.EncodedPixels.isna().tolist() == [False, True, True]
    submission = metric_file.with_masks(solution, ["", "4 5"])
    assert submission.EncodedPixels.fillna("").tolist() == ["", "4 5", ""]
    assert submission.ImageId.equals(solution.ImageId)
    one = metric_file.make_solution(rows[:1], Classes())
    assert list(one.columns) == ["id", "rle_mask"]


WRONG = {
    "no_score.py": ("def score_(a, b, c): return 1", "has no function score"),
    "broken.py": ("import no_such_module", "cannot be imported (ModuleNotFoundError: No module"),
    "syntax.py": ("def score(:", "cannot be imported (SyntaxError"),
    "raises.py": (
        "def score(solution, submission, row_id_column_name): raise KeyError('height')",
        "raises KeyError: 'height'",
    ),
    "quits.py": ("def score(a, b, c): raise SystemExit(3)", "raises SystemExit: 3"),
    "nan.py": ("def score(a, b, c): return float('nan')", "its score is nan"),
    "text.py": ("def score(a, b, c): return 'good'", "raises ValueError"),
    "few.py": ("def score(a): return 1", "raises TypeError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_before_the_training(roads, tmp_path, name):
    content, message = WRONG[name]
    (tmp_path / name).write_text(content)
    flags = ("--data", roads, "--out", tmp_path / "out", "--metric", tmp_path / name, *TINY)
    done = run("train.py", *flags, "--epochs", 1)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: --metric {tmp_path / name}: {message}"), last
    assert not (tmp_path / "out").exists()


def test_a_metric_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="--metric mcc: takes auto, maxf, dice, iou, miou or a file"
    ):
        metric_file.find_metric("mcc")
    with pytest.raises(UserError, match=r"--metric gone\.py: no such file"):
        metric_file.find_metric("gone.py")
    assert metric_file.find_metric("dice") is None


# --------------------------------------------------------------------------------------------------
#  What it decides
# --------------------------------------------------------------------------------------------------

POOLED = DICE.replace(
    "values.append(2 * len(truth & found) / whole if whole else 1.0)",
    "values.append((2 * len(truth & found), whole))",
).replace("float(np.mean(values))", "sum(v for v, _ in values) / max(1, sum(w for _, w in values))")


def judges(path, predictions, config):
    """The kit's judge of Dice, and that of a file."""
    goal = tuning.Goal("dice", file=metric_file.find_metric(str(path)))
    judge = tuning.Judge(predictions, config, goal)
    return judge, metric_file.FileJudge(judge, goal.file, config, tuning.choose_threshold)


def test_the_values_of_a_file_that_computes_dice_are_the_kits(dice):
    predictions, config = drawn(20, 2), config_of(2)
    judge, own = judges(dice, predictions, config)
    for k in range(2):
        curves = own.by_threshold(k)
        expected = judge.by_threshold(k)
        assert curves.shape == (20, 256)
        for level in metric_file.LEVELS:
            assert curves[:, level] == pytest.approx(expected[:, level], abs=1e-9)
        assert own.of_empty(k) == pytest.approx(judge.of_empty(k))
        assert np.array_equal(own.pixels(k), judge.pixels(k))
        assert own.of(config, k) == pytest.approx(judge.of(config, k), abs=1e-9)
    tuned = tuning.tune(predictions, config, judge.goal)
    assert tuned == tuning.tune(predictions, config, tuning.Goal("dice"))


def test_a_score_over_all_pixels_has_groups_of_images_as_values(tmp_path):
    path = tmp_path / "pooled.py"
    path.write_text(POOLED)
    predictions, config = drawn(24), config_of()
    _, own = judges(path, predictions, config)
    assert own.by_threshold(0).shape == own.of(config, 0)[:, None].shape[:1] + (256,)
    assert len(own.of(config, 0)) == metric_file.GROUPS
    tuned = tuning.tune(predictions, config, own.goal)
    assert tuned.presence_levels == ()


def test_the_metric_of_a_training_is_printed_and_kept(dice, roads, tmp_path):
    flags = ("--data", roads, "--epochs", 2, "--seed", 3, *TINY, "--out")
    succeed("train.py", *flags, tmp_path / "kit", "--metric", "dice")
    printed = succeed("train.py", *flags, tmp_path / "file", "--metric", dice)
    scores = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("kit", "file")]
    block = scores[1].pop("metric")
    assert scores[0] == scores[1], "the same threshold, and so on"
    assert block["name"] == "dice.py"
    assert 100 * block["score"] == pytest.approx(scores[0]["mean"]["Dice"], abs=1e-4)
    assert f"dice.py: {block['score']:.6g}" in printed
    trained = succeed(
        "train.py", "--compare", tmp_path / "kit", tmp_path / "file", "--out", tmp_path
    )
    assert "dice.py" in trained
    table = pd.read_csv(tmp_path / "runs.csv").set_index("run")["dice.py"]
    assert table[str(tmp_path / "file")] == pytest.approx(block["score"], abs=1e-5)
    assert np.isnan(table[str(tmp_path / "kit")])


def test_a_metric_that_fails_at_the_end_does_not_lose_the_training(roads, tmp_path):
    path = tmp_path / "late.py"
    raises = "    if len(solution) > 2:\n        raise ParticipantVisibleError('too many rows')\n"
    path.write_text(DICE.replace("    values = []\n", f"    values = []\n{raises}"))
    flags = ("--data", roads, "--epochs", 1, *TINY, "--out", tmp_path / "out")
    done = run("train.py", *flags, "--metric", path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: --metric {path}: raises ParticipantVisibleError: too many rows")
    assert "model.pt is tuned for Dice" in last
    assert (tmp_path / "out" / "model.pt").exists()
    path.write_text(DICE)
    assert "late.py: " in succeed("train.py", *flags, "--metric", path)
