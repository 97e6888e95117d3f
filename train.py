"""Train a road segmentation model on picture and mask pairs.

    python train.py --data ../input/kittiroadsegmentation --out out
    python train.py --data my_pairs --epochs 20 --encoder resnet50 --batch_size 4
    python train.py --data my_pairs --max_minutes 60        # the learning-rate schedule fits the hour
    python train.py --data my_pairs --out out               # again: goes on where out/ was interrupted

Writes model.pt (averaged weights), last.ckpt, config.json, metrics.csv, metrics.json, curves.png, pr_curve.png and
validation.jpg under --out. What to change first: `Config` in utils.py (or its flags), then `augmentation` and `loss`.
"""

from __future__ import annotations

import sys
import time

from utils import Config, complain, parse

STARTED = time.monotonic()
if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag answer at once
    sys.excepthook = complain
    CONFIG = parse(Config, __doc__)

import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler

import utils
from infer import predict
from utils import IGNORE, RoadDataset, Scoreboard, UserError

# =====================================================================================================================
#  DATA: augmentation and loaders
# =====================================================================================================================


def augmentation(cfg: Config) -> A.Compose:
    """Random changes that leave a road a road: mirrored, shifted, scaled, lit otherwise; never upside down."""
    k = cfg.augment
    tile = [
        A.PadIfNeeded(cfg.height, cfg.width, position="top_left", border_mode=cv2.BORDER_REPLICATE),
        A.RandomCrop(cfg.height, cfg.width),
    ]
    steps = [
        A.HorizontalFlip(p=0.5),
        A.Affine(scale=(1 - 0.2 * k / (1 + 0.2 * k), 1 + 0.2 * k), translate_percent=(-0.08 * k, 0.08 * k),
                 rotate=(-3 * k, 3 * k), shear=(-4 * k, 4 * k), balanced_scale=True, p=0.7,
                 interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_NEAREST,
                 border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=IGNORE),
        A.RandomBrightnessContrast(0.25 * k, 0.25 * k, p=0.6),
        A.HueSaturationValue(8 * k, 25 * k, 10 * k, p=0.4),
        A.RandomShadow(shadow_roi=(0, 0, 1, 1), p=0.2),
    ]  # fmt: skip
    return A.Compose(tile * (cfg.tiles == "true") + steps * (k > 0))


class Share(Sampler):
    """This process's share of the items: in an order that follows from seed and epoch alone, or as they stand.

    A resumed run so draws what the whole one would have drawn, and several processes see no item twice.
    """

    def __init__(self, dataset: RoadDataset, cfg: Config, shuffle: bool) -> None:
        self.dataset, self.seed, self.shuffle, self.epoch = dataset, cfg.seed, shuffle, 0
        self.world, _ = processes(cfg)

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it
        self.epoch = epoch
        self.dataset.epoch.fill_(epoch)

    def share(self) -> list[int]:
        order = np.arange(len(self.dataset))
        if self.shuffle:  # every process gets as many, or one would wait for ever for the others
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
            order = order[: len(order) // self.world * self.world]
        return order[torch.distributed.get_rank() :: self.world].tolist() if self.world > 1 else order.tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.share())

    def __len__(self) -> int:
        return len(self.share())


