"""The KITTI Road measures beside a plain implementation of their definition."""

import numpy as np
import pytest
import torch

import train
import utils
from utils import Config


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
    found = utils.scores(utils.pixel_counts(probability, truth).numpy())
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
        board.add(name, {"image": utils.pixel_counts(p, t)})
    report = board.report()["image"]
    assert report["all"]["images"] == 2
    assert report["uu_road"]["images"] == 1
    assert report["all"]["MaxF"] == utils.scores(joined.numpy())["MaxF"]


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
    counts = utils.pixel_counts(np.full((4, 4), probability, np.uint8), np.full((4, 4), truth, np.uint8))
    found = utils.scores(counts.numpy())
    assert all(np.isfinite(value) for value in found.values())
    assert {name: found[name] for name in expected} == expected


# ---------------------------------------------------------------------------------------------------------------------
#  bird's-eye view

CALIBRATION = """P0: 1 0 0 0 0 1 0 0 0 0 1 0
P2: 721.5377 0 609.5593 44.85728 0 721.5377 172.854 0.2163791 0 0 1 0.002745884
R0_rect: 0.9999239 0.00983776 -0.007445048 -0.009869795 0.9999421 -0.004278459 0.007402527 0.004351614 0.9999631
Tr_cam_to_road: 0.99995 -0.0055 -0.00745 0.0096 0.005425 0.99993 -0.0111 -1.6 0.0075 0.011 0.9999 -0.27
"""


@pytest.fixture
def calib(tmp_path):
    (tmp_path / "um_000000.txt").write_text(CALIBRATION)
    return str(tmp_path / "um_000000.txt")


def test_each_cell_of_the_ground_shows_its_own_pixel(calib):
    """Beside a plain projection of single ground points, point by point, in the words of the definition."""
    size = (375, 1242)
    cells = utils.bev_cells(calib, size)
    assert cells.shape == (800, 400)
    lines = dict(line.split(": ") for line in CALIBRATION.splitlines())
    p2, to_road = (np.array(lines[name].split(), float).reshape(3, 4) for name in ("P2", "Tr_cam_to_road"))
    rectify = np.array(lines["R0_rect"].split(), float).reshape(3, 3)
    rng = np.random.default_rng(0)
    seen = 0
    for row, column in rng.integers(0, (800, 400), (500, 2)):
        ground = np.array([-10 + 0.05 * (column + 0.5), 0, 46 - 0.05 * (row + 0.5)])
        camera = np.linalg.solve(to_road[:, :3], ground - to_road[:, 3])  # the road's coordinates to the camera's
        u, v, depth = p2 @ [*(rectify @ camera), 1]
        u, v = int(np.floor(u / depth)), int(np.floor(v / depth))  # counted from 1
        inside = 1 <= u <= size[1] and 1 <= v <= size[0]
        assert cells[row, column] == ((v - 1) * size[1] + u - 1 if inside else -1)
        seen += inside
    assert 300 < seen < 500, "some of the ground lies outside the picture"


def test_the_road_from_above_stands_upright(calib):
    """The picture's left is the left above, its bottom is the bottom; outside nothing is valid."""
    cells = utils.bev_cells(calib, (375, 1242))
    across = np.broadcast_to(np.linspace(0, 255, 1242).astype(np.uint8), (375, 1242))
    down = np.broadcast_to(np.linspace(0, 255, 375).astype(np.uint8)[:, None], (375, 1242))
    assert (np.diff(utils.to_bev(across, cells)[300, 100:300].astype(int)) >= 0).all()
    assert (np.diff(utils.to_bev(down, cells)[:600, 200].astype(int)) >= 0).all()
    truth = utils.to_bev(np.ones((375, 1242), np.uint8), cells, utils.IGNORE)
    assert ((truth == utils.IGNORE) == (cells < 0)).all()
    assert utils.to_bev(np.zeros((375, 1242, 3), np.uint8), cells).shape == (800, 400, 3)


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


@pytest.mark.parametrize("broken", DAMAGED)
def test_damaged_calibrations_are_named(tmp_path, broken):
    path = tmp_path / "um_000001.txt"
    path.write_text(broken, encoding="latin-1")
    with pytest.raises(utils.UserError, match="um_000001.txt"):
        utils.read_calibration(str(path))


@pytest.mark.parametrize("arch", ["Unet", "FPN", "Segformer", "DeepLabV3Plus"])
def test_softened_logits_are_the_same_divided(arch):
    torch.manual_seed(0)
    network = utils.build_model(Config(arch=arch, encoder="resnet18")).eval()
    picture = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        whole, soft = network(picture), train.softened(network)(picture)
        assert torch.equal(whole, network(picture)), "the model that goes on training is unchanged"
    assert (soft - whole / train.SOFT).abs().max() < 1e-6
