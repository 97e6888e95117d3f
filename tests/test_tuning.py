"""What makes masks is tuned on held-out images, and kept only where it helps beyond chance."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from kit.config import SYMMETRIES, ModelConfig, symmetries_to_try
from kit.network.model import TrainedModel
from kit.results import oof, predict, tuning

CONFIG = ModelConfig(height=32, width=32, precision="32")
DICE = tuning.Goal("dice")


def predictions_of(pairs, config=CONFIG):
    """Predictions as validation makes them; pairs of probabilities and ground truth, uint8."""
    made = []
    for number, (planes, truth) in enumerate(pairs):
        planes, truth = (np.atleast_3d(a.T).T for a in (planes, truth))  # (h, w) is one plane
        mask = SimpleNamespace(read=lambda _, truth=truth: truth)
        sample = SimpleNamespace(image_id=str(number), mask=mask)
        made.append(tuning.Prediction(sample, planes, config, True))
    return made


def disc(size=64, radius=14, at=(32, 32)):
    return cv2.circle(np.zeros((size, size), np.uint8), at, radius, 1, -1)


def mean_dice(predictions, config):
    values = []
    for prediction in predictions:
        mask, truth = predict.postprocess(prediction.planes, config)[0], prediction.ground_truth[0]
        both, either = (mask & (truth == 1)).sum(), mask.sum() + truth.sum()
        values.append(1.0 if not either else 2 * both / either)
    return np.mean(values)


def blurred(truth):
    """Probabilities whose masks from 0.5 on are the ground truth, but for single pixels."""
    return (60 + 130 * cv2.GaussianBlur(truth.astype(np.float32), (0, 0), 1.5)).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
#  Cleaning
# --------------------------------------------------------------------------------------------------


def test_each_step_does_what_its_name_says():
    mask = disc() == 1
    ring = mask & ~(disc(radius=5) == 1)
    dots = mask.copy()
    dots[2, 2] = dots[60, 5] = True
    dented = mask.copy()
    dented[32, 20:30] = False

    def cleaned(mask, plan):
        config = replace(CONFIG, plans=(plan,))
        return predict.postprocess(mask[None].astype(np.uint8) * 255, config)[0]

    assert (cleaned(ring, "fill") == mask).all()
    assert (cleaned(dots, "largest") == mask).all()
    assert not cleaned(dots, "open 3")[[2, 60], [2, 5]].any()
    assert cleaned(dented, "close 3")[32, 25]
    assert (cleaned(ring | dots, "fill, largest") == mask).all(), "in this order"
    assert not cleaned(np.zeros_like(mask), "fill, largest, open 3").any()


def test_what_helps_is_kept_and_nothing_else():
    rng = np.random.default_rng(0)
    holes, clean = [], []
    for _ in range(20):
        truth = disc(at=tuple(int(c) for c in rng.integers(24, 40, 2)))
        plane = blurred(truth)
        clean.append((plane, truth))
        y, x = (int(c.mean()) for c in np.nonzero(truth))
        pierced = plane.copy()
        pierced[y - 5 : y + 5, x - 5 : x + 5] = 40
        holes.append((pierced, truth))
    pierced, whole = predictions_of(holes), predictions_of(clean)
    found = tuning.tune(pierced, CONFIG, DICE)
    assert found.plans == ("fill",)
    assert mean_dice(pierced, found) > mean_dice(pierced, CONFIG) + 0.02
    found = tuning.tune(whole, CONFIG, DICE)
    assert mean_dice(whole, found) >= mean_dice(whole, CONFIG)
    assert "fill" not in "".join(found.plans)
    assert found.areas == (0,)
    assert tuning.tune(pierced, CONFIG, tuning.Goal("maxf")).plans == ()


def test_small_components_go_only_where_many_images_have_them():
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(20):
        truth = disc()
        plane = blurred(truth)
        for y, x in rng.integers(2, 12, (3, 2)):
            plane[y : y + 2, x : x + 2] = 250
        pairs.append((plane, truth))
    many = predictions_of(pairs)
    found = tuning.tune(many, CONFIG, DICE)
    assert found.areas[0] or found.plans
    assert mean_dice(many, found) > mean_dice(many, replace(CONFIG, thresholds=found.thresholds))
    quiet = [(blurred(truth), truth) for _, truth in pairs[1:]]
    few = predictions_of([pairs[0], *quiet])
    found = tuning.tune(few, CONFIG, DICE)
    assert (found.areas, found.plans) == ((0,), ()), "one image of twenty"
    assert tuning.tune(many, CONFIG, tuning.Goal("dice", 7)).areas == (7,), "the user's"


# --------------------------------------------------------------------------------------------------
#  Empty masks
# --------------------------------------------------------------------------------------------------


def with_empty_images(rng, count=60, sure=230):
    """Two of five images are empty, with a pale patch that a threshold alone takes for a mask."""
    pairs = []
    for number in range(count):
        truth = disc(radius=10) * (number % 5 > 1)
        # the mask's outer part is as pale as the patch; only its middle is sure
        plane = 40 + 100 * disc(radius=10).astype(float)
        if truth.any():
            plane += (sure - 140) * disc(radius=5)
        else:
            plane -= 5
        pairs.append((np.clip(plane + rng.normal(0, 4, plane.shape), 0, 255).astype("u1"), truth))
    return predictions_of(pairs)


def test_empty_masks_are_told_by_pixels_that_are_sure():
    predictions = with_empty_images(np.random.default_rng(0))
    alone = replace(CONFIG, thresholds=tuning.tune(predictions, CONFIG, DICE).thresholds)
    found = tuning.tune(predictions, CONFIG, DICE)
    assert found.presence_areas[0] > 0
    assert mean_dice(predictions, found) > 0.99 > 0.9 > mean_dice(predictions, alone)
    fresh = with_empty_images(np.random.default_rng(9))
    assert mean_dice(fresh, found) > 0.99, "images that it was not tuned on"
    text = predict.describe_masks(found)
    assert f"empty unless {found.presence_areas[0]} pixels reach" in text


def test_without_empty_images_or_a_gain_nothing_decides_on_empty_masks():
    rng = np.random.default_rng(2)
    full = predictions_of([(blurred(disc()), disc()) for _ in range(20)])
    assert tuning.tune(full, CONFIG, DICE).presence_areas == ()
    chance = []
    for number in range(40):  # the probabilities say nothing about which are empty
        truth = disc() * (number % 5 > 1)
        chance.append((rng.integers(0, 256, truth.shape).astype(np.uint8), truth))
    found = tuning.tune(predictions_of(chance), CONFIG, DICE)
    tuned = mean_dice(predictions_of(chance), found)
    assert tuned <= 0.45, "all empty is right in two of five"


def test_every_class_decides_by_itself():
    rng = np.random.default_rng(3)
    names = {"class_names": ("a", "b"), "class_values": ("1", "2")}
    two = replace(CONFIG, **names, thresholds=(0.5, 0.5), areas=(0, 0))
    one = with_empty_images(rng)
    pairs = []
    for prediction in one:
        truth = disc()
        planes = np.stack([prediction.planes[0], blurred(truth)])
        pairs.append((planes, np.stack([prediction.ground_truth[0], truth])))
    found = tuning.tune(predictions_of(pairs, two), two, DICE)
    assert found.presence_areas[0] > 0 == found.presence_areas[1]
    masks = predict.postprocess(pairs[0][0], found)
    assert not masks[0].any() and masks[1].any()


def test_models_that_are_averaged_share_their_decisions():
    def averaged(*configs):
        models = [TrainedModel(torch.nn.Identity(), config, {}, {}) for config in configs]
        return predict.ensemble_config(models)

    gate = {"presence_levels": (0.6,), "presence_areas": (10,), "plans": ("fill",)}
    other = {"presence_levels": (0.8,), "presence_areas": (20,), "plans": ("fill",)}
    both = averaged(replace(CONFIG, **gate), replace(CONFIG, **other))
    assert (both.presence_levels, both.presence_areas, both.plans) == ((0.7,), (15,), ("fill",))
    half = averaged(replace(CONFIG, **gate), CONFIG)
    assert (half.presence_levels, half.presence_areas, half.plans) == ((), (), ())
    reduced = averaged(replace(CONFIG, **gate, scale=0.5))
    assert reduced.presence_areas == (40,), "in pixels of the images themselves"
    assert averaged(replace(CONFIG, plans=("open 3, fill",), scale=0.5)).plans == ("open 7, fill",)


def test_of_a_block_nothing_is_decided_that_only_the_whole_image_can_tell():
    whole = replace(CONFIG, presence_levels=(0.9,), presence_areas=(9,), plans=("fill, largest",))
    of_block = predict.of_blocks(whole)
    assert (of_block.presence_levels, of_block.presence_areas) == ((), ())
    assert of_block.plans == ("fill",)


@pytest.mark.parametrize(
    "values",
    [{"presence_levels": (0.5, 0.5)}, {"plans": ("", "")}, {"symmetries": ("x",)}],
)
def test_settings_of_another_number_of_classes_are_refused(values):
    with pytest.raises(ValueError, match="presence_levels|plans|symmetries"):
        ModelConfig(**values)


# --------------------------------------------------------------------------------------------------
#  Symmetries in TTA
# --------------------------------------------------------------------------------------------------


def test_all_symmetries_are_different_and_go_back():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    views = [predict.turned(image, name) for name in SYMMETRIES]
    assert len({(tuple(v.shape), tuple(v.flatten().tolist())) for v in [image, *views]}) == 8
    for name, view in zip(SYMMETRIES, views, strict=True):
        assert (predict.turned(view, name, back=True) == image).all()
    assert symmetries_to_try(True, 0, 32, 32) == SYMMETRIES
    assert symmetries_to_try(True, 0, 32, 64) == ("h", "v", "180"), "turned, it has another size"
    assert symmetries_to_try(True, 3, 32, 32) == symmetries_to_try(False, 0, 32, 32) == ()


class Shifted(torch.nn.Module):
    """Finds bright pixels, `shift` pixels to the right of them, with noise of its own."""

    def __init__(self, shift, noise):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shift, self.noise = shift, noise

    def forward(self, images):
        found = images[:, :1].roll(self.shift, -1)
        rng = torch.Generator().manual_seed(0)
        return found * 4 - 2 + self.noise * torch.randn(found.shape, generator=rng)


def chosen_by(monkeypatch, network, count=12):
    """The symmetries that are kept for a network, and the table."""
    rng = np.random.default_rng(0)
    config = replace(CONFIG, mean=(0.5,) * 3, std=(0.5,) * 3)
    truths = [disc(32, 7, tuple(int(c) for c in rng.integers(10, 22, 2))) for _ in range(count)]
    images = [np.repeat(truth[..., None], 3, 2) * np.uint8(255) for truth in truths]
    shift = getattr(network, "shift", 0)

    def predict_rows(models, table):
        for row in table.itertuples():
            prediction = predict.predict_images(models, [images[row.number]], 1)[0]
            yield row, images[row.number], prediction

    monkeypatch.setattr(tuning, "predict", predict_rows)
    masks = [
        SimpleNamespace(read=lambda _, t=t: np.roll(t, shift, 1)[None].astype(np.uint8))
        for t in truths
    ]
    numbers = range(len(truths))
    table = pd.DataFrame({"number": numbers, "image_id": map(str, numbers), "mask": masks})
    trained = TrainedModel(network, config, {}, {})
    return tuning.choose_symmetries(trained, table, DICE._replace(symmetries=SYMMETRIES))


def test_symmetries_that_average_noise_are_kept(monkeypatch):
    config, table = chosen_by(monkeypatch, Shifted(0, 1.5))
    assert config.symmetries == SYMMETRIES
    assert table.kept.all()
    assert (table.gain > 2 * table.error).all()
    assert oof.describe_symmetries(table).startswith("TTA: h v 180 90 270 h90 v90; each alone")
    few = table.assign(error=np.inf, kept=table.symmetry == "h")
    assert oof.describe_symmetries(few).startswith("TTA: h; the validation images are too few")


def test_shifted_masks_drop_their_flips(monkeypatch):
    config, table = chosen_by(monkeypatch, Shifted(4, 0))
    assert not {"h", "180"} & set(config.symmetries)
    assert table.set_index("symmetry").gain["h"] < -1


def test_without_a_difference_or_with_two_images_the_flip_stays(monkeypatch):
    assert chosen_by(monkeypatch, Shifted(0, 0))[0].symmetries == ("h",)
    assert chosen_by(monkeypatch, Shifted(0, 1.5), count=2)[0].symmetries == ("h",)


def test_what_helps_alone_and_harms_together_is_not_taken_together(monkeypatch):
    def plain_values(predictions, *_):
        symmetries = predictions[0].config.symmetries
        value = {(): 0.5, ("h",): 0.8, ("v",): 0.7}.get(symmetries, 0.6)
        return np.full(len(predictions), value)

    monkeypatch.setattr(tuning, "plain_values", plain_values)
    assert chosen_by(monkeypatch, Shifted(0, 0))[0].symmetries == ("h",)


def test_tta_as_told_or_as_kept():
    kept = functools.partial(predict.chosen_symmetries, replace(CONFIG, symmetries=("v",)))
    none = replace(CONFIG, symmetries=())
    assert (kept("auto"), kept("true"), kept("false")) == (("v",), ("v",), ())
    assert predict.chosen_symmetries(none, "auto") == ()
    assert predict.chosen_symmetries(none, "true") == ("h",), "there is one to ask for"
    assert predict.chosen_symmetries(replace(CONFIG, tta=False), "auto") == ()
