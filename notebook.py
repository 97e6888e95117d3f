"""The cells of the Kaggle notebook, in jupytext's percent format; tools/kernel.py builds it.

A cell's title is its id. A cell whose title is a file of the kit gets that file as its content.
"""

# ruff: noqa: E402
raise ImportError("these are the cells of a notebook: python tools/kernel.py build")

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
METRIC = "auto"  # to tune for: dice, iou, maxf, or a file.py with score; auto: dice, KITTI's maxf

# Model
ARCH = "Unet"  # any architecture of segmentation-models-pytorch: UnetPlusPlus, FPN, Segformer, ...
ENCODER = "resnet34"  # any encoder of it; stronger: resnet50, efficientnet-b3; faster: resnet18
ENCODER_WEIGHTS = "imagenet"  # imagenet (attached, or from the network), none (worse), or a file
HEIGHT = 0  # of the network's input, such as 384; 0: follows the images and the device
WIDTH = 0  # as HEIGHT, such as 1248
INIT = ""  # an own model that is attached, to start from: all that fits; "": ENCODER_WEIGHTS

# Training
TRAIN = True  # False: predict with the attached models, see MODELS
CONFIG = ""  # config.json of an attached run: it counts for all that has its default here
EPOCHS = 0  # passes over the training images; 0: as many as MAX_MINUTES allows, without it 40
MAX_MINUTES = 0  # of the whole training, over all sessions; 0: no limit
SESSION_MINUTES = 660  # of this session, which Kaggle stops after 12 hours (some competitions: 9)
BATCH_SIZE = 0  # images per step; 0: the kit chooses, and splits a batch where memory runs out
LR = 0  # learning rate; 0: 2e-3 if pretrained with BatchNorm, else 5e-4; "auto": a finder
LOSS = "bce=1,dice=1"  # terms with their weights; also focal, lovasz, tversky, or your own: loss
AUGMENT = 1.0  # strength of the augmentation; 0: none
FLIPS = "auto"  # symmetries in it: h, hv, all (quarter turns too), none; auto: h
MASKS = "auto"  # folder or csv of the training masks; auto: next to the images
EXTRA = ""  # attached predictions of SAVE_PROBS = True, whose confident pixels are trained on, too
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
PREDICT_MINUTES = 0  # of the prediction: drops TTA, then models, where time is short; 0: no limit

# %% title-training-script [markdown]
# ## The training script
# `train.py`, to be read from top to bottom and changed: `Config`, `augmentation`,
# `SegmentationDataset`, `loss`, `schedule`, `SegmentationModule`, then how they come together.

# %% train.py

# %% title-rest [markdown]
# ## The rest, rarely changed
# Each file of the kit is a cell, word for word. First what makes masks of probabilities: change
# `postprocess`.

# %% folders
from pathlib import Path

for wing in ("data", "network", "results", "training", "extra"):
    Path("kit", wing).mkdir(parents=True, exist_ok=True)

# %% kit/results/predict.py

# %% title-scripts [markdown]
# ### The other script, and the door for your own cells

# %% infer.py _kg_hide-input=true

# %% utils.py _kg_hide-input=true

# %% title-data-wing [markdown]
# ### kit/data: from folders to samples

# %% kit/data/samples.py _kg_hide-input=true

# %% kit/data/extras.py _kg_hide-input=true

# %% kit/data/cache.py _kg_hide-input=true

# %% kit/data/blocks.py _kg_hide-input=true

# %% kit/data/folds.py _kg_hide-input=true

# %% kit/data/folders.py _kg_hide-input=true

# %% kit/data/names.py _kg_hide-input=true

# %% kit/data/bands.py _kg_hide-input=true

# %% kit/data/csvs.py _kg_hide-input=true

# %% kit/data/annotations.py _kg_hide-input=true

# %% kit/data/volumes.py _kg_hide-input=true

# %% kit/data/kitti.py _kg_hide-input=true

# %% kit/data/masks.py _kg_hide-input=true

# %% kit/data/values.py _kg_hide-input=true

# %% kit/data/classes.py _kg_hide-input=true

# %% kit/data/rle.py _kg_hide-input=true

# %% kit/data/images.py _kg_hide-input=true

# %% kit/data/readers.py _kg_hide-input=true

# %% kit/data/photos.py _kg_hide-input=true

