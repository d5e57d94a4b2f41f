# SPDX-License-Identifier: Apache-2.0
"""Uploaded files into a folder of their own: their names are checked and shown, but never used as paths."""

import hashlib
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from unimedi_components.serve.faults import Limits, UploadError, bad_request, megabytes, too_large, unusable

_SHOWN = 120
_CHUNK = 2**20
# Deflate reaches about 1030:1 on zeros; slices of a CT stay far below 100:1.
_MAX_RATIO = 200
_SMALL = 16 * 2**20
_IGNORED = {"dicomdir", "thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Received:
    """A file of an upload: the name to show, where it lies under a name of ours, and whether its folder is hidden."""

    name: str
    path: Path
    in_hidden: bool = False

    @property
    def ignored(self) -> bool:
        """Whether the file only describes others: a hidden file, a DICOM directory, a system's own."""
        return self.in_hidden or self.name.startswith(".") or self.name.lower() in _IGNORED


def checked_name(given: str | None) -> str:
    """The last part of an uploaded file's name, for showing.

    Raises:
        UploadError: no name, a name that leads out of its folder, or one with control characters.
    """
    given = given or ""
    shown = "".join(letter if letter.isprintable() else "?" for letter in given)[:_SHOWN]
    parts = re.split(r"[/\\]", given)
    if given.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", given):
        raise bad_request(f"{shown}: the file name is a path that leads out of its folder. Rename the file.")
    if not all(letter.isprintable() for letter in given):
        raise bad_request(f"{shown}: the file name holds control characters. Rename the file.")
    name = parts[-1].strip()
    if name in ("", "."):
        raise bad_request(
            "a file without a name was uploaded. Give each file a name with its ending, such as film.png."
        )
    # the ending says what a file calls itself, so a long name is cut in its middle
    return name if len(name) <= _SHOWN else f"{name[: _SHOWN - 24]}...{name[-21:]}"


def store(given: str, stream: IO[bytes], folder: Path, number: int) -> Received:
    """Copy one uploaded file, whose name may be a path, to `folder`, see `_place`."""
    received = Received(checked_name(given), _place(given, folder, number), _in_hidden(given))
    with open(received.path, "xb") as file:
        shutil.copyfileobj(stream, file, _CHUNK)
    return received


def _in_hidden(given: str) -> bool:
    return any(part.startswith(".") and part != "." for part in re.split(r"[/\\]", given)[:-1])


def _place(given: str, folder: Path, number: int) -> Path:
    """Where a file goes: under its number, in a folder of ours for each of theirs, since these tell series apart."""
    parent = re.split(r"[/\\]", given)[:-1]
    below = folder / hashlib.sha256("/".join(parent).encode("utf-8", "surrogatepass")).hexdigest() if parent else folder
    below.mkdir(exist_ok=True)
    return below / f"{number:05d}"


def unpack(archive: Received, folder: Path, limits: Limits) -> list[Received]:
    """Unpack a zip into `folder`, each of its files as `store` does.

    Raises:
        UploadError: damaged, encrypted, too many files, too large or too strongly compressed, or with links, paths
            that lead out of their folder, or archives in it.
    """
    try:
        with zipfile.ZipFile(archive.path) as content:
            members = [one for one in content.infolist() if not one.is_dir()]
            members = [one for one in members if one.filename.split("/")[0] != "__MACOSX"]
            _check_members(archive, members, limits)
            left = limits.unpacked_bytes
            found = []
            unpacked = folder / "zip"
            unpacked.mkdir()
            for number, member in enumerate(members):
                path = _place(member.filename, unpacked, number)
                with content.open(member) as stream, open(path, "xb") as file:
                    left -= _copy(stream, file, left, archive.name, limits)
                found.append(Received(checked_name(member.filename), path, _in_hidden(member.filename)))
            return found
    except UploadError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise unusable(
            f"{archive.name}: the zip is damaged ({_first_line(error)}). Pack or download it again."
        ) from None
    except (NotImplementedError, RuntimeError) as error:
        reason = _first_line(error)
        raise unusable(f"{archive.name}: the zip cannot be unpacked ({reason}). Pack it again with deflate.") from None


def _check_members(archive: Received, members: list[zipfile.ZipInfo], limits: Limits) -> None:
    name = archive.name
    if not members:
        raise unusable(f"{name}: the zip holds no file. Pack the files of one series.")
    if len(members) > limits.files:
        raise too_large(f"{name}: the zip holds {len(members)} files, more than {limits.files}. Pack one series.")
    for member in members:
        try:
            last = checked_name(member.filename)
        except UploadError as fault:
            raise bad_request(f"{name}: in the zip, {fault}") from None
        if stat.S_ISLNK(member.external_attr >> 16):
            raise bad_request(f"{name}: the zip holds a link ({last}). Pack the files themselves.")
        if member.flag_bits & 0x1:
            raise unusable(f"{name}: the zip is protected by a password. Unpack it and drop the files themselves.")
        if member.filename.lower().endswith((".zip", ".7z", ".rar", ".tar", ".tgz", ".tar.gz")):
            raise unusable(f"{name}: the zip holds another archive ({last}). Unpack it and drop one series.")
    total, packed = sum(member.file_size for member in members), archive.path.stat().st_size
    if total > limits.unpacked_bytes or (total > _SMALL and total > _MAX_RATIO * packed):
        raise too_large(
            f"{name}: the zip would unpack to {megabytes(total)} from {megabytes(packed)}, more than is allowed "
            f"({megabytes(limits.unpacked_bytes)}, or {_MAX_RATIO} times its size). Pack only one series."
        )


def _copy(stream: IO[bytes], file: IO[bytes], left: int, name: str, limits: Limits) -> int:
    done = 0
    while chunk := stream.read(_CHUNK):
        done += len(chunk)
        # what the zip says about its sizes need not be true
        if done > left:
            raise too_large(
                f"{name}: the zip unpacks to more than {megabytes(limits.unpacked_bytes)}. Pack one series."
            )
        file.write(chunk)
    return done


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def names_of(files: Iterable[Received], most: int = 3) -> str:
    """Some names for a message."""
    names = [file.name for file in files]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
