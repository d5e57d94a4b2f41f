# SPDX-License-Identifier: Apache-2.0
"""The shape of one phantom patient: rib cage, lungs, heart, diaphragm as smooth functions in millimetres."""

from dataclasses import dataclass, replace

import numpy as np

from .findings import Finding
from .geometry import FloatArray

SIDES = {"right": -1.0, "left": 1.0}
NORMAL_CTR = 0.50
_CTR = {"small": (0.56, 0.595), "moderate": (0.595, 0.635), "large": (0.635, 0.68)}


@dataclass(frozen=True)
class Patient:
    """A patient. Lengths in mm, angles in radians; z = 0 lies near the domes of the diaphragm.

    Args:
        cage: inner half width and half depth of the rib cage at its widest.
        lung_height: z of the lung apices.
        domes: z of the right and the left dome of the diaphragm.
        ctr: cardiothoracic ratio, widest heart over widest inner rib cage.
        heart_right: share of the heart's width that lies right of the midline.
        scoliosis: amplitude and phase of the spine's sideways bend.
        kyphosis: forward bend of the spine.
        rotation: tangent of the rotation about the long axis.
        shift: displacement of the mediastinum to the left.
        rib_pitch: distance of neighbouring ribs.
        rib_drop: how far a rib falls from its back end to its front end.
        vessel_gain: factor on the calibre of the pulmonary vessels.
    """

    sex: str
    age: int
    cage: tuple[float, float]
    wall: float
    fat: float
    lung_height: float
    domes: tuple[float, float]
    ctr: float
    heart_right: float
    scoliosis: tuple[float, float]
    kyphosis: float
    rotation: float
    shift: float
    breast: float
    rib_pitch: float
    rib_drop: float
    vessel_gain: float
    gas: float
    findings: tuple[Finding, ...] = ()

    def finding(self, name: str) -> Finding | None:
        return next((f for f in self.findings if f.name == name), None)

    def dome(self, side: str) -> float:
        return self.domes[0] if side == "right" else self.domes[1]

    def zone_range(self, zone: str, side: str) -> tuple[float, float]:
        """Range of z that the report calls upper, middle or lower, one third of the lung each."""
        low, high = self.dome(side) - 12.0, self.lung_height - 6.0
        third = (high - low) / 3
        start = low + third * ("lower", "middle", "upper").index(zone)
        return start, start + third


def draw_patient(rng: np.random.Generator, findings: tuple[Finding, ...] = ()) -> Patient:
    """Draw a patient with normal variation, then let the findings that move anatomy act on it.

    Cardiomegaly widens the heart, atelectasis raises its hemidiaphragm, a large effusion or pneumothorax
    pushes the mediastinum away. The same numbers are drawn whatever the findings are.
    """
    female = rng.random() < 0.5
    size = rng.normal(0.0, 1.0, 3).clip(-2, 2)
    width = (119.0 if female else 133.0) + 5.5 * size[0]
    depth = width * (0.655 + 0.03 * size[1])
    heavy = rng.beta(1.6, 3.0)
    ctr_normal, ctr_place = rng.uniform(0.40, 0.49), rng.random()
    bend = 16.0 if rng.random() < 0.08 else 3.0
    right_dome = rng.normal(10.0, 5.0)
    patient = Patient(
        sex="F" if female else "M",
        age=int(rng.integers(22, 90)),
        cage=(width, depth),
        wall=18.0 + 20.0 * heavy,
        fat=5.0 + 20.0 * heavy,
        lung_height=(222.0 if female else 240.0) + 11.0 * size[2],
        domes=(right_dome, right_dome - rng.uniform(6.0, 16.0)),
        ctr=float(ctr_normal),
        heart_right=rng.uniform(0.30, 0.38),
        scoliosis=(bend * rng.uniform(0.3, 1.0), rng.uniform(0.0, 2 * np.pi)),
        kyphosis=rng.uniform(0.0, 14.0),
        rotation=rng.normal(0.0, 0.06),
        shift=0.0,
        breast=rng.uniform(38.0, 58.0) if female else 0.0,
        rib_pitch=rng.uniform(22.5, 26.5),
        rib_drop=rng.uniform(72.0, 108.0),
        vessel_gain=rng.uniform(0.9, 1.12),
        gas=rng.uniform(0.0, 1.25),
        findings=findings,
    )
    raised, pushed = rng.uniform(0.0, 1.0), rng.uniform(8.0, 16.0)
    return _apply_findings(patient, float(ctr_place), float(raised), float(pushed))


