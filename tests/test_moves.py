"""The moves of a training: losses, sampling, pseudo-labels, stages."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from commands import KILLED_STEP, Command
from conftest import KIT, TINY, run, succeed
from PIL import Image

import train
from kit.config import Classes, ModelConfig, plane_settings
from kit.data import extras
from kit.data.classes import mask_folders, palette
from kit.data.rasters import Layer
from kit.errors import UserError
from kit.network import model
from kit.results import predict
from kit.training import callbacks, loaders, losses, resolve

IGNORE = 255

# --------------------------------------------------------------------------------------------------
#  --loss
# --------------------------------------------------------------------------------------------------

TERMS = ("bce", "dice", "focal", "lovasz", "tversky")


def problem(kind):
    """Logits with two classes, and a mask of which the upper rows are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 12, 10, generator=generator, requires_grad=True)
    if kind == "labels":
        mask = torch.randint(0, 3, (2, 1, 12, 10), generator=generator).float()
    else:
        mask = torch.randint(0, 2, (2, 3, 12, 10), generator=generator).float()
    mask[:, :, :4] = IGNORE
    return logits, mask


def right_logits(mask, count):
    """Logits that are right with certainty."""
    if mask.shape[1] == count:
        return 20 * (2 * (mask == 1).float() - 1)
    labels = torch.where(mask == IGNORE, 0, mask)[:, 0].long()
    return 20 * F.one_hot(labels, count).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("kind", ["planes", "labels"])
@pytest.mark.parametrize("term", TERMS)
def test_a_term_falls_when_the_prediction_gets_better(term, kind):
    logits, mask = problem(kind)
    config = train.Config(loss=f"{term}=1")
    right = right_logits(mask, 3)
    steps = [torch.lerp(-right, right, share) + logits.detach() for share in (0.1, 0.5, 0.8, 1)]
    values = [train.loss(step, mask, config).item() for step in steps]
    assert values == sorted(values, reverse=True), values
    assert values[-1] == pytest.approx(0, abs=0.02)
    for weights in (None, torch.tensor([1.0, 2.0, 0.5])):
        assert torch.isfinite(train.loss(logits, mask, config, weights))


@pytest.mark.parametrize("kind", ["planes", "labels"])
@pytest.mark.parametrize("term", TERMS)
def test_ignored_pixels_change_neither_a_terms_value_nor_its_gradient(term, kind):
    config = train.Config(loss=f"{term}=1")
    logits, mask = problem(kind)
    value = train.loss(logits, mask, config)
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient[:, :, :4] == 0).all()
    assert (gradient[:, :, 4:] != 0).any()
    other = logits.detach().clone()
    other[:, :, :4] = 7
    other.requires_grad_()
    value_then = train.loss(other, mask, config)
    (gradient_then,) = torch.autograd.grad(value_then, other)
    assert value_then.item() == pytest.approx(value.item(), rel=1e-6)
    assert torch.allclose(gradient_then, gradient, atol=1e-8)
    cut = train.loss(logits[:, :, 4:], mask[:, :, 4:], config)
    assert cut.item() == pytest.approx(value.item(), rel=1e-6)
    nothing = train.loss(logits, torch.full_like(mask, IGNORE), config)
    assert nothing.item() == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", ["planes", "labels"])
def test_the_loss_is_the_sum_of_its_terms_times_their_weights(kind):
    logits, mask = problem(kind)
    each = {term: train.loss(logits, mask, train.Config(loss=f"{term}=1")) for term in TERMS}
    text = "bce=1, dice=0.5,focal=2,lovasz=0,tversky=3"
    value = train.loss(logits, mask, train.Config(loss=text))
    expected = each["bce"] + 0.5 * each["dice"] + 2 * each["focal"] + 3 * each["tversky"]
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_terms_are_their_definitions():
    logits, mask = problem("planes")
    known = mask != IGNORE
    p, target = logits.sigmoid()[known], mask[known]
    right = torch.where(target == 1, p, 1 - p)
    focal = (-torch.log(right) * (1 - right) ** 2).mean()
    value = train.loss(logits, mask, train.Config(loss="focal=1"))
    assert value.item() == pytest.approx(focal.item(), rel=1e-5)
    found, wanted = (torch.where(known, x, 0) for x in (logits.sigmoid(), mask))
    hits, found, wanted = (x.sum((0, 2, 3)) for x in (found * wanted, found, wanted))
    score = (hits + 1) / (hits + 0.3 * (found - hits) + 0.7 * (wanted - hits) + 1)
    value = train.loss(logits, mask, train.Config(loss="tversky=1"))
    assert value.item() == pytest.approx(1 - score.mean().item(), rel=1e-5)


