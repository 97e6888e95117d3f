"""Predictions that are ready in time: what --max_minutes drops, and when."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

from kit.errors import UserError
from kit.network.model import TrainedModel, scale_input, size_step
from kit.results.predict import (
    BatchResult,
    chosen_symmetries,
    predict_inputs,
    predict_reduced,
    read_batch,
)

PATIENCE = 0.05  # of the time that is left is measured before anything is dropped
WARM_UP = 5.0  # seconds: a thread's first batch that is shorter says nothing about the others
CARE = 1.5  # how much longer than expected a level may take: machines get slower, too
HALF = 0.5  # of a pass, for a quarter of the pixels: a small input leaves a GPU idle
RESERVE = 0.05, 5.0  # of the minutes, and seconds at least: for the files and the submission


class Level(NamedTuple):
    """A way to predict an image."""

    name: str  # for people
    models: list[TrainedModel]
    tta: str  # see `predict.predict_images`
    shrink: int  # images are reduced by so much before
    cost: float  # in passes through a network at its full size


def levels_of(models: list[TrainedModel], tta: str) -> list[Level]:
    """From the best one to the fastest: without TTA, fewer and fewer models, half of the size."""
    count = len(models)
    views = sum(len(chosen_symmetries(model.config, tta)) for model in models)
    levels = [Level("", models, tta, 1, count + views)]
    if views:
        levels.append(Level("test-time augmentation", models, "false", 1, count))
    models = sorted(models, key=lambda model: -model.weight)  # the lightest of a blend go first
    while count > 1:
        count //= 2
        name = f"all models but {count} of {len(models)}"
        levels.append(Level(name, models[:count], "false", 1, count))
    return levels + half_size(models[0])


def half_size(model: TrainedModel) -> list[Level]:
    """One model with images of half the size; of tiles with a quarter of them. Or [].

    A network of one size alone has no such level.
    """
    name, config = "half of the height and width", model.config
    if config.tiles:
        return [Level(name, [model], "false", 2, HALF)]
    smaller = model._replace(config=scale_input(config, 0.5, size_step(model.network)))
    size = smaller.config.height, smaller.config.width
    if size == (config.height, config.width):
        return []
    try:
        predict_inputs(smaller, torch.zeros(1, config.channels, *size))
    except Exception:  # layers raise anything
        return []
    return [Level(name, [smaller], "false", 1, HALF)]


class Pace:
    """Goes down the levels so that the images that are left are done in time, as late as it can.

    Each thread's seconds from batch to batch are measured, with all waiting for files to be read
    and written; of the next levels the part that the networks take counts as much less as they do.
    """

    def __init__(
        self,
        levels: list[Level],
        minutes: float,
        end: float,
        images: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`minutes`: the limit, for people; `end`: when `clock` passes it nothing begins."""
        self.levels, self.end, self.left, self.clock = levels, end, images, clock
        self.flag, self.lock = f"--max_minutes {minutes:g}", threading.Lock()
        self.ends: dict[int, float | None] = {}  # when a thread's last batch was done
        self.latest = 0.0  # seconds of a batch
        self.begin_level(0, clock())
        names = "; ".join(level.name for level in levels[1:]) or "nothing"
        print(f"{self.flag}: where time is short, dropped in this order: {names}", flush=True)

    def begin_level(self, place: int, now: float) -> None:
        """Measure anew."""
        self.place, self.batches, self.images = place, 0, 0
        self.enough = now + PATIENCE * (self.end - now)
        self.seconds = self.busy = 0.0  # of all threads; and those in the networks

    def predict_batch(self, batch: list, size: int) -> BatchResult:
        """See `predict.predict_batch`; an image for which there is no time left is an error."""
        thread, place, begun = threading.get_ident(), self.place, self.clock()
        self.ends.setdefault(thread, None)
        if begun + self.latest > self.end:
            errors = [UserError(self.flag, f"no time was left for {row.id}") for row in batch]
            return [], list(zip(batch, errors, strict=True))
        level = self.levels[place]
        images, errors = read_batch(batch, level.models[0].config)
        read, pixels = self.clock(), [image for _, image in images]
        predictions = predict_reduced(level.models, pixels, size, level.tta, level.shrink)
        with self.lock:
            self.add(thread, place, begun, read, len(batch))
        return [(*pair, p) for pair, p in zip(images, predictions, strict=True)], errors

    def add(self, thread: int, place: int, begun: float, read: float, count: int) -> None:
        """Count a batch that is done; with enough of them look whether the time is enough, too.

        `begun`, `read`: when, by the clock.
        """
        now, last = self.clock(), self.ends[thread]
        self.latest = now - begun
        self.ends[thread], self.left = now, self.left - count
        seconds = now - (begun if last is None else last)
        if place != self.place or (last is None and seconds < WARM_UP):
            return
        self.batches, self.images = self.batches + 1, self.images + count
        self.seconds, self.busy = self.seconds + seconds, self.busy + now - read
        if self.batches >= len(self.ends) and now >= self.enough:
            self.look_ahead(now)

    def look_ahead(self, now: float) -> None:
        """Go down where this level is too slow, and the next one would soon be; says so.

        As long as the next level still leaves time to spare, this one is good for more images.
        """
        needed = self.left * self.seconds / (self.images * len(self.ends))
        busy, cost = min(1.0, self.busy / self.seconds), self.levels[self.place].cost

        def is_late(place: int) -> bool:
            share = 1 - busy * (1 - self.levels[place].cost / cost)
            return now + needed * share * (CARE if place > self.place else 1) > self.end

        place, last = self.place, len(self.levels) - 1
        while place < last and is_late(place) and is_late(place + 1):
            place += 1
        if place > self.place:
            dropped = " and ".join(level.name for level in self.levels[self.place + 1 : place + 1])
            times = f"{needed / 60:.1f} minutes at this pace, {(self.end - now) / 60:.1f} are left"
            tqdm.write(f"{self.flag}: {self.left} images would take {times}: drops {dropped}")
            self.begin_level(place, now)


def make_pace(
    models: list[TrainedModel], tta: str, minutes: float, started: float, images: int
) -> Pace | None:
    """The pace of a process that `started` then and may take so many minutes; None for 0."""
    if not minutes:
        return None
    share, least = RESERVE
    end = started + 60 * minutes - max(least, 60 * minutes * share)
    return Pace(levels_of(models, tta), minutes, end, images)
