"""The door for your own cells and scripts: a trained model, RLE, scores, a look.

from utils import load_model, read_image, rle_encode, show
model = load_model("out")
mask = model.predict("photo.jpg")
show(read_image("photo.jpg"), mask)
print(rle_encode(mask))
"""

from pathlib import Path

import numpy as np
from PIL import Image

from kit.config import Classes
from kit.data.readers import read_image
from kit.data.rle import rle_decode, rle_encode
from kit.network.model import best_device, prepare_device
from kit.results import metrics, predict, visualize

__all__ = ["load_model", "read_image", "rle_decode", "rle_encode", "score", "show"]


class Model:
    """One trained model, or several that are averaged."""

    def __init__(self, path: str | Path) -> None:
        prepare_device()
        self.models = predict.load_models([str(path)], best_device())
        self.config = predict.ensemble_config(self.models)
        self.classes = self.config.class_names

    def predict(self, image: str | Path | np.ndarray) -> np.ndarray:
        """The mask of an image: a path, or (h, w, 3) uint8 RGB, or (h, w, C). Raises UserError.

        Bool (h, w) of one class, bool (K, h, w) of several; of classes that exclude each other
        their numbers, uint8 (h, w).
        """
        if not isinstance(image, np.ndarray):
            image = read_image(image, self.config.channels, self.config.value_range)
        (prediction,) = predict.predict_whole(self.models, [image], batch_size=8)
        mask = predict.postprocess(prediction, self.config)
        return mask[0] if len(self.classes) == 1 else mask


def load_model(path: str | Path) -> Model:
    """Read a model.pt, or a folder of them, such as --out of train.py. Raises UserError."""
    return Model(path)


def score(mask: np.ndarray, ground_truth: np.ndarray) -> dict[str, float]:
    """Dice and IoU of a mask, 0..1; 255 in the ground truth is ignored (NaN: all). Both (h, w)."""
    hits = metrics.count_hits(mask[None] > 0, ground_truth[None])
    dice, iou = metrics.mask_scores(hits)[0].tolist()
    return {"Dice": dice, "IoU": iou}


def show(image: np.ndarray, mask: np.ndarray, classes: tuple[str, ...] = ()) -> Image.Image:
    """An image (h, w, 3) uint8 with a mask of `Model.predict` laid over; a cell displays it.

    `classes`: the model's; without them the background of a label map has a colour, too.
    """
    planes = mask[None] if mask.dtype == bool and mask.ndim == 2 else mask
    count = int(mask.max()) + 1 if planes.ndim == 2 else len(planes)
    names = classes or tuple(map(str, range(count)))
    layers = visualize.mask_layers(planes, Classes(names, names))
    return Image.fromarray(visualize.paint(image, layers))