def test_terms_of_shares_are_smallest_at_the_share():
    mask = torch.full((1, 1, 8, 8), 1 + 0.25 * 254)
    for term in ("bce", "focal"):
        config = train.Config(loss=f"{term}=1", soft=True)
        shares = torch.arange(0.05, 1, 0.1)
        values = [train.loss(torch.logit(s).expand(mask.shape), mask, config) for s in shares]
        assert np.argmin([value.item() for value in values]) == 2, term


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bce=1,hinge=2", ["'hinge'", "bce, dice, focal, lovasz, tversky"]),
        ("bce=-1", ["bce cannot weigh -1"]),
        ("bce=1,dice=inf", ["dice cannot weigh inf"]),
        ("bce=0,dice=0", ["no term has a weight above 0"]),
        ("", ["'' is no NAME=WEIGHT"]),
        ("focal", ["'focal' is no NAME=WEIGHT"]),
        ("bce=much", ["'bce=much' is no NAME=WEIGHT"]),
        ("bce=1,bce=2", ["bce is there twice"]),
        ("bce=1,lovasz=1", ["--soft true"]),
    ],
)
def test_a_loss_that_cannot_be_is_refused(text, expected):
    with pytest.raises(UserError) as error:
        losses.parse(text, soft=True)
    assert str(error.value).startswith(f"--loss {text}: ")
    assert all(part in str(error.value) for part in expected)


def test_a_mistake_in_the_loss_is_refused_before_the_data_is_read(tmp_path):
    done = run(
        "train.py", "--data", tmp_path / "none", "--loss", "bse=1", "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --loss bse=1: there is no 'bse'; ")


# --------------------------------------------------------------------------------------------------
#  --positives and --stages: which items an epoch has
# --------------------------------------------------------------------------------------------------


def flags(count, *places):
    chosen = np.zeros(count, bool)
    chosen[list(places)] = True
    return chosen


def draw(plan, progress, seed=0):
    return plan.draw(progress, np.random.default_rng(seed))


def test_the_share_of_positives_falls_to_the_natural_one():
    filled = flags(200, *range(0, 200, 10))  # 10 %
    plan = loaders.Plan(filled, flags(200), positives=0.5)
    shares = [filled[draw(plan, progress)].mean() for progress in (0, 0.25, 0.5, 0.75, 1, 1.01)]
    assert shares == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    for progress in (0, 0.5):
        drawn = draw(plan, progress)
        assert len(drawn) == 200
        counts = np.bincount(drawn, minlength=200)
        assert np.ptp(counts[filled]) <= 1, "none is drawn again before the others were"
        assert counts[~filled].max() == 1
        assert len({*draw(plan, progress, 1)} - {*drawn}) > 0, "other epochs have others"
        assert drawn.tolist() == draw(plan, progress).tolist()
    assert np.abs(np.diff(filled[draw(plan, 0)].astype(int))).sum() > 50, "they are mixed"


def test_fewer_positives_than_there_are_can_be_asked_for():
    filled = flags(100, *range(60))
    plan = loaders.Plan(filled, flags(100), positives=0.2)
    assert filled[draw(plan, 0)].mean() == 0.2
    assert filled[draw(plan, 1)].mean() == 0.6


@pytest.mark.parametrize("filled", [0, 3, 10])
def test_without_the_move_an_epoch_is_every_item_once(filled):
    for positives in (0, 0.5)[: 1 + (filled in (0, 10))]:
        plan = loaders.Plan(flags(10, *range(filled)), flags(10), positives)
        expected = np.random.default_rng(0).permutation(np.arange(10))
        assert draw(plan, 0.3).tolist() == expected.tolist()


