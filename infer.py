"""Predict roads with a trained model: masks, pictures, scores.

    python infer.py --model out --data ../input/kittiroadsegmentation/testing
    python infer.py --model out --data ../input/kittiroadsegmentation/training    # has truth: metrics.json too
    python infer.py --model out --data photo.jpg --out photo --threshold 0.4
    python infer.py --model run1 run2/model.pt --data pictures                    # several models, averaged
    python infer.py --model out --data ../input/kittiroadsegmentation --submission kitti
    python infer.py --model out --data ../input/my-competition --submission rle   # submission.csv
    python infer.py --model out --data drive.mp4                                  # overlay.mp4
    torchrun --nproc_per_node 2 infer.py --model out --data pictures              # shared between two GPUs

Writes masks/STEM.png (0 or 255, the picture's own size), comparisons/STEM.jpg, on request probs/STEM.png, bev/STEM.jpg
and the submission; metrics.json and pr_curve.png where there is truth. Size, encoder, threshold come from model.pt.
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
    bev: bool = False  # write bev/STEM.jpg too: the road seen from above, where there is a calibration (KITTI)
    save_probs: bool = False  # write probs/STEM.png, 8-bit probabilities, too
    min_pixels: int | Literal["auto"] = "auto"  # smaller patches are dropped from a mask; auto: as tuned in training
    submission: Literal["none", "rle", "kitti", "kitti_partial"] = "none"  # partial: without those that cannot be in it
    sample_submission: str = "auto"  # csv whose header and ids submission.csv takes; auto: the one beside the data
    profile: bool = False  # print how the time is shared between reading, the model and writing
    empty: str = "auto"  # how submission.csv writes an empty mask; auto: "-" where the sample does, else nothing
    # fmt: on


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag answer at once
    sys.excepthook = complain
    OPTIONS = parse(Options, __doc__)

import csv
import functools
import io
import os
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
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
def probabilities(trained: Trained, images: torch.Tensor, mirror: bool) -> torch.Tensor:
    """(N, 3, H, W) uint8 to probabilities (N, H, W) float32; with `mirror` the mean with the mirrored pictures.

    Where the device's memory runs out, half of them at a time. Raises UserError where it holds not even one.
    """
    device = next(trained.model.parameters()).device
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(utils.precision(trained.cfg, device.type))
    try:
        here = utils.normalise(images.to(device), trained.cfg)
        with torch.autocast(device.type, half, enabled=half is not None):
            result = trained.model(here).float().sigmoid()
            if mirror:
                result = (result + trained.model(here.flip(-1)).float().sigmoid().flip(-1)) / 2
        return result[:, 0]
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise UserError(
                f"the {device.type}'s memory holds no picture of {images.shape[2]}x{images.shape[3]}"
            ) from None
    say_once(f"memory ran out with {len(images)} pictures at a time: goes on with half of them")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return torch.cat([probabilities(trained, part, mirror) for part in images.tensor_split(2)])


@functools.cache
def say_once(text: str) -> None:
    """Print a line, the first time."""
    tqdm.write(text)


def predict(models: list[Trained], samples: pd.DataFrame, batch_size: int = 8, tta: str = "auto",
            bad: list[str] | None = None, seconds: Counter | None = None,
            ) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:  # fmt: skip
    """Predict the samples in order; with several models the mean of their probabilities at each picture's own size.

    Yields (sample, picture (h, w, 3) uint8, probability (h, w) uint8; 255 is certain road). The next pictures are
    read while the models work; memory does not grow with their number. A picture that cannot be read raises
    UserError, or is noted in `bad` and left out. `seconds` counts what was waited for pictures and for the models.

    The cores of a CPU share each batch out: every one takes its pictures through all layers alone, where all of them
    together would wait for the slowest after every layer.
    """
    seconds = Counter() if seconds is None else seconds
    rows, cores = list(samples.itertuples()), torch.get_num_threads()
    on_cpu = next(models[0].model.parameters()).device.type == "cpu"
    streams = max(1, min(cores, batch_size, len(rows))) if on_cpu else 1
    size = batch_size // streams
    together = 1 if any(trained.cfg.tiles == "true" for trained in models) else size  # or the tiles make the batches
    ahead: deque[Future] = deque()

    def collect() -> Iterator[tuple]:
        predicted, errors, waited, worked = ahead.popleft().result()
        for error in errors:
            if bad is None or not isinstance(error, UserError):
                raise error
            bad.append(str(error))
        seconds["waiting for pictures"] += waited / streams
        seconds["models"] += worked / streams
        yield from predicted

    passes = ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(cores // streams,))
    with ThreadPoolExecutor(2) as readers:
        try:
            for start in range(0, len(rows), together):
                batch = [(row, readers.submit(utils.read_image, row.image)) for row in rows[start : start + together]]
                ahead.append(passes.submit(predict_batch, models, batch, size, tta))
                if len(ahead) == 2 * streams:
                    yield from collect()
            while ahead:
                yield from collect()
        finally:
            passes.shutdown(cancel_futures=True)  # after an error or Ctrl-C nobody waits for the rest


def predict_batch(models: list[Trained], batch: list, size: int, tta: str) -> tuple[list[tuple], list, float, float]:
    """What could be read of a batch of `predict`, predicted; the errors; the seconds waited and worked."""
    started = time.perf_counter()
    errors = [error for _, future in batch if (error := future.exception())]
    read = [(row, future.result()) for row, future in batch if not future.exception()]
    waited = time.perf_counter() - started
    pairs = predict_pictures(models, [picture for _, picture in read], size, tta)
    predicted = [(row, *pair) for (row, _), pair in zip(read, pairs, strict=True)]
    return predicted, errors, waited, time.perf_counter() - started - waited


def predict_pictures(models: list[Trained], pictures: list[np.ndarray], size: int,
                     tta: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Predict a batch of pictures (h, w, 3) uint8, which may differ in size; yields each with its probability.

    Of large ones `size` tiles go through a model at a time.
    """
    sums: list[Any] = [0] * len(pictures)  # stay on the device until they are 8-bit
    for trained in models if pictures else ():
        mirror = trained.cfg.tta if tta == "auto" else tta == "true"
        if trained.cfg.tiles == "true":
            restored = [predict_tiles(trained, picture, size, mirror) for picture in pictures]
        else:
            images = torch.stack([utils.preprocess(picture, trained.cfg) for picture in pictures])
            outputs = zip(probabilities(trained, images, mirror), pictures, strict=True)
            restored = [utils.restore(output, picture.shape[:2], trained.cfg) for output, picture in outputs]
        sums = [total + probability for total, probability in zip(sums, restored, strict=True)]
    for picture, total in zip(pictures, sums, strict=True):
        yield picture, utils.to_8bit(total / len(models)).cpu().numpy()


