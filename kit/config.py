"""All that inference needs to know: the classes and the settings of a model."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from kit.cli import check_fields
from kit.errors import UserError, first_five

VERSION = "1.1.1"  # of the kit, see CHANGELOG.md; a model.pt has that which wrote it

# Settings of train.py that --config does not replay: where a run is written, and its machine
NOT_REPLAYED = (
    "out", "resume", "check", "compare", "config", "workers", "devices", "precision",
    "session_minutes", "why", "epochs_done", "logger",
)  # fmt: skip
# Settings of a model that the end of a training finds, next to the symmetries of TTA
TUNED = ("thresholds", "areas", "presence_levels", "presence_areas", "plans")
IGNORE = 255  # the value of a mask's pixels that count neither in the loss nor in a score


SYMMETRIES = ("h", "v", "180", "90", "270", "h90", "v90")  # the last four of a square alone


def symmetries_to_try(tta: bool, max_minutes: float, height: int, width: int) -> tuple[str, ...]:
    """What is tried in TTA after a training; nothing in one of under five minutes."""
    names = SYMMETRIES if height == width else SYMMETRIES[:3]
    return () if not tta or 0 < max_minutes < 5 else names


class Classes(NamedTuple):
    """What a model tells apart: planes, one for each class, or a label map of exclusive classes."""

    names: tuple[str, ...] = ("foreground",)
    values: tuple[str, ...] = ("1",)  # in mask files or a csv: "3", "#804080", "Fish"
    exclusive: bool = False  # a pixel has one class; else each may be there

    @property
    def several(self) -> bool:
        """Whether there is more than the foreground."""
        return len(self.names) > 1

    @property
    def planes(self) -> int:
        """How many planes have a threshold of their own; a label map has none."""
        return len(self.names) * (not self.exclusive)

    @property
    def kind(self) -> str:
        """How the classes go together, for people."""
        return "exclude each other" if self.exclusive else "may overlap"

    def describe(self) -> str:
        """The kind and the names, for a message."""
        return (
            f"classes that {self.kind} ({first_five(self.names)})" if self.several else "one class"
        )


@dataclass(frozen=True)
class ModelConfig:
    """All that inference needs to know about a network. Raises ValueError for impossible values."""

    arch: str = "Unet"  # an architecture of smp
    encoder: str = "resnet34"  # an encoder of smp
    decoder_channels: str = "1"  # a factor for smp's, or numbers of channels
    height: int = 256  # [1..16384] pixels of the input, or of a tile
    width: int = 256  # [1..16384] as height
    channels: int = 3  # [1..64] of an image
    bands: tuple[str, ...] = ()  # patterns of the files of an image's channels; (): it is one file
    neighbours: tuple[int, ...] = ()  # [1..64] steps to the slices that are channels, too
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # [-1..2] of each channel in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # [0.001..10] as mean
    scale: float = 1.0  # [0.01..1] of the images; masks are predicted at their own resolution
    top: float = 0.0  # [0..0.9] share of the image's height that is cut off at the top
    tiles: bool = False  # cut the image into tiles instead of resizing it
    # black and white where images have over 8 bits: of all channels, or of each
    value_range: tuple[float, ...] = ()
    soft: bool = False  # several masks of an image are annotators: a pixel has their mean
    show: tuple[int, ...] = ()  # [1..64] the channels seen as red, green, blue in pictures
    target: str = "road"  # what the mask means, for layouts with several targets
    rle: str = "columns"  # order of RLE in submission.csv: columns, rows (... from 0) or relative
    instances: bool = False  # the training csv has a row for each object of an image
    tta: bool = True  # average with the predictions of the image flipped and turned
    # of these: h, v (flips), 90, 180, 270 (turned left), h90, v90 (turned, then flipped)
    symmetries: tuple[Literal["h", "v", "90", "180", "270", "h90", "v90"], ...] = ("h",)
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"
    temperature: float = 3.0  # [0.01..100] logits are divided by it (Guo et al., ICML 2017)
    class_names: tuple[str, ...] = ("foreground",)  # of the channels
    class_values: tuple[str, ...] = ("1",)  # of these classes in mask files or in a csv
    presence: float = 0.0  # [0..1000] weight of a head that tells which classes an image has
    exclusive: bool = False  # a pixel has one class, the most probable; else each may be there
    # [0..1] a pixel is of a class from this probability on; one each, none of exclusive classes
    thresholds: tuple[float, ...] = (0.5,)
    areas: tuple[int, ...] = (0,)  # [0..1000000000] smaller components of a class are removed
    # an image has a class where so many pixels reach this probability; else its mask is empty
    presence_levels: tuple[float, ...] = ()  # [0..1] one each; (): masks are as the threshold says
    presence_areas: tuple[int, ...] = ()  # [0..1000000000] as presence_levels
    # of each class the steps that clean its masks, such as "fill, open 3", see `predict.STEPS`
    plans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except UserError as error:
            raise ValueError(str(error)) from None
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} numbers each")
        if len(self.value_range) not in (0, 2, 2 * self.channels):
            raise ValueError("value_range needs two numbers, two for each channel, or none")
        if not len(self.class_names) == len(self.class_values) > 0:
            raise ValueError("not as many class_values as class_names")
        each = self.classes.planes
        if (len(self.thresholds), len(self.areas)) != (each, each):
            raise ValueError(f"not {each} thresholds and minimum areas, one for each class")
        optional = (self.presence_levels, self.presence_areas, self.plans)
        if any(len(values) not in (0, each) for values in optional):
            raise ValueError(f"not {each} presence_levels, presence_areas or plans, or none")

    @property
    def classes(self) -> Classes:
        """What the model tells apart; the channels of its logits."""
        return Classes(self.class_names, self.class_values, self.exclusive)

    @property
    def slices(self) -> int:
        """How many slices of a volume are the channels of an image."""
        return 2 * len(self.neighbours) + 1

    @property
    def rgb(self) -> bool:
        """Whether the channels are red, green and blue, or three equal ones."""
        return self.channels == 3 and not (self.bands or self.neighbours)

    def describe(self) -> str:
        """The network in a line for people."""
        top = f" below the upper {100 * self.top:.0f} %" if self.top else ""
        size = f"{self.height}x{self.width}{' in tiles' if self.tiles else top}"
        decoder = "" if self.decoder_channels == "1" else f" ({self.decoder_channels})"
        mean, std = (" ".join(f"{n:.3g}" for n in values) for values in (self.mean, self.std))
        statistics = f"mean {mean}, deviation {std}"
        channels = "" if self.rgb else f" of {self.channels} channels"
        head = ", a head for presence" if self.presence else ""
        network = f"{self.arch}{decoder} {self.encoder}{head}"
        return f"model: {network}, input {size}{channels}, {statistics}"


def plane_settings(classes: Classes, threshold: float = 0.5, area: int = 0) -> dict[str, tuple]:
    """The same threshold and minimum area for each class, as fields of a `ModelConfig`."""
    return {"thresholds": (threshold,) * classes.planes, "areas": (area,) * classes.planes}
