# SPDX-License-Identifier: Apache-2.0
"""Each data set is found as it is handed out: official archive names, parts, and folders doubled by unpacking."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unimedi_components.data.catalogue import DATASETS
from unimedi_components.data.datalist import SPLITS
from unimedi_components.data.phantom import write_phantom
from unimedi_components.errors import DataError

QUIET: dict[str, Any] = {"progress": False, "num_workers": 1}
Rename = Callable[[str], str]
BATCH = {"1": "CheXpert-v1.0 batch 2 (train 1)", "2": "CheXpert-v1.0 batch 3 (train 2)"}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The phantom of a data set in its plain layout, some patients, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_phantom(name, made[name], patients=8 if name == "covidx" else 4, seed=5, workers=1)
            (made[name] / "truth.json").unlink()
        return made[name]

    return make


def collected(name: str, root: Path, **options: Any) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Items by id: split, fields, and the image's file or folder."""
    datalist = DATASETS[name].collect(root, **QUIET, **options).build()
    return {item["id"]: (split, item, item.pop("image")) for split in SPLITS for item in datalist[split]}


def chexpert(path: str) -> str:
    path = path.removeprefix("CheXpert-v1.0-small/")
    if path.startswith("train/"):
        patient = path.split("/")[1]
        return f"{BATCH['1' if patient < 'patient00003' else '2']}/{path.removeprefix('train/')}"
    return f"CheXpert-v1.0 batch 1 (validate & csv)/{path}"


def part_of_ccii(path: str) -> str:
    return re.sub(r"^dataset_cleaned/(\w+)/(\w+)/", r"\1-\2/\1/\2/", path)


def physionet(path: str) -> str:
    kind = "mimic-cxr/2.1.0/mimic-cxr-reports" if path.endswith(".txt") else "mimic-cxr-jpg/2.1.0"
    return f"physionet.org/files/{kind}/{path}"