class Numbers(torch.utils.data.Dataset):
    """Items that are their own numbers."""

    def __init__(self, count):
        self.count, self.epoch = count, torch.zeros((), dtype=torch.int64)

    def __len__(self):
        return self.count


def test_several_processes_share_what_one_would_draw(monkeypatch):
    plan = loaders.Plan(flags(41, *range(4)), flags(41), 0.5)
    samplers = [loaders.ShardedSampler(Numbers(41), count, 3, plan) for count in (1, 2, 2)]
    for sampler in samplers:
        sampler.set_epoch(5)
        sampler.progress = 0.25
    shares = []
    for rank, sampler in enumerate(samplers[1:]):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(sampler.items())
    assert [len(share) for share in shares] == [20, 20]
    assert np.stack(shares, 1).ravel().tolist() == samplers[0].items()[:40]


def write_pairs(root, empty, count=12, size=(48, 64)):
    """Pairs whose first masks are empty; a bright square is foreground."""
    rng = np.random.default_rng(0)
    for number in range(count):
        mask, image = np.zeros(size, np.uint8), rng.integers(0, 90, (*size, 3), np.uint8)
        if number >= empty:
            mask[10:30, 8 + 2 * number : 30 + 2 * number] = 255
        image[mask > 0] += 120
        for folder, pixels in (("images", image), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True, parents=True)
            Image.fromarray(pixels).save(root / folder / f"p{number:02}.png")
    return root


def configure(data, **settings):
    """The settings and the table of the first fold, as train.py makes them."""
    names = dict(zip(("encoder", "encoder_weights"), TINY[1:4:2], strict=True))
    config = train.Config(data=str(data), height=32, width=96, batch_size=2, **names, **settings)
    reading = {name: getattr(config, name) for name in train.samples.LOADED}
    collection, opener = train.samples.load(config.data, **reading)
    resolved, model_config = train.resolving.resolve(config, collection, 0, train.RESOLUTIONS)
    return resolved, model_config, collection.samples, opener


def test_the_items_of_a_training_follow_the_move(tmp_path):
    config, model_config, table, _ = configure(write_pairs(tmp_path, 9), positives=0.5)
    loader, _ = train.make_loaders(config, model_config, table)
    filled = loader.sampler.plan.filled
    assert filled.tolist() == (table.share > 0)[table.fold != 0].tolist()
    shares = []
    for progress in (0, 1):
        loader.sampler.progress = progress
        shares.append(filled[loader.sampler.items()].mean())
    assert shares[0] == pytest.approx(0.5, abs=0.1)
    assert shares[1] == pytest.approx(filled.mean())
    assert shares[0] > shares[1]


def test_progress_at_the_start_of_an_epoch_is_the_same_in_a_resumed_run(tmp_path):
    progress = []
    for made in range(4):
        clock = callbacks.Clock(4, 0, 0)
        run = callbacks.TrainingCallback(tmp_path, tmp_path, clock, {"lr": 1}, None)
        run.rows = [{"seconds": 10.0 * number} for number in range(1, made + 1)]
        progress.append(run.epoch_progress())
        clock.epochs, clock.limit, clock.begun = 0, 60, 2
        clock.reserve = 8
        assert run.epoch_progress() == max(0, (10 * made - 2) / 50)
    assert progress == [0, 1 / 3, 2 / 3, 1]


@pytest.mark.parametrize(("made", "said"), [(0, True), (1, False)])
def test_a_training_that_ends_before_its_last_stage_says_so(tmp_path, capsys, made, said):
    run = callbacks.TrainingCallback(tmp_path, tmp_path, callbacks.Clock(2, 0, 0), {"lr": 1}, None)
    run.rows = [{"seconds": 1.0}] * made
    plan = loaders.Plan(flags(4), flags(4, 0, 1), stages="extra,own")
    sampler = loaders.ShardedSampler(Numbers(4), 1, 0, plan)
    sampler.progress = run.epoch_progress()
    trainer = SimpleNamespace(
        current_epoch=made,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1}])],
        callback_metrics={"train_loss": 1, "val_loss": 1},
        num_val_batches=[1],
        is_global_zero=False,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        train_dataloader=SimpleNamespace(sampler=sampler),
        save_checkpoint=lambda path: None,
    )
    last = SimpleNamespace(evaluation=SimpleNamespace(logged=()), is_last_epoch=lambda: True)
    run.on_train_epoch_end(trainer, last)
    assert ("THE LAST STAGE WAS NOT REACHED" in capsys.readouterr().out) == said
    assert sampler.progress == made + 1


