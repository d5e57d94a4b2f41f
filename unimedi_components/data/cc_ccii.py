# SPDX-License-Identifier: Apache-2.0
"""Clean-CC-CCII, CT scans as PNG slices in three classes, to a datalist (S4.2.1: volume classification).

The split lists of the HKBU-HPML repository are ``{class: {patient: {scan: [png, ...]}}}``, and part of the cleaning.
They leave out repeated slices, and they name the slices of each scan in the order of the body: 98 scans are stored
upside down and 61 with blocks out of place (column ``re_order`` of ``CT_cleaned_v2.csv`` there), which the lists undo.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from unimedi_components.data.datalist import DatalistBuilder, Dataset
from unimedi_components.data.slice_files import in_slice_order
from unimedi_components.data.sources import (
    check_choice,
    existing_root,
    find_source,
    first_source,
    progress_map,
    read_json,
    unrepeated,
)
from unimedi_components.data.splits import split_patients, strata_by_label
from unimedi_components.errors import DataError
from unimedi_components.images.xray_checks import IMAGE_CHECKS, xray_fault

#: Class folders in the order of their labels: common pneumonia 0, novel coronavirus pneumonia 1, normal 2.
CLASSES = ("CP", "NCP", "Normal")
LISTS = {"training": "ct_train*.json", "validation": "ct_val*.json", "test": "ct_test*.json"}
#: A folder of a class, or a part of one, at most so deep below ROOT.
_PART_DEPTH = 3
_PART = re.compile(r"(CP|NCP|Normal)(?:[-_ ]?\d+)?", re.IGNORECASE)
LIST_FOLDERS = ("", "*/", *(f"{above}covid19_pipeline/data/ccccii/" for above in ("*/*/", "", "*/")))


class _Scan(NamedTuple):
    """A scan and its listed slices; None where no list names them."""

    label: str
    patient: str
    name: str
    slices: list[str] | None = None

    @property
    def id(self) -> str:
        return "_".join(self[:3])

    @property
    def folder(self) -> str:
        return "/".join(self[:3])


class _Found(NamedTuple):
    """What a scan's folder holds: the names if they are not simply all of it, counts, and what is wrong."""

    slices: list[str] | None
    counts: dict[str, int]
    fault: tuple[str, str] | None


def collect(
    root: str | Path,
    *,
    strict: bool = False,
    seed: int = 42,
    validation_fraction: float = 0.1,
    official_validation: bool = False,
    test_fraction: float = 0.2,
    split_dir: str | Path | None = None,
    slice_order: str = "listed",
    min_slices: int = 1,
    check_images: str = "quick",
    num_workers: int = 8,
    progress: bool = True,
) -> DatalistBuilder:
    """Read Clean-CC-CCII.

    Official training scans are those of ``ct_train`` and ``ct_val`` together: the second is a part of the first
    in one of the repository's folders and completes it in the other.

    Args:
        root: ``dataset_cleaned`` or the folder that holds it; item paths are relative to it.
        validation_fraction: share of the training patients of each class for validation (ours: the paper has none).
        official_validation: take the patients of ``ct_val*.json`` (800 scans) for validation instead.
        test_fraction: share of the patients of each class for test where there are no lists at all.
        split_dir: folder of the lists, if they are not in ROOT, in a folder below it or beside it.
        slice_order: ``"listed"`` keeps the lists' order of slices, ``"number"`` sorts them by file name.
        min_slices: fewest slices of a scan (the smallest official one has 9).
        check_images: ``"exists"`` looks for the listed slices; ``"quick"`` also reads the first and last bytes
            of a scan's first and last slice; ``"full"`` decodes every slice; ``"none"`` touches no scan.

    Returns:
        The builder. Drop reasons: ``missing image`` (too few listed slices are there), ``fewer than N slices``,
        ``unreadable image``, ``not in the split lists``, ``patient in another split``.
    """
    check_choice("check_images", check_images, IMAGE_CHECKS)
    check_choice("slice_order", slice_order, ("listed", "number"))
    base = existing_root(root, "Clean-CC-CCII")
    folders = _class_folders(base)
    builder = DatalistBuilder("cc_ccii", root, strict)
    builder.meta.update(task="multiclass", label_names=list(CLASSES), slice_order=slice_order)
    lists = _split_lists(builder, base, split_dir)
    builder.meta["split"] = "official" if lists else "seeded"
    if not lists:
        lists = _drawn(builder, _scans_on_disk(base, folders), test_fraction, seed)
    elif check_images != "none":
        listed = {scan.id for scans in lists.values() for scan in scans}
        builder.drop_many("not in the split lists", (s.id for s in _scans_on_disk(base, folders) if s.id not in listed))
    parts = _hold_out(builder, lists, official_validation, validation_fraction, seed)

    def place(scan: _Scan) -> Path:
        places = [folder / scan.patient / scan.name for folder in folders[scan.label]]
        return next((path for path in places[:-1] if path.is_dir()), places[-1])

    def look(scan: _Scan) -> _Found:
        return _look(scan, place(scan), slice_order, min_slices, check_images)

    for split, scans in parts.items():
        for scan, found in zip(scans, progress_map(look, scans, f"{split} scans", num_workers, progress), strict=True):
            _add(builder, split, scan, found, place(scan).relative_to(base).as_posix())
    builder.keep_apart()
    for name, done in (("missing_slices", "left out"), ("repeated_slices", "counted once")):
        if counts := builder.meta.get(name):
            slices = f"{sum(counts.values())} listed slices of {len(counts)} kept scans"
            builder.remedies.append(f"{slices} are {name.split('_')[0]} and were {done}.")
    return builder


