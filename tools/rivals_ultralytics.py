"""Ultralytics' semantic model; runs in the environment of `rivals.py`.

From its pretrained weights; where they cannot be fetched it says so and starts from random ones.
All settings are its own but for `settings`, without which it learns nothing of few images.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from ultralytics import YOLO
from ultralytics.models.yolo.semantic import SemanticSegmentationPredictor
from ultralytics.utils import ops

MODEL = "yolo26n-sem"
FOLDER, MINUTES, SEED = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])


class Predictor(SemanticSegmentationPredictor):
    """Writes the probabilities of one class, which the parent turns into a class map."""

    def postprocess(self, preds: Any, img: Any, orig_imgs: list) -> list:
        """`preds`: logits (B, K, h, w), restored to each image's size as the parent does."""
        logits = preds[0] if isinstance(preds, (tuple, list)) else preds
        logits = F.interpolate(logits.float(), img.shape[2:], mode="bilinear")
        for path, planes, image in zip(self.batch[0], logits, orig_imgs, strict=True):
            planes = ops.scale_masks(planes[None], image.shape[:2])[0]
            one = len(planes) == 1
            values = (255 * planes[0].sigmoid()).round() if one else planes.argmax(0)
            name = str(FOLDER / "predicted" / Path(path).name)
            cv2.imwrite(name, values.byte().cpu().numpy())
        return super().postprocess(preds, img, orig_imgs)


def build_model() -> tuple[YOLO, bool]:
    """The model, and whether its weights are pretrained."""
    try:
        return YOLO(f"{MODEL}.pt"), True
    except (ConnectionError, FileNotFoundError) as error:
        print(f"{MODEL}: the weights could not be fetched: FROM RANDOM WEIGHTS ({error})")
        return YOLO(f"{MODEL}.yaml"), False


def settings() -> dict[str, int]:
    """No small image is enlarged, and each batch is a step.

    By default images are 640x640, and 64 are a step. On 2 busy cores, from random weights, with 25
    images of nuclei 4 minutes were 13 epochs: all is foreground, MaxF 29. At 256x256 with a step
    for each batch of 8 three minutes were 127 epochs: MaxF 91.
    """
    images = (cv2.imread(str(file)) for file in (FOLDER / "images" / "train").iterdir())
    longest = max(max(image.shape[:2]) for image in images)
    batch = 16 if torch.cuda.is_available() else 8
    return {"imgsz": min(640, 32 * math.ceil(longest / 32)), "batch": batch, "nbs": batch}


def main() -> None:
    """Train for the minutes, predict with the best epoch."""
    started = time.perf_counter()
    model, pretrained = build_model()
    flags = {"time": MINUTES / 60, "seed": SEED, "plots": False, "project": str(FOLDER)}
    flags |= settings()
    model.train(data=str(FOLDER / "data.yaml"), pretrained=pretrained, **flags)
    epochs, seconds = model.trainer.epoch + 1, time.perf_counter() - started
    (FOLDER / "predicted").mkdir()
    for _ in model.predict(FOLDER / "images" / "test", predictor=Predictor, stream=True):
        pass
    numbers = {"epochs": epochs, "seconds": seconds, "pretrained": int(pretrained)}
    (FOLDER / "numbers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
