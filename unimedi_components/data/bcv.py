# SPDX-License-Identifier: Apache-2.0
"""BTCV's abdomen, "Beyond the Cranial Vault" (BCV), to a datalist: 30 labelled CT volumes, 13 organs."""

import re
from pathlib import Path

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.label_maps import Case, add_cases
from unimedi_components.data.sources import check_choice, existing_root, undoubled
from unimedi_components.data.splits import split_patients
from unimedi_components.errors import DataError

#: Names of the labels 1 to 13.
ORGANS = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland"),
)
#: Split option -> the split of every official case number: CoTr's splits_final.pkl, MONAI's dataset_0.json.
OFFICIAL_SPLITS = {
    "cotr": dict.fromkeys([*range(1, 11), *range(21, 32)], "training") | dict.fromkeys(range(32, 41), "test"),
    "monai": dict.fromkeys([*range(1, 11), *range(21, 35)], "training") | dict.fromkeys(range(35, 41), "validation"),
}
OWN_SHARE = 0.3
#: Folders of images, label maps and images without label maps.
FOLDERS = (("Training/img", "Training/label", "Testing/img"), ("imagesTr", "labelsTr", "imagesTs"))


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    seed: int = 42,
    split: str = "cotr",
    check_images: str = "quick",
    assume_hu: bool = False,
    num_workers: int = 4,
    progress: bool = True,
) -> DatalistBuilder:
    """Read BCV.

    Args:
        root: ``RawData``, the folder that holds ``imagesTr``, or a folder one to three levels above.
        split: ``"cotr"``, 21 training and 9 test cases and none for validation, since the protocol trains for
            a fixed number of iterations; or ``"monai"``, 24 training and 6 validation cases. Cases with
            numbers that these lists do not know (own cases in this layout) are split 70/30 by the seed into
            training and the split's other part.
        check_images: ``"quick"``, ``"full"``, ``"exists"`` or ``"none"``; see
            :func:`~unimedi_components.data.label_maps.pair_fault`.

    Returns:
        The builder. Drop reasons: ``no label map`` (the images for testing), ``duplicate id``, ``missing
        mask``, ``missing image`` and those of :func:`~unimedi_components.data.label_maps.pair_fault`.
    """
    check_choice("split", split, OFFICIAL_SPLITS, hint=True)
    base = existing_root(root, "BCV")
    builder = DatalistBuilder("bcv", root, strict)
    builder.meta["split"] = split
    image_folder, label_folder, unlabelled_folder = _folders(base)
    images, labels = _numbered(builder, image_folder, "img"), _numbered(builder, label_folder, "label")
    if not images:
        raise DataError(f"{image_folder}: no images. Looked for img0001.nii.gz. Unpack the data set, or correct ROOT.")
    split_of = _split(builder, sorted(images.keys() | labels.keys()), split, seed)
    cases = []
    for number, part in split_of.items():
        name = f"img{number:04d}"
        if number not in images:
            builder.drop("missing image", name, f"{labels[number]}: no {name}.nii.gz in {image_folder}")
        elif number not in labels:
            builder.drop("missing mask", name, f"{images[number]}: no label{number:04d}.nii.gz in {label_folder}")
        else:
            image, mask = (path.relative_to(base).as_posix() for path in (images[number], labels[number]))
            cases.append(Case(part, name, image, mask))
    builder.drop_many("no label map", (f"img{number:04d}" for number in _numbered(builder, unlabelled_folder, "img")))
    add_cases(builder, base, cases, ORGANS, check_images, assume_hu, num_workers, progress)
    return builder


def _folders(root: Path) -> tuple[Path, Path, Path]:
    """Return the folders of images, label maps and unlabelled images."""
    for pattern in ("", "RawData", "*", "*/RawData", "*/*", "*/*/RawData"):
        for top in sorted(root.glob(pattern)) if pattern else [root]:
            for images, labels, unlabelled in FOLDERS:
                if (top / images).is_dir():
                    return undoubled(top / images), undoubled(top / labels), undoubled(top / unlabelled)
    looked = " and ".join(f"{images}/img0001.nii.gz" for images, _, _ in FOLDERS)
    raise DataError(f"{root}: no images. Looked for {looked}, also below RawData. Unpack RawData.zip, or correct ROOT.")


def _numbered(builder: DatalistBuilder, folder: Path, stem: str) -> dict[int, Path]:
    """Return case number -> file; one number in two files (plain and gzipped) counts once."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := re.fullmatch(rf"{stem}(\d+)\.nii(\.gz)?", path.name):
            first = found.setdefault(int(match[1]), path)
            if first != path:
                builder.drop("duplicate id", path.name.split(".")[0], f"{path}: {first.name} has the same number")
    return found


def _split(builder: DatalistBuilder, numbers: list[int], split: str, seed: int) -> dict[int, str]:
    """Return the split of every case number; it does not depend on which files are sound."""
    official = OFFICIAL_SPLITS[split]
    held_out = "test" if split == "cotr" else "validation"
    own = {str(number): "3" for number in numbers if number not in official}
    shares = (0.0, OWN_SHARE) if held_out == "test" else (OWN_SHARE, 0.0)
    assigned = split_patients(own, *shares, seed)
    if own:
        builder.remedies.append(
            f"{len(own)} cases have numbers that the {split} split does not know; "
            f"they are split {1 - OWN_SHARE:.0%} training, {OWN_SHARE:.0%} {held_out} by seed {seed}."
        )
    return {number: official[number] if number in official else assigned[str(number)] for number in numbers}


DATASET = Dataset(
    name="bcv",
    title="BTCV abdomen, Beyond the Cranial Vault (BCV)",
    task="segmentation: 13 abdominal organs in CT (Table 6)",
    source="https://www.synapse.org/Synapse:syn3193805 (RawData.zip of the abdomen; Synapse account)",
    licence="terms of use of the challenge on Synapse",
    tree="""\
RawData/Training/img/img0001.nii.gz  RawData/Training/label/label0001.nii.gz    (0001-0010, 0021-0040)
RawData/Testing/img/img0061.nii.gz                                              (0061-0080, without labels)
imagesTr/img0001.nii.gz  labelsTr/label0001.nii.gz  imagesTs/img0061.nii.gz     (or so, as MONAI renames them)""",
    collect=collect,
    training={"": 21, "monai": 24},
    notes="--split cotr (default): 21 training and 9 test cases of CoTr. --split monai: 24 training and 6 validation "
    "cases of MONAI. --fraction 0.2, 0.4 and 1.0 keep 4, 8 and 21 of CoTr's training cases.",
)
