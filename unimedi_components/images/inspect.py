# SPDX-License-Identifier: Apache-2.0
"""What files are taken for before anything runs: a table, JSON, and contact sheets of what a network will see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from unimedi_components.errors import DataError, reason_of
from unimedi_components.images.checks import refused_values
from unimedi_components.images.find import Image, LeftOut, expand, image_items, sort_files, summarised
from unimedi_components.images.headers import DicomHeader, read_header
from unimedi_components.images.identify import DICOM
from unimedi_components.images.volume import read_volume_header, sample_volume, stack_header
from unimedi_components.images.xray import read_xray

__all__ = ["Listing", "inspect_paths"]

_IDENTIFIERS = ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "AccessionNumber")


@dataclass
class Listing:
    """What paths hold.

    Args:
        items: {"id", "kind": "xray" or "volume", "files", "size", "spacing_mm", "orientation", "values", "notes" (what
            was done to an X-ray's values), "warnings"} each, of DICOM "modality" and "series", and "identifiers" where
            they were asked for.
        left_out: files that are no image of their own, and why.
        images: what the items were made of, in their order.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """{"items": [...], "left_out": [{"file", "reason"}]}."""
        return {"items": self.items, "left_out": [{"file": one.file, "reason": one.reason} for one in self.left_out]}

    def table(self) -> str:
        """A line for each item, its warnings below it, and what is left out."""
        rows = [_row(item) for item in self.items]
        head = ("id", "kind", "files", "size", "spacing (mm)", "axes", "values", "")
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = []
        for row, item in zip((head, *rows), ({}, *self.items), strict=True):
            lines.append("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
            lines += [f"    ! {warning}" for warning in item.get("warnings", ())]
            lines += [f"    {name}: {value}" for name, value in item.get("identifiers", {}).items()]
        lines = lines if rows else []
        volumes = sum(item["kind"] == "volume" for item in self.items)
        lines += [f"left out {line}" for line in summarised(self.left_out)]
        return "\n".join(
            [*lines, f"{len(rows) - volumes} X-rays and {volumes} volumes; {len(self.left_out)} files left out"]
        )


def inspect_paths(
    paths: Sequence[str], assume_hu: bool = False, values: bool = True, identifiers: bool = False
) -> Listing:
    """Say what files, folders, patterns and DICOMDIRs are taken for, by the same readers as every command.

    Args:
        paths: relative to the current folder.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.
        values: read pixels too: range of values, and whether they are Hounsfield units.
        identifiers: add the patient's name, id and dates from DICOM headers.

    Raises:
        DataError: a path names nothing.
    """
    base = Path.cwd()
    images, left_out = sort_files(expand([str(path) for path in paths], base), assume_hu)
    listing = Listing(left_out=list(left_out))
    for item, image in zip(image_items(images, base, assume_hu), images, strict=True):
        try:
            row = _xray(image, values) if image.dim == 2 else _volume(image, values, assume_hu)
        except MemoryError:
            raise
        except Exception as error:
            reason = reason_of(error, image.path)
            listing.left_out += [LeftOut(str(file), reason, True) for file in image.files]
            continue
        header = image.header or (image.stack.header if image.stack else None)
        kind = "xray" if image.dim == 2 else "volume"
        told = {"id": item["id"], "kind": kind, "files": [str(file) for file in image.files], **row}
        if header is not None:
            told |= {"modality": header.modality or "not named", "series": _series(header, image)}
        if identifiers and header is not None:
            told["identifiers"] = {name: text for name in _IDENTIFIERS if (text := header.text(name))}
        listing.items.append(told)
        listing.images.append(image)
    listing.left_out.sort()
    return listing


def _series(header: DicomHeader, image: Image) -> str:
    """Which series: its number and what tells the stack from others; descriptions may hold names."""
    number = header.text("SeriesNumber")
    label = image.stack.label if image.stack else ""
    return ", ".join(part for part in (f"series {number}" if number else "", label) if part)


def _xray(image: Image, values: bool) -> dict[str, Any]:
    header = image.header or (read_header(image.path) if image.content == DICOM else None)
    spacing = [round(step, 4) for step in header.pixel_spacing] if header and header.pixel_spacing else None
    if not values:
        size = [header.columns, header.rows] if header else None
        seen = {"size": size, "spacing_mm": spacing, "orientation": None, "values": None, "notes": []}
        return {**seen, "warnings": list(image.warnings)}
    film, notes = read_xray(image.path)
    low, high = float(film.min()), float(film.max())
    return {
        "size": [film.shape[1], film.shape[0]],
        "spacing_mm": spacing,
        "orientation": None,
        "values": [round(low, 4), round(high, 4)],
        "notes": notes,
        "warnings": list(image.warnings),
    }


def _volume(image: Image, values: bool, assume_hu: bool) -> dict[str, Any]:
    stack = image.stack
    header = stack_header(stack) if stack else read_volume_header(image.path)
    span = None
    if values:
        sample = sample_volume(image.path, header, stack)
        low, high = float(sample.min()), float(sample.max())
        span = [low, high] if math.isfinite(low + high) else None
        if text := refused_values(sample, not assume_hu):
            raise DataError(text)
    return {
        "size": list(map(int, header.shape)),
        "spacing_mm": [round(float(step), 4) for step in np.linalg.norm(header.affine[:3, :3], axis=0)],
        "orientation": "".join(map(str, nib.aff2axcodes(header.affine))),  # type: ignore[attr-defined]
        "values": span,
        "notes": [],
        "warnings": list(image.warnings),
    }


def _row(item: Mapping[str, Any]) -> tuple[str, ...]:
    span = item["values"]
    return (
        item["id"],
        item["kind"],
        str(len(item["files"])),
        _by(item["size"]),
        _by(item["spacing_mm"]),
        item["orientation"] or "",
        "" if span is None else f"{span[0]:.4g} to {span[1]:.4g}",
        ", ".join(item.get("notes", ())),
    )


def _by(values: Sequence[float] | None) -> str:
    return "" if values is None else " x ".join(f"{value:.4g}" for value in values)