def test_where_positives_change_nothing_it_is_said(tmp_path, capsys):
    configure(write_pairs(tmp_path / "a", 0), positives=0.5)
    assert "--positives: changes nothing, all images have foreground" in capsys.readouterr().out
    configure(write_pairs(tmp_path / "b", 5), positives=0.5)
    assert "--positives" not in capsys.readouterr().out


def test_positives_of_exclusive_classes_are_refused(tmp_path):
    write_pairs(tmp_path, 0)
    (tmp_path / "classes.csv").write_text("id,name\n0,sky\n255,road\n")
    with pytest.raises(UserError, match="each has some of the classes"):
        configure(tmp_path, positives=0.5, classes="sky,road")


KILLED = """
import os, sys
sys.path.insert(0, {kit!r})
import train
from kit.cli import parse
{step}
train.train(parse(train.Config, ""))
"""


def test_a_killed_run_with_positives_ends_as_the_whole_one(tmp_path):
    data = write_pairs(tmp_path / "data", 9)
    flags = ("--data", data, *TINY, "--batch_size", 2, "--positives", 0.8, "--epochs", 3)
    succeed("train.py", *flags, "--out", tmp_path / "whole")
    (tmp_path / "killed.py").write_text(KILLED.format(kit=str(KIT), step=KILLED_STEP))
    cut = (*flags, "--workers", 2, "--out", tmp_path / "cut")
    process = Command(tmp_path / "killed.py", cut, merge=True)
    process.process.join(120)
    process.kill()  # its workers
    assert "after epoch 1" in succeed("train.py", *cut)
    tables = [pd.read_csv(tmp_path / out / "metrics.csv") for out in ("whole", "cut")]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    plain = succeed("train.py", *flags[:-4], "--epochs", 3, "--out", tmp_path / "plain")
    assert "model.pt" in plain
    assert not tables[0].train_loss.equals(pd.read_csv(tmp_path / "plain/metrics.csv").train_loss)


def test_stages_are_equal_parts_of_the_training():
    extra = flags(30, *range(10, 30))
    own = {*range(10)}
    for stages, first in (("extra,own", {*range(10, 30)}), ("mixed,own", {*range(30)})):
        plan = loaders.Plan(flags(30), extra, stages=stages)
        assert plan.count == 10, "an epoch is as long as without extras"
        for progress in (0, 0.49):
            drawn = draw(plan, progress)
            assert len({*drawn}) == 10 and {*drawn} <= first
            assert {*plan.pool(progress)} == first
        for progress in (0.5, 1, 1.2):
            assert sorted(draw(plan, progress)) == sorted(own)
    together = loaders.Plan(flags(30), extra)
    assert sorted(draw(together, 0.2)) == [*range(30)]
    few = loaders.Plan(flags(30), ~extra, stages="extra,own")
    assert np.bincount(draw(few, 0)).tolist() == [2] * 10, "all are drawn as often"


# --------------------------------------------------------------------------------------------------
#  --extra: pseudo-labels
# --------------------------------------------------------------------------------------------------

LABELS = ("sky", "road", "car")
ONE = Classes()


