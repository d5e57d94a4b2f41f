# SPDX-License-Identifier: Apache-2.0
"""BCV conversion of hand-written raw trees, against values worked out by hand."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from unimedi_components.data.bcv import DATASET, ORGANS, collect
from unimedi_components.data.splits import nested_fraction
from unimedi_components.errors import ConfigError, DataError

OFFICIAL = [*range(1, 11), *range(21, 41)]
AFFINE = np.array([[-0.8, 0, 0, 5], [0, 0.8, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1.0]])


def volume(shape=(12, 10, 8)):
    image = np.full(shape, -1000, np.int16)
    image[2:-2, 2:-2] = 40
    return image


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def write_case(images, labels, number, organ=6):
    mask = np.zeros((12, 10, 8), np.uint8)
    mask[4, 5, 3] = organ
    save(images / f"img{number:04d}.nii.gz", volume())
    save(labels / f"label{number:04d}.nii.gz", mask)


def synapse(root, numbers, prefix="RawData"):
    """Empty files in Synapse's layout: enough where nothing is opened."""
    for number in numbers:
        for name in (f"img/img{number:04d}", f"label/label{number:04d}"):
            path = root / prefix / "Training" / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def where(datalist):
    return {item["id"]: split for split in ("training", "validation", "test") for item in datalist[split]}


def test_official_splits(tmp_path):
    synapse(tmp_path, OFFICIAL)
    datalist = DATASET.convert(tmp_path, check_images="exists")
    assert datalist["meta"]["kept"] == {"training": 21, "validation": 0, "test": 9}
    split = where(datalist)
    assert [split[f"img{number:04d}"] for number in (1, 10, 21, 31, 32, 40)] == ["training"] * 4 + ["test"] * 2
    assert datalist["meta"]["split"] == "cotr" and datalist["meta"]["dropped"] == {}
    datalist = DATASET.convert(tmp_path, check_images="none", split="monai")
    assert datalist["meta"]["kept"] == {"training": 24, "validation": 6, "test": 0}
    split = where(datalist)
    assert [split[f"img{number:04d}"] for number in (1, 10, 21, 31, 34)] == ["training"] * 5
    assert [split[f"img{number:04d}"] for number in (35, 40)] == ["validation"] * 2
    with pytest.raises(ConfigError, match=r"split='cot' is unknown\. did you mean 'cotr'"):
        collect(tmp_path, split="cot")


def test_fractions_are_nested(tmp_path):
    training = DATASET.convert(synapse(tmp_path, OFFICIAL), check_images="none")["training"]
    parts = [{item["id"] for item in nested_fraction(training, share, 42)} for share in (0.2, 0.4, 1.0)]
    assert [len(part) for part in parts] == [4, 8, 21] and parts[0] < parts[1] < parts[2]


@pytest.mark.parametrize("layout", ["synapse", "monai"])
@pytest.mark.parametrize("above", ["", "RawData", "Abdomen/RawData", "data"])
def test_layouts(tmp_path, layout, above):
    folders = {
        "synapse": ("Training/img", "Training/label", "Testing/img"),
        "monai": ("imagesTr", "labelsTr", "imagesTs"),
    }[layout]
    images, labels, unlabelled = (tmp_path / above / folder for folder in folders)
    for number in (1, 32):
        write_case(images, labels, number)
    save(unlabelled / "img0061.nii.gz", volume())
    (images / "._img0001.nii.gz").write_bytes(b"resource fork")
    (images / "readme.txt").write_text("img0002.nii.gz")
    datalist = DATASET.convert(tmp_path)
    prefix = f"{above}/" if above else ""
    assert datalist["training"] == [
        {
            "id": "img0001",
            "patient": "img0001",
            "image": f"{prefix}{folders[0]}/img0001.nii.gz",
            "mask": f"{prefix}{folders[1]}/label0001.nii.gz",
            "dim": 3,
        }
    ]
    assert [item["id"] for item in datalist["test"]] == ["img0032"]
    meta = datalist["meta"]
    assert meta["dropped_items"] == {"no label map": ["img0061"]}
    assert meta["task"] == "segmentation" and len(meta["label_names"]) == 14
    assert [meta["label_names"][index] for index in (0, 1, 2, 6, 8, 13)] == [
        "background",
        "spleen",
        "right kidney",
        "liver",
        "aorta",
        "left adrenal gland",
    ]


def test_own_cases_are_split_by_the_seed(tmp_path):
    synapse(tmp_path, [1, 40, *range(101, 131)])
    builder = collect(tmp_path, check_images="none")
    split = where(builder.build())
    own = {name: part for name, part in split.items() if name > "img0100"}
    assert split["img0001"] == "training" and split["img0040"] == "test"
    assert list(own.values()).count("training") == 21 and list(own.values()).count("test") == 9
    assert builder.remedies == [
        "30 cases have numbers that the cotr split does not know; they are split 70% training, 30% test by seed 42."
    ]
    assert where(DATASET.convert(tmp_path, check_images="none")) == split
    other = where(DATASET.convert(tmp_path, check_images="none", seed=7))
    assert other != split and list(other.values()).count("test") == 10
    monai = where(DATASET.convert(tmp_path, check_images="none", split="monai"))
    assert [name for name in own if monai[name] == "validation"] == [name for name in own if own[name] == "test"]
    # a label map that goes missing moves no other case
    (tmp_path / "RawData/Training/label/label0101.nii.gz").unlink()
    fewer = DATASET.convert(tmp_path, check_images="none")
    assert where(fewer) == {name: part for name, part in split.items() if name != "img0101"}
    assert fewer["meta"]["dropped_items"] == {"missing mask": ["img0101"]}


