"""Train a segmentation model on images with masks.

    python train.py --data ../input/kittiroadsegmentation --out out
    python train.py --data my_images --max_minutes 60    # the learning-rate schedule fits the hour

What to change first: `Config` (or its flags), then `augmentation` and `loss`.
"""

import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from utils import UserError, one_line_errors, parse, writable_folder

STARTED = time.monotonic()


@dataclass(frozen=True)
class Config:
    """The settings. One more line is one more flag; its comment is the help, [low..high] limits."""

    # --- data ---
    data: str = "auto"  # folder of images and masks; auto: below /kaggle/input, ../input, kagglehub
    out: str = "out"  # folder for everything that is written
    masks: str = "auto"  # folder, csv, or pattern such as labels/{stem}.png; auto: what is there
    foreground: str = ""  # values of the foreground in mask files, such as 15 or 1,3 or 128-255
    classes: str = "auto"  # auto: as found; one: all merged; a file of id,name; or names: car,road
    rle: Literal["auto", "columns", "rows", "relative"] = "auto"  # order of RLE; auto: as it fits
    missing: Literal["error", "empty"] = "error"  # images without mask; empty: without foreground
    window: str = "0.5,99.5"  # percentiles that turn black and white in images over 8 bits
    check: bool = False  # only check the data: write examples.jpg and augmented.jpg to look at
    target: Literal["road", "lane"] = "road"  # KITTI: the whole road, or the car's own lane
    folds: int = 10  # [2..1000] parts of the data; one validates, consecutive frames stay together
    fold: int | Literal["all"] = 0  # [0..999] the part that validates; all: one model for each part
    group: str = ""  # column of the csv whose equal values (a patient) stay in one fold
    seed: int = 0  # [0..2000000000] random numbers of folds, first weights and augmentations
    # --- model ---
    arch: str = "Unet"  # any architecture of smp: UnetPlusPlus, FPN, DeepLabV3Plus, Segformer, ...
    encoder: str = "resnet34"  # any encoder of smp; better: resnet50; faster: resnet18
    encoder_weights: str = "imagenet"  # imagenet, smp's other names, none, .safetensors, .pth file
    decoder_channels: str = "auto"  # 256,128,64,32,16, or a factor; auto: half for light encoders
    height: int = 0  # [0..16384] pixels of the input; 0: from images, device and minutes
    width: int = 0  # [0..16384] as height
    # [-1..0.9] share of the height cut off above; -1: down to the highest mask; auto: -1 for KITTI
    top: float | Literal["auto"] = "auto"
    tiles: bool | Literal["auto"] = "auto"  # cut into tiles; auto: large images, thin masks
    # --- training ---
    epochs: int = 0  # [0..1000000] passes over the data; 0: what max_minutes allows, else 40
    max_minutes: float = 0  # [0..1000000] limit of the training, which the schedule fits; 0: none
    session_minutes: float = 0  # [0..1000000] limit of this session: exports, to resume; 0: none
    batch_size: int = 0  # [0..65536] images per step; 0: 8, on a CPU 4 to 16
    lr: float | Literal["auto"] = 0  # [0..10] 0: 5e-4, pretrained (BatchNorm) 2e-3; auto: a finder
    weight_decay: float = 1e-2  # [0..10] AdamW's weight decay
    grow: bool | Literal["auto"] = "auto"  # progressive resizing; auto: where trained from scratch
    dice: float = 1.0  # [0..1000] weight of the Dice loss next to BCE or cross-entropy
    # of the loss; inverse: of the frequency; auto: inverse where classes exclude each other
    class_weights: Literal["auto", "none", "inverse"] = "auto"
    augment: float = 1.0  # [0..3] strength of the augmentation; 0: none
    ema: float = 0.98  # [0..0.99999] decay of the exponential moving average of the weights
    # to tune for; auto: KITTI maxf, else dice; miou: pooled over the images
    metric: Literal["auto", "maxf", "dice", "iou", "miou"] = "auto"
    empty_score: Literal["1", "0", "skip"] = "1"  # Dice and IoU of an empty mask that is right
    min_pixels: int = -1  # [-1..1000000000] minimum component area; -1: tuned for dice or iou
    tta: bool = True  # horizontal-flip test-time augmentation: a little better, twice the time
    # --- machine ---
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"  # auto: fastest native one
    devices: int = 1  # [1..1024] GPUs (or CPU processes)
    workers: int = -1  # [-1..256] processes that load data; -1: 4 next to a GPU, 0 on a CPU
    resume: str = "auto"  # auto: continue an unfinished run in --out; none: start over; a last.ckpt


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    with one_line_errors():
        CONFIG = parse(Config, __doc__)

