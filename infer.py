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

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from kit.cli import parse
from kit.errors import UserError, first_five, one_line_errors

STARTED = time.monotonic()


@dataclass(frozen=True)
class Options:
    """The flags of infer.py."""

    model: list[str] = field(default_factory=lambda: ["out"])  # model.pt files, or folders of them
    data: str = "auto"  # folder of images, KITTI folder (testing predicts, training scores), image
    masks: str = "auto"  # folder, csv or pattern of masks to score with; auto: what is there
    foreground: str = ""  # values of the foreground in mask files, such as 15 or 1,3 or 128-255
    ignore: str = ""  # values of ignored pixels in mask files, such as 255 or -1
    # order of RLE in a csv of masks and in submission.csv; auto: as it fits, and as trained
    rle: Literal["auto", "columns", "rows", "relative"] = "auto"
    out: str = "predictions"  # folder for everything that is written
    threshold: float | Literal["auto"] = "auto"  # [0..1] of the foreground; auto: as tuned
    min_pixels: int | Literal["auto"] = (
        "auto"  # [-1..1000000000] minimum component area; auto, -1: tuned
    )
    tta: Literal["auto", "true", "false"] = "auto"  # test-time augmentation; auto: as trained
    batch_size: int = 8  # [0..65536] images, or tiles, at a time; 0: 8
    max_minutes: float = 0  # [0..1000000] of all of it: drops TTA, then models, detail; 0: no limit
    comparisons: bool = True  # write comparisons/ID.jpg and report.html
    show: str = ""  # the channels seen as red, green, blue, such as 4,3,2; "": as trained
    bev: bool = False  # write bev/ID.jpg, the bird's-eye view, where there is a calibration (KITTI)
    save_probs: bool = False  # write probs/ID.png, 8-bit probabilities, also for train.py --extra
    # masks as polygons, for Label Studio and CVAT (polygons.json), or QuPath (polygons/ID.geojson)
    polygons: Literal["none", "coco", "geojson"] = "none"
    # submission.csv, submission_kitti.zip, or png: label maps in submission.zip
    submission: Literal["none", "rle", "kitti", "png"] = "none"
    empty_score: Literal["1", "0", "skip"] = "1"  # Dice and IoU of an empty mask that is right
    # csv with header and ids; auto: the one with the data, or above; none: a header of its own
    sample_submission: str = "auto"
    submission_size: str = ""  # height,width of the masks in it, such as 350,525; "": the images'
    # rows: a row for each object; union: for each image; auto: union, or as the sample has it
    instances: Literal["auto", "rows", "union"] = "auto"
    on_missing: Literal["error", "empty"] = "error"  # an id of it that has no image
    # no prediction: model.onnx, or smp/ for smp and the Hub; compared on --data where it is given
    export: Literal["none", "onnx", "smp"] = "none"


if __name__ == "__main__":  # before the slow imports: --help and a mistyped flag answer at once
    with one_line_errors():
        OPTIONS = parse(Options, __doc__)
        print("loading torch and smp ...", flush=True)

import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from kit.config import IGNORE, ModelConfig
from kit.data import extras, kitti, volumes
from kit.data.blocks import is_part
from kit.data.classes import mask_files, mask_folders, write_mask, write_probabilities
from kit.data.images import each_plane, shown_channels, to_picture, write_image
from kit.data.names import MARKER, list_files
from kit.data.samples import find_samples
from kit.data.tiffs import georeference, pack_tiles, write_tiff
from kit.extra.report import Report
from kit.files import writable_folder
from kit.network.model import TrainedModel, best_device, prepare_device
from kit.results import submissions
from kit.results.metrics import Evaluation
from kit.results.mosaics import Mosaic, add_margins, finish
from kit.results.pace import make_pace
from kit.results.predict import (
    describe_masks,
    ensemble_config,
    load_models,
    postprocess,
    predict,
    predict_whole,
)
from kit.results.visualize import OverlayVideo, comparison