def test_faults(tmp_path):
    images, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    for number in range(1, 11):
        write_case(images, labels, number)
    (labels / "label0002.nii.gz").unlink()
    (images / "img0003.nii.gz").unlink()
    content = (images / "img0004.nii.gz").read_bytes()
    (images / "img0004.nii.gz").write_bytes(content[: len(content) // 2])
    (labels / "label0005.nii.gz").write_bytes(b"")
    save(labels / "label0006.nii.gz", np.zeros((12, 10, 7), np.uint8))
    save(labels / "label0007.nii.gz", np.zeros((12, 10, 8), np.uint8), np.diag([0.8, 0.8, 3, 1]))
    save(labels / "label0008.nii.gz", np.full((12, 10, 8), 14, np.uint8))
    save(images / "img0009.nii", volume())
    save(images / "img0010.nii.gz", volume() + np.int16(1024))
    builder = collect(tmp_path, num_workers=1)
    datalist = builder.build()
    assert [item["id"] for item in datalist["training"]] == ["img0001", "img0009", "img0010"]
    assert datalist["training"][1]["image"] == "imagesTr/img0009.nii"
    assert datalist["meta"]["dropped_items"] == {
        "duplicate id": ["img0009"],
        "missing mask": ["img0002"],
        "missing image": ["img0003"],
        "unreadable image": ["img0004"],
        "unreadable mask": ["img0005"],
        "mask and image differ in geometry": ["img0006", "img0007"],
        "unknown label values": ["img0008"],
    }
    # values that may not be Hounsfield units are said, and only a full check leaves them out
    assert datalist["meta"]["not_hounsfield_units"] == ["img0010"]
    assert builder.remedies == [
        f"1 of 8 images do not look like Hounsfield units and were kept, e.g. {images}/img0010.nii.gz: values 24 to "
        "1064 are not Hounsfield units: none reaches air (below -500) and the body lies near 1064, as raw stored "
        "values do. Apply RescaleSlope/RescaleIntercept (HU = stored value * slope + intercept). "
        "--check_images full leaves such images out."
    ]
    full = DATASET.convert(tmp_path, check_images="full", num_workers=1)
    assert full["meta"]["dropped_items"] == {**datalist["meta"]["dropped_items"], "not Hounsfield units": ["img0010"]}
    assert "not_hounsfield_units" not in full["meta"]
    shape, affine = (drop["detail"] for drop in builder.dropped["mask and image differ in geometry"])
    assert "label0006.nii.gz: shape 12x10x7 where the image has 12x10x8" in shape
    assert "affine [[0.8, 0.0, 0.0, 0.0]" in affine and "the image has [[-0.8, 0.0, 0.0, 5.0]" in affine
    with pytest.raises(DataError, match=r"missing mask: .*img0002\.nii\.gz: no label0002\.nii\.gz in .*labelsTr"):
        collect(tmp_path, strict=True)
    # only presence is asked for
    assert len(DATASET.convert(tmp_path, check_images="exists")["training"]) == 8
    with pytest.raises(ConfigError, match="check_images='fast' is unknown"):
        collect(tmp_path, check_images="fast", num_workers=1)


def test_layout_errors(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    with pytest.raises(DataError, match=r"imagesTr: no images\. Looked for img0001\.nii\.gz"):
        collect(tmp_path)


def test_small_volumes_of_any_values_are_kept(tmp_path):
    for number in (1, 2, 32):
        values = np.arange(512, dtype=np.int16).reshape(8, 8, 8) % (50 * number)
        save(tmp_path / "imagesTr" / f"img{number:04d}.nii.gz", values, np.eye(4))
        save(tmp_path / "labelsTr" / f"label{number:04d}.nii.gz", (values % 14).astype(np.uint8), np.eye(4))
    save(tmp_path / "labelsTr" / "label0002.nii.gz", np.full((8, 8, 8), 14, np.uint8), np.eye(4))
    datalist = DATASET.convert(tmp_path, num_workers=1)
    assert where(datalist) == {"img0001": "training", "img0032": "test"}
    assert datalist["meta"]["dropped_items"] == {"unknown label values": ["img0002"]}
    assert datalist["meta"]["not_hounsfield_units"] == ["img0001", "img0032"]
    with pytest.raises(DataError, match=r"not Hounsfield units: .*img0001\.nii\.gz: values 0 to 49 are not"):
        collect(tmp_path, strict=True, num_workers=1)


def test_thirteen_organs():
    assert len(ORGANS) == 13 and ORGANS.index("pancreas") == 10 and ORGANS[8] == "inferior vena cava"
