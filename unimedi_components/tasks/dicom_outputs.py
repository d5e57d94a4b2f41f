# SPDX-License-Identifier: Apache-2.0
"""Masks, label maps and boxes as DICOM beside the images that they are of, by highdicom (extra `[dicom]`).

Masks and label maps become a Segmentation (PS3.3 A.51), boxes a Comprehensive SR with a measurement report (TID 1500).
"""

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components import __version__
from unimedi_components.arrays import Array
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.files import replacing
from unimedi_components.images.dicom_stacks import Stack
from unimedi_components.images.headers import DicomHeader, is_dicom, load_pydicom, read_header

logger = logging.getLogger(__name__)

#: [x0, y0, x1, y1] in pixels of the film, label, score.
Boxes = Sequence[tuple[Sequence[float], str, float]]

# what patients' and studies' modules need, with or without a value
_TYPE_2 = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
# what another DICOM names a file by
_REFERRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_MAKER = "UniMedI"
# a voxel of a label map lies on a slice of the series where it is this near, in steps
_ON_SLICE = 0.5


def check_dicom_outputs() -> None:
    """Pass where highdicom is installed, and quieten what it says of every file. Raises ConfigError: it is not."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise ConfigError(
            "DICOM outputs need the package highdicom: pip install 'unimedi-components[dicom]', or set dicom_output to "
            "false"
        ) from None
    # each attribute that it copies, and names of patients that have one part
    logging.getLogger("highdicom").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*unlikely to represent the intended person name")


def write_mask(source: str | Path, mask: Array, label: str, target: str | Path) -> Path | None:
    """Write the mask of a film as a DICOM Segmentation.

    ``mask``: bool (H, W), in the film's own pixels.

    Returns:
        `target`; None where the film is no DICOM or lacks its UIDs, or nothing is masked: no Segmentation is empty.
    """
    if not is_dicom(source) or not mask.any():
        return None
    header = read_header(source)
    if _nameless(header):
        return None
    return _write_segmentation([_source(header)], mask[None, ..., None], [label], Path(target))


def write_label_map(stack: Stack, labels: Array, affine: Array, names: Sequence[str], target: Path) -> Path | None:
    """Write a label map of a DICOM CT as a DICOM Segmentation, a segment for each label that occurs; None if none.

    ``stack``: the CT's slices, files of their own or frames of one; nothing is written where a file lacks its UIDs.
    ``labels``: whole numbers (X, Y, Z), X along the rows' pixels and Y along the columns', as `read_volume` lays them.
    ``affine``: (4, 4) from voxel indices to mm, RAS. Raises DataError: the label map does not lie on the slices.
    """
    present = [number for number in range(1, len(names)) if (labels == number).any()]
    if not present or any(_nameless(one.header) for one in stack.slices):
        return None
    planes, to_index = [], np.linalg.inv(np.asarray(affine, dtype=float))
    for one in stack.slices:
        # from LPS to RAS
        index = to_index @ np.array([-one.position[0], -one.position[1], one.position[2], 1])
        level = round(float(index[2]))
        on_slice = abs(index[2] - level) <= _ON_SLICE and np.abs(index[:2]).max() <= _ON_SLICE
        size = (one.header.columns, one.header.rows)
        if not on_slice or not 0 <= level < labels.shape[2] or labels.shape[:2] != size:
            raise DataError(f"{one.header.path}: the label map does not lie on the slices of the series")
        planes.append(np.stack([number == labels[:, :, level].T for number in present], axis=-1))
    sources = [_source(header) for header in {one.header.path: one.header for one in stack.slices}.values()]
    for source in sources:
        if "FrameOfReferenceUID" not in source:
            # slices of one stack share one, though their files do not name it
            source.FrameOfReferenceUID = _uid(sources[0], "frame of reference")
    return _write_segmentation(sources, np.stack(planes), [names[n] for n in present], target, stack)


def write_boxes(source: str | Path, boxes: Boxes, target: str | Path) -> Path | None:
    """Write the boxes of a film as a DICOM structured report.

    Returns `target`; None where the film is no DICOM or lacks its UIDs, or there is no box.
    """
    if not is_dicom(source) or not boxes:
        return None
    load_pydicom()
    from highdicom import sr
    from pydicom.sr.codedict import codes

    header = read_header(source)
    if _nameless(header):
        return None
    film = _source(header)
    device = sr.DeviceObserverIdentifyingAttributes(uid=_uid(film, "device"), name=_MAKER)
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
        name = sr.CodedConcept("score", "99UNIMEDI", "Score of the detector")
        probability = sr.Measurement(name=name, value=float(score), unit=codes.UCUM.NoUnits)
        groups.append(
            sr.PlanarROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(_uid(film, f"box {number}"), f"{label} {number}"),
                referenced_region=region,
                finding_type=_concept(label),
                measurements=[probability],
            )
        )
    report = sr.MeasurementReport(
        observation_context=context, procedure_reported=_concept("Chest X-ray"), imaging_measurements=groups
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


def _write_segmentation(
    sources: list[Any], planes: Array, labels: Sequence[str], target: Path, stack: Stack | None = None
) -> Path:
    """`planes` bool (slices, H, W, labels), each on its source, or on a slice of the stack."""
    load_pydicom()
    import highdicom as hd
    from pydicom.sr.codedict import codes

    family = codes.DCM.ArtificialIntelligence
    algorithm = hd.AlgorithmIdentificationSequence(name=_MAKER, version=__version__, family=family)
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
        **(_planes(stack) if stack else {}),
    )
    return _save(file, target)


def _planes(stack: Stack) -> dict[str, Any]:
    """Where the slices lie, which enhanced files may say in either of their functional groups."""
    import highdicom as hd

    first, step = stack.slices[0], float(np.linalg.norm(stack.affine[:3, 2]))
    patient = hd.CoordinateSystemNames.PATIENT
    return {
        "pixel_measures": hd.PixelMeasuresSequence(first.spacing, step, step),
        "plane_orientation": hd.PlaneOrientationSequence(patient, first.orientation.tolist()),
        "plane_positions": [hd.PlanePositionSequence(patient, one.position.tolist()) for one in stack.slices],
    }


def _concept(text: str) -> Any:
    """A code of our own for a label, which needs none of a vocabulary."""
    from highdicom.sr import CodedConcept

    value = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:16] or "label"
    return CodedConcept(value, "99UNIMEDI", text[:64])


def _nameless(header: DicomHeader) -> bool:
    """Whether a file lacks a UID of its own, so that no DICOM can refer to it; says so."""
    missing = [name for name in _REFERRED if not header.text(name)]
    if missing:
        logger.warning("%s: lacks %s, so no DICOM is written of it", header.path, ", ".join(missing))
    return bool(missing)


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
