"""What makes a run: its settings, code and data; what differs, and what is kept of earlier ones."""

import ast
import hashlib
import itertools
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from model import read_checkpoint
from utils import UserError, first_five, reason_of

try:
    import fcntl
except ImportError:  # Windows: folders are not locked
    fcntl = None

MAY_DIFFER = {  # settings that do not identify a run
    "data", "masks", "rle", "out", "epochs", "max_minutes", "session_minutes", "precision",
    "devices", "workers", "resume", "tta", "check", "classes", "empty_score", "metric",
    "min_pixels",
}  # fmt: skip

# and the layout's file
WEIGHTS_FOLLOW_FROM = (
    "train", "losses", "data", "loaders", "images", "model", "encoders", "callbacks", "trial",
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
#  Identity
# --------------------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """What makes a run's weights."""

    settings: dict[str, Any]
    code: dict[str, str]  # {"train.py: loss": digest}
    samples: dict[str, list]  # {id: [digest of the mask, fold]}


def identify(settings: dict[str, Any], samples: pd.DataFrame) -> Identity:
    """The identity of a run on samples from `data.scan_dataset` with their folds."""
    mask = samples["mask"].iloc[0]
    layouts = [type(one).__module__ for one in (mask, *getattr(mask, "parts", ())) if one]
    layouts += ["labels"] if "masks" in layouts else []
    names = dict.fromkeys([*WEIGHTS_FOLLOW_FROM, *layouts])  # layouts: such as kitti
    code = code_digests(Path(__file__).with_name(f"{name}.py") for name in names)
    rows = samples.itertuples()
    return Identity(settings, code, {row.id: [row.digest, int(row.fold)] for row in rows})


def differences(now: Identity, earlier: Identity) -> tuple[list[str], list[str]]:
    """The names of the settings that differ, and what else differs, in words."""
    settings = [
        name
        for name, value in now.settings.items()
        if name not in MAY_DIFFER and earlier.settings[name] != value
    ]
    words, files = [], {}
    for key in now.code | earlier.code:
        if now.code.get(key) != earlier.code.get(key):
            file, name = key.split(": ")
            files.setdefault(file, []).append(name)
    words += [f"{file} differs: {first_five(names)}" for file, names in files.items()]
    added = [name for name in now.samples if name not in earlier.samples]
    gone = [name for name in earlier.samples if name not in now.samples]
    both = [name for name in now.samples if name in earlier.samples]
    other = [name for name in both if now.samples[name][0] != earlier.samples[name][0]]
    lists = {"images were added": added, "images are gone": gone, "masks differ": other}
    words += [f"{len(n)} {what}: {first_five(n)}" for what, n in lists.items() if n]
    if not words and now.samples != earlier.samples:
        words.append("the folds differ")
    return settings, words


def code_digests(files: Iterable[Path]) -> dict[str, str]:
    """{"train.py: loss": digest} for each definition at the top of Python files.

    Comments, docstrings and layout do not count; nor do imports, `main`, and `Config`, whose values
    are settings.
    """
    digests = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            name = getattr(node, "name", None) or (targets[0] and ast.unparse(targets[0]))
            if not name or name in ("main", "Config"):
                continue
            for part in ast.walk(node):
                if isinstance(part, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part):
                    part.body = part.body[1:]
            digests[f"{file.name}: {name}"] = hashlib.sha256(ast.unparse(node).encode()).hexdigest()
    return digests


# --------------------------------------------------------------------------------------------------
#  The folder of a run
# --------------------------------------------------------------------------------------------------

LOCKS: dict[int, int] = {}  # {inode of a folder: the file descriptor that holds its lock}


def lock_folder(folder: Path) -> None:
    """Keep a folder for this process until it ends. Raises UserError where another has it."""
    inode = folder.stat().st_ino
    if fcntl is None or inode in LOCKS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "wait for it, or choose another --out"
        raise UserError(f"--out {folder}: another training writes there now; {remedy}") from None
    LOCKS[inode] = descriptor


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free FOLDER-1, FOLDER-2, ... Raises UserError."""
    try:
        names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
        return folder.rename(next(path for path in names if not path.exists()))
    except (OSError, ValueError) as error:  # ValueError: "." has no name
        reason = f"holds an earlier run and cannot be renamed ({reason_of(error)})"
        raise UserError(f"--out {folder}: {reason}; choose another --out") from None


# --------------------------------------------------------------------------------------------------
#  Decide
# --------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """Where a run begins."""

    checkpoint: Path | None = None  # to resume from
    state: dict[str, Any] = {}  # of its TrainingCallback
    reasons: list[str] = []  # why an earlier run in the folder is not resumed


def decide(
    identity: Identity, wanted: str, out: Path, root: Path, defaults: dict[str, Any]
) -> Decision:
    """What `wanted` (--resume auto, none or a file) means for a run in `out`.

    Where code or data differ, auto starts over, in the notebook also where settings differ; a file
    resumes although they differ. A setting that the checkpoint lacks counts as its default.
    `root`: the folder of the command, above the folds. Raises UserError for other settings, and for
    files that are no last.ckpt.
    """
    written = ("last.ckpt", "metrics.json", "fold*/last.ckpt", "fold*/metrics.json")
    earlier_run = any(any(root.glob(name)) for name in written)
    if wanted == "none":
        return Decision(reasons=["--resume none"] if earlier_run else [])
    path = out / "last.ckpt" if wanted == "auto" else Path(wanted)
    if wanted == "auto" and not path.exists():
        folds = {f"fold{fold}" for _, fold in identity.samples.values()}
        other = earlier_run and holds_another_kind_of_run(root, out, folds)
        return Decision(reasons=["folds differ (--fold, --folds)"] if other else [])
    state = read_state(path)
    earlier = Identity(defaults | state["settings"], state["code"], state["samples"])
    settings, reasons = differences(identity, earlier)
    if settings and not (wanted == "auto" and os.environ.get("KIT_NOTEBOOK")):
        flags = ", ".join(f"--{name}" for name in settings)
        as_there = shlex.join(f"--{name}={earlier.settings[name]}" for name in settings)
        remedy = f"take {as_there}, choose another --out, or --resume none to start over"
        raise UserError(f"--resume {path}: a run with other {flags}; {remedy}")
    if settings:
        reasons.insert(0, f"settings differ: {', '.join(settings)}")
    if reasons and wanted == "auto":
        return Decision(reasons=reasons)
    if reasons:
        print(f"--resume {path}: resumes although {'; '.join(reasons)}", flush=True)
    elsewhere = root.resolve() not in path.resolve().parents
    return Decision(path, state, [f"--resume {path}"] if elsewhere and earlier_run else [])


def holds_another_kind_of_run(root: Path, out: Path, folds: set[str]) -> bool:
    """Whether a folder has models of a single fold next to, or instead of, those of all folds."""
    found = {path.parent.name for path in root.glob("fold*/model.pt")}
    if root == out:  # a single fold
        return bool(found)
    return (root / "model.pt").exists() or not found <= folds


def read_state(path: Path) -> dict[str, Any]:
    """The TrainingCallback's state in a last.ckpt. Raises UserError for any other file."""
    state = read_checkpoint(path, "--resume").get("callbacks", {}).get("TrainingCallback", {})
    if not {"settings", "code", "samples", "rows", "clock"} <= set(state):
        raise UserError(f"--resume {path}: not a last.ckpt of train.py; give another, or none")
    return state


def keep_earlier(root: Path, out: Path, title: str, reasons: list[str]) -> None:
    """Rename the folder of an earlier run, and say so in a loud line. Raises UserError."""
    kept = set_aside(root)
    print(
        f"{title}: {'; '.join(reasons)}. The earlier run is kept in {kept}; "
        f"--resume {kept / out.relative_to(root) / 'last.ckpt'} resumes it",
        flush=True,
    )
