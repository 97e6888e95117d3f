"""From samples to batches: flips, validation images in memory, an order that can be resumed."""

import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import albumentations as A
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


def flips(name: str, horizontal: A.BasicTransform) -> list[A.BasicTransform]:
    """What --flips names, auto and h are `horizontal`; each symmetry is as likely as the others.

    One transform each: two of a Compose draw the same random number, so both would flip, or none.
    """
    if name == "all":
        return [A.D4()]
    if name == "hv":
        h, v = A.HorizontalFlip(p=1), A.VerticalFlip(p=1)
        return [A.OneOf([A.NoOp(p=1), h, v, A.Sequential([h, v], p=1)], p=1)]
    return [] if name == "none" else [horizontal]


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
    dataset: Dataset, plan: "Plan | None", batch_size: int, workers: int, processes: int, seed: int
) -> DataLoader:
    """A loader of this process's items; with a plan, to train, it drops the last, smaller batch."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=ShardedSampler(dataset, processes, seed, plan),
        drop_last=plan is not None,
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


class Plan(NamedTuple):
    """Which items an epoch of the training has. Winners show foreground often at first."""

    filled: np.ndarray  # bool (n,): the item's image has foreground
    extra: np.ndarray  # bool (n,): it is one of --extra
    positives: float = 0.0  # share of items with foreground at the start; 0: the natural share
    stages: str = "mixed"  # what trains, in equal parts of the training: mixed, extra or own

    @property
    def count(self) -> int:
        """The items of an epoch: all, with several stages as many as there are own ones."""
        return int((~self.extra).sum()) if "," in self.stages else len(self.extra)

    def stage(self, progress: float) -> str:
        """What trains at 0..1 of the training."""
        stages = self.stages.split(",")
        return stages[min(int(progress * len(stages)), len(stages) - 1)]

    def pool(self, progress: float) -> np.ndarray:
        """The items that may train at 0..1 of the training, int (m,)."""
        chosen = {"mixed": self.extra | True, "extra": self.extra, "own": ~self.extra}
        return np.flatnonzero(chosen[self.stage(progress)])

    def draw(self, progress: float, random: np.random.Generator) -> np.ndarray:
        """The items of an epoch that starts at this progress, in its order, int (count,)."""
        pool = self.pool(progress)
        filled, empty = pool[self.filled[pool]], pool[~self.filled[pool]]
        if not (self.positives and len(filled) and len(empty)):
            return take(pool, self.count, random)
        natural = len(filled) / len(pool)
        share = self.positives + (natural - self.positives) * min(1.0, progress)
        number = round(share * self.count)
        drawn = take(filled, number, random), take(empty, self.count - number, random)
        return random.permutation(np.concatenate(drawn))


def plan_epochs(dataset: Any, positives: float, stages: str) -> Plan:
    """The plan for a dataset of train.py; tiles count as their image does."""
    rows = [dataset.rows[index] for index, _ in dataset.places]
    filled, extra = [row.share > 0 for row in rows], [row.fold < 0 for row in rows]
    return Plan(np.array(filled, bool), np.array(extra, bool), positives, stages)


def take(items: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """So many of the items in random order; none is taken again before all others were."""
    rounds = range(-(-count // max(1, len(items))))
    return np.concatenate([items[:0], *(random.permutation(items) for _ in rounds)])[:count]


def images_per_step(batch_size: int, images: int, processes: int, parts: int = 1) -> int:
    """Of one process; `parts`: of a batch, for gradient accumulation. Raises UserError."""
    if images < processes:
        raise UserError(
            "--devices", f"{processes} processes, but {images} training images", "take fewer"
        )
    return max(1, min(-(-batch_size // (parts * processes)), images // processes))


class ShardedSampler(Sampler):
    """This process's items, in an order that follows from seed, epoch and progress alone.

    So a resumed run draws what the whole one would have drawn. torch's DistributedSampler would
    repeat items, and so count validation images twice.
    """

    def __init__(self, dataset: Any, processes: int, seed: int, plan: Plan | None) -> None:
        """`plan`: of a training; None: all items in their order."""
        self.dataset, self.processes = dataset, processes
        self.seed, self.plan = seed, plan
        self.progress = 0.0  # of the training at the start of the epoch, from the TrainingCallback

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it. The dataset's `epoch` is a shared tensor, which its workers see."""
        if self.plan:
            self.dataset.epoch.fill_(epoch)

    def items(self) -> list[int]:
        """The items of this process."""
        order = np.arange(len(self.dataset))
        if self.plan:  # every process gets as many, or one would wait for the others
            random = np.random.default_rng([self.seed, int(self.dataset.epoch)])
            order = self.plan.draw(self.progress, random)
            order = order[: len(order) // self.processes * self.processes]
        elif len(order) < self.processes:  # every process validates all: no score changes
            return order.tolist()
        rank = torch.distributed.get_rank() if self.processes > 1 else 0
        return order[rank :: self.processes].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.items())

    def __len__(self) -> int:
        return len(self.items())
