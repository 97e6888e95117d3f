"""What train.py and infer.py share, in the order of the data's way:

    settings · samples · images · model · prediction · metrics · pictures

A new score or another reading of the masks goes in here; a new loss or augmentation goes into train.py.
torch, smp, pandas and scikit-learn are imported where they are used, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import os
import re
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterable
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
    target: Literal["road", "lane"] = "road"  # KITTI only: the whole road, or the car's own lane (um pictures)
    folds: int = 10  # parts the data is cut into, frames of one street together; one part validates (10: 10 %)
    fold: int = 0  # which part validates, from 0
    seed: int = 0  # of the folds, the first weights and the augmentations
    # model
    arch: str = "Unet"  # any smp architecture: Unet, UnetPlusPlus, FPN, DeepLabV3Plus, Segformer, ...
    encoder: str = "resnet34"  # any smp encoder; more accurate: resnet50, efficientnet-b3; quicker: resnet18
    encoder_weights: str = "imagenet"  # imagenet, none (from scratch), or a .safetensors or .pth file
    height: int = 0  # pixels that the model sees; 0: follows the pictures' shape and what the device can do
    width: int = 0  # as height; finer edges cost time in proportion to height x width
    mean: tuple[float, ...] = ()  # of red,green,blue in 0..1 to subtract; empty: what the encoder was trained with
    std: tuple[float, ...] = ()  # as mean, to divide by
    # training
    epochs: int = 0  # passes over the data; 0: as many as max_minutes allows, or 40 where no time is set
    max_minutes: float = 0  # of the whole training, resumed parts included; the schedule fits it; 0: no limit
    batch_size: int = 0  # pictures a step; halve it when the GPU's memory runs out; 0: 8, on a CPU 4 (more steps)
    lr: float | Literal["auto"] = 5e-4  # AdamW's highest learning rate; auto: Lightning's finder picks it
    weight_decay: float = 1e-2  # AdamW's; keeps the weights small
    dice: float = 1.0  # weight of the Dice loss beside BCE: counts the road as a whole, small or large
    augment: float = 1.0  # strength of the augmentation; 0: none
    ema: float = 0.98  # moving average of the weights over about 1 / (1 - ema) steps, which is what is kept; 0: none
    tta: bool = True  # predict the mirrored picture too and average: a little better, twice the time
    # machine
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"  # auto: the quickest that the device does well
    devices: int = 1  # GPUs (or CPU processes) to train on
    workers: int = -1  # processes that prepare the pictures; -1: one a core, 4 at most, beside a GPU; 0 on a CPU
    resume: str = "auto"  # auto: go on where --out has an unfinished run; none: start over; or a last.ckpt
    # fmt: on


LIMITS = {  # flag: smallest and largest value allowed
    "folds": (2, 1000), "fold": (0, 999), "seed": (0, 2**31), "height": (0, 16384), "width": (0, 16384),
    "epochs": (0, 10**6), "max_minutes": (0, 10**6), "batch_size": (0, 65536), "lr": (1e-9, 10),
    "weight_decay": (0, 10), "dice": (0, 1000), "augment": (0, 3), "ema": (0, 0.99999), "devices": (1, 1024),
    "workers": (-1, 256), "threshold": (0, 1), "mean": (-1, 2), "std": (1e-3, 10),
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
    wanted = []
    if name in LIMITS:
        count, (low, high) = 3 if typing.get_origin(kind) is tuple else 1, LIMITS[name]
        number = "three numbers with commas" if count == 3 else "a whole number" if kind is int else "a number"
        wanted = [f"{number} from {low} to {high}"]
        with contextlib.suppress(ValueError):  # no number: the same answer as a wrong one, below
            values = tuple(int(part) if kind is int else float(part) for part in text.split(","))
            if len(values) == count and all(low <= value <= high for value in values):
                return values if count == 3 else values[0]
    raise UserError(f"--{name} {text}: takes {' or '.join(wanted + words)}")


def writable_folder(out: str) -> Path:
    """Make the folder and try it. Raises UserError where it cannot be written."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / ".write_test", b"")
        (folder / ".write_test").unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from None
    return folder