def _split_lists(builder: DatalistBuilder, base: Path, split_dir: str | Path | None) -> dict[str, list[_Scan]]:
    """Return the scans of the official lists by split; empty where there are no lists."""
    places = [base]
    if split_dir is not None:
        places = [existing_root(split_dir, "Clean-CC-CCII split")]
    elif base.resolve().name == "dataset_cleaned":
        places.append(base.resolve().parent)
    names = [folder + LISTS[split] for folder in LIST_FOLDERS for split in ("training", "test")]
    if split_dir is not None:
        find_source(places[0], names, "split list")
    found = [first_source(place, names) for place in places]
    folders = [path.parent for path in found if path is not None]
    lists: dict[str, list[_Scan]] = {}
    for split, name in LISTS.items() if folders else ():
        path = first_source(folders[0], [name])
        if path is None and split != "validation":
            find_source(folders[0], [name], f"list of the {split} scans")
        if path is not None:
            lists[split] = _read_list(path)
            builder.add_source(path)
    return lists


def _read_list(path: Path) -> list[_Scan]:
    remedy = "Fetch it again from covid19_pipeline/data/ccccii of the HKBU-HPML repository."
    content = read_json(path, remedy, "a split list", object_pairs_hook=unrepeated)
    try:
        scans = [
            _Scan(label, patient, scan, slices)
            for label, patients in content.items()
            for patient, own in patients.items()
            for scan, slices in own.items()
        ]
    except AttributeError as error:
        raise DataError(f"{path}: is not {{class: {{patient: {{scan: [png, ...]}}}}}}. {remedy}") from error
    for scan in scans:
        if scan.label not in CLASSES:
            raise DataError(f"{path}: unknown class {scan.label!r}; the classes are {', '.join(CLASSES)}. {remedy}")
        if not isinstance(scan.slices, list) or not all(isinstance(name, str) for name in scan.slices):
            raise DataError(f"{path}: {scan.folder} has no list of file names. {remedy}")
    return scans


def _class_folders(base: Path) -> dict[str, list[Path]]:
    """Return the folders of patients by class: one each, or several where the archives' parts lie side by side."""
    tree = base / "dataset_cleaned" if (base / "dataset_cleaned").is_dir() else base
    plain = [label for label in CLASSES if (tree / label).is_dir()]
    looks_split = any(_PART.fullmatch(path.name) and path.name not in CLASSES for path in tree.iterdir())
    if plain and not looks_split and not any((tree / label / label).is_dir() for label in plain):
        return {label: [tree / label] for label in CLASSES}
    parts: dict[str, list[Path]] = {label: [] for label in CLASSES}
    names = {label.lower(): label for label in CLASSES}
    # a part that holds a folder of a part's name is a wrapping alone
    waiting = [(base, 0)]
    while waiting:
        folder, level = waiting.pop(0)
        below = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[:1] not in "._")
        inner = [path for path in below if _PART.fullmatch(path.name)]
        match = _PART.fullmatch(folder.name) if level else None
        if match and not inner:
            parts[names[match[1].lower()]].append(folder)
        elif level < _PART_DEPTH:
            waiting += [(path, level + 1) for path in (inner or below)]
    return {label: parts[label] or [tree / label] for label in CLASSES}


def _scans_on_disk(base: Path, folders: dict[str, list[Path]]) -> list[_Scan]:
    scans = dict.fromkeys(
        _Scan(label, path.parent.name, path.name)
        for label in CLASSES
        for folder in folders[label]
        for path in sorted(folder.glob("*/*"))
        if path.is_dir() and not path.name.startswith(".")
    )
    if not scans:
        looked = f"{{{','.join(CLASSES)}}}/PATIENT/SCAN there, in dataset_cleaned, and in parts such as CP-1/CP"
        raise DataError(f"{base}: no scans. Looked for {looked}. Unpack the archives there, or correct ROOT.")
    return list(scans)


def _drawn(builder: DatalistBuilder, scans: list[_Scan], test_fraction: float, seed: int) -> dict[str, list[_Scan]]:
    builder.remedies.append(
        f"There are no split lists (ct_train.json, ct_test.json): a seeded {test_fraction:.0%} of the patients of each "
        "class are the test split, which is not the official one, and repeated slices or slices out of order stay. "
        "Put the lists of the HKBU-HPML repository (covid19_pipeline/data/ccccii) into ROOT, or give split_dir."
    )
    test = _draw(scans, test_fraction, seed)
    return {name: [s for s in scans if (s.patient in test) == (name == "test")] for name in ("training", "test")}


