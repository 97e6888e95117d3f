"""Train a segmentation model on images with masks.

    python train.py --data ../input/kittiroadsegmentation --out out
    python train.py --data my_images --max_minutes 60    # the learning-rate schedule fits the hour

What to change first: `Config` (or its flags), then `augmentation` and `loss`.
"""

import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from kit.cli import parse
from kit.config import IGNORE, NOT_REPLAYED, ModelConfig
from kit.errors import one_line_errors

STARTED = time.monotonic()


@dataclass(frozen=True)
class Config:
    """The settings. One more line is one more flag; its comment is the help, [low..high] limits."""

    # --- data ---
    data: str = "auto"  # folder of images and masks; auto: below /kaggle/input, ../input, kagglehub
    out: str = "out"  # folder for everything that is written
    masks: str = "auto"  # folder, csv, or pattern such as labels/{stem}.png; auto: what is there
    foreground: str = ""  # values of the foreground in mask files, such as 15 or 1,3 or 128-255
    ignore: str = ""  # values of ignored pixels in mask files, such as 255 or -1
    classes: str = "auto"  # auto: as found; one: all merged; a file of id,name; or names: car,road
    rle: Literal["auto", "columns", "rows", "relative"] = "auto"  # order of RLE; auto: as it fits
    missing: Literal["error", "empty", "leave_out"] = "error"  # images without a mask
    window: str = "0.5,99.5"  # percentiles that turn black and white in images over 8 bits
    channels: str = "auto"  # a number, 1 is grey; or files: {stem}_B02.tif,{stem}_B03.tif
    extra: str = ""  # --out of infer.py --save_probs true: confident pixels train; folds: DIR/fold0
    soft: bool = False  # several masks of an image are annotators: train on their mean
    neighbours: str = ""  # slices before and after as channels: 1, 2, or steps such as 1,3
    scale: float = 1.0  # [0.01..1] of the images, whose resolution is that: 0.5, 0.33, 0.25, ...
    show: str = ""  # the channels seen as red, green, blue in pictures, such as 4,3,2
    check: bool = False  # only check the data: samples.csv, masks/, examples.jpg, augmented.jpg
    target: Literal["road", "lane"] = "road"  # KITTI: the whole road, or the car's own lane
    folds: int = 10  # [2..1000] parts of the data; one validates, consecutive frames stay together
    # [0..999] the part that validates; all: a model for each; none: all images train, see --config
    fold: int | Literal["all", "none"] = 0
    group: str = ""  # csv's column whose equal values (a patient) stay in one fold; none: no groups
    seed: int = 0  # [0..2000000000] random numbers of folds, first weights and augmentations
    # --- model ---
    arch: str = "Unet"  # any architecture of smp: UnetPlusPlus, FPN, DeepLabV3Plus, Segformer, ...
    encoder: str = "resnet34"  # any encoder of smp; better: resnet50; faster: resnet18
    encoder_weights: str = "imagenet"  # imagenet, smp's other names, none, .safetensors, .pth file
    init: str = ""  # own model.pt, or a folder of smp's, to start from: all that fits
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
    batch_size: int = 0  # [0..65536] images per step; 0: 4 to 16, by images and device
    lr: float | Literal["auto"] = 0  # [0..10] 0: 5e-4, pretrained (BatchNorm) 2e-3; auto: a finder
    weight_decay: float = 1e-2  # [0..10] AdamW's weight decay
    grow: bool | Literal["auto"] = "auto"  # progressive resizing; auto: where trained from scratch
    loss: str = "bce=1,dice=1"  # terms with their weights; there are also focal, lovasz, tversky
    stages: Literal["mixed", "extra,own", "mixed,own"] = "mixed"  # each trains as long as the other
    presence: float = 0  # [0..1000] weight of a head that tells which masks are empty; 0: no head
    positives: float = 0  # [0..1] share of items with foreground at first, later theirs; 0: theirs
    # of the loss; inverse: of the frequency; auto: inverse where classes exclude each other
    class_weights: Literal["auto", "none", "inverse"] = "auto"
    augment: float = 1.0  # [0..3] strength of the augmentation; 0: none
    flips: Literal["auto", "h", "hv", "all", "none"] = "auto"  # in it; all: turns too; auto: h
    ema: float = 0.98  # [0..0.99999] decay of the exponential moving average of the weights
    # to tune for: maxf, dice, iou, miou or a file.py with Kaggle's score; auto: dice, of KITTI maxf
    metric: str = "auto"
    empty_score: Literal["1", "0", "skip"] = "1"  # Dice and IoU of an empty mask that is right
    min_pixels: int = -1  # [-1..1000000000] minimum component area; -1: tuned for dice or iou
    tta: bool = True  # test-time augmentation: the flip and turns that help on validation images
    # --- machine ---
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"  # auto: fastest native one
    devices: int = 1  # [1..1024] GPUs (or CPU processes)
    workers: int = -1  # [-1..256] processes that load data; -1: 4 next to a GPU, 0 on a CPU
    cache: str = "auto"  # folder for decoded images; none; auto: memory, if too small /kaggle/temp
    logger: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"  # also told of the scores
    resume: str = "auto"  # auto: continue an unfinished run in --out; none: start over; a last.ckpt
    # no training: the table of finished runs, folders or patterns such as tries/*, into --out
    compare: list[str] = field(default_factory=list)
    config: str = ""  # config.json of a run, whose settings count where no flag is given


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    with one_line_errors():
        known = {field.name for field in fields(ModelConfig)} - {f.name for f in fields(Config)}
        CONFIG = parse(Config, __doc__, ignored={*NOT_REPLAYED, *known})
        if CONFIG.compare:
            from kit.extra.runs import compare

            compare(CONFIG.compare, CONFIG.out)
            raise SystemExit
        print("loading torch, Lightning, smp and albumentations ...", flush=True)

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
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kit.data import extras, folds, images, samples
from kit.data.masks import DecodedFiles
from kit.extra.report import report_training
from kit.files import writable_folder
from kit.network import model
from kit.results import metric_file, metrics, oof, predict, submissions, tuning, visualize
from kit.training import callbacks, loaders, losses, trial
from kit.training import resolve as resolving
from kit.training.callbacks import Clock, TrainingCallback

