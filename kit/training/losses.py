"""The terms of the loss: what --loss names, and how each is computed. Ignored pixels never count.

A new term is a function and an entry in `FURTHER`.
"""

import functools
import math

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor

from kit.config import IGNORE
from kit.errors import UserError

# --------------------------------------------------------------------------------------------------
#  --loss
# --------------------------------------------------------------------------------------------------


@functools.cache
def parse(text: str, soft: bool = False) -> dict[str, float]:
    """{"bce": 1.0, "dice": 1.0} of "bce=1,dice=1", without weights of 0. Raises UserError.

    `soft`: pixels have shares.
    """
    where, names = f"--loss {text}", ("bce", "dice", *FURTHER)
    remedy = f"name terms with weights, such as bce=1,dice=1; there are {', '.join(names)}"
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            raise UserError(where, f"{part!r} is no NAME=WEIGHT", remedy) from None
        if name not in names:
            raise UserError(where, f"there is no {name!r}", remedy)
        if name in weights or not 0 <= weight < math.inf:
            problem = "is there twice" if name in weights else f"cannot weigh {number}"
            raise UserError(where, f"{name} {problem}", "give each a weight from 0 on, once")
        weights[name] = weight
    if soft and weights.get("lovasz"):
        raise UserError(where, "lovasz knows no shares (--soft true)", "take dice or tversky")
    if not any(weights.values()):
        raise UserError(where, "no term has a weight above 0", remedy)
    return {name: weight for name, weight in weights.items() if weight}


# --------------------------------------------------------------------------------------------------
#  Terms
# --------------------------------------------------------------------------------------------------


def label_terms(
    logits: Tensor, target: Tensor, counted: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of exclusive classes: cross-entropy, probabilities (N, K, H, W), hits and pixels (K,)."""
    number = target.long()  # not one-hot, a copy of the mask for each class
    pixels = F.cross_entropy(logits, number[:, 0], weights, reduction="none")[:, None]
    pixels = (pixels * counted).sum() / counted.sum().clamp(min=1)
    p = logits.softmax(1) * counted
    right, number = p.gather(1, number).flatten(), number.flatten()
    hits = p.new_zeros(p.shape[1]).index_add(0, number, right)
    size = p.new_zeros(p.shape[1]).index_add(0, number, counted.flatten())
    return pixels, p, hits, size


def mean_over(values: Tensor, occurs: Tensor) -> Tensor:
    """The mean of values (K,) over the classes that occur, bool (K,); 0 where none does."""
    return values[occurs].sum() / occurs.sum().clamp(min=1)


def focal(logits: Tensor, target: Tensor, counted: Tensor, weights: Tensor | None) -> Tensor:
    """Lin et al., ICCV 2017, with gamma 2 and no alpha: BCE or cross-entropy, easy pixels less.

    smp's takes ignored pixels for background where there are several classes.
    """
    weights = torch.ones(logits.shape[1], device=logits.device) if weights is None else weights
    if target.shape[1] < logits.shape[1]:
        entropy = F.cross_entropy(logits, target[:, 0].long(), reduction="none")[:, None]
        weight = weights[target.long()]
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        weight = weights[:, None, None]
    value = weight * (1 - torch.exp(-entropy)) ** 2 * entropy * counted
    each = (0, 2, 3)
    return (value.sum(each) / counted.sum(each).clamp(min=1)).mean()


def lovasz(logits: Tensor, target: Tensor, counted: Tensor, _: Tensor | None) -> Tensor:
    """Berman et al., CVPR 2018, over the whole batch: the hinge of each class, the mean over them.

    Of exclusive classes the softmax, over the classes that occur.
    """
    mask = torch.where(counted > 0, target, IGNORE)
    if mask.shape[1] < logits.shape[1]:
        value = LovaszLoss("multiclass", ignore_index=IGNORE)(logits, mask[:, 0])
        return value.sum()  # a number already, but without a counted pixel
    hinge = LovaszLoss("binary", ignore_index=IGNORE)
    planes = zip(logits.unbind(1), mask.unbind(1), strict=True)
    return torch.stack([hinge(*plane) for plane in planes]).mean()


def tversky(logits: Tensor, target: Tensor, counted: Tensor, _: Tensor | None) -> Tensor:
    """Salehi et al., 2017: Dice with misses of weight 0.7 and false alarms of 0.3."""
    each = (0, 2, 3)
    if target.shape[1] < logits.shape[1]:
        _, p, hits, size = label_terms(logits, target, counted, None)
    else:
        p = logits.sigmoid() * counted
        hits, size = (p * target).sum(each), target.sum(each)
    score = (hits + 1) / (hits + 0.3 * (p.sum(each) - hits) + 0.7 * (size - hits) + 1)
    return mean_over(1 - score, size > 0)


def presence(logits: Tensor, target: Tensor, weight: float) -> Tensor:
    """The weighted BCE of a head's logits (N, K) for the classes that an image has."""
    return weight * F.binary_cross_entropy_with_logits(logits.float(), target.flatten(2).amax(2))


# {name: f(logits, target, counted, weights)}: (N, K, H, W) float32; the target of exclusive classes
# (N, 1, H, W), 0 where it is ignored; 1 where a pixel counts, else 0; of the classes (K,), or None
FURTHER = {"focal": focal, "lovasz": lovasz, "tversky": tversky}
