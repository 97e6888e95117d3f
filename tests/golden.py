"""Do two checkouts of the kit give the same results? Both train and predict on small drawn data.

    git worktree add ../before HEAD~5
    python tests/golden.py ../before .      # prints what differs; exit status 1 where anything does

Four data sets: KITTI's layout, a csv of run lengths, label maps of exclusive classes, a folder of
masks for each overlapping class. Compared are digests of the weights, masks and probabilities, and
the text of metrics.json, submission.csv and of what train.py and infer.py print (without times).
Digests of floating-point numbers belong to one machine: they are compared, never stored.
"""

import csv
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch

TINY = (
    "--encoder", "timm-mobilenetv3_small_minimal_100", "--encoder_weights", "none", "--epochs", 3,
    "--batch_size", 4, "--height", 64, "--width", 96, "--folds", 3,
)  # fmt: skip


def draw(number, count=2, size=(60, 90)):
    """An image (h, w, 3) and bool masks (count, h, w) of ellipses, of one colour for each class."""
    random = np.random.default_rng(number)
    image = random.normal(60, 15, (*size, 3))
    masks = np.zeros((count, *size), bool)
    for index in range(count):
        y, x = np.mgrid[: size[0], : size[1]]
        centre, radius = random.uniform(0.3, 0.7, 2) * size, random.uniform(0.12, 0.3, 2) * size
        masks[index] = ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 < 1
        masks[index] &= random.random() < 0.9
        image[masks[index], index % 3] += 120
    return image.clip(0, 255).astype(np.uint8), masks


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels if pixels.ndim == 2 else pixels[..., ::-1])


CALIBRATION = """P2: 70 0 45 0 0 70 20 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_cam_to_road: 1 0 0 0 0 1 0 -1.6 0 0 1 0
"""


def kitti(root):
    """um and uu images with coded ground truth and calibrations, and two test images."""
    for number in range(14):
        image, masks = draw(number, 1, (60, 90) if number % 2 else (58, 88))
        folder, kind = (
            ("training", "um" if number % 2 else "uu") if number < 12 else ("testing", "um")
        )
        write(root / folder / "image_2" / f"{kind}_{number:06}.png", image)
        truth = np.zeros_like(image)
        truth[..., 0] = 255
        truth[:4, :, 0] = 0  # not evaluated
        truth[masks[0], 2] = 255
        if folder == "training":
            write(root / folder / "gt_image_2" / f"{kind}_road_{number:06}.png", truth)
        (root / folder / "calib").mkdir(exist_ok=True)
        (root / folder / "calib" / f"{kind}_{number:06}.txt").write_text(CALIBRATION)


def runs(mask):
    flat = np.r_[0, mask.T.ravel().astype(np.int8), 0]
    edges = np.flatnonzero(np.diff(flat))
    return " ".join(f"{a + 1} {b - a}" for a, b in zip(edges[::2], edges[1::2], strict=True))


def run_lengths(root):
    """train/, train.csv with a row for each object, test/ and sample_submission.csv."""
    rows, sample = [("ImageId", "EncodedPixels")], [("ImageId", "EncodedPixels")]
    for number in range(14):
        image, masks = draw(number)
        write(root / ("train" if number < 11 else "test") / f"c{number}.png", image)
        if number < 11:
            rows += [(f"c{number}", runs(mask)) for mask in (masks[0], masks[1] & ~masks[0])]
        else:
            sample.append((f"c{number}", ""))
    for name, lines in (("train.csv", rows), ("sample_submission.csv", sample)):
        with (root / name).open("w", newline="") as file:
            csv.writer(file).writerows(lines)


def exclusive(root):
    """Label maps of three classes, 255 ignored."""
    for number in range(12):
        image, masks = draw(number)
        labels = np.zeros(masks.shape[1:], np.uint8)
        labels[masks[0]], labels[masks[1]], labels[:3] = 1, 2, 255
        write(root / "images" / f"e{number}.png", image)
        write(root / "labels" / f"e{number}.png", labels)


def overlapping(root):
    """A folder of masks for each of two classes that overlap."""
    for number in range(12):
        image, masks = draw(number)
        write(root / "images" / f"o{number}.png", image)
        for name, mask in zip(("left", "right"), masks, strict=True):
            write(root / "masks" / name / f"o{number}.png", mask.astype(np.uint8) * 255)


CASES = {
    "kitti": (kitti, "", "testing", ("--submission", "kitti", "--bev", "true")),
    "csv": (run_lengths, "", "", ("--submission", "rle")),
    "exclusive": (exclusive, "", "", ("--submission", "png")),
    "overlapping": (overlapping, "", "", ("--submission", "rle")),
}


def digest(content):
    return hashlib.sha256(content).hexdigest()[:12]


def call(kit, script, *flags):
    """What a script prints, without times and without the names of temporary folders."""
    done = subprocess.run(
        [sys.executable, script, *map(str, flags)],
        cwd=kit,
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = re.sub(r"\d+(\.\d+)? s\b|[\d.]+ per second", "TIME", done.stdout)
    return re.sub(r"\S*/golden\w+/", "", text)


def results(kit, name):
    """{what: digest or text} of one data set with one checkout."""
    build, train, test, flags = CASES[name]
    with tempfile.TemporaryDirectory(prefix="golden") as folder:
        data, out = Path(folder, name), Path(folder, "out")
        build(data)
        found = {
            "train.py prints": call(kit, "train.py", "--data", data / train, "--out", out, *TINY)
        }
        for title, place, extra in (("test", test, flags), ("scored", "", ())):
            if title == "scored":
                place = {"kitti": "training", "csv": "train"}.get(name, "")
            to = Path(folder, title)
            extra = (*extra, "--save_probs", "true", "--out", to)
            text = call(kit, "infer.py", "--model", out, "--data", data / place, *extra)
            found[f"infer.py prints, {title}"] = text
            for kind in ("masks", "probs"):
                files = sorted((to / kind).rglob("*.png"))
                pixels = b"".join(cv2.imread(str(f), cv2.IMREAD_UNCHANGED).tobytes() for f in files)
                names = " ".join(str(file.relative_to(to)) for file in files)
                found[f"{kind}, {title}"] = (
                    f"{digest(pixels)} {len(files)} {digest(names.encode())}"
                )
            for path in (*to.glob("*.csv"), *to.glob("*.zip"), *to.glob("metrics.json")):
                zipped = path.suffix == ".zip"
                found[f"{path.name}, {title}"] = (
                    digest(path.read_bytes()) if zipped else path.read_text()
                )
        state = torch.load(out / "model.pt", weights_only=True)["state_dict"]
        found["weights"] = digest(b"".join(tensor.numpy().tobytes() for tensor in state.values()))
        found["metrics.json"] = (out / "metrics.json").read_text()
        found["files"] = " ".join(sorted(path.name for path in out.iterdir()))
    return found


def main(before, after, *names):
    different = 0
    for name in names or CASES:
        old, new = results(before, name), results(after, name)
        for what in old | new:
            if old.get(what) != new.get(what):
                different += 1
                print(f"{name}: {what} differs")
                lines = [str(found.get(what)).splitlines() for found in (old, new)]
                changes = difflib.unified_diff(*lines, "before", "after", n=0, lineterm="")
                print("\n".join(line[:150] for line in list(changes)[2:20]))
        print(
            f"{name}: {json.dumps({k: digest(str(v).encode()) for k, v in new.items()})}",
            flush=True,
        )
    print(f"{different} differences")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