def _apply_findings(patient: Patient, ctr_place: float, raised: float, pushed: float) -> Patient:
    heart, collapse, edema = (patient.finding(n) for n in ("cardiomegaly", "atelectasis", "edema"))
    if heart:
        low, high = _CTR[heart.severity]
        patient = replace(patient, ctr=low + ctr_place * (high - low))
    if collapse and collapse.zone == "lower":
        lift = {"small": 14.0, "moderate": 24.0, "large": 36.0}[collapse.severity] + 8.0 * raised
        domes = [h + lift if side in collapse.sides else h for h, side in zip(patient.domes, SIDES, strict=True)]
        patient = replace(patient, domes=(domes[0], domes[1]))
    if edema:
        gain = {"small": 1.12, "moderate": 1.22, "large": 1.32}[edema.severity]
        patient = replace(patient, vessel_gain=patient.vessel_gain * gain)
    away = 0.0
    for name in ("effusion", "pneumothorax"):
        found = patient.finding(name)
        if found and found.severity == "large" and len(found.sides) == 1:
            away -= SIDES[found.sides[0]] * pushed
    return replace(patient, shift=away)


class Profiles:
    """How the patient's outlines change with height: one number per slice for each centre and half axis.

    ``z``: slice positions in mm, (nz,).

    Attributes:
        spine_x: centre of the vertebrae, left-right.
        spine_y: centre of the vertebral bodies, front-back.
        cage_x: centre of the rib cage, left-right.
        cage_a: inner half width of the rib cage.
        cage_b: inner half depth of the rib cage.
        body_a: half width of the skin outline.
        body_b: half depth of the skin outline.
        taper: 1 over most of the lung, falling to 0 at the apex.
    """

    power = 2.4

    def __init__(self, patient: Patient, z: FloatArray) -> None:
        a, b = patient.cage
        top = patient.lung_height
        amplitude, phase = patient.scoliosis
        spine_x = amplitude * np.sin(np.pi * z / 160.0 + phase)
        rise = np.clip((z - 0.36 * top) / (0.66 * top), 0.0, 1.0)
        taper = np.where(z > 1.02 * top, 0.0, np.sqrt(1.0 - np.minimum(rise, 0.999) ** 2))
        waist = np.clip(-z / 120.0, 0.0, 1.0)
        shoulder = np.interp(z, (0.45 * top, 0.78 * top, 0.98 * top), (0.0, 30.0, 52.0))
        neck = np.clip((z - 0.98 * top) / 52.0, 0.0, 1.0) ** 0.8
        chest_a = (1 - neck) * (a + patient.wall + shoulder)
        depth = np.interp(z, (0.6 * top, top, top + 40), (1.0, 0.84, 0.62))
        self.z = z
        self.taper: FloatArray = taper.astype(np.float32)
        self.spine_x: FloatArray = spine_x.astype(np.float32)
        self.spine_y: FloatArray = (0.66 * b - patient.kyphosis * ((z - 0.55 * top) / top) ** 2).astype(np.float32)
        self.cage_x: FloatArray = (0.4 * spine_x).astype(np.float32)
        self.cage_a: FloatArray = (a * (0.36 + 0.64 * taper) * (1.0 - 0.05 * waist)).astype(np.float32)
        self.cage_b: FloatArray = (b * (0.46 + 0.54 * taper) * (1.0 - 0.03 * waist)).astype(np.float32)
        self.body_a: FloatArray = (chest_a + neck * (54.0 + 0.4 * patient.fat)).astype(np.float32)
        self.body_b: FloatArray = ((b + 0.9 * patient.wall + 4.0) * depth).astype(np.float32)

    def heart(self, patient: Patient) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Right border, left border (mm, right < left) and relative depth (0..1) of the heart per slice.

        The widest right and left extents add up to the cardiothoracic ratio times the cage's inner width.
        """
        width = patient.ctr * 2 * patient.cage[0]
        low = 0.5 * sum(patient.domes)
        scale = patient.lung_height / 235.0 * (0.86 + 0.30 * patient.ctr)

        def bulge(centre: float, half: float) -> FloatArray:
            return np.sqrt(np.clip(1.0 - ((self.z - centre) / half) ** 2, 0.0, 1.0)).astype(np.float32)

        right = -patient.heart_right * width * bulge(low + 36 * scale, 66 * scale)
        left = (1 - patient.heart_right) * width * bulge(low + 14 * scale, 104 * scale) ** 1.9
        depth = bulge(low + 26 * scale, 84 * scale)
        middle = np.float32(patient.shift) + np.float32(0.5) * self.cage_x
        return right + middle, left + middle, depth


def diaphragm(patient: Patient, side: str, y: FloatArray, x: FloatArray) -> FloatArray:
    """Height of one hemidiaphragm, (ny, nx) mm: a dome that falls to the sides and to the back."""
    a, b = patient.cage
    centre = SIDES[side] * 0.47 * a
    across = ((x - centre) / (0.53 * a)) ** 2
    along = ((y + 0.18 * b) / (1.05 * b)) ** 2
    return (patient.dome(side) - 42.0 * across[None, :] ** 1.2 - 66.0 * along[:, None] ** 1.1).astype(np.float32)