def predicted(folder, classes=ONE, names=("a", "b"), seen=(("0" * 8,),), **settings):
    """The --out of infer.py for images of noise; returns the probabilities of each image."""
    rng, rows, levels = np.random.default_rng(1), [], {}
    count, values = len(classes.names), palette(classes)[0]
    for name in names:
        image = folder / "images" / f"{name}.png"
        shape = (20, 24) if classes.exclusive else (count, 20, 24)
        levels[name] = rng.integers(0, 256, shape, np.uint8)
        for place, plane in zip(
            mask_folders(classes), levels[name].reshape(-1, 20, 24), strict=True
        ):
            write(folder / "probs" / place / f"{name}.png", plane)
        numbers = np.arange(480).reshape(20, 24) % count
        write(folder / "masks" / f"{name}.png", values[numbers])
        write(image, rng.integers(0, 255, (20, 24, 3), np.uint8))
        rows.append({"id": name, "layers": (Layer(image),)})
    config = ModelConfig(
        class_names=classes.names, class_values=classes.values, exclusive=classes.exclusive,
        **plane_settings(classes),
    )  # fmt: skip
    config = dataclasses.replace(config, **settings)
    extras.write_list(folder, pd.DataFrame(rows), config, seen)
    return levels


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def collected(root, **settings):
    """The collection of pairs without and with foreground, as train.py loads it."""
    options = {name: getattr(train.Config(**settings), name) for name in train.samples.LOADED}
    return train.samples.load(str(root), **options)


def probability(level, threshold, temperature):
    """At temperature 1, with the threshold at 0.5."""
    logits = [torch.logit(torch.tensor(p, dtype=torch.float64)) for p in (level / 255, threshold)]
    return torch.sigmoid(temperature * (logits[0] - logits[1])).item()


@pytest.mark.parametrize(("threshold", "temperature"), [(0.5, 3), (0.5, 1), (0.3, 3), (0.8, 2)])
def test_pixels_are_confident_at_temperature_1_and_the_models_threshold(threshold, temperature):
    low, high = extras.confident_levels(threshold, temperature)
    sure = [probability(level, threshold, temperature) for level in range(256)]
    assert low == max(level for level in range(256) if sure[level] <= 0.1)
    assert high == min(level for level in range(256) if sure[level] >= 0.9)


def test_the_probability_of_a_label_is_never_overestimated():
    logits = torch.randn(2000, 4, dtype=torch.float64) * 4
    softened = (logits / 3).softmax(1).amax(1)
    _, high = extras.confident_levels(0.5, 3)
    assert (logits.softmax(1).amax(1)[255 * softened >= high] >= 0.9).all()


@pytest.mark.parametrize("kind", ["one", "planes", "labels"])
def test_confident_pixels_are_labels_and_others_are_ignored(tmp_path, kind, capsys):
    names = ("foreground",) if kind == "one" else LABELS
    classes = Classes(names, tuple("1" if kind == "one" else "246"[: len(names)]), kind == "labels")
    levels = predicted(tmp_path / "p", classes)
    collection, opener = collected(write_pairs(tmp_path / "data", 2))
    collection = collection._replace(classes=classes)
    table = extras.add(collection, [0], str(tmp_path / "p"), 1.0, opener)[0]
    added = table[table.fold < 0]
    assert added.id.tolist() == ["extra_a", "extra_b"]
    assert table.iloc[: len(collection.samples)].equals(collection.samples)
    for row, name in zip(added.itertuples(), "ab", strict=True):
        mask = row.mask.read((20, 24))
        sure = levels[name] / 255 >= 0.675
        if kind == "labels":
            numbers = np.arange(480).reshape(20, 24) % 3
            assert (mask == np.where(sure, numbers, IGNORE)).all()
        else:
            unsure = np.where(levels[name] / 255 <= 0.325, 0, IGNORE)
            assert (mask == np.where(sure, 1, unsure)).all()
        assert mask.dtype == np.uint8
    assert f"extra: {tmp_path / 'p'} · 2 images, " in capsys.readouterr().out


def test_each_fold_has_its_own_extras(tmp_path):
    for name, images in (("fold0", "a"), ("fold2", "b"), (".", "abc")):
        predicted(tmp_path / "p" / name, names=tuple(images))
    collection, opener = collected(write_pairs(tmp_path / "data", 2), folds=3)
    tables = extras.add(collection, [0, 1, 2], str(tmp_path / "p"), 1.0, opener)
    names = {fold: "".join(t.id[t.fold < 0].str[-1]) for fold, t in tables.items()}
    assert names == {0: "a", 1: "abc", 2: "b"}
    seen = extras.seen_images(tables[0], 0, str(tmp_path / "p"))
    own = collection.samples[collection.samples.fold != 0]
    assert {*seen} == {*extras.image_digests(own), "0" * 8}, "also what the model behind them saw"