# %% kit/data/slides.py _kg_hide-input=true

# %% kit/data/tiffs.py _kg_hide-input=true

# %% kit/data/arrays.py _kg_hide-input=true

# %% kit/data/rasters.py _kg_hide-input=true

# %% title-network-wing [markdown]
# ### kit/network: the model

# %% kit/network/model.py _kg_hide-input=true

# %% kit/network/encoders.py _kg_hide-input=true

# %% kit/network/runtimes.py _kg_hide-input=true

# %% title-training-wing [markdown]
# ### kit/training: around the steps

# %% kit/training/resolve.py _kg_hide-input=true

# %% kit/training/trial.py _kg_hide-input=true

# %% kit/training/loaders.py _kg_hide-input=true

# %% kit/training/losses.py _kg_hide-input=true

# %% kit/training/callbacks.py _kg_hide-input=true

# %% kit/training/resume.py _kg_hide-input=true

# %% kit/training/loggers.py _kg_hide-input=true

# %% title-results-wing [markdown]
# ### kit/results: scores, pictures, submissions

# %% kit/results/oof.py _kg_hide-input=true

# %% kit/results/tuning.py _kg_hide-input=true

# %% kit/results/metric_file.py _kg_hide-input=true

# %% kit/results/metrics.py _kg_hide-input=true

# %% kit/results/visualize.py _kg_hide-input=true

# %% kit/results/submissions.py _kg_hide-input=true

# %% kit/results/mosaics.py _kg_hide-input=true

# %% kit/results/pace.py _kg_hide-input=true

# %% title-extra [markdown]
# ### kit/extra: the report, and what is asked for by a flag of its own

# %% kit/extra/runs.py _kg_hide-input=true

# %% kit/extra/blends.py _kg_hide-input=true

# %% kit/extra/polygons.py _kg_hide-input=true

# %% kit/extra/report.py _kg_hide-input=true

# %% kit/extra/viewer.py _kg_hide-input=true

# %% kit/extra/export.py _kg_hide-input=true

# %% title-ground [markdown]
# ### kit: what all of it stands on

# %% kit/config.py _kg_hide-input=true

# %% kit/errors.py _kg_hide-input=true

# %% kit/cli.py _kg_hide-input=true

# %% kit/files.py _kg_hide-input=true

# %% kit/kaggle.py _kg_hide-input=true

# %% title-setup [markdown]
# ## Set-up
# What is attached, GPUs, internet. Installs segmentation-models-pytorch, the one library that
# Kaggle's image lacks.

# %% setup
import importlib
import json
import sys

import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Image, display

sys.path.insert(0, str(Path.cwd()))
importlib.invalidate_caches()
kaggle = importlib.reload(importlib.import_module("kit.kaggle"))
session = kaggle.Session()
print(session.describe())
session.install_smp()


def flags(script, **values):
    """A script's flags: `values`, and the settings that differ from its defaults."""
    namespace = get_ipython().user_ns
    return kaggle.flags(script, kaggle.read_settings(namespace["In"], namespace), **values)


def training_flags(**values):
    """The flags of train.py, with the paths of what is attached."""
    values |= {"data": session.data_folder(DATA, SUBMISSION), "config": session.recipe(CONFIG)}
    values["init"] = session.file_in("INIT", INIT, "model.pt", "model.safetensors")
    values["extra"] = kaggle.unpacked(session.find("EXTRA", EXTRA)) if EXTRA else ""
    values["metric"] = session.find("METRIC", METRIC) if METRIC.endswith(".py") else METRIC
    return flags("train.py", **values)


def show_images(paths):
    """Images from files, with their names."""
    for path in paths:
        print(path)
        display(Image(filename=str(path), width=900))


# %% title-data [markdown]
# ## The data
# As the kit reads it, checked as a whole: 12 images over the range of the foreground's share, with
# the mask in green; then four images, augmented four times each, with the mask outlined. Here you
# see a swapped pair, a shifted mask, or an augmentation that is too strong.


# %% look-data
if TRAIN:
    kaggle.run("train.py", *training_flags(out="data_check", check=True))
    show_images(["data_check/examples.jpg", "data_check/augmented.jpg"])

# %% title-train [markdown]
# ## Train
# Stopped, or cut off by the session's end: run it again, in a later session with this notebook's
# own last version attached as input. It resumes; what was changed since makes it start over.

