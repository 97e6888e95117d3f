"""The one Kaggle notebook made of utils.py, train.py and infer.py: build it, push it, pull it back.

    python kernel.py build                  # build/kernel.ipynb and build/kernel-metadata.json
    python kernel.py push                   # builds and pushes with the kaggle CLI: a new version runs
    python kernel.py pull OWNER/SLUG        # what was changed on the site, back into the three files

What is attached, private, on a GPU: kernel-metadata.json. The notebook's own cells stand below, in their order.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILES = {
    "utils.py": "settings in full, samples, images, model, metrics, pictures",
    "train.py": "augmentation, loss, the LightningModule, the trainer",
    "infer.py": "predictions, masks, pictures, submission",
}
NO = ("Kernel push error", "not valid", "could not be added")  # what the CLI prints when it exits 0 and Kaggle said no

# =====================================================================================================================
#  CELLS
# =====================================================================================================================

INTRODUCTION = """\
# Road segmentation kit

From pictures with masks to a trained model, masks and pictures of what was found. Fork it, change a setting, run all.

1. [Settings](#Settings): what you change first
2. [Set-up](#Set-up): installs the one library that Kaggle's image lacks
3. [The kit](#The-kit): `utils.py`, `train.py`, `infer.py`; change a loss or an augmentation right in its cell
4. [Train](#Train)
5. [Predict](#Predict)
6. [Look](#Look): curves, best and worst pictures, the scores
7. [What next](#What-next)
"""

SETTINGS = """\
DATA = "auto"  # folder of the training pairs; auto: KITTI Road, wherever Kaggle has mounted it
TRAIN = True  # False: no training, predict with the model.pt files attached as input (one or several: averaged)
EPOCHS = 40  # passes over the data; 0: as many as MAX_MINUTES allows
MAX_MINUTES = 660  # of training; Kaggle stops a session after 12 hours (a code competition often after 9)
ENCODER = "resnet34"  # any smp encoder; more accurate: resnet50, efficientnet-b3; quicker: resnet18
ENCODER_WEIGHTS = "imagenet"  # imagenet (attached, or from the network), none (from scratch), or a file
HEIGHT = 0  # pixels that the model sees, 384 say; 0: follows the pictures and the device
WIDTH = 0  # as HEIGHT, 1248 say
BATCH_SIZE = 0  # pictures a step; 0: 8; halve it when the GPU's memory runs out
LR = 5e-4  # learning rate; "auto": Lightning's finder
FOLDS = 10  # parts the data is cut into
FOLD = 0  # which part validates; "all": a model for each part, whose predictions are averaged
DEVICES = 1  # 2: both T4s
RESUME = "auto"  # auto: go on where an attached earlier version of this notebook stopped; none: start over
PREDICT = "auto"  # pictures to predict; auto: the test pictures beside the training data
SUBMISSION = "none"  # rle: submission.csv as a competition's sample wants it; kitti: the KITTI Road server's zip
MORE_TRAIN = ""  # further flags of train.py, such as "--augment 1.5 --ema 0.99" (all: Config in utils.py)
MORE_INFER = ""  # further flags of infer.py, such as "--threshold 0.4 --save_probs true"
"""

SETUP = """\
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

INPUT = Path("/kaggle/input") if Path("/kaggle/input").is_dir() else Path("../input")


def attached(pattern):
    return sorted(path.resolve() for depth in range(6) for path in INPUT.glob("*/" * depth + pattern))


def run(*command):  # a step that fails stops the notebook
    command = [sys.executable, *map(str, command)]
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


if importlib.util.find_spec("segmentation_models_pytorch"):
    print("segmentation_models_pytorch: there")
else:  # --no-deps: Kaggle's torch stays
    wheels = attached("segmentation_models_pytorch-*.whl")
    source = ["--no-index", wheels[-1]] if wheels else ["segmentation-models-pytorch"]
    run("-m", "pip", "install", "--quiet", "--no-deps", *source)
    print("segmentation_models_pytorch: installed from", wheels[-1] if wheels else "the network")

if ENCODER_WEIGHTS == "imagenet":
    named = re.compile(re.escape(ENCODER) + r"[-_.]")  # resnet34-b627a593.pth, resnet34.imagenet/model.safetensors
    files = [path for path in attached("*.pth") + attached("*.safetensors")
             if named.match(path.name) or named.match(path.parent.name + ".")]
    caches = [path.parent for path in attached("models--*")]
    if caches:
        os.environ["HF_HUB_CACHE"] = str(caches[0])
        print("encoder weights: from the attached Hub cache", caches[0])
    elif files:
        ENCODER_WEIGHTS = files[0]
        print("encoder weights: the attached", ENCODER_WEIGHTS)
    else:
        print("encoder weights: from the network")

earlier = {path.parent.parent if path.parent.name.startswith("fold") else path.parent for path in attached("last.ckpt")}
if TRAIN and RESUME == "auto" and earlier and not Path("out").exists():
    newest = max(earlier, key=lambda folder: max(path.stat().st_mtime for path in folder.rglob("last.ckpt")))
    shutil.copytree(newest, "out")
    print("goes on where", newest, "stopped")
"""

TRAINING = """\
if TRAIN:
    run("train.py", "--data", DATA, "--out", "out", "--epochs", EPOCHS, "--max_minutes", MAX_MINUTES,
        "--encoder", ENCODER, "--encoder_weights", ENCODER_WEIGHTS, "--height", HEIGHT, "--width", WIDTH,
        "--batch_size", BATCH_SIZE, "--lr", LR, "--folds", FOLDS, "--fold", FOLD, "--devices", DEVICES,
        "--resume", RESUME, *shlex.split(MORE_TRAIN))
"""

PREDICTION = """\
models = ["out"] if TRAIN else attached("model.pt")
if not models:
    raise FileNotFoundError(f"TRAIN is False and {INPUT} holds no model.pt: attach a notebook or data set with one")
run("infer.py", "--model", *models, "--data", DATA if PREDICT == "auto" else PREDICT, "--out", "predictions",
    "--submission", SUBMISSION, *shlex.split(MORE_INFER))
for path in Path("predictions").glob("submission*"):
    shutil.copy(path, path.name)  # Kaggle looks for it here
"""

LOOK = """\
import json

import pandas as pd
from IPython.display import Image, display

for folder in ("out", "predictions"):
    for path in sorted(Path(folder).glob("**/metrics.json")):
        scores = pd.DataFrame(json.loads(path.read_text())["image"]).T
        print(path)
        display(scores.round(3))
pictures = [*sorted(Path("out").glob("**/curves.png")), *sorted(Path("out").glob("**/validation.jpg")),
            *sorted(Path("predictions").glob("comparisons/*.jpg"))[:6]]
for path in pictures:
    print(path)
    display(Image(filename=str(path), width=900))
"""

NEXT = """\
Everything lies in `/kaggle/working`: `out/` (`model.pt` to predict, `last.ckpt` to go on, `metrics.csv`, pictures),
`predictions/` (`masks/`, `comparisons/`, what `infer.py` wrote).

- A better score: more `EPOCHS`, a larger `ENCODER`, larger `HEIGHT` and `WIDTH`; `FOLD = 1` to see another part.
- Another loss or augmentation: the functions `loss` and `augmentation` in the cell of `train.py`.
- Cut off by the session limit: attach this notebook's last version as input and run again; it goes on.
- A code competition without internet: attach the version that trained, set `TRAIN = False`, switch the internet off.
"""


def cells() -> list:
    """The notebook's cells in order; the ids are their names, so that equal input gives equal bytes."""
    import nbformat.v4 as v4

    def text(name: str, source: str) -> object:
        return v4.new_markdown_cell(source.rstrip("\n"), id=name)

    def code(name: str, source: str, hide: bool = False) -> object:
        return v4.new_code_cell(source, id=name, metadata={"_kg_hide-input": True} if hide else {})

    kit = [code(name.removesuffix(".py"), f"%%writefile {name}\n" + (HERE / name).read_text(), hide=True)
           for name in FILES]  # fmt: skip
    listing = "\n".join(f"- `{name}`: {what}" for name, what in FILES.items())
    return [
        text("introduction", INTRODUCTION),
        text("title-settings", "## Settings"),
        code("settings", SETTINGS.rstrip("\n")),
        text("title-setup", "## Set-up"),
        code("setup", SETUP.rstrip("\n"), hide=True),
        text("title-kit", f"## The kit\nEach cell is a file, written as it stands.\n\n{listing}"),
        *kit,
        text("title-train", "## Train"),
        code("run-train", TRAINING.rstrip("\n")),
        text("title-predict", "## Predict"),
        code("run-infer", PREDICTION.rstrip("\n")),
        text("title-look", "## Look"),
        code("look", LOOK.rstrip("\n")),
        text("next", f"## What next\n{NEXT}"),
    ]


# =====================================================================================================================
#  BUILD, PUSH, PULL
# =====================================================================================================================


def fail(message: str, status: int = 2) -> None:
    """End with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def kaggle(*arguments: str) -> tuple[int, str]:
    """Run the kaggle CLI of this Python; returns its exit status and all that it printed."""
    done = subprocess.run([sys.executable, "-m", "kaggle", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def logged_in() -> str:
    """The user whom the kaggle CLI knows, from its configuration or the environment; "" where it knows none."""
    found = re.search(r"^- username: (\S+)$", kaggle("config", "view")[1], re.MULTILINE)
    return "" if not found or found[1] == "None" else found[1]


def build(folder: Path, owner: str) -> dict:
    """Write kernel.ipynb and kernel-metadata.json into the folder. Returns the metadata."""
    import nbformat

    metadata = json.loads((HERE / "kernel-metadata.json").read_text())
    if owner:
        metadata["id"] = f"{owner}/{metadata['id'].split('/')[-1]}"
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
              "language_info": {"name": "python"}}  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=cells(), metadata=kernel)
    nbformat.validate(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / metadata["code_file"]).write_text(json.dumps(notebook, indent=1) + "\n")
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    print(f"built {folder / metadata['code_file']} for {metadata['id']}")
    return metadata


def push(folder: Path, metadata: dict) -> None:
    """Push the built folder; ends with status 1 where Kaggle says no, whatever the CLI's own status is."""
    status, printed = kaggle("kernels", "push", "-p", str(folder))
    print(printed.strip())
    done = re.search(r"Kernel version (\d+) successfully pushed", printed)
    if status or not done or any(word in printed for word in NO):
        fail("Kaggle did not take all of it: see above; mend kernel-metadata.json and push again", 1)
    kernel = metadata["id"]
    print(
        f"""
next:
  kaggle kernels status {kernel}
  kaggle kernels output {kernel} -p output
  kaggle competitions submit COMPETITION -k {kernel} -v {done[1]} -f submission.csv -m "version {done[1]}" """.rstrip()
    )


def pull(kernel: str, yes: bool) -> None:
    """Bring the files' cells of a notebook on the site back into the files, once the difference was seen."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        status, printed = kaggle("kernels", "pull", kernel, "-p", folder)
        found = sorted(Path(folder).glob("*.ipynb"))
        if status or not found:
            fail(
                f"{kernel}: no notebook came: {printed.strip().splitlines()[-1] if printed.strip() else 'no answer'}", 1
            )
        notebook = nbformat.read(found[0], as_version=4)
    changed = {}
    for cell in notebook.cells:
        head, _, body = cell.source.partition("\n")
        name = head.removeprefix("%%writefile ").strip()
        if head.startswith("%%writefile ") and name in FILES:  # no other name: nothing is written elsewhere
            old, new = (HERE / name).read_text(), body.rstrip("\n") + "\n"
            changed |= {name: new} if new != old else {}
            lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, f"{kernel} {name}")
            sys.stdout.writelines(lines)
    if not changed:
        print("no file differs")
    elif yes or (sys.stdin.isatty() and input(f"write {', '.join(changed)}? [y/N] ").lower() == "y"):
        for name, text in changed.items():
            part = HERE / f".{name}.part"
            part.write_text(text)
            os.replace(part, HERE / name)
        print(f"wrote {', '.join(changed)}")
    else:
        print("nothing written; --yes writes without asking")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "push", "pull"])
    parser.add_argument("kernel", nargs="?", help="pull: OWNER/SLUG of the notebook on the site")
    parser.add_argument("--owner", help="Kaggle user name; otherwise the one that the kaggle CLI is logged in as")
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder to build in")
    parser.add_argument("--yes", action="store_true", help="pull: write without asking")
    options = parser.parse_args()
    if options.action == "pull":
        if not re.fullmatch(r"[\w-]+/[\w-]+", options.kernel or ""):
            fail("pull takes the notebook's name: python kernel.py pull OWNER/SLUG")
        return pull(options.kernel, options.yes)
    user = logged_in()
    if options.action == "push" and not user:
        fail("no Kaggle credentials: make a token at https://www.kaggle.com/settings/api and save it as "
             "~/.kaggle/access_token, or run: kaggle auth login")  # fmt: skip
    metadata = build(options.out, options.owner or user)
    if options.action == "push":
        push(options.out, metadata)


if __name__ == "__main__":
    main()
