"""The KITTI Road measures compared with a plain implementation of their definition."""

import itertools
import json

import numpy as np
import pytest
import torch

import utils
from kit.config import IGNORE, Classes, ModelConfig
from kit.data import images
from kit.data.kitti import BirdsEyeView, bev_cells, read_calibration
from kit.errors import UserError
from kit.network.model import TrainedModel, build_network
from kit.results import metrics, predict, tuning


def by_definition(probability, truth):
    """The measures straight from the paper: a loop over the thresholds, pixels as booleans."""
    p, road = probability[truth != 255] / 255, truth[truth != 255] == 1
    points = []
    for t in np.arange(256) / 255:
        tp, fp, fn = ((p >= t) & road).sum(), ((p >= t) & ~road).sum(), ((p < t) & road).sum()
        precision, recall = tp / (tp + fp) if tp else 0, tp / (tp + fn)
        points.append((precision, recall, tp / (tp + fp + fn), fp / max(1, (~road).sum()), tp))
    f1 = [2 * pre * rec / (pre + rec) if tp else 0 for pre, rec, _, _, tp in points]
    best = int(np.argmax(f1))
    reached = []
    for level in np.arange(0, 1.1, 0.1):
        above = [precision for precision, recall, _, _, tp in points if recall >= level and tp]
        reached.append(max(above, default=0))
    pre, rec, iou, fpr, _ = points[best]
    return {
        "MaxF": f1[best],
        "AP": np.mean(reached),
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
    scores = metrics.scores(metrics.pixel_counts(probability, truth).numpy())
    for name, value in by_definition(probability, truth).items():
        assert scores[name] == pytest.approx(100 * value, abs=1e-3), name
    assert scores["F1"] == scores["MaxF"]


NUMBERS = itertools.count()


class Sample:
    """A row of the samples table, as far as `Evaluation` looks at it."""

    def __init__(self, category="", views=()):
        self.id, self.category, self.views = "", category, views
        self.image_id = next(NUMBERS)


def random_pairs(widths):
    """Probabilities (20, n) uint8 with ground truths of 0, 1 and 255."""
    rng = np.random.default_rng(0)
    truths = np.uint8([0, 1, 255])
    return [(rng.integers(0, 256, (20, n), np.uint8), rng.choice(truths, (20, n))) for n in widths]


def test_counts_pool_over_images():
    pairs = random_pairs((5, 30))
    pooled = sum(metrics.pixel_counts(p, t) for p, t in pairs)
    joined = metrics.pixel_counts(
        np.hstack([p for p, _ in pairs]), np.hstack([t for _, t in pairs])
    )
    assert (pooled == joined).all()
    evaluation = metrics.Evaluation(Classes())
    for category, (p, t) in zip(("um_road", "uu_road"), pairs, strict=True):
        evaluation.add(Sample(category), p[None], p[None] >= 128, t[None])
    report = evaluation.report()["image"]
    assert report["all"]["images"] == 2
    assert report["uu_road"]["images"] == 1
    assert report["all"]["MaxF"] == metrics.scores(joined.numpy())["MaxF"]


def test_an_evaluation_of_parts_merges_into_the_whole(tmp_path):
    """Each process of infer.py fills one of its own."""
    categories = ("um_road", "uu_road", "", "um_road")
    whole, *parts = (metrics.Evaluation(Classes()) for _ in range(4))
    for index, (p, t) in enumerate(random_pairs((5, 30, 8, 9))):
        for evaluation in (whole, parts[index % 2]):  # the third has no image
            evaluation.add(Sample(categories[index]), p[None], p[None] >= 128, t[None])
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].report() == whole.report()
    hits = [sorted(map(np.ndarray.tolist, one.image_hits)) for one in (parts[0], whole)]
    assert hits[0] == hits[1]
    assert parts[0].mean() == whole.mean()
    written = []
    for name, evaluation in (("parts", parts[0]), ("whole", whole)):
        (tmp_path / name).mkdir()
        evaluation.write(tmp_path / name, (0.5,))
        written.append(json.loads((tmp_path / name / "metrics.json").read_text()))
        assert (tmp_path / name / "pr_curve.png").stat().st_size > 5000
    assert written[0] == written[1]
    assert set(written[0]) == {"threshold", "mean", "image"}
    assert set(written[0]["image"]) == {"all", "um_road", "uu_road"}
    names = {"MaxF", "AP", "PRE", "REC", "FPR", "FNR", "IoU", "F1", "IoU50", "images"}
    assert all(names <= set(block) for block in written[0]["image"].values())