import copy
import math
import os
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import callbacks
import class_metrics
import data
import encoders
import evaluate
import images
import loaders
import metrics
import model
import predict
import trial
import visualize
from callbacks import Clock, TrainingCallback
from classes import class_settings, classes_of
from images import IGNORE, Collection
from losses import class_loss
from model import ModelConfig

# --- Data -----------------------------------------------------------------------------------------


def augmentation(config: Config) -> A.Compose:
    """Random changes that keep a road a road: flipped sideways, moved, scaled, lit otherwise."""
    k = config.augment
    size, edge = (config.height, config.width), cv2.BORDER_REPLICATE
    crop = [A.PadIfNeeded(*size, position="top_left", border_mode=edge), A.RandomCrop(*size)]
    changes = [
        A.HorizontalFlip(p=0.5),
        A.Affine(
            scale=(1 - 0.2 * k / (1 + 0.2 * k), 1 + 0.2 * k),
            translate_percent=(-0.08 * k, 0.08 * k),
            rotate=(-3 * k, 3 * k),
            shear=(-4 * k, 4 * k),
            balanced_scale=True,
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST,
            border_mode=cv2.BORDER_CONSTANT,
            fill=0,
            fill_mask=IGNORE,
            p=0.7,
        ),
        A.RandomBrightnessContrast(0.25 * k, 0.25 * k, p=0.6),
        A.HueSaturationValue(8 * k, 25 * k, 10 * k, p=0.4),
        A.RandomShadow(shadow_roi=(0, 0, 1, 1), p=0.2),
    ]
    return A.Compose((crop if config.tiles else []) + (changes if k > 0 else []))


class SegmentationDataset(Dataset):
    """Items with `image` (3, H, W) and `mask` (1, H, W), both uint8; mask: 0, 1, 255 (ignored).

    Of exclusive classes the mask has their numbers; of overlapping ones it is (K, H, W). Without
    `augment` (validation) an item also has its `ground_truth` at the image's own size.
    With tiles there are as many items as tiles cover the images; `augment` cuts them at random.
    Training takes the column `pair` (`images.prepare_pair`); without it files are read every time.
    """

    def __init__(
        self, samples: pd.DataFrame, config: ModelConfig, seed: int, augment: A.Compose | None
    ) -> None:
        self.rows, self.config = list(samples.itertuples()), config
        self.seed, self.augment = seed, augment
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it too
        self.places = images.item_places(samples, config)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, corner = self.places[position]
        row, item = self.rows[index], {}
        if self.augment is None:
            image, mask = data.read_sample(row, self.config.value_range)
            if corner:
                image = images.cut_tile(image, corner, self.config)
                mask = images.cut_tile(mask, corner, self.config, IGNORE)
            item["ground_truth"] = mask
            image, mask = images.prepare_pair(image, mask, self.config)
        else:
            image, mask = row.pair or data.read_pair(row, self.config)
            seed = np.random.SeedSequence([self.seed, int(self.epoch), position])
            self.augment.set_random_seed(int(seed.generate_state(1)[0]))  # whichever worker it is
            changed = self.augment(image=image, mask=mask)
            image, mask = changed["image"], changed["mask"]
        item |= {"name": row.image.name, "image": images.to_tensor(image)}
        return item | {"mask": torch.from_numpy(np.atleast_3d(mask).transpose(2, 0, 1).copy())}


