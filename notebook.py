"""The cells of the Kaggle notebook, in jupytext's percent format; `kernel.py` builds it from them.

A cell's title is its id. A cell whose title is a file of the kit gets that file as its content.
"""

# ruff: noqa: E402
raise ImportError("these are the cells of a notebook: python kernel.py build")

# %% introduction [markdown]
# # Image segmentation kit
#
# From images with masks to a trained model, masks and a submission.
# **Fork it, change the settings in the first cell, run all.**
# Another loss or augmentation: change its function in the cell of `train.py`.
#
# ![Image, prediction, ground truth and errors](attachment:demo.jpg)

# %% title-settings [markdown]
# ## Settings
# What is not named here keeps its default in `Config`, in the cell of `train.py`. A line that you
# add there, such as `pos_weight: float = 1.0`, can be set here: `POS_WEIGHT = 2.0`.

# %% settings
# Your competition
DATA = "auto"  # its slug, or a folder; auto: KITTI Road, for rle the competition that is attached
SUBMISSION = "none"  # rle: submission.csv as its sample shows; png: label maps; kitti: the server's
METRIC = "auto"  # the threshold is tuned for it: dice, iou or maxf; auto: dice, for KITTI Road maxf

# Model
ARCH = "Unet"  # any architecture of segmentation-models-pytorch: UnetPlusPlus, FPN, Segformer, ...
ENCODER = "resnet34"  # any encoder of it; stronger: resnet50, efficientnet-b3; faster: resnet18
ENCODER_WEIGHTS = "imagenet"  # imagenet (attached, or from the network), none (worse), or a file
HEIGHT = 0  # of the network's input, such as 384; 0: follows the images and the device
WIDTH = 0  # as HEIGHT, such as 1248

# Training
TRAIN = True  # False: predict with the attached models, see MODELS
EPOCHS = 40  # passes over the training images; 0: as many as MAX_MINUTES allows
MAX_MINUTES = 0  # of the whole training, over all sessions; 0: no limit
SESSION_MINUTES = 660  # of this session, which Kaggle stops after 12 hours (some competitions: 9)
BATCH_SIZE = 0  # images per step; 0: the kit chooses, and splits a batch where memory runs out
LR = 0  # learning rate; 0: 2e-3 if pretrained with BatchNorm, else 5e-4; "auto": a finder
DICE = 1.0  # weight of Dice next to BCE; another loss: the function loss in the cell of train.py
AUGMENT = 1.0  # strength of the augmentation; 0: none
MASKS = "auto"  # folder or csv of the training masks; auto: next to the images
CLASSES = "auto"  # auto: as found; one: all merged; a file of id,name; or names: "car,road"
FOLDS = 10  # parts that the data is split into
FOLD = 0  # the part that validates; "all": one model for each part, averaged in prediction
SEED = 0  # another seed is another training: other folds, first weights, augmentations
DEVICES = 1  # 2: both T4s, in training and in prediction
RESUME = "auto"  # auto: resume what a stop or an attached earlier version left; none: start over

# Prediction
PREDICT = "auto"  # folder of images; auto: the test images next to the training images
MODELS = "auto"  # a model.pt, or a list of them; auto: this training's, without it all attached
THRESHOLD = "auto"  # a pixel is foreground from this probability on; auto: as tuned in training
TTA = True  # average with the prediction of the flipped image: a little better, half the speed

# %% title-setup [markdown]
# ## Set-up
# Three folded cells: running the scripts, finding what is attached, this session. The last one
# installs segmentation-models-pytorch, the one library that Kaggle's image lacks.

# %% scripts _kg_hide-input=true
import ast
import ctypes
import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from IPython import get_ipython
from IPython.display import Image, display


class StepFailed(Exception):
    """Ends a cell, and so the notebook, with one line instead of a traceback."""

    def _render_traceback_(self):
        return [f"error: {self}"]


def assigned_names(source):
    """The upper-case names that a cell assigns."""
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    except SyntaxError:  # this cell never ran
        return []
    return [node.id for node in nodes if isinstance(node.ctx, ast.Store) and node.id.isupper()]


def settings():
    """{name: value} of the settings cell as it was last run: the last that assigns DATA, TRAIN."""
    for source in reversed(get_ipython().user_ns["In"]):
        names = assigned_names(source)
        if {"DATA", "TRAIN"} <= set(names):
            return {name: globals()[name] for name in names if name in globals()}
    raise StepFailed("run the settings cell first")