# %% run-train
session.look()  # again: something may have been attached since
if TRAIN:
    if RESUME == "auto" and not Path("out").exists():
        session.copy_earlier_version()
    weights = session.encoder_weights(ENCODER, ENCODER_WEIGHTS, session.recipe(CONFIG))
    devices = session.processes(DEVICES)
    kaggle.run("train.py", *training_flags(out="out", encoder_weights=weights, devices=devices))

# %% title-scores [markdown]
# ## Curves and scores
# Of the validation images. The mean over images first, which most competitions count; then the
# measures over all pixels together. Last the report: all of it on one page, with every validation
# image; its threshold can be moved.


# %% scores
def show_scores(folder):
    """Tables of the measures that a folder's files metrics.json hold."""
    for path in sorted(Path(folder).glob("**/metrics.json")):
        scores = json.loads(path.read_text())
        threshold, classes = scores.pop("threshold"), scores.pop("classes", {})
        own = scores.pop("metric", None)  # of a file
        at = f", at the threshold {threshold:.3f}" if isinstance(threshold, float) else ""
        print(f"{path}: percent{at}")
        display(pd.DataFrame({"mean over images": scores.pop("mean")}).T.round(2))
        for view, measures in scores.items():
            print(view)
            display(pd.DataFrame(measures).T.round(2))
        if own:
            print(f"{own['name']}: {own['score']:.6g}")
        if classes:
            print(f"mIoU {classes['mIoU']:.2f}, pixel accuracy {classes['accuracy']:.2f}")
            display(pd.DataFrame(classes["per_class"]).T.round(2))


if TRAIN:
    show_scores("out")
    show_images(sorted(Path("out").glob("**/curves.png")))
    show_images(sorted(Path("out").glob("**/validation.jpg")))
    display(HTML(kaggle.framed("out/report.html")))
    earlier = {kaggle.run_of(path) for path in session.saved_runs("model.pt")}
    runs = [folder for folder in sorted(earlier) if (folder / "scores.csv").exists()]
    if runs and Path("out", "scores.csv").exists():  # versions of this notebook that are attached
        kaggle.run("train.py", "--compare", "out", *runs, "--out", "runs")
        show_images([Path("runs/runs.png")])

# %% title-predict [markdown]
# ## Predict and look

# %% run-infer
session.look()
kaggle.clear_predictions()
if PREDICT == "auto":
    images = session.data_folder(DATA, SUBMISSION)
else:
    images = kaggle.unpacked(session.find("PREDICT", PREDICT))
values = {"model": session.model_files(MODELS, TRAIN), "data": images, "out": "predictions"}
values |= {"masks": "auto", "max_minutes": PREDICT_MINUTES}  # MASKS are the training images'
values["tta"] = "auto" if TTA else False  # as trained
kaggle.run(*session.launcher(DEVICES), "infer.py", *flags("infer.py", **values))

# %% look
show_images(sorted(Path("predictions").glob("comparisons/*.jpg"))[:6])
show_scores("predictions")
display(HTML(kaggle.framed("predictions/report.html")))

# %% title-submission [markdown]
# ## Submission

# %% submission
for path in kaggle.collect_submission(SUBMISSION):
    if path.suffix == ".csv":
        display(pd.read_csv(path, nrows=5))

# %% next [markdown]
# ## What to try next
# - A better score: more `EPOCHS`, a stronger `ENCODER`, larger `HEIGHT` and `WIDTH`.
# - Another split: `FOLD = 1`. All of them, averaged: `FOLD = "all"` with `FOLDS = 5`.
# - Another loss, augmentation or schedule: the functions in the cell of `train.py`. What follows
#   the prediction of the network: `postprocess` in the cell of `predict.py`.
# - More than one session: attach this notebook's last version as input and run it again.
# - A code competition without internet: at home `python tools/kernel.py bundle OWNER/SLUG` makes a
#   data set of all that is needed, `make rehearse` tries the rerun. Or attach the version that
#   trained, set `TRAIN = False`, and turn the internet off.
# - Your own cells: `from utils import load_model, show`; `load_model("out").predict(path)`.
#
# `/kaggle/working/out` holds `model.pt` (to predict), `last.ckpt` (to resume) and the curves;
# `/kaggle/working/predictions` holds masks and comparisons.
