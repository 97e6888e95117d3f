"""The moves of a training: losses, sampling, pseudo-labels, stages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run

import train
from kit.errors import UserError
from kit.training import losses

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