def fields(script):
    """The names of a script's settings, read from its dataclass without importing it."""
    for node in ast.parse(Path(script).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in ("Config", "Options"):
            return [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]


def setting_names():
    """{flag of a script: name of the setting here}."""
    names = {name: name.upper() for name in fields("train.py") + fields("infer.py")}
    return names | {"model": "MODELS", "out": "--out"}


def flags(script, **values):
    """A script's flags: `values`, and every other setting that the script has a field for."""
    known = [*setting_names().values(), "TRAIN", "PREDICT"]
    for name, value in settings().items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else "add its line to Config first"
            if "LOSS" in name:
                hint = "change the function loss in the cell of train.py"
            raise StepFailed(f"{name}: train.py, infer.py and this notebook do not use it; {hint}")
        if name.lower() in fields(script):
            values.setdefault(name.lower(), value)
    words = []
    for name, value in values.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else v for v in several)]
    return words


def in_notebook_words(text):
    """What a script prints, with the names of the settings instead of the flags."""
    names = setting_names() if "--" in text and Path("infer.py").exists() else {}
    return re.sub(r"--(\w+)", lambda flag: names.get(flag[1], flag[0]), text)


def show_images(paths):
    """Images from files, with their names."""
    for path in paths:
        print(path)
        display(Image(filename=str(path), width=900))


def end_with_kernel():
    """Let Linux end this process when the notebook's kernel ends: it would hold the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def show_output(process):
    """Print what a process prints, as it comes; returns its last line that is an error."""
    error = ""
    for line in map(in_notebook_words, process.stdout):
        print(line, end="", flush=True)
        if line.lower().startswith("error: "):
            error = line[7:].strip()
    process.wait()
    return error


def run(*command):
    """Run Python with this command line. Raises StepFailed with the script's own message.

    When the cell is stopped, the script gets one Ctrl-C and 60 s to write what it has reached;
    subprocess.run would kill it after 0.25 s.
    """
    command = [sys.executable, *map(str, command)]
    print("$", shlex.join(["python", *command[1:]]), flush=True)
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "KIT_NOTEBOOK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Jupyter's own interrupt would be a second Ctrl-C
        preexec_fn=end_with_kernel,
    )
    try:
        error = show_output(process)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        timer = threading.Timer(60, os.killpg, [process.pid, signal.SIGKILL])
        timer.start()
        show_output(process)
        timer.cancel()
        killed = process.returncode == -signal.SIGKILL
        raise StepFailed(f"stopped{', killed after 60 s' if killed else ''}") from None
    if process.returncode:
        status = f"it ended with status {process.returncode}, see above"
        raise StepFailed(error or status)


# %% inputs _kg_hide-input=true
import shutil
import tempfile
import time
import zipfile

input_folder = "/kaggle/input" if Path("/kaggle/input").is_dir() else "../input"
input_folder = Path(os.path.abspath(input_folder))


def walk():
    """All folders and files below the input."""
    tree = [(Path(folder), names) for folder, _, names in os.walk(input_folder, followlinks=True)]
    files = [folder / name for folder, names in tree for name in names]
    return [folder for folder, _ in tree], files


def mounts():
    """What is attached, one path each, wherever this version of Kaggle's image mounts it."""
    owners = {"competitions": "*", "datasets": "*/*", "notebooks": "*/*", "models": "*/*"}
    paths = []
    for top in sorted(input_folder.glob("*")):
        levels = owners.get(top.name.lower())
        paths += sorted(top.glob(levels)) if levels else [top]
    return paths


def attached():
    """What is attached, for people: a line each, with the first names in it."""
    lines = []
    for mount in mounts():
        names = sorted(path.name for path in mount.glob("*"))
        more = f", ... ({len(names)} in all)" if len(names) > 5 else ""
        lines.append(f"  {mount.relative_to(input_folder)}: {', '.join(names[:5])}{more}")
    return "\n".join(lines) or "  nothing"


def find(setting, name):
    """The path of what a setting names: a path, or the name (slug) of something attached."""
    if Path(name).exists():
        return Path(name)
    ending = "/" + re.sub(r"^(/kaggle/input|\.\./input)/", "", str(name)).strip("/").lower()
    matches = [path for path in (*folders, *files) if str(path).lower().endswith(ending)]
    depth = min((len(path.parts) for path in matches), default=0)
    matches = [path for path in matches if len(path.parts) == depth]
    if len(matches) != 1:
        problem = f"can be {' or '.join(map(str, matches))}" if matches else "is not attached"
        print(f"attached:\n{attached()}")
        raise StepFailed(f"{setting}: {name} {problem}; see what is attached above")
    print(f"{setting}: {matches[0]}")
    return matches[0]


