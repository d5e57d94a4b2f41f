# SPDX-License-Identifier: Apache-2.0
"""The phantom in Clean-CC-CCII's layout: files and lists, and the truth in the volumes that are delivered."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.common import SPLITS, phantom, read, truth_of
from unimedi_components.data.cc_ccii import CLASSES, DATASET
from unimedi_components.data.phantom import make_ct, make_patient
from unimedi_components.data.phantom.cc_ccii import CC_CCII, grey_levels
from unimedi_components.data.phantom.findings import draw_disease
from unimedi_components.data.slices import slice_volume_transforms
from unimedi_components.data.transforms import ByDimension

PATIENTS, SEED = 15, 4
DISEASES = ("pneumonia", "covid", "normal")


root = phantom("cc_ccii", PATIENTS, SEED)


@pytest.fixture(scope="module")
def truth(root) -> dict:
    return truth_of(root)


@pytest.fixture(scope="module")
def items(root) -> dict:
    datalist = DATASET.convert(root, check_images="full", progress=False)
    assert datalist["meta"]["dropped"] == {} and "missing_slices" not in datalist["meta"]
    return {item["id"]: {**item, "split": split} for split in SPLITS for item in datalist[split]}


def volume_of(root: Path, item: dict, depth: int) -> np.ndarray:
    """The volume that training gets, as grey levels 0 to 255."""
    transform = ByDimension((), slice_volume_transforms((depth, 128, 128)))
    return (transform({**item, "image": str(root / item["image"])})["image"][0].numpy() + 1) * 127.5


def test_layout_and_lists(root, truth):
    lists = {name: read(root / f"{name}.json") for name in ("ct_train", "ct_val_part", "ct_test")}
    assert all(list(content) == list(CLASSES) for content in lists.values())
    patients = {name: {p for own in content.values() for p in own} for name, content in lists.items()}
    assert [len(patients[name]) for name in lists] == [12, 3, 3]
    assert patients["ct_val_part"] < patients["ct_train"] and not patients["ct_train"] & patients["ct_test"]
    listed = [(f"{c}_{p}_{s}", n) for name in ("ct_train", "ct_test") for c, own in lists[name].items()
              for p, scans in own.items() for s, n in scans.items()]  # fmt: skip
    # patients 2, 6, 10 and 14 have a second scan of half the slices
    assert len(listed) == len(truth) == 19 and {name for name, _ in listed} == set(truth)
    assert sorted(len(names) for _, names in listed) == [24] * 4 + [48] * 15
    kinds = set()
    for name, names in listed:
        files = sorted((root / truth[name]["image"]).iterdir())
        assert [file.name for file in files] == [f"{i:04d}.png" for i in range(len(files))]
        assert len(names) == truth[name]["n_slices"] and set(names) <= {file.name for file in files}
        modes = {(image.mode, image.size) for image in map(Image.open, files)}
        assert modes in ({("L", (128, 128))}, {("RGB", (128, 128))})
        kinds.add((names[0] > names[-1], len(files) // len(names), modes.pop()[0]))
    # upside down, every slice twice, colour, and none of these
    assert {(True, 1, "L"), (False, 2, "L"), (False, 1, "RGB"), (False, 1, "L")} <= kinds


def test_labels_and_splits_come_back(truth, items):
    assert {name: item["label"] for name, item in items.items()} == {k: entry["label"] for k, entry in truth.items()}
    for name, item in items.items():
        assert item["image"] == truth[name]["image"] and CLASSES[item["label"]] == name.split("_")[0]
        assert (item["split"] == "test") == (int(item["patient"]) % 5 == 0)
        found = {finding["name"] for finding in truth[name]["findings"]}
        assert ("ground_glass" in found) == (item["label"] == 1) and bool(found) == (item["label"] != 2)
    assert {item["label"] for item in items.values() if item["split"] == "test"} == {0, 1, 2}


@pytest.mark.parametrize("index", [0, 1, 2, 3, 6])
def test_delivered_volume_is_the_windowed_ct(root, items, index):
    """Plain, with a second scan, in colour, stored upside down, every slice twice."""
    seed = np.random.SeedSequence([SEED, CC_CCII.code, index])
    study = make_ct(*make_patient(seed, lambda rng: draw_disease(DISEASES[index % 3], rng)))
    item = items[f"{CLASSES[index % 3]}_{index + 1}_{2 * (1000 + index)}"]
    expected = (np.clip(study.hu, -1350.0, 150.0) + 1350.0) * (255 / 1500)
    # rounding to grey levels is all that is lost; the slices run from foot to head, the rows to the back
    assert np.abs(volume_of(root, item, 48) - expected).max() <= 0.5 + 1e-3


def test_thick_second_scan_shows_the_same_body(root, items):
    thin, thick = (volume_of(root, items[f"NCP_2_{scan}"], 24) for scan in (2002, 2003))
    inside = (thin > 20) & (thick > 20)
    assert np.corrcoef(thin[inside], thick[inside])[0, 1] > 0.9
    flipped = thick[::-1]
    inside = (thin > 20) & (flipped > 20)
    assert np.corrcoef(thin[inside], flipped[inside])[0, 1] < 0.8


def test_truth_points_at_the_lesions(root, truth, items):
    """Without its lesions the same patient's volume differs in exactly the slices that truth names."""
    checked = 0
    for index in range(PATIENTS):
        if index % 3 == 2:
            continue
        seed = np.random.SeedSequence([SEED, CC_CCII.code, index])
        patient, streams = make_patient(seed, lambda rng, own=DISEASES[index % 3]: draw_disease(own, rng))
        name = f"{CLASSES[index % 3]}_{index + 1}_{2 * (1000 + index)}"
        count = truth[name]["n_slices"]
        # truth counts from the head along the list, the volume from the foot
        volume = volume_of(root, items[name], count)[::-1]
        healthy = grey_levels(make_ct(patient, streams, lesions=False).hu)[::-1]
        changed = np.abs(volume - healthy) > 12
        boxes = [box for finding in truth[name]["findings"] for box in finding["boxes"]]
        within = np.zeros(changed.shape, bool)
        for (z0, z1), (y0, y1), (x0, x1) in boxes:
            within[z0 : z1 + 1, y0 : y1 + 1, x0 : x1 + 1] = True
        lesion = changed & within
        assert lesion[truth[name]["lesion_slices"]].any(axis=(1, 2)).all()
        shown = changed.sum(axis=(1, 2))
        assert shown[truth[name]["lesion_slices"]].sum() > 0.9 * shown.sum() and lesion.sum() > 0.9 * changed.sum()
        checked += 1
    assert checked == 10