@torch.inference_mode()
def predict_tiles(trained: Trained, picture: np.ndarray, at_once: int, mirror: bool) -> torch.Tensor:
    """A large picture (h, w, 3) uint8 tile by tile, overlapping by a quarter and blended: (h, w) float32."""
    cfg, size = trained.cfg, picture.shape[:2]
    total = torch.zeros(size, device=next(trained.model.parameters()).device)
    weights = torch.zeros_like(total)
    window = torch.outer(*(torch.hann_window(n + 2)[1:-1].clamp(min=1e-3) for n in (cfg.height, cfg.width))).to(total)
    places = utils.tile_places(size, cfg, overlap=0.25)
    for k in range(0, len(places), at_once):
        chosen = places[k : k + at_once]
        tiles = torch.stack([utils.to_tensor(utils.cut(picture, place, cfg)) for place in chosen])
        for (y, x), output in zip(chosen, probabilities(trained, tiles, mirror), strict=True):
            part = total[y : y + cfg.height, x : x + cfg.width]
            inside = window[: part.shape[0], : part.shape[1]]
            part += output[: part.shape[0], : part.shape[1]] * inside
            weights[y : y + cfg.height, x : x + cfg.width] += inside
    return total.div_(weights)


# =====================================================================================================================
#  WRITE: masks, comparisons, scores
# =====================================================================================================================


