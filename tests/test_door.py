"""The door for people's own cells, utils.py: what it gives is what infer.py writes."""

import numpy as np
import pytest
from conftest import KIT, succeed
from PIL import Image

import utils
from kit.errors import UserError


@pytest.fixture(scope="module")
def predictions(roads, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("door") / "predictions"
    succeed("infer.py", "--model", trained, "--data", roads / "training", "--out", out)
    return out


def test_a_model_predicts_a_path_or_an_array_as_infer_does(roads, trained, predictions):
    model = utils.load_model(trained)
    assert model.classes == ("foreground",)
    for path in sorted((roads / "training" / "image_2").glob("*.png"))[:3]:
        written = np.asarray(Image.open(predictions / "masks" / path.name)) == 255
        mask = model.predict(path)
        assert (mask.dtype, mask.shape) == (bool, written.shape)
        assert (mask != written).mean() < 1e-3, "batches of another size are rounded differently"
        assert (model.predict(utils.read_image(path)) == mask).all()
        assert (utils.load_model(trained / "model.pt").predict(path) == mask).all()


def test_scores_leave_out_ignored_pixels():
    mask, truth = np.zeros((4, 6), bool), np.zeros((4, 6), np.uint8)
    mask[:2], truth[1:3], truth[0] = True, 1, 255
    assert utils.score(mask, truth) == pytest.approx({"Dice": 2 * 6 / (6 + 12), "IoU": 6 / 12})


def test_runs_and_back():
    mask = np.random.default_rng(0).random((7, 5)) > 0.5
    assert (utils.rle_decode(utils.rle_encode(mask), mask.shape) == mask).all()
    assert utils.rle_encode(np.ones((2, 2), bool)) == "1 4"


def test_show_lays_the_mask_over_the_image():
    image, mask = np.full((8, 9, 3), 100, np.uint8), np.zeros((8, 9), bool)
    mask[2:4] = True
    drawn = np.asarray(utils.show(image, mask))
    assert (drawn[~mask] == 100).all()
    assert (drawn[mask][:, 1] > drawn[mask][:, 0]).all(), "green"
    labels = np.zeros((8, 9), np.uint8)
    labels[4:] = 1
    drawn = np.asarray(utils.show(image, labels, ("background", "car")))
    assert (drawn[:4] == 100).all()
    assert (drawn[4:] != 100).any(-1).all()
    planes = np.stack([mask, ~mask])
    for names in (("a", "b"), ()):
        assert (np.asarray(utils.show(image, planes, names)) != 100).any(-1).all()
    assert (np.asarray(utils.show(image, labels)) != 100).any(-1).all(), "no class is named"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model\.pt"):
        utils.load_model(tmp_path)


def test_the_door_names_what_it_gives():
    text = (KIT / "utils.py").read_text()
    assert sorted(utils.__all__) == [
        "load_model", "read_image", "rle_decode", "rle_encode", "score", "show",
    ]  # fmt: skip
    assert len(text.splitlines()) < 80