def make_loaders(
    config: Config, model_config: ModelConfig, samples: pd.DataFrame, parts: int = 1
) -> tuple[DataLoader, DataLoader]:
    """The training and the validation loader; `parts`: of a batch, for gradient accumulation."""
    validates = samples.fold == config.fold
    augment = images.strict_augmentation(lambda: augmentation(config))
    training = SegmentationDataset(samples[~validates], model_config, config.seed, augment)
    validation = SegmentationDataset(samples[validates], model_config, config.seed, None)
    processes, _ = callbacks.count_processes(config.devices)
    size = trial.images_per_step(config.batch_size, len(training), processes, parts)
    options = {"workers": config.workers, "processes": processes, "seed": config.seed}
    return loaders.make_loaders(training, validation, size, memory=CACHE // 8, **options)


# --- Model ----------------------------------------------------------------------------------------


def loss(logits: Tensor, mask: Tensor, config: Config, weights: Tensor | None = None) -> Tensor:
    """BCE plus Dice, without the ignored pixels.

    `logits` (N, 1, H, W), `mask` (N, 1, H, W) float32 of 0, 1 and 255 (ignored). Returns a float32
    scalar. Dice (Milletari et al., 3DV 2016) is taken over the whole batch, so that an image
    without foreground does no harm. Several classes: see `losses.class_loss`.
    """
    if logits.shape[1] > 1:
        return class_loss(logits, mask, config.dice, weights)
    logits = logits.float()  # Dice overflows in 16 bits
    counted = (mask != IGNORE).float()
    target = mask * counted
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = (bce * counted).sum() / counted.sum().clamp(min=1)
    p = logits.sigmoid() * counted
    dice = (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return bce + config.dice * (1 - dice)


def schedule(progress: float) -> float:
    """The learning rate's factor at 0..1 of the training: warm-up, then a cosine down to 1 %."""
    warm_up = min(1.0, 0.1 + progress / 0.05)
    cosine = (1 + math.cos(math.pi * min(progress, 1))) / 2
    return warm_up * (0.01 + 0.99 * cosine)


# Progressive resizing: until this progress the input has this part of its height and width.
RESOLUTIONS = ((0.35, 0.5), (0.65, 0.75))


class SegmentationModule(pl.LightningModule):
    """The network, the EMA of its weights (which is validated and exported), and AdamW."""

    def __init__(self, config: Config, model_config: ModelConfig, network: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.model_config = config, model_config
        self.lr = 0.0  # the highest; `fit` sets it
        self.network = model.prepare_training(network)
        self.ema = model.make_ema(self.network, config.ema)
        self.progress = 1.0  # of the training, from the clock
        self.register_buffer("class_weights", None, persistent=False)  # `fit` sets them

    def set_progress(self, progress: float) -> None:
        """The clock calls it before each step."""
        self.progress = progress
        self.trainer.optimizers[0].param_groups[0]["lr"] = self.lr * schedule(progress)

    def current_config(self) -> ModelConfig:
        """The model's settings with the resolution of this point in the training."""
        part = next((part for until, part in RESOLUTIONS if self.progress < until), 1.0)
        if part == 1 or not self.config.grow or self.model_config.tiles:
            return self.model_config
        return model.scale_input(self.model_config, part, model.size_step(self.network))

    def resized(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The normalised images and the masks of a batch at the current resolution, float32."""
        image, mask, config = batch["image"], batch["mask"].float(), self.current_config()
        size = (config.height, config.width)
        if image.shape[2:] != size:
            image = F.interpolate(image.float(), size, mode="area")
            mask = F.interpolate(mask, size, mode="nearest-exact")
        return images.normalise(image, config), mask

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights, decay = self.network.parameters(), self.config.weight_decay
        optimizer = torch.optim.AdamW(weights, self.lr, weight_decay=decay, fused=True)
        # private: a fused optimizer says that it scales gradients itself, so Lightning refuses to
        # clip them, although it has unscaled them by then
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        image, mask = self.resized(batch)
        value = loss(self.network(image), mask, self.config, self.class_weights)
        callbacks.check_loss(value, self.current_epoch, batch["name"])
        options = {"on_step": False, "on_epoch": True, "prog_bar": True}
        self.log("train_loss", value, batch_size=len(image), **options)
        return value

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step > int(self.ema.n_averaged):  # not within gradient accumulation
            self.ema.update_parameters(self.network)

    def is_last_epoch(self) -> bool:
        """Whether epochs or minutes are used up with this one."""
        return self.trainer.should_stop or self.current_epoch + 1 == self.config.epochs

    def on_validation_epoch_start(self) -> None:
        self.evaluation = class_metrics.make_evaluation(classes_of(self.model_config))

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        image, mask = self.resized(batch)
        logits, config = self.ema(image), self.current_config()
        value = loss(logits, mask, self.config, self.class_weights)
        self.log("val_loss", value, batch_size=len(logits), sync_dist=True)
        probabilities = predict.to_probabilities(logits, config.temperature, config.exclusive)
        for probability, target in zip(probabilities, batch["ground_truth"], strict=True):
            own_size = images.restore(probability, target.shape[:2], config)
            prediction = predict.to_prediction(own_size, config)
            self.evaluation.count(prediction, torch.as_tensor(target).to(self.device))

    def on_validation_epoch_end(self) -> None:
        self.evaluation.reduce("image", self.trainer.strategy.reduce, self.device)
        score = self.evaluation.report()["image"]["all"]
        for name in self.evaluation.logged:
            self.log(name, score[name], prog_bar=name in ("MaxF", "mIoU"), rank_zero_only=True)


# --- Resolve: all that follows from device and data -----------------------------------------------

CACHE = 4 << 30  # bytes of decoded images that stay in memory


def resolve(config: Config, collection: Collection, fold: int) -> tuple[Config, ModelConfig]:
    """Make all decisions for one fold; only the learning rate may stay "auto". Raises UserError."""
    samples = collection.samples
    median = samples.height.median(), samples.width.median()
    device = model.best_device()
    precision = model.resolve_precision(config.precision, device, training=True)
    pretrained = config.encoder_weights != "none"
    usual = loaders.default_pixels(device, precision)
    tiles, pixels = data.resolve_detail(samples, config.tiles, usual, config.height or config.width)
    every = config.fold == "all"
    minutes = config.max_minutes / (samples.fold.nunique() if every else 1)
    larger = loaders.larger_input(device, minutes, pretrained, collection.classes.exclusive)
    pixels = max(pixels, larger * usual)
    top = data.resolve_top(config.top, tiles, collection, fold)
    height, width = model.fit_size(median[0] * (1 - top), median[1], pixels)
    height, width = config.height or height, config.width or width
    small, count = pixels / (height * width), int((samples.fold != fold).sum())
    resolved = replace(
        config,
        fold=fold,
        out=f"{config.out}/fold{fold}" if every else config.out,
        # of all folds the first one has started over for the others
        resume=config.resume if fold == samples.fold.min() or not every else "auto",
        max_minutes=minutes,
        height=height,
        width=width,
        rle=collection.rle,
        classes=",".join(collection.classes.names) or "one",
        class_weights=loaders.weighting(config.class_weights, collection.classes.exclusive),
        top=top,
        tiles=tiles,
        epochs=config.epochs or (0 if config.max_minutes else 40),
        batch_size=config.batch_size or loaders.default_batch(device, precision, small, count),
        grow=not pretrained if config.grow == "auto" else config.grow,
        metric=collection.metric if config.metric == "auto" else config.metric,
        precision=precision,
        devices=model.resolve_devices(config.devices, device),
        workers=loaders.default_workers(device) if config.workers < 0 else config.workers,
    )
    return try_network(config, resolved, collection)


def try_network(
    config: Config, resolved: Config, collection: Collection
) -> tuple[Config, ModelConfig]:
    """The trial step with the training samples; it may change the size and --grow."""
    samples = collection.samples[collection.samples.fold != resolved.fold]
    shared = {field.name for field in fields(ModelConfig)} & set(asdict(config))
    settings = {name: getattr(resolved, name) for name in shared}
    settings |= {"precision": config.precision, "value_range": collection.value_range}
    settings |= {"min_pixels": max(0, config.min_pixels)} | class_settings(collection.classes)
    weights = "none" if config.check else config.encoder_weights
    statistics = encoders.normalisation(config.arch, config.encoder, weights)
    model_config = ModelConfig(**settings, **statistics)
    free = config.height == 0, config.width == 0
    resolutions = [part for _, part in RESOLUTIONS if resolved.grow and not resolved.tiles]
    count = len(images.item_places(samples, model_config))
    numbers = resolved.batch_size, count, callbacks.count_processes(resolved.devices)[0]
    tried = trial.try_network(model_config, free, resolutions, *numbers)
    lr = 2e-3 if config.encoder_weights != "none" and tried.batch_norm else 5e-4
    changes = {key: getattr(tried.config, key) for key in ("height", "width", "decoder_channels")}
    changes |= {"lr": config.lr or lr, "grow": resolved.grow and tried.resizes}
    return replace(resolved, **changes), tried.config


# --- Train: from settings to files ----------------------------------------------------------------


def train(config: Config, started: float | None = None) -> Path:
    """Find samples, split, and for each fold resolve, build, fit, evaluate, export.

    `started`: the time.monotonic() of the start; None is now. Returns --out. Raises UserError.
    """
    started = time.monotonic() if started is None else started
    deadline = started + 60 * config.session_minutes if config.session_minutes else math.inf
    model.prepare_device()
    named = config.masks, config.target, config.foreground
    how = config.rle, config.missing, config.classes
    collection = data.find_samples(config.data, *named, True, *how)
    samples = data.scan_dataset(collection.samples, collection.classes)
    value_range = images.find_value_range(samples.image[samples.deep], config.window)
    collection = collection._replace(samples=samples, value_range=value_range)
    samples["fold"] = data.assign_folds(samples, config.folds, config.seed, config.group)
    print(data.describe(collection, samples), flush=True)
    folds = data.chosen_folds(samples, config.fold)
    if config.fold == "all" and config.resume not in ("auto", "none"):
        raise UserError(f"--resume {config.resume}: needs one --fold; with all take auto")
    out, predictions = Path(config.out), []
    for fold in folds:
        resolved, model_config = resolve(config, collection, fold)
        if config.check:
            checked = samples.assign(pair=data.decode_samples(samples, model_config, memory=0))
            show_data(resolved, model_config, checked, out)
            return out
        clock = Clock(resolved.epochs, resolved.max_minutes, started, deadline)
        predictions += train_fold(resolved, model_config, samples, out, clock)
        started = time.monotonic()
        if fold != folds[-1] and (clock.session_over() or deadline - started < 60):
            print(f"--session_minutes: over after fold {fold}; the same command resumes")
            return out
    if config.fold == "all" and predictions:
        how = out, "out of fold", resolved.metric, config.min_pixels, config.empty_score
        tuned, _ = evaluate.tune_and_score(model_config, predictions, *how)
        for folder in (out / f"fold{fold}" for fold in folds):  # for all models alike
            evaluate.export(model.load_model(folder / "model.pt", "cpu"), folder, tuned)
    return out


def train_fold(
    config: Config,
    model_config: ModelConfig,
    samples: pd.DataFrame,
    root: Path,
    clock: Clock,
) -> list[metrics.Prediction]:
    """Train on all folds but one and predict that one. `root`: --out, above that of each fold."""
    run = TrainingCallback(Path(config.out), root, clock, asdict(config), samples)
    run.find_checkpoint(config.resume, asdict(Config()))
    pl.seed_everything(config.seed, verbose=False)
    network = model.build_network(model_config, config.encoder_weights)
    if callbacks.count_processes(config.devices)[0] > 1:
        trial.freeze_unused(network, model_config)
    samples = samples.assign(pair=data.decode_samples(samples, model_config, CACHE))
    print(data.describe_folds(samples, config.fold))
    run.prepare_out()
    show_data(config, model_config, samples, Path(config.out))
    how = f"weights {config.encoder_weights}, learning rate {config.lr}, batch {config.batch_size}"
    how += f" in {config.precision} on {model.best_device()}"
    how += ", progressive resizing" if config.grow and not config.tiles else ""
    print(f"{model_config.describe()}, {how}", flush=True)
    nothing = run.nothing_to_train()
    if nothing:
        print(nothing, flush=True)
    with callbacks.interruptible() as signals:
        if not nothing:
            fit(SegmentationModule(config, model_config, network), samples, run)
    predictions = []
    if run.rows and pl.utilities.rank_zero_only.rank == 0:
        done = samples[samples.fold == config.fold], run.rows, callbacks.exported_epoch(run.rows)
        wanted = config.metric, config.min_pixels, config.empty_score
        predictions = evaluate.evaluate_and_export(run.out, *done, *wanted)
    if nothing:
        print(nothing, flush=True)
    callbacks.end_process(signals)
    return predictions


def show_data(config: Config, model_config: ModelConfig, samples: pd.DataFrame, out: Path) -> None:
    """Write examples.jpg and augmented.jpg, which show swapped pairs and shifted masks."""
    augment = images.strict_augmentation(lambda: augmentation(config))
    chosen = data.spread(samples[samples.fold != config.fold], 6)[:4]  # not the emptiest
    dataset = SegmentationDataset(chosen, model_config, config.seed, augment)
    rows = data.spread(samples, 12).itertuples()
    examples = [(row, *data.read_sample(row, model_config.value_range)) for row in rows]
    classes = classes_of(model_config)
    images.write_image(writable_folder(out) / "examples.jpg", visualize.examples(examples, classes))
    images.write_image(out / "augmented.jpg", visualize.augmentations(dataset, classes))
    print(f"look at {out / 'examples.jpg'} and {out / 'augmented.jpg'}", flush=True)


def fit(module: SegmentationModule, samples: pd.DataFrame, run: TrainingCallback) -> None:
    """Run the training, with gradient accumulation where the device's memory is too small."""
    config, model_config = module.config, module.model_config
    if run.lr == "auto":
        loader, _ = make_loaders(config, model_config, samples)
        run.lr = callbacks.find_lr(module, loader, config.devices, config.precision)
    module.lr = run.lr
    module.class_weights = loaders.class_weights(samples, config.fold, config.class_weights)

    def attempt(parts: int) -> None:
        path = run.checkpoint if parts == 1 else run.restart()
        if path:
            print(f"resume: from {path}, after epoch {len(run.rows)}", flush=True)
        training, validation = make_loaders(config, model_config, samples, parts)
        if parts > 1:
            trial.check_batch(module.network, model_config, training.batch_size)
        training.sampler.set_epoch(len(run.rows))  # before Lightning fills the workers' queues
        hooks = [run, callbacks.BatchNormReestimation(config.seed), *callbacks.progress_bar()]
        options = {"max_epochs": config.epochs or -1, "accumulate_grad_batches": parts}
        options |= {"callbacks": hooks, "gradient_clip_val": 1.0}
        trainer = callbacks.make_trainer(config.devices, config.precision, **options)
        trusted = {"ckpt_path": path, "weights_only": True} if path else {}
        trainer.fit(copy.deepcopy(module), training, validation, **trusted)

    callbacks.with_gradient_accumulation(attempt, config.batch_size, model.best_device())


if __name__ == "__main__":
    with one_line_errors():
        train(CONFIG, STARTED)