def write_file(path: Path, content: bytes | str | Callable[[Path], Any]) -> None:
    """Write under a temporary name, then rename: a file under its final name is always whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# =====================================================================================================================
#  SAMPLES: which picture goes with which mask, and which of them validate
# =====================================================================================================================

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
KAGGLE_DATASET = "sakshaymahna/kittiroadsegmentation"
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


def find_samples(data: str, target: str = "road", training: bool = False) -> pd.DataFrame:
    """Pair pictures with masks.

    Returns a DataFrame of strings with a row a picture: `image` and `mask` (paths; the mask is "" where there is
    none), `layout` ("kitti" or "masks", how to read the mask) and `category` ("um_road", ...; "" outside KITTI).
    With `training`, every picture must have a mask. Raises UserError, which lists all the pictures that have none.
    """
    import pandas as pd

    root = find_data(data)
    if root.is_file():
        if training or root.suffix.lower() not in IMAGE_SUFFIXES:
            wanted = "a folder of pairs" if training else f"a folder or a picture ({', '.join(IMAGE_SUFFIXES)})"
            raise UserError(f"--data {data}: is a file; name {wanted}")
        return pd.DataFrame([{"image": str(root), "mask": "", "layout": "masks", "category": ""}])
    splits = [root / split for split in ("training", "testing") if (root / split / "image_2").is_dir()]
    if len(splits) == 2 and not training:
        raise UserError(f"--data {data}: holds training and testing; name {splits[0]} (scores) or {splits[1]}")
    root = splits[0] if splits else root
    layout = "kitti" if (root / "image_2").is_dir() else "masks"
    names = ("image_2", "gt_image_2") if layout == "kitti" else ("images", "masks")
    images = list_images(root / names[0]) or list_images(root)
    masks = list_images(root / names[1])
    if not images:
        raise UserError(f"--data {data}: no pictures in it; expected training/image_2 and training/gt_image_2 (KITTI), "
                        "images and masks, or pictures")  # fmt: skip
    if training and target == "lane" and layout != "kitti":
        raise UserError(f"--target lane: {data} is not in the KITTI layout, which alone has lanes; leave the flag out")
    rows = []
    for stem, image in images.items():
        kitti = re.fullmatch(r"([a-z]+)_(\d+)", stem) if layout == "kitti" else None
        if target == "lane" and kitti and kitti[1] != "um" and training:
            continue  # only um pictures have a truth for the car's own lane
        mask = masks.get(f"{kitti[1]}_{target}_{kitti[2]}" if kitti else stem, "")
        category = f"{kitti[1]}_{target}" if kitti else ""
        rows.append({"image": str(image), "mask": str(mask), "layout": layout, "category": category})
    samples = pd.DataFrame(rows, columns=["image", "mask", "layout", "category"])
    alone = [Path(image).name for image in samples.image[samples["mask"] == ""]]
    if training and (alone or len(samples) < 2):
        pairs = f"{len(samples) - len(alone)} pairs"
        if not alone:
            raise UserError(f"--data {data}: {pairs}; at least 2 are needed, one to train and one to validate on")
        raise UserError(f"--data {data}: {len(alone)} of {len(samples)} pictures have no mask in {root / names[1]} "
                        f"({pairs} are complete); add the masks or move away: {', '.join(alone)}")  # fmt: skip
    return samples


def assign_folds(samples: pd.DataFrame, folds: int, seed: int) -> np.ndarray:
    """Cut the samples into folds, stratified by category; `BLOCK` consecutive frames stay in one fold.

    Returns int array (n,), the fold of each sample. With few samples there are fewer folds, never less than two.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    sizes = samples.category.value_counts()
    length = max(1, min(BLOCK, sizes.min() // folds))
    names = [re.fullmatch(r"(.*?)(\d*)", Path(image).stem) for image in samples.image]
    blocks = [f"{name[1]}{int(name[2] or 0) // length}" for name in names]
    strata = samples.category if sizes.max() > 1 else [0] * len(samples)
    count = max(2, min(folds, len(set(blocks)), sizes.max()))
    fold = np.zeros(len(samples), int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "least populated class": few pictures of a category are fine
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        for number, (_, part) in enumerate(splitter.split(samples, strata, blocks)):
            fold[part] = number
    return fold


# =====================================================================================================================
#  IMAGES: from file to tensor, and from probabilities back to the picture's own size
# =====================================================================================================================

IGNORE = 255  # the value of a truth pixel that counts neither in the loss nor in a score
KEEP_BYTES = 4 << 30  # decoded training pictures stay in memory up to this size, 4 GiB


def read_image(path: str) -> np.ndarray:
    """Read a picture as (h, w, 3) uint8 RGB: grey, palette, alpha, 16-bit and turned (EXIF) ones too.

    Raises UserError where the file is damaged, empty, too large (over 179 million pixels) or no picture.
    """
    image = ImageOps.exif_transpose(open_picture(path))
    if image.mode in ("I", "F", "I;16", "I;16B"):
        values = np.asarray(image)
        if values.dtype == np.float32 or values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: grey values outside 0 to 65535; save it with 8 or 16 bits a channel")
        return cv2.cvtColor((values // 257).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    return np.asarray(image.convert("RGB"))


def open_picture(path: str) -> Image.Image:
    """Decode a file wholly with Pillow, which refuses what is cut off or damaged. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but allowed pictures
            image = Image.open(path)
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        reason = "empty file" if os.path.exists(path) and os.path.getsize(path) == 0 else reason
        raise UserError(f"{path}: {reason}; replace the file or move it away") from None


def read_truth(path: str, layout: str, size: tuple[int, int]) -> np.ndarray:
    """Read a mask as (h, w) uint8: 1 road, 0 not road, 255 not valid. `size` is its picture's (h, w).

    KITTI codes by channel, as its devkit reads them: blue > 0 is road, red > 0 is valid. Other masks hold 0 and 1
    (with 255 beside them for not valid), or 0 and the type's largest value (JPEG's noise is cut at half). Raises
    UserError for anything else.
    """
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
    """The one way from pixels to the model: (h, w, 3) uint8 RGB to (3, height, width) float32, normalised."""
    import torch

    pixels = shrink(image, cfg).astype(np.float32)
    pixels = (pixels - np.float32(255) * np.float32(cfg.mean)) / (np.float32(255) * np.float32(cfg.std))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def shrink(image: np.ndarray, cfg: Config) -> np.ndarray:
    """Resize a picture to the model's size, (height, width, 3) uint8; one of that size already stays as it is."""
    smaller = image.shape[0] > cfg.height and image.shape[1] > cfg.width
    same = image.shape[:2] == (cfg.height, cfg.width)
    way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR  # area: every pixel counts, thin lines stay
    return image if same else cv2.resize(image, (cfg.width, cfg.height), interpolation=way)


def shrink_truth(truth: np.ndarray, cfg: Config) -> np.ndarray:
    """Resize a truth to the model's size, (height, width) uint8, by the nearest pixel: never a mixture of labels."""
    return cv2.resize(truth, (cfg.width, cfg.height), interpolation=cv2.INTER_NEAREST_EXACT)


def restore(probabilities: np.ndarray, size: tuple[int, int], cfg: Config) -> np.ndarray:
    """The one way back: (height, width) float32 probabilities to the picture's own (h, w), interpolated linearly."""
    assert probabilities.shape == (cfg.height, cfg.width), (probabilities.shape, cfg.height, cfg.width)
    return cv2.resize(probabilities, size[::-1], interpolation=cv2.INTER_LINEAR)


def to_8bit(probability: np.ndarray) -> np.ndarray:
    """Probabilities 0..1 as the official benchmark takes them: uint8, 0..255, rounded."""
    return np.rint(probability * 255).astype(np.uint8)


def to_mask(probability: np.ndarray, threshold: float) -> np.ndarray:
    """The road at a threshold 0..1, bool (h, w), from 8-bit probabilities; k/255 takes in k, whatever rounding does."""
    return probability >= np.ceil(threshold * 255 - 1e-6)


def read_sample(sample: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read the picture and the truth of one row of the samples. Raises UserError, also where their sizes differ."""
    image = read_image(sample.image)
    return image, read_truth(sample.mask, sample.layout, image.shape[:2])


def median_size(samples: pd.DataFrame) -> tuple[float, float]:
    """The pictures' median (height, width), from their headers; files without one are for `read_all` to name."""
    sizes = []
    for path in samples.image:
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError), Image.open(path) as image:
            sizes.append((image.height, image.width))
    height, width = np.median(sizes or [(1, 1)], axis=0)
    return float(height), float(width)


def read_all(samples: pd.DataFrame, cfg: Config) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Decode every pair once and keep it at the model's size; None where that would take over `KEEP_BYTES`.

    Raises one UserError that lists every bad file.
    """
    keep = len(samples) * cfg.height * cfg.width * 4 <= KEEP_BYTES

    def read(sample: Any) -> tuple[np.ndarray, np.ndarray] | UserError | None:
        try:
            image, truth = read_sample(sample)
        except UserError as error:
            return error
        return (shrink(image, cfg), shrink_truth(truth, cfg)) if keep else None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pairs = list(pool.map(read, samples.itertuples()))
    bad = [str(pair) for pair in pairs if isinstance(pair, UserError)]
    if bad:
        raise UserError(f"--data {cfg.data}: {len(bad)} of {len(samples)} pairs cannot be used: " + " | ".join(bad))
    return pairs if keep else None


class RoadDataset:
    """The samples as the loader takes them: a dict with `image` (3, H, W) and `mask` (1, H, W), both float32.

    The mask holds 0, 1 and 255 (not valid). Without `augment` (validation) the item also has `truth`, (h, w) uint8
    at the picture's own size. `pairs` are the pixels of `read_all`; None reads the files anew each time.
    """

    def __init__(self, samples: pd.DataFrame, pairs: list | None, cfg: Config, augment: Any = None) -> None:
        self.rows, self.pairs, self.cfg, self.augment = list(samples.itertuples()), pairs, cfg, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        image, truth = self.pairs[index] if self.pairs else read_sample(self.rows[index])
        item = {} if self.augment else {"truth": truth}
        mask = shrink_truth(truth, self.cfg)
        if self.augment:
            pair = self.augment(image=shrink(image, self.cfg), mask=mask)
            image, mask = pair["image"], pair["mask"]
        mask = torch.from_numpy(mask[None].astype(np.float32))
        return item | {"image": preprocess(image, self.cfg), "mask": mask}


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


def precision(cfg: Config, device: str) -> str:
    """The precision to compute in on a device ("cpu", "cuda", "mps"), in Lightning's words; auto: quickest natively.

    What a GPU was told to train in, a CPU that only predicts may do better in another.
    """
    import torch

    if cfg.precision == "32" or (cfg.precision != "auto" and device == "cuda"):
        return cfg.precision
    if device == "cuda":  # a T4 only imitates bf16
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # imitated, it took 16 times as long as float32
    return "bf16-mixed" if device == "cpu" and native else "32"


def best_device() -> str:
    """The accelerator that torch finds ("cuda", "mps"), else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def save_model(path: Path, model: torch.nn.Module, cfg: Config, threshold: float, metrics: dict[str, Any]) -> None:
    """Write model.pt: built-in types and tensors only, all that inference needs."""
    import torch

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    content = {"format": FORMAT, "config": dataclasses.asdict(cfg), "state_dict": state,
               "threshold": float(threshold), "metrics": metrics}  # fmt: skip
    write_file(path, lambda part: torch.save(content, part))


def read_checkpoint(path: Path, flag: str) -> dict[str, Any]:
    """Read a file of torch.save without running any code in it. Raises UserError, with the flag's name."""
    import torch

    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; train.py writes it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises anything on a damaged file
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
        model = build_model(cfg)
        model.load_state_dict(content["state_dict"])
        threshold, metrics = float(content["threshold"]), dict(content["metrics"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--model {path}: made by another version of the kit ({reason_of(error)}); train again"
        ) from None
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Trained(model, cfg, threshold, metrics)


# =====================================================================================================================
#  METRICS: the KITTI Road measures (Fritsch, Kuehnl, Geiger, ITSC 2013)
# =====================================================================================================================


def pixel_counts(probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Count the valid pixels by truth and probability: int64 (2, 256), row 0 not road, row 1 road.

    `probability` is (h, w) uint8, `truth` (h, w) uint8 of 0, 1 and 255 (not valid, not counted). Counts of several
    pictures add up; every measure follows from the sum.
    """
    cells = np.bincount((truth.astype(np.uint16) << 8 | probability).ravel(), minlength=512)
    return cells[:512].reshape(2, 256)


def scores(counts: np.ndarray) -> dict[str, float]:
    """The measures of one category, in percent, from its summed `pixel_counts`.

    A pixel is road at threshold t/255 when its 8-bit probability is t or more, t = 0..255. MaxF is the largest F1
    over t; PRE, REC, FPR, FNR, IoU and F1 are taken there ("threshold", 0..1, the lowest t of equals); AP is the
    11-point Pascal VOC average precision; IoU50 is taken at 0.5. A ratio of nothing to nothing is 0; without a single
    road pixel MaxF is 0 and the threshold 0.5.
    """
    negative, positive = counts[:, ::-1].cumsum(1)[:, ::-1].astype(float)  # predicted as road at each threshold
    tp, fp, fn = positive, negative, positive[0] - positive

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.divide(a, b, out=np.zeros_like(a), where=b > 0)

    precision, recall = ratio(tp, tp + fp), ratio(tp, np.full_like(tp, positive[0]))
    f1, iou = ratio(2 * tp, 2 * tp + fp + fn), ratio(tp, tp + fp + fn)
    fpr = ratio(fp, np.full_like(fp, negative[0]))
    best = int(f1.argmax()) if f1.any() else 128
    ap = np.mean([precision[(recall >= level) & (tp > 0)].max(initial=0) for level in np.arange(0, 1.1, 0.1)])
    fnr = 1 - recall[best] if positive[0] else 0.0
    found = {"MaxF": f1[best], "AP": ap, "PRE": precision[best], "REC": recall[best], "FPR": fpr[best], "FNR": fnr,
             "IoU": iou[best], "F1": f1[best], "IoU50": iou[128]}  # fmt: skip
    return {name: round(100 * float(value), 4) for name, value in found.items()} | {"threshold": best / 255}


class Scoreboard:
    """Adds up pixel counts by category and pooled ("all")."""

    def __init__(self) -> None:
        self.counts: dict[str, np.ndarray] = {"all": np.zeros((2, 256), np.int64)}
        self.images: dict[str, int] = {"all": 0}

    def add(self, category: str, counts: np.ndarray) -> None:
        """Add the counts of a picture to its category and to all."""
        for name in ("all", category) if category else ("all",):
            self.counts[name] = self.counts.get(name, 0) + counts
            self.images[name] = self.images.get(name, 0) + 1

    def report(self) -> dict[str, dict[str, float]]:
        """{category: measures}, each with the number of its pictures."""
        return {name: scores(self.counts[name]) | {"images": self.images[name]} for name in self.counts}


def metrics_json(report: dict[str, dict[str, float]], threshold: float) -> str:
    """The text of metrics.json. `threshold` is the one that the masks were made with."""
    return json.dumps({"threshold": threshold, "image": report}, indent=2) + "\n"


def score_line(report: dict[str, dict[str, float]]) -> str:
    """The pooled scores in one line for people."""
    s = report["all"]
    return f"MaxF {s['MaxF']:.2f} %  AP {s['AP']:.2f} %  IoU {s['IoU']:.2f} %  ({s['images']} pictures)"


# =====================================================================================================================
#  PICTURES: the road in green, the errors in colour
# =====================================================================================================================

GREEN, BLUE, RED = (46, 204, 64), (30, 100, 255), (255, 45, 45)  # RGB: hit, miss, false alarm
PANEL_WIDTH = 620  # pixels of one panel; a comparison has two side by side


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write (h, w) or (h, w, 3) RGB uint8 as PNG or JPEG, by the suffix, whole or not at all."""
    bgr = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    jpeg = path.suffix == ".jpg"
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if jpeg else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    done, content = cv2.imencode(path.suffix, bgr, options)
    assert done, path
    write_file(path, content.tobytes())


def tint(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], strength: float = 0.5) -> np.ndarray:
    """Lay a colour over the pixels of a mask; (h, w, 3) uint8 in and out."""
    layer = cv2.addWeighted(picture, 1 - strength, np.full_like(picture, colour), strength, 0)
    return np.where(mask[..., None], layer, picture)


def comparison(picture: np.ndarray, truth: np.ndarray | None, mask: np.ndarray, title: str) -> np.ndarray:
    """Picture beside prediction and, with a truth, truth beside errors: hit green, miss blue, false alarm red.

    `picture` (h, w, 3) uint8, `truth` (h, w) uint8 of 0, 1, 255 or None, `mask` (h, w) bool. Returns RGB uint8.
    """
    size = (PANEL_WIDTH, max(1, round(PANEL_WIDTH * picture.shape[0] / picture.shape[1])))
    labels = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT) > 0
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    road = tint(small, labels, GREEN)
    edge = cv2.findContours(labels.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[-2]
    road = cv2.drawContours(np.ascontiguousarray(road), edge, -1, GREEN, 2, cv2.LINE_AA)
    panels = [panel(small, title), panel(road, "prediction", [("road", GREEN)])]
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
        panels += [panel(known, "truth", [("road", GREEN), *ignored]), panel(errors, "errors", legend)]
    rows = [np.hstack([left, np.full((left.shape[0], 6, 3), 255, np.uint8), right])
            for left, right in zip(panels[::2], panels[1::2], strict=True)]  # fmt: skip
    return np.vstack(rows)


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
