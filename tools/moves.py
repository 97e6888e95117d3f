"""Measure moves on real data: with and without, in the same minutes, with several seeds.

    python tools/moves.py pseudo --data DIR                          # --extra, --stages
    python tools/moves.py init --data DIR --start DIR:VALUES --minutes 1    # --init
    python tools/moves.py empty --data DIR:VALUES                    # empty masks, --presence
    python tools/moves.py flags --data DIR --flags "--flips all" "--loss bce=1,lovasz=1"

Every fifth of the data is held out and scored by infer.py, another one for each seed. In `pseudo`
a quarter of the rest has masks, the others are the extras. In `empty` images are cut into 16
pieces, of which 39 % have none of the class; "threshold and area" is the same model without what
decides on empty masks and cleans. DIR:VALUES names the foreground's values, as in `camvid:3`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import numpy as np
import pandas as pd
import peers

from kit.data.folds import assign_folds
from kit.data.images import write_image
from kit.data.samples import find_samples, read_sample, scan
from kit.network.model import load_model, save_model

PIECES = 4  # along each side of an image
EMPTY = 0.39  # share of pieces without the class
Scores = dict[str, float]  # {variant: score of the held-out images, in percent}


def run(script: str, *flags: object) -> None:
    """Run a script of the kit; what it prints goes to stderr."""
    command = [sys.executable, HERE / script, *flags]
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)


def train(data: Path, out: Path, options: argparse.Namespace, seed: int, *flags: object) -> None:
    """Train on a folder for the minutes that every variant has."""
    network = ("--encoder", options.encoder, "--encoder_weights", options.weights)
    minutes = ("--max_minutes", options.minutes, "--seed", seed)
    run("train.py", "--data", data, "--out", out, *network, *minutes, *flags)


def score(model: Path, data: Path, *names: str) -> float:
    """A score of a model on held-out images; `names`: of the keys in metrics.json."""
    with tempfile.TemporaryDirectory() as out:
        paths = ("--model", model, "--data", data, "--out", out)
        run("infer.py", *paths, "--comparisons", "false")
        block = json.loads((Path(out) / "metrics.json").read_text())
    for name in names:
        block = block[name]
    return block


# --------------------------------------------------------------------------------------------------
#  Moves
# --------------------------------------------------------------------------------------------------


def pseudo(root: Path, options: argparse.Namespace, seed: int) -> Scores:
    """MaxF from a quarter of the masks, without and with the predictions of that model."""
    peers.write_split(options.data, root, seed)
    samples = find_samples(str(root / "train"), training=True).samples
    names = samples.id.sort_values().to_numpy()
    kept = set(names[np.arange(len(names)) // 8 % 4 == seed % 4])  # streets stay together
    peers.link_samples(samples[samples.id.isin(kept)], root / "labelled" / "training")
    (root / "unlabelled").mkdir()
    for image in samples.image[~samples.id.isin(kept)]:
        (root / "unlabelled" / image.name).symlink_to(image.resolve())
    train(root / "labelled", root / "alone", options, seed)
    found = ("--model", root / "alone", "--data", root / "unlabelled", "--out", root / "found")
    run("infer.py", *found, "--save_probs", "true", "--comparisons", "false")
    for stages in ("mixed", "mixed,own"):
        flags = ("--extra", root / "found", "--stages", stages)
        train(root / "labelled", root / stages, options, seed, *flags)
    test = root / "test" / "training"
    return {
        name: score(root / folder, test, "image", "all", "MaxF")
        for name, folder in {
            "labelled alone": "alone",
            "--extra": "mixed",
            "--extra --stages mixed,own": "mixed,own",
        }.items()
    }


def init(root: Path, options: argparse.Namespace, seed: int) -> Scores:
    """MaxF after a start from ImageNet alone, and from a model of other data."""
    start = Path(options.start_model)
    peers.write_split(options.data, root, seed)
    train(root / "train", root / "imagenet", options, seed)
    train(root / "train", root / "init", options, seed, "--init", start)
    test = root / "test" / "training"
    names = {"ImageNet": "imagenet", "--init": "init"}
    return {n: score(root / f, test, "image", "all", "MaxF") for n, f in names.items()}


def empty(root: Path, options: argparse.Namespace, seed: int) -> Scores:
    """Mean Dice over pieces of images, an empty mask that is right counts 1."""
    write_pieces(options.data, root, seed)
    scores = {}
    for number, text in enumerate(("", "--presence 0.5", "--positives 0.5")):
        out, bare = root / str(number), root / f"bare{number}"
        train(root / "train", out, options, seed, *text.split())
        trained = load_model(out / "model.pt", "cpu")
        config = replace(trained.config, presence_levels=(), presence_areas=(), plans=())
        bare.mkdir()
        save_model(bare / "model.pt", trained._replace(config=config))
        for tuned, model in (("threshold and area", bare), ("tuned", out)):
            value = score(model, root / "test", "mean", "Dice")
            scores[f"{text} {tuned}".strip()] = value
    return scores


def flags(root: Path, options: argparse.Namespace, seed: int) -> Scores:
    """MaxF of KITTI Road, else mean Dice: with the default settings, then with each of --flags."""
    peers.write_split(options.data, root, seed)
    names = ("image", "all", "MaxF") if "kitti" in options.data else ("mean", "Dice")
    scores = {}
    for number, text in enumerate(["", *options.flags]):
        train(root / "train", root / str(number), options, seed, *shlex.split(text))
        test = root / "test" / "training"
        scores[text or "default"] = score(root / str(number), test, *names)
    return scores


def write_pieces(data: str, root: Path, seed: int) -> None:
    """Cut the images of a folder into pieces: root/train and root/test, images/ and masks/."""
    folder, _, foreground = data.partition(":")
    reading = {"foreground": foreground, "classes": "one"} if foreground else {}
    collection = find_samples(folder, training=True, **reading)
    samples = scan(collection.samples, collection.classes)
    held_out = assign_folds(samples, 5, seed).fold == 0
    random = np.random.default_rng(0)
    for name, part in (("train", samples[~held_out]), ("test", samples[held_out])):
        pieces = [piece for row in part.itertuples() for piece in pieces_of(row)]
        filled = [piece for piece in pieces if piece[2].any()]
        bare = [piece for piece in pieces if not piece[2].any()]
        count = min(len(bare), round(len(filled) * EMPTY / (1 - EMPTY)))
        chosen = random.choice(len(bare), count, replace=False)
        for stem, image, mask in [*filled, *(bare[index] for index in chosen)]:
            for kind, pixels in (("images", image), ("masks", 255 * mask)):
                (root / name / kind).mkdir(parents=True, exist_ok=True)
                write_image(root / name / kind / f"{stem}.png", pixels)


def pieces_of(row: object) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, image and mask of the pieces of a sample; ignored pixels are background."""
    image, mask = read_sample(row)
    height, width = (length // PIECES for length in image.shape[:2])
    pieces = []
    for y in range(PIECES):
        for x in range(PIECES):
            place = (slice(y * height, (y + 1) * height), slice(x * width, (x + 1) * width))
            target = (mask[0][place] == 1).astype(np.uint8)
            pieces.append((f"{row.id}_{y}_{x}", image[place], target))
    return pieces


MOVES: dict[str, Callable[..., Scores]] = {
    "pseudo": pseudo,
    "init": init,
    "empty": empty,
    "flags": flags,
}


def main() -> None:
    """Print a row for each seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("move", choices=MOVES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--flags", nargs="+", default=[], help="flags: of train.py, to try")
    parser.add_argument("--start", help="init: the data that the first model is trained on")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--start_minutes", type=float, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder", default="resnet34")
    parser.add_argument("--weights", default="imagenet")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.start:
            data, _, foreground = options.start.partition(":")
            options.start_model = Path(folder) / "start"
            flags = ("--foreground", foreground, "--classes", "one") if foreground else ()
            minutes = argparse.Namespace(**vars(options) | {"minutes": options.start_minutes})
            train(Path(data), options.start_model, minutes, 0, *flags)
        rows = {}
        for seed in options.seeds:
            root = Path(folder) / str(seed)
            root.mkdir()
            with contextlib.redirect_stdout(sys.stderr):
                rows[f"seed {seed}"] = MOVES[options.move](root, options, seed)
            print(pd.DataFrame(rows).T.round(2).to_string(), flush=True)
    print(pd.DataFrame(rows).T.mean().round(2).to_string())


if __name__ == "__main__":
    main()