def loaders(samples: pd.DataFrame, pairs: list | None, cfg: Config, parts: int = 1) -> tuple[DataLoader, DataLoader]:
    """The training and the validation loader; a batch comes in `parts`, and each process takes its share."""
    chosen = {part: np.flatnonzero((samples.fold == cfg.fold) == part) for part in (False, True)}
    train, valid = (samples.iloc[chosen[part]] for part in (False, True))
    kept = pairs and [pairs[index] for index in chosen[False]]
    spare = min(4, os.cpu_count() or 1) if utils.best_device() != "cpu" else 0  # a CPU's cores are the model's
    workers = cfg.workers if cfg.workers >= 0 else spare
    usual = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available(),
             "collate_fn": utils.collate}  # fmt: skip
    learned, checked = RoadDataset(train, kept, cfg, augmentation(cfg)), RoadDataset(valid, None, cfg)
    world, _ = processes(cfg)
    batch = max(1, min(-(-cfg.batch_size // (parts * world)), len(learned) // world))
    return (
        DataLoader(learned, batch, sampler=Share(learned, cfg, shuffle=True), drop_last=True, **usual),
        DataLoader(checked, batch, sampler=Share(checked, cfg, shuffle=False), **usual),
    )


# =====================================================================================================================
#  MODEL: loss, optimiser, what an epoch measures
# =====================================================================================================================


def loss(logits: torch.Tensor, mask: torch.Tensor, dice: float) -> torch.Tensor:
    """BCE + dice x Dice over the valid pixels alone.

    `logits` (N, 1, H, W), `mask` (N, 1, H, W) float32 of 0, 1 and 255 (not valid). Returns a float32 scalar; Dice
    (Milletari et al., 3DV 2016) is taken over the whole batch, so that a picture without road does no harm.
    """
    logits, valid = logits.float(), (mask != IGNORE).float()  # float32: Dice overflows in 16 bits
    truth = mask * valid
    bce = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * valid).sum() / valid.sum().clamp(min=1)
    p = logits.sigmoid() * valid
    return bce + dice * (1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1))


GROW = ((0.35, 0.5), (0.65, 0.75))  # until this part of the training, height and width are this part of the full size


class RoadModel(pl.LightningModule):
    """The network, its moving average (which is validated and kept), AdamW."""

    def __init__(self, cfg: Config, network: torch.nn.Module) -> None:
        super().__init__()
        self.cfg, self.lr = cfg, 0.0  # the Keeper sets the optimiser's rate; `lr` is where Lightning's finder looks
        self.network = network.to(memory_format=torch.channels_last)  # up to five times faster, on a CPU too
        self.average = AveragedModel(self.network, multi_avg_fn=self.update).requires_grad_(False)
        self.scoreboard = Scoreboard()
        self.progress, self.averaged = 1.0, 0  # of the training, set by the Keeper; steps that the average has seen
        if cfg.compile:
            self.network.compile()

    def update(self, average: list[torch.Tensor], weights: list[torch.Tensor], _: torch.Tensor) -> None:
        """Move the average towards the weights; at the start faster, so that short runs forget their first steps."""
        decay = min(self.cfg.ema, (1 + self.global_step) / (10 + self.global_step))
        get_ema_multi_avg_fn(decay)(average, weights, _)

    def stage(self) -> Config:
        """The settings at this point of the training: smaller pictures first."""
        cfg, step = self.cfg, self.network.encoder.output_stride if self.network.requires_divisible_input_shape else 16
        part = next((part for until, part in GROW if self.progress < until), 1.0)
        if part == 1 or not cfg.grow or cfg.tiles == "true":
            return cfg
        height, width = (max(32, step * round(part * size / step)) for size in (cfg.height, cfg.width))
        return dataclasses.replace(cfg, height=height, width=width)

    def sized(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures, normalised, and masks of a batch at this stage's size, float32."""
        image, mask, cfg = batch["image"], batch["mask"].float(), self.stage()
        if image.shape[2:] != (cfg.height, cfg.width):
            image = F.interpolate(image.float(), (cfg.height, cfg.width), mode="area")
            mask = F.interpolate(mask, (cfg.height, cfg.width), mode="nearest-exact")
        return utils.normalise(image, cfg), mask

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights, decay = self.network.parameters(), self.cfg.weight_decay
        optimiser = torch.optim.AdamW(weights, self.lr, weight_decay=decay, fused=True)
        optimiser._step_supports_amp_scaling = False  # Lightning unscales, then clips; else it refuses fused ones
        return optimiser

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        image, mask = self.sized(batch)
        value = loss(self.network(image), mask, self.cfg.dice)
        if not torch.isfinite(value):
            raise UserError(f"the loss is {value.item()} in epoch {self.current_epoch + 1}, pictures "
                            f"{', '.join(batch['name'])}; the weights so far are kept. Try a smaller --lr, "
                            "--precision 32, or look at these pictures")  # fmt: skip
        self.log("train_loss", value, on_step=False, on_epoch=True, batch_size=len(batch["image"]), prog_bar=True)
        return value

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step != self.averaged:  # a batch may come in parts
            self.average.update_parameters(self.network)
            self.averaged = self.global_step

    def on_validation_epoch_start(self) -> None:
        self.scoreboard = Scoreboard()
        self.measure_norms()

    def last_epoch(self) -> bool:
        """Whether no other epoch follows: the epochs or the minutes are used up."""
        return self.trainer.should_stop or self.current_epoch + 1 == self.cfg.epochs

    def measure_norms(self) -> None:
        """Measure the averaged network's batch normalisation on 32 training pictures at once, at the end on 4 times 32.

        What training gathers from batches of 4 misses how pictures differ from batch to batch: where some are dark and
        some bright, whole masks went wrong (precise BN; Wu and Johnson, arXiv 2105.07576). torch's `update_bn` would
        also switch dropout on. On KITTI 128 pictures brought 0.3 of MaxF over 32.
        """
        norms = [part for part in self.average.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return
        for norm in norms:
            norm.train().reset_running_stats()
            norm.momentum = None  # the mean over the batches below
        data, most = self.trainer.train_dataloader.dataset, 128 if self.last_epoch() else 32
        chosen = np.random.default_rng(self.cfg.seed).permutation(len(data))[:most].tolist()
        parts = max(1, min(len(chosen) // 2, -(-len(chosen) * self.trainer.accumulate_grad_batches // 32)))
        for part in np.array_split(chosen, parts):
            batch = self.transfer_batch_to_device(utils.collate([data[index] for index in part]), self.device, 0)
            with self.trainer.precision_plugin.val_step_context():
                self.average(self.sized(batch)[0])
        for norm in norms:
            norm.eval()

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        image, mask = self.sized(batch)
        logits = self.average(image)
        value = loss(logits, mask, self.cfg.dice)
        self.log("val_loss", value, batch_size=len(logits), sync_dist=True)
        for probability, truth in zip(logits.float().sigmoid()[:, 0], batch["truth"], strict=True):
            restored = utils.to_8bit(utils.restore(probability, truth.shape, self.stage()))
            self.scoreboard.add("", {"image": utils.pixel_counts(restored, torch.as_tensor(truth).to(self.device))})

    def on_validation_epoch_end(self) -> None:
        sums = self.scoreboard.counts.setdefault("image", {})
        mine = sums.get("all", torch.zeros(2, 256, dtype=torch.int64, device=self.device))
        sums["all"] = self.trainer.strategy.reduce(mine, reduce_op="sum")  # over the processes
        score = self.scoreboard.report()["image"]["all"]
        for name in ("MaxF", "AP", "IoU50"):
            self.log(name, score[name], prog_bar=name == "MaxF", rank_zero_only=True)


SOFT = 2.0  # model.pt's logits are divided by it


def softened(network: torch.nn.Module) -> torch.nn.Module:
    """A copy that is less sure of itself: its last convolution's weights are divided by `SOFT`.

    The measures read probabilities in 8 bits, which cannot tell 0.001 from 0.00001; AP asks for the last road pixel and
    so gained 1.2 on KITTI. Masks at 0.5 stay as they are (temperature scaling; Guo et al., ICML 2017).
    """
    network = copy.deepcopy(network)
    *_, last = (part for part in network.segmentation_head.modules() if isinstance(part, torch.nn.Conv2d))
    with torch.no_grad():
        for weights in last.parameters():
            weights /= SOFT
    return network


# =====================================================================================================================
#  TRAINER: the clock, the schedule, what is kept
# =====================================================================================================================


def schedule(progress: float) -> float:
    """The learning rate's factor at 0..1 of the training: a short warm-up, then a cosine down to 1 %."""
    return min(1.0, 0.1 + progress / 0.05) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1))) / 2)


# The best of 22 pictures is luck: in 8 of 8 trainings the last epoch did better on other streets, by 0.1 to 0.8.
# model.pt is the last one's, unless that fell this far behind the best, which means that it has gone wrong.
SLACK = 5.0


class Keeper(pl.Callback):
    """Sets the learning rate by the clock, stops in time, keeps model.pt, last.ckpt and metrics.csv whole on disk."""

    def __init__(self, cfg: Config, identity: dict[str, Any], started: float) -> None:
        self.cfg, self.out, self.identity = cfg, Path(cfg.out), identity
        self.started, self.earlier = started, 0.0  # monotonic seconds; seconds of the resumed parts
        self.lr, self.best, self.rows = cfg.lr, -1.0, []
        self.saved = self.reserve = 0.0  # seconds: when last.ckpt was written; what the end of the run will take

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.lr, "best": self.best, "rows": self.rows, "seconds": self.seconds(), "reserve": self.reserve,
                "identity": self.identity}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lr, self.rows = state["lr"], state["rows"]  # `best` follows from model.pt too, which may be newer
        self.earlier, self.reserve = state["seconds"], state["reserve"]

    def finished(self) -> bool:
        """Whether the resumed run has used up the epochs or the minutes that are set now."""
        epochs = self.rows[-1]["epoch"] if self.rows else 0
        in_time = 60 * self.cfg.max_minutes - self.reserve > self.earlier or not self.cfg.max_minutes
        return not in_time or 0 < self.cfg.epochs <= epochs

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.started

    def progress(self, trainer: pl.Trainer) -> float:
        """0 at the start, 1 at the last step that epochs or minutes allow."""
        last_step = self.cfg.epochs * -(-trainer.num_training_batches // trainer.accumulate_grad_batches) - 1
        by_steps = trainer.global_step / max(1, last_step) if self.cfg.epochs else 0.0
        by_time = self.seconds() / max(60 * self.cfg.max_minutes - self.reserve, 1e-9) if self.cfg.max_minutes else 0.0
        return max(by_steps, by_time)

    def reserve_for(self, validation: float) -> None:
        """Keep time for the end: a step, a validation, the final one with mirrored pictures, pictures, export."""
        self.reserve = 12 + 6 * validation

    def on_train_batch_start(self, trainer: pl.Trainer, module: RoadModel, batch: Any, index: int) -> None:
        if index == 0:
            torch.manual_seed(self.cfg.seed + trainer.current_epoch)  # of dropout: the same in a resumed run
            self.epoch_started = time.monotonic()
        if index == 20 and not self.reserve:  # no validation yet: its passes take about a third of a step
            step = (time.monotonic() - self.epoch_started) / index
            self.reserve_for(step / 3 * trainer.num_val_batches[0])
        module.progress = progress = trainer.strategy.broadcast(self.progress(trainer))  # one clock for all processes
        trainer.optimizers[0].param_groups[0]["lr"] = self.lr * schedule(progress)
        trainer.should_stop = self.cfg.max_minutes > 0 and progress >= 1  # this step is the last

    def on_validation_start(self, *_: Any) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, module: RoadModel) -> None:
        self.reserve_for(time.monotonic() - self.validation_started)
        score = module.scoreboard.report()["image"]["all"]
        if score["MaxF"] > self.best - SLACK and trainer.is_global_zero:
            self.best = max(self.best, score["MaxF"])
            network = softened(module.average.module)
            utils.save_model(self.out / "model.pt", network, module.stage(), 0.5, {"epoch": score})

    def on_train_epoch_end(self, trainer: pl.Trainer, module: RoadModel) -> None:
        measured = {name: round(float(trainer.callback_metrics[name]), 4)
                    for name in ("train_loss", "val_loss", "MaxF", "AP", "IoU50")}  # fmt: skip
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        when = {"epoch": trainer.current_epoch + 1, "seconds": round(self.seconds(), 1)}
        self.rows.append(when | {"lr": rate} | measured)
        if trainer.is_global_zero:
            utils.write_file(self.out / "metrics.csv", pd.DataFrame(self.rows).to_csv(index=False))
        if trainer.strategy.broadcast(module.last_epoch() or time.monotonic() - self.saved > 120):  # 400 MB take 2 s
            if trainer.is_global_zero:
                utils.write_file(self.out / "last.ckpt", trainer.save_checkpoint)
            else:  # all processes take part, the first writes
                trainer.save_checkpoint(self.out / "last.ckpt")
            self.saved = time.monotonic()


