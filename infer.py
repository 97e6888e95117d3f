"""Predict with trained models: masks, comparisons, scores, a submission.

    python infer.py --model out --data ../input/kittiroadsegmentation/testing
    python infer.py --model out --data my_images --out predictions  # with masks: metrics.json too
    python infer.py --model out --data photo.jpg --threshold 0.4
    python infer.py --model run1 run2/model.pt --data my_images     # several models, averaged
    python infer.py --model out --data ../input/my-competition --submission rle
    python infer.py --model out --data drive.mp4                    # overlay.mp4
    torchrun --nproc_per_node 2 infer.py --model out --data my_images    # on two GPUs

Size, encoder, threshold and all else that a prediction needs come from model.pt.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from utils import UserError, first_five, one_line_errors, parse, writable_folder


@dataclass(frozen=True)
class Options:
    """The flags of infer.py."""

    model: list[str] = field(default_factory=lambda: ["out"])  # model.pt files, or folders of them
    data: str = "auto"  # folder of images, KITTI folder (testing predicts, training scores), image
    masks: str = "auto"  # folder, csv or pattern of masks to score with; auto: what is there
    foreground: str = ""  # values of the foreground in mask files, such as 15 or 1,3 or 128-255
    # order of RLE in a csv of masks and in submission.csv; auto: as it fits, and as trained
    rle: Literal["auto", "columns", "rows", "relative"] = "auto"
    out: str = "predictions"  # folder for everything that is written
    threshold: float | Literal["auto"] = "auto"  # [0..1] of the foreground; auto: as tuned
    min_pixels: int | Literal["auto"] = (
        "auto"  # [0..1000000000] minimum component area; auto: tuned
    )
    tta: Literal["auto", "true", "false"] = "auto"  # horizontal-flip TTA; auto: as trained
    batch_size: int = 8  # [0..65536] images, or tiles, at a time; 0: 8
    comparisons: bool = True  # write comparisons/ID.jpg
    bev: bool = False  # write bev/ID.jpg, the bird's-eye view, where there is a calibration (KITTI)
    save_probs: bool = False  # write probs/ID.png, 8-bit probabilities
    # submission.csv, submission_kitti.zip, or png: label maps in submission.zip
    submission: Literal["none", "rle", "kitti", "png"] = "none"
    empty_score: Literal["1", "0", "skip"] = "1"  # Dice and IoU of an empty mask that is right
    sample_submission: str = "auto"  # csv with header and ids; auto: the one next to the data
    on_missing: Literal["error", "empty"] = "error"  # an id of it that has no image


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    with one_line_errors():
        OPTIONS = parse(Options, __doc__)

import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import data
import kitti
import rle
import submissions
from class_metrics import make_evaluation
from classes import Classes, classes_of
from colours import palette
from images import IGNORE, MARKER, write_image, write_palette_image
from metrics import Evaluation
from model import ModelConfig, TrainedModel, best_device, prepare_device
from predict import (
    class_thresholds,
    describe_masks,
    load_models,
    make_mask,
    predict,
    predict_images,
)
from visualize import OverlayVideo, comparison

SUBMISSIONS = {"rle": rle.RleSubmission, "kitti": kitti.KittiSubmission}
VALUED_SUBMISSIONS = {"rle": submissions.ClassSubmission, "png": submissions.PngSubmission}
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

# --- Plan -----------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is predicted, with what, and what is written."""

    models: list[TrainedModel]
    config: ModelConfig  # with the thresholds and minimum areas to use
    options: Options
    out: Path
    rank: int = 0  # of this process
    processes: int = 1  # torchrun's

    @property
    def classes(self) -> Classes:
        """What the models tell apart."""
        return classes_of(self.config)

    @property
    def folder_names(self) -> list[str]:
        """A folder for each class: its name, without what a path cannot hold."""
        return [re.sub(r"[^\w .()+-]", "_", name).strip(" .") or "_" for name in self.classes.names]

    def evaluation(self) -> Evaluation:
        """An empty evaluation."""
        return make_evaluation(self.classes, self.options.empty_score)

    def postprocess(self, probability: np.ndarray) -> np.ndarray:
        """(h, w) uint8 to the mask, bool (h, w); of several classes see `predict.make_mask`."""
        return make_mask(probability, self.config)


