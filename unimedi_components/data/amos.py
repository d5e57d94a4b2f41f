# SPDX-License-Identifier: Apache-2.0
"""AMOS22 to a datalist: abdominal CT volumes, 15 organs. The MRI volumes of the data set are left out.

The layout read is that of `DATASET`; an entry of dataset.json without a label may be the image's path alone.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.label_maps import BACKGROUND, Case, add_cases
from unimedi_components.data.sources import check_choice, existing_root, find_source, read_json
from unimedi_components.errors import DataError

#: Names of the labels 1 to 15.
ORGANS = (
    *("spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta", "postcava"),
    *("pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus"),
)
#: The data set's own spelling of some names.
OWN_SPELLING = {"arota": "aorta"}
#: CT volumes have numbers up to this one (nnU-Net's conversion), MRI volumes above.
LAST_CT = 500
#: Split -> what each list of dataset.json is in it.
SPLITS_OF = {
    "paper": {"training": "training", "validation": "test", "test": ""},
    "official": {"training": "training", "validation": "validation", "test": "test"},
}
_ELSEWHERE = "not in the paper's split"


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    split: str = "paper",
    check_images: str = "quick",
    assume_hu: bool = False,
    num_workers: int = 4,
    progress: bool = True,
) -> DatalistBuilder:
    """Read AMOS22.

    Args:
        root: folder with ``dataset.json``, or one or two levels above; item paths are relative to it.
        split: ``"paper"``, 200 training cases and the 100 of the validation list for testing, none for validation:
            the paper reports on them, so they choose no epoch, and the protocol trains for a fixed number of
            iterations; or ``"official"``, the three lists as they are, where an entry of the test list is kept if it
            names a label map that is on disk (looked up whatever ``check_images`` says), which the release lacks.
        check_images: ``"quick"``, ``"full"``, ``"exists"`` or ``"none"``; see
            :func:`~unimedi_components.data.label_maps.pair_fault`.

    Returns:
        The builder. Drop reasons: ``not CT`` (MRI, by number), ``no case number``, ``no label map``,
        ``duplicate id``, ``not in the paper's split``, ``patient in another split`` and those of
        :func:`~unimedi_components.data.label_maps.pair_fault`.
    """
    check_choice("split", split, SPLITS_OF, hint=True)
    base = existing_root(root, "AMOS22")
    builder = DatalistBuilder("amos", root, strict)
    builder.meta["split"] = split
    folders = ("", "amos22/", "[aA][mM][oO][sS]*/", "*/", "amos22/amos22/", "*/[aA][mM][oO][sS]*/")
    path = find_source(base, [f"{folder}dataset.json" for folder in folders], "list of cases")
    content = read_json(path, "Unpack the data set again.")
    if not isinstance(content, dict) or not content.get("training"):
        raise DataError(f'{path}: has no list "training". Give AMOS22\'s own dataset.json.')
    builder.add_source(path)
    _check_labels(content.get("labels"), path)
    folder = path.parent.relative_to(base).as_posix()
    cases = []
    for listed, part in SPLITS_OF[split].items():
        seen: set[str] = set()
        for image, mask in _entries(content, listed, path):
            name = posixpath.basename(image).split(".")[0]
            image, mask = (_on_disk(base, f"{folder}/{file}") if file else "" for file in (image, mask))
            reason = _reason(name, seen, mask, listed == "test" and not (base / mask).is_file())
            reason = reason or ("" if part else _ELSEWHERE)
            if reason:
                builder.drop(reason, name)
            else:
                seen.add(name)
                cases.append(Case(part, name, image, mask))
    add_cases(builder, base, cases, ORGANS, check_images, assume_hu, num_workers, progress)
    builder.meta["own_spelling"] = {name: own for own, name in OWN_SPELLING.items()}
    builder.keep_apart()
    return builder


def _on_disk(base: Path, file: str) -> str:
    """Return a path of the list below ``base``; in ``imagesTr/imagesTr`` where unpacking has doubled the folder."""
    file = posixpath.normpath(file)
    folder, name = posixpath.split(file)
    doubled = posixpath.join(folder, posixpath.basename(folder), name)
    return doubled if not (base / file).exists() and (base / doubled).is_file() else file


def _reason(name: str, seen: set[str], mask: str, withheld: bool) -> str:
    """Return why an entry of the list is left out, or an empty string."""
    number = re.fullmatch(r"amos_(\d+)", name)
    if number is None:
        return "no case number"
    if int(number.group(1)) > LAST_CT:
        return "not CT"
    if name in seen:
        return "duplicate id"
    return "no label map" if not mask or withheld else ""


def _entries(content: dict[str, Any], split: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (image, label map or empty) of a list, as paths relative to the file's folder."""
    entries = content.get(split, [])
    if not isinstance(entries, list):
        raise DataError(f'{path}: "{split}" is not a list. Give AMOS22\'s own dataset.json.')
    for index, entry in enumerate(entries):
        parts: list[Any] = [entry.get("image"), entry.get("label") or ""] if isinstance(entry, dict) else [entry, ""]
        below = (isinstance(p, str) and p[:1] != "/" and posixpath.normpath(p).split("/")[0] != ".." for p in parts)
        image, mask = parts
        if not image or not all(below):
            raise DataError(
                f"{path}: {split}[{index}] is {json.dumps(entry)}. "
                'Write {"image": PATH, "label": PATH} with paths below the folder of this file.'
            )
        yield image, mask


def _check_labels(labels: Any, path: Path) -> None:
    """Compare the file's organs, ``{"1": "spleen", ...}`` or ``{"spleen": 1, ...}``, with the expected ones."""
    if labels is None:
        return
    if not isinstance(labels, dict):
        raise DataError(f'{path}: "labels" is not a mapping of numbers to names. Give AMOS22\'s own dataset.json.')
    pairs = [(key, name) if str(key).isdigit() else (name, key) for key, name in labels.items()]
    found = {str(number): _plain(name) for number, name in pairs}
    expected = {str(number): name for number, name in enumerate((BACKGROUND, *ORGANS))}
    found.setdefault("0", BACKGROUND)
    for number in sorted(found.keys() | expected.keys(), key=lambda text: (len(text), text)):
        own, name = found.get(number, "missing"), expected.get(number, "no label")
        if own != _plain(name):
            raise DataError(
                f'{path}: label {number} is "{own}" where AMOS22 has "{name}". '
                'If it is the same organ correct its name, otherwise renumber the label maps; or remove "labels".'
            )


def _plain(name: Any) -> str:
    text = " ".join(re.split(r"[\s_]+", str(name).strip().lower()))
    return OWN_SPELLING.get(text, text)


DATASET = Dataset(
    name="amos",
    title="AMOS22, the abdominal multi-organ benchmark, CT volumes",
    task="segmentation: 15 abdominal organs in CT (Table 8)",
    source="https://zenodo.org/records/7262581 (amos22.zip, with the validation labels)",
    licence="CC BY 4.0",
    tree="""\
dataset.json                                 {"training", "validation", "test": [{"image", "label"}], "labels"}
imagesTr/amos_0001.nii.gz  labelsTr/amos_0001.nii.gz
imagesVa/amos_0008.nii.gz  labelsVa/amos_0008.nii.gz
imagesTs/amos_0002.nii.gz                    (without labels)""",
    collect=collect,
    training={"": 200},
    notes="200 training and 100 validation CT volumes; numbers above 500 are MRI and left out. The paper reports on "
    "the validation volumes, which are the test split unless --split official. The file's own names are kept but "
    "for its misspelt aorta.",
)
