# SPDX-License-Identifier: Apache-2.0
"""The labelled organs of the abdominal phantom, painted one after the other: the last one keeps a voxel."""

import numpy as np

from .abdomen_body import FAT, Trunk
from .abdomen_shapes import TABLES, Canvas, Varied, inside, rounded

#: Intended Hounsfield units in the portal venous phase, by organ in the order of its number.
HOUNSFIELD: dict[str, float] = TABLES["hounsfield"]
ORGANS = tuple(HOUNSFIELD)
NO_GALLBLADDER = 0.02


def paint_organs(canvas: Canvas, trunk: Trunk, varied: Varied, sex: str) -> None:
    """Paint all organs over the body. ``sex``: ``M`` paints a prostate, ``F`` a uterus."""
    blood = varied.factor(0.06)
    for paint in (_liver, _spleen, _stomach, _kidneys):
        paint(canvas, trunk, varied)
    _tubes(canvas, varied, blood)
    _adrenals(canvas, varied)
    _bladder(canvas, varied)
    _prostate_or_uterus(canvas, varied, sex)


def _number(name: str) -> int:
    return ORGANS.index(name) + 1


def _level(name: str, varied: Varied, spread: float = 4.0) -> float:
    return HOUNSFIELD[name] + varied.normal(spread)


def _liver(canvas: Canvas, trunk: Trunk, varied: Varied) -> None:
    """All that lies under the right dome, above a slanted lower surface and before a slanted back."""
    tip, slope, left = 52.0 + varied.normal(9.0), varied.factor(0.06), 72.0 + varied.normal(11.0)
    box = canvas.grid.box((tip - 20.0, 230.0), (-115.0, 100.0), (-140.0, left + 12.0))
    z, y, x = canvas.axes(box)
    wave = 3.0 * np.sin(x / 21.0 + varied.normal(1.5)) + 3.0 * np.sin(y / 24.0 + varied.normal(1.5))
    under = tip + slope * 0.60 * (x + 118.0) + 0.34 * (y + 20.0) + 0.35 * np.maximum(x - 10.0, 0.0) + wave
    back = np.interp(x, (-90, -62, -46, -20, 20, 60, 90), (80, 46, 14, 2, -14, -40, -52))
    depth = rounded(trunk.cavity(box) - 3.0, trunk.below(box) - 3.0, 6.0)
    depth = rounded(depth, ((z - under) * 0.80).astype(np.float32), 9.0)
    depth = rounded(depth, (0.75 * (back - y)).astype(np.float32), 7.0)
    depth = rounded(depth, (left - x + 0.12 * (y + 60.0)).astype(np.float32), 12.0)
    share = inside(depth, canvas.grid.spacing[2])
    level = _level("liver", varied, 7.0)
    canvas.paint(box, share, level, _number("liver"))
    hub = np.array((188.0, 4.0, -22.0))
    for end in ((150, -5, -100), (150, -50, -62), (165, -52, 10)):
        middle = 0.5 * (hub + end) + varied.shift(4.0, 5.0, 5.0)
        curve = np.array([(*hub, 5.0), (*middle, 4.5), (*end, 3.2)])
        part, depth = canvas.sweep(curve)
        vein = inside(depth, canvas.grid.spacing[2]) * (canvas.organs[part] == _number("liver"))
        canvas.paint(part, vein.astype(np.float32), level + 32.0)


def _spleen(canvas: Canvas, trunk: Trunk, varied: Varied) -> None:
    """A crescent along the left back wall: thickest in the middle, thinning out all around."""
    middle, tall = 150.0 + varied.normal(7.0), 54.0 * varied.factor(0.10)
    thick, wide = 44.0 * varied.factor(0.10), 0.78 * varied.factor(0.10)
    turn = 0.62 + varied.normal(0.08)
    box = canvas.grid.box((middle - tall, middle + tall), (-70.0, 100.0), (30.0, 140.0))
    z, y, x = canvas.axes(box)
    up = (z - middle) / tall
    around = np.arctan2(y, x - 10.0) - turn - 0.25 * up
    bulge = np.sqrt(np.clip(1.0 - up**2 - (around / wide) ** 2, 0.0, None)).astype(np.float32)
    wall = trunk.cavity(box)
    depth = rounded(wall - 4.0, np.float32(thick) * bulge - wall, 4.0)
    canvas.fill(box, rounded(depth, trunk.below(box) - 4.0, 5.0), _level("spleen", varied, 5.0), _number("spleen"))


def _stomach(canvas: Canvas, trunk: Trunk, varied: Varied) -> None:
    """A J from under the left dome to the pylorus; fluid and food with gas above, which lies in front."""
    size, low = varied.factor(0.08), varied.normal(8.0)
    curve = np.array(
        (
            (180, 8, 56, 30 * size),
            (162, -6, 66, 34 * size),
            (128, -36, 68, 28 * size),
            (96 + low, -56, 50, 23 * size),
            (84 + low, -62, 16, 20 * size),
            (94 + 0.5 * low, -54, -14, 15),
            (100, -46, -30, 10),
        )
    )
    curve[:, :3] += varied.shift(4.0, 3.0, 4.0)
    box, depth = canvas.sweep(curve)
    depth = np.minimum(depth, rounded(trunk.below(box) - 4.0, trunk.cavity(box) - 3.0, 4.0))
    number, food = _number("stomach"), _level("stomach", varied, 5.0)
    canvas.fill(box, depth, 78.0, number)
    canvas.fill(box, depth - 3.0, food)
    rows = np.nonzero((depth > 3.0).any(axis=2))[1]
    if len(rows):
        level = float(np.quantile(canvas.grid.y[box[1]][rows], varied.rng.uniform(0.04, 0.30)))
        _, y, _ = canvas.axes(box)
        canvas.fill(box, np.minimum(depth - 3.0, (level - y).astype(np.float32)), -920.0)