# --- Data -----------------------------------------------------------------------------------------

CACHE = 4 << 30  # bytes of decoded images that stay in memory


def augmentation(config: Config) -> A.Compose:
    """Random changes that keep a road a road: flipped sideways, moved, scaled, lit otherwise."""
    k = config.augment
    size, edge = (config.height, config.width), cv2.BORDER_REPLICATE
    crop = [A.PadIfNeeded(*size, position="top_left", border_mode=edge), A.RandomCrop(*size)]
    changes = [
        *loaders.flips(config.flips, A.HorizontalFlip(p=0.5)),
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
    ]
    if config.channels in ("auto", "rgb"):
        changes += [A.HueSaturationValue(8 * k, 25 * k, 10 * k, p=0.4)]
        changes += [A.RandomShadow(shadow_roi=(0, 0, 1, 1), p=0.2)]
    elif config.channels not in ("1", "3"):  # 3 may be equal ones, of a grey image
        changes += [A.ChannelDropout(p=0.1)]
    return A.Compose((crop if config.tiles else []) + (changes if k > 0 else []))


class SegmentationDataset(Dataset):
    """Items with `image` (C, H, W) of 0..255 and `mask` (K, H, W) uint8, see `masks.py`.

    A plane for each class of 0, 1 and 255 (ignored); of exclusive classes one of their numbers.
    Without `augment` (validation) an item also has its `ground_truth` at the image's own size.
    With tiles there are as many items as tiles cover the images; `augment` cuts them at random.
    Training takes `pair` of `samples.decode_pairs`; else files are read, once for all their tiles.
    """

    def __init__(
        self, table: pd.DataFrame, config: ModelConfig, seed: int, augment: A.Compose | None
    ) -> None:
        self.rows, self.config = samples.portable_rows(table), config
        self.last: tuple[int, Any] = -1, None  # the row read last, and its image and mask
        self.seed, self.augment = seed, augment
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it too
        self.places = images.item_places(table, config)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, corner = self.places[position]
        row, item = self.rows[index], {}
        if self.augment is None:
            if self.last[0] != index:
                depth = self.config.channels, self.config.value_range
                self.last = index, samples.read_sample(row, *depth)
            image, mask = self.last[1]
            if corner:
                image, mask = images.cut_pair(image, mask, corner, self.config)
            item["ground_truth"] = mask
            image, mask = images.prepare_pair(image, mask, self.config)
        else:
            image, mask = row.pair or samples.read_pair(row, self.config)
        planes = mask.reshape(-1, *mask.shape[-2:])
        if self.augment:
            seed = np.random.SeedSequence([self.seed, int(self.epoch), position])
            self.augment.set_random_seed(int(seed.generate_state(1)[0]))  # whichever worker it is
            changed = self.augment(image=images.to_unit(image), masks=planes)
            image, planes = changed["image"], changed["masks"]
        item |= {"name": samples.name_of(row), "image": images.to_tensor(image)}
        return item | {"mask": torch.from_numpy(planes.copy())}


