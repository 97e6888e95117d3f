"""What train.py and infer.py share, in the order of the data's way:

    settings · samples · run lengths · images · model · metrics · bird's-eye view · pictures

A new score or another reading of the masks goes in here; a new loss or augmentation goes into train.py.
torch, smp, pandas and scikit-learn are imported where they are used, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import sys
import textwrap
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

if typing.TYPE_CHECKING:
    import pandas as pd
    import torch

# =====================================================================================================================
#  SETTINGS: what you change first. Every line is also a flag of train.py: --epochs 20
# =====================================================================================================================


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a training; model.pt carries them to inference."""

    # fmt: off
    # data
    data: str = "auto"  # folder of the training pairs; auto: look under /kaggle/input, ../input, then ask kagglehub
    out: str = "out"  # folder for everything that is written
    masks: str = "auto"  # a folder of masks, or a csv of run lengths; auto: what lies beside the pictures
    target: Literal["road", "lane"] = "road"  # KITTI only: the whole road, or the car's own lane (um pictures)
    folds: int = 10  # parts the data is cut into, frames of one street together; one part validates (10: 10 %)
    fold: int | Literal["all"] = 0  # which part validates, from 0; all: a model for each, out/fold0, out/fold1, ...
    group: str = ""  # column of the csv whose equal values (a patient, a place) stay in one fold
    seed: int = 0  # of the folds, the first weights and the augmentations
    # model
    arch: str = "Unet"  # any smp architecture: Unet, UnetPlusPlus, FPN, DeepLabV3Plus, Segformer, ...
    encoder: str = "resnet34"  # any smp encoder; more accurate: resnet50, efficientnet-b3; quicker: resnet18
    encoder_weights: str = "imagenet"  # imagenet, none (from scratch), or a .safetensors or .pth file
    height: int = 0  # pixels that the model sees; 0: follows the pictures' shape and what the device can do
    width: int = 0  # as height; finer edges cost time in proportion to height x width
    top: float = -1  # share of the height that is cut off above: the sky; -1: where no training mask reaches, less 5 %
    tiles: Literal["auto", "true", "false"] = "auto"  # cut pictures into height x width; auto: those over 2 megapixels
    mean: tuple[float, ...] = ()  # of red,green,blue in 0..1 to subtract; empty: what the encoder was trained with
    std: tuple[float, ...] = ()  # as mean, to divide by
    # training
    epochs: int = 0  # passes over the data; 0: as many as max_minutes allows, or 40 where no time is set
    max_minutes: float = 0  # of the whole training, resumed parts included; the schedule fits it; 0: no limit
    batch_size: int = 0  # pictures a step; halve it when the GPU's memory runs out; 0: 8, on a CPU 4 to 16
    lr: float | Literal["auto"] = 5e-4  # AdamW's highest learning rate; auto: Lightning's finder picks it
    weight_decay: float = 1e-2  # AdamW's; keeps the weights small
    grow: bool = True  # train on smaller pictures first, 1/2 then 3/4 of height and width: more epochs in the time
    dice: float = 1.0  # weight of the Dice loss beside BCE: counts the road as a whole, small or large
    augment: float = 1.0  # strength of the augmentation; 0: none
    ema: float = 0.98  # moving average of the weights over about 1 / (1 - ema) steps, which is what is kept; 0: none
    metric: Literal["auto", "maxf", "dice", "iou"] = "auto"  # that threshold and min_pixels serve; auto: maxf for KITTI
    min_pixels: int = -1  # smaller patches are dropped from a mask; -1: what serves dice or iou best
    tta: bool = True  # predict the mirrored picture too and average: a little better, twice the time
    # machine
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"  # auto: the quickest that the device does well
    compile: bool = False  # torch.compile: slow to start, then up to a third quicker on a GPU
    devices: int = 1  # GPUs (or CPU processes) to train on
    workers: int = -1  # processes that prepare the pictures; -1: one a core, 4 at most, beside a GPU; 0 on a CPU
    resume: str = "auto"  # auto: go on where --out has an unfinished run; none: start over; or a last.ckpt
    # fmt: on


LIMITS = {  # flag: smallest and largest value allowed
    "folds": (2, 1000), "fold": (0, 999), "seed": (0, 2**31), "height": (0, 16384), "width": (0, 16384),
    "epochs": (0, 10**6), "max_minutes": (0, 10**6), "batch_size": (0, 65536), "lr": (1e-9, 10),
    "weight_decay": (0, 10), "dice": (0, 1000), "augment": (0, 3), "ema": (0, 0.99999), "devices": (1, 1024),
    "workers": (-1, 256), "min_pixels": (-1, 10**9), "top": (-1, 0.9), "threshold": (0, 1), "mean": (-1, 2),
    "std": (1e-3, 10),
}  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend. The message names the file or flag and the remedy."""


def complain(kind: type, error: BaseException, trace: Any) -> None:
    """`sys.excepthook` of the scripts: a UserError is one line on stderr and exit status 2, all else a traceback."""
    if not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, trace)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse(settings: type, doc: str, argv: list[str] | None = None) -> Any:
    """Make a command line from a dataclass: a flag a field, its help the comment behind it. Raises UserError."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            raise UserError(f"{message} (--help lists the flags)")

    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags = [f"--{field.name}" for field in dataclasses.fields(settings)]
    comments = re.findall(r"^    \w+: .*? = (.*?)  # (.*)$", inspect.getsource(settings), re.MULTILINE)
    hints = typing.get_type_hints(settings).items()
    for flag, (default, comment), (name, kind) in zip(flags, comments, hints, strict=True):
        many = "+" if typing.get_origin(kind) is list else None
        convert = functools.partial(convert_flag, name, kind)
        line = f"{comment} [{default}]".replace("%", "%%")
        parser.add_argument(flag, type=convert, nargs=many, default=argparse.SUPPRESS, metavar="X", help=line)
    known, extra = parser.parse_known_args(argv)
    for word in extra:
        close = difflib.get_close_matches(word.split("=")[0], flags, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else " (--help lists the flags)"
        raise UserError(f"unknown {'flag' if word.startswith('-') else 'argument'} {word}{hint}")
    return settings(**vars(known))


def convert_flag(name: str, kind: Any, text: str) -> Any:
    """Turn a flag's text into its type, or raise a UserError that says what it takes."""
    literals = [part for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is Literal]
    words = ["true", "false"] if kind is bool else [word for part in literals for word in typing.get_args(part)]
    if text in words:
        return text == "true" if kind is bool else text
    if kind is str or typing.get_origin(kind) is list:
        return text
    wanted, whole = [], int in (kind, *typing.get_args(kind))
    if name in LIMITS:
        count, (low, high) = 3 if typing.get_origin(kind) is tuple else 1, LIMITS[name]
        number = "three numbers with commas" if count == 3 else "a whole number" if whole else "a number"
        wanted = [f"{number} from {low} to {high}"]
        with contextlib.suppress(ValueError):  # no number: the same answer as a wrong one, below
            values = tuple(int(part) if whole else float(part) for part in text.split(","))
            if len(values) == count and all(low <= value <= high for value in values):
                return values if count == 3 else values[0]
    raise UserError(f"--{name} {text}: takes {' or '.join(wanted + words)}")


def writable_folder(out: str) -> Path:
    """Make the folder and try it. Raises UserError where it cannot be written."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write_test").write_bytes(b"")
        (folder / ".write_test").unlink(missing_ok=True)  # another process may have been quicker
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    return folder


def write_file(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: a file under its final name is always whole.

    Raises UserError where the disk is full or the folder is gone or read-only; the earlier file is unharmed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or reason_of(error)
        raise UserError(f"{path}: cannot be written ({reason}); free space there or name another --out") from None
    finally:
        with contextlib.suppress(OSError):  # gone with its folder
            part.unlink(missing_ok=True)


# =====================================================================================================================
#  SAMPLES: which picture goes with which mask, and which of them validate
# =====================================================================================================================

LAYOUTS = {"kitti": "KITTI Road", "masks": "a picture a mask", "rle": "csv of run lengths"}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # whatever the name says: an EPS would run Ghostscript
KAGGLE_DATASET = "sakshaymahna/kittiroadsegmentation"
MAX_FIELD = 64 << 20  # characters of a csv's field
BLOCK = 8  # consecutive frames show one street: they validate, or train, together (fewer where pictures are few)


def find_data(data: str) -> Path:
    """The folder meant by --data. "auto" looks for KITTI's training/image_2 at any depth that Kaggle mounts it."""

    def kitti(root: Path) -> Path | None:
        found = (marker for depth in range(5) for marker in sorted(root.glob("*/" * depth + "training/image_2")))
        return next((marker.parents[1] for marker in found), None)

    if data != "auto":
        if not Path(data).exists():
            raise UserError(f"--data {data}: not found; name a folder of pictures, a picture, or auto")
        return Path(data)
    attached = kitti(Path("/kaggle/input")) or kitti(Path("../input"))
    if not attached:
        if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):  # here kagglehub waits for ever for what is not attached
            raise UserError(
                f"--data auto: no KITTI Road in the notebook's input; add {KAGGLE_DATASET}, or name a folder"
            )
        try:
            import kagglehub

            attached = kitti(Path(kagglehub.dataset_download(KAGGLE_DATASET)))
        except Exception as error:  # whatever kagglehub or the network say
            raise UserError(f"--data auto: not in /kaggle/input or ../input, and {KAGGLE_DATASET} cannot be fetched "
                            f"({reason_of(error)}); download it and give its folder") from None  # fmt: skip
    print(f"--data auto: {attached}")
    return attached


