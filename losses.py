"""The loss of several classes; that of one class is in train.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from images import IGNORE


def class_loss(logits: Tensor, mask: Tensor, dice: float, weights: Tensor | None) -> Tensor:
    """Cross-entropy, of classes that overlap BCE, plus the mean Dice loss of those that occur.

    `logits` (N, K, H, W); `mask` (N, 1, H, W) float32 of numbers, for classes that overlap
    (N, K, H, W) of 0 and 1; 255 is ignored. `dice`: the weight of Dice;
    `weights` (K,): of the classes, or None.
    """
    logits, counted, each = logits.float(), mask != IGNORE, (0, 2, 3)
    if mask.shape[1] == 1:  # the classes exclude each other
        number = torch.where(counted, mask, 0).long()
        pixels = F.cross_entropy(logits, number[:, 0], weights, reduction="none")[:, None]
        pixels = (pixels * counted).sum() / counted.sum().clamp(min=1)
        p = logits.softmax(1) * counted
        right, number = p.gather(1, number).flatten(), number.flatten()  # no copy for each class
        hits = p.new_zeros(p.shape[1]).index_add(0, number, right)
        size = p.new_zeros(p.shape[1]).index_add(0, number, counted.flatten().float())
    else:
        target = mask * counted
        pixels = (F.softplus(logits) - logits * target) * counted  # BCE
        pixels = pixels.sum(each) / counted.sum(each).clamp(min=1)
        pixels = (pixels if weights is None else pixels * weights).mean()
        p = logits.sigmoid() * counted
        hits, size = (p * target).sum(each), target.sum(each)
    score = (2 * hits + 1) / (p.sum(each) + size + 1)
    return pixels + dice * (1 - score)[size > 0].sum() / (size > 0).sum().clamp(min=1)