def make_plan(options: Options) -> Plan:
    """Load the models; thresholds and areas are the mean over them. Raises UserError."""
    prepare_device()
    device = best_device()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    models = load_models(options.model, device)
    configs = [trained.config for trained in models]
    thresholds, areas = zip(*map(class_thresholds, configs), strict=True)
    changed = {
        "threshold": float(np.mean([one.threshold for one in configs])),
        "min_pixels": round(np.mean([one.min_pixels for one in configs])),
        "thresholds": tuple(np.mean(thresholds, axis=0).tolist()),
        "areas": tuple(np.mean(areas, axis=0).round().astype(int).tolist()),
    }
    if options.threshold != "auto":  # of all classes
        changed |= {"threshold": options.threshold, "thresholds": ()}
    if options.min_pixels != "auto":
        changed |= {"min_pixels": options.min_pixels, "areas": ()}
    config = replace(configs[0], **changed)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return Plan(models, config, options, Path(options.out), rank, processes)


def find_images(options: Options, target: str, classes: Classes) -> pd.DataFrame:
    """The samples to predict. For a submission none of a folder `train`. Raises UserError."""
    root = Path(os.path.abspath(options.data))
    submits = options.submission in ("rle", "png") and root.is_dir()
    splits = data.image_splits(root) if submits else {}
    kitti_road = any(path.parent.name == "image_2" for path in splits)  # its training images score
    if submits and not kitti_road and set(splits.values()) <= {"train"}:
        print(f"--data {root}: no test images; the submission gets no masks", flush=True)
        return pd.DataFrame(columns=["id", "image", "mask", "category", "views"])
    named = options.data, options.masks, target, options.foreground
    samples = data.find_samples(*named, runs=options.rle, wanted=classes).samples
    training = [path.name for path in samples.image if splits.get(path) == "train"]
    if training and not kitti_road:
        reason = f"{len(training)} training images would be submitted: {first_five(training)}"
        raise UserError(f"--data {root}: {reason}; name the folder of the test images")
    return samples


def make_submission(options: Options, samples: pd.DataFrame, trained: str, classes: Classes) -> Any:
    """The submission that is asked for, or None; says which sample it follows. Raises UserError.

    `trained`: the order of RLE that the model was trained on.
    """
    if options.submission == "none":
        return None
    if options.submission == "kitti" and classes.names:
        reason = f"needs a model of one class, this one has {len(classes.names)}"
        raise UserError(f"--submission kitti: {reason}; take --submission rle or png")
    sample = options.sample_submission
    if sample == "auto" and options.submission != "png":
        folder = Path(samples.image[0]).parent if len(samples) else Path(options.data)
        sample = rle.find_sample_submission(folder, samples.id)
    rerun = os.environ.get("KAGGLE_IS_COMPETITION_RERUN")  # on hidden images an error costs all
    on_missing = "empty" if rerun else options.on_missing
    order = trained if options.rle == "auto" else options.rle
    if options.submission == "png" or classes.names:
        kind = VALUED_SUBMISSIONS[options.submission]
        return kind(samples, sample, on_missing, order, classes)
    return SUBMISSIONS[options.submission](samples, sample, on_missing, order)


def check_views(samples: pd.DataFrame) -> None:
    """Raise one UserError that names the damaged calibrations."""
    bad = []
    for view in samples.views.explode().dropna():
        try:
            view.check()
        except UserError as error:
            bad.append(error)
    if bad:
        raise UserError(first_five(bad, " | "))


def prepare_folders(plan: Plan, samples: pd.DataFrame) -> None:
    """Make the folders that are written to. Raises UserError where one holds the data itself."""
    options = plan.options
    wanted = {"comparisons": options.comparisons, "bev": options.bev, "probs": options.save_probs}
    overlapping = plan.classes.names and not plan.classes.exclusive
    below = [f"masks/{name}" for name in plan.folder_names] if overlapping else []
    names = ["masks", *below, *(name for name, yes in wanted.items() if yes)]
    folders = [plan.out / name for name in names]
    files = [*samples.image, *(mask.path for mask in samples["mask"].dropna())]
    sources = {path.resolve().parent for path in files}
    near = sources | {path.parent for path in sources}  # masks/ there would be read as ground truth
    if plan.out.resolve() in near or sources & {folder.resolve() for folder in folders}:
        reason = "is where --data is, predictions would be read as ground truth"
        raise UserError(f"--out {options.out}: {reason}; name another folder")
    for folder in (plan.out, *folders):
        writable_folder(folder)
    around = any(path.resolve().is_relative_to(plan.out.resolve()) for path in files)
    for folder in folders if around else [plan.out]:  # marked as no data; not the data below it
        (folder / MARKER).touch()


