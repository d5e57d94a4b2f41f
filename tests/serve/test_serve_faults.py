# SPDX-License-Identifier: Apache-2.0
"""Bad uploads, one fault at a time: a status and a sentence with the file, the fault and the remedy; and it goes on."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from unimedi_components.serve import Analyser, Limits, create_app

PIXELS = b"\xe0\x7f\x10\x00"
Given = list[Path | tuple[str, bytes]]


def header_only(path: Path) -> Path:
    """A DICOM file without its last element, the pixels."""
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(PIXELS)])
    return path


def patched(path: Path, place: int, new: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[place : place + len(new)] = new
    path.write_bytes(bytes(content))
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def affine(files: Any, matrix: Any) -> Path:
    """A NIfTI whose stored affine is `matrix`; nibabel mends what it saves."""
    path = patched(files.nifti("scan.nii"), 280, np.asarray(matrix, np.float32)[:3].tobytes())
    return patched(path, 252, struct.pack("<hh", 0, 1))


def huge_png() -> bytes:
    """A PNG that says it has 60,000 by 60,000 pixels."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def huge_dicom(files: Any) -> Path:
    path = files.dicom("film.dcm")
    rows, columns = (struct.pack("<HH2sHH", 0x28, tag, b"US", 2, size) for tag, size in ((0x10, 90), (0x11, 70)))
    content = path.read_bytes()
    for element in (rows, columns):
        assert element in content
        content = content.replace(element, element[:-2] + struct.pack("<H", 65_000))
    path.write_bytes(content)
    return path


def encrypted(files: Any) -> Path:
    path = files.zipped("ct.zip", {"a.dcm": b"a" * 40})
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    path.write_bytes(bytes(content))
    return path


def link(files: Any) -> Path:
    path = files.folder / "ct.zip"
    with zipfile.ZipFile(path, "w") as content:
        member = zipfile.ZipInfo("passwords.dcm")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        content.writestr(member, "/etc/passwd")
    return path


def apng(files: Any) -> Path:
    frames = [Image.fromarray(files.film()) for _ in range(2)]
    path = files.folder / "film.png"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def tiff_pages(files: Any) -> Path:
    frames = [Image.fromarray(files.film()) for _ in range(3)]
    path = files.folder / "film.tif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def metaimage(files: Any, voxels: str, fields: str = "", size: str = "30 28 26") -> Path:
    text = f"ObjectType = Image\nNDims = {len(size.split())}\nDimSize = {size}\n{fields}ElementType = MET_SHORT\n"
    spacing = f"ElementSpacing ={' 9' * (len(size.split()) - 1)} 8"
    return files.raw("scan.mhd", f"{text}{spacing}\nElementDataFile = {voxels}\n".encode())


def loop(files: Any) -> Path:
    """Three grey frames in one file of a modality that has one."""
    frames = np.concatenate([files.film() for _ in range(3)])
    path = files.dicom("loop.dcm", frames.astype(np.uint16), "DX", more={(0x28, 0x8): ("IS", "3")})
    rows = struct.pack("<HH2sHH", 0x28, 0x10, b"US", 2, 270)
    content = path.read_bytes()
    assert rows in content
    path.write_bytes(content.replace(rows, rows[:-2] + struct.pack("<H", 90)))
    return path