@pytest.mark.parametrize("exclusive", [False, True])
def test_images_that_are_ignored_as_a_whole_are_in_no_mean(exclusive):
    classes = Classes(("a", "b"), ("0", "1"), exclusive)
    truth = np.uint8([[0, 1, 1, 1]]) if exclusive else np.uint8([[[1, 1, 0, 0]], [[0, 1, 0, 0]]])
    mask = np.uint8([[0, 0, 1, 1]]) if exclusive else truth[::-1] == 1
    planes = np.stack([mask, 0 * mask]) if exclusive else np.uint8(255 * mask)
    evaluations = [metrics.Evaluation(classes) for _ in range(2)]
    for evaluation in evaluations:
        evaluation.add(Sample(), planes, mask, truth)
    evaluations[1].add(Sample(), planes, mask, np.full_like(truth, IGNORE))
    assert evaluations[1].mean() == evaluations[0].mean()
    assert evaluations[1].mean()["Dice"] < 100
    assert "1 image is ignored as a whole, not in the means" in evaluations[1].summary()
    assert "ignored" not in evaluations[0].summary()
    assert np.isnan(utils.score(np.ones((2, 2)), np.full((2, 2), IGNORE))["Dice"])


def test_ignored_images_choose_no_threshold():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (5, 2, 256))
    ignored = np.concatenate([counts, np.zeros_like(counts[:2])])
    for metric in ("dice", "iou"):
        values = tuning.scores_by_threshold(ignored, metric)
        assert np.allclose(values.mean(0), tuning.scores_by_threshold(counts, metric).mean(0))


def test_every_threshold_takes_its_own_level_in():
    levels = np.arange(256)[None, None]
    for k in range(256):
        mean = float(np.mean([k / 255] * 3))  # of three models: may be a rounding error above
        for threshold in (k / 255, mean):
            config = ModelConfig(thresholds=(threshold,))
            assert (predict.postprocess(levels, config) == (levels >= k)).all()


def test_postprocess_applies_the_threshold_before_the_minimum_area():
    probability = np.zeros((1, 9, 9), np.uint8)
    probability[0, 1:4, 1:4] = 60  # one component of 9 pixels, of which 4 reach 0.4
    probability[0, 2:4, 2:4] = 120
    probability[0, 6, 6:9] = 250  # 3 pixels
    for area, pixels in ((0, 7), (3, 7), (4, 4), (5, 0)):
        mask = predict.postprocess(probability, ModelConfig(thresholds=(0.4,), areas=(area,)))
        assert (mask.shape, mask.dtype, mask.sum()) == ((1, 9, 9), bool, pixels), area
    config = ModelConfig(thresholds=(0.2,), areas=(9,))
    assert predict.postprocess(probability, config).sum() == 9


@pytest.mark.parametrize(("probability", "truth", "expected"), [
    (0, 0, {"MaxF": 0, "AP": 0, "threshold": 128 / 255}),  # no road at all
    (200, 0, {"MaxF": 0, "IoU": 0, "threshold": 128 / 255}),
    (200, 1, {"MaxF": 100, "AP": 100, "FNR": 0, "FPR": 0}),  # all road
    (200, 255, {"MaxF": 0, "AP": 0, "threshold": 128 / 255}),  # all ignored
])  # fmt: skip
def test_degenerate_cases_are_defined(probability, truth, expected):
    full = [np.full((4, 4), value, np.uint8) for value in (probability, truth)]
    scores = metrics.scores(metrics.pixel_counts(*full).numpy())
    assert all(np.isfinite(value) for value in scores.values())
    assert {name: scores[name] for name in expected} == expected


# --------------------------------------------------------------------------------------------------
#  Bird's-eye view
# --------------------------------------------------------------------------------------------------

