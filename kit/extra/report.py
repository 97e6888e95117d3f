"""report.html: one file without a network that shows what was understood, curves, scores, images.

Each image lies in it reduced: as JPEG, and for each class a grey PNG with its probability, the
ground truth and the mask one below the other. So a browser redraws masks and errors for any
threshold. `viewer.py` has the script.
"""

import base64
import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from kit.config import IGNORE, TUNED, ModelConfig
from kit.data.classes import class_colours, is_background
from kit.data.images import encode_image
from kit.data.readers import in_parallel
from kit.extra.viewer import SCRIPT
from kit.files import write_file
from kit.results.metrics import mask_scores
from kit.results.predict import describe_masks, level_of, postprocess
from kit.results.tuning import Prediction, gain_of

TOTAL = 13_000_000  # bytes of all images before base64, which adds a third: the file is below 20 MB
MOST = 1000  # images in a report, evenly chosen of more
ONE = 120_000  # bytes of an image at most, where there are few
LONGEST = 800  # pixels of an image along its longer side, at most
FAINT = 13  # of 255: a class that is nowhere as probable, nor in a mask, has no layer


class Report:
    """Collects images in any order, from several threads, and writes report.html."""

    def __init__(self, config: ModelConfig, count: int) -> None:
        """`config`: with the thresholds that are used; `count`: of all images that will come."""
        self.config, self.count = config, count
        self.every = max(1.0, count / MOST)
        self.budget = min(ONE, TOTAL // max(1, min(count, MOST)))
        self.items: dict[str, dict[str, Any]] = {}

    def takes(self, place: int) -> bool:
        """Whether the image at this place among all is to be added."""
        return int(place % self.every) == 0

    def add(
        self,
        sample: Any,
        picture: np.ndarray,
        prediction: np.ndarray | None,
        mask: np.ndarray,
        ground_truth: np.ndarray | None,
    ) -> None:
        """Add an image (h, w, 3) RGB uint8, which may be reduced, with its masks.

        `prediction`: see `predict.to_prediction`, or None where only the mask is left; `mask` and
        `ground_truth` as in `visualize.comparison`. Their pixels are picked, not averaged, so that
        the errors keep their share; a line of a pixel's width is dotted.
        """
        count, exclusive = len(self.config.class_names), self.config.exclusive
        masks = planes_of(mask)
        targets = np.full_like(masks, IGNORE) if ground_truth is None else planes_of(ground_truth)
        levels = np.zeros_like(masks) if prediction is None else prediction[int(exclusive) :]
        layers = list(zip(levels, targets, masks, strict=True))
        shown = [k for k, layer in enumerate(layers) if exclusive or is_seen(*layer)] or [0]
        chosen = [layers[k] for k in shown]
        pngs = fit(layer_png, chosen, 0.55 * self.budget, 0.2)
        (jpeg,) = fit(photo_jpeg, [(picture,)], 0.45 * self.budget, 0.35)
        self.items[str(sample.id)] = {
            "id": str(sample.id),
            "of": str(sample.image_id),
            "height": masks.shape[1],
            "width": masks.shape[2],
            "image": as_text(jpeg),
            "layers": [[k, as_text(png)] for k, png in zip(shown, pngs, strict=True)],
            "probability": prediction is not None,
            "found": shares(masks, count, exclusive),
            "truth": None if ground_truth is None else shares(targets, count, exclusive),
        }

    def write(self, out: Path, title: str, facts: list[str], settings: dict[str, Any]) -> None:
        """Write report.html, with the scores and curves of the files that are in `out`.

        `facts`: sentences about the data; `settings`: {name: value}, and "why": {name: reason}.
        """
        config, items = self.config, sorted(self.items.values(), key=lambda item: item["id"])
        why = dict(settings.get("why", {}))
        facts = [*(why.pop(name) for name in ("data", "fold") if name in why), *facts]
        content = {
            "title": title,
            "subtitle": f"{datetime.now():%Y-%m-%d %H:%M} · {config.describe()}",
            "facts": [*facts, f"masks: {describe_masks(config)}"],
            "reasons": [[name, in_words(settings.get(name)), why[name]] for name in why],
            "settings": [[name, in_words(settings[name])] for name in settings if name != "why"],
            "classes": describe_classes(config.class_names),
            "exclusive": config.exclusive,
            "thresholds": config.thresholds,
            "levels": [level_of(threshold) for threshold in config.thresholds],
            "notes": notes(config),
            "chosen": f", evenly chosen of {self.count}" if self.every > 1 else "",
            "curves": read_curves(out),
            "numbers": [],
            "tables": [],
            "images": items,
        }
        if any(item["truth"] for item in items):
            table = read_scores(out, settings.get("empty_score", "1"))
            scores = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
            add_scores(items, table, config.class_names)
            content |= {"numbers": numbers(table, scores), "tables": tables(table, scores)}
        text = json.dumps(content).replace("<", "\\u003c")  # nothing in it ends the script
        write_file(out / "report.html", PAGE.replace("__DATA__", text))
        print(f"look at {out / 'report.html'}", flush=True)


def report_training(out: Path, predictions: list[Prediction]) -> None:
    """Write the report of a training, or of all its folds, from the files in `out`."""
    if not predictions:
        return
    folds = sorted(out.glob("fold*/config.json"))
    settings = json.loads((folds or [out / "config.json"])[0].read_text(encoding="utf-8"))
    tuned = {name: tuple(settings[name]) for name in TUNED}
    report = Report(replace(predictions[0].config, **tuned), len(predictions))

    def add(prediction: Prediction) -> None:
        planes, target = prediction.planes, prediction.ground_truth
        mask = postprocess(planes, report.config)
        report.add(prediction.sample, prediction.image, planes, mask, target)

    taken = [item for place, item in enumerate(predictions) if report.takes(place)]
    in_parallel(add, taken, "report")
    facts = [f"{len(folds)} folds, each predicted by a model that was not trained on it"]
    report.write(out, f"Training {out.resolve().name}", facts if folds else [], settings)


# --------------------------------------------------------------------------------------------------
#  Images
# --------------------------------------------------------------------------------------------------


def planes_of(mask: np.ndarray) -> np.ndarray:
    """Planes (K, h, w) uint8; of a label map one."""
    return mask.reshape(-1, *mask.shape[-2:]).astype(np.uint8)


def is_seen(levels: np.ndarray, target: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a class's probability, ground truth and mask show anything."""
    return bool(levels.max() >= FAINT or (target == 1).any() or mask.any())


def shares(planes: np.ndarray, count: int, exclusive: bool) -> list[float]:
    """The share of each class in percent, of planes, or of a label map as a plane."""
    if exclusive:
        pixels = np.bincount(planes.ravel(), minlength=count)[:count]
    else:
        pixels = np.array([np.count_nonzero(plane == 1) for plane in planes])
    return (100 * pixels / planes[0].size).round(2).tolist()


def layer_png(planes: tuple[np.ndarray, ...], scale: float) -> bytes:
    """Planes (h, w) uint8, reduced by the nearest pixel, one below the other as PNG."""
    small = [resized(plane, scale, cv2.INTER_NEAREST_EXACT) for plane in planes]
    return encode_image(np.vstack(small), ".png")


def photo_jpeg(planes: tuple[np.ndarray], scale: float) -> bytes:
    """An image (h, w, 3) RGB uint8, reduced, as JPEG."""
    bgr = cv2.cvtColor(resized(*planes, scale, cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def resized(pixels: np.ndarray, scale: float, method: int) -> np.ndarray:
    """Pixels (h, w) or (h, w, 3), resized by OpenCV's method."""
    size = [max(1, round(scale * length)) for length in pixels.shape[1::-1]]
    return cv2.resize(pixels, size, interpolation=method)


def fit(
    encode: Callable[[Any, float], bytes], layers: list[Any], budget: float, each: float
) -> list[bytes]:
    """What `encode` makes of the layers at one scale, up to 1, together within a budget of bytes.

    `each`: the bytes of a pixel, about.
    """
    height, width = layers[0][0].shape[:2]
    scale = math.sqrt(budget / (each * len(layers) * height * width))
    scale = min(1.0, LONGEST / max(height, width), scale)
    while True:
        contents = [encode(layer, scale) for layer in layers]
        size = sum(map(len, contents))
        if size <= budget or scale * max(height, width) < 16:
            return contents
        scale *= max(0.3, 0.95 * math.sqrt(budget / size))


def as_text(content: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(content).decode()


# --------------------------------------------------------------------------------------------------
#  Words
# --------------------------------------------------------------------------------------------------


def in_words(value: Any) -> str:
    """A setting's value."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def describe_classes(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Name and colour of each class; the background has none."""
    colours = zip(names, class_colours(names).tolist(), strict=True)
    return [{"name": n, "colour": rgb, "background": is_background(n)} for n, rgb in colours]


def notes(config: ModelConfig) -> list[str]:
    """What is said about the masks as they were written, and about another threshold."""
    if config.exclusive:
        return ["a pixel has its most probable class: there is no threshold", ""]
    cleaned = any(config.areas) or any(config.plans) or config.presence_levels
    return ["", "another threshold: the masks are not cleaned" if cleaned else ""]


def read_curves(out: Path) -> list[list[dict[str, float | None]]]:
    """The rows of metrics.csv, of each fold where there are several."""
    paths = sorted(out.glob("fold*/metrics.csv")) or out.glob("metrics.csv")
    return [json.loads(pd.read_csv(path).to_json(orient="records")) for path in paths]


# --------------------------------------------------------------------------------------------------
#  Scores
# --------------------------------------------------------------------------------------------------

POOLED = ("mIoU", "accuracy", "MaxF", "AP", "PRE", "REC")  # shown large, where there are any


def read_scores(out: Path, empty_score: str) -> pd.DataFrame:
    """scores.csv, with the Dice and IoU of each image and class in percent."""
    texts = {"id": str, "class": str}
    table = pd.read_csv(out / "scores.csv", dtype=texts, keep_default_na=False)
    hits = table[["tp", "fp", "fn"]].to_numpy(float).T
    table[["Dice", "IoU"]] = 100 * mask_scores(hits, empty_score)
    return table


def add_scores(items: list[dict[str, Any]], table: pd.DataFrame, names: tuple[str, ...]) -> None:
    """Give each item "scores", the Dice of its classes; of several None where one is absent.

    `table`: see `read_scores`, which lacks what is ignored.
    """
    if len(names) > 1:
        table = table[table[["tp", "fp", "fn"]].any(axis=1)]
    dice = table.dropna().set_index(["id", "class"]).Dice.round(2).to_dict()
    for item in items:
        item["scores"] = [dice.get((item["of"], name)) for name in names]


def with_error(values: pd.Series) -> list[str]:
    """The mean over images and its standard error, "" where they are too few to tell."""
    values = values.dropna().to_numpy()
    mean, error = gain_of(values, np.zeros(len(values)))
    return [f"{mean:.2f}", f"{error:.2f}" if math.isfinite(error) else ""]


def numbers(table: pd.DataFrame, scores: dict[str, Any]) -> list[list[str]]:
    """[name, value, standard error, note] of what metrics.json and `read_scores` have."""
    own = scores.get("metric")
    found = [[own["name"], f"{own['score']:.6g}", "", "of --metric"]] if own else []
    images = table.groupby("id")[["Dice", "IoU"]].mean()
    note = "% over images"
    for name, value in scores["mean"].items():
        found.append([name, f"{value:.2f}", with_error(images[name])[1], note])
    pooled, note = scores["image"]["all"], "% over pixels"
    return found + [[name, f"{pooled[name]:.2f}", "", note] for name in POOLED if name in pooled]


def tables(table: pd.DataFrame, scores: dict[str, Any]) -> list[list[Any]]:
    """[title, {"columns", "rows"}, note]: of classes over images, then of all over pixels."""
    found = []
    parts = list(table.groupby("class", sort=False))
    if len(parts) > 1:
        rows = [[n, *with_error(p.Dice), *with_error(p.IoU), str(len(p))] for n, p in parts]
        columns = ["", "Dice", "±", "IoU", "±", "images"]
        note = "percent, with the standard error; where a class is rightly absent, see empty_score"
        found.append(["Classes, mean over images", {"columns": columns, "rows": rows}, note])
    views = {n: block for n, block in scores.items() if isinstance(block, dict) and "all" in block}
    blocks = {
        f"{n} {category}": block[category] for n, block in views.items() for category in block
    }
    classes = scores.get("classes", {}).get("per_class", {})
    for measures in (blocks if len(blocks) > 1 or not classes else {}, classes):
        if measures:
            frame = pd.DataFrame(measures).T.drop(columns=["threshold", "images"], errors="ignore")
            cells = frame.map("{:.2f}".format).replace("nan", "").reset_index()
            content = {"columns": ["", *frame.columns], "rows": cells.to_numpy().tolist()}
            found.append(["All pixels together", content, "percent"])
    return found


# --------------------------------------------------------------------------------------------------
#  Page
# --------------------------------------------------------------------------------------------------

STYLE = r"""
:root { color-scheme: light dark; --bg: #f4f5f7; --card: #fff; --text: #1c2024; --dim: #667080;
  --line: #dfe3e8; --accent: #2563c9; --chip: #e9edf3; --dark: #0d0f12 }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --card: #1d2126; --text: #e6e9ed;
  --dim: #98a2b0; --line: #31373f; --accent: #78a9ff; --chip: #2a3038 } }
* { box-sizing: border-box }
[hidden] { display: none !important }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1500px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 15px; margin: 0 0 10px }
p { margin: 4px 0; overflow-wrap: anywhere }
.dim { color: var(--dim) }
.row { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 14px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; min-width: 0 }
.row > .card { flex: 1 1 400px }
.numbers { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 16px }
.number { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 16px; min-width: 120px }
.number b { display: block; font-size: 24px; line-height: 1.2; font-weight: 600 }
.number small { font-size: 13px; font-weight: 400; color: var(--dim) }
.scroll { overflow: auto; max-height: 420px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 3px 14px 3px 0; text-align: right; white-space: nowrap; font-weight: 400 }
th { color: var(--dim) }
td:first-child, th:first-child { text-align: left }
.settings td { text-align: left; vertical-align: top; white-space: normal }
.settings td:nth-child(2) { overflow-wrap: anywhere; min-width: 60px; max-width: 460px }
summary { cursor: pointer; color: var(--accent); margin-top: 6px }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--dim); font-size: 12px }
svg .axis { stroke: var(--line) }
.legend span { display: inline-block; margin-right: 14px }
i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px;
  border: 1px solid rgba(128, 128, 128, .5) }
.bar { position: sticky; top: 0; z-index: 2; background: var(--bg); padding: 12px 0 10px;
  margin-top: 22px; border-bottom: 1px solid var(--line) }
.tools { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center }
#home { margin-top: 8px }
button, select, input[type=search] { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 7px; padding: 3px 10px; cursor: pointer;
  min-width: 0; max-width: 100% }
button:hover { border-color: var(--accent) }
button[aria-pressed=true] { background: var(--chip); border-color: var(--accent) }
.group { display: inline-flex; flex-wrap: wrap; gap: 4px; align-items: center; max-width: 100% }
.classes { max-height: 76px; overflow: auto }
.classes button[aria-pressed=false] { opacity: .45; text-decoration: line-through }
input[type=range] { width: 190px; max-width: 45vw; accent-color: var(--accent) }
output { font-variant-numeric: tabular-nums }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 12px;
  margin-top: 14px }
.thumb { padding: 0; border-radius: 9px; overflow: hidden; text-align: left; display: flex;
  flex-direction: column }
.thumb .label { padding: 5px 9px 7px; width: 100%; font-size: 13px }
.thumb .dim { font-size: 12px }
.thumb .label div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.thumb .pic { aspect-ratio: var(--ratio, 1.4) }
.pic { position: relative; background: var(--dark); display: flex; width: 100% }
.pic .fit { position: relative; margin: auto; max-width: 100%; max-height: 100% }
.pic img, .pic canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block }
.pic canvas { image-rendering: pixelated }
.grey img { filter: grayscale(1) }
dialog { width: 100vw; height: 100vh; max-width: none; max-height: none; border: 0; padding: 0;
  background: var(--bg); color: inherit; overflow: auto }
dialog header { padding: 10px 16px; display: flex; flex-wrap: wrap; gap: 8px 16px;
  align-items: center; border-bottom: 1px solid var(--line); background: var(--card) }
dialog h2 { margin: 0; overflow-wrap: anywhere }
dialog .tools { padding: 0 16px; margin-top: 10px }
.panels { display: grid; gap: 10px; padding: 12px 16px; justify-content: center }
.panel { min-width: 0; cursor: zoom-in }
.panel .caption { display: flex; gap: 0 12px; height: 24px; overflow: hidden;
  white-space: nowrap }
.panel .fit { width: 100%; border-radius: 6px; overflow: hidden }
.panel .pic { background: none }
.ramp { width: 80px; height: 10px; border-radius: 3px; align-self: center }
.push { margin-left: auto }
@media (max-width: 900px) { #about { order: 1; flex-basis: 100% } }
"""

MARKUP = r"""
<main>
<h1></h1><p class="dim" id="when"></p>
<div class="numbers" id="numbers"></div>
<div class="row" id="cards"></div>
<div class="bar"><div class="tools"><h2 style="margin:0" id="count"></h2>
<span class="group">sort by <select id="sort" aria-label="sort by"></select>
<button id="order" title="the other way round"></button></span>
<input type="search" id="filter" placeholder="part of a name" aria-label="part of a name">
<span class="group" id="views"></span></div>
<div id="home"><div class="tools" id="controls">
<span class="group" id="threshold">threshold <input type="range" id="level" min="1" max="255"
aria-label="threshold"> <output id="value"></output>
<button id="tuned" title="back to the masks as written">as tuned</button></span>
<span class="dim" id="note"></span>
<span class="group classes" id="classes"></span></div></div></div>
<div class="grid" id="grid"></div>
</main>
<dialog><header><h2></h2><span class="dim" id="about"></span><span class="group push">
<button id="previous" title="previous (arrow left)">&#8592;</button>
<button id="next" title="next (arrow right)">&#8594;</button>
<button id="close" title="close (Escape)">&#10005;</button></span></header>
<div id="away"></div><div class="panels"></div></dialog>
<noscript>This report needs JavaScript; it asks nothing of a network.</noscript>
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Report</title>
<style>{STYLE}</style>
</head>
<body>{MARKUP}
<script type="application/json" id="data">__DATA__</script>
<script>{SCRIPT}</script>
</body>
</html>
"""