def colour_volume(files: Any) -> Path:
    path = files.folder / "rgb.nii"
    voxels = np.zeros((20, 20, 20), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def photograph() -> bytes:
    """A real colour photograph, which scikit-learn brings along."""
    import sklearn.datasets

    return (Path(sklearn.datasets.__file__).parent / "images" / "china.jpg").read_bytes()


CASES: dict[str, tuple[Callable[[Any], Given], int, str]] = {
    # nothing, or not what its name says
    "empty picture": (lambda f: [f.raw("film.png", b"")], 422, "film.png: the file is empty"),
    "empty volume": (lambda f: [f.raw("scan.nii.gz", b"")], 422, "scan.nii.gz: the file is empty"),
    "text as DICOM": (lambda f: [f.raw("film.dcm", b"no DICOM")], 415, "film.dcm: is named as DICOM but holds text"),
    "text as NIfTI": (lambda f: [f.raw("scan.nii", b"none")], 415, "scan.nii: is named as a volume but holds text"),
    "text": (
        lambda f: [f.raw("notes.txt", b"no image")],
        415,
        "notes.txt: holds text, which is not read here. Give an",
    ),
    "random bytes": (lambda f: [f.raw("x.bin", bytes(range(256)))], 415, "x.bin: holds data of an unknown format"),
    "PDF": (lambda f: [f.raw("a.pdf", b"%PDF-1.7 ...")], 415, "a.pdf: holds a PDF document"),
    "GIF": (lambda f: [f.picture("film.gif")], 415, "film.gif: holds a GIF picture"),
    "GIF as PNG": (lambda f: [f.picture("a.gif").rename(f.folder / "a.png")], 415, "a.png: is named as a picture but"),
    "PNG as volume": (
        lambda f: [f.picture("a.png").rename(f.folder / "a.nii.gz")],
        415,
        "a.nii.gz: is named as a volume but holds a PNG picture. Give the file its right ending",
    ),
    "gzip of text": (
        lambda f: [f.raw("scan.nii.gz", gzip.compress(b"text"))],
        415,
        "gzip data that is no NIfTI volume",
    ),
    "half a pair": (lambda f: [f.nifti("a.img"), f.folder / "a.hdr"][1:], 415, "one half of a NIfTI pair"),
    # names
    "path in the name": (
        lambda f: [("../../evil.png", f.picture("a.png").read_bytes())],
        400,
        "../../evil.png: the file name is a path that leads out of its folder. Rename the file",
    ),
    "absolute name": (lambda f: [("/etc/evil.png", f.picture("a.png").read_bytes())], 400, "leads out of its folder"),
    "Windows path": (lambda f: [("..\\evil.png", f.picture("a.png").read_bytes())], 400, "leads out of its folder"),
    "drive": (lambda f: [("C:evil.png", f.picture("a.png").read_bytes())], 400, "leads out of its folder"),
    # pictures
    "a real photograph": (
        lambda f: [("china.jpg", photograph())],
        422,
        "china.jpg: is a colour picture, not a radiograph",
    ),
    "colour photograph": (
        lambda f: [f.picture("cat.jpg", f.photo())],
        422,
        "cat.jpg: is a colour picture, not a radiograph",
    ),
    "truncated JPEG": (lambda f: [cut(f.picture("film.jpg"))], 422, "film.jpg: truncated JPEG, the end-of-image"),
    "truncated PNG": (lambda f: [cut(f.picture("film.png"))], 422, "film.png: truncated PNG, the end chunk is"),
    "one pixel": (lambda f: [f.picture("a.png", f.film(1, 1))], 422, "a.png: all pixels"),
    "black": (lambda f: [f.picture("a.png", np.zeros((50, 50), np.uint8))], 422, "a.png: all pixels"),
    "too many pixels": (lambda f: [("big.png", huge_png())], 413, "big.png: has "),
    "pages": (lambda f: [tiff_pages(f)], 422, "film.tif: holds 3 pages or frames"),
    "animation": (lambda f: [apng(f)], 422, "film.png: holds 2 pages or frames"),
    "two X-rays": (lambda f: [f.picture("a.png"), f.picture("b.png")], 422, "a.png, b.png: 2 studies at once"),
    # DICOM
    "DICOM without pixels": (
        lambda f: [header_only(f.dicom("film.dcm"))],
        422,
        "film.dcm: the DICOM is cut off before its pixels. Export it again",
    ),
    "report": (lambda f: [header_only(f.dicom("r.dcm", modality="SR"))], 415, "modality SR (a structured report)"),
    "contours": (lambda f: [header_only(f.dicom("r.dcm", modality="RTSTRUCT"))], 415, "RTSTRUCT (contours"),
    "MR": (lambda f: [f.dicom("m.dcm", modality="MR")], 415, "m.dcm: is DICOM of modality MR (magnetic resonance)"),
    "cut DICOM": (lambda f: [cut(f.dicom("film.dcm"))], 422, "film.dcm: the DICOM is cut off"),
    "only a mark": (
        lambda f: [f.raw("x.dcm", b"\0" * 128 + b"DICM" + b"\1" * 40)],
        422,
        "x.dcm: is DICOM without pixels",
    ),
    "huge DICOM": (lambda f: [huge_dicom(f)], 422, "its header says 8,450,000,000 bytes of pixels"),
    "loop": (lambda f: [loop(f)], 422, "loop.dcm: holds 3 frames"),
    "one slice": (lambda f: f.series(count=1), 422, "slice000.dcm: is one CT slice. Give all files"),
    "two series": (
        lambda f: [*f.series("a", 4), *f.series("b", 5, series="2")],
        422,
        "the files are of 2 DICOM series (5 × CT 'series 2', 4 × CT 'series 1')",
    ),
    "two films": (lambda f: [f.dicom("a.dcm"), f.dicom("b.dcm")], 422, "a.dcm, b.dcm: 2 X-rays at once"),
    "slice twice": (
        lambda f: [*f.series("a", 8), f.dicom("b.dcm", f.film(28, 30).astype(np.uint16), "CT", position=16)],
        422,
        "the series holds several stacks: 8 places with 1 or 2 slices at each",
    ),
    "no position": (
        lambda f: [f.dicom(f"{i}.dcm", f.film(28, 30).astype(np.uint16), "CT") for i in range(3)],
        422,
        "0.dcm: lacks ImagePositionPatient",
    ),
    # volumes
    "4D": (lambda f: [f.nifti("scan.nii.gz", np.ones((12, 12, 12, 3), np.int16))], 422, "scan.nii.gz: is 4D (12 × 12"),
    "2D": (
        lambda f: [f.nifti("a.nii", np.ones((12, 12), np.int16))],
        422,
        "a.nii: has shape 12 × 12, which is not a 3D",
    ),
    "colour volume": (lambda f: [colour_volume(f)], 422, "rgb.nii: its voxels are colours or complex"),
    "truncated gz": (lambda f: [cut(f.nifti("scan.nii.gz"), 0.7)], 422, "scan.nii.gz: the compressed data is damaged"),
    "truncated volume": (lambda f: [cut(f.nifti("scan.nii"), 0.7)], 422, "scan.nii: is cut off: "),
    "zero affine": (lambda f: [affine(f, np.zeros((4, 4)))], 422, "scan.nii: the affine is zero"),
    "affine of NaN": (lambda f: [affine(f, np.full((4, 4), np.nan))], 422, "scan.nii: the affine holds NaN"),
    "singular affine": (
        lambda f: [affine(f, np.outer([3] * 4, [1, 1, 1, 0]))],
        422,
        "scan.nii: the affine cannot be inverted",
    ),
    "NaN": (
        lambda f: [f.nifti("scan.nii", np.full((24, 24, 24), np.nan, np.float32))],
        422,
        "scan.nii: some voxels are NaN or infinite. Convert it again from DICOM.",
    ),
    "huge header": (
        lambda f: [patched(f.nifti("scan.nii"), 40, struct.pack("<4h", 3, 30_000, 30_000, 30_000))],
        413,
        "scan.nii: its header says 30000 × 30000 × 30000 voxels, more than 2,000,000",
    ),
    "lying header": (
        lambda f: [patched(f.nifti("scan.nii"), 108, struct.pack("<f", 1e9))],
        422,
        "scan.nii: is cut off",
    ),
    "header alone": (lambda f: [metaimage(f, "scan.raw")], 422, "scan.mhd: its voxels scan.raw are missing. Drop"),
    "other file": (lambda f: [metaimage(f, "/etc/passwd")], 422, "scan.mhd: its header names voxels outside"),
    "file list": (lambda f: [metaimage(f, "LIST")], 422, "scan.mhd: its voxels LIST are missing. Drop"),
    "NIfTI of one slice": (
        lambda f: [f.nifti("scan.nii.gz", np.ones((12, 12, 1), np.int16))],
        422,
        "scan.nii.gz: has shape 12 × 12 × 1, which is not a 3D volume. Give all slices in one file.",
    ),
    "complex": (
        lambda f: [f.nifti("scan.nii.gz", np.ones((12, 12, 9), np.complex64))],
        422,
        "scan.nii.gz: its voxels are colours or complex numbers. Convert them to grey values.",
    ),
    "MetaImage that leads out": (
        lambda f: [metaimage(f, "../scan.raw"), f.raw("scan.raw", f.voxels().tobytes(order="F"))],
        422,
        "scan.mhd: its header names voxels outside its folder (../scan.raw). Put them beside it",
    ),
    "detached NRRD that leads out": (
        lambda f: [f.raw("scan.nhdr", b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\ndata file: /etc/passwd\n")],
        422,
        "scan.nhdr: its header names voxels outside its folder (/etc/passwd). Put them beside it",
    ),
    "4D MetaImage": (
        lambda f: [metaimage(f, "scan.raw", size="9 9 9 3"), f.raw("scan.raw", bytes(9**3 * 6))],
        422,
        "scan.mhd: is 4D (9 × 9 × 9 × 3)",
    ),
    "short MetaImage": (
        lambda f: [metaimage(f, "scan.raw"), f.raw("scan.raw", b"\0" * 99)],
        422,
        "scan.mhd: is cut off: its header says 43,680 bytes of voxels, there are 99",
    ),
    "detached NRRD": (
        lambda f: [
            f.raw(
                "a.nrrd",
                b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nspace: LPS\nspacings: 1 1 1\ndata file: a.raw\n\n",
            )
        ],
        422,
        "a.nrrd: its voxels a.raw are missing. Drop a.nrrd and a.raw together.",
    ),
    "MetaImage of itself": (lambda f: [metaimage(f, "scan.mhd")], 422, "scan.mhd: its voxels scan.mhd are missing"),
    # archives
    "zip in zip": (
        lambda f: [f.zipped("ct.zip", {"a/inner.zip": b"PK"})],
        422,
        "the zip holds another archive (inner.zip)",
    ),
    "password": (lambda f: [encrypted(f)], 422, "ct.zip: the zip is protected by a password"),
    "link": (lambda f: [link(f)], 400, "ct.zip: the zip holds a link (passwords.dcm)"),
    "zip slip": (
        lambda f: [f.zipped("ct.zip", {"../../evil.dcm": b"a"})],
        400,
        "ct.zip: in the zip, ../../evil.dcm: the",
    ),
    "zip bomb": (lambda f: [f.zipped("ct.zip", {"a.dcm": bytes(2**26)})], 413, "ct.zip: the zip would unpack to 64 MB"),
    "damaged zip": (lambda f: [cut(f.zipped("ct.zip", {"a.dcm": b"a" * 99}))], 422, "ct.zip: the zip is damaged"),
    "empty zip": (lambda f: [f.zipped("ct.zip", {})], 422, "ct.zip: the zip holds no file"),
    "zip of text": (lambda f: [f.zipped("ct.zip", {"readme.txt": b"hello"})], 415, "readme.txt: holds text"),
    "zip of many": (lambda f: [f.zipped("ct.zip", {f"{i}": b"a" for i in range(50)})], 413, "the zip holds 50 files"),
    "zip and more": (lambda f: [f.zipped("ct.zip", {"a": b"a"}), f.picture("a.png")], 422, "ct.zip: a zip among other"),
    "RAR": (lambda f: [f.raw("ct.rar", b"Rar!\x1a\x07\x00")], 415, "ct.rar: holds an archive that is not a zip"),
    # too much
    "too large": (
        lambda f: [("big.nii", bytes(2**21 + 1))],
        413,
        "the upload is larger than 2 MB. Drop a smaller file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_upload(case: str, files: Any, upload: Any, client: TestClient) -> None:
    make, status, words = CASES[case]
    found, answer = upload(*make(files))
    assert (found, list(answer)) == (status, ["error"]), answer
    message = answer["error"]
    assert words in message, message
    # one or two sentences that say what to do, nothing of this machine's paths
    assert message.endswith(".") and "\n" not in message and len(message) < 420
    assert str(files.folder.parent) not in message and "unimedi-serve" not in message
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}
    assert upload(files.picture("good.png"))[0] == 200


def test_requests_that_are_no_upload(client: TestClient, files: Any) -> None:
    for options, status, words in (
        ({}, 415, "the upload is no form with files"),
        ({"json": {"a": 1}}, 415, "the upload is no form with files"),
        ({"files": [("note", (None, "text"))]}, 400, "no file was uploaded. Give an X-ray"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"files": [("files", (f"{i}.png", b"a")) for i in range(50)]}, 400, "Too many files"),
    ):
        answer = client.post("/api/analyse", **options)
        assert answer.status_code == status and words in answer.json()["error"], answer.text
    for method, path, status in (
        ("GET", "/api/analyse", 405),
        ("GET", "/nothing", 404),
        ("GET", "/static/../app.py", 404),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status and answer.json()["error"]
    assert client.post("/api/search", json={"words": "a"}).status_code == 400
    assert client.post("/api/analyse", files=[("files", files.picture("a.png").open("rb"))]).status_code == 200


def test_chunked_upload_is_cut_off(client: TestClient) -> None:
    """Without a Content-Length the limit is met while the body arrives."""
    sent = 0

    def chunks() -> Any:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.nii"\r\n\r\n'
        for _ in range(40):
            sent += 2**16
            yield bytes(2**16)
        yield b"\r\n--b--\r\n"

    answer = client.post("/api/analyse", content=chunks(), headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413 and "larger than 2 MB" in answer.json()["error"]


def test_a_failure_of_the_server_is_an_answer_too(
    analyser: Analyser, monkeypatch: pytest.MonkeyPatch, files: Any
) -> None:
    def fail(study: Any) -> None:
        raise {"film.png": RuntimeError, "other.png": MemoryError}[study.name]("inside")

    monkeypatch.setattr(analyser, "study", fail)
    app = create_app(analyser, Limits())
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        for name, status, words in (
            ("film.png", 500, "(RuntimeError)"),
            ("other.png", 413, "more memory than there is"),
        ):
            content = io.BytesIO(files.picture(name).read_bytes())
            answer = client.post("/api/analyse", files=[("files", (name, content))])
            assert answer.status_code == status and words in answer.json()["error"]
            assert "inside" not in answer.text
        assert client.get("/health").status_code == 200
