"""What a user would pick instead: the KITTI Road tutorial's recipe and those of smp's examples."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor

from kit.config import Classes, ModelConfig, plane_settings
from kit.data.folds import assign_folds
from kit.data.images import write_image
from kit.data.readers import read_image
from kit.data.samples import find_samples, read_sample, scan
from kit.errors import UserError
from kit.network import encoders, model


@dataclass(frozen=True)
class Recipe:
    """A way to train that others publish; batches of 8, Unet."""

    size: int  # height and width of the input; with classes those of random crops
    dice: bool  # the Dice loss, else BCE or cross-entropy
    flip: bool  # horizontally, at random
    lr: float
    cosine: bool = False  # the learning rate's way down to 1e-5; else it stays


RECIPES = {
    "tutorial": Recipe(256, dice=False, flip=True, lr=1e-3),
    "example": Recipe(320, dice=True, flip=False, lr=2e-4, cosine=True),
    "example512": Recipe(512, dice=True, flip=False, lr=2e-4, cosine=True),
}

# --------------------------------------------------------------------------------------------------
#  Data
# --------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """Every item is decoded, transformed and normalised each time.

    Masks: float32 (1, H, W) of 0 and 1, or with `labels` int64 (H, W) as they are.
    """

    def __init__(self, samples: pd.DataFrame, transform: A.Compose, labels: bool = False) -> None:
        self.rows, self.transform, self.labels = list(samples.itertuples()), transform, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        image = cv2.cvtColor(cv2.imread(str(row.image)), cv2.COLOR_BGR2RGB)
        mask = cv2.imread(str(row.mask.path))[..., 0]
        mask = mask if self.labels else (mask > 0).astype("float32")
        pair = self.transform(image=image, mask=mask)
        return pair["image"], pair["mask"].long() if self.labels else pair["mask"][None]


def resized_pairs(samples: pd.DataFrame, size: int, flip: bool, **statistics: Any) -> Pairs:
    """The whole images, resized to a square. `statistics`: mean and std, or ImageNet's."""
    flips = [A.HorizontalFlip(p=0.5)] if flip else []
    end = [A.Normalize(**statistics), ToTensorV2()]
    return Pairs(samples, A.Compose([A.Resize(size, size), *flips, *end]))


def write_split(folder: str, root: Path, seed: int) -> None:
    """Split a folder in five parts: four to root/train/training, one to root/test/training.

    `folder` may end in ":VALUES" (`--foreground`). KITTI Road keeps its layout. Other data become
    pairs of PNG files (with classes.csv for exclusive classes), which every recipe can read.
    """
    folder, _, foreground = folder.partition(":")
    collection = find_samples(folder, foreground=foreground, training=True)
    if collection.classes.several and not collection.classes.exclusive:
        raise UserError(f"--data {folder}", "the recipes know no classes that may overlap")
    samples = scan(collection.samples, collection.classes)
    held_out = assign_folds(samples, 5, seed).fold == 0
    for name, part in (("train", samples[~held_out]), ("test", samples[held_out])):
        target = root / name / "training"
        if collection.name == "KITTI Road":
            link_samples(part, target)
        else:
            write_pairs(part, collection.classes, target)


def link_samples(samples: pd.DataFrame, folder: Path) -> None:
    """Links to images and masks in KITTI's layout."""
    paths = {"image_2": samples.image, "gt_image_2": [mask.path for mask in samples["mask"]]}
    for name, files in paths.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            (folder / name / file.name).symlink_to(file.resolve())


