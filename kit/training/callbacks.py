"""What happens around the steps: the clock, checkpoints and resuming, interruption, full memory."""

import atexit
import contextlib
import copy
import functools
import logging
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

from kit.config import symmetries_to_try
from kit.data.cache import remove_files
from kit.data.extras import seen_images
from kit.errors import UserError, reason_of
from kit.files import writable_folder, write_file
from kit.network.model import (
    TrainedModel,
    read_checkpoint,
    reestimate_batch_norm,
    save_model,
)
from kit.training import resume
from kit.training.loggers import RunLog

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # remarks on what is on purpose
warnings.filterwarnings("ignore", module="pytorch_lightning")
warnings.filterwarnings("ignore", "Grad strides do not match")  # of ViTs in several processes

# The best epoch of a few validation images is luck: the last one was better on held-out sequences
# in 8 of 8 trainings (docs/results.md). model.pt holds the last epoch's weights, unless its MaxF is
# this many points below the best: then the training went wrong, or was interrupted early.
FALL_BACK = 5.0
CHECKPOINT_SECONDS = 120  # between two last.ckpt: 400 MB take 2 s

# --------------------------------------------------------------------------------------------------
#  Clock
# --------------------------------------------------------------------------------------------------


class Clock:
    """Progress from 0 to 1 by epochs or minutes, whichever ends first. Resumed parts count."""

    def __init__(
        self, epochs: int, max_minutes: float, started: float, deadline: float = math.inf
    ) -> None:
        """0: no limit. `started`, `deadline` (of this session): time.monotonic()."""
        self.epochs, self.limit = epochs, 60 * max_minutes
        self.started, self.deadline = started, deadline
        self.earlier = 0.0  # seconds of the resumed parts
        self.begun = 0.0  # seconds before the first step, where progress is 0
        self.reserve = 0.0  # seconds that the end of the run will take

    def seconds(self) -> float:
        """Since the start, in all parts."""
        return self.earlier + time.monotonic() - self.started

    def progress(self, step: int, steps_per_epoch: int, seconds: float | None = None) -> float:
        """0 at the first step, 1 at the last step that epochs or minutes allow; `seconds`: now."""
        seconds = self.seconds() if seconds is None else seconds
        last_step = self.epochs * steps_per_epoch - 1
        by_steps = step / max(1, last_step) if self.epochs else 0.0
        length = max(self.limit - self.reserve - self.begun, 1e-9)
        by_time = (seconds - self.begun) / length if self.limit else 0.0
        return max(by_steps, by_time)

    def session_over(self) -> bool:
        """Whether this session has to end, with the reserve for exporting."""
        return time.monotonic() >= self.deadline - self.reserve

    def finished(self, epochs: int) -> bool:
        """Whether a run that made so many epochs, resumed now, has used up epochs or minutes."""
        out_of_time = 0 < self.limit <= self.earlier + self.reserve
        return out_of_time or 0 < self.epochs <= epochs


# --------------------------------------------------------------------------------------------------
#  Checkpoints, metrics.csv and resuming
# --------------------------------------------------------------------------------------------------