def list_images(folder: Path) -> dict[str, Path]:
    """{stem: path} of the pictures in a folder, sorted. Raises UserError where two share a stem."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{folder}: {found[path.stem].name} and {path.name} share a name; rename one of them")
            found[path.stem] = path
    return found


def find_samples(data: str, target: str = "road", masks: str = "auto", training: bool = False) -> pd.DataFrame:
    """Pair pictures with masks.

    Returns a DataFrame of strings with a row a picture: the paths `image`, `mask` and `calib` ("" where there is none),
    `layout` ("kitti", "masks" or "rle": how to read the mask; of a csv, `mask` holds the runs), `category`
    ("um_road", ...; "" outside KITTI) and `group` ("" or what must stay in one fold). With `training`, every picture
    must have a mask. Raises UserError, which lists all the pictures that have none.
    """
    import pandas as pd

    columns = {"image": "", "mask": "", "calib": "", "layout": "masks", "category": "", "group": ""}
    root = find_data(data)
    if root.is_file():
        if training or root.suffix.lower() not in IMAGE_SUFFIXES:
            kinds = f"a folder, a video or a picture ({', '.join(IMAGE_SUFFIXES)})"
            wanted = "a folder of pairs" if training else kinds
            raise UserError(f"--data {data}: is a file; name {wanted}")
        return pd.DataFrame([columns | {"image": str(root)}])
    known = ("training", "images", "train/images", "train_images", "train", ".")
    asked = ("testing", "test/images", "test_images", "test")
    folders = [f for f in (known if training else asked + known) for f in (f"{f}/image_2", f) if list_images(root / f)]
    if not folders:
        raise UserError(f"--data {data}: no pictures in it; expected training/image_2 and training/gt_image_2 (KITTI), "
                        "images and masks, train and train.csv, or pictures")  # fmt: skip
    folder = Path(os.path.abspath(root / folders[0]))  # not resolved: a link may be named otherwise than its target
    others = [f for f in folders[1:] if f.startswith("train")]
    if not training and folders[0].startswith("test"):
        hint = f"; name {root / others[0]} for the scores of pictures with truth" if others else ""
        print(f"--data {data}: predicts {folders[0]}{hint}")
    images = list_images(folder)
    kitti = folder.name == "image_2"
    if target == "lane" and training and not kitti:
        raise UserError(f"--target lane: {data} is not in the KITTI layout, which alone has lanes; leave the flag out")
    where, truths, groups = find_masks(folder, images, masks, needed=training)
    rows = []
    for stem, image in images.items():
        row = columns | {"image": str(image), "mask": str(truths.get(stem, "")), "group": groups.get(stem, "")}
        row["layout"] = "rle" if where.suffix == ".csv" else "masks"
        name = re.fullmatch(r"([a-z]+)_(\d+)", stem) if kitti else None
        if name:
            if target == "lane" and name[1] != "um" and training:
                continue  # only um pictures have a truth for the car's own lane
            calib = folder.parent / "calib" / f"{stem}.txt"
            row |= {"layout": "kitti", "category": f"{name[1]}_{target}", "calib": str(calib) * calib.is_file(),
                    "mask": str(truths.get(f"{name[1]}_{target}_{name[2]}", ""))}  # fmt: skip
        rows.append(row)
    samples = pd.DataFrame(rows, columns=list(columns))
    alone = [Path(image).name for image in samples.image[samples["mask"] == ""]]
    if training and (alone or len(samples) < 2):
        pairs = f"{len(samples) - len(alone)} pairs"
        if not alone:
            raise UserError(f"--data {data}: {pairs}; at least 2 are needed, one to train and one to validate on")
        raise UserError(f"--data {data}: {len(alone)} of {len(samples)} pictures have no mask in {where} "
                        f"({pairs} are complete); add the masks or move away: {', '.join(alone)}")  # fmt: skip
    return samples


def find_masks(folder: Path, images: dict[str, Path], masks: str, needed: bool) -> tuple[Path, dict, dict]:
    """Where the masks of a folder of pictures are: the folder or csv, {stem: path or runs}, {stem: csv fields}."""
    above = folder.parent
    usual = [above / ("gt_image_2" if folder.name == "image_2" else "masks"), above / "train_masks", folder / "masks"]
    places = [path for path in usual if list_images(path)]
    if masks != "auto":
        places = [path for path in (Path(masks), above / masks, above.parent / masks) if path.exists()]
        if not places:
            raise UserError(f"--masks {masks}: not found; name a folder of masks or a csv of run lengths")
    elif not {folder.name, above.name if folder.name == "images" else ""} & {"test", "test_images"}:
        roots = [folder, above, above.parent] if folder.name == "images" else [folder, above]
        named = [root / "train.csv" for root in roots if (root / "train.csv").is_file()]
        places = [path for path in named if run_columns(path)][:1] or places
        places = places or [path for root in roots for path in sorted(root.glob("*.csv")) if run_columns(path)]
        if len(places) > 1 and needed:
            raise UserError(f"--data: {' and '.join(map(str, places))} hold masks; choose one with --masks")
    where = places[0] if places else usual[0]
    if where.suffix == ".csv":
        return where, *read_runs(where, images)
    return where, list_images(where), {}


ID_COLUMNS = ("id", "imageid", "image_id", "img", "record_id", "image", "filename", "file_name")
RUN_COLUMNS = ("rle_mask", "encodedpixels", "encoded_pixels", "pixels", "rle", "mask", "segmentation")
EMPTY = ("", "-", "nan", "none", "-1")  # how competitions write a mask without a pixel


def check_file(path: str | Path) -> None:
    """Raise OSError for a pipe, which whoever opens it may wait for for ever, a device or a folder."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("a folder, pipe or device, not a file")


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv with their numbers, the header first. Raises UserError, with the row, for a damaged one."""
    import csv

    csv.field_size_limit(MAX_FIELD)
    line = 0
    try:
        check_file(path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            head = file.readline(MAX_FIELD)
            file.seek(0)
            separator = max(",;\t", key=head.count)
            for fields in csv.reader(file, delimiter=separator, strict=True):
                line += 1
                if fields:
                    yield line, [field.strip() for field in fields]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: row {line + 1} cannot be read ({reason_of(error)}); mend the csv") from None


def run_columns(path: Path) -> tuple[int, int] | None:
    """Which columns of a csv hold ids and run lengths, by the usual names or, if they look like it, the first two."""
    if "submission" in path.name.lower():
        return None
    rows = [fields for _, fields in itertools.islice(read_table(path), 200)]
    if not rows or len(rows[0]) < 2:
        return None
    header = [name.lower() for name in rows[0]]
    ids, runs = ([header.index(name) for name in names if name in header] for names in (ID_COLUMNS, RUN_COLUMNS))
    if runs:
        return (ids or [0])[0], runs[0]
    values = [row[1] for row in rows[1:] if len(row) > 1 and row[1].lower() not in EMPTY]
    runs = values and all(re.fullmatch(r"\d+ \d+( \d+ \d+)*", value) for value in values)
    return (0, 1) if runs else None


def read_runs(path: Path, images: dict[str, Path]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Read a csv of run-length masks, one row a picture or one an object; a picture without a row has an empty mask.

    Returns {stem: "csv row 2: 1 4;csv row 7: 9 2" or "-" for empty} and {stem: {column: value}}. Raises UserError.
    """
    columns = run_columns(path)
    if columns is None:
        raise UserError(f"--masks {path}: expected a csv with a column of ids and one of run lengths (start, length)")
    rows = read_table(path)
    _, header = next(rows)
    found, fields_of, unknown = {stem: [] for stem in images}, {}, []
    for line, fields in rows:
        if len(fields) != len(header):
            raise UserError(f"{path}: row {line} has {len(fields)} fields, the header {len(header)}; mend the csv")
        name, runs = (fields[column] for column in columns)
        stem = name if name in images else Path(name).stem
        if stem not in images:
            unknown.append(name)
            continue
        fields_of[stem] = dict(zip(header, fields, strict=True))
        if runs.lower() not in EMPTY:
            found[stem].append(f"{path.name} row {line}: {runs}")
    if unknown:
        if len(fields_of) == 0:
            raise UserError(f"{path}: none of its ids is a picture, such as {unknown[0]}; expected names of pictures")
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        print(f"{path.name}: {len(unknown)} rows name no picture and are left out: {shown}")
    return {stem: ";".join(parts) or "-" for stem, parts in found.items()}, fields_of


