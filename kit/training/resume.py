"""What makes a run: its settings, code and data; what differs, and what is kept of earlier ones."""

import ast
import hashlib
import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kit.errors import UserError, first_five, reason_of
from kit.network.model import read_checkpoint

try:
    import fcntl
except ImportError:  # Windows: folders are not locked
    fcntl = None

MAY_DIFFER = {  # settings that do not identify a run
    "data", "masks", "rle", "out", "epochs", "max_minutes", "session_minutes", "precision",
    "devices", "workers", "resume", "tta", "check", "classes", "empty_score", "metric",
    "min_pixels", "show", "compare", "config", "cache", "extra", "why", "logger",
}  # fmt: skip

# The weights follow from these definitions, and from all that they reach.
MODULE, CALLBACKS = "train.py: SegmentationModule", "kit/training/callbacks.py"
WEIGHTS_FOLLOW_FROM = (
    f"{MODULE}.__init__",
    f"{MODULE}.set_progress",
    f"{MODULE}.configure_optimizers",
    f"{MODULE}.training_step",
    f"{MODULE}.on_train_batch_end",
    "train.py: make_loaders",
    "train.py: make_trainer",
    "kit/training/resolve.py: class_weights",
    f"{CALLBACKS}: Clock",
    f"{CALLBACKS}: find_lr",
    f"{CALLBACKS}: TrainingCallback.on_train_batch_start",
    f"{CALLBACKS}: TrainingCallback.epoch_progress",
    f"{CALLBACKS}: BatchNormReestimation",
    "kit/network/model.py: build_network",
    "kit/network/encoders.py: normalisation",
    "kit/data/readers.py: find_value_range",
    "kit/data/readers.py: measure_statistics",
    "kit/data/samples.py: decode_pairs",
)

# --------------------------------------------------------------------------------------------------
#  Identity
# --------------------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """What makes a run's weights."""

    settings: dict[str, Any]
    code: dict[str, str]  # {"train.py: loss": digest}
    samples: dict[str, list]  # {id: [digest of the mask, fold]}


def identify(settings: dict[str, Any], samples: pd.DataFrame) -> Identity:
    """The identity of a run on samples from `samples.load`."""
    digests = {row.id: [row.digest, int(row.fold)] for row in samples.itertuples()}
    return Identity(settings, code_digests(Path(__file__).parents[2]), digests)


def differences(now: Identity, earlier: Identity) -> tuple[list[str], list[str]]:
    """The names of the settings that differ, and what else differs, for people."""
    settings = [
        name
        for name, value in now.settings.items()
        if name not in MAY_DIFFER and earlier.settings[name] != value
    ]
    files: dict[str, list[str]] = {}
    for key in now.code | earlier.code:
        if now.code.get(key) != earlier.code.get(key):
            file, name = key.split(": ")
            files.setdefault(file, []).append(name)
    texts = [f"{file} differs: {first_five(names)}" for file, names in files.items()]
    lists = {
        "images were added": [n for n in now.samples if n not in earlier.samples],
        "images are gone": [n for n in earlier.samples if n not in now.samples],
        "masks differ": [
            n for n, row in now.samples.items() if earlier.samples.get(n, row)[0] != row[0]
        ],
    }
    texts += [f"{len(names)} {what}: {first_five(names)}" for what, names in lists.items() if names]
    if not texts and now.samples != earlier.samples:
        texts.append("the folds differ")
    return settings, texts


# --------------------------------------------------------------------------------------------------
#  Code
# --------------------------------------------------------------------------------------------------


class CodeFile:
    """The definitions at the top of a Python file, and what its imports mean."""

    def __init__(self, root: Path, file: str) -> None:
        """`file`: below `root`, such as kit/data/images.py."""
        tree = remove_words(ast.parse((root / file).read_text(encoding="utf-8")))
        self.nodes: dict[str, ast.AST] = {}  # {"loss", "SegmentationModule.training_step": node}
        self.imports: dict[str, str] = {}  # {name: "kit/data/images.py", or "FILE: definition"}
        for node in tree.body:
            self.nodes |= dict.fromkeys(defined_names(node), node)
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                names = (f"{node.name}.{name}" for name in defined_names(method))
                self.nodes |= dict.fromkeys(names, method)
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                module = f"{node.module}.{alias.name}".replace(".", "/")
                place = f"{node.module.replace('.', '/')}.py: {alias.name}"
                is_file = (root / f"{module}.py").exists()
                self.imports[alias.asname or alias.name] = f"{module}.py" if is_file else place


def code_digests(root: Path) -> dict[str, str]:
    """{"train.py: loss": digest} of the definitions that weights follow from.

    Comments, docstrings, layout and messages do not count; nor does `Config`, whose values are
    settings. `root`: the folder of train.py.
    """
    files: dict[str, CodeFile] = {}
    digests: dict[str, str] = {}
    pending = [*WEIGHTS_FOLLOW_FROM]
    while pending:
        key = pending.pop()
        file, _, name = key.partition(": ")
        if file not in files and (root / file).is_file():
            files[file] = CodeFile(root, file)
        node = files[file].nodes.get(name) if file in files else None
        if node and key not in digests and name != "Config" and file != "kit/errors.py":
            digests[key] = hashlib.sha256(ast.unparse(node).encode()).hexdigest()
            pending += names_in(node, file, name, files[file].imports)
    return dict(sorted(digests.items()))


