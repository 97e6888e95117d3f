"""Draw synthetic road scenes, train on them, predict others: the whole kit in three minutes.

It needs no data and no account.

    python tools/demo.py            # writes demo/data, demo/out, demo/predictions
    python tools/demo.py FOLDER

The scenes are drawn, not photographed: they show that the kit works, not how well it does on real
roads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's root

from kit.data.images import write_image

TRAINING, TESTING = 60, 6  # scenes
MINUTES = 2.6  # of training
SIZES = ((375, 1242), (370, 1226), (376, 1241), (374, 1238))  # those of KITTI Road, (height, width)
FOCAL, HORIZON, CAMERA_HEIGHT = 721.5, 172.9, 1.65  # KITTI's camera: pixels, pixels, metres
# metres: two lanes, many lanes, unmarked
WIDTHS = {"um": (6.4, 8.0), "umm": (11.0, 14.5), "uu": (4.8, 6.2)}

# --------------------------------------------------------------------------------------------------
#  Scene: a ground in perspective, objects on it, and the ground truth of both
# --------------------------------------------------------------------------------------------------


class Scene:
    """One road: `image` (h, w, 3) float32 RGB 0..255, `road`, `lane`, `evaluated` (h, w) bool."""

    def __init__(self, category: str, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.category, self.rng, self.size = category, rng, size
        h, w = size
        self.centre = w / 2 - 11.0
        v, u = np.mgrid[0:h, 0:w].astype(np.float32)
        below = np.maximum(v - HORIZON, 0.4)
        # metres ahead of the camera, at each pixel's ground point
        self.z = FOCAL * CAMERA_HEIGHT / below
        self.x = (u - self.centre) * self.z / FOCAL  # metres to the right
        self.ground = v > HORIZON + 0.4
        self.half = rng.uniform(*WIDTHS[category]) / 2
        lanes = {"um": 2, "umm": int(self.half * 2 // 3.4), "uu": 1}[category]
        self.lane_width = 2 * self.half / lanes
        own = lanes - 1 if category != "umm" else int(rng.integers(lanes // 2, lanes))
        # of the road's centre
        self.offset = self.half - (own + 0.5) * self.lane_width + rng.uniform(-0.3, 0.3)
        self.slope, self.curve = rng.uniform(-0.03, 0.03), rng.uniform(-1, 1) * 1.6e-3
        self.light = rng.uniform(0.75, 1.15)
        self.image = np.zeros((h, w, 3), np.float32)
        self.grain = self.clouds(4) + self.clouds(11)  # of walls and leaves
        self.distance = self.x - self.axis(self.z)  # metres from the road's centre line
        self.road = self.ground & (np.abs(self.distance) < self.half)
        self.lane = self.road & (self.distance > self.half - self.lane_width)
        self.evaluated = np.ones(size, bool)
        self.sky()
        self.land()
        if category != "uu":
            self.marks(lanes)
        self.shadows()
        haze = np.clip((self.z - 25) / 160, 0, 0.45)[..., None] * self.ground[..., None]
        self.image = self.image * (1 - haze) + 205 * haze
        self.objects()
        self.camera()

    def axis(self, z: np.ndarray | float) -> np.ndarray | float:
        """The road's centre line: metres to the right at `z` metres ahead."""
        bend = np.minimum(z, 70)  # straight on from there
        return self.offset + self.slope * z + self.curve * bend * (z - bend / 2)

    def noise(self, cell: float, stretch: float = 1.0) -> np.ndarray:
        """Smooth noise (h, w) around 0 on the ground, `cell` metres wide: finer far away."""
        tile = self.rng.standard_normal((256, 256)).astype(np.float32)
        where = (self.x / cell) % 256, (self.z / (cell * stretch)) % 256
        return cv2.remap(tile, *where, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)

    def clouds(self, scale: int) -> np.ndarray:
        """Smooth noise (h, w) around 0 in the image plane, `scale` pixels wide."""
        h, w = self.size
        coarse = self.rng.standard_normal((h // scale + 2, w // scale + 2)).astype(np.float32)
        return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)

    def paint(self, mask: np.ndarray, colour: tuple, grain: np.ndarray | float = 0.0) -> None:
        """Fill a mask with a colour and a grain that lightens and darkens it."""
        change = grain[mask][:, None] if isinstance(grain, np.ndarray) else grain
        self.image[mask] = np.float32(colour) + change

    def sky(self) -> None:
        height = np.clip(np.arange(self.size[0]) / HORIZON, 0, 1)[:, None, None].astype(np.float32)
        blue = np.float32(self.rng.choice([(120, 165, 225), (190, 205, 220), (225, 230, 235)]))
        self.image[:] = blue * (1 - height) + np.float32((245, 246, 248)) * height
        self.image += np.maximum(self.clouds(90) + 0.6 * self.clouds(35), 0)[..., None] * 18
        hills = HORIZON - 14 - 12 * np.abs(self.clouds(120)[0]) - 5 * np.abs(self.clouds(14)[1])
        far = np.arange(self.size[0])[:, None] > hills
        colour = self.rng.choice([(70, 88, 62), (88, 96, 92), (60, 74, 56)])
        self.paint(far, colour, 9 * self.clouds(6))

    def land(self) -> None:
        """Grass or dry earth, a verge or pavement with its kerb, and the road."""
        d, edge, rng = self.distance, self.half, self.rng
        fade = np.clip(18 / self.z, 0.15, 1)
        fine, coarse = self.noise(0.04) * fade, self.noise(0.6, 2)
        grass = rng.choice([(92, 118, 58), (120, 128, 72), (146, 132, 96), (84, 104, 62)])
        self.paint(self.ground, grass, 16 * fine + 9 * coarse)
        verge = [rng.uniform(0.4, 3.0), rng.uniform(0.4, 3.0)]
        for side, width in zip((d < 0, d >= 0), verge, strict=True):
            strip = self.ground & side & (np.abs(d) < edge + width)
            pavement = rng.choice([(150, 146, 138), (168, 158, 140), (128, 122, 112)])
            self.paint(strip, pavement, 12 * fine + 5 * coarse)
            kerb = strip & (np.abs(d) < edge + 0.18)
            stone = rng.choice([(182, 180, 174), (110, 106, 100), (150, 146, 140)])
            self.paint(kerb, stone, 8 * fine)
        if rng.random() < 0.3:  # a bay of the road's asphalt: ambiguous, so not evaluated
            near = rng.uniform(9, 22)
            ahead = (self.z > near) & (self.z < near + 9)
            bay = self.ground & (d > edge) & (d < edge + 2.4) & ahead
            self.evaluated[bay] = False
        asphalt = np.float32(rng.uniform(86, 132)) + np.float32((0, 1, 4)) * rng.uniform(-1, 1.5)
        # where wheels have worn it
        tracks = -5 * np.cos(2 * np.pi * (d + edge) / self.lane_width * 2)
        grain = 8 * fine + 5 * coarse + 4 * self.noise(2.5, 6) + tracks
        self.paint(self.road | ~self.evaluated, asphalt, grain)
        for _ in range(int(rng.integers(0, 4))):  # seams and patches
            a, z = rng.uniform(-edge, edge), rng.uniform(6, 35)
            if rng.random() < 0.5:
                repair = np.abs(d - a) < 0.05
            else:
                repair = (np.abs(d - a) < 0.8) & (np.abs(self.z - z) < 2)
            self.image[self.road & repair] *= rng.uniform(0.75, 0.9)

    def marks(self, lanes: int) -> None:
        """Dashed lines between the lanes, solid ones at the edges, worn here and there."""
        worn = np.clip(0.75 + 0.25 * self.noise(0.3), 0.2, 0.95)[..., None]
        phase, length = self.rng.uniform(0, 9), self.rng.choice([3.0, 4.0, 6.0])
        half_width = np.maximum(0.07, 0.35 * self.z / FOCAL)  # never thinner than a pixel
        for number in range(lanes + 1):
            outer = number in (0, lanes)
            inwards = {0: 0.25, lanes: -0.25}.get(number, 0)
            at = -self.half + number * self.lane_width + inwards
            line = self.road & (np.abs(self.distance - at) < half_width) & (self.z < 80)
            if not outer:
                line &= (self.z + phase) % (2.5 * length) < length
            elif self.rng.random() < 0.3:
                continue
            paint = self.image * (1 - worn) + np.float32((232, 232, 226)) * worn
            self.image[line] = paint[line]

    def shadows(self) -> None:
        """Of trees (blotches) and of houses (bars) from one side over the road."""
        dark = np.ones(self.size, np.float32)
        for _ in range(int(self.rng.integers(0, 4))):
            start, depth = self.rng.uniform(6, 40), self.rng.uniform(1, 7)
            skew, reach = self.rng.uniform(-0.4, 0.4), self.rng.uniform(-3, self.half + 3)
            along = self.z + skew * self.x
            band = (along > start) & (along < start + depth) & (self.distance < reach)
            dark[self.ground & band] = 0.5
        if self.rng.random() < 0.5:
            leaves = self.noise(0.9) + 0.6 * self.noise(0.35) > 1.0
            dark[self.ground & leaves & (self.distance > -1)] = 0.55
        self.image *= cv2.GaussianBlur(dark, (0, 0), 1.5)[..., None]

    # --- Objects on the ground, from far to near ---

    def at(self, x: float, z: float, up: float = 0.0) -> tuple[int, int]:
        """The pixel (u, v) of a point `x` metres right, `z` ahead, `up` above the ground."""
        return round(self.centre + FOCAL * x / z), round(HORIZON + FOCAL * (CAMERA_HEIGHT - up) / z)

    def solid(self, points: list[tuple[int, int]], colour: tuple, grain: float = 0.0) -> None:
        """A filled polygon. It hides the road behind it."""
        cover = np.zeros(self.size, np.uint8)
        cv2.fillPoly(cover, [np.int32(points)], 1)
        self.hide(cover > 0, colour, grain)

    def hide(self, cover: np.ndarray, colour: tuple, grain: float) -> None:
        self.paint(cover, colour, grain * self.grain if grain else 0.0)
        self.road &= ~cover
        self.lane &= ~cover
        self.evaluated |= cover

    def objects(self) -> None:
        rng, todo = self.rng, []
        for side in (-1, 1):
            kind = rng.choice(["trees", "houses", "mixed", "open"])
            z = rng.uniform(8, 14)
            while z < 85 and kind != "open":
                away = self.half + rng.uniform(3.5, 8)
                is_tree = kind == "trees" or (kind == "mixed" and rng.random() < 0.6)
                draw = self.tree if is_tree else self.house
                todo.append((z, draw, side * away, side))
                z += rng.uniform(4, 14)
        for _ in range(int(rng.integers(0, 4))):
            lanes = max(1, round(2 * self.half / self.lane_width))
            lane = (rng.integers(0, lanes) + 0.5) * self.lane_width
            z = rng.uniform(7, 55)
            todo.append((z, self.car, lane - self.half + rng.uniform(-0.3, 0.3), 0))
        for z, draw, away, side in sorted(todo, key=lambda entry: -entry[0]):
            draw(self.axis(z) + away, z, side)

    def tree(self, x: float, z: float, _: int) -> None:
        tall, wide = self.rng.uniform(4, 9), self.rng.uniform(1.2, 2.8)
        outline = ((-0.15, 0), (0.15, 0), (0.12, tall / 2), (-0.12, tall / 2))
        self.solid([self.at(x + dx, z, up) for dx, up in outline], (72, 58, 44), 6)
        crown, green = np.zeros(self.size, np.uint8), self.rng.uniform(0.6, 1.2)
        for _ in range(12):
            u, v = self.at(x + self.rng.normal(0, wide / 2), z, tall * self.rng.uniform(0.45, 1.0))
            radius = max(2, int(FOCAL * wide * self.rng.uniform(0.25, 0.5) / z))
            cv2.circle(crown, (u, v), radius, 1, -1)
        self.hide(crown > 0, np.float32((62, 84, 44)) * green, 12)

    def house(self, x: float, z: float, side: int) -> None:
        deep, tall = self.rng.uniform(5, 9), self.rng.uniform(3, 9)
        wide = side * self.rng.uniform(6, 14)
        wall = self.rng.choice([(178, 162, 140), (150, 120, 104), (196, 192, 184), (128, 124, 122)])
        front = ((x, 0), (x + wide, 0), (x + wide, tall), (x, tall))
        self.solid([self.at(c, z, up) for c, up in front], wall, 5)
        along = [(z, 0), (z + deep, 0), (z + deep, tall), (z, tall)]
        self.solid([self.at(x, far, up) for far, up in along], np.float32(wall) * 0.7, 4)
        for floor in np.arange(1.0, tall - 1.2, 2.7):
            for step in np.arange(0.8, abs(wide) - 1.2, 2.2):
                a, b = x + np.sign(wide) * step, x + np.sign(wide) * (step + 1.0)
                corners = ((a, 0), (b, 0), (b, 1.3), (a, 1.3))
                self.solid([self.at(c, z, floor + up) for c, up in corners], (62, 70, 82))

    def car(self, x: float, z: float, _: int) -> None:
        """From behind or in front, with the visible side, and the dark below it, which is road."""
        colours = [(190, 192, 196), (36, 38, 44), (128, 24, 28), (44, 62, 110), (225, 225, 222)]
        colour = self.rng.choice(colours)
        wide, tall, deep = 0.88, self.rng.uniform(1.35, 1.75), 3.9
        under = np.zeros(self.size, np.uint8)
        left, right = self.at(x - 1.1, z)[0], self.at(x + 1.1, z)[0]
        middle, axes = (left + right) // 2, ((right - left) // 2, max(1, int(180 / z)))
        cv2.ellipse(under, (middle, self.at(x, z)[1]), axes, 0, 0, 360, 1, -1)
        self.image[under > 0] *= 0.45
        flank = [(1, 0, 0.25), (1, 1, 0.25), (1, 1, 0.9)]
        flank += [(0.8, 0.75, tall), (0.8, 0, tall), (1, 0, 0.95)]
        side = -wide if x > 0 else wide  # the visible one
        corners = [self.at(x + side * a, z + deep * b, up) for a, b, up in flank]
        self.solid(corners, np.float32(colour) * 0.6)
        body = [(-1, 0.25), (1, 0.25), (1, 0.95), (0.8, tall), (-0.8, tall), (-1, 0.95)]
        self.solid([self.at(x + wide * a, z, up) for a, up in body], colour, 3)
        glass = [(-0.84, 0.95), (0.84, 0.95), (0.7, tall - 0.1), (-0.7, tall - 0.1)]
        self.solid([self.at(x + wide * a, z, up) for a, up in glass], (48, 56, 66))
        for a in (-0.85, 0.85):
            lamp = [(a - 0.1, 0.6), (a + 0.1, 0.6), (a + 0.1, 0.78), (a - 0.1, 0.78)]
            self.solid([self.at(x + wide * b, z, up) for b, up in lamp], (176, 34, 30))
            wheel = [(a - 0.13, 0), (a + 0.13, 0), (a + 0.13, 0.3), (a - 0.13, 0.3)]
            self.solid([self.at(x + wide * b, z, up) for b, up in wheel], (20, 20, 22))

    def camera(self) -> None:
        """Light, contrast, the lens's blur and the sensor's noise."""
        image = (self.image - 110) * self.rng.uniform(0.85, 1.2) + 110
        image = image * self.light * self.rng.uniform(0.95, 1.05, 3).astype(np.float32)
        image = cv2.GaussianBlur(image, (0, 0), 0.7) + self.rng.normal(0, 3.5, image.shape)
        self.image = np.clip(image, 0, 255).astype(np.uint8)


def ground_truth(area: np.ndarray, evaluated: np.ndarray) -> np.ndarray:
    """KITTI's code as (h, w, 3) uint8 RGB: magenta road, red not road, black not evaluated."""
    blue = (area & evaluated) * 255
    return np.dstack([evaluated * 255, np.zeros(area.shape), blue]).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
#  Files: KITTI Road's layout
# --------------------------------------------------------------------------------------------------


def reduce(pixels: np.ndarray, scale: float, interpolation: int) -> np.ndarray:
    """An image (h, w, 3) uint8 at a smaller scale."""
    size = [round(length * scale) for length in pixels.shape[1::-1]]
    return cv2.resize(pixels, size, interpolation=interpolation) if scale < 1 else pixels


def write_scene(root: Path, split: str, number: int, seed: int, scale: float) -> None:
    """Draw and write one scene, with ground truth (training) and calibration."""
    category, name = ("um", "umm", "uu")[number % 3], f"{number // 3:06d}"
    rng = np.random.default_rng([seed, split == "testing", number])
    scene = Scene(category, SIZES[int(rng.choice(len(SIZES), p=(0.7, 0.17, 0.12, 0.01)))], rng)
    image = reduce(scene.image, scale, cv2.INTER_AREA)
    write_image(root / split / f"image_2/{category}_{name}.png", image)
    areas = {f"{category}_road": scene.road} | ({"um_lane": scene.lane} if category == "um" else {})
    for kind, area in areas.items() if split == "training" else ():
        mask = reduce(ground_truth(area, scene.evaluated), scale, cv2.INTER_NEAREST_EXACT)
        write_image(root / split / f"gt_image_2/{kind}_{name}.png", mask)
    focal, centre, horizon = (scale * length for length in (FOCAL, scene.centre, HORIZON))
    calibration = {
        "P2": [focal, 0, centre, 0, 0, focal, horizon, 0, 0, 0, 1, 0],
        "R0_rect": [1, 0, 0, 0, 1, 0, 0, 0, 1],
        "Tr_cam_to_road": [1, 0, 0, 0, 0, 1, 0, -CAMERA_HEIGHT, 0, 0, 1, 0],
    }
    lines = []
    for key, row in calibration.items():
        lines.append(f"{key}: {' '.join(f'{value:.12e}' for value in row)}\n")
    (root / split / f"calib/{category}_{name}.txt").write_text("".join(lines))


def write_scenes(
    root: Path,
    training: int = TRAINING,
    testing: int = TESTING,
    seed: int = 0,
    scale: float = 1.0,
) -> Path:
    """Write so many scenes, a third of each category. The seed fixes every pixel.

    `scale`: of the images, up to 1; they are drawn at KITTI's size and reduced.
    """
    for folder in ("image_2", "gt_image_2", "calib"):
        (root / "training" / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("image_2", "calib"):
        (root / "testing" / folder).mkdir(parents=True, exist_ok=True)
    scenes = [("training", number) for number in range(training)]
    scenes += [("testing", number) for number in range(testing)]
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(write_scene, root, *scene, seed, scale) for scene in scenes]
        for job in jobs:
            job.result()
    return root


def main(folder: str = "demo") -> None:
    """Draw scenes, train, predict, then say what to look at."""
    root, kit = Path(folder), Path(__file__).parents[1]
    print(f"drawing {TRAINING} training and {TESTING} test scenes (synthetic) ...", flush=True)
    write_scenes(root / "data")

    def run(script: str, *flags: str | Path) -> None:
        print("\n$ python", script, *flags, flush=True)
        if status := subprocess.run([sys.executable, kit / script, *flags]).returncode:
            sys.exit(status)

    data, out, predictions = root / "data", root / "out", root / "predictions"
    fast = ("--encoder", "resnet18", "--encoder_weights", "none", "--augment", "0.5")
    clock = ("--max_minutes", str(MINUTES), "--resume", "none")
    run("train.py", "--data", data, "--out", out, *fast, *clock)
    run("infer.py", "--model", out, "--data", data / "testing", "--out", predictions)
    score = json.loads((out / "metrics.json").read_text())["image"]["all"]["MaxF"]
    print(f"\nMaxF {score:.2f} % on the validation scenes. Open these images:")
    comparisons = sorted((predictions / "comparisons").glob("*.jpg"))[:3]
    for path in (out / "validation.jpg", out / "curves.png", *comparisons):
        print(f"  {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