CALIBRATION = """P0: 1 0 0 0 0 1 0 0 0 0 1 0
P2: 721.5377 0 609.5593 44.85728 0 721.5377 172.854 0.2163791 0 0 1 0.002745884
R0_rect: 0.999924 0.009838 -0.007445 -0.00987 0.999942 -0.004278 0.007403 0.004352 0.999963
Tr_cam_to_road: 0.99995 -0.0055 -0.00745 0.0096 0.0054 0.99993 -0.011 -1.6 0.0075 0.011 0.9999 -0.27
"""
SIZE = (375, 1242)


@pytest.fixture
def calibration(tmp_path):
    (tmp_path / "um_000000.txt").write_text(CALIBRATION)
    return tmp_path / "um_000000.txt"


def project(row, column):
    """A cell's point in the image, (u, v) counted from 1, in the words of the definition."""
    lines = dict(line.split(": ") for line in CALIBRATION.splitlines())
    matrices = [
        np.array(lines[name].split(), float) for name in ("P2", "R0_rect", "Tr_cam_to_road")
    ]
    p2, rectify, to_road = matrices[0].reshape(3, 4), matrices[1].reshape(3, 3), matrices[2]
    to_road = to_road.reshape(3, 4)
    ground = np.array([-10 + 0.05 * (column + 0.5), 0, 46 - 0.05 * (row + 0.5)])
    camera = np.linalg.solve(to_road[:, :3], ground - to_road[:, 3])
    u, v, depth = p2 @ [*(rectify @ camera), 1]
    return u / depth, v / depth


def expected_cell(row, column):
    """The flat index of the pixel that a cell shows; -1 where it is not inside the image."""
    u, v = project(row, column)
    if not (1 <= u <= SIZE[1] and 1 <= v <= SIZE[0]):
        return -1
    return (int(np.floor(v)) - 1) * SIZE[1] + int(np.floor(u)) - 1


def test_each_cell_of_the_ground_shows_its_own_pixel(calibration):
    """Compared with a plain projection of single ground points."""
    cells = bev_cells(calibration, SIZE)
    assert cells.shape == (800, 400)
    chosen = np.random.default_rng(0).integers(0, (800, 400), (500, 2))
    assert [cells[row, column] for row, column in chosen] == [expected_cell(*c) for c in chosen]
    inside = sum(cells[row, column] >= 0 for row, column in chosen)
    assert 300 < inside < 500, "some of the ground is outside the image"


def test_a_cell_is_inside_up_to_the_last_pixel_and_no_further(calibration):
    """1 <= u <= width and 1 <= v <= height, of the real numbers.

    Rounded down first, u and v up to width + 1 and height + 1 would count too: every cell on the
    edge is compared, and there are some between width and width + 1.
    """
    cells = bev_cells(calibration, SIZE)
    known = (cells >= 0).astype(int)
    edge = np.zeros(cells.shape, bool)
    edge[:, 1:] |= np.diff(known, axis=1) != 0
    edge[:, :-1] |= np.diff(known, axis=1) != 0
    edge[1:] |= np.diff(known, axis=0) != 0
    edge[:-1] |= np.diff(known, axis=0) != 0
    edge[-200:] = True  # near the camera, where the ground leaves the image at its bottom
    beyond = 0
    for row, column in np.argwhere(edge)[::3]:
        assert cells[row, column] == expected_cell(row, column), (row, column)
        u, v = project(row, column)
        beyond += SIZE[1] < u < SIZE[1] + 1 or SIZE[0] < v < SIZE[0] + 1
    assert beyond > 5


def test_the_birds_eye_view_is_upright(calibration):
    """The image's left is left, its bottom is the bottom; what is outside is ignored."""
    view = BirdsEyeView(calibration)
    view.check()
    across = np.broadcast_to(np.linspace(0, 255, SIZE[1]).astype(np.uint8), SIZE)
    down = np.broadcast_to(np.linspace(0, 255, SIZE[0]).astype(np.uint8)[:, None], SIZE)
    assert (np.diff(view.warp(across)[300, 100:300].astype(int)) >= 0).all()
    assert (np.diff(view.warp(down)[:600, 200].astype(int)) >= 0).all()
    truth = view.warp(np.ones(SIZE, np.uint8), IGNORE)
    assert ((truth == IGNORE) == (bev_cells(calibration, SIZE) < 0)).all()
    assert view.warp(np.zeros((*SIZE, 3), np.uint8)).shape == (800, 400, 3)