class EpochBar(TQDMProgressBar):
    """Lightning's progress bar, one line an epoch; the short validation has none of its own."""

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)


def processes(cfg: Config) -> tuple[int, int]:
    """How many processes train together, in all and on this host: those of torchrun or srun, else our own."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return cfg.devices, cfg.devices


def quiet_trainer(cfg: Config, **options: Any) -> pl.Trainer:
    """A Trainer that leaves writing and logging to the Keeper."""
    world, local = processes(cfg)
    precision = utils.precision(cfg, utils.best_device(), training=True)
    return pl.Trainer(accelerator="auto", devices=local, num_nodes=world // local, precision=precision, logger=False,
                      enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
                      use_distributed_sampler=False, **options)  # fmt: skip


def find_lr(cfg: Config, model: RoadModel, loader: DataLoader) -> float:
    """Lightning's learning-rate finder, in a Trainer of its own: 50 steps, however short an epoch, no validation."""
    from pytorch_lightning.tuner import Tuner

    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(cfg, max_epochs=-1, limit_val_batches=0, default_root_dir=folder)
        found = Tuner(trainer).lr_find(model, loader, num_training=50, min_lr=1e-6, max_lr=0.1, update_attr=False)
    lr = found.suggestion()
    if lr is None:
        raise UserError("--lr auto: the finder found no learning rate, the loss left the numbers; give --lr 5e-4")
    print(f"--lr auto: chose {lr:.2e} after {len(found.results['lr'])} steps")
    return lr