def competitions():
    """The attached competitions: by their folder, else by their sample of a submission."""
    named = [mount for mount in mounts() if mount.parent.name.lower() == "competitions"]
    samples = [path for path in files if re.search("sample.*submission", path.name.lower())]
    return named or [mount for mount in mounts() if any(mount in path.parents for path in samples)]


def data_folder():
    """The path that DATA means; "auto" where the kit is to look for KITTI Road."""
    if DATA != "auto":
        return unpacked(find("DATA", DATA))
    names = ", ".join(path.name for path in competitions())
    if SUBMISSION != "rle":
        if names:
            print(f"DATA: KITTI Road; for the attached competition set DATA to its name: {names}")
        return "auto"
    if len(competitions()) != 1:
        print(f"attached:\n{attached()}")
        problem = f"several competitions are attached ({names})" if names else "no competition is"
        raise StepFailed(f'DATA: {problem}; for SUBMISSION = "rle" set DATA to the name of one')
    print(f"DATA: {names}, because SUBMISSION is rle and no other competition is attached")
    return unpacked(competitions()[0])


def unpacked(folder):
    """The folder; where it has zips without their folders, a copy with links and unpacked zips."""
    zips = [path for path in sorted(folder.glob("*.zip")) if not path.with_suffix("").exists()]
    copy = Path(tempfile.gettempdir(), "unpacked", folder.name)
    if not zips or copy.exists():
        return copy if zips else folder
    unfinished = copy.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for path in folder.glob("*"):
        if path not in zips:
            (unfinished / path.name).symlink_to(path)
    for path in zips:
        print(f"unpacks {path}", flush=True)
        with zipfile.ZipFile(path) as archive:
            has_folder = all(name.split("/")[0] == path.stem for name in archive.namelist())
            target = unfinished if has_folder else unfinished / path.stem
            for member in archive.infolist():
                date = time.mktime((*member.date_time, 0, 0, -1))
                os.utime(archive.extract(member, target), (date, date))
    return unfinished.rename(copy)


# %% setup _kg_hide-input=true
import importlib.util
import urllib.request

from packaging.version import Version


def online():
    """Whether the package index can be reached."""
    address = "https://pypi.org/simple/segmentation-models-pytorch/"
    try:
        with urllib.request.urlopen(address, timeout=3):
            return True
    except OSError:
        return False


def gpu_names():
    """The GPUs of this session."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()


def processes():
    """DEVICES, or fewer where there are fewer GPUs."""
    available = max(1, len(gpus))
    if available < DEVICES:
        print(f"DEVICES: {available} instead of {DEVICES}; GPUs of this session: {len(gpus)}")
    return min(available, DEVICES)


def install_smp():
    """Install segmentation-models-pytorch, without its requirements: Kaggle's torch stays."""
    if importlib.util.find_spec("segmentation_models_pytorch"):
        return
    pattern = r"segmentation[-_]models[-_]pytorch-(\d[\w.]*?)(-py\S*\.whl|\.tar\.gz)"
    versions = {path: re.fullmatch(pattern, path.name) for path in files}
    versions = {path: Version(name[1]) for path, name in versions.items() if name}
    archives = [path for path in versions if versions[path] >= Version("0.6")]
    source = ["segmentation-models-pytorch>=0.6"]
    if archives:
        source = ["--no-index", "--no-build-isolation", max(archives, key=versions.get)]
    elif not internet:
        raise StepFailed(
            "segmentation-models-pytorch is missing: turn the internet on, or attach a data set "
            "with its wheel, 0.6 or newer (pip download --no-deps segmentation-models-pytorch)"
        )
    run("-m", "pip", "install", "--quiet", "--no-deps", *source)
    importlib.invalidate_caches()
    print("segmentation-models-pytorch: installed from", source[-1])


def encoder_weights():
    """ENCODER_WEIGHTS; for imagenet an attached file, else an attached copy of the Hub's cache."""
    if os.environ.get("HF_HUB_CACHE", "").startswith(str(input_folder)):
        del os.environ["HF_HUB_CACHE"]  # of an earlier run of this cell
    if ENCODER_WEIGHTS != "imagenet":
        return ENCODER_WEIGHTS
    name = "(tu-|timm-)?" + re.escape(re.sub("^(tu|timm)-", "", ENCODER))
    for path in sorted(files):
        titles = (path.name, path.parent.name + ".")
        named = any(re.match(name + "[-_.]", title) for title in titles)
        if named and path.suffix in (".pth", ".safetensors"):
            print(f"encoder weights: {path}")
            return path
    for path in sorted(folders):
        if re.fullmatch(rf"models--.*--{name}(\..*)?", path.name):
            print(f"encoder weights: the Hub's cache in {path.parent}")
            os.environ["HF_HUB_CACHE"] = str(path.parent)
            return "imagenet"
    print("encoder weights: from the network")
    return "imagenet"