class TrainingCallback(pl.Callback):
    """Tells the module its progress, stops in time, keeps model.pt, last.ckpt and metrics.csv.

    Lightning's ModelCheckpoint would leave half a file where it is killed while writing.
    """

    def __init__(
        self, out: Path, root: Path, clock: Clock, settings: dict[str, Any], samples: pd.DataFrame
    ) -> None:
        """`root`: `out`, or for one of all folds the folder above."""
        self.out, self.root, self.clock = out, root, clock
        self.settings, self.samples = settings, samples
        self.lr: float | str = settings["lr"]  # "auto" until it is found
        self.reasons: list[str] = []  # to start over
        self.rows: list[dict[str, float]] = []  # of metrics.csv
        self.best = -1.0  # the largest MaxF, or mIoU
        self.saved = 0.0  # when last.ckpt was written, time.monotonic()
        self.checkpoint: Path | None = None  # that the run is resumed from
        self.signals: list[int | Stopped] = []  # that end the training, see `interruptible`
        self.together = settings.get("devices", 1) > 1  # several processes train
        self.handler: Any = None  # of signals, see `interruptible`
        self.meets = False  # the others are on their way to `meet`
        self.step_started, self.step = 0.0, math.inf  # time.monotonic(); seconds, the shortest
        self.run_log: RunLog | None = None  # of --logger, of the first process
        self.log_version: list[str] | None = None

    @functools.cached_property
    def identity(self) -> resume.Identity:
        """What makes this run's weights."""
        return resume.identify(self.settings, self.samples)

    @functools.cached_property
    def seen(self) -> list[str]:
        """What tells the images that the weights follow from, see `extras.py`."""
        return seen_images(self.samples, self.settings.get("fold"), self.settings.get("extra"))

    def state_dict(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "best": self.best,
            "rows": self.rows,
            "clock": (self.clock.seconds(), self.clock.begun, self.clock.reserve),
            "log": self.run_log.version if self.run_log else self.log_version,
            **self.identity._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lr, self.rows = state["lr"], state["rows"]  # `best` follows from model.pt too
        self.clock.earlier, self.clock.begun, self.clock.reserve = state["clock"]
        self.log_version = state.get("log")

    def epoch_progress(self) -> float:
        """0 at the start of the first epoch, 1 at that of the last; of a resumed run the same."""
        seconds = self.rows[-1]["seconds"] if self.rows else 0.0
        return self.clock.progress(len(self.rows), 1, seconds)

    def reserve_for(self, validation: float) -> None:
        """Keep time for the end, in seconds: a step, two validations with TTA, drawing, export.

        `validation`: the seconds of one without TTA. Symmetries that are tried take some more.
        """
        names = ("tta", "max_minutes", "height", "width")
        tried = symmetries_to_try(**{name: self.settings.get(name, 0) for name in names})
        passes = 4 + (2 + 3 * len(tried)) * bool(tried)
        self.clock.reserve = 6 + min(self.step, self.clock.seconds()) + passes * validation

    def measure_step(self, trainer: pl.Trainer, index: int, batch_size: int) -> None:
        """Before the first validation: what it will take, from the shortest step so far.

        A forward pass takes a third of a step. Of the 128 images that BatchNorm is re-estimated on
        a quarter, as `reserve_for` takes everything four times.
        """
        now, earlier, self.step_started = time.monotonic(), self.step_started, time.monotonic()
        if index:
            self.step = min(self.step, now - earlier)
        if index > 1 and not self.rows:  # the first step alone may be slow
            batches = min(128 / batch_size, trainer.num_training_batches) / 4
            batches += sum(trainer.num_val_batches)
            self.reserve_for(self.step / 3 * batches)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int
    ) -> None:
        self.meet(module.device)
        if index == 0:
            seed = self.settings["seed"] + trainer.current_epoch
            torch.manual_seed(seed)  # of dropout: the same in a resumed run
            self.clock.begun = self.clock.begun or self.clock.seconds()
        self.measure_step(trainer, index, len(batch["name"]))
        parts = trainer.accumulate_grad_batches
        steps = -(-trainer.num_training_batches // parts)
        step = trainer.current_epoch * steps + index // parts  # global_step lacks epochs cut short
        now = self.clock.progress(step, steps), self.clock.session_over()
        progress, session_over = trainer.strategy.broadcast(now)  # one clock for all processes
        module.set_progress(progress)
        trainer.should_stop = session_over or (self.clock.limit > 0 and progress >= 1)  # last step

    def meet(self, device: torch.device, reason: int = 0) -> None:
        """Between batches and before the backward pass: all processes leave where one has to.

        Elsewhere one that leaves is missed by the others' next reduction. `reason`: of `REASONS`.
        Raises the error of the gravest.
        """
        if not self.together:
            return
        reason = max(reason, 2 if self.signals else 0)
        shared = torch.tensor(reason, device=device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        if int(shared):
            self.together = self.meets = False
            raise REASONS[int(shared)](2)  # SystemExit's status

    def on_train_start(self, *_: Any) -> None:
        for number in END_SIGNALS if self.handler and not self.signals else ():
            signal.signal(number, self.handler)  # Lightning's would end one process alone

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.together = self.meets = trainer.world_size > 1
        self.device = module.device

    def on_before_backward(
        self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        self.meet(module.device)
        self.meets = False

    def on_train_batch_end(self, *_: Any) -> None:
        self.meets = self.together

    def on_train_end(self, *_: Any) -> None:
        self.together = self.meets = False

    def on_validation_start(self, *_: Any) -> None:
        self.meets = False
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.reserve_for(time.monotonic() - self.validation_started)
        self.keep_model(trainer, module, module.evaluation.report()["image"]["all"])

    def keep_model(
        self, trainer: pl.Trainer, module: pl.LightningModule, score: dict[str, float]
    ) -> None:
        """Write model.pt, by the rule of `FALL_BACK`. `score`: of this epoch, {} without images."""
        if main_score(score) > self.best - FALL_BACK and trainer.is_global_zero:
            self.best = max(self.best, main_score(score))
            network, config = module.ema.module, module.current_config()
            trained = TrainedModel(network, config, self.settings, {"epoch": score}, self.seen)
            save_model(self.out / "model.pt", trained)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        row = {
            "epoch": trainer.current_epoch + 1,
            "seconds": round(self.clock.seconds(), 1),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        validates = sum(trainer.num_val_batches) > 0
        if not validates:
            self.keep_model(trainer, module, {})
        scores = ("val_loss", *module.evaluation.logged) if validates else ()
        for name in ("train_loss", *scores):
            row[name] = round(float(trainer.callback_metrics[name]), 4)
        self.rows.append(row)
        if trainer.is_global_zero:
            write_file(self.out / "metrics.csv", pd.DataFrame(self.rows).to_csv(index=False))
            if not on_terminal():
                print(epoch_line(row, self.clock.epochs), flush=True)
        if self.run_log:
            self.run_log.add(row)
        due = module.is_last_epoch() or time.monotonic() - self.saved > CHECKPOINT_SECONDS
        due, progress = trainer.strategy.broadcast((due, self.epoch_progress()))
        sampler = trainer.train_dataloader.sampler
        if module.is_last_epoch() and sampler.plan.stage(sampler.progress) != sampler.plan.stage(1):
            print("--stages: THE LAST STAGE WAS NOT REACHED; resume, or give more --max_minutes")
        sampler.progress = progress  # of the next epoch
        if due:
            self.save_checkpoint(trainer)

    def save_checkpoint(self, trainer: pl.Trainer) -> None:
        """Write last.ckpt whole. All processes take part, the first one writes."""
        if trainer.is_global_zero:
            write_file(self.out / "last.ckpt", trainer.save_checkpoint)
        else:
            trainer.save_checkpoint(self.out / "last.ckpt")
        self.saved = time.monotonic()

    def find_checkpoint(self, choice: str, defaults: dict[str, Any]) -> None:
        """Take over the state that `choice` (--resume) means, if any; see `resume.decide`."""
        if self.root.is_dir() and rank_zero_only.rank == 0:
            resume.lock_folder(self.root)
        decision = resume.decide(self.identity, choice, self.out, self.root, defaults)
        self.checkpoint, self.reasons = decision.checkpoint, decision.reasons
        if self.checkpoint:
            self.load_state_dict(decision.state)
            model = self.checkpoint.with_name("model.pt")  # may be newer than the checkpoint
            content = read_checkpoint(model, "--resume") if model.exists() else {}
            reached = main_score(content.get("metrics", {}).get("epoch", {}))
            self.best = max(decision.state["best"] if content else -1.0, reached)

    def prepare_out(self) -> None:
        """Make the folder; an earlier run in it that is not resumed is renamed, never overwritten.

        Brings along the model of a run that is resumed from elsewhere. Only the first process
        writes.
        """
        if rank_zero_only.rank:
            return
        if self.reasons:
            title = "RESUMING" if self.checkpoint else "STARTING OVER"
            folder = resume.set_aside(self.root)
            last = folder / self.out.relative_to(self.root) / "last.ckpt"
            kept = f"The earlier run is kept in {folder}; --resume {last} resumes it"
            print(f"{title}: {'; '.join(self.reasons)}. {kept}", flush=True)
        writable_folder(self.out)
        resume.lock_folder(self.root)
        if self.checkpoint and self.checkpoint.parent.resolve() != self.out.resolve():
            model = self.checkpoint.with_name("model.pt")
            if model.exists():
                write_file(self.out / "model.pt", model.read_bytes())
            self.log_version = None  # of a logger's files that are elsewhere
        if self.settings.get("logger", "none") != "none":
            self.run_log = RunLog(self.out, self.settings, self.log_version)

    def nothing_to_train(self) -> str:
        """A message where the run that is resumed has used up its epochs or minutes, else "".

        The same in every process: it asks for the resumed run's model, not for the first's copy.
        """
        finished = self.checkpoint and self.clock.finished(len(self.rows))
        if not (finished and self.checkpoint.with_name("model.pt").exists()):
            return ""
        remedy = "for more raise --epochs or --max_minutes, to start over --resume none"
        return f"NOTHING WAS TRAINED: {self.checkpoint} is finished; {remedy}\n"

    def describe_end(self) -> str:
        """What the same command does after an early end, as far as it is reached."""
        if not any(self.root.rglob("last.ckpt")):
            return "no epoch is finished; the same command starts over"
        flag = "" if self.settings["resume"] == "auto" else " with --resume auto"
        return f"the same command{flag} resumes"

    def restart(self) -> Path | None:
        """After memory ran out: the run's own last.ckpt, else the one that it is resumed from."""
        path = self.out / "last.ckpt"
        path = path if path.exists() else self.checkpoint
        if path:
            self.clock.started = time.monotonic()  # the checkpoint knows the seconds before it
        return path


def main_score(scores: dict[str, float]) -> float:
    """The score that an epoch counts by: MaxF of one class, mIoU of several; -1 for none."""
    return scores.get("mIoU", scores.get("MaxF", -1.0))


def exported_epoch(rows: list[dict[str, float]]) -> int:
    """The epoch whose weights are in model.pt, by the rule of `FALL_BACK`."""
    score = pd.Series([main_score(row) for row in rows])
    return int(rows[score[score > score.cummax() - FALL_BACK].index[-1]]["epoch"])


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """One epoch in a line, for output into a file."""
    total = f" of {epochs}" if epochs else ""
    names = {"train_loss": "loss", "val_loss": "validation loss"}
    losses = [f"{names[key]} {row[key]:.4f}" for key in names if key in row]
    names = {"MaxF": "MaxF", "IoU50": "IoU", "mIoU": "mIoU", "accuracy": "pixel accuracy"}
    scores = [f"{names[key]} {row[key]:.2f} %" for key in names if key in row]
    return " · ".join([f"epoch {row['epoch']}{total}", f"{row['seconds']:.0f} s", *losses, *scores])


class BatchNormReestimation(pl.Callback):
    """Before each validation: BatchNorm of the EMA weights from 32 training images at once.

    After each epoch, where nothing validates. Four times 32 in the last epoch; see
    `model.reestimate_batch_norm`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        reestimate_batch_norm(module.ema, self.batches(trainer, module))

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not sum(trainer.num_val_batches):
            module.ema.eval()
            self.on_validation_epoch_start(trainer, module)

    def batches(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[torch.Tensor]:
        """Images (N, 3, H, W) as the network gets them in training."""
        loader = trainer.train_dataloader
        count = 128 if module.is_last_epoch() else 32
        pool = loader.sampler.plan.pool(loader.sampler.progress)
        order = np.random.default_rng(self.seed).permutation(pool)
        chosen = order[:count].tolist()
        batches = -(-len(chosen) * trainer.accumulate_grad_batches // 32)
        for indices in np.array_split(chosen, max(1, min(len(chosen) // 2, batches))):
            batch = loader.collate_fn([loader.dataset[index] for index in indices])
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            with trainer.precision_plugin.val_step_context():
                yield module.resized(batch)[0]


class EpochBar(TQDMProgressBar):
    """Lightning's progress bar, one line per epoch; the short validation has none of its own."""

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)


def on_terminal() -> bool:
    """Whether what is printed goes to a terminal; a file gets one line per epoch instead."""
    return sys.stdout.isatty()


def around_training(run: TrainingCallback, seed: int) -> list[pl.Callback]:
    """All callbacks of a training; on a terminal with a bar. `run` keeps what the first makes."""
    bar = [EpochBar(leave=True)] if on_terminal() else []
    return [BatchNormReestimation(seed), run, *bar]


# --------------------------------------------------------------------------------------------------
#  Interruption, and memory that runs out
# --------------------------------------------------------------------------------------------------


END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM."""


class Stopped(UserError):
    """Another process ended, such as a worker of a loader: what was trained is exported."""


# Why processes leave the training; the gravest of all processes counts.
REASONS = {1: torch.OutOfMemoryError, 2: Interrupted, 3: SystemExit}


@contextlib.contextmanager
def interruptible(run: TrainingCallback) -> Iterator[None]:
    """Leave the block on Ctrl-C and SIGTERM; a second one ends the process at once.

    Also where it is `Stopped`. Several processes leave at their next meeting. `run.signals` holds
    the signal's number, or the error, afterwards (`end_process`).
    """
    signals = run.signals

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signals.append(number)
        if not run.together:
            raise Interrupted

    run.handler = interrupt
    handlers = {number: signal.signal(number, interrupt) for number in END_SIGNALS}
    try:
        yield
    except (Interrupted, Stopped) as end:
        signals += [end] if isinstance(end, Stopped) else []
        exports = "exports what was reached; " if run.rows else ""
        print(f"\ninterrupted: {exports}{run.describe_end()}", flush=True)
    finally:
        for number in END_SIGNALS:  # Lightning has put back the handler that it found
            signal.signal(number, signal.SIG_DFL if number in signals else handlers[number])


def end_process(run: TrainingCallback) -> None:
    """End all processes as the signal would have, if one came; or raise the error."""
    if run.run_log:
        run.run_log.close(len(run.rows))
    remove_files()
    for ends in in_all_processes(run.signals):
        for signal_or_error in ends:
            if isinstance(signal_or_error, Stopped):
                raise signal_or_error
            signal.signal(signal_or_error, signal.SIG_DFL)  # it may have come to another process
            os.kill(os.getpid(), signal_or_error)


def in_all_processes(value: Any) -> list[Any]:
    """The values of all processes, in each of them: they wait for each other.

    Where another one is gone, the first one has its own value alone, and the others end.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    atexit.register(close_group)
    try:
        torch.distributed.all_gather_object(values, value)
    except RuntimeError:
        if rank_zero_only.rank:
            raise SystemExit(2) from None
        return [value]
    return values


def no_time_for_a_fold(clock: Clock) -> bool:
    """Whether this session ends before another fold; the first process decides for all."""
    over = clock.session_over() or clock.deadline - time.monotonic() < 60
    return in_all_processes(over)[0]


def close_group() -> None:
    """At the end of a process; with gloo's threads still there it would abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def leave_together(run: TrainingCallback) -> Iterator[None]:
    """Where a process leaves the block by an error, the others leave it, too, see `meet`."""
    try:
        with clear_loader_errors():
            yield
    except BaseException as error:
        reason = 2 if isinstance(error, (Interrupted, Stopped, SIGTERMException)) else 3
        reason = 1 if isinstance(error, torch.OutOfMemoryError) else reason
        if run.meets:
            # this error is raised instead; the others may be gone
            with contextlib.suppress(REASONS[reason], RuntimeError):
                run.meet(run.device, reason)
        run.together = run.meets = False
        if isinstance(error, SIGTERMException):  # of Lightning, in all processes
            raise Interrupted from None
        raise


@contextlib.contextmanager
def clear_loader_errors() -> Iterator[None]:
    """Name the remedy where workers died, such as for want of memory, or another process."""
    try:
        yield
    except RuntimeError as error:
        if "onnection closed by peer" in str(error) or "onnection reset by peer" in str(error):
            problem, remedy = "another process ended", "its message says why"
            raise Stopped("--devices", problem, remedy) from None
        if "DataLoader worker (pid" not in str(error):
            raise
        full = "bus error" in str(error).lower()
        problem = "shared memory is used up" if full else f"one was killed ({reason_of(error)})"
        raise Stopped("the workers that load data", problem, "take --workers 0") from None


def more_parts(parts: int, batch_size: int, device: str) -> int:
    """Of a batch, after memory ran out: twice as many. Raises UserError where it was one image."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if 2 * parts > batch_size:
        raise UserError(
            f"the {device}'s memory",
            "cannot hold one image",
            "take smaller --height and --width, or a smaller --encoder",
        )
    batches = f"batches of {batch_size} with gradient accumulation over {2 * parts} parts"
    print(f"out of memory: continues with {batches}", flush=True)
    return 2 * parts


# --------------------------------------------------------------------------------------------------
#  The loss, and the learning-rate finder
# --------------------------------------------------------------------------------------------------


def check_loss(value: torch.Tensor, epoch: int, names: list[str]) -> None:
    """Raise UserError for a loss that is not finite. `epoch`: from 0; `names`: of its images."""
    if not torch.isfinite(value):
        raise UserError(
            "the loss",
            f"is {value.item()} in epoch {epoch + 1}, images {', '.join(names)}",
            "the weights so far are kept: try a smaller --lr or --precision 32, look at them",
        )


def find_lr(
    module: pl.LightningModule, loader: Any, make_trainer: Callable[..., pl.Trainer], parts: int
) -> float:
    """Lightning's learning-rate finder: 50 steps. Raises UserError.

    `make_trainer`: of train.py; the training's own might end before the finder. `parts`: of a
    batch, for gradient accumulation.
    """
    endless = {"max_epochs": -1, "limit_val_batches": 0, "accumulate_grad_batches": parts}
    options = {"num_training": 50, "min_lr": 1e-6, "max_lr": 0.1, "update_attr": False}
    with tempfile.TemporaryDirectory() as folder:  # for a checkpoint
        trainer = make_trainer(module.config, default_root_dir=folder, **endless)
        finder = Tuner(trainer).lr_find(copy.deepcopy(module), loader, **options)
    lr = finder.suggestion()
    if lr is None:
        raise UserError("--lr auto", "found none, the loss left the numbers", "give --lr 5e-4")
    print(f"--lr auto: chose {lr:.2e} after {len(finder.results['lr'])} steps")
    return lr
