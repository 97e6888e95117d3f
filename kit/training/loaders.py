"""From samples to batches: validation images kept in memory, and an order that can be resumed."""

import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kit.errors import UserError, reason_of


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """In the block an argument that albumentations does not know raises UserError.

    albumentations itself only warns, and takes the default. Not for threads: filters are global.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not valid for transform")
        try:
            yield
        except UserWarning as warning:
            raise UserError("augmentation in train.py", reason_of(warning)) from None


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
        worker_init_fn=leave_ends_to_the_training,
    )


def leave_ends_to_the_training(_: int) -> None:
    """Ctrl-C reaches the workers, too: it is the training that ends and exports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = print_error


def print_error(kind: type, error: BaseException, trace: Any) -> None:
    """As Python does, but for a batch that the training, interrupted, no longer fetches."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


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
        elif len(order) < self.processes:  # every process validates all: no score changes
            return order.tolist()
        rank = torch.distributed.get_rank() if self.processes > 1 else 0
        return order[rank :: self.processes].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.items())

    def __len__(self) -> int:
        return len(self.items())