def saved_by_kit(path):
    """Whether this kit wrote a model.pt or last.ckpt: by the words in it, without loading it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        words = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    return bool(words) and b"encoder_weights" in words[0] and b"min_pixels" in words[0]


def run_of(path):
    """The folder of the run that a file of train.py's belongs to: with folds, one level up."""
    return path.parents[1] if re.fullmatch(r"fold\d+", path.parent.name) else path.parent


def attached_runs(name):
    """The files of this name, model.pt or last.ckpt, that this kit's runs left in the input."""
    runs = []
    for path in files:
        set_aside = re.fullmatch(r"out-\d+", run_of(path).name)  # by a run that started over
        if path.name == name and not set_aside:
            if saved_by_kit(path):
                runs.append(path)
            else:
                print(f"skipped: {path} is not of this kit")
    return runs


def model_files():
    """The models to predict with."""
    if MODELS != "auto":
        names = MODELS if isinstance(MODELS, (list, tuple)) else [MODELS]
        return [find("MODELS", name) for name in names]
    if TRAIN:
        return ["out"]
    models = attached_runs("model.pt")
    if not models and not Path("out").exists():
        remedy = "attach the notebook that trained one, or a data set that holds one"
        raise StepFailed(f"TRAIN is False, but no model.pt of this kit is attached: {remedy}")
    return models or ["out"]


def copy_earlier_version():
    """Copy the newest attached run of this kit to out/, where train.py can resume it."""
    dates = {}
    for path in attached_runs("last.ckpt"):
        dates[run_of(path)] = max(dates.get(run_of(path), 0), path.stat().st_mtime)
    if not dates:
        return
    newest = max(dates, key=lambda folder: (dates[folder], str(folder)))
    names = "model.pt last.ckpt config.json metrics.csv metrics.json curves.png pr_curve.png"
    shutil.rmtree("out.unfinished", ignore_errors=True)
    for path in files:
        if run_of(path) == newest and path.name in (*names.split(), "validation.jpg"):
            copy = "out.unfinished" / path.relative_to(newest)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    os.replace("out.unfinished", "out")
    several = f" (the newest of {len(dates)}; of equal dates the last name)"
    print(f"copied {newest} to out/{several if len(dates) > 1 else ''}: resumed if it fits")


folders, files = walk()
gpus, internet = gpu_names(), online()
print(f"attached in {input_folder}:\n{attached()}")
print(f"GPU: {', '.join(gpus) or 'none'}; internet: {'on' if internet else 'off'}")
if not gpus and "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    print("*** NO GPU: training takes days. Choose Settings > Accelerator > GPU T4 x2. ***")
install_smp()

# %% title-training-script [markdown]
# ## The training script
# `train.py`, to be read from top to bottom and changed: `Config`, `augmentation`,
# `SegmentationDataset`, `loss`, `schedule`, `SegmentationModule`, then how they come together.

# %% train.py

# %% title-rest [markdown]
# ## The rest, rarely changed
# Each file of the kit is a cell, word for word.

# %% infer.py _kg_hide-input=true

# %% data.py _kg_hide-input=true

# %% tables.py _kg_hide-input=true

# %% losses.py _kg_hide-input=true

# %% loaders.py _kg_hide-input=true

# %% predict.py _kg_hide-input=true

# %% evaluate.py _kg_hide-input=true

# %% class_metrics.py _kg_hide-input=true

# %% metrics.py _kg_hide-input=true

# %% visualize.py _kg_hide-input=true

# %% submissions.py _kg_hide-input=true

# %% colours.py _kg_hide-input=true

# %% kitti.py _kg_hide-input=true

# %% class_folders.py _kg_hide-input=true

# %% layouts.py _kg_hide-input=true

# %% folders.py _kg_hide-input=true

# %% rle.py _kg_hide-input=true

# %% callbacks.py _kg_hide-input=true

# %% resume.py _kg_hide-input=true

# %% masks.py _kg_hide-input=true

# %% labels.py _kg_hide-input=true

# %% images.py _kg_hide-input=true

# %% classes.py _kg_hide-input=true

# %% trial.py _kg_hide-input=true

# %% model.py _kg_hide-input=true