def write_pairs(samples: pd.DataFrame, classes: Classes, folder: Path) -> None:
    """Images and masks as images/ID.png and masks/ID.png; foreground is 255."""
    for row in samples.itertuples():
        image, mask = read_sample(row)
        mask = mask if classes.exclusive else np.where(mask[0] == 1, 255, 0).astype(np.uint8)
        for name, pixels in (("images", image), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_image(folder / name / f"{row.id}.png", pixels)
    if classes.exclusive:
        lines = [f"{number},{name}" for number, name in enumerate(classes.names)]
        (folder / "classes.csv").write_text("\n".join(["id,name", *lines]) + "\n")


# --------------------------------------------------------------------------------------------------
#  Training
# --------------------------------------------------------------------------------------------------


class PeerModule(pl.LightningModule):
    """The tutorial's module or that of smp's example, for the speed of their loops."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = smp.Unet("resnet34", encoder_weights=None, classes=1)
        self.recipe = RECIPES[name]
        self.loss = make_loss(self.recipe, 1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        logits = self.model(batch[0])
        if self.recipe.dice:
            mask = (logits.sigmoid() > 0.5).long()
            smp.metrics.get_stats(mask, batch[1].long(), mode="binary")
        value = self.loss(logits, batch[1])
        self.log("loss", value, prog_bar=True)
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.recipe, self.model)


def make_loss(recipe: Recipe, count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss for so many classes; 255 is ignored where there are several."""
    if recipe.dice:
        return smp.losses.DiceLoss("multiclass" if count > 1 else "binary", ignore_index=255)
    several = torch.nn.CrossEntropyLoss(ignore_index=255)
    return several if count > 1 else torch.nn.BCEWithLogitsLoss()


def make_optimizer(recipe: Recipe, network: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam of smp's examples, AdamW of the tutorial."""
    adam = torch.optim.Adam if recipe.dice else torch.optim.AdamW
    return adam(network.parameters(), lr=recipe.lr)


def train_peer(
    name: str, folder: Path, out: Path, encoder: str, weights: str, minutes: float, seed: int
) -> int:
    """Train by a recipe for so many minutes on pairs of `write_split`; save a model.pt of the kit.

    The clock starts when the data is found and the network built. Returns the number of epochs, the
    last of which may be shorter.
    """
    recipe, collection = RECIPES[name], find_samples(str(folder), training=True)
    samples, classes = collection.samples, collection.classes
    height, width = recipe.size, recipe.size
    if classes.exclusive:  # trained on crops, it predicts whole images
        image = read_image(samples.image[0])
        height, width = (32 * math.ceil(length / 32) for length in image.shape[:2])
    config = ModelConfig(
        encoder=encoder,
        height=height,
        width=width,
        tta=False,
        temperature=1.0,
        class_names=classes.names,
        class_values=classes.values,
        exclusive=classes.exclusive,
        **plane_settings(classes),
        **encoders.normalisation("Unet", encoder, weights),
    )
    statistics = {"mean": config.mean, "std": config.std}
    if classes.exclusive:
        crop = [A.PadIfNeeded(recipe.size, recipe.size), A.RandomCrop(recipe.size, recipe.size)]
        steps = [*crop, A.HorizontalFlip(p=0.5), A.Normalize(**statistics), ToTensorV2()]
        dataset = Pairs(samples, A.Compose(steps), labels=True)
    else:
        dataset = resized_pairs(samples, recipe.size, recipe.flip, **statistics)
    torch.manual_seed(seed)
    loader = torch.utils.data.DataLoader(dataset, 8, shuffle=True, drop_last=len(dataset) >= 8)
    network = model.build_network(config, weights)
    epochs = run_loop(recipe, network, loader, len(classes.names), 60 * minutes)
    out.mkdir()
    model.save_model(out / "model.pt", model.TrainedModel(network.eval(), config, {}, {}))
    return epochs


def run_loop(
    recipe: Recipe, network: torch.nn.Module, loader: Any, count: int, seconds: float
) -> int:
    """Train until the time is over; the number of epochs."""
    loss, optimizer = make_loss(recipe, count), make_optimizer(recipe, network)
    started, epochs = time.perf_counter(), 0
    while True:
        epochs += 1
        for image, mask in loader:
            loss(network(image), mask).backward()
            optimizer.step()
            optimizer.zero_grad()
            progress = (time.perf_counter() - started) / seconds
            if progress >= 1:
                return epochs
            if recipe.cosine:
                factor = (1 + math.cos(math.pi * progress)) / 2
                optimizer.param_groups[0]["lr"] = 1e-5 + (recipe.lr - 1e-5) * factor