SUBMISSIONS = {
    "rle": submissions.RleSubmission,
    "png": submissions.PngSubmission,
    "kitti": kitti.KittiSubmission,
}
WAITING = 1 << 26  # bytes of images and masks that wait to be written
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

# --- Plan -----------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is predicted, with what, and what is written."""

    models: list[TrainedModel]
    config: ModelConfig  # with the thresholds and minimum areas to use
    options: Options
    out: Path
    rank: int  # of this process
    processes: int
    started: float  # when this process did, of time.monotonic


def make_plan(options: Options, started: float) -> Plan:
    """Load the models; thresholds and areas are the mean over them. Raises UserError."""
    prepare_device()
    device = best_device()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    models = load_models(options.model, device)
    config = ensemble_config(models)
    if options.threshold != "auto":  # of all classes
        config = replace(config, thresholds=(options.threshold,) * len(config.thresholds))
    if options.min_pixels not in ("auto", -1):
        config = replace(config, areas=(options.min_pixels,) * len(config.areas))
    if options.show:
        config = replace(config, show=shown_channels(options.show, config.channels))
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return Plan(models, config, options, Path(options.out), rank, processes, started)


def find_images(options: Options, config: ModelConfig) -> pd.DataFrame:
    """The samples to predict. For a submission none of a folder `train`. Raises UserError."""
    root = Path(os.path.abspath(options.data))
    submits = options.submission in ("rle", "png") and root.is_dir()
    images = [file for file in list_files(root) if not file.role] if submits else []
    splits = {file.path: file.split for file in images}
    kitti_road = any(path.parent.name == "image_2" for path in splits)  # its training images score
    if submits and not kitti_road and set(splits.values()) <= {"train"}:
        print(f"--data {root}: no test images; the submission gets no masks", flush=True)
        columns = ["id", "image_id", "image", "layers", "mask", "block", "category", "views"]
        return pd.DataFrame(columns=columns)
    samples = find_samples(
        options.data,
        masks=options.masks,
        target=config.target,
        foreground=options.foreground,
        ignore=options.ignore,
        rle=options.rle,
        classes=config.classes,
        channels=",".join(config.bands) or str(config.channels // config.slices),
        neighbours=config.neighbours,
        soft=config.soft,
        scale=config.scale,
    ).samples
    training = [path.name for path in samples.image if splits.get(path) == "train"]
    if training and not kitti_road:
        raise UserError(
            f"--data {root}",
            f"{len(training)} training images would be submitted: {first_five(training)}",
            "name the folder of the test images",
        )
    return samples


def make_submission(options: Options, samples: pd.DataFrame, config: ModelConfig) -> Any:
    """The submission that is asked for, or None; says which sample it follows. Raises UserError."""
    if options.submission == "none":
        return None
    sample = "" if options.sample_submission == "none" else options.sample_submission
    if sample == "auto" and options.submission != "png":
        root = Path(os.path.abspath(options.data))
        root = root.parent if root.is_file() else root
        folder = Path(samples.image[0]).parent if len(samples) else root
        sample = submissions.find_sample_submission(folder, samples.id, root)
    rerun = os.environ.get("KAGGLE_IS_COMPETITION_RERUN")  # on hidden images an error costs all
    on_missing = "rerun" if rerun else options.on_missing
    order = config.rle if options.rle == "auto" else options.rle
    size = tuple(map(int, re.findall(r"\d+", options.submission_size)))
    if options.submission_size and (len(size) != 2 or not all(size)):
        where = f"--submission_size {options.submission_size}"
        raise UserError(where, "is no height and width", "name both, such as 350,525")
    if config.instances and options.instances == "auto" and options.submission == "rle":
        print("THE TRAINING CSV HAS A ROW FOR EACH OBJECT; --instances rows submits them so")
    submission, classes = SUBMISSIONS[options.submission], config.classes
    return submission(samples, classes, sample, on_missing, order, size, options.instances)


def check_views(samples: pd.DataFrame) -> None:
    """Raise one UserError that names the damaged calibrations."""
    bad = []
    for view in samples.views.explode().dropna():
        try:
            view.check()
        except UserError as error:
            bad.append(error)
    if bad:
        raise UserError("--data", first_five(bad, " | "))


def check_blocks(options: Options, samples: pd.DataFrame, submission: Any) -> None:
    """Raise UserError for what cannot be made of images that are predicted in blocks."""
    parts = samples[samples.block.map(is_part).astype(bool)]
    for chosen, flag, other in (
        (options.save_probs, "--save_probs true", "false"),
        (options.polygons != "none", f"--polygons {options.polygons}", "none"),
        (options.submission == "png", "--submission png", "rle"),
        (getattr(submission, "instances", "") == "rows", "--instances rows", "union"),
        (getattr(submission, "size", ()), "--submission_size", "none: masks have their image's"),
    ):
        if chosen and len(parts):
            problem = f"not of {parts.image.iloc[0].name}, which is predicted in blocks"
            raise UserError(flag, problem, f"take {other}")


def prepare_folders(plan: Plan, samples: pd.DataFrame) -> None:
    """Make the folders that are written to. Raises UserError where one holds the data itself."""
    options = plan.options
    chosen = {"masks": True, "comparisons": options.comparisons, "bev": options.bev}
    chosen |= {"probs": options.save_probs, "polygons": options.polygons == "geojson"}
    folders = [plan.out / name for name, is_chosen in chosen.items() if is_chosen]
    kinds = [folder for folder in folders if folder.name in ("masks", "probs")]
    folders += [kind / name for kind in kinds for name in mask_folders(plan.config.classes)]
    files = [*samples.image, *(mask.path for mask in samples["mask"].dropna())]
    sources = {path.resolve().parent for path in files}
    near = sources | {path.parent for path in sources}  # masks/ there would be read as ground truth
    if plan.out.resolve() in near or sources & {folder.resolve() for folder in folders}:
        raise UserError(
            f"--out {options.out}",
            "is where --data is, predictions would be read as ground truth",
            "name another folder",
        )
    for folder in (plan.out, *folders):
        writable_folder(folder)
    around = any(path.resolve().is_relative_to(plan.out.resolve()) for path in files)
    for folder in folders if around else [plan.out]:  # marked as no data; not the data below it
        (folder / MARKER).touch()


# --- Predict and write ----------------------------------------------------------------------------


def write_outputs(
    plan: Plan,
    page: Report,
    sample: Any,
    image: np.ndarray,
    prediction: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray | None:
    """Write one image's files. Returns its ground truth where there is one, see `masks.py`."""
    options, out, classes = plan.options, plan.out, plan.config.classes
    ground_truth = sample.mask.read(mask.shape[-2:]) if sample.mask else None
    write_mask(out / "masks", sample.id, mask, classes)
    tags = georeference(sample.layers[0].path)
    for folder, values in mask_files(mask, classes).items() if tags else ():
        tiles = (tile for *_, tile in pack_tiles(values))
        write_tiff(out / "masks" / folder / f"{sample.id}.tif", tiles, values.shape, tags)
    if options.save_probs:
        write_probabilities(out / "probs", sample.id, prediction, classes)
    if options.comparisons:
        path = out / "comparisons" / f"{sample.id}.jpg"
        picture = to_picture(image, plan.config)
        write_image(path, comparison(picture, ground_truth, mask, sample.id, classes))
        if page.takes(sample.Index):
            page.add(sample, picture, prediction, mask, ground_truth)
    for view in sample.views if options.bev else ():
        warped = None
        if ground_truth is not None:
            warped = each_plane(lambda plane, view=view: view.warp(plane, IGNORE), ground_truth)
        predicted = each_plane(view.warp, mask)
        drawn = comparison(view.warp(image), warped, predicted, sample.id, classes)
        write_image(out / view.name / f"{sample.id}.jpg", drawn)
    return ground_truth


class Results(NamedTuple):
    """What the images gave."""

    evaluation: Evaluation
    answers: dict[Any, Any]  # of the submission
    failed: list[tuple[str, str]]  # id and message of images that could not be read
    page: Report  # of --comparisons


def predict_and_write(plan: Plan, samples: pd.DataFrame, submission: Any) -> Results:
    """Predict this process's share of the samples; files are written while the models work."""
    page = Report(plan.config, plan.processes * samples.image_id.nunique())
    evaluation = Evaluation(plan.config.classes, plan.options.empty_score)
    results = Results(evaluation, submission.answers if submission else {}, [], page)
    parts = samples[samples.block.map(is_part).astype(bool)].groupby("image_id").block
    order = submission.order if submission and len(parts) else ""
    mosaics = {name: Mosaic(list(blocks), plan.config, order) for name, blocks in parts}
    pending: list[tuple[int, Any, np.ndarray, np.ndarray, Future]] = []
    unreadable: list[tuple[Any, UserError]] = []

    def collect(most: int) -> None:  # at most so many bytes wait: memory stays flat
        while pending and sum(size for size, *_ in pending) > most:
            _, sample, prediction, mask, future = pending.pop(0)
            try:
                ground_truth = future.result()
            except UserError as error:
                unreadable.append((sample, error))
                continue
            if ground_truth is not None:
                results.evaluation.add(sample, prediction, mask, ground_truth)
            mosaic = mosaics.get(sample.image_id)
            if mosaic and mosaic.done(plan.out, sample, plan.options.comparisons):
                add_whole(plan, page, submission, sample, mosaic)

    tta, size, minutes = plan.options.tta, plan.options.batch_size or 8, plan.options.max_minutes
    pace = make_pace(plan.models, tta, minutes, plan.started, len(samples))
    predictions = predict(plan.models, samples, size, tta, unreadable, pace)
    hidden = True if plan.rank else None  # None: shown on a terminal alone
    with ThreadPoolExecutor(2) as writers:
        for sample, image, prediction in tqdm(predictions, None, len(samples), disable=hidden):
            image, prediction, mask = finish(sample, image, prediction, plan.config)
            mosaic = mosaics.get(sample.image_id)
            if mosaic:
                future = writers.submit(mosaic.add, sample, image, mask)
            else:
                future = writers.submit(write_outputs, plan, page, sample, image, prediction, mask)
            size = image.nbytes + prediction.nbytes + mask.nbytes
            pending.append((size, sample, prediction, mask, future))
            if submission and not mosaic:
                submission.add(sample, prediction, mask)
            collect(WAITING)
        collect(0)
    results.failed.extend({s.image_id: str(error) for s, error in unreadable}.items())
    return results


def add_whole(plan: Plan, page: Report, submission: Any, sample: Any, mosaic: Mosaic) -> None:
    """Add an image whose blocks are all predicted to the report and to the submission."""
    if plan.options.comparisons:
        target = mosaic.ground_truth if sample.mask else None
        whole = sample._replace(id=sample.image_id)
        page.add(whole, mosaic.image, None, mosaic.mask, target)
    if submission:
        submission.add_runs(sample.image_id, mosaic.answers())


def gather(plan: Plan, results: Results) -> Results | None:
    """The results of all processes in the first one; None in the others."""
    if plan.processes == 1:
        return results
    torch.distributed.init_process_group("gloo")
    gathered: list[Any] = [None] * plan.processes
    torch.distributed.all_gather_object(gathered, results)
    torch.distributed.destroy_process_group()
    if plan.rank:
        return None
    for other in gathered[1:]:
        results.evaluation.merge(other.evaluation)
        results.answers.update(other.answers)
        results.failed.extend(other.failed)
        results.page.items.update(other.page.items)
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
            print(f"{len(results.failed)} images failed, their masks are empty in it: {messages}")
            results.failed.clear()
    if results.failed:
        problem = f"{len(results.failed)} of {count} could not be used, the others are done"
        raise UserError(f"--data {plan.options.data}", f"{problem}: {messages}")
    if results.evaluation.image_hits:
        results.evaluation.write(plan.out, plan.config.thresholds)
        print(results.evaluation.summary())


def infer(options: Options, started: float | None = None) -> Path:
    """Predict `options.data` and write everything under `options.out`. Raises UserError."""
    plan = make_plan(options, time.monotonic() if started is None else started)
    if options.export != "none":
        from kit.extra.export import export

        samples = None if options.data == "auto" else find_images(options, plan.config)
        return export(options.export, plan.models, samples, options.out)
    if Path(options.data).suffix.lower() in VIDEO_SUFFIXES and Path(options.data).is_file():
        return overlay_video(plan)
    samples = add_margins(find_images(options, plan.config), plan.models)
    check_views(samples)
    whole = samples.drop_duplicates("image_id").assign(id=lambda table: table.image_id)
    submission = make_submission(options, whole, plan.config)
    check_blocks(options, samples, submission)
    images = f"{len(whole)} images, {whole['mask'].notna().sum()} with ground truth"
    models = f"{len(plan.models)} model(s) on {plan.models[0].device.type}"
    print(f"data: {images} · {models} · {describe_masks(plan.config)}")
    prepare_folders(plan, samples)
    number = samples.image_id.factorize()[0]  # an image's blocks are all of one process
    started, share = time.monotonic(), samples[number % plan.processes == plan.rank]
    results = gather(plan, predict_and_write(plan, share, submission))
    if results:
        done = whole[~whole.id.isin([name for name, _ in results.failed])]
        if options.save_probs:
            extras.write_list(plan.out, done, plan.config, [m.seen for m in plan.models])
        if options.polygons != "none":
            from kit.extra.polygons import write_polygons

            write_polygons(options.polygons, plan.out, done, plan.config.classes)
        volumes.join_pages(samples, plan.out / "masks", plan.config.classes, results.failed)
        report(plan, results, len(whole), time.monotonic() - started, submission)
        if results.page.items:
            title, facts = f"Prediction {plan.out.resolve().name}", [images, models]
            results.page.write(plan.out, title, facts, asdict(options))
    return plan.out


# --- Video ----------------------------------------------------------------------------------------


def read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """The frames of a video, (h, w, 3) uint8 RGB."""
    more, frame = video.read()
    while more:
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        more, frame = video.read()


def overlay_video(plan: Plan) -> Path:
    """Lay the mask over each frame of a video: overlay.mp4. Raises UserError for a damaged one."""
    path, started, size = plan.options.data, time.monotonic(), plan.options.batch_size or 8
    if plan.options.max_minutes:
        raise UserError("--max_minutes", "is for images, not for a video", "leave it out")
    video = cv2.VideoCapture(path)
    rate, count = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    frames = read_frames(video)
    batches = iter(lambda: list(itertools.islice(frames, size)), [])
    batch, shares = next(batches, None), []
    if batch is None:
        raise UserError(f"--data {path}", "not a video, empty or damaged", "replace it")
    target = writable_folder(plan.out) / "overlay.mp4"
    with (
        OverlayVideo(target, batch[0].shape[:2], rate if 0 < rate < 1000 else 25) as overlay,
        tqdm(total=max(0, count) or None, unit="frame", disable=None) as bar,
    ):
        for images in itertools.chain([batch], batches):
            predictions = predict_whole(plan.models, images, size, plan.options.tta)
            for image, prediction in zip(images, predictions, strict=True):
                mask = postprocess(prediction, plan.config)
                overlay.add(image, mask, plan.config.classes)
                shares.append(float(mask.mean()))
            bar.update(len(images))
    seconds = time.monotonic() - started
    speed = f"{len(shares)} frames in {seconds:.1f} s, {len(shares) / seconds:.1f} per second"
    shown = "" if plan.config.classes.several else f", {100 * np.mean(shares):.1f} % foreground"
    print(f"{speed}{shown}; look at {target}")
    if len(shares) < count:
        problem = f"ends after {len(shares)} of {count} frames, damaged there"
        raise UserError(f"--data {path}", problem, "the frames before it are done")
    return plan.out


if __name__ == "__main__":
    with one_line_errors():
        infer(OPTIONS, STARTED)
