"""Decoded pairs in a file on disk, for those that do not fit into memory.

To do without: delete this file, the flag --cache, and the lines that name what they import from it.
"""

import atexit
import contextlib
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kit.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: what a killed run left stays
    fcntl = None

TEMPORARY = Path("/kaggle/temp")  # on Kaggle: large, and not kept
PREFIX, SUFFIX = "segmentation-", ".pairs"  # of a file's name
ALIGNED = 64  # bytes: OpenCV reads pixels of 16 bits at even places alone
FILES: list["PairFile"] = []  # of this process
Pair = tuple[np.ndarray, np.ndarray]  # an image (h, w, C) and its mask


@dataclass(frozen=True)
class StoredPair:
    """A pair in a file; to be unpacked into its image and its mask."""

    path: str
    start: int  # byte of the file
    image: tuple[int, ...]  # shape
    mask: tuple[int, ...]  # shape, uint8
    kind: str  # dtype of the image

    def __iter__(self) -> Iterator[np.ndarray]:
        """Mapped: of a tile its own pixels alone are read. What is written there stays here."""
        size = math.prod(self.image) * np.dtype(self.kind).itemsize
        content = np.memmap(self.path, np.uint8, "c", self.start, size + math.prod(self.mask))
        content = np.asarray(content)
        yield content[:size].view(self.kind).reshape(self.image)
        yield content[size:].reshape(self.mask)


class PairFile:
    """A file of pairs, one after another, that this process writes and locks."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self.writing = threading.Lock()
        while True:
            descriptor, self.path = tempfile.mkstemp(SUFFIX, PREFIX, folder)
            self.file = os.fdopen(descriptor, "wb")
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(self.path):  # not taken for what a killed run left
                break
        FILES.append(self)

    def keep(self, pair: Pair) -> StoredPair:
        """Write a pair; returns what it is read by. Raises UserError."""
        image, mask = map(np.ascontiguousarray, pair)
        try:
            with self.writing:
                start = -(-self.file.tell() // ALIGNED) * ALIGNED
                self.file.seek(start)
                self.file.write(image)
                self.file.write(mask)
                self.file.flush()
        except OSError as error:
            raise cannot_write(Path(self.path).parent, error) from None
        return StoredPair(self.path, start, image.shape, mask.shape, image.dtype.name)


@atexit.register
def remove_files() -> None:
    """Remove the files of this process; the end of a training calls it, and a Ctrl-C."""
    while FILES:
        file = FILES.pop()
        Path(file.path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a full disk
            file.file.close()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left in a folder: files that nobody locks. Raises OSError."""
    for path in folder.glob(f"{PREFIX}*{SUFFIX}") if fcntl else ():
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)


def choose_store(where: str, size: float, fits: bool) -> Callable[[Pair], StoredPair] | None:
    """What writes a decoded pair to disk; None for nothing.

    `size`: bytes of all pairs; `fits`: into memory; `where`: --cache, a folder, "none", or "auto":
    if they do not fit Kaggle's temporary folder, where it has room. Raises UserError for another
    folder that has too little or cannot be written.
    """
    auto = where == "auto"
    if where == "none" or (auto and (fits or not TEMPORARY.parent.is_dir())):
        return None
    folder = TEMPORARY if auto else Path(where)
    try:
        file = open_file(folder, size)
    except UserError as error:
        if not auto:
            raise
        print(f"cache: none, {error.where} {error.problem}", flush=True)
        return None
    print(f"cache: {size / 1e9:.1f} GB in {folder}", flush=True)
    return file.keep


def open_file(folder: Path, size: float) -> PairFile:
    """A file for pairs of so many bytes in all. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        free = shutil.disk_usage(folder).free
        if free > 1.1 * size:
            return PairFile(folder)
    except OSError as error:
        raise cannot_write(folder, error) from None
    problem = f"has {free / 1e9:.1f} GB free, the decoded images take {size / 1e9:.1f} GB"
    raise UserError(f"--cache {folder}", problem, "name another folder, or none")


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The message for a folder that is read-only or full."""
    problem = f"cannot be written ({error.strerror})"
    return UserError(f"--cache {folder}", problem, "name another folder, or none")
