"""The house of the code: its imports, its lengths, what a fork changes or takes out."""

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KIT, TINY, run, succeed
from PIL import Image

import kit
from kit.network import model

HOUSE = {  # each wing with its files, from top to bottom: a file imports only files after it
    "scripts": "train.py infer.py utils.py",
    "extra": "report.py viewer.py runs.py blends.py export.py polygons.py",
    "training": "callbacks.py resume.py resolve.py trial.py loaders.py losses.py loggers.py",
    "results": "oof.py tuning.py metric_file.py metrics.py submissions.py mosaics.py visualize.py "
    "pace.py predict.py",
    "network": "model.py encoders.py runtimes.py",
    "data": "extras.py samples.py volumes.py blocks.py cache.py folds.py kitti.py bands.py "
    "annotations.py csvs.py folders.py names.py rle.py values.py masks.py classes.py images.py "
    "readers.py slides.py tiffs.py arrays.py photos.py rasters.py",
    "ground": "config.py cli.py kaggle.py files.py errors.py",
}
STRANGERS = [  # wings that do not know each other
    {"training", "results"},
    {"network", "data"},
]
SCRIPTS = ("train.py", "infer.py")
# not on Kaggle
TOOLS = (
    "kernel demo bench reports models field peers rivals rivals_ultralytics rivals_nnunet moves "
    "rehearse hidden"
)
AT_HOME = [f"tools/{name}.py" for name in TOOLS.split()]


def place(wing, file):
    """The path of a file of a wing."""
    return {"scripts": file, "ground": f"kit/{file}"}.get(wing, f"kit/{wing}/{file}")


WING = {place(wing, file): wing for wing, files in HOUSE.items() for file in files.split()}


def parse(file):
    return ast.parse((KIT / file).read_text())


def imported(file):
    """The modules that a file imports, anywhere in it; `from a import b` is a and a.b."""
    modules = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def kit_files(file):
    """The kit's own files that a file imports."""
    paths = {f"{module.replace('.', '/')}.py" for module in imported(file)}
    return {path for path in paths if (KIT / path).exists()}


# --------------------------------------------------------------------------------------------------
#  Imports
# --------------------------------------------------------------------------------------------------


def test_the_house_is_as_drawn():
    files = {path.relative_to(KIT).as_posix() for path in (KIT / "kit").rglob("*.py")}
    assert files | {"train.py", "infer.py", "utils.py"} == set(WING)
    assert {path.name for path in KIT.glob("*.py")} == {*SCRIPTS, "utils.py", "notebook.py"}


def test_no_file_is_left_that_nothing_needs():
    needed, todo = set(), ["train.py", "infer.py", "utils.py", "kit/kaggle.py"]
    while todo:
        file = todo.pop()
        if file not in needed:
            needed.add(file)
            todo += kit_files(file)
    assert needed == set(WING)


@pytest.mark.parametrize("file", WING)
def test_imports_run_downwards_only(file):
    order = list(WING)
    for other in kit_files(file):
        assert order.index(other) > order.index(file), other
        assert {WING[file], WING[other]} not in STRANGERS, other


def test_a_fork_finds_the_kit_and_not_a_package_of_the_same_name():
    assert {Path(folder) for folder in kit.__path__} == {KIT / "kit"}


def test_only_training_imports_lightning():
    for file in WING:
        lightning = {m.split(".")[0] for m in imported(file)} & {"pytorch_lightning", "lightning"}
        assert not lightning or WING[file] == "training" or file == "train.py", file


