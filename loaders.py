"""From samples to batches: validation images kept in memory, and an order that can be resumed."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

INPUT_PIXELS = {"cuda": 384 * 1248, "mps": 192 * 640, "cpu": 72 * 320, "cpu bf16": 112 * 352}


def make_loaders(
    training: Dataset,
    validation: Dataset,
    batch_size: int,
    workers: int,
    processes: int,
    seed: int,
    memory: int,
) -> tuple[DataLoader, DataLoader]:
    """The training and the validation loader of this process, which takes `batch_size` items.

    `memory`: bytes of validation items that are kept.
    """
    options = {"batch_size": batch_size, "workers": workers, "processes": processes, "seed": seed}
    cached = Cached(validation, memory)
    return make_loader(training, True, **options), make_loader(cached, False, **options)


def default_workers(device: str) -> int:
    """4 next to a GPU; none on a CPU, whose cores are the network's."""
    return 0 if device == "cpu" else min(4, os.cpu_count() or 1)


def default_pixels(device: str, precision: str) -> int:
    """How many pixels an input has, where neither the user nor the data ask for others."""
    return INPUT_PIXELS["cpu bf16" if is_fast_cpu(device, precision) else device]


def larger_input(device: str, minutes: float, pretrained: bool, exclusive: bool) -> float:
    """How many times the default pixels an input has; `minutes`: of the training, 0: no limit.

    On a CPU small inputs learn sooner. From ImageNet's weights twice the default was better than
    the default at 2 minutes, over five times was better than twice at 30 (docs/results.md).
    """
    if device == "cpu" and pretrained:
        return min(6.0, max(2.0, minutes / 5.5))
    return 2.0 if exclusive else 1.0


def is_fast_cpu(device: str, precision: str) -> bool:
    """Whether a CPU computes in bf16, three times as fast."""
    return device == "cpu" and precision == "bf16-mixed"


def default_batch(device: str, precision: str, small: float, count: int) -> int:
    """The default of --batch_size for so many training images.

    On a CPU it is larger where inputs are small, `small` times under the usual, but leaves an epoch
    a hundred steps.
    """
    size = 8 if device != "cpu" or is_fast_cpu(device, precision) else 4
    if device == "cpu":
        size *= max(1, min(round(small), 16 // size, count // 100 // size))
    return size


def weighting(wanted: str, exclusive: bool) -> str:
    """What --class_weights means; auto: inverse where mIoU counts rare classes like any other."""
    return ("inverse" if exclusive else "none") if wanted == "auto" else wanted


def class_weights(samples: pd.DataFrame, fold: int, kind: str) -> torch.Tensor | None:
    """A weight for each class in the loss, from the images that train; None for all alike.

    "inverse": one by the class's share of the pixels, which counts as a thousandth at least. The
    mean weight of a pixel is 1. A class without pixels has the weight 0.
    """
    shares = np.array(samples.shares[samples.fold != fold].tolist())
    if kind == "none" or not shares.size:
        return None
    share = shares.mean(0)
    weight = np.where(share > 0, 1 / np.maximum(share, 1e-3), 0)
    mean = (weight * share).sum() / share.sum()
    return torch.tensor(weight / mean, dtype=torch.float32)


class Cached(Dataset):
    """A dataset whose items are always the same, kept in memory up to so many bytes."""

    def __init__(self, dataset: Dataset, limit: int) -> None:
        self.dataset, self.free = dataset, limit
        self.items: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.items:
            return self.items[index]
        item = self.dataset[index]
        size = sum(value.nbytes for value in item.values() if hasattr(value, "nbytes"))
        if size < self.free:
            self.free -= size
            self.items[index] = item
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors; names and ground truths, which have their own sizes, stay in lists."""
    batch = {key: [item[key] for item in items] for key in items[0]}
    return {k: torch.stack(v) if torch.is_tensor(v[0]) else v for k, v in batch.items()}


def make_loader(
    dataset: Dataset, shuffle: bool, batch_size: int, workers: int, processes: int, seed: int
) -> DataLoader:
    """A loader of this process's items; shuffled it drops the last, smaller batch."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=ShardedSampler(dataset, processes, seed, shuffle),
        drop_last=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=ignore_interrupt,
    )


def ignore_interrupt(_: int) -> None:
    """Ctrl-C reaches the workers, too: it is the training that ends and exports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ShardedSampler(Sampler):
    """This process's items, in an order that follows from seed and epoch alone.

    So a resumed run draws what the whole one would have drawn. torch's DistributedSampler would
    repeat items, and so count validation images twice.
    """

    def __init__(self, dataset: Any, processes: int, seed: int, shuffle: bool) -> None:
        self.dataset, self.processes = dataset, processes
        self.seed, self.shuffle = seed, shuffle

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it. The dataset's `epoch` is a shared tensor, which its workers see."""
        if self.shuffle:
            self.dataset.epoch.fill_(epoch)

    def items(self) -> list[int]:
        """The items of this process."""
        order = np.arange(len(self.dataset))
        if self.shuffle:  # every process gets as many, or one would wait for the others
            epoch = int(self.dataset.epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
            order = order[: len(order) // self.processes * self.processes]
        rank = torch.distributed.get_rank() if self.processes > 1 else 0
        return order[rank :: self.processes].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.items())

    def __len__(self) -> int:
        return len(self.items())