def names_in(node: ast.AST, file: str, name: str, imports: dict[str, str]) -> Iterator[str]:
    """What the definition `name` of a file names, each as "FILE: definition"."""
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield imports.get(child.id, f"{file}: {child.id}")
        elif isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name):
            owner = child.value.id
            method = f"{file}: {name.partition('.')[0]}.{child.attr}"
            yield method if owner == "self" else f"{imports.get(owner, '')}: {child.attr}"


def defined_names(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    names = (name for target in targets if target for name in ast.walk(target))
    return [name.id for name in names if isinstance(name, ast.Name)]


def remove_words(tree: ast.Module) -> ast.Module:
    """Take out what is said to people, in place: docstrings, annotations, errors, printed lines."""
    for node in ast.walk(tree):
        for field in ("returns", "annotation"):
            if getattr(node, field, None):
                needed = isinstance(node, ast.AnnAssign)  # by its syntax
                setattr(node, field, ast.Constant(None) if needed else None)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                kept = [s for s in without_reasons(statements) if not is_said(s)]
                setattr(node, field, kept or [ast.Pass()] * bool(statements))
    return tree


def without_reasons(statements: list[ast.AST]) -> list[ast.AST]:
    """A block without its end that makes the message of an error and raises it."""
    if not (statements and isinstance(statements[-1], ast.Raise)):
        return statements
    ways_out = (ast.Return, ast.Yield, ast.Break, ast.Continue)
    leaves = [any(isinstance(n, ways_out) for n in ast.walk(s)) for s in statements]
    return statements[: max((place + 1 for place, out in enumerate(leaves) if out), default=0)]


def is_said(statement: ast.AST) -> bool:
    """Whether a statement raises an error, prints a line, or is a docstring."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    printed = isinstance(value, ast.Call) and ast.unparse(value.func) == "print"
    return isinstance(statement, ast.Raise) or printed or isinstance(value, ast.Constant)


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
        raise UserError(
            f"--out {folder}",
            "another training writes there now",
            "wait for it, or choose another --out",
        ) from None
    LOCKS[inode] = descriptor


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free FOLDER-1, FOLDER-2, ... Raises UserError."""
    try:
        names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
        return folder.rename(next(path for path in names if not path.exists()))
    except (OSError, ValueError) as error:  # ValueError: "." has no name
        raise UserError(
            f"--out {folder}",
            f"holds an earlier run and cannot be renamed ({reason_of(error)})",
            "choose another --out",
        ) from None


# --------------------------------------------------------------------------------------------------
#  Decide
# --------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """Where a run begins."""

    checkpoint: Path | None = None  # to resume from
    state: dict[str, Any] = {}  # of its TrainingCallback
    reasons: list[str] = []  # why an earlier run in the folder is not resumed


def decide(
    identity: Identity, resume: str, out: Path, root: Path, defaults: dict[str, Any]
) -> Decision:
    """What `resume` (--resume auto, none or a file) means for a run in `out`.

    Where code or data differ, auto starts over, in the notebook also where settings differ; a file
    resumes although they differ. A setting that the checkpoint lacks counts as its default.
    `root`: the folder of the command, above the folds. Raises UserError for other settings, and for
    files that are no last.ckpt.
    """
    written = ("last.ckpt", "metrics.json", "fold*/last.ckpt", "fold*/metrics.json")
    earlier_run = any(any(root.glob(name)) for name in written)
    if resume == "none":
        return Decision(reasons=["--resume none"] if earlier_run else [])
    path = out / "last.ckpt" if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        folds = {f"fold{fold}" for _, fold in identity.samples.values()}
        other = earlier_run and holds_another_kind_of_run(root, out, folds)
        return Decision(reasons=["folds differ (--fold, --folds)"] if other else [])
    state = read_state(path)
    earlier = Identity(defaults | state["settings"], state["code"], state["samples"])
    settings, reasons = differences(identity, earlier)
    if settings and not (resume == "auto" and os.environ.get("KIT_NOTEBOOK")):
        same = shlex.join(f"--{name}={earlier.settings[name]}" for name in settings)
        raise UserError(
            f"--resume {path}",
            f"a run with other {', '.join(f'--{name}' for name in settings)}",
            f"take {same}, choose another --out, or --resume none to start over",
        )
    if settings:
        reasons.insert(0, f"settings differ: {', '.join(settings)}")
    if reasons and resume == "auto":
        return Decision(reasons=reasons)
    if reasons:
        print(f"--resume {path}: resumes although {'; '.join(reasons)}", flush=True)
    elsewhere = root.resolve() not in path.resolve().parents
    return Decision(path, state, [f"--resume {path}"] if elsewhere and earlier_run else [])


def holds_another_kind_of_run(root: Path, out: Path, folds: set[str]) -> bool:
    """Whether a folder has models of a single fold next to, or instead of, those of all folds."""
    trained = {path.parent.name for path in root.glob("fold*/model.pt")}
    if root == out:  # a single fold
        return bool(trained)
    return (root / "model.pt").exists() or not trained <= folds


def read_state(path: Path) -> dict[str, Any]:
    """The TrainingCallback's state in a last.ckpt. Raises UserError for any other file."""
    state = read_checkpoint(path, "--resume").get("callbacks", {}).get("TrainingCallback", {})
    if not {"settings", "code", "samples", "rows", "clock"} <= set(state):
        raise UserError(f"--resume {path}", "not a last.ckpt of train.py", "give another, or none")
    return state