# %% encoders.py _kg_hide-input=true

# %% utils.py _kg_hide-input=true

# %% title-data [markdown]
# ## The data
# As the kit reads it, checked as a whole: 12 images over the range of the foreground's share, with
# the mask in green; then four images, augmented four times each, with the mask outlined. Here you
# see a swapped pair, a shifted mask, or an augmentation that is too strong.


# %% look-data
if TRAIN:
    values = {"data": data_folder(), "out": "data_check", "check": True}
    run("train.py", *flags("train.py", **values))
    show_images(["data_check/examples.jpg", "data_check/augmented.jpg"])

# %% title-train [markdown]
# ## Train
# Stopped, or cut off by the session's end: run it again, in a later session with this notebook's
# own last version attached as input. It resumes; what was changed since makes it start over.

# %% run-train
folders, files = walk()  # again: something may have been attached since
if TRAIN:
    if RESUME == "auto" and not Path("out").exists():
        copy_earlier_version()
    values = {"data": data_folder(), "out": "out", "devices": processes()}
    run("train.py", *flags("train.py", encoder_weights=encoder_weights(), **values))

# %% title-scores [markdown]
# ## Curves and scores
# Of the validation images. The mean over images first, which most competitions count; then the
# measures over all pixels together.

# %% scores
import json

import pandas as pd


def show_scores(folder):
    """Tables of the measures that a folder's files metrics.json hold."""
    for path in sorted(Path(folder).glob("**/metrics.json")):
        scores = json.loads(path.read_text())
        threshold, classes = scores.pop("threshold"), scores.pop("classes", {})
        how = f", at the threshold {threshold:.3f}" if isinstance(threshold, float) else ""
        print(f"{path}: percent{how}")
        display(pd.DataFrame({"mean over images": scores.pop("mean")}).T.round(2))
        for view, measures in scores.items():
            print(view)
            display(pd.DataFrame(measures).T.round(2))
        if classes:
            print(f"mIoU {classes['mIoU']:.2f}, pixel accuracy {classes['accuracy']:.2f}")
            display(pd.DataFrame(classes["per_class"]).T.round(2))


if TRAIN:
    show_scores("out")
    show_images(sorted(Path("out").glob("**/curves.png")))
    show_images(sorted(Path("out").glob("**/validation.jpg")))

# %% title-predict [markdown]
# ## Predict and look

# %% run-infer
folders, files = walk()
if Path("predictions").exists():
    shutil.rmtree("predictions")  # an earlier result is not to be taken for this one
for name in ("submission.csv", "submission.zip", "submission_kitti.zip"):
    Path(name).unlink(missing_ok=True)
images = data_folder() if PREDICT == "auto" else unpacked(find("PREDICT", PREDICT))
count = processes()
launcher = ["-m", "torch.distributed.run", "--nproc_per_node", count] if count > 1 else []
values = {"model": model_files(), "data": images, "out": "predictions"}
values["masks"] = "auto"  # MASKS are those of the training images
run(*launcher, "infer.py", *flags("infer.py", **values))

# %% look
show_images(sorted(Path("predictions").glob("comparisons/*.jpg"))[:6])
show_scores("predictions")

# %% title-submission [markdown]
# ## Submission

# %% submission
for path in sorted(Path("predictions").glob("submission*")):
    shutil.copy(path, path.name)  # where Kaggle looks for it
    print(f"{path.name}: submit it from the notebook's Output tab")
    if path.suffix == ".csv":
        display(pd.read_csv(path, nrows=5))
if SUBMISSION != "none":
    for folder in [path for path in Path("predictions").glob("*") if path.is_dir()]:
        shutil.make_archive(str(folder), "zip", folder)  # one file instead of hundreds
        shutil.rmtree(folder)

# %% next [markdown]
# ## What to try next
# - A better score: more `EPOCHS`, a stronger `ENCODER`, larger `HEIGHT` and `WIDTH`.
# - Another split: `FOLD = 1`. All of them, averaged: `FOLD = "all"` with `FOLDS = 5`.
# - Another loss, augmentation or schedule: the functions in the cell of `train.py`. What follows
#   the prediction of the network: `postprocess` in the cell of `predict.py`.
# - More than one session: attach this notebook's last version as input and run it again.
# - A code competition without internet: attach the version that trained and a data set with the
#   wheel of segmentation-models-pytorch, set `TRAIN = False`, turn the internet off.
#
# `/kaggle/working/out` holds `model.pt` (to predict), `last.ckpt` (to resume) and the curves;
# `/kaggle/working/predictions` holds masks and comparisons.