def make_loaders(
    config: Config, model_config: ModelConfig, table: pd.DataFrame, parts: int = 1
) -> tuple[DataLoader, DataLoader]:
    """The training and the validation loader; `parts`: of a batch, for gradient accumulation."""
    validates = table.fold == config.fold
    trains = table.trains & ~validates
    with loaders.strictly():
        augment = augmentation(config)
    training = SegmentationDataset(table[trains], model_config, config.seed, augment)
    validation = SegmentationDataset(table[validates], model_config, config.seed, None)
    plan = loaders.plan_epochs(training, config.positives, config.stages)
    size = loaders.images_per_step(config.batch_size, plan.count, config.devices, parts)
    options = {"workers": config.workers, "processes": config.devices, "seed": config.seed}
    cached = loaders.Cached(validation, CACHE // 8)
    shuffled = loaders.make_loader(training, plan, size, **options)
    return shuffled, loaders.make_loader(cached, None, size, **options)


# --- Model ----------------------------------------------------------------------------------------


def loss(output: Any, mask: Tensor, config: Config, weights: Tensor | None = None) -> Tensor:
    """BCE (of exclusive classes cross-entropy), Dice, what `losses` has: the sum of --loss.

    `output`: logits (N, K, H, W), with --presence and (N, K) of its head; `mask` (N, K, H, W)
    float32 of 0, 1 and 255 (ignored), with --soft of shares too, of exclusive classes (N, 1, H, W)
    of their numbers and 255; `weights` (K,): of the classes, or None. Returns a float32 scalar.
    Dice (Milletari et al., 3DV 2016): over the batch, the mean over the classes that occur.
    """
    logits, presence = output if config.presence else (output, None)
    logits = logits.float()  # Dice overflows in 16 bits
    counted, each = (mask != IGNORE).float(), (0, 2, 3)
    target = (images.decode_shares(mask) if config.soft else mask) * counted
    if mask.shape[1] < logits.shape[1]:
        pixels, p, hits, size = losses.label_terms(logits, target, counted, weights)
    else:
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        pixels = (bce * counted).sum(each) / counted.sum(each).clamp(min=1)
        pixels = (pixels if weights is None else pixels * weights).mean()
        p = logits.sigmoid() * counted
        hits, size = (p * target).sum(each), target.sum(each)
    dice = 1 - (2 * hits + 1) / (p.sum(each) + size + 1)
    terms = {"bce": pixels, "dice": losses.mean_over(dice, size > 0)}
    chosen = losses.parse(config.loss, config.soft)
    for name in chosen.keys() & losses.FURTHER.keys():
        terms[name] = losses.FURTHER[name](logits, target, counted, weights)
    value = sum(weight * terms[name] for name, weight in chosen.items())
    return value + losses.presence(presence, target, config.presence) if config.presence else value


def schedule(progress: float) -> float:
    """The learning rate's factor at 0..1 of the training: warm-up, then a cosine down to 1 %."""
    warm_up = min(1.0, 0.1 + progress / 0.05)
    cosine = (1 + math.cos(math.pi * min(progress, 1))) / 2
    return warm_up * (0.01 + 0.99 * cosine)


# Progressive resizing: until this progress the input has this share of its height and width.
RESOLUTIONS = ((0.35, 0.5), (0.65, 0.75))


class SegmentationModule(pl.LightningModule):
    """The network, its EMA copy (which is validated and exported), and AdamW."""

    def __init__(self, config: Config, model_config: ModelConfig) -> None:
        super().__init__()
        self.config, self.model_config = config, model_config
        self.lr = 0.0  # the highest; `fit` sets it
        network = model.start_network(model_config, config.encoder_weights, config.init)
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
        scale = next((scale for until, scale in RESOLUTIONS if self.progress < until), 1.0)
        if scale == 1 or not self.config.grow or self.model_config.tiles:
            return self.model_config
        return model.scale_input(self.model_config, scale, model.size_step(self.network))

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
        self.evaluation = metrics.Evaluation(self.model_config.classes)

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        image, mask = self.resized(batch)
        output, config = self.ema(image), self.current_config()
        value = loss(output, mask, self.config, self.class_weights)
        self.log("val_loss", value, batch_size=len(image), sync_dist=True)
        probabilities = predict.to_probabilities(output, config)
        for planes, target in zip(probabilities, batch["ground_truth"], strict=True):
            restored = images.restore(planes, target.shape[-2:], config)
            target = torch.as_tensor(target).to(self.device)
            self.evaluation.count(predict.to_prediction(restored, config), target)

    def on_validation_epoch_end(self) -> None:
        self.evaluation.gather()
        score = self.evaluation.report()["image"]["all"]
        for name in self.evaluation.logged:
            self.log(name, score[name], prog_bar=name in ("MaxF", "mIoU"), rank_zero_only=True)


# --- Trainer --------------------------------------------------------------------------------------


def make_trainer(config: Config, **options: Any) -> pl.Trainer:
    """A Trainer that leaves writing and logging to the TrainingCallback."""
    torchrun = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else None  # also SLURM
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if torchrun else config.devices
    return pl.Trainer(
        accelerator="auto",
        devices=local,
        num_nodes=config.devices // local,
        plugins=torchrun,
        precision=config.precision,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=callbacks.on_terminal(),
        **options,
    )


def fit(module: SegmentationModule, table: pd.DataFrame, run: TrainingCallback) -> None:
    """Train, with gradient accumulation where the device's memory is too small for a batch."""
    config, model_config = module.config, module.model_config
    parts, path = 1, run.checkpoint
    while True:
        if path:
            print(f"resume: from {path}, after epoch {len(run.rows)}", flush=True)
        training, validation = make_loaders(config, model_config, table, parts)
        if parts > 1:
            trial.check_batch(module.network, model_config, training.batch_size)
        training.sampler.set_epoch(len(run.rows))  # before Lightning fills the workers' queues
        training.sampler.progress = run.epoch_progress()
        trainer = make_trainer(
            config,
            max_epochs=config.epochs or -1,
            accumulate_grad_batches=parts,
            callbacks=callbacks.around_training(run, config.seed),
        )
        resumed = {"ckpt_path": path, "weights_only": True} if path else {}
        try:
            with callbacks.leave_together(run):
                if run.lr == "auto":
                    loader, _ = make_loaders(config, model_config, table, parts)
                    run.lr = callbacks.find_lr(module, loader, make_trainer, parts)
                module.lr = run.lr
                weights = resolving.class_weights(table, config.fold, config.class_weights)
                module.class_weights = weights
                return trainer.fit(copy.deepcopy(module), training, validation, **resumed)
        except torch.OutOfMemoryError:
            path = run.restart()
        del trainer  # outside of the except block, which holds on to the memory
        parts = callbacks.more_parts(parts, config.batch_size, model.best_device())


# --- Train: from settings to files ----------------------------------------------------------------


def train(config: Config, started: float | None = None) -> Path:
    """Load the samples; for each fold resolve, build, fit, evaluate, export. Returns --out."""
    started = time.monotonic() if started is None else started  # of this process
    deadline = started + 60 * config.session_minutes if config.session_minutes else math.inf
    model.prepare_device()
    resolving.check_flags(config)  # a mistake is refused before the data is read
    metric = metric_file.find_metric(config.metric)
    reading = {name: getattr(config, name) for name in samples.LOADED}
    collection, opener = samples.load(config.data, **reading)
    metric_file.try_out(metric, collection.classes)
    chosen = folds.chosen_folds(collection.samples, config.fold)
    tables = extras.add(collection, chosen, config.extra, config.scale, opener)
    out, predictions = Path(config.out), []
    for fold in chosen:
        resolved, model_config = resolving.resolve(config, collection, fold, RESOLUTIONS)
        if config.check:
            table = samples.decode_pairs(tables[fold], model_config, 0, opener)
            show_data(resolved, model_config, table, out)
            samples.write_understood(table, model_config.classes, out, opener)
            return out
        clock = Clock(resolved.epochs, resolved.max_minutes, started, deadline)
        why = resolving.reasons(config, resolved, collection)
        settings = asdict(resolved) | {"resume": config.resume, "why": why}
        run = TrainingCallback(Path(resolved.out), out, clock, settings, tables[fold])
        run.find_checkpoint(resolved.resume, asdict(Config()))
        predictions += train_fold(resolved, model_config, run, opener)
        started = time.monotonic()
        if fold != chosen[-1] and callbacks.no_time_for_a_fold(clock):
            print(f"--session_minutes: over after fold {fold}; {run.describe_end()}")
            return out
    if config.fold == "all" and predictions:
        oof.evaluate_folds(out, chosen, predictions, model_config, tuning.goal_of(resolved))
        report_training(out, predictions)
    return out


def train_fold(
    config: Config, model_config: ModelConfig, run: TrainingCallback, opener: DecodedFiles
) -> list[tuning.Prediction]:
    """Train on all folds but one and predict that one. `opener`: of the mask files."""
    pl.seed_everything(config.seed, verbose=False)
    module = SegmentationModule(config, model_config)
    if config.devices > 1:
        trial.freeze_unused(module.network, model_config)
    table = samples.decode_pairs(run.samples, model_config, CACHE, opener, config.cache)
    print(folds.describe_folds(table, config.fold))
    submissions.check_sample(config.data, model_config.classes, model_config.bands)
    run.prepare_out()
    nothing = run.nothing_to_train()
    if pl.utilities.rank_zero_only.rank == 0:  # others would write the same files
        show_data(config, model_config, table, run.out)
    opener.images.clear()  # up to 1 GB
    weights = f"weights {config.encoder_weights}, learning rate {config.lr}"
    batch = f"batch {config.batch_size} in {config.precision} on {model.best_device()}"
    grow = ", progressive resizing" if config.grow and not config.tiles else ""
    print(f"{model_config.describe()}, {weights}, {batch}{grow}\n{nothing}", end="", flush=True)
    with callbacks.interruptible(run):
        if not nothing:
            fit(module, table, run)
    predictions = []
    if run.rows and pl.utilities.rank_zero_only.rank == 0:
        validation = run.samples[run.samples.fold == config.fold]  # without decoded images
        epoch = callbacks.exported_epoch(run.rows)
        goal = tuning.goal_of(config)
        predictions = oof.evaluate_and_export(run.out, validation, run.rows, epoch, goal)
        report_training(run.out, predictions)
    print(nothing, end="", flush=True)
    callbacks.end_process(run)
    return predictions


def show_data(config: Config, model_config: ModelConfig, table: pd.DataFrame, out: Path) -> None:
    """Write examples.jpg and augmented.jpg, which show swapped pairs and shifted masks."""
    rows = samples.spread(table, 12).itertuples()
    chosen = samples.spread(table[table.fold != config.fold], 6)[:4]  # not the emptiest
    with loaders.strictly():
        augment = augmentation(config)
    dataset = SegmentationDataset(chosen, model_config, config.seed, augment)
    depth = model_config.channels, model_config.value_range
    examples = ((row, *samples.read_sample(row, *depth)) for row in rows)
    drawn = visualize.examples(examples, model_config)
    images.write_image(writable_folder(out) / "examples.jpg", drawn)
    images.write_image(out / "augmented.jpg", visualize.augmentations(dataset))
    print(f"look at {out / 'examples.jpg'} and {out / 'augmented.jpg'}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        train(CONFIG, STARTED)