# =====================================================================================================================
#  RUN: from settings to files
# =====================================================================================================================

PIXELS = {"cuda": 384 * 1248, "mps": 192 * 640, "cpu": 72 * 320, "cpu bf16": 112 * 352}  # of an input, by speed
TILES_FROM = 2e6  # pixels of the median picture from which on it is cut into tiles, not shrunk as a whole
FREE = {"data", "masks", "out", "epochs", "max_minutes", "precision", "devices", "workers", "resume", "tta", "compile"}


def resolve(cfg: Config, samples: pd.DataFrame, network: torch.nn.Module) -> Config:
    """Fill in what the settings leave to the device, the pictures and the encoder. Raises UserError for a bad size."""
    mean, std = utils.input_normalisation(cfg)
    device = utils.best_device()
    bf16 = device == "cpu" and utils.precision(cfg, device, training=True) == "bf16-mixed"
    height, width = samples.height.median(), samples.width.median()
    highest = float(samples.above[samples.fold != cfg.fold].min())
    top = cfg.top if cfg.top >= 0 else round(highest - 0.05, 2) if 0.15 < highest < 1 else 0.0  # less is not worth it
    tiles = cfg.tiles if cfg.tiles != "auto" else str(bool(height * width > TILES_FROM)).lower()
    top = 0.0 if tiles == "true" else min(top, 0.9)
    height *= 1 - top
    pixels = PIXELS["cpu bf16" if bf16 else device] * (2 if tiles == "true" else 1)
    scale = min(1.0, math.sqrt(pixels / (height * width)))
    size = [given or max(32, 32 * round(own * scale / 32))
            for given, own in ((cfg.height, height), (cfg.width, width))]  # fmt: skip
    step = network.encoder.output_stride if network.requires_divisible_input_shape else 1
    for flag, value in zip(("height", "width"), size, strict=True):
        if value % step:
            near = " or ".join(str(n) for n in (value // step * step, -(-value // step) * step) if n)
            raise UserError(f"--{flag} {value}: {cfg.arch} with {cfg.encoder} takes multiples of {step}; take {near}")
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--height {size[0]} --width {size[1]}: not possible with {cfg.arch} and {cfg.encoder} "
                        f"({utils.reason_of(error)}); take a larger size") from None  # fmt: skip
    network.train()
    if cfg.precision == "16-mixed" and device == "cpu":
        raise UserError("--precision 16-mixed: needs a GPU; take auto")
    batch = 8 if device != "cpu" or bf16 else 4
    if device == "cpu":  # a step takes long, however small the pictures: give it more of them
        most = int((samples.fold != cfg.fold).sum()) // 100  # but leave an epoch a hundred steps
        batch *= max(1, min(round(pixels / (size[0] * size[1])), 16 // batch, most // batch))
    epochs = cfg.epochs or (0 if cfg.max_minutes else 40)
    metric = cfg.metric if cfg.metric != "auto" else "maxf" if samples.category.any() else "dice"
    return dataclasses.replace(cfg, mean=cfg.mean or mean, std=cfg.std or std, epochs=epochs,
                               batch_size=cfg.batch_size or batch, height=size[0], width=size[1], top=top, tiles=tiles,
                               metric=metric)  # fmt: skip


def identity_of(cfg: Config, samples: pd.DataFrame) -> dict[str, Any]:
    """What must be the same for a run to be resumed: the settings, and the samples with their folds."""
    names = [[Path(row.image).name, Path(row.mask).name, int(row.fold)] for row in samples.itertuples()]
    data = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return {key: value for key, value in dataclasses.asdict(cfg).items() if key not in FREE} | {"data": data}


def find_checkpoint(cfg: Config, keeper: Keeper) -> Path | None:
    """The last.ckpt to go on from, read into the keeper. Raises UserError where it belongs to another run."""
    out = Path(cfg.out)
    path = out / "last.ckpt" if cfg.resume == "auto" else Path(cfg.resume)
    if cfg.resume == "none" or (cfg.resume == "auto" and not path.exists()):
        return None
    content = utils.read_checkpoint(path, "--resume")
    state = content.get("callbacks", {}).get("Keeper")
    if not state:
        raise UserError(f"--resume {path}: not a last.ckpt of train.py; give another, or none")
    other = [key for key, value in keeper.identity.items() if state["identity"].get(key) != value]
    if other:
        raise UserError(f"--resume {path}: a run with other {', '.join('--' + key for key in other)}; "
                        "choose another --out, or --resume none to start over")  # fmt: skip
    keeper.load_state_dict(state)
    model = path.with_name("model.pt")
    metrics = utils.read_checkpoint(model, "--resume").get("metrics", {}) if model.exists() else {}
    keeper.best = max(state["best"] if metrics else -1.0, metrics.get("epoch", {}).get("MaxF", -1.0))
    return path


def train(cfg: Config, started: float | None = None) -> Path:
    """Train, keep the averaged weights, validate them; with --fold all for each fold in turn. Raises UserError.

    `started`: the time.monotonic() from which max_minutes counts; None is now. Returns the folder written to.
    """
    started, out = time.monotonic() if started is None else started, Path(cfg.out)
    utils.reuse_memory()
    utils.srun_as_torchrun()
    samples = utils.survey(utils.find_samples(cfg.data, cfg.target, cfg.masks, training=True))
    samples["fold"] = utils.assign_folds(samples, cfg)
    sizes = [f"{w}x{h}" for h, w in sorted(zip(samples.height, samples.width, strict=True))]
    print(
        f"data: {utils.LAYOUTS[samples.layout[0]]} · {len(samples)} pairs · {sizes[0]} to {sizes[-1]} · "
        f"{100 * samples.share.mean():.1f} % foreground · {100 * (samples.share == 0).mean():.0f} % masks empty",
        flush=True,
    )
    folds = sorted(set(samples.fold))
    if cfg.fold != "all":
        if cfg.fold not in folds:
            raise UserError(f"--fold {cfg.fold}: the {len(samples)} pairs make folds 0 to {folds[-1]}, or all")
        train_fold(cfg, samples, started)
        return out
    if cfg.resume not in ("auto", "none"):
        raise UserError(f"--resume {cfg.resume}: goes with one --fold; with all take auto")
    results = []  # of all samples, each predicted by the fold that was not trained on it
    for fold in folds:
        print(f"fold {fold} of {len(folds)}", flush=True)
        share = dataclasses.replace(
            cfg, fold=fold, out=str(out / f"fold{fold}"), max_minutes=cfg.max_minutes / len(folds)
        )
        results += train_fold(share, samples, started)
        started = time.monotonic()
    if results:
        trained = utils.load_model(out / "fold0" / "model.pt", "cpu")
        tuned = write_scores(out, results, trained.cfg, "out of fold")
        for fold in folds:
            path = out / f"fold{fold}" / "model.pt"
            trained = utils.load_model(path, "cpu")
            config = dataclasses.replace(trained.cfg, min_pixels=tuned[1])
            utils.save_model(path, trained.model, config, tuned[0], trained.metrics)
    return out


def train_fold(cfg: Config, samples: pd.DataFrame, started: float) -> list[Result]:
    """Train on all folds but cfg.fold, predict that one. Returns its results; of several processes only the first."""
    pl.seed_everything(cfg.seed, verbose=False)
    network = utils.build_model(cfg, cfg.encoder_weights)
    cfg = resolve(cfg, samples, network)
    keeper = Keeper(cfg, identity_of(cfg, samples), started)
    checkpoint = find_checkpoint(cfg, keeper)
    pairs = utils.read_all(samples, cfg)
    out = utils.writable_folder(cfg.out)
    if checkpoint and checkpoint.parent.resolve() != out.resolve() and checkpoint.with_name("model.pt").exists():
        utils.write_file(out / "model.pt", checkpoint.with_name("model.pt").read_bytes())
    if not checkpoint:
        (out / "last.ckpt").unlink(missing_ok=True)  # of a run that is started over
    valid = samples[samples.fold == cfg.fold]
    device = utils.best_device()
    print(f"folds: {len(samples) - len(valid)} pairs to train and {len(valid)} to validate on\n"
          f"model: {cfg.arch} {cfg.encoder}, weights {cfg.encoder_weights}, input {cfg.height}x{cfg.width}"
          f"{' in tiles' if cfg.tiles == 'true' else f' below the upper {100 * cfg.top:.0f} %' if cfg.top else ''}, "
          f"batch {cfg.batch_size}, {device} in {utils.precision(cfg, device, training=True)}", flush=True)  # fmt: skip
    if keeper.lr == "auto":
        keeper.lr = find_lr(cfg, RoadModel(cfg, network), loaders(samples, pairs, cfg)[0])
    if keeper.finished() and (out / "model.pt").exists():
        print(
            f"resume: {checkpoint} is finished; for more raise --epochs or --max_minutes, to start over --resume none"
        )
        return finish(out, valid, keeper.rows)
    first = fit(cfg, samples, pairs, network, keeper, checkpoint)
    return finish(out, valid, keeper.rows) if first else []


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, with its number."""


def interrupt(number: int, _: Any) -> None:
    """Handle a signal: leave the training, once."""
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted(number)


def fit(cfg: Config, samples: pd.DataFrame, pairs: list | None, network: torch.nn.Module, keeper: Keeper,
        checkpoint: Path | None) -> bool:  # fmt: skip
    """Run the training. Returns whether this process is the first of several.

    Where the device's memory runs out, each batch is taken in twice as many parts. Ctrl-C and SIGTERM export what
    is reached, then end the process as they would have.
    """
    out, parts, start = Path(cfg.out), 1, copy.deepcopy(network.state_dict())
    usual = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            if checkpoint:
                print(f"resume: going on from {checkpoint}, after epoch {len(keeper.rows)}", flush=True)
            trainer = quiet_trainer(cfg, max_epochs=cfg.epochs or -1, callbacks=[keeper, EpochBar(leave=True)],
                                    gradient_clip_val=1.0, accumulate_grad_batches=parts)  # fmt: skip
            try:
                trainer.fit(RoadModel(cfg, network), *loaders(samples, pairs, cfg, parts), ckpt_path=checkpoint,
                            weights_only=True if checkpoint else None)  # fmt: skip
                return trainer.is_global_zero
            except torch.OutOfMemoryError:
                parts *= 2
                if parts > cfg.batch_size:
                    raise UserError(f"the {utils.best_device()}'s memory holds no picture of {cfg.height}x{cfg.width}; "
                                    "take smaller --height and --width, or a smaller --encoder") from None  # fmt: skip
            print(f"memory ran out: goes on with batches of {cfg.batch_size} in {parts} parts", flush=True)
            network.load_state_dict(start)
            keeper.started = time.monotonic() if (out / "last.ckpt").exists() else keeper.started  # it has the rest
            checkpoint = out / "last.ckpt" if (out / "last.ckpt").exists() else None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    except Interrupted as signalled:
        [number] = signalled.args
        if trainer.is_global_zero and keeper.rows:
            print("\ninterrupted: exports what is reached; the same command goes on", flush=True)
            finish(out, samples[samples.fold == cfg.fold], keeper.rows)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        raise
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Result(NamedTuple):
    """One validation picture, predicted by a model that was not trained on it."""

    row: Any  # of the samples
    probability: bytes  # (h, w) uint8 as PNG: many pictures fit into memory
    counts: dict[str, torch.Tensor]  # utils.picture_counts


def finish(out: Path, valid: pd.DataFrame, rows: list[dict[str, float]]) -> list[Result]:
    """Validate model.pt's weights just as infer.py will use them; write the scores, the pictures, the threshold."""
    trained = utils.load_model(out / "model.pt", utils.best_device())
    results = []
    for row, picture, probability in predict([trained], valid):
        truth = utils.read_truth(row.mask, row.layout, picture.shape[:2])
        counts = utils.picture_counts(row, probability, truth)
        results.append(Result(row, utils.encode_image(probability, ".png"), counts))
    threshold, min_pixels, metrics = write_scores(out, results, trained.cfg, "validation")
    cfg = dataclasses.replace(trained.cfg, min_pixels=min_pixels)
    utils.save_model(out / "model.pt", trained.model, cfg, threshold, metrics)
    utils.write_file(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
    utils.write_image(out / "validation.jpg", validation_picture(results, threshold, min_pixels))
    utils.write_file(out / "curves.png", lambda part: draw_curves(rows, part))
    print(f"wrote {out / 'model.pt'}; look at {out / 'validation.jpg'} and {out / 'curves.png'}")
    return results


def write_scores(out: Path, results: list[Result], cfg: Config, title: str) -> tuple[float, int, dict[str, Any]]:
    """Choose threshold and min_pixels for cfg.metric, write metrics.json and pr_curve.png.

    Returns the threshold, min_pixels and the scores.
    """
    board = Scoreboard()
    for result in results:
        board.add(result.row.category, result.counts)
    report = board.report()
    counts = [result.counts["image"].numpy() for result in results]
    threshold, sizes = utils.choose_threshold(utils.scores_by_threshold(counts, cfg.metric)), [max(0, cfg.min_pixels)]
    if cfg.metric != "maxf" and cfg.min_pixels < 0:
        area = np.median([int(pixels.sum()) for pixels in counts])
        sizes = [int(area * part) for part in (0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)]
    masks = np.array([[utils.mask_scores(utils.drop_small(mask, size), truth) for size in sizes]
                      for mask, truth in (final_mask(result, threshold) for result in results)])  # fmt: skip
    best = int(masks.mean(0)[:, int(cfg.metric == "iou")].argmax())
    utils.write_file(out / "metrics.json", utils.metrics_json(report, masks[:, best], threshold))
    utils.write_file(out / "pr_curve.png", lambda part: utils.draw_pr_curve(board, part))
    print(f"{title}: {utils.score_line(report, masks[:, best])}, threshold {threshold:.3f}, "
          f"patches from {sizes[best]} pixels")  # fmt: skip
    return threshold, sizes[best], report


def final_mask(result: Result, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The mask at a threshold, bool (h, w), and the truth of a result."""
    probability = cv2.imdecode(np.frombuffer(result.probability, np.uint8), cv2.IMREAD_GRAYSCALE)
    return utils.to_mask(probability, threshold), utils.read_truth(
        result.row.mask, result.row.layout, probability.shape
    )


def validation_picture(results: list[Result], threshold: float, min_pixels: int) -> np.ndarray:
    """The worst, the median and the best sample by IoU, one above the other."""

    def mask_and_truth(result: Result) -> tuple[np.ndarray, np.ndarray]:
        mask, truth = final_mask(result, threshold)
        return utils.drop_small(mask, min_pixels), truth

    ious = [utils.mask_scores(*mask_and_truth(result))[1] for result in results]
    order = np.argsort(ious, kind="stable")
    pictures = []
    for name, index in (("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])):
        mask, truth = mask_and_truth(results[index])
        row = results[index].row
        title = f"{name}: {Path(row.image).stem[:24]}, IoU {100 * ious[index]:.1f} %"
        pictures.append(utils.comparison(utils.read_image(row.image), truth, mask, title, row.category))
    width = max(picture.shape[1] for picture in pictures)  # pictures of different shapes
    return np.vstack([np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures])


def draw_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Loss and scores over the epochs, as PNG."""
    plt, table = utils.pyplot(), pd.DataFrame(rows)
    kept = table[table.MaxF > table.MaxF.cummax() - SLACK].iloc[-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(table.epoch, table.train_loss, label="training")
    left.plot(table.epoch, table.val_loss, label="validation")
    left.set(title="Loss (BCE + Dice)", xlabel="epoch", ylim=(0, None))
    right.plot(table.epoch, table.MaxF, color="tab:green", label="MaxF")
    right.plot(table.epoch, table.IoU50, color="tab:gray", label="IoU at 0.5")
    right.plot(
        kept.epoch, kept.MaxF, "o", color="tab:green", label=f"kept: {kept.MaxF:.1f} % in epoch {kept.epoch:.0f}"
    )
    right.set(title="Validation scores, %", xlabel="epoch", ylim=(max(0, table.MaxF.max() - 40), 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    train(CONFIG, STARTED)