LAYOUTS: dict[str, tuple[str, Rename]] = {
    "chexpert batches": ("chexpert", chexpert),
    "chexpert batches in one folder": ("chexpert", lambda p: f"chexpertchestxrays-u20210408/{chexpert(p)}"),
    "chexpert batches doubled": ("chexpert", lambda p: re.sub(r"^(.*?batch [23].*?)/", r"\1/\1/", chexpert(p))),
    "chexpert small doubled": ("chexpert", lambda p: f"CheXpert-v1.0-small/{p}"),
    "chexpert plain": ("chexpert", lambda p: p.removeprefix("CheXpert-v1.0-small/")),
    "chexpert with versions": ("chexpert", lambda p: p.replace("CheXpert-v1.0-small", "chexpert/1")),
    "mimic by wget": ("mimic_cxr", physionet),
    "mimic, ROOT is its files": ("mimic_cxr", lambda p: physionet(p).removeprefix("physionet.org/files/")),
    "mimic reports in the zip's folder": (
        "mimic_cxr",
        lambda p: f"mimic-cxr-reports/mimic-cxr-reports/{p}" if p.endswith(".txt") else f"mimic-cxr-jpg-2.1.0/{p}",
    ),
    "mimic tables apart": ("mimic_cxr", lambda p: p if p.startswith("files/") else f"tables/{p}"),
    "bimcv in parts": (
        "bimcv",
        lambda p: re.sub(r"^covid19_posi/(sub-S0000(\d))/", r"bimcv_covid19_posi_subjects_\2/covid19_posi/\1/", p),
    ),
    "bimcv in bare parts": (
        "bimcv",
        lambda p: re.sub(
            r"^covid19_posi/(der|par)",
            r"bimcv_covid19_posi_head_iter1/\1",
            re.sub(r"^covid19_posi/(sub-S0000(\d))/", r"bimcv_covid19_posi_subjects_\2/\1/", p),
        ),
    ),
    "bimcv doubled": ("bimcv", lambda p: f"covid19_posi/{p}"),
    "rsna as Kaggle's zip": ("rsna", lambda p: f"rsna-pneumonia-detection-challenge/{p}"),
    "rsna, each archive in its folder": (
        "rsna",
        lambda p: f"stage_2_train_images/{p}" if "/" in p else f"{p.removesuffix('.csv')}/{p}",
    ),
    "rsna, table in a folder of its name": ("rsna", lambda p: p if "/" in p else f"{p}/{p}"),
    "covidx as Kaggle's zip": ("covidx", lambda p: p if p.endswith(".txt") else f"covidx-cxr2/{p}"),
    "covidx, lists of the repository": (
        "covidx",
        lambda p: f"COVID-Net-master/labels/{p}" if p.endswith(".txt") else f"data/{p}",
    ),
    "covidx, images in val": ("covidx", lambda p: p.replace("train/FIG", "val/FIG").replace("test/", "train/")),
    "cc_ccii in parts": ("cc_ccii", part_of_ccii),
    "cc_ccii, parts doubled": ("cc_ccii", lambda p: re.sub(r"^dataset_cleaned/(\w+)/(\w+)/", r"\1_\2/\1_\2/\2/", p)),
    "cc_ccii doubled": ("cc_ccii", lambda p: p.replace("dataset_cleaned/", "dataset_cleaned/dataset_cleaned/")),
    "cc_ccii classes doubled": ("cc_ccii", lambda p: re.sub(r"^dataset_cleaned/(\w+)/", r"\1/\1/", p)),
    "luna16 nested": ("luna16", lambda p: re.sub(r"^(subset\d)/", r"\1/\1/", p)),
    "luna16 some nested": ("luna16", lambda p: re.sub(r"^(subset[12])/", r"\1/\1/", p)),
    "luna16 in two parts": (
        "luna16",
        lambda p: p.replace("subset0/", "LUNA16_1/subset0/").replace("subset3/", "LUNA16_2/subset3/"),
    ),
    "luna16 as Kaggle's zip": (
        "luna16",
        lambda p: f"archive/{p.removesuffix('.csv')}/{p}" if p.endswith(".csv") else f"archive/{p}",
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_found_as_it_is_handed_out(case: str, phantom: Callable[[str], Path], tmp_path: Path) -> None:
    name, rename = LAYOUTS[case]
    plain = phantom(name)
    for file in plain.rglob("*"):
        if file.is_file():
            target = tmp_path / rename(file.relative_to(plain).as_posix())
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    expected, found = collected(name, plain), collected(name, tmp_path)
    assert expected and found.keys() == expected.keys()
    for key, (split, item, image) in found.items():
        assert (split, item) == expected[key][:2]
        first, second = tmp_path / image, plain / expected[key][2]
        if second.is_dir():
            assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
        else:
            assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("top", ["", "RawData", "Abdomen/RawData", "Abdomen/RawData/RawData"])
@pytest.mark.parametrize("inner", ["{}/{}", "{}/{}/{}"])
def test_bcv_at_any_level(tmp_path: Path, top: str, inner: str) -> None:
    for number in (1, 32):
        for kind in ("img", "label"):
            folder = tmp_path / top / "Training" / (kind if inner.count("{") == 2 else f"{kind}/{kind}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{kind}{number:04d}.nii.gz").write_bytes(b"x")
    found = collected("bcv", tmp_path, check_images="exists")
    assert {key: part for key, (part, _, _) in found.items()} == {"img0001": "training", "img0032": "test"}


@pytest.mark.parametrize("top", ["", "amos22", "AMOS22", "amos22/amos22", "7262581/amos22"])
@pytest.mark.parametrize("doubled", [False, True])
def test_amos_at_any_level(tmp_path: Path, top: str, doubled: bool) -> None:
    home = tmp_path / top
    (tmp_path / "__MACOSX" / "amos22").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "amos22" / "dataset.json").write_bytes(b"\0")
    cases = [("training", "Tr", "0001"), ("validation", "Va", "0008")]
    for _, ending, number in cases:
        for folder in (f"images{ending}", f"labels{ending}"):
            place = home / folder / folder if doubled else home / folder
            place.mkdir(parents=True)
            (place / f"amos_{number}.nii.gz").write_bytes(b"x")
    entry = {
        part: [{"image": f"./images{e}/amos_{n}.nii.gz", "label": f"./labels{e}/amos_{n}.nii.gz"}]
        for part, e, n in cases
    }
    (home / "dataset.json").write_text(json.dumps({**entry, "test": []}))
    found = collected("amos", tmp_path, check_images="exists")
    assert {key: part for key, (part, _, _) in found.items()} == {"amos_0001": "training", "amos_0008": "test"}
    assert all((tmp_path / image).is_file() for _, _, image in found.values())


def test_a_missing_part_is_counted_and_a_missing_whole_names_where_it_was_looked_for(
    phantom: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = phantom("chexpert")
    for file in plain.rglob("*"):
        target = tmp_path / chexpert(file.relative_to(plain).as_posix())
        if file.is_file() and "batch 3" not in str(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    builder = DATASETS["chexpert"].collect(tmp_path, **QUIET)
    assert len(builder.dropped["missing image"]) == 1
    batch = tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)"
    with pytest.raises(DataError, match=r"no images\. Looked for .*train.* Give the folder that holds all batches as"):
        DATASETS["chexpert"].collect(batch, **QUIET)
    for name, words in {
        "chexpert": r"no table of CheXpert\. Looked for train\.csv",
        "mimic_cxr": r"no metadata table of MIMIC-CXR-JPG\. Looked for mimic-cxr-2",
        "bimcv": r"no sessions\. Looked for sub-S",
        "rsna": r"no label table of RSNA Pneumonia stage 2\. Looked for stage_2_train_labels\.csv",
        "covidx": r"no pair of lists train_COVIDx\*A\.txt",
        "cc_ccii": r"no scans\. Looked for \{CP,NCP,Normal\}/PATIENT/SCAN there",
        "luna16": r"no table for --mode volume\. Looked for annotations\.csv",
        "bcv": r"no images\. Looked for Training/img/img0001",
        "amos": r"no list of cases\. Looked for dataset\.json",
    }.items():
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        with pytest.raises(DataError, match=words):
            DATASETS[name].collect(empty, **QUIET)


@pytest.mark.parametrize(
    ("name", "title", "message"),
    [
        ("mimic_cxr", "MIMIC-CXR-JPG", r"no metadata table .*Looked for mimic-cxr-2\.\*-metadata\.csv\[\.gz\]"),
        ("bimcv", "BIMCV-COVID19+", r"no sessions\. Looked for .*sub-S\*/ses-E\*/mod-rx"),
        ("chexpert", "CheXpert", r"no table of CheXpert\. Looked for train\.csv\[\.gz\], CheXpert-v1\.0\*/train"),
        ("rsna", "RSNA Pneumonia", r"no label table .*Looked for stage_2_train_labels\.csv\[\.gz\]"),
        ("covidx", "COVIDx", r"no pair of lists train_COVIDx\*A\.txt .*\(lists there: none\)\. Put train_COVIDx9A"),
        ("cc_ccii", "Clean-CC-CCII", r"no scans\. Looked for \{CP,NCP,Normal\}/PATIENT/SCAN there"),
        ("luna16", "LUNA16", r"no table for --mode volume\. Looked for annotations\.csv\[\.gz\]"),
        ("bcv", "BCV", r"no images\. Looked for Training/img/img0001\.nii\.gz and imagesTr/img0001"),
        ("amos", "AMOS22", r"no list of cases\. Looked for dataset\.json\[\.gz\], amos22/dataset\.json"),
    ],
)
def test_an_empty_folder_or_none(name: str, title: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        DATASETS[name].collect(tmp_path)
    told = f"gone: no such folder. Give the folder that holds the {title} data as ROOT"
    with pytest.raises(DataError, match=re.escape(told)):
        DATASETS[name].collect(tmp_path / "gone")