def write_outputs(out: Path, row: Any, picture: np.ndarray, probability: np.ndarray, mask: np.ndarray,
                  options: Options) -> tuple[dict[str, torch.Tensor], tuple[float, float]] | None:  # fmt: skip
    """Write one picture's files. Returns its `picture_counts` and `mask_scores` where there is a truth, else None."""
    name = Path(row.image).stem
    truth = utils.read_truth(row.mask, row.layout, picture.shape[:2]) if row.mask else None
    utils.write_image(out / "masks" / f"{name}.png", mask.astype(np.uint8) * 255)
    if options.save_probs:
        utils.write_image(out / "probs" / f"{name}.png", probability)
    if options.comparisons:
        utils.write_image(
            out / "comparisons" / f"{name}.jpg", utils.comparison(picture, truth, mask, name, row.category)
        )
    if options.bev and row.calib:
        cells = utils.bev_cells(row.calib, picture.shape[:2])
        above = [None if pixels is None else utils.to_bev(pixels, cells, outside)
                 for pixels, outside in ((picture, 0), (truth, utils.IGNORE), (mask, 0))]  # fmt: skip
        utils.write_image(out / "bev" / f"{name}.jpg", utils.comparison(*above[:2], above[2] > 0, name, row.category))
    if truth is None:
        return None
    return utils.picture_counts(row, probability, truth), utils.mask_scores(mask, truth)


class RleSubmission:
    """submission.csv: run lengths at each picture's own size, with the header, ids and order of the sample."""

    def __init__(self, path: Path, samples: pd.DataFrame, options: Options) -> None:
        folder, sample = Path(samples.image[0]).parent, options.sample_submission
        if sample == "auto":
            above = folder.parents[: 2 if folder.name == "images" else 1]  # test/images, test
            near = [path for up in (folder, *above) for path in sorted(up.glob("*sample*submission*.csv"))]
            sample = str(near[0]) if near else ""
        stems = [Path(image).stem for image in samples.image]
        self.path, self.found, self.column = path, {}, 1
        self.table = [["id", "rle_mask"], *([stem, ""] for stem in stems)]
        if sample:
            self.table = [fields for _, fields in utils.read_table(Path(sample))]
            names = [name.lower() for name in (self.table or [[]])[0]]
            self.column = next((names.index(name) for name in utils.RUN_COLUMNS if name in names), 1)
            if len(names) < 2 or len(self.table) < 2 or any(len(row) != len(names) for row in self.table):
                raise UserError(f"--sample_submission {sample}: expected a header and rows of ids and run lengths")
        known = set(stems)
        self.stems = [row[0] if row[0] in known else Path(row[0]).stem for row in self.table[1:]]
        repeated = sorted(stem for stem, times in Counter(self.stems).items() if times > 1)
        unknown = sorted(set(self.stems) - known)
        for wrong, words in ((unknown, "ids without a picture in --data"), (repeated, "ids that stand twice")):
            if wrong:
                raise UserError(f"--sample_submission {sample}: {len(wrong)} {words}: {', '.join(wrong[:20])}")
        extra = sorted(known - set(self.stems))
        if extra:
            print(f"{sample}: {len(extra)} pictures are not asked for and left out: {', '.join(extra[:5])}")
        dash = any(row[self.column] == "-" for row in self.table[1:])
        self.empty = options.empty if options.empty != "auto" else "-" if dash else ""

    def add(self, row: Any, probability: np.ndarray, mask: np.ndarray) -> None:
        """Keep one picture's runs."""
        self.found[Path(row.image).stem] = utils.rle_encode(mask) or self.empty

    def write(self) -> None:
        """Write the csv whole."""
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        writer.writerow(self.table[0])
        for fields, stem in zip(self.table[1:], self.stems, strict=True):
            writer.writerow([self.found[stem] if k == self.column else field for k, field in enumerate(fields)])
        utils.write_file(self.path, content.getvalue())
        print(f"wrote {self.path}: {len(self.stems)} rows, {sum(r != self.empty for r in self.found.values())} masks")


