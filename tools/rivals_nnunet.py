"""nnU-Net's 2D configuration, planned by itself; runs in the environment of `rivals.py`.

One model of all training images, its trainer ended by the clock instead of after 1000 epochs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image


class MinutesTrainer(nnUNetTrainer):
    """Trains for RIVAL_MINUTES; its polynomial learning rate follows the time."""

    def initialize(self) -> None:
        """As the parent, with a seed."""
        torch.manual_seed(int(os.environ["RIVAL_SEED"]))
        np.random.seed(int(os.environ["RIVAL_SEED"]))
        super().initialize()

    def run_training(self) -> None:
        """The parent's steps, without its pauses for validation; the last step may end later."""
        self.on_train_start()
        self.network.train()
        started, seconds = time.perf_counter(), 60 * float(os.environ["RIVAL_MINUTES"])
        progress, steps = 0.0, 0
        while progress < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * (1 - progress) ** 0.9
            self.train_step(next(self.dataloader_train))
            progress, steps = (time.perf_counter() - started) / seconds, steps + 1
        self.current_epoch = steps / self.num_iterations_per_epoch
        Path(os.environ["RIVAL_EPOCHS"]).write_text(str(self.current_epoch))
        self.on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """None: there is no validation image."""


def main() -> None:
    """Plan, train and predict with nnU-Net's commands."""
    folder, started = Path(sys.argv[1]), time.perf_counter()
    trainers, predicted = folder / "trainers", folder / "predicted"
    trainers.mkdir()
    shutil.copy(__file__, trainers)  # a folder without other files: nnU-Net imports all
    folders = {"nnUNet_extTrainer": trainers, "RIVAL_EPOCHS": folder / "epochs"}
    folders |= {f"nnUNet_{name}": folder / name for name in ("raw", "preprocessed", "results")}
    settings = {"RIVAL_MINUTES": sys.argv[2], "RIVAL_SEED": sys.argv[3]}
    environment = {**os.environ, **{name: str(path) for name, path in folders.items()}, **settings}

    def run(command: str, *flags: str | Path) -> None:
        program = Path(sys.executable).with_name(f"nnUNetv2_{command}")
        subprocess.run([program, *flags], check=True, env=environment)

    device = ("-device", "cuda" if torch.cuda.is_available() else "cpu")
    model = ("-tr", MinutesTrainer.__name__)
    run("plan_and_preprocess", "-d", "1", "-c", "2d")
    run("train", "1", "2d", "all", *model, *device)
    seconds = time.perf_counter() - started
    (dataset,) = (folder / "raw").glob("*/dataset.json")
    one_class = "foreground" in json.loads(dataset.read_text())["labels"]
    places = ("-i", folder / "test", "-o", predicted, "-d", "1", "-c", "2d", "-f", "all")
    run("predict", *places, *model, *device, *["--save_probabilities"] * one_class)
    for file in predicted.glob("*.npz"):  # (2, 1, h, w)
        foreground = np.load(file)["probabilities"][1, 0]
        pixels = (255 * foreground).round().astype(np.uint8)
        Image.fromarray(pixels).save(file.with_suffix(".png"))
    epochs = float((folder / "epochs").read_text())
    numbers = {"epochs": epochs, "seconds": seconds, "pretrained": 0}
    (folder / "numbers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