def _kidneys(canvas: Canvas, trunk: Trunk, varied: Varied) -> None:
    """Two beans whose upper poles lean to the spine, each with a sinus of fat that opens to the middle."""
    size = varied.factor(0.07)
    level = _level("left kidney", varied, 6.0)
    for side, name, height in ((-1.0, "right kidney", 82.0), (1.0, "left kidney", 92.0)):
        long, deep, wide = np.array((54.0, 26.0, 29.0)) * size * varied.factor(0.03)
        centre = canvas.bend((np.array((height, 28.0, side * 72.0)) + varied.shift(7.0, 3.0, 3.0))[None])[0]
        box = canvas.grid.box(*((c - 1.25 * long, c + 1.25 * long) for c in centre))
        z, y, x = canvas.axes(box)
        up, back, out = z - centre[0], y - centre[1], (x - centre[2]) * side
        lean, nod = 0.22 + varied.normal(0.04), 0.16 + varied.normal(0.04)
        # The hilum looks forward and inwards.
        out, back = out + lean * up, back - nod * up
        out, back = 0.9 * out + 0.42 * back, 0.9 * back - 0.42 * out
        bent = out + 9.0 * (up / long) ** 2 - 3.0
        field = np.sqrt((up / long) ** 2 + (back / deep) ** 2 + (bent / wide) ** 2)
        sinus = np.sqrt((up / (0.40 * long)) ** 2 + (back / 9.0) ** 2 + ((out + wide) / (0.95 * wide)) ** 2)
        depth = np.minimum((1.0 - field) * wide, (sinus - 1.0) * 10.0).astype(np.float32)
        cortex = np.clip((depth - 6.0) / 5.0, 0.0, 1.0)
        fat = np.minimum((1.12 - field) * wide, (1.0 - sinus) * 10.0)
        canvas.fill(box, fat.astype(np.float32), FAT)
        canvas.fill(box, depth, level + 8.0 - 34.0 * cortex, _number(name))
        pelvis = np.sqrt((up / (0.2 * long)) ** 2 + (back / 6.0) ** 2 + ((out + wide) / (0.8 * wide)) ** 2)
        canvas.fill(box, ((1.0 - pelvis) * 6.0).astype(np.float32), 30.0)


def _tubes(canvas: Canvas, varied: Varied, blood: float) -> None:
    """Everything that is a swept ball: bowel, pancreas, vessels, gallbladder, esophagus."""
    for name, tube in TABLES["tubes"].items():
        curve, place = np.array(tube["curve"], np.float64), tube["place"]
        curve[:, :3] += varied.shift(*place) + varied.rng.normal(0.0, 0.25, (len(curve), 3)) * place
        curve[:, 3] *= varied.factor(tube["calibre"])
        level = _level(name, varied) * (blood if tube["blood"] else 1.0)
        if name == "gallbladder" and varied.rng.random() < NO_GALLBLADDER:
            continue
        canvas.fill(*(part := canvas.sweep(curve, tube["squash"])), level, _number(name))
        if name == "duodenum":
            canvas.fill(part[0], part[1] - 4.0, level - 12.0)


def _adrenals(canvas: Canvas, varied: Varied) -> None:
    """Each gland is two plates that meet in front and open to the back, shortest at the top."""
    for side, name, low, apex, ends in (
        (-1.0, "right adrenal gland", 126.0, (15.0, 36.0), ((36.0, 50.0), (37.0, 33.0))),
        (1.0, "left adrenal gland", 120.0, (6.0, 38.0), ((25.0, 54.0), (27.0, 33.0))),
    ):
        lift, back, out = varied.shift(3.0, 1.5, 1.5)
        tall, half = 30.0 * varied.factor(0.07), 3.9 * varied.factor(0.05)
        y, x = apex[0] + back, side * apex[1] + out
        for end_y, end_x in ends:
            reach_y, reach_x = end_y - apex[0], side * (end_x - apex[1])
            levels = tuple(
                (low + lift + part * tall, y, x, y + share * reach_y, x + share * reach_x, half)
                for part, share in ((0.0, 0.75), (0.3, 1.0), (0.7, 0.8), (1.0, 0.2))
            )
            canvas.fill(*canvas.sheet(levels), HOUNSFIELD[name] + 4.0, _number(name))


def _bladder(canvas: Canvas, varied: Varied) -> None:
    full = varied.factor(0.12)
    centre = np.array((-152.0 + 22.0 * (full - 1.0), -34.0, 0.0)) + varied.shift(2.0, 2.0, 2.0)
    box, depth = canvas.ball(centre, (27.0 * full, 28.0 * full, 36.0 * full))
    canvas.fill(box, depth, 48.0, _number("bladder"))
    canvas.fill(box, depth - 2.0, _level("bladder", varied, 2.0))


def _prostate_or_uterus(canvas: Canvas, varied: Varied, sex: str) -> None:
    size, lean = varied.factor(0.12), varied.normal(6.0)
    number = _number("prostate/uterus")
    if sex == "M":
        centre = np.array((-186.0, -26.0, 0.0)) + varied.shift(2.0, 2.0, 1.0)
        box, depth = canvas.ball(centre, (18.0, 19.0 * size, 24.0 * size))
    else:
        curve = (
            (-166, 10, 0, 12.0),
            (-140, 2, 0.4 * lean, 17 * size),
            (-120, -10, lean, 22 * size),
            (-114, -20, lean, 20 * size),
        )
        box, depth = canvas.sweep(curve)
    canvas.fill(box, depth, _level("prostate/uterus", varied) + (4.0 if sex == "F" else -4.0), number)