class KittiZip:
    """submission_kitti.zip as the KITTI Road server takes it: an 8-bit bird's-eye probability map for each picture."""

    def __init__(self, path: Path, samples: pd.DataFrame, options: Options) -> None:
        data, partial = options.data, options.submission == "kitti_partial"
        self.rows = samples[~samples.category.isin(["", "umm_lane", "uu_lane"])]  # only um has a lane of its own
        lacking = [Path(row.image).name for row in self.rows.itertuples() if not row.calib]
        if self.rows.empty or len(lacking) == len(self.rows):
            raise UserError(f"--submission kitti: {data} is not in the KITTI layout with image_2 and calib beside it")
        if lacking and not partial:
            raise UserError(f"--submission kitti: {len(lacking)} of {len(self.rows)} pictures have no calibration in "
                            f"{data}/calib, the server would refuse the rest: {', '.join(lacking)}; add them, or take "
                            "--submission kitti_partial")  # fmt: skip
        self.path, self.found = path, {}

    def add(self, row: Any, probability: np.ndarray, mask: np.ndarray) -> None:
        """Keep one picture's map, some 20 kB of PNG."""
        if row.Index in self.rows.index and row.calib:
            above = utils.to_bev(probability, utils.bev_cells(row.calib, probability.shape))
            self.found[f"{row.category}_{Path(row.image).stem.split('_')[1]}.png"] = utils.encode_image(above, ".png")

    def write(self) -> None:
        """Write the zip whole; the same maps give the same bytes."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:  # PNG is compressed already
            for name in sorted(self.found):
                archive.writestr(zipfile.ZipInfo(name), self.found[name])
        utils.write_file(self.path, content.getvalue())
        print(f"wrote {self.path}: {len(self.found)} maps")


def infer(options: Options) -> Path:
    """Predict `options.data` and write everything under `options.out`. Raises UserError."""
    utils.srun_as_torchrun()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun's processes
    device = utils.best_device()
    utils.reuse_memory()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    models = load_models(options.model, device)
    threshold, min_pixels = options.threshold, options.min_pixels
    if threshold == "auto":
        threshold = float(np.mean([trained.threshold for trained in models]))
    if min_pixels == "auto":
        min_pixels = round(float(np.mean([max(0, trained.cfg.min_pixels) for trained in models])))
    if Path(options.data).suffix.lower() in VIDEO_SUFFIXES and Path(options.data).is_file():
        return overlay_video(models, threshold, min_pixels, options)
    samples = utils.find_samples(options.data, models[0].cfg.target)
    utils.check_calibrations(samples)
    submission: Any = None
    if options.submission == "rle":
        submission = RleSubmission(Path(options.out) / "submission.csv", samples, options)
    elif options.submission != "none":
        submission = KittiZip(Path(options.out) / "submission_kitti.zip", samples, options)
    if rank == 0:
        print(f"data: {len(samples)} pictures, {(samples['mask'] != '').sum()} with truth · {len(models)} model(s) on "
              f"{device} · threshold {threshold:.3f}")  # fmt: skip
    wanted = {"masks": True, "comparisons": options.comparisons, "bev": options.bev, "probs": options.save_probs}
    truths = samples["mask"][samples.layout != "rle"]
    sources = {Path(path).resolve().parent for path in (*samples.image, *truths) if path}
    if sources & {(Path(options.out) / name).resolve() for name in wanted}:
        raise UserError(f"--out {options.out}: would overwrite files of --data; name another folder")
    out = utils.writable_folder(options.out)
    for folder in (name for name, yes in wanted.items() if yes):
        utils.writable_folder(str(out / folder))

    everything, samples = len(samples), samples.iloc[rank::world]
    board, masks, bad, started = Scoreboard(), [], [], time.monotonic()
    with ThreadPoolExecutor(2) as writers:
        pending: deque[tuple[Any, Future]] = deque()

        def collect(most: int) -> None:  # at most so many pictures wait to be written: memory stays flat
            while len(pending) > most:
                row, future = pending.popleft()
                try:
                    scored = future.result()
                except UserError as error:
                    bad.append(str(error))
                else:
                    if scored is not None:
                        board.add(row.category, scored[0])
                        masks.append(scored[1])

        seconds: Counter = Counter()
        results = predict(models, samples, options.batch_size or 8, options.tta, bad, seconds)
        for row, picture, probability in tqdm(results, total=len(samples), unit="picture", disable=rank > 0):
            mask = utils.drop_small(utils.to_mask(probability, threshold), min_pixels)
            pending.append((row, writers.submit(write_outputs, out, row, picture, probability, mask, options)))
            if submission:
                submission.add(row, probability, mask)
            collect(16)
        collect(0)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, (board, masks, bad, submission.found if submission else {}))
        torch.distributed.destroy_process_group()
        if rank:
            return out  # the first process goes on with all of it
        for other, more_masks, more_bad, found in parts[1:]:
            board.merge(other)
            masks += more_masks
            bad += more_bad
            if submission:
                submission.found |= found
    whole, done = time.monotonic() - started, everything - len(bad)
    if options.profile:
        seconds["masks, writing and waiting for it"] = whole - sum(seconds.values())
        print("  ".join(f"{stage}: {100 * part / whole:.0f} %" for stage, part in seconds.items()))
    print(f"{done} pictures in {whole:.1f} s, {done / whole:.1f} a second; "
          f"look at {out / 'comparisons' if options.comparisons else out / 'masks'}")  # fmt: skip
    if submission and (not bad or options.submission == "kitti_partial"):
        submission.write()
    if bad:
        raise UserError(f"{len(bad)} of {everything} could not be used, the others are done: " + " | ".join(bad))
    if masks:
        utils.write_file(out / "metrics.json", utils.metrics_json(board.report(), masks, threshold))
        utils.write_file(out / "pr_curve.png", lambda part: utils.draw_pr_curve(board, part))
        print(utils.score_line(board.report(), masks))
    return out


VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def overlay_video(models: list[Trained], threshold: float, min_pixels: int, options: Options) -> Path:
    """Lay the road over a video, frame by frame: overlay.mp4. Memory stays flat. Raises UserError for a damaged one."""
    video = cv2.VideoCapture(options.data)
    rate, count = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    going, frame = video.read()
    if not going:
        raise UserError(f"--data {options.data}: not a video, empty or damaged; replace it")
    out, started, frames, most = utils.writable_folder(options.out), time.monotonic(), 0, options.batch_size or 8
    part, size = out / ".overlay.part.mp4", (frame.shape[1], frame.shape[0])
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), rate if 0 < rate < 1000 else 25, size)
    if not writer.isOpened():
        raise UserError(f"--out {out}: OpenCV cannot write an mp4 here; give single pictures instead")
    shares = []
    try:
        with tqdm(total=max(0, count) or None, unit="frame") as bar:
            while going:
                batch = []
                while going and len(batch) < most:
                    batch.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                    going, frame = video.read()
                for picture, probability in predict_pictures(models, batch, most, options.tta):
                    mask = utils.drop_small(utils.to_mask(probability, threshold), min_pixels)
                    writer.write(cv2.cvtColor(utils.tint(picture, mask, utils.GREEN), cv2.COLOR_RGB2BGR))
                    shares.append(float(mask.mean()))
                frames += len(batch)
                bar.update(len(batch))
        writer.release()
        part.replace(out / "overlay.mp4")
    finally:
        part.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    print(f"{frames} frames in {seconds:.1f} s, {frames / seconds:.1f} a second, {100 * np.mean(shares):.1f} % road; "
          f"look at {out / 'overlay.mp4'}")  # fmt: skip
    if frames < count:
        raise UserError(
            f"--data {options.data}: ends after {frames} of {count} frames, damaged there; what came is done"
        )
    return out


if __name__ == "__main__":
    infer(OPTIONS)