# --- Predict and write ----------------------------------------------------------------------------


def write_outputs(
    plan: Plan, sample: Any, image: np.ndarray, probability: np.ndarray, mask: np.ndarray
) -> np.ndarray | None:
    """Write one image's files. Returns its ground truth (h, w) uint8 where there is one."""
    options, out = plan.options, plan.out
    ground_truth = sample.mask.read(image.shape[:2]) if sample.mask else None
    write_masks(plan, sample.id, probability, mask)
    if options.comparisons:
        path = out / "comparisons" / f"{sample.id}.jpg"
        write_image(path, plan.evaluation().comparison(image, ground_truth, mask, sample.id))
    for view in sample.views if options.bev else ():
        warped = None if ground_truth is None else view.warp(ground_truth, IGNORE)
        seen = view.warp(image), warped, view.warp(mask.astype(np.uint8)) > 0
        write_image(out / view.name / f"{sample.id}.jpg", comparison(*seen, sample.id))
    return ground_truth


def write_masks(plan: Plan, name: str, probability: np.ndarray, mask: np.ndarray) -> None:
    """Write an image's masks: 0 and 255, that of each class, or a label map with a palette."""
    masks, probs = plan.out / "masks", plan.out / "probs"
    if plan.classes.exclusive:
        values, colours = palette(plan.classes)
        write_palette_image(masks / f"{name}.png", values[mask], colours)
        planes = {"": probability[1]}
    elif plan.classes.names:
        for folder, one in zip(plan.folder_names, mask, strict=True):
            write_image(masks / folder / f"{name}.png", one.astype(np.uint8) * 255)
        planes = dict(zip(plan.folder_names, probability, strict=True))
    else:
        write_image(masks / f"{name}.png", mask.astype(np.uint8) * 255)
        planes = {"": probability}
    for folder, plane in planes.items() if plan.options.save_probs else ():
        write_image(writable_folder(probs / folder) / f"{name}.png", plane)


class Results(NamedTuple):
    """What the images gave."""

    evaluation: Evaluation
    answers: dict[str, Any]  # of the submission
    failed: list[tuple[str, str]]  # id and message of images that could not be read


def predict_and_write(plan: Plan, samples: pd.DataFrame, submission: Any) -> Results:
    """Predict this process's share of the samples; files are written while the models work."""
    results = Results(plan.evaluation(), submission.answers if submission else {}, [])
    pending: list[tuple[Any, np.ndarray, np.ndarray, Future]] = []
    unreadable: list[tuple[Any, UserError]] = []

    def collect(most: int) -> None:  # at most so many images wait: memory stays flat
        while len(pending) > most:
            sample, probability, mask, future = pending.pop(0)
            try:
                ground_truth = future.result()
            except UserError as error:
                unreadable.append((sample, error))
                continue
            if ground_truth is not None:
                results.evaluation.add(sample, probability, mask, ground_truth)

    options = plan.options
    found = predict(plan.models, samples, options.batch_size or 8, options.tta, unreadable)
    hidden = True if plan.rank else None  # None: shown on a terminal alone
    with ThreadPoolExecutor(2) as writers:
        for sample, image, probability in tqdm(found, None, len(samples), disable=hidden):
            mask = plan.postprocess(probability)
            future = writers.submit(write_outputs, plan, sample, image, probability, mask)
            pending.append((sample, probability, mask, future))
            if submission:
                submission.add(sample, probability, mask)
            collect(16)
        collect(0)
    results.failed.extend((sample.id, str(error)) for sample, error in unreadable)
    return results


def gather(plan: Plan, results: Results) -> Results | None:
    """The results of all processes in the first one; None in the others."""
    if plan.processes == 1:
        return results
    torch.distributed.init_process_group("gloo")
    parts: list[Any] = [None] * plan.processes
    torch.distributed.all_gather_object(parts, results)
    torch.distributed.destroy_process_group()
    if plan.rank:
        return None
    for other in parts[1:]:
        results.evaluation.merge(other.evaluation)
        results.answers.update(other.answers)
        results.failed.extend(other.failed)
    return results