def test_an_evaluation_scores_each_view_of_an_image(calibration):
    rng = np.random.default_rng(0)
    probability = rng.integers(0, 256, SIZE, np.uint8)
    truth = rng.choice(np.uint8([0, 1, 255]), SIZE)
    view, evaluation = BirdsEyeView(calibration), metrics.Evaluation(Classes())
    sample, planes = Sample("um_road", (view,)), probability[None]
    evaluation.add(sample, planes, planes >= 128, truth[None])
    counts = metrics.pixel_counts(view.warp(probability), view.warp(truth, IGNORE))
    report = evaluation.report()
    assert report["bev"]["um_road"] == metrics.scores(counts.numpy()) | {"images": 1}
    assert report["bev"]["all"]["MaxF"] != report["image"]["all"]["MaxF"]


DAMAGED = [
    "",
    "P2: 1 2 3\n",
    "\x00\xff" * 50,
    CALIBRATION.replace("R0_rect", "R1"),
    CALIBRATION.replace("721", "x"),
    CALIBRATION.replace("0.99995", "nan"),
    CALIBRATION.split("Tr_cam")[0] + "Tr_cam_to_road:" + " 0" * 12,
    CALIBRATION.replace("721.5377", "0"),
]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_damaged_calibrations_are_named(tmp_path, damaged):
    path = tmp_path / "um_000001.txt"
    path.write_text(damaged, encoding="latin-1")
    with pytest.raises(UserError, match="um_000001.txt"):
        read_calibration(path)
    with pytest.raises(UserError, match="um_000001.txt"):
        BirdsEyeView(path).check()


# --------------------------------------------------------------------------------------------------
#  Temperature
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["Unet", "FPN", "Segformer", "DeepLabV3Plus"])
def test_the_temperature_divides_the_logits(arch):
    torch.manual_seed(0)
    shape = {"arch": arch, "encoder": "resnet18", "height": 64, "width": 96, "precision": "32"}
    network = build_network(ModelConfig(**shape)).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for temperature in (1.0, 2.0, 5.0):
        config = ModelConfig(**shape, temperature=temperature)
        with torch.inference_mode():
            logits = network(images.normalise(pixels, config))
        trained = TrainedModel(network, config, {}, {})
        probabilities = predict.predict_inputs(trained, pixels)
        assert (probabilities - (logits / temperature).sigmoid()).abs().max() < 1e-6
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name]), "the weights are unchanged"


def test_the_temperature_softens_and_keeps_the_mask_at_one_half():
    logits = torch.linspace(-9, 9, 1800).reshape(2, 1, 30, 30)  # none is 0
    configs = [ModelConfig(temperature=value) for value in (1.0, 3.0)]
    sharp, soft = (predict.to_probabilities(logits, config) for config in configs)
    assert sharp.shape == soft.shape == (2, 1, 30, 30)
    assert ((sharp >= 0.5) == (soft >= 0.5)).all()
    assert ((soft - 0.5).abs() < (sharp - 0.5).abs()).all()
    sure = logits > 4
    levels = [
        len(predict.to_prediction(one, config)[sure].unique())
        for one, config in zip((sharp, soft), configs, strict=True)
    ]
    assert levels[1] > 4 * levels[0], "8 bits tell nearly sure from sure"
    half = predict.to_probabilities(logits.half(), configs[1])
    assert half.dtype == torch.float32


def test_by_default_8_bits_tell_missed_foreground_from_background():
    """A missed road has logits about -9, background lower ones: the precision at full recall."""
    logits = torch.tensor([-9.0, -10.0, -12.0, -14.0, -16.0]).reshape(1, 1, 1, 5)
    [probabilities] = predict.to_probabilities(logits, ModelConfig())
    found = predict.to_prediction(probabilities, ModelConfig()).int()
    assert (found[0, 0].diff() < 0).all(), found