def test_images_that_the_data_has_are_left_out(tmp_path, capsys):
    data = write_pairs(tmp_path / "data", 2)
    predicted(tmp_path / "p")
    shutil.copy(data / "images" / "p00.png", tmp_path / "p" / "images" / "a.png")
    collection, opener = collected(data)
    table = extras.add(collection, [0], str(tmp_path / "p"), 1.0, opener)[0]
    assert table.id[table.fold < 0].tolist() == ["extra_b"]
    assert "extra: 1 of 2 images are in --data, left out" in capsys.readouterr().out
    shutil.copy(data / "images" / "p01.png", tmp_path / "p" / "images" / "b.png")
    with pytest.raises(UserError, match="all its images are in --data"):
        extras.add(collection, [0], str(tmp_path / "p"), 1.0, opener)


def several(folder):
    content = json.loads((folder / "probs.json").read_text())
    content["images"]["a"] = ""
    (folder / "probs.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: shutil.rmtree(p / "images"), "2 of 2 images are gone: .*a.png.*; predict again"),
        (lambda p: (p / "probs.json").unlink(), "has no probs.json"),
        (lambda p: (p / "probs.json").write_text("{}"), "has no probs.json"),
        (lambda p: (p / "probs" / "b.png").unlink(), "b.png is missing; predict again"),
        (lambda p: predicted(p, Classes(("x", "y"), ("1", "2"))), r"classes that may overlap \(x"),
        (lambda p: predicted(p, names=()), "0 of 0 images are gone"),
        (lambda p: predicted(p, seen=((), ("1" * 8,))), "does not know what it was trained on"),
        (several, "is of several files or pages"),
    ],
)
def test_extras_that_cannot_train_are_refused_in_one_line(tmp_path, damage, expected):
    predicted(tmp_path / "p")
    damage(tmp_path / "p")
    collection, opener = collected(write_pairs(tmp_path / "data", 2))
    with pytest.raises(UserError, match=expected) as error:
        extras.add(collection, [0, 1], str(tmp_path / "p"), 1.0, opener)
    assert str(error.value).startswith(f"--extra {tmp_path / 'p'}: ")


def test_stages_without_extras_are_refused(tmp_path):
    data = write_pairs(tmp_path, 0)
    with pytest.raises(UserError, match="there are no extras; name some with --extra"):
        configure(data, stages="extra,own")
    with pytest.raises(UserError, match="there is one epoch; give --epochs 2 or more"):
        configure(data, stages="mixed,own", extra="somewhere", epochs=1)


def test_class_weights_follow_from_the_datas_own_masks():
    table = pd.DataFrame({"fold": [0, 1, -1], "shares": [(0, 1), (0.75, 0.25), (1, 0)]})
    weights = train.resolving.class_weights(table, 0, "inverse")
    assert torch.allclose(weights, train.resolving.class_weights(table[:2], 0, "inverse"))


