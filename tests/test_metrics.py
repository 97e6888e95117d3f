"""The KITTI Road measures beside a plain implementation of their definition."""

import numpy as np
import pytest

import utils


def by_definition(probability, truth):
    """The measures straight from the paper: a loop over the thresholds, pixels as booleans."""
    p, road = probability[truth != 255] / 255, truth[truth != 255] == 1
    points = []
    for t in np.arange(256) / 255:
        tp, fp, fn = ((p >= t) & road).sum(), ((p >= t) & ~road).sum(), ((p < t) & road).sum()
        points.append(
            (tp / (tp + fp) if tp else 0, tp / (tp + fn), tp / (tp + fp + fn), fp / max(1, (~road).sum()), tp)
        )
    f1 = [2 * pre * rec / (pre + rec) if tp else 0 for pre, rec, _, _, tp in points]
    best = int(np.argmax(f1))
    ap = np.mean(
        [
            max([pre for pre, rec, _, _, tp in points if rec >= level and tp], default=0)
            for level in np.arange(0, 1.1, 0.1)
        ]
    )
    pre, rec, iou, fpr, _ = points[best]
    return {
        "MaxF": f1[best],
        "AP": ap,
        "PRE": pre,
        "REC": rec,
        "IoU": iou,
        "FPR": fpr,
        "FNR": 1 - rec,
        "IoU50": points[128][2],
    }


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_definition(seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice(np.uint8([0, 1, 255]), (40, 60), p=(0.6, 0.3, 0.1))
    probability = np.clip(rng.normal(90 + 80 * (truth == 1), 50), 0, 255).astype(np.uint8)
    found = utils.scores(utils.pixel_counts(probability, truth))
    for name, value in by_definition(probability, truth).items():
        assert found[name] == pytest.approx(100 * value, abs=1e-3), name
    assert found["F1"] == found["MaxF"]


def test_counts_pool_over_pictures():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 256, (20, n), np.uint8), rng.choice(np.uint8([0, 1, 255]), (20, n))) for n in (5, 30)]
    pooled = sum(utils.pixel_counts(p, t) for p, t in pairs)
    joined = utils.pixel_counts(np.hstack([p for p, _ in pairs]), np.hstack([t for _, t in pairs]))
    assert (pooled == joined).all()
    board = utils.Scoreboard()
    for name, (p, t) in zip(("um_road", "uu_road"), pairs, strict=True):
        board.add(name, utils.pixel_counts(p, t))
    report = board.report()
    assert report["all"]["images"] == 2
    assert report["uu_road"]["images"] == 1
    assert report["all"]["MaxF"] == utils.scores(joined)["MaxF"]


def test_every_threshold_takes_its_own_level_in():
    levels = np.arange(256)
    assert all((utils.to_mask(levels, k / 255) == (levels >= k)).all() for k in range(256))


@pytest.mark.parametrize(("probability", "truth", "expected"), [
    (0, 0, {"MaxF": 0, "AP": 0, "threshold": 128 / 255}),  # no road at all
    (200, 0, {"MaxF": 0, "IoU": 0, "threshold": 128 / 255}),
    (200, 1, {"MaxF": 100, "AP": 100, "FNR": 0, "FPR": 0}),  # all road
    (200, 255, {"MaxF": 0, "AP": 0, "threshold": 128 / 255}),  # nothing valid
])  # fmt: skip
def test_degenerate_cases_are_defined(probability, truth, expected):
    found = utils.scores(utils.pixel_counts(np.full((4, 4), probability, np.uint8), np.full((4, 4), truth, np.uint8)))
    assert all(np.isfinite(value) for value in found.values())
    assert {name: found[name] for name in expected} == expected
