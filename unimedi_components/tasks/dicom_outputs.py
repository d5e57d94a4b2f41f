# SPDX-License-Identifier: Apache-2.0
"""Masks, label maps and boxes as DICOM beside the images that they are of, by highdicom (extra `[dicom]`).

Masks and label maps become a Segmentation (PS3.3 A.51), boxes a Comprehensive SR with a measurement report (TID 1500).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unimedi_components import __version__
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.files import replacing
from unimedi_components.images.headers import DicomHeader, is_dicom, load_pydicom, read_header

__all__ = ["Boxes", "check_dicom_outputs", "write_boxes", "write_label_map", "write_mask"]

Array = npt.NDArray[Any]
#: [x0, y0, x1, y1] in pixels of the film, label, score.
Boxes = Sequence[tuple[Sequence[float], str, float]]

# what patients' and studies' modules need, with or without a value
_TYPE_2 = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
_MAKER = "UniMedI"
# a voxel of a label map lies on a slice of the series where it is this near, in steps
_ON_SLICE = 0.5


def check_dicom_outputs() -> None:
    """Pass where highdicom is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise ConfigError(
            "DICOM outputs need the package highdicom: pip install 'unimedi-components[dicom]', or set dicom_output to "
            "false"
        ) from None


def write_mask(source: str | Path, mask: Array, label: str, target: str | Path) -> Path | None:
    """Write the mask of a film as a DICOM Segmentation.

    Args:
        source: the film.
        mask: bool (H, W), in the film's own pixels.
        label: of what is masked.
        target: the file to write.

    Returns:
        `target`; None where the film is no DICOM, or nothing is masked, which a Segmentation cannot hold.
    """
    if not is_dicom(source) or not mask.any():
        return None
    header = read_header(source)
    return _write_segmentation([_source(header)], mask[None, ..., None], [label], Path(target))


def write_label_map(
    files: Sequence[str | Path], labels: Array, affine: Array, names: Sequence[str], target: Path
) -> Path | None:
    """Write a label map of a series of single slices as a DICOM Segmentation, a segment for each label that occurs.

    Args:
        files: of the slices.
        labels: whole numbers (X, Y, Z), X along the rows' pixels and Y along the columns', as `read_volume` lays them.
        affine: (4, 4) from voxel indices to mm, RAS.
        names: of the labels, background first.
        target: the file to write.

    Returns:
        `target`; None where a file is no DICOM slice with a place, or no label occurs.

    Raises:
        DataError: the label map does not lie on the slices.
    """
    present = [number for number in range(1, len(names)) if (labels == number).any()]
    if not present or not files or not all(is_dicom(file) for file in files):
        return None
    headers = [read_header(file) for file in files]
    if any(header.position is None or header.frames > 1 for header in headers):
        return None
    planes, to_index = [], np.linalg.inv(np.asarray(affine, dtype=float))
    for header in headers:
        assert header.position is not None
        # from LPS to RAS
        place = np.array([-header.position[0], -header.position[1], header.position[2], 1])
        index = to_index @ place
        level = round(float(index[2]))
        on_slice = abs(index[2] - level) <= _ON_SLICE and np.abs(index[:2]).max() <= _ON_SLICE
        if not on_slice or not 0 <= level < labels.shape[2] or labels.shape[:2] != (header.columns, header.rows):
            raise DataError(f"{header.path}: the label map does not lie on the slices of the series")
        planes.append(np.stack([number == labels[:, :, level].T for number in present], axis=-1))
    return _write_segmentation([_source(h) for h in headers], np.stack(planes), [names[n] for n in present], target)


def write_boxes(source: str | Path, boxes: Boxes, target: str | Path) -> Path | None:
    """Write the boxes of a film as a DICOM structured report.

    Args:
        source: the film.
        boxes: each with its label and its score.
        target: the file to write.

    Returns:
        `target`; None where the film is no DICOM, or there is no box.
    """
    if not is_dicom(source) or not boxes:
        return None
    load_pydicom()
    from highdicom import sr
    from pydicom.sr.codedict import codes

    film = _source(read_header(source))
    device = sr.DeviceObserverIdentifyingAttributes(uid=_uid(film, "device"), name="UniMedI")
    observer = sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    context = sr.ObservationContext(observer_device_context=observer)
    groups = []
    for number, ((x0, y0, x1, y1), label, score) in enumerate(boxes, start=1):
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], dtype=float)
        region = sr.ImageRegion(
            graphic_type=sr.GraphicTypeValues.POLYLINE,
            graphic_data=corners,
            source_image=sr.SourceImageForRegion.from_source_image(film),
        )
        probability = sr.Measurement(
            name=sr.CodedConcept("score", "99UNIMEDI", "Score of the detector"),
            value=float(score),
            unit=codes.UCUM.NoUnits,
        )
        groups.append(
            sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(_uid(film, f"box {number}"), f"{label} {number}"),
                referenced_region=region,
                finding_type=_concept(label),
                measurements=[probability],
            )
        )
    report = sr.MeasurementReport(
        observation_context=context,
        procedure_reported=_concept("Chest X-ray"),
        imaging_measurements=groups,
    )
    file = sr.ComprehensiveSR(
        evidence=[film],
        content=report,
        series_instance_uid=_uid(film, "boxes series"),
        series_number=901,
        sop_instance_uid=_uid(film, "boxes"),
        instance_number=1,
        manufacturer=_MAKER,
        is_complete=True,
        is_verified=False,
    )
    return _save(file, Path(target))


def _write_segmentation(sources: list[Any], planes: Array, labels: Sequence[str], target: Path) -> Path:
    """`planes` bool (slices, H, W, labels)."""
    load_pydicom()
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name="UniMedI", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    segments = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label[:64],
            segmented_property_category=_concept("Predicted structure"),
            segmented_property_type=_concept(label),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(labels, start=1)
    ]
    file = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=planes.astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=_uid(sources[0], "segmentation series"),
        series_number=900,
        sop_instance_uid=_uid(sources[0], "segmentation"),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name="UniMedI bundles",
        software_versions=__version__,
        device_serial_number="0",
    )
    return _save(file, target)


def _concept(text: str) -> Any:
    """A code of our own for a label, which needs none of a vocabulary."""
    from highdicom.sr import CodedConcept

    value = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:16] or "label"
    return CodedConcept(value, "99UNIMEDI", text[:64])


def _source(header: DicomHeader) -> Any:
    """The header as highdicom wants it: with the elements that may be empty."""
    dataset = header.dataset
    for keyword in _TYPE_2:
        if keyword not in dataset:
            setattr(dataset, keyword, "")
    if header.position is None and "FrameOfReferenceUID" in dataset:
        # a frame of reference without a place in it
        del dataset.FrameOfReferenceUID
    return dataset


def _uid(dataset: Any, what: str) -> str:
    """The same for the same image and version, so that a second run replaces the first one's files."""
    pydicom = load_pydicom()
    return str(pydicom.uid.generate_uid(entropy_srcs=[str(dataset.get("SOPInstanceUID", "")), what, __version__]))


def _save(file: Any, target: Path) -> Path:
    with replacing(target) as temporary:
        file.save_as(temporary, enforce_file_format=True)
    return target
