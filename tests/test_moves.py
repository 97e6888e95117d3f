"""The moves of a training: losses, sampling, pseudo-labels, stages."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from commands import Command
from conftest import KIT, TINY, run, succeed
from PIL import Image

import train
from kit.errors import UserError
from kit.training import callbacks, loaders, losses

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
        ("bce=1,hinge=2", ["'hinge'", "bce, dice, tversky, focal, lovasz"]),
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


def test_where_positives_change_nothing_it_is_said(tmp_path, capsys):
    configure(write_pairs(tmp_path / "a", 0), positives=0.5)
    assert "--positives: changes nothing, all images have foreground" in capsys.readouterr().out
    configure(write_pairs(tmp_path / "b", 5), positives=0.5)
    assert "--positives" not in capsys.readouterr().out


def test_positives_of_exclusive_classes_are_refused(tmp_path):
    write_pairs(tmp_path, 0)
    (tmp_path / "classes.csv").write_text("id,name\n0,sky\n255,road\n")
    with pytest.raises(UserError, match="take --class_weights inverse"):
        configure(tmp_path, positives=0.5, classes="sky,road")


KILLED = """
import os, sys
sys.path.insert(0, {kit!r})
import train
from kit.cli import parse
step = train.SegmentationModule.training_step
def training_step(self, batch, index):
    if self.current_epoch == 1 and index == 1:
        os.kill(os.getpid(), 9)
    return step(self, batch, index)
train.SegmentationModule.training_step = training_step
train.train(parse(train.Config, ""))
"""


def test_a_killed_run_with_positives_ends_as_the_whole_one(tmp_path):
    data = write_pairs(tmp_path / "data", 9)
    flags = ("--data", data, *TINY, "--batch_size", 2, "--positives", 0.8, "--epochs", 3)
    succeed("train.py", *flags, "--out", tmp_path / "whole")
    (tmp_path / "killed.py").write_text(KILLED.format(kit=str(KIT)))
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
