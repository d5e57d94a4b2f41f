# SPDX-License-Identifier: Apache-2.0
"""Good uploads of every format: what is made of them, against the same files through the package's own functions."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimedi_components.retrieval import Embedder, PromptSet, ZeroShot


def expected(embedder: Embedder, prompts: dict[int, PromptSet], path: Path, dim: int) -> dict[str, float]:
    """Zero-shot probabilities of a file on disk, without the page."""
    zero_shot = ZeroShot(embedder, prompts[dim])
    row = zero_shot.probabilities(embedder.images(path, progress=False).embed)[0]
    return dict(zip(zero_shot.names, row.tolist(), strict=True))


def probabilities(answer: dict[str, Any]) -> dict[str, float]:
    return {finding["name"]: finding["probability"] for finding in answer["findings"]}


def same(found: dict[str, float], wanted: dict[str, float], tolerance: float = 1e-5) -> bool:
    return list(found) == list(wanted) and np.allclose(list(found.values()), list(wanted.values()), atol=tolerance)


@pytest.mark.parametrize("name", ["film.png", "film.jpg", "film.bmp", "film.tif", "FILM.JPEG"])
def test_pictures(name: str, files: Any, upload: Any, embedder: Embedder, prompts: dict[int, PromptSet]) -> None:
    path = files.picture(name)
    status, answer = upload(path)
    assert status == 200 and (answer["kind"], answer["dim"], answer["name"]) == ("X-ray", 2, name)
    assert same(probabilities(answer), expected(embedder, prompts, path, 2))
    assert "70 × 90 pixels" in answer["seen"]["File"] and answer["warnings"] == []
    assert answer["prompts"] == "chest_xray" and answer["slabs"] == [] and len(answer["pictures"]) == 1


def test_grey_as_rgb_and_other_depths_give_the_same(files: Any, upload: Any) -> None:
    grey = files.film()
    marked = np.repeat(grey[..., None], 3, axis=2)
    one = upload(files.picture("grey.png", grey))[1]
    rgb = upload(files.picture("rgb.png", marked))[1]
    deep = upload(files.picture("deep.png", grey.astype(np.uint16) * 257))[1]
    assert same(probabilities(rgb), probabilities(one), 1e-2)
    assert deep["kind"] == "X-ray" and upload(("named.jpg", (files.folder / "grey.png").read_bytes()))[0] == 200
    marked[4:14, 4:14] = (255, 0, 0)
    status, answer = upload(files.picture("arrow.png", marked))
    assert status == 200 and answer["warnings"] == []


def test_dicom_xrays(files: Any, upload: Any, embedder: Embedder, prompts: dict[int, PromptSet]) -> None:
    pixels = files.film().astype(np.uint16) * 16
    for name, more in (("film.dcm", {}), ("IM0001", {}), ("knee", {(0x18, 0x15): ("CS", "KNEE")})):
        path = files.dicom(name, pixels, "CR", more=more)
        status, answer = upload(path)
        assert status == 200 and answer["dim"] == 2, answer
        assert same(probabilities(answer), expected(embedder, prompts, path, 2))
        assert answer["seen"]["File"] == "DICOM, modality CR, 70 × 90 pixels"
        assert answer["warnings"] == (
            ["The DICOM header names the body part KNEE; the network knows chests."] if more else []
        )


def test_volumes_of_every_format_give_the_same(
    files: Any, upload: Any, embedder: Embedder, prompts: dict[int, PromptSet]
) -> None:
    voxels = files.voxels()
    plain, packed = files.nifti("scan.nii", voxels), files.nifti("scan.nii.gz", voxels)
    wanted = expected(embedder, prompts, plain, 3)
    # ITK's formats count x and y the other way
    header = "NDims = 3\nDimSize = 30 28 26\nElementType = MET_SHORT\nElementSpacing = 9 9 8\n"
    header += "TransformMatrix = -1 0 0 0 -1 0 0 0 1\n"
    raw = voxels.tobytes(order="F")
    attached = files.raw("scan.mha", f"ObjectType = Image\n{header}ElementDataFile = LOCAL\n".encode() + raw)
    detached = files.raw("scan.mhd", f"{header}ElementDataFile = voxels.raw\n".encode())
    squeezed = files.raw("small.mhd", f"{header}CompressedData = True\nElementDataFile = small.zraw\n".encode())
    nrrd = "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 30 28 26\nendian: little\n"
    nrrd += "space directions: (9,0,0) (0,9,0) (0,0,8)\nkinds: domain domain domain\nspace origin: (0,0,0)\n"
    uploads: dict[str, list[Any]] = {
        "nii": [plain],
        "nii.gz": [packed],
        "gz named .nii": [("scan.nii", packed.read_bytes())],
        "nii named .nii.gz": [("scan.nii.gz", plain.read_bytes())],
        "mha": [attached],
        "mhd": [detached, files.raw("voxels.raw", raw)],
        "zraw": [files.raw("small.zraw", zlib.compress(raw)), squeezed],
        "nrrd": [files.raw("scan.nrrd", f"{nrrd}encoding: raw\n\n".encode() + raw)],
        "nrrd.gz": [files.raw("scan.nrrd", f"{nrrd}encoding: gzip\n\n".encode() + gzip.compress(raw))],
        "zip": [files.zipped("scan.zip", {"a/scan.nii": plain, "__MACOSX/._scan.nii": b"x", "a/read.me": b"text"})],
    }
    for what, given in uploads.items():
        status, answer = upload(*given)
        assert status == 200, (what, answer)
        assert (answer["kind"], answer["dim"]) == ("CT", 3)
        assert same(probabilities(answer), wanted), what
        assert answer["seen"]["Volume"] == "30 × 28 × 26 voxels of 9 × 9 × 8 mm", what
        assert answer["seen"]["Orientation"] == "RAS in the file, turned to SPL", what
        assert answer["seen"]["Field of view"].startswith("270 × 252 × 208 mm"), what
        assert answer["warnings"] == (["Left out, no image: read.me."] if what == "zip" else []), what


def test_dicom_series(files: Any, upload: Any, embedder: Embedder, prompts: dict[int, PromptSet]) -> None:
    slices = files.series(count=24)
    wanted = expected(embedder, prompts, files.folder, 3)
    status, answer = upload(*slices)
    assert status == 200 and answer["name"] == f"{slices[0].name} and 23 more"
    assert same(probabilities(answer), wanted) and answer["warnings"] == []
    assert answer["seen"]["File"] == "DICOM CT series of 24 files" and answer["seen"]["Series"] == "series 1"
    assert answer["seen"]["Volume"] == "30 × 28 × 24 voxels of 9 × 9 × 8 mm"
    # what a hospital's export holds beside the slices, in folders, with equal names in different folders
    scout = files.dicom(
        "s.dcm", files.film().astype(np.uint16), "CT", series="9", more={(8, 8): ("CS", "A\\B\\LOCALIZER")}
    )
    contours = files.dicom("c.dcm", modality="RTSTRUCT", series="8")
    members: dict[str, Any] = {f"ct/{i % 2}/IM{i // 2:04d}": path for i, path in enumerate(slices)}
    members |= {
        "DICOMDIR": b"directory",
        "scout/IM0000": scout,
        "rt/IM0000": contours,
        "viewer.exe": bytes([0, 255] * 9),
    }
    status, answer = upload(files.zipped("export.zip", members))
    assert status == 200 and answer["name"] == "export.zip", answer
    assert same(probabilities(answer), wanted)
    assert answer["warnings"] == [
        "Left out, no image: viewer.exe.",
        "Left out: IM0000: is a scout view (LOCALIZER), no slice of the series.",
        "Left out: IM0000: is DICOM of modality RTSTRUCT (contours for radiotherapy). Give a chest X-ray (CR, DX) or a "
        "CT.",
    ]


def test_doubts_are_said(files: Any, upload: Any) -> None:
    slices = files.series(count=30)
    status, answer = upload(*slices[:12], *slices[14:])
    assert status == 200 and answer["warnings"] == [
        "Slices seem to be missing: 1 gap(s) of up to 24 mm where 8 mm is usual; resampled to 30 slices in even steps "
        "of 8 mm."
    ]
    odd = files.dicom("b.dcm", files.film(40, 40).astype(np.uint16), "CT", position=99)
    status, answer = upload(*slices, odd)
    assert status == 200 and answer["warnings"] == [
        "Left out: b.dcm: is one CT slice. Give all files of its series, or its folder."
    ]
    status, answer = upload(files.nifti("stored.nii", (files.voxels() + 1024).astype(np.int16)))
    assert status == 422 and "are not Hounsfield units: none reaches air" in answer["error"], answer
    status, answer = upload(files.nifti("mr.nii", np.clip(files.voxels() + 1024, 0, 200).astype(np.int16)))
    assert status == 422 and answer["error"].startswith("mr.nii: values 0 to 200 are not Hounsfield units: none")
    assert answer["error"].endswith(", or read the values as they are with --assume_hu."), answer
    status, answer = upload(files.nifti("slab.nii", files.voxels((30, 28, 12)), np.diag([2, 2, 2, 1.0])))
    assert status == 200
    assert answer["warnings"] == [
        "Only 12 slices over 24 mm: a slab, not a whole chest, and it is stretched to the network's depth.",
        "The field of view is only 60 × 56 mm: a crop, not a whole chest.",
    ]


def test_names_are_text_only(files: Any, upload: Any) -> None:
    for given in ("<img src=x onerror=alert(1)>.png", "CON.png", "röntgen 1.png", f"{'long' * 60}.png"):
        status, answer = upload((given, files.picture("a.png").read_bytes()))
        assert status == 200 and answer["name"].endswith(".png") and len(answer["name"]) <= 120
        assert answer["name"] == given or len(given) > 120
    # folders are not shown; see `folders_whose_series_have_no_name` for what they tell
    assert upload(("folder/film.png", files.picture("a.png").read_bytes()))[1]["name"] == "film.png"