def test_the_ground_imports_the_standard_library_alone():
    for file in (file for file in WING if WING[file] == "ground"):
        roots = {module.split(".")[0] for module in imported(file)}
        assert roots <= set(sys.stdlib_module_names) | {"kit"}, file


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [("--help",), ("--no_such_flag", "1")], ids=" ".join)
def test_help_and_a_mistyped_flag_do_not_wait_for_torch(script, flags):
    command = [sys.executable, "-X", "importtime", str(KIT / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "kit.cli" in loaded
    heavy = {"torch", "numpy", "pandas", "cv2", "PIL", "matplotlib", "sklearn", "pytorch_lightning"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    if flags == ("--help",):
        assert done.returncode == 0
        assert "--batch_size X" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: unknown flag --no_such_flag")


# --------------------------------------------------------------------------------------------------
#  Lengths
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*WING, *AT_HOME])
def test_files_and_functions_are_short(file):
    lines = (KIT / file).read_text().splitlines()
    assert len(lines) <= {"train.py": 500}.get(file, 600)
    for node in ast.walk(parse(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 45, node.name


@pytest.mark.parametrize("file", [*WING, *AT_HOME, "notebook.py"])
def test_no_line_is_over_100_characters(file):
    lines = (KIT / file).read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


# --------------------------------------------------------------------------------------------------
#  Private parts of libraries
# --------------------------------------------------------------------------------------------------

PRIVATE = {"_BatchNorm", "_step_supports_amp_scaling", "_is_avx512_bf16_supported"}
NAMED_TUPLE = {"_replace", "_asdict", "_fields"}


def test_private_parts_of_libraries_are_known():
    """Each has a comment in the code that says why, and a test below that fails when it goes."""
    used = set()
    for file in WING:
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # of getattr
                used.add(node.value)
    private = {name for name in used if re.fullmatch(r"_[A-Za-z]\w*", name)}
    assert private - NAMED_TUPLE == PRIVATE


def test_a_fused_optimizer_says_that_it_scales_gradients():
    """So that Lightning refuses to clip them; train.py takes it back."""
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert torch.optim.AdamW(weights, fused=True)._step_supports_amp_scaling is True
    assert not getattr(torch.optim.AdamW(weights), "_step_supports_amp_scaling", False)


def test_torch_says_whether_the_cpu_computes_bf16():
    assert torch.cpu._is_avx512_bf16_supported() in (True, False)


def test_batch_norm_has_one_base_class():
    base = torch.nn.modules.batchnorm._BatchNorm
    for norm in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d):
        assert issubclass(norm, base)
    assert not issubclass(torch.nn.GroupNorm, base)


# --------------------------------------------------------------------------------------------------
#  Forks: what a person changes or takes out
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """6 small pairs in the images and masks layout."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    mask = np.zeros((48, 64), np.uint8)
    mask[24:, 16:48] = 255
    for number in range(6):
        image = rng.integers(0, 255, (48, 64, 3), np.uint8)
        for folder, pixels in (("images", image), ("masks", mask)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"p{number}.png")
    return root


def copy_kit(folder, without=()):
    """The files that travel, in a folder of their own."""
    for file in set(WING) - set(without):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(KIT / file, folder / file)
    return folder


def changed_lines(fork):
    """{file: the lines that a fork adds or changes}."""
    changed = {}
    for path in sorted(fork.rglob("*.py")):
        file = path.relative_to(fork).as_posix()
        ours = (KIT / file).read_text().splitlines()
        difference = list(difflib.ndiff(ours, path.read_text().splitlines()))
        added = [line[2:] for line in difference if line.startswith("+ ")]
        if added or any(line.startswith("- ") for line in difference):
            changed[file] = added
    return changed


def weights_of(out):
    return torch.load(out / "model.pt", weights_only=True)["state_dict"]


ROOMS = {  # that can be deleted, with the lines that name them: those of an entry, and imports
    "kitti": {
        "kit/data/samples.py": r"    kitti\.\w+,\n",
        "infer.py": r'    "kitti": kitti\.\w+,\n',
    },
    "volumes": {
        "kit/data/samples.py": r"    samples = volumes\.\w+\(.*\n",
        "infer.py": r"        volumes\.\w+\(.*\n",
    },
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_can_be_deleted(pairs, tmp_path, room):
    """The file, its imports and its entries."""
    kit = copy_kit(tmp_path / "fork", without=[f"kit/data/{room}.py"])
    for file, entry in ROOMS[room].items():
        code, count = re.subn(entry, "", (kit / file).read_text())
        assert count == 1
        code = re.sub(rf"^from kit.data import {room}\n", "", code, flags=re.MULTILINE)
        imported = rf"^(from kit.data import .*?)({room}, |, {room}$)"
        code = re.sub(imported, r"\1", code, flags=re.MULTILINE)
        (kit / file).write_text(code)
        names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
        assert room not in names
    changed = changed_lines(kit)
    assert {name: len(lines) for name, lines in changed.items()} == {
        "kit/data/samples.py": 1,
        "infer.py": 1,
    }
    out, predictions = tmp_path / "out", tmp_path / "predictions"
    flags = ("--data", pairs, "--out", out, *TINY, "--epochs", 1)
    succeed("train.py", *flags, kit=kit)  # a process that cannot find our room
    flags = ("--data", pairs, "--out", predictions, "--submission", "rle")
    succeed("infer.py", "--model", out, *flags, kit=kit)
    assert len(list((predictions / "masks").glob("*.png"))) == 6
    assert (predictions / "metrics.json").exists()
    assert len((predictions / "submission.csv").read_text().splitlines()) == 7


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """The kit with one more setting, used in the loss."""
    kit = copy_kit(tmp_path_factory.mktemp("fork") / "kit")
    file = kit / "train.py"
    code = file.read_text()
    for place, addition in (
        (r"    loss: str = .*\n", "{}    pos_weight: float = 1.0\n"),
        (
            r"binary_cross_entropy_with_logits\(.*(?=\))",
            "{}, pos_weight=torch.tensor(config.pos_weight)",
        ),
    ):
        (found,) = re.findall(place, code)
        code = code.replace(found, addition.format(found))
    file.write_text(code)
    return kit


@pytest.fixture(scope="module")
def original(pairs, tmp_path_factory):
    """The --out of a run of the original kit, one epoch."""
    out = tmp_path_factory.mktemp("original") / "out"
    succeed("train.py", "--data", pairs, "--out", out, *TINY, "--epochs", 1)
    return out


def test_a_setting_is_one_line_and_its_use(fork):
    changed = changed_lines(fork)
    assert list(changed) == ["train.py"]
    assert len(changed["train.py"]) == 2
    assert "--pos_weight X [1.0]" in " ".join(succeed("train.py", "--help", kit=fork).split())


def test_a_fork_trains_with_its_setting_and_its_model_loads(fork, original, pairs, tmp_path):
    flags = ("--data", pairs, "--out", tmp_path / "out", *TINY, "--epochs", 1)
    succeed("train.py", *flags, "--pos_weight", 2, kit=fork)
    ours, theirs = weights_of(original), weights_of(tmp_path / "out")
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours), "the loss is the same"
    trained = model.load_model(tmp_path / "out" / "model.pt", "cpu")  # the original kit's reader
    assert trained.settings["pos_weight"] == 2.0
    flags = ("--data", pairs / "images", "--out", tmp_path / "predictions")
    succeed("infer.py", "--model", tmp_path / "out", *flags, kit=fork)
    assert len(list((tmp_path / "predictions" / "masks").iterdir())) == 6


def test_a_fork_resumes_a_run_that_lacks_its_setting(fork, original, pairs, tmp_path):
    flags = ("--data", pairs, *TINY, "--epochs", 2, "--resume", original / "last.ckpt")
    printed = succeed("train.py", *flags, "--out", tmp_path / "out", kit=fork)
    assert "resume: from" in printed
    rows = pd.read_csv(tmp_path / "out" / "metrics.csv")
    earlier = pd.read_csv(original / "metrics.csv")
    assert rows.epoch.tolist() == [1, 2]
    assert rows.train_loss[0] == earlier.train_loss[0]
    other = ("--out", tmp_path / "other", "--pos_weight", 2)
    done = run("train.py", *flags, *other, kit=fork)
    assert done.returncode == 2
    assert "--pos_weight" in done.stderr.strip().splitlines()[-1]
    assert not os.path.exists(tmp_path / "other" / "model.pt")
