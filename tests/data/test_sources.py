# SPDX-License-Identifier: Apache-2.0
"""Tables as spreadsheets write them."""

import gzip
from pathlib import Path

import pytest

from unimedi_components.data.sources import read_source
from unimedi_components.errors import DataError

ROWS = ["image,report", 'a.png,"Größe normal; no effusion, clear."', "b.png,clear"]
CELLS = [["a.png", "Größe normal; no effusion, clear."], ["b.png", "clear"]]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_separator_and_encoding_are_those_of_the_file(mark: str, encoding: str, packed: bool, tmp_path: Path) -> None:
    header, first, second = ROWS
    text = "\r\n".join([header.replace(",", mark), first.replace(",", mark, 1), second.replace(",", mark)])
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if packed else data)
    frame = read_source(path, ["image", "report"])
    assert frame.columns.tolist() == ["image", "report"] and frame.to_numpy().tolist() == CELLS


def test_one_column_may_hold_semicolons(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image\na;b.png\n")
    assert read_source(tmp_path / "t.csv").to_numpy().tolist() == [["a;b.png"]]


def test_excels_own_first_line_is_none_of_the_table(tmp_path: Path) -> None:
    for mark, other in (",;", ";,"):
        (tmp_path / "t.csv").write_text(f"sep={mark}\r\nimage{mark}report\r\na.png{mark}x{other}y\r\n")
        assert read_source(tmp_path / "t.csv").to_numpy().tolist() == [["a.png", f"x{other}y"]]


@pytest.mark.parametrize("name", ["t.xlsx", "t.csv"])
def test_a_workbook_is_no_table(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(DataError, match="is an Excel workbook or a zip archive, not text"):
        read_source(tmp_path / name)


def test_text_of_another_encoding_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("image,report\na.png,Größe\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"t\.csv: is not text in UTF-8 \(.*byte 0xf6.*\)\. Save it as CSV in UTF-8\.$"):
        read_source(path)
