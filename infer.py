"""Predict roads with a trained model: masks, pictures, scores.

    python infer.py --model out --data ../input/kittiroadsegmentation/testing
    python infer.py --model out --data ../input/kittiroadsegmentation/training    # has truth: metrics.json too
    python infer.py --model out --data photo.jpg --out photo --threshold 0.4
    python infer.py --model run1 run2/model.pt --data pictures                    # several models, averaged

Writes masks/STEM.png (0 or 255, the picture's own size), comparisons/STEM.jpg, probs/STEM.png on request, and
metrics.json where there is truth. Size, encoder and threshold come from model.pt.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from utils import complain, parse


@dataclass(frozen=True)
class Options:
    """The flags of infer.py."""

    # fmt: off
    model: list[str] = field(default_factory=lambda: ["out"])  # model.pt files, or folders that hold some; averaged
    data: str = "auto"  # a folder of pictures, a KITTI folder (training scores, testing predicts), or one picture
    out: str = "predictions"  # folder for everything that is written
    threshold: float | Literal["auto"] = "auto"  # probability from which a pixel is road; auto: the model's own
    tta: Literal["auto", "true", "false"] = "auto"  # average with the mirrored picture; auto: as trained
    batch_size: int = 8  # pictures at a time; 0: 8
    comparisons: bool = True  # write comparisons/STEM.jpg
    save_probs: bool = False  # write probs/STEM.png, 8-bit probabilities, too
    # fmt: on


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag answer at once
    sys.excepthook = complain
    OPTIONS = parse(Options, __doc__)

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import utils
from utils import Scoreboard, Trained, UserError

if TYPE_CHECKING:
    import pandas as pd

# =====================================================================================================================
#  PREDICT: pictures in, probabilities at their own size out
# =====================================================================================================================


def load_models(paths: Iterable[str], device: str) -> list[Trained]:
    """Read the model files named, and those anywhere in the folders named. Raises UserError."""
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("model.pt")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"--model {path}: no model.pt in this folder; train.py writes one")
        files += inside
    return [utils.load_model(path, device) for path in files]


@torch.inference_mode()
def probabilities(model: torch.nn.Module, images: torch.Tensor, precision: str, tta: bool) -> np.ndarray:
    """(N, 3, H, W) float32 to road probabilities (N, H, W) float32; with `tta` the mean with the mirrored pictures."""
    device = next(model.parameters()).device
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    images = images.to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, half, enabled=half is not None):
        result = model(images).float().sigmoid()
        if tta:
            result = (result + model(images.flip(-1)).float().sigmoid().flip(-1)) / 2
    return result[:, 0].cpu().numpy()


def predict(models: list[Trained], samples: pd.DataFrame, batch_size: int = 8, tta: str = "auto",
            bad: list[str] | None = None) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:  # fmt: skip
    """Predict the samples in order; with several models the mean of their probabilities at each picture's own size.

    Yields (sample, picture (h, w, 3) uint8, probability (h, w) uint8; 255 is certain road). The next pictures are
    read while the models work; memory does not grow with their number. A picture that cannot be read raises
    UserError, or is noted in `bad` and left out.
    """
    with ThreadPoolExecutor(2) as readers:
        ahead: deque[tuple[Any, Future]] = deque()
        for row in samples.itertuples():
            ahead.append((row, readers.submit(utils.read_image, row.image)))
            if len(ahead) == 2 * batch_size:
                yield from predict_batch(models, [ahead.popleft() for _ in range(batch_size)], tta, bad)
        while ahead:
            batch = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
            yield from predict_batch(models, batch, tta, bad)


def predict_batch(models: list[Trained], batch: list, tta: str, bad: list[str] | None) -> Iterator[tuple]:
    """One batch of `predict`; its pictures may differ in size."""
    read = []
    for row, future in batch:
        error = future.exception()
        if isinstance(error, UserError) and bad is not None:
            bad.append(str(error))
        else:
            read.append((row, future.result()))
    sums = [np.zeros(picture.shape[:2], np.float32) for _, picture in read]
    for model, cfg, *_ in models if read else ():
        precision = utils.precision(cfg, next(model.parameters()).device.type)
        images = torch.stack([utils.preprocess(picture, cfg) for _, picture in read])
        outputs = probabilities(model, images, precision, cfg.tta if tta == "auto" else tta == "true")
        for total, output in zip(sums, outputs, strict=True):
            total += utils.restore(output, total.shape, cfg)
    for (row, picture), total in zip(read, sums, strict=True):
        yield row, picture, utils.to_8bit(total / len(models))


# =====================================================================================================================
#  WRITE: masks, comparisons, scores
# =====================================================================================================================


def write_outputs(out: Path, row: Any, picture: np.ndarray, probability: np.ndarray, threshold: float,
                  options: Options) -> np.ndarray | None:  # fmt: skip
    """Write one picture's files. Returns its pixel counts (2, 256) where there is a truth. Raises UserError."""
    name = Path(row.image).stem
    truth = utils.read_truth(row.mask, row.layout, picture.shape[:2]) if row.mask else None
    mask = utils.to_mask(probability, threshold)
    utils.write_image(out / "masks" / f"{name}.png", mask.astype(np.uint8) * 255)
    if options.save_probs:
        utils.write_image(out / "probs" / f"{name}.png", probability)
    if options.comparisons:
        utils.write_image(out / "comparisons" / f"{name}.jpg", utils.comparison(picture, truth, mask, name))
    return None if truth is None else utils.pixel_counts(probability, truth)