def test_pseudo_labels_train_and_never_validate(tmp_path):
    """The whole way: train, predict, train with what is sure, in stages; and what is refused."""
    data, more = write_pairs(tmp_path / "data", 3, 24), tmp_path / "more" / "images"
    shutil.copytree(write_pairs(tmp_path / "other", 0, 9, (60, 80)) / "images", more)
    flags = ("--data", data, *TINY)
    first, second, pseudo = (tmp_path / name for name in ("first", "second", "pseudo"))
    succeed("train.py", *flags, "--epochs", 4, "--out", first)
    command = ("--model", first, "--data", more, "--out", pseudo, "--save_probs", "true")
    succeed("infer.py", *command)
    content = json.loads((pseudo / "probs.json").read_text())
    assert content["images"] == {path.stem: str(path) for path in sorted(more.iterdir())}
    assert len(content["seen"]) == len(torch.load(first / "model.pt", weights_only=True)["seen"])
    moves = ("--epochs", 2, "--extra", pseudo, "--stages", "mixed,own", "--positives", 0.9)
    printed = succeed("train.py", *flags, *moves, "--out", second)
    assert "(and 9 of --extra)" in printed
    assert "NOT REACHED" not in printed
    scored = [json.loads((out / "metrics.json").read_text()) for out in (first, second)]
    assert {report["image"]["all"]["images"] for report in scored} == {4}
    seen = [torch.load(out / "model.pt", weights_only=True)["seen"] for out in (first, second)]
    assert seen[0] == seen[1]
    succeed("train.py", *flags, *moves, "--check", "true", "--out", tmp_path / "check")
    table = pd.read_csv(tmp_path / "check" / "samples.csv")
    assert (table.why == "--extra").sum() == (table.fold == -1).sum() == 9
    ignored = np.array(Image.open(tmp_path / "check" / "masks" / "extra_p00.png")) == 127
    assert 0 < ignored.mean() < 1
    done = run("train.py", *flags, *moves, "--fold", "all", "--out", tmp_path / "all")
    assert done.returncode == 2
    assert not (tmp_path / "all").exists(), "it is refused before the first fold trains"
    (line,) = done.stderr.strip().splitlines()
    assert "images that validate in fold 1" in line
    assert line.endswith("for --fold all into {DIR}/fold1")


# --------------------------------------------------------------------------------------------------
#  --presence
# --------------------------------------------------------------------------------------------------


def test_the_head_for_presence_decides_how_probable_a_pixel_can_be():
    two = {"class_names": ("a", "b"), "class_values": ("1", "2")}
    planes = plane_settings(Classes(("a", "b"), ("1", "2")))
    config = ModelConfig(encoder="resnet18", presence=0.5, precision="32", **two, **planes)
    network = model.build_network(config).eval()
    with torch.no_grad():
        logits, presence = network(torch.rand(1, 3, 64, 64))
    assert (logits.shape, presence.shape) == ((1, 2, 64, 64), (1, 2))
    sure = torch.tensor([[20.0, -20.0]])
    probabilities = predict.to_probabilities((logits, sure), config)
    alone = predict.to_probabilities(logits, dataclasses.replace(config, presence=0.0))
    assert torch.allclose(probabilities[:, 0], alone[:, 0])
    assert probabilities[:, 1].max() < 1e-6
    assert "a head for presence" in config.describe()


def test_the_loss_of_presence_knows_which_classes_an_image_has():
    logits, mask = problem("planes")
    mask[0, 1, 4:] = 0  # the first image lacks the second class; what is ignored does not count
    config = train.Config(presence=2.0)
    there = torch.tensor([[1.0, 0, 1], [1, 1, 1]])
    right, wrong = 20 * (2 * there - 1), 20 * (1 - 2 * there)
    alone = train.loss(logits, mask, train.Config())
    assert torch.allclose(train.loss((logits, right), mask, config), alone)
    assert train.loss((logits, wrong), mask, config) > alone + 39


def test_a_training_with_presence_predicts_and_resumes(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        image = rng.integers(0, 60, (32, 32, 3)).astype(np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        if number % 3:
            mask[8:20, 8:20] = 255
            image[8:20, 8:20] += 180
        for folder, pixels in (("images", image), ("masks", mask)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{number}.png")
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--presence", 0.5, *TINY)
    flags = (*flags, "--height", 32, "--width", 32)
    assert "a head for presence" in succeed("train.py", *flags, "--epochs", 1)
    assert "resume: from" in succeed("train.py", *flags, "--epochs", 2)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["presence"] == 0.5
    predicted = ("--model", tmp_path / "out", "--data", tmp_path / "data/images")
    succeed("infer.py", *predicted, "--out", tmp_path / "predictions")
    assert len(list((tmp_path / "predictions/masks").glob("*.png"))) == 12


def test_presence_of_classes_that_share_all_pixels_is_refused():
    labels = Classes(("a", "b"), ("0", "1"), exclusive=True)
    collection = SimpleNamespace(classes=labels, samples=pd.DataFrame({"fold": [0, 1]}))
    with pytest.raises(UserError, match="--presence 1.0.*leave it out"):
        resolve.check_moves(train.Config(presence=1.0), collection, 0)