def assign_folds(samples: pd.DataFrame, cfg: Config) -> np.ndarray:
    """Cut the samples of `survey` into cfg.folds parts by cfg.seed; what belongs together stays in one part.

    Stratified by category, or where there is none by the foreground's share of each picture: empty, little, more,
    much. Together stay a csv's --group, otherwise `BLOCK` consecutive frames. Returns int (n,), the fold
    of each sample. With few samples there are fewer folds, never less than two.
    """
    import pandas as pd
    from sklearn.model_selection import StratifiedGroupKFold

    sizes = samples.category.value_counts()
    length = max(1, min(BLOCK, sizes.min() // cfg.folds))
    names = [re.fullmatch(r"(.*?)(\d*)", Path(image).stem) for image in samples.image]
    blocks = [f"{name[1]}{int(name[2] or 0) // length}" for name in names]
    if cfg.group:
        header = next((list(group) for group in samples.group if group), [])
        if cfg.group not in header:
            raise UserError(f"--group {cfg.group}: no such column{closest(cfg.group, header)}")
        blocks = [
            group[cfg.group] if group else image for group, image in zip(samples.group, samples.image, strict=True)
        ]
    count = max(2, min(cfg.folds, len(set(blocks)), sizes.max()))
    strata = samples.category
    if not strata.any():
        strata = pd.Series(np.where(samples.share > 0, samples.share.rank(pct=True).mul(3).round(), -1))
    if strata.value_counts().max() < count:  # a handful of pictures
        strata = pd.Series(0, samples.index)
    fold = np.zeros(len(samples), int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "least populated class": few pictures of a category are fine
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=cfg.seed)
        for number, (_, part) in enumerate(splitter.split(samples, strata, blocks)):
            fold[part] = number
    return fold


# =====================================================================================================================
#  RUN LENGTHS: masks as text, "start length start length ...", down the columns, counted from 1
# =====================================================================================================================


def rle_encode(mask: np.ndarray) -> str:
    """(h, w) bool to run lengths; "" where it is empty. A 2x2 mask of ones is "1 4"."""
    flat = cv2.transpose(np.ascontiguousarray(mask, np.uint8)).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 2
    edges = np.r_[[1] * int(flat[0]), edges, [flat.size + 1] * int(flat[-1])].astype(np.int64)
    edges[1::2] -= edges[::2]
    return " ".join(map(str, edges.tolist()))


def rle_decode(runs: str, size: tuple[int, int], where: str = "run lengths") -> np.ndarray:
    """Run lengths to (h, w) uint8 of 0 and 1. Raises UserError, which names `where`, for runs that cannot be."""
    height, width = size
    try:
        numbers = np.array(runs.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: holds what is no whole number; expected start and length, in turn") from None
    if len(numbers) % 2:
        raise UserError(f"{where}: an odd count of numbers, {len(numbers)}; expected start and length, in turn")
    order = np.argsort(numbers[::2], kind="stable")
    starts, lengths = numbers[::2][order] - 1, numbers[1::2][order]
    if len(starts) and (starts[0] < 0 or lengths.min() < 1 or (lengths > height * width - starts).any()):
        raise UserError(f"{where}: a run leaves the picture of {width}x{height} (starts count from 1)")
    if (starts[:-1] + lengths[:-1] > starts[1:]).any():
        raise UserError(f"{where}: runs overlap")
    steps = np.zeros(height * width + 1, np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + lengths, -1)
    return np.ascontiguousarray(steps[:-1].cumsum(dtype=np.int8).view(np.uint8).reshape(width, height).T)


# =====================================================================================================================
#  IMAGES: from file to tensor, and from probabilities back to the picture's own size
# =====================================================================================================================

IGNORE = 255  # the value of a truth pixel that counts neither in the loss nor in a score
KEEP_BYTES = 4 << 30  # decoded training pictures stay in memory up to this size, 4 GiB


def read_image(path: str) -> np.ndarray:
    """Read a picture as (h, w, 3) uint8 RGB: grey, palette, alpha, 16-bit and turned (EXIF) ones too.

    Raises UserError where the file is damaged, empty, too large (over 179 million pixels) or no picture.
    """
    image = open_picture(path)
    if image.mode in ("I", "F", "I;16", "I;16B"):
        values = np.asarray(image)
        if values.dtype == np.float32 or values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: grey values outside 0 to 65535; save it with 8 or 16 bits a channel")
        return cv2.cvtColor((values // 257).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    return np.asarray(image.convert("RGB"))


def open_picture(path: str) -> Image.Image:
    """Decode a file wholly with Pillow, which refuses what is cut off or damaged, and turn it upright (EXIF).

    Raises UserError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but allowed pictures
            image = open_header(path)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # the readers raise anything on a damaged file
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else reason_of(error)
        reason = "empty file" if os.path.isfile(path) and os.path.getsize(path) == 0 else reason
        raise UserError(f"{path}: {reason}; replace the file or move it away") from None


def open_header(path: str) -> Image.Image:
    """Open a picture without decoding it. Raises OSError, or what Pillow raises."""
    check_file(path)
    return Image.open(path, formats=IMAGE_FORMATS)


def read_truth(path: str, layout: str, size: tuple[int, int]) -> np.ndarray:
    """Read a mask as (h, w) uint8: 1 road, 0 not road, 255 not valid. `size` is its picture's (h, w).

    KITTI codes by channel, as its devkit reads them: blue > 0 is road, red > 0 is valid. Other masks hold 0 and 1
    (with 255 beside them for not valid), or 0 and the type's largest value (JPEG's noise is cut at half). Raises
    UserError for anything else. Of a csv, `path` is what `read_runs` made of its rows.
    """
    if layout == "rle":
        truth = np.zeros(size, np.uint8)
        for part in path.split(";") if path != "-" else ():
            where, _, runs = part.partition(": ")
            truth |= rle_decode(runs, size, where)
        return truth
    image = open_picture(path)
    if image.size != size[::-1]:
        mask, picture = ("x".join(map(str, s)) for s in (image.size, size[::-1]))
        raise UserError(f"{path}: is {mask}, but its picture is {picture}; replace one of them")
    if layout == "kitti":
        if image.mode not in ("RGB", "RGBA", "P"):
            raise UserError(f"{path}: not a KITTI truth, which is in colour (blue: road, red: valid); replace it")
        red, _, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        return np.where(red > 0, (blue > 0).astype(np.uint8), np.uint8(IGNORE))
    values = np.asarray(image)
    if values.ndim == 3:
        grey = values[..., :1]
        if values.shape[2] > 2 and (values[..., :3] != grey).any():
            raise UserError(f"{path}: a coloured mask; expected one channel of 0 and 1, or 0 and 255")
        values = grey[..., 0]
    if {1, IGNORE} <= set(np.unique(values).tolist()) <= {0, 1, IGNORE}:
        return values.astype(np.uint8)
    full = {"bool": 1, "uint8": 255}.get(values.dtype.name, 65535)
    if 1 < values.max() <= full // 2:
        raise UserError(f"{path}: mask values up to {values.max()}; expected 0 and 1, or 0 and {full}")
    return (values > (full // 2 if values.max() > 1 else 0)).astype(np.uint8)


def preprocess(image: np.ndarray, cfg: Config) -> torch.Tensor:
    """The one way from pixels to the model: (h, w, 3) uint8 RGB to (3, height, width) uint8, for `normalise`."""
    return to_tensor(shrink(image, cfg))


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(h, w, 3) uint8 to (3, h, w) uint8."""
    import torch

    return torch.from_numpy(np.array(cv2.split(pixels)))


def normalise(images: torch.Tensor, cfg: Config) -> torch.Tensor:
    """(N, 3, h, w) of 0..255 to float32 in channels_last, less the mean, over the std; on the images' device."""
    import torch

    mean, std = (255 * torch.tensor(values, device=images.device)[:, None, None] for values in (cfg.mean, cfg.std))
    return (images.to(memory_format=torch.channels_last) - mean) / std


def shrink(image: np.ndarray, cfg: Config) -> np.ndarray:
    """Cut off the top and resize the rest to the model's size, (height, width, 3) uint8."""
    image = image[round(cfg.top * image.shape[0]) :]
    smaller = image.shape[0] > cfg.height and image.shape[1] > cfg.width
    way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR  # area: every pixel counts, thin lines stay
    return cv2.resize(image, (cfg.width, cfg.height), interpolation=way)


def shrink_truth(truth: np.ndarray, cfg: Config) -> np.ndarray:
    """Resize a truth to the model's size, (height, width) uint8, by the nearest pixel: never a mixture of labels."""
    truth = truth[round(cfg.top * truth.shape[0]) :]
    return cv2.resize(truth, (cfg.width, cfg.height), interpolation=cv2.INTER_NEAREST_EXACT)


def restore(probabilities: torch.Tensor, size: tuple[int, int], cfg: Config) -> torch.Tensor:
    """The one way back: (height, width) float32 probabilities to the picture's own (h, w), interpolated linearly.

    What was cut off above is 0.
    """
    import torch.nn.functional as F

    assert probabilities.shape == (cfg.height, cfg.width), (probabilities.shape, cfg.height, cfg.width)
    top = round(cfg.top * size[0])
    seen = F.interpolate(probabilities[None, None], (size[0] - top, size[1]), mode="bilinear")[0, 0]
    return F.pad(seen, (0, 0, top, 0))


def to_8bit(probability: torch.Tensor) -> torch.Tensor:
    """Probabilities 0..1 as the official benchmark takes them: uint8, 0..255, rounded."""
    return (probability * 255).round().byte()


def to_mask(probability: np.ndarray, threshold: float) -> np.ndarray:
    """The road at a threshold 0..1, bool (h, w), from 8-bit probabilities; k/255 takes in k, whatever rounding does."""
    return probability >= np.ceil(threshold * 255 - 1e-6)


def drop_small(mask: np.ndarray, min_pixels: int) -> np.ndarray:
    """A mask, bool (h, w), without its connected patches of fewer than `min_pixels` pixels."""
    if min_pixels < 2 or not mask.any():
        return mask
    _, patches, table, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    large = table[:, cv2.CC_STAT_AREA] >= min_pixels
    return mask & large[patches]


def read_sample(sample: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read the picture and the truth of one row of the samples. Raises UserError, also where their sizes differ."""
    image = read_image(sample.image)
    return image, read_truth(sample.mask, sample.layout, image.shape[:2])


def tile_places(size: Iterable[int], cfg: Config, overlap: float = 0.0) -> list[tuple[int, int]]:
    """The upper left corners (y, x) of the tiles of height x width that cover a picture of `size` (h, w)."""
    starts = []
    for whole, tile in zip(size, (cfg.height, cfg.width), strict=True):
        count = max(1, -int(-(whole - overlap * tile) // (tile * (1 - overlap))))
        starts.append(np.linspace(0, max(0, whole - tile), count).round().astype(int).tolist())
    return [(y, x) for y in starts[0] for x in starts[1]]


def cut(pixels: np.ndarray, place: tuple[int, int], cfg: Config, outside: int | None = None) -> np.ndarray:
    """The tile at `place`, (height, width, ...); beyond a small picture's edge its last pixels again, or `outside`."""
    tile = pixels[place[0] : place[0] + cfg.height, place[1] : place[1] + cfg.width]
    missing = (0, cfg.height - tile.shape[0], 0, cfg.width - tile.shape[1])
    way = cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT
    return cv2.copyMakeBorder(tile, *missing, way, value=outside) if any(missing) else tile


def survey(samples: pd.DataFrame) -> pd.DataFrame:
    """Look through headers and masks: the samples with `height`, `width`, `share` and `above` as columns.

    `share` is how much of the picture is foreground, `above` how much of its height lies above the foreground, 0..1;
    0 and 1 for an empty mask. A pair that cannot be read is 1x1 and empty here; `read_all` names it.
    """

    def look(sample: Any) -> tuple[int, int, float, float]:
        try:
            with open_header(sample.image) as image:
                turned = image.getexif().get(0x0112, 1) > 4  # EXIF: the camera was held upright
                height, width = image.size if turned else image.size[::-1]
            road = read_truth(sample.mask, sample.layout, (height, width)) == 1
        except Exception:  # the readers raise anything on a damaged file
            return 1, 1, 0.0, 1.0
        return height, width, float(road.mean()), float(road.any(1).argmax() / height) if road.any() else 1.0

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large but allowed pictures
        found = zip(*pool.map(look, samples.itertuples()), strict=True)
    return samples.assign(**dict(zip(("height", "width", "share", "above"), found, strict=True)))


def read_all(samples: pd.DataFrame, cfg: Config) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Decode every pair once and keep it at the size that training takes it; None where that is over `KEEP_BYTES`.

    Raises one UserError that lists every bad file.
    """
    tiled = cfg.tiles == "true"
    pixels = (samples.height * samples.width).sum() if tiled else len(samples) * cfg.height * cfg.width
    keep = 4 * pixels <= KEEP_BYTES

    def read(sample: Any) -> tuple[np.ndarray, np.ndarray] | UserError | None:
        try:
            image, truth = read_sample(sample)
            read_calibration(sample.calib)
        except UserError as error:
            return error
        pair = (image, truth) if tiled else (shrink(image, cfg), shrink_truth(truth, cfg))
        return pair if keep else None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pairs = list(pool.map(read, samples.itertuples()))
    bad = [str(pair) for pair in pairs if isinstance(pair, UserError)]
    if bad:
        raise UserError(f"--data {cfg.data}: {len(bad)} of {len(samples)} pairs cannot be used: " + " | ".join(bad))
    return pairs if keep else None


class RoadDataset:
    """The samples as the loader takes them: a dict with `image` (3, H, W) and `mask` (1, H, W), both uint8.

    The mask holds 0, 1 and 255 (not valid). Without `augment` (validation) the item also has `truth`, uint8 at the
    picture's own size. With tiles an item is a tile, in training one cut at random by `augment`; there are as many of a
    picture as cover it. `pairs` are the pixels of `read_all`; None reads the files, in training anew each time.
    """

    def __init__(self, samples: pd.DataFrame, pairs: list | None, cfg: Config, augment: Any = None) -> None:
        import torch

        self.rows, self.pairs, self.cfg, self.augment = list(samples.itertuples()), pairs, cfg, augment
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by the workers, too
        self.kept, self.room = {}, KEEP_BYTES // 8  # validation items, the same in each epoch; bytes for more of them
        self.tiled = cfg.tiles == "true"
        self.places = [(index, place) for index, row in enumerate(self.rows if self.tiled else ())
                       for place in tile_places((row.height, row.width), cfg)]  # fmt: skip

    def __len__(self) -> int:
        return len(self.places) if self.tiled else len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.kept.get(index) or self.item(index)
        if not self.augment and index not in self.kept:
            self.room -= item["truth"].nbytes + item["image"].nbytes + item["mask"].nbytes
            if self.room > 0:
                self.kept[index] = item
        return item

    def item(self, index: int) -> dict[str, Any]:
        """Read or take the pair, cut or shrink it, augment."""
        import torch

        chance = np.random.SeedSequence([self.cfg.seed, int(self.epoch), index])  # whichever worker draws it
        index, place = self.places[index] if self.tiled else (index, None)
        image, truth = self.pairs[index] if self.pairs else read_sample(self.rows[index])
        item = {} if self.augment else {"truth": truth}
        if self.tiled and not self.augment:
            image, truth = cut(image, place, self.cfg), cut(truth, place, self.cfg, IGNORE)
            item = {"truth": truth}
        elif not self.tiled and not self.pairs:
            image, truth = shrink(image, self.cfg), shrink_truth(truth, self.cfg)
        if self.augment:
            self.augment.set_random_seed(int(chance.generate_state(1)[0]))
            pair = self.augment(image=image, mask=truth)
            image, truth = pair["image"], pair["mask"]
        item["name"] = Path(self.rows[index].image).name
        return item | {"image": to_tensor(image), "mask": torch.from_numpy(truth[None].copy())}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack what has one size; the truths keep their own, in a list."""
    import torch

    return {key: torch.stack(values) if torch.is_tensor(values[0]) else values
            for key, values in ((key, [item[key] for item in items]) for key in items[0])}  # fmt: skip


# =====================================================================================================================
#  MODEL: build it, write it, read it
# =====================================================================================================================

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMAT = 1  # of model.pt


class Trained(NamedTuple):
    """A model from a model.pt, ready to predict."""

    model: torch.nn.Module
    cfg: Config
    threshold: float
    metrics: dict[str, Any]


def build_model(cfg: Config, weights: str = "none") -> torch.nn.Module:
    """Build the network: (N, 3, H, W) float32 to logits (N, 1, H, W).

    `weights`: "none" (inference always), "imagenet" (from the network or the Hub's cache) or a file for the encoder.
    Raises UserError for an unknown architecture or encoder, and where the weights cannot be had.
    """
    import segmentation_models_pytorch as smp

    archs = {a.__name__.lower(): a.__name__ for a in (getattr(smp, name) for name in smp.__all__ if name[0].isupper())}
    if cfg.arch.lower() not in archs:
        raise UserError(f"--arch {cfg.arch}: unknown{closest(cfg.arch, list(archs.values()))}")
    if cfg.encoder not in smp.encoders.encoders and not cfg.encoder.startswith(("tu-", "timm-")):
        raise UserError(f"--encoder {cfg.encoder}: unknown{closest(cfg.encoder, list(smp.encoders.encoders))}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # smp's remarks on tu- encoders
        try:
            model = smp.create_model(cfg.arch, encoder_name=cfg.encoder, encoder_weights=None, classes=1)
        except (RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(f"--arch {cfg.arch} --encoder {cfg.encoder}: do not fit together ({error})") from None
        if weights != "none":
            model.encoder.load_state_dict(encoder_weights(cfg, model.encoder, weights))
    return model


def closest(name: str, names: list[str]) -> str:
    """What a mistyped name may have meant, as the end of a message."""
    lower = {n.lower(): n for n in names}
    close = [lower[n] for n in difflib.get_close_matches(name.lower(), list(lower), 3, 0.4)]
    return f"; did you mean {' or '.join(close)}?" if close else f"; one of {', '.join(names)}"


def encoder_weights(cfg: Config, encoder: torch.nn.Module, weights: str) -> dict[str, torch.Tensor]:
    """The encoder's pretrained state dict, from the Hub or a file. Raises UserError, also where they do not fit."""
    import segmentation_models_pytorch as smp
    import torch

    remedy = "--encoder_weights FILE (.safetensors or .pth), or --encoder_weights none (from scratch, much weaker)"
    if weights == "imagenet":
        try:
            hide_hub_noise()
            return smp.encoders.get_encoder(cfg.encoder, weights="imagenet").state_dict()
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            ways = f"Three ways out: internet (or HF_HUB_CACHE set to a copy of the Hub's cache), {remedy}"
            raise UserError(f"ImageNet weights for {cfg.encoder} cannot be had ({reason_of(error)}). {ways}") from None
    if not Path(weights).is_file():
        raise UserError(f"--encoder_weights {weights}: no such file; imagenet, {remedy}")
    try:
        if weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            if zipfile.is_zipfile(weights):  # torch's older files are none
                check_archive(Path(weights))
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise anything on a damaged file
        raise UserError(f"--encoder_weights {weights}: cannot be read ({reason_of(error)}); replace it") from None
    own = encoder.state_dict()
    state = {key: value for key, value in state.items() if key in own} if isinstance(state, dict) else {}
    wrong = [k for k, v in own.items() if k not in state and not k.endswith("num_batches_tracked")]
    wrong += [k for k in state if getattr(state[k], "shape", None) != own[k].shape]
    if wrong:
        raise UserError(f"--encoder_weights {weights}: not the weights of {cfg.encoder} ({len(wrong)} of {len(own)} "
                        f"tensors do not fit, such as {wrong[0]}); name its own file")  # fmt: skip
    return {key: state.get(key, value) for key, value in own.items()}


def hide_hub_noise() -> None:
    """Where the Hub cannot be reached, look into its cache alone: no retries for half a minute, no lines of them."""
    import logging
    import socket
    from urllib.parse import urlsplit

    import huggingface_hub.constants as hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        address = urlsplit(hub.ENDPOINT)
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
        except OSError:
            hub.HF_HUB_OFFLINE = True


def reason_of(error: BaseException) -> str:
    """The first line of an exception's message, short."""
    return textwrap.shorten(str(error).strip().split("\n")[0], 120) or type(error).__name__


def input_normalisation(cfg: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and std that the encoder's ImageNet weights were trained with, 0..1; ImageNet's own for the others."""
    import segmentation_models_pytorch as smp

    if cfg.encoder_weights != "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    own = smp.encoders.get_preprocessing_params(cfg.encoder, "imagenet")
    return tuple(own["mean"]), tuple(own["std"])


def precision(cfg: Config, device: str, training: bool = False) -> str:
    """The precision to compute in on a device ("cpu", "cuda", "mps"), in Lightning's words; auto: quickest natively.

    Training does as it is told; where a CPU predicts with what a GPU was told to train in, it takes its own.
    """
    import torch

    if cfg.precision == "32" or (cfg.precision != "auto" and (training or device == "cuda")):
        return cfg.precision
    if device == "cuda":  # a T4 only imitates bf16
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # imitated, it took 16 times as long as float32
    return "bf16-mixed" if device == "cpu" and native else "32"


def best_device() -> str:
    """The accelerator that torch finds ("cuda", "mps"), else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def srun_as_torchrun() -> None:
    """Where SLURM's srun has started several processes, set the variables that torchrun would have set."""
    if int(os.environ.get("SLURM_NTASKS", 1)) == 1 or "RANK" in os.environ:
        return
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    if SLURMEnvironment.job_name() in ("bash", "interactive"):  # a shell of SLURM, in which srun may come later
        return
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError("SLURM: --ntasks alone does not say how many run on a host; give --ntasks-per-node")
    slurm = SLURMEnvironment()
    found = {"RANK": slurm.global_rank(), "WORLD_SIZE": slurm.world_size(), "LOCAL_RANK": slurm.local_rank(),
             "LOCAL_WORLD_SIZE": os.environ["SLURM_NTASKS_PER_NODE"], "MASTER_ADDR": slurm.main_address,
             "MASTER_PORT": slurm.main_port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in found.items()})


def reuse_memory() -> None:
    """On a CPU with glibc: keep freed memory, of all threads, for the next batch; else it gets fresh, zeroed pages.

    At 256x256 a pass took 45 ms a picture so beside 59, a training step at 64x352, batch 4, 250 ms beside 295.
    """
    if best_device() == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            libc.mallopt(option, value)


def save_model(path: Path, model: torch.nn.Module, cfg: Config, threshold: float, metrics: dict[str, Any]) -> None:
    """Write model.pt: built-in types and tensors only, all that inference needs."""
    import torch

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    content = {"format": FORMAT, "config": dataclasses.asdict(cfg), "state_dict": state,
               "threshold": float(threshold), "metrics": metrics}  # fmt: skip
    buffer = io.BytesIO()  # where the disk is full, torch's own writing ends in no clear error
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def check_archive(path: Path) -> None:
    """Raise ValueError for a zip that unpacks to more than its own size, or is damaged; torch looks at neither."""
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("unpacks to more than its size")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")


def read_checkpoint(path: Path, flag: str) -> dict[str, Any]:
    """Read a file of torch.save without running any code in it. Raises UserError, with the flag's name."""
    import torch

    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; train.py writes it")
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise anything on a damaged file
        raise UserError(f"{flag} {path}: damaged or not a model ({reason_of(error)}); train again") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: holds no model; train.py writes model.pt")
    return content


def load_model(path: Path, device: str) -> Trained:
    """Read a model.pt and rebuild its network. Raises UserError where it is missing, damaged or something else."""
    import torch

    content = read_checkpoint(path, "--model")
    if "pytorch-lightning_version" in content:
        raise UserError(f"--model {path}: is a Lightning checkpoint, for --resume; give the model.pt beside it")
    if content.get("format") != FORMAT:
        raise UserError(f"--model {path}: not a model.pt of format {FORMAT}; give one that train.py wrote")
    try:
        cfg = Config(**content["config"])
        for name, kind in typing.get_type_hints(Config).items():  # nothing that no flag would take
            value = getattr(cfg, name)
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            convert_flag(name, kind, text.lower() if kind is bool else text)
        model = build_model(cfg)
        model.load_state_dict(content["state_dict"])
        threshold, metrics = float(content["threshold"]), dict(content["metrics"])
        if not 0 <= threshold <= 1 or 0 in (cfg.height, cfg.width):
            raise ValueError("no threshold or no size")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(f"--model {path}: from another version of the kit ({reason_of(error)}); train again") from None
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Trained(model, cfg, threshold, metrics)


# =====================================================================================================================
#  METRICS: the KITTI Road measures (Fritsch, Kuehnl, Geiger, ITSC 2013)
# =====================================================================================================================


def pixel_counts(probability: np.ndarray | torch.Tensor, truth: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Count the valid pixels by truth and probability: int64 (2, 256), row 0 not road, row 1 road, on their device.

    `probability` is (h, w) uint8, `truth` (h, w) uint8 of 0, 1 and 255 (not valid, not counted). Counts of several
    pictures add up; every measure follows from the sum.
    """
    import torch

    cells = torch.as_tensor(truth, dtype=torch.int64) << 8 | torch.as_tensor(probability, dtype=torch.int64)
    return torch.bincount(cells.flatten(), minlength=512)[:512].reshape(2, 256)


def picture_counts(sample: Any, probability: np.ndarray, truth: np.ndarray) -> dict[str, torch.Tensor]:
    """The `pixel_counts` of one picture at its own size: {"image": ...}, with a calibration {"bev": ...} too."""
    counts = {"image": pixel_counts(probability, truth)}
    if sample.calib:
        cells = bev_cells(sample.calib, truth.shape)
        counts["bev"] = pixel_counts(to_bev(probability, cells), to_bev(truth, cells, IGNORE))
    return counts


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, where nothing to nothing is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """True positives, false positives, precision and recall at each of the 256 thresholds, float (256,) each."""
    fp, tp = counts[:, ::-1].cumsum(1)[:, ::-1].astype(float)
    return tp, fp, ratio(tp, tp + fp), ratio(tp, tp[:1])


def scores(counts: np.ndarray) -> dict[str, float]:
    """The measures of one category, in percent, from its summed `pixel_counts`.

    A pixel is road at threshold t/255 when its 8-bit probability is t or more, t = 0..255. MaxF is the largest F1
    over t; PRE, REC, FPR, FNR, IoU and F1 are taken there ("threshold", 0..1, the lowest t of equals); AP is the
    11-point Pascal VOC average precision; IoU50 is taken at 0.5. A ratio of nothing to nothing is 0; without a single
    road pixel MaxF is 0 and the threshold 0.5.
    """
    tp, fp, precision, recall = precision_recall(counts)
    fn = tp[0] - tp
    f1, iou, fpr = ratio(2 * tp, 2 * tp + fp + fn), ratio(tp, tp + fp + fn), ratio(fp, fp[:1])
    best = int(f1.argmax()) if f1.any() else 128
    ap = np.mean([precision[(recall >= level) & (tp > 0)].max(initial=0) for level in np.arange(0, 1.1, 0.1)])
    fnr = 1 - recall[best] if tp[0] else 0.0
    found = {"MaxF": f1[best], "AP": ap, "PRE": precision[best], "REC": recall[best], "FPR": fpr[best], "FNR": fnr,
             "IoU": iou[best], "F1": f1[best], "IoU50": iou[128]}  # fmt: skip
    return {name: round(100 * float(value), 4) for name, value in found.items()} | {"threshold": best / 255}


def scores_by_threshold(counts: list[np.ndarray], metric: str) -> np.ndarray:
    """What each of n pictures says of a metric at each of the 256 thresholds, (n, 256), from `pixel_counts` of each.

    "dice" and "iou" are the picture's own, 0..1; without foreground 1 where none is found in it, else 0. "maxf" is the
    pooled F1 and the picture's share in it, to first order: the mean over the pictures is F1, their spread its error.
    """
    fp, tp = np.stack(counts)[:, :, ::-1].cumsum(2)[:, :, ::-1].transpose(1, 0, 2).astype(float)
    union = fp + tp[:, :1]
    above, below = (tp, union) if metric == "iou" else (2 * tp, union + tp)
    if metric != "maxf":
        return np.where(below > 0, ratio(above, below), 1.0)
    pooled = ratio(above.sum(0), below.sum(0))
    return pooled + ratio(above - pooled * below, np.broadcast_to(below.mean(0), below.shape))


def choose_threshold(found: np.ndarray) -> float:
    """From `scores_by_threshold`: nearest to 0.5 of those that are not worse than the best by two standard errors.

    Few pictures, or many of one street, tell little: their best threshold is luck. With KITTI's 22 the best of them was
    0.51 to 0.82 in eight trainings; on other streets 0.42 to 0.50 was, and this rule gained 1.3 of IoU.
    """
    worse = found[:, [found.mean(0).argmax()]] - found
    error = worse.std(0, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    good = np.flatnonzero(worse.mean(0) <= 2 * error + 1e-12)
    return float(good[np.abs(good - 127.5).argmin()]) / 255


def mask_scores(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(Dice, IoU) of one picture's final mask in its valid pixels, 0..1; 1 where both are empty."""
    road = truth == 1
    both, either = int((mask & road).sum()), int(((mask & (truth != IGNORE)) | road).sum())
    return (2 * both / (both + either), both / either) if either else (1.0, 1.0)


class Scoreboard:
    """Adds up pixel counts by space ("image", "bev") and category, and pooled ("all")."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, torch.Tensor]] = {}
        self.images: dict[tuple[str, str], int] = {}

    def add(self, category: str, counts: dict[str, torch.Tensor]) -> None:
        """Add the counts of a picture to its category and to all."""
        for space, cells in counts.items():
            for name in ("all", category) if category else ("all",):
                self._add(space, name, cells, 1)

    def merge(self, other: Scoreboard) -> None:
        """Add what another process has counted."""
        for space, sums in other.counts.items():
            for name, cells in sums.items():
                self._add(space, name, cells, other.images[space, name])

    def _add(self, space: str, name: str, cells: torch.Tensor, images: int) -> None:
        sums = self.counts.setdefault(space, {})
        sums[name] = sums.get(name, 0) + cells
        self.images[space, name] = self.images.get((space, name), 0) + images

    def report(self) -> dict[str, dict[str, dict[str, float]]]:
        """{space: {category: measures}}, each with the number of its pictures."""
        return {space: {name: scores(cells.cpu().numpy()) | {"images": self.images.get((space, name), 0)}
                        for name, cells in sums.items()} for space, sums in self.counts.items()}  # fmt: skip


def metrics_json(report: dict[str, Any], masks: list[tuple[float, float]], threshold: float) -> str:
    """The text of metrics.json; `threshold` is the one that the masks were made with, `masks` their `mask_scores`."""
    mean = dict(zip(("Dice", "IoU"), (100 * np.mean(masks, axis=0)).round(4).tolist(), strict=True))
    return json.dumps({"threshold": threshold, "mean": mean} | report, indent=2) + "\n"


def score_line(report: dict[str, Any], masks: list[tuple[float, float]]) -> str:
    """The pooled scores in one line for people."""
    words = {"image": "", "bev": "from above: "}
    parts = [f"{words[space]}MaxF {s['MaxF']:.2f} %  AP {s['AP']:.2f} %  IoU {s['IoU']:.2f} %  ({s['images']} pictures)"
             for space, s in ((space, part["all"]) for space, part in report.items())]  # fmt: skip
    return "; ".join([*parts, f"mean Dice of the masks {100 * np.mean(masks, axis=0)[0]:.2f} %"])


def draw_pr_curve(board: Scoreboard, path: Path) -> None:
    """Precision over recall in the camera's view, a line a category, the point of MaxF marked, as PNG."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
    report, low = board.report()["image"], 0.9
    for name, cells in board.counts["image"].items():
        tp, _, precision, recall = precision_recall(cells.cpu().numpy())
        best = report[name]
        low = min(low, best["PRE"] / 100, best["REC"] / 100)
        [line] = axes.plot(recall[tp > 0], precision[tp > 0], linewidth=2.5 if name == "all" else 1.2,
                           label=f"{name}: MaxF {best['MaxF']:.1f} %, AP {best['AP']:.1f} %")  # fmt: skip
        axes.plot(best["REC"] / 100, best["PRE"] / 100, "o", color=line.get_color())
    floor = max(0.0, low - 0.1)
    axes.set(title="Precision and recall; o: where F1 is largest", xlabel="recall", ylabel="precision",
             xlim=(floor, 1.005), ylim=(floor, 1.005))  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# =====================================================================================================================
#  BIRD'S-EYE VIEW: the ground as the KITTI Road server scores it
# =====================================================================================================================

BEV_SIZE = (800, 400)  # rows from 46 m to 6 m ahead, columns from 10 m on the left to 10 m on the right
BEV_CELL = 0.05  # metres


@functools.lru_cache(maxsize=512)
def read_calibration(path: str) -> np.ndarray | None:
    """The projection of ground points (x, y, z, 1) in metres to the picture, float64 (3, 4); None for the path "".

    P2 R0_rect Tr_cam_to_road^-1 of a KITTI calibration file. Raises UserError where one is missing or damaged.
    """
    if not path:
        return None
    shapes = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_cam_to_road": (3, 4)}
    found = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            name, _, numbers = line.partition(":")
            if name in shapes:
                whole = np.eye(4)
                rows, columns = shapes[name]
                whole[:rows, :columns] = np.array(numbers.split(), float).reshape(shapes[name])
                found[name] = whole
        missing = [name for name in shapes if name not in found]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}")
        projection = (found["P2"] @ found["R0_rect"] @ np.linalg.inv(found["Tr_cam_to_road"]))[:3]
        if not np.isfinite(projection).all() or np.linalg.matrix_rank(projection) < 3:
            raise ValueError("projects nothing")
    except (OSError, ValueError, np.linalg.LinAlgError) as error:
        raise UserError(f"{path}: not a KITTI calibration ({reason_of(error)}); replace it or move it away") from None
    return projection


def check_calibrations(samples: pd.DataFrame) -> None:
    """Raise one UserError that lists every damaged calibration."""
    bad = []
    for path in samples.calib:
        try:
            read_calibration(path)
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(" | ".join(bad))


def bev_cells(calib: str, size: tuple[int, int]) -> np.ndarray:
    """Which pixel of a picture of `size` (h, w) each cell of the ground shows: its flat index, -1 outside.

    Returns int32 (800, 400); row 0 is 46 m ahead, column 0 is 10 m to the left. Fritsch, Kuehnl, Geiger, ITSC 2013.
    """
    return _bev_cells(read_calibration(calib).tobytes(), size)


@functools.lru_cache(maxsize=32)  # 1.3 MB each
def _bev_cells(projection: bytes, size: tuple[int, int]) -> np.ndarray:
    a = np.frombuffer(projection).reshape(3, 4)
    x = BEV_CELL * (np.arange(BEV_SIZE[1]) + 0.5) - 10
    z = 46 - BEV_CELL * (np.arange(BEV_SIZE[0]) + 0.5)[:, None]
    u, v, depth = (a[i, 0] * x + a[i, 2] * z + a[i, 3] for i in range(3))  # the ground: y = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        column, row = np.floor(u / depth) - 1, np.floor(v / depth) - 1  # KITTI counts pixels from 1
    inside = (depth > 0) & (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])
    return np.where(inside, row * size[1] + column, -1).astype(np.int32)


def to_bev(pixels: np.ndarray, cells: np.ndarray, outside: int = 0) -> np.ndarray:
    """Look at the ground from above: (h, w) or (h, w, 3) uint8 to (800, 400) or (800, 400, 3), never interpolated."""
    flat = pixels.reshape(-1, *pixels.shape[2:])
    outer = (cells < 0).reshape(*cells.shape, *[1] * (pixels.ndim - 2))
    return np.where(outer, np.uint8(outside), flat[cells])


# =====================================================================================================================
#  PICTURES: the road in green, the errors in colour
# =====================================================================================================================

GREEN, BLUE, RED = (46, 204, 64), (30, 100, 255), (255, 45, 45)  # RGB: hit, miss, false alarm
PANEL_WIDTH = 620  # pixels of one panel; two stand side by side


def encode_image(pixels: np.ndarray, suffix: str) -> bytes:
    """(h, w) or (h, w, 3) RGB uint8 as the bytes of a PNG or JPEG."""
    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else []  # a PNG's other settings took 3 times as long
    done, content = cv2.imencode(suffix, bgr, options)
    assert done, suffix
    return content.tobytes()


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write (h, w) or (h, w, 3) RGB uint8 as PNG or JPEG, by the suffix, whole or not at all."""
    write_file(path, encode_image(pixels, path.suffix))


def tint(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], strength: float = 0.5) -> np.ndarray:
    """Lay a colour over the pixels of a mask; (h, w, 3) uint8 in and out."""
    layer = cv2.addWeighted(picture, 1 - strength, np.full_like(picture, colour), strength, 0)
    return np.where(mask[..., None], layer, picture)


def comparison(
    picture: np.ndarray, truth: np.ndarray | None, mask: np.ndarray, title: str, category: str
) -> np.ndarray:
    """Picture beside prediction and, with a truth, truth beside errors: hit green, miss blue, false alarm red.

    `picture` (h, w, 3) uint8, `truth` (h, w) uint8 of 0, 1, 255 or None, `mask` (h, w) bool. Returns RGB uint8.
    """
    what = category.rpartition("_")[2] or "mask"  # road, lane
    columns = 2 if picture.shape[1] >= picture.shape[0] else 4  # upright pictures stand in a row
    width = 2 * PANEL_WIDTH // columns
    size = (width, max(1, round(width * picture.shape[0] / picture.shape[1])))
    labels = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT) > 0
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    road = tint(small, labels, GREEN)
    edge = cv2.findContours(labels.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[-2]
    road = cv2.drawContours(np.ascontiguousarray(road), edge, -1, GREEN, 2, cv2.LINE_AA)
    panels = [panel(small, title), panel(road, "prediction", [(what, GREEN)])]
    if truth is not None:
        truth = cv2.resize(truth, size, interpolation=cv2.INTER_NEAREST_EXACT)
        errors = cv2.cvtColor(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        for wrong, colour in (
            ((truth == 1) & labels, GREEN),
            ((truth == 1) & ~labels, BLUE),
            ((truth == 0) & labels, RED),
        ):
            errors = tint(errors, wrong, colour, 0.6)
        known = tint(tint(small, truth == 1, GREEN), truth == IGNORE, (0, 0, 0), 0.7)
        legend = [("hit", GREEN), ("miss", BLUE), ("false alarm", RED)]
        ignored = [("not valid", (0, 0, 0))] if (truth == IGNORE).any() else []
        panels += [panel(known, "truth", [(what, GREEN), *ignored]), panel(errors, "errors", legend)]
    gap = np.full((panels[0].shape[0], 6, 3), 255, np.uint8)
    spaced = [part for picture in panels for part in (picture, gap)]
    columns = min(columns, len(panels))
    return np.vstack([np.hstack(spaced[k : k + 2 * columns - 1]) for k in range(0, len(spaced), 2 * columns)])


def panel(picture: np.ndarray, title: str, legend: Iterable[tuple[str, tuple[int, int, int]]] = ()) -> np.ndarray:
    """A picture under a white bar with its title on the left and a legend of coloured squares on the right."""
    bar = np.full((30, picture.shape[1], 3), 255, np.uint8)
    style = (cv2.FONT_HERSHEY_DUPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA)
    cv2.putText(bar, title, (4, 20), *style)
    right = bar.shape[1]
    for name, colour in reversed(list(legend)):
        right -= cv2.getTextSize(name, *style[:2], 1)[0][0] + 34
        cv2.rectangle(bar, (right, 8), (right + 14, 22), colour, -1)
        cv2.putText(bar, name, (right + 20, 20), *style)
    return np.vstack([bar, picture])