def report(plan: Plan, results: Results, count: int, seconds: float, submission: Any) -> None:
    """Write scores and submission, say what was done. Raises UserError for unreadable images."""
    done = count - len(results.failed)
    folder = "comparisons" if plan.options.comparisons else "masks"
    speed = f"{done} images in {seconds:.1f} s, {done / seconds:.1f} per second"
    print(f"{speed}; look at {plan.out / folder}")
    messages = first_five([message for _, message in results.failed], " | ")
    if submission and (not results.failed or plan.options.submission == "rle"):
        submission.write(plan.out)
        if results.failed:  # on hidden test images an error would cost the whole submission
            print(f"{len(results.failed)} unreadable images have empty masks in it: {messages}")
            results.failed.clear()
    if results.failed:
        reason = f"{len(results.failed)} of {count} could not be used, the others are done"
        raise UserError(f"{reason}: {messages}")
    if results.evaluation.masks:
        results.evaluation.write(plan.out, describe_masks(plan.config)[1])
        print(results.evaluation.summary())


def infer(options: Options) -> Path:
    """Predict `options.data` and write everything under `options.out`. Raises UserError."""
    plan = make_plan(options)
    if Path(options.data).suffix.lower() in VIDEO_SUFFIXES and Path(options.data).is_file():
        return overlay_video(plan)
    samples = find_images(options, plan.config.target, plan.classes)
    check_views(samples)
    submission = make_submission(options, samples, plan.config.rle, plan.classes)
    known = f"{len(samples)} images, {samples['mask'].notna().sum()} with ground truth"
    models = f"{len(plan.models)} model(s) on {plan.models[0].device.type}"
    how = describe_masks(plan.config)[0] if plan.classes.names else None
    print(f"data: {known} · {models} · {how or f'threshold {plan.config.threshold:.3f}'}")
    prepare_folders(plan, samples)
    started, share = time.monotonic(), samples.iloc[plan.rank :: plan.processes]
    results = gather(plan, predict_and_write(plan, share, submission))
    if results:
        report(plan, results, len(samples), time.monotonic() - started, submission)
    return plan.out


# --- Video ----------------------------------------------------------------------------------------


def overlay_video(plan: Plan) -> Path:
    """Lay the mask over each frame of a video: overlay.mp4. Raises UserError for a damaged one."""
    path, started, size = plan.options.data, time.monotonic(), plan.options.batch_size or 8
    video = cv2.VideoCapture(path)
    rate, count = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    more, frame = video.read()
    if not more:
        raise UserError(f"--data {path}: not a video, empty or damaged; replace it")
    target = writable_folder(plan.out) / "overlay.mp4"
    shares: list[float] = []
    with OverlayVideo(target, frame.shape[:2], rate if 0 < rate < 1000 else 25) as overlay:
        if not overlay.opened:
            remedy = "OpenCV cannot write an mp4 here; give single images instead"
            raise UserError(f"--out {plan.out}: {remedy}")
        with tqdm(total=max(0, count) or None, unit="frame", disable=None) as bar:
            while more:
                batch = []
                while more and len(batch) < size:
                    batch.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                    more, frame = video.read()
                found = predict_images(plan.models, batch, size, plan.options.tta)
                for one, probability in zip(batch, found, strict=True):
                    mask = plan.postprocess(probability)
                    overlay.add(one, mask, plan.classes)
                    shares.append(float((mask > 0).mean()))
                bar.update(len(batch))
    seconds, frames = time.monotonic() - started, len(shares)
    speed = f"{frames} frames in {seconds:.1f} s, {frames / seconds:.1f} per second"
    shown = "" if plan.classes.names else f", {100 * np.mean(shares):.1f} % foreground"
    print(f"{speed}{shown}; look at {target}")
    if frames < count:
        reason = f"ends after {frames} of {count} frames, damaged there; the rest is done"
        raise UserError(f"--data {path}: {reason}")
    return plan.out


def main() -> None:
    """The command line."""
    with one_line_errors():
        infer(OPTIONS)


if __name__ == "__main__":
    main()