def _draw(scans: list[_Scan], fraction: float, seed: int) -> set[str]:
    strata = strata_by_label({"patient": scan.patient, "label": scan.label} for scan in scans)
    return {patient for patient, split in split_patients(strata, fraction, 0.0, seed).items() if split == "validation"}


def _hold_out(
    builder: DatalistBuilder, lists: dict[str, list[_Scan]], official: bool, fraction: float, seed: int
) -> dict[str, list[_Scan]]:
    """Return the scans by split, with the validation patients taken out of training."""
    training, validation = lists["training"], lists.get("validation", [])
    training = list({scan.id: scan for scan in [*validation, *training]}.values())
    if official and not validation:
        raise DataError(f"{builder.root}: no {LISTS['validation']} for official_validation. Fetch it or leave it out.")
    held_out = {scan.patient for scan in validation} if official else _draw(training, fraction, seed)
    builder.meta["validation"] = "official" if official else "seeded"
    return {
        "training": [scan for scan in training if scan.patient not in held_out],
        "validation": [scan for scan in training if scan.patient in held_out],
        "test": lists["test"],
    }


def _look(scan: _Scan, folder: Path, order: str, min_slices: int, check: str) -> _Found:
    """Compare a scan's listed slices with its folder, and check files."""
    touch = check != "none" or scan.slices is None
    present = in_slice_order(os.listdir(folder)) if touch and folder.is_dir() else []
    named = present if scan.slices is None else scan.slices
    listed = in_slice_order(list(set(named))) if order == "number" else list(dict.fromkeys(named))
    there = set(present) if touch else set(listed)
    kept = [name for name in listed if name in there]
    missing = len(listed) - len(kept)
    counts = {"missing_slices": missing, "repeated_slices": len(named) - len(set(named))}
    fault = None
    if len(kept) < max(1, min_slices):
        reason = "missing image" if missing or not kept else f"fewer than {min_slices} slices"
        fault = reason, f"{folder}: {len(kept)} of {len(listed)} slices are there. Fetch the scan again"
    elif check in ("quick", "full"):
        probed = kept if check == "full" else dict.fromkeys((kept[0], kept[-1]))
        fault = next(filter(None, (xray_fault(folder / name, check, film=False) for name in probed)), None)
    return _Found(None if kept == present else kept, counts, fault)


def _add(builder: DatalistBuilder, split: str, scan: _Scan, found: _Found, folder: str) -> None:
    fault, missing = found.fault, found.counts["missing_slices"]
    if fault is None and missing and builder.strict:
        fault = "missing image", f"{builder.root / folder}: {missing} listed slices are not there"
    if fault is not None:
        builder.drop(fault[0], scan.id, fault[1])
        return
    item: dict[str, Any] = {"id": scan.id, "patient": scan.patient, "image": folder, "dim": 3}
    item["label"] = CLASSES.index(scan.label)
    if found.slices is not None:
        item["slices"] = found.slices
    builder.add(split, item)
    for name, count in found.counts.items():
        if count:
            builder.meta.setdefault(name, {})[scan.id] = count


DATASET = Dataset(
    name="cc_ccii",
    title="Clean-CC-CCII, chest CT scans of common pneumonia, COVID-19 pneumonia and normal lungs",
    task="classification of volumes, three classes (S4.2.1, S7.1): CP 0, NCP 1, Normal 2",
    source="https://github.com/HKBU-HPML/HKBU_HPML_COVID-19 (its links; lists in covid19_pipeline/data/ccccii)",
    licence="none stated for the cleaned set; CC-CCII (http://ncov-ai.big.ac.cn/download) is for research",
    tree="""\
dataset_cleaned/{CP,NCP,Normal}/PATIENT/SCAN/0000.png
CP-1/CP/PATIENT/SCAN/0000.png  NCP-22/PATIENT/...     (or the archives' parts, each in its own folder)
ct_train.json  ct_test.json  [ct_val_part.json]   (here, in a folder below, or --split_dir)""",
    collect=collect,
    training={"": 2_876},
    notes=(
        "Official lists: 3,195 training scans (CP 1,210, NCP 1,213, Normal 772; 2,164 patients), 798 test scans "
        "(303, 302, 193; 534 patients), together 340,190 slices of 3,993 scans and 2,698 patients. The 800 scans of "
        "ct_val_part are training scans. Validation is a seeded 10% of the training patients (our choice), or those "
        "800 with --official_validation. The lists name slices in the order of the body, which is not the "
        "order of the numbers for about 160 scans; --slice_order number ignores that. That the first slice is the "
        "one nearest to the head is our choice: the set does not say (first_slice of slice_volume_transforms). "
        "Grey levels, no Hounsfield units; some PNG are RGB, of which the first channel counts."
    ),
)