def infer(options: Options) -> Path:
    """Predict `options.data` and write everything under `options.out`. Raises UserError."""
    device = utils.best_device()
    models = load_models(options.model, device)
    samples = utils.find_samples(options.data, models[0].cfg.target)
    threshold = options.threshold
    if threshold == "auto":
        threshold = float(np.mean([model.threshold for model in models]))
    print(f"data: {len(samples)} pictures, {(samples['mask'] != '').sum()} with truth · {len(models)} model(s) on "
          f"{device} · threshold {threshold:.3f}")  # fmt: skip
    sources = {Path(path).resolve().parent for column in ("image", "mask") for path in samples[column] if path}
    if sources & {(Path(options.out) / name).resolve() for name in ("masks", "comparisons", "probs")}:
        raise UserError(f"--out {options.out}: would overwrite files of --data; name another folder")
    out = utils.writable_folder(options.out)
    wanted = {"masks": True, "comparisons": options.comparisons, "probs": options.save_probs}
    for folder in (name for name, yes in wanted.items() if yes):
        utils.writable_folder(str(out / folder))

    board, bad, started = Scoreboard(), [], time.monotonic()
    with ThreadPoolExecutor(2) as writers:
        pending: deque[tuple[Any, Future]] = deque()

        def collect(most: int) -> None:  # at most so many pictures wait to be written: memory stays flat
            while len(pending) > most:
                row, future = pending.popleft()
                try:
                    counts = future.result()
                except UserError as error:
                    bad.append(str(error))
                else:
                    if counts is not None:
                        board.add(row.category, counts)

        results = predict(models, samples, options.batch_size or 8, options.tta, bad)
        for row, picture, probability in tqdm(results, total=len(samples), unit="picture"):
            arguments = (out, row, picture, probability, threshold, options)
            pending.append((row, writers.submit(write_outputs, *arguments)))
            collect(16)
        collect(0)
    seconds = time.monotonic() - started
    print(f"{len(samples) - len(bad)} pictures in {seconds:.1f} s, {(len(samples) - len(bad)) / seconds:.1f} a second; "
          f"look at {out / 'comparisons' if options.comparisons else out / 'masks'}")  # fmt: skip
    if bad:
        raise UserError(f"{len(bad)} of {len(samples)} could not be used, the others are done: " + " | ".join(bad))
    if board.images["all"]:
        utils.write_file(out / "metrics.json", utils.metrics_json(board.report(), threshold))
        print(utils.score_line(board.report()))
    return out


if __name__ == "__main__":
    infer(OPTIONS)
