# SPDX-License-Identifier: Apache-2.0
"""The page of an experiment and a run: the paper's numbers, ours, orderings in words, alarms, figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimedi_components.__main__ import main
from unimedi_components.engines.target_information import REMEDY
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.report.orderings import orderings
from unimedi_components.report.page import report
from unimedi_components.report.sources import Experiment, collect, read_curves
from unimedi_components.report.tables import paper_tables


class Page(HTMLParser):
    """Text, tables as rows of cells, images and links of a page; checks that elements are closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.rows = "", [[]]
        self.images: list[dict[str, Any]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(given)
        if tag == "a":
            self.links.append(given["href"])
        if "id" in given:
            self.ids.append(given["id"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.rows[-1] and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name)


@pytest.fixture
def page(page_file: Path) -> Page:
    return Page(page_file)


def test_every_figure_is_there_and_described(page: Page, page_file: Path) -> None:
    # 3 spaces twice, 2 bar panels, reports, selection and attention, missed, 3 curves of 6 variants and the run, its 3
    assert len(page.images) == 6 + 2 + 1 + 2 + 1 + 3 * 7 + 3
    for image in page.images:
        assert len(image["alt"]) > 20
        with Image.open(page_file.parent / image["src"]) as picture:
            assert picture.width >= 700
    assert len({image["src"] for image in page.images}) == len(page.images)
    assert len(list((page_file.parent / "figures").iterdir())) == len(page.images)


def test_nothing_comes_from_elsewhere(page: Page, page_file: Path) -> None:
    text = page_file.read_text()
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!#|figures/|data:,)", text)
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_the_papers_numbers_stand_beside_ours(page: Page) -> None:
    assert page.row("UniMedI (32x128x128)") == ["UniMedI (32x128x128)", "75.6", "84.8", "89.4"]
    assert page.row("UniMedI (ours, phantom data)")[1:] == ["-", "85.0 ± 7.170.0 to 90.0", "-"]
    assert "not run; make table4 measures it" in page.text
    assert "make table2, commit abc" in page.text
    # what the paper has no column for
    assert ["cc_ccii", "elsewhere", "accuracy", "10%", "UniMedI", "33.0"] in page.rows
    assert page.row("VL + SD + Attn")[1:4] == ["89.4", "89.7", "90.5"]
    # 0.71 with a deviation of 0.01 over three seeds
    assert page.row("title of ours")[1] == "0.710 ± 0.0100.685 to 0.735"
    assert page.row("the paper's literal reading")[1] == "not run"


def test_single_dimensions_are_not_asked_for_the_other(page: Page) -> None:
    assert page.row("title of 2d_only")[1:] == ["0.610 ± 0.0100.585 to 0.635", "-"]
    assert page.row("title of 3d_only")[1:] == ["-", "0.610 ± 0.0100.585 to 0.635"]


def test_collapse_is_an_alarm_with_the_remedy(page: Page, page_file: Path) -> None:
    assert "pretrain: CT CLS targets carry 0.20 nats" in page.text
    assert "title of vl_sd, seed 2: X-ray CLS targets carry 0.10 nats" in page.text
    assert "title of 2d_only, seed 0: CT" not in page.text and "title of 3d_only, seed 0: X-ray" not in page.text
    assert f"Remedy: {REMEDY}." in page.text
    assert page_file.read_text().count('class="collapsed"') == 2


def test_orderings_in_words(page: Page, experiment_folder: Path) -> None:
    assert "Table 7: self-distillation over VL alone: holds everywhere." in page.text
    assert "Table 7: attentive over random slices: Comes out the other way on phantom X-rays, 1% (-10.0" in page.text
    assert "the seeds disagree in sign" in page.text
    [experiment] = collect([experiment_folder])[1]
    found = {(o.step.partition(":")[0], o.column): o for o in orderings(experiment) if "joint over" in o.step}
    # joint minus X-rays only: -0.1, 0.09, -0.02
    ordering = found["Fig. 6", "phantom X-rays, 100%"]
    assert ordering.result.mean == pytest.approx(-0.01)
    assert ordering.result.verdict == "undecided"


def test_a_collapsed_variant_that_falls_says_why(experiment_folder: Path) -> None:
    [experiment] = collect([experiment_folder])[1]
    swapped = {**experiment.variants, "vl": experiment.variants["vl_sd"], "vl_sd": experiment.variants["vl"]}
    swapped["vl_sd"]["sd_cls_information_3d"] = {"mean": 0.03}
    found = orderings(Experiment(experiment.folder, {**experiment.content, "variants": swapped}))
    whys = {o.why for o in found if "over VL alone" in o.step}
    assert whys == {"the CT targets carry 0.03 nats"}


def test_every_number_says_where_it_comes_from(page: Page) -> None:
    assert page.text.count("measured at commit 0123456789") == 3 * 7
    assert "hash-vl-2" in page.text
    assert "#cell-small-ours" in page.links


def test_failures_are_shown_and_escaped(page: Page) -> None:
    assert "3 of 9 focal CT studies have no selected slice with a lesion (findings: nodule 3)." in page.text
    assert page.row("30 of 30")[1].startswith("no pleural effusion <b> & heart size")


def test_an_experiment_that_was_barely_begun(tmp_path: Path) -> None:
    content = {"size": "full", "settings": {}, "run": {}, "variants": {}, "cells": []}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/experiment.json").write_text(json.dumps(content))
    page = Page(report([tmp_path / "begun"], tmp_path / "page", tmp_path / "none"))
    assert page.images == []
    assert "Fig. 6 needs the cells 2d_only, 3d_only, joint and ours" in page.text
    assert "not run; make table1 measures it" in page.text


def test_the_command(experiment_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(experiment_folder), "--out", str(tmp_path / "page"), "--tables", str(tmp_path)])
    assert "1 experiments, 0 runs" in capsys.readouterr().out
    assert (tmp_path / "page" / "index.html").is_file()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the folder of a run"):
        report([], tmp_path)
    with pytest.raises(DataError, match=r"holds neither experiment\.json nor metrics\.json"):
        report([tmp_path], tmp_path / "page")
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        report([tmp_path], tmp_path / "page")


def test_paper_tables_are_whole() -> None:
    tables = paper_tables()["tables"]
    assert list(tables) == [str(number) for number in range(1, 10)]
    for table in tables.values():
        columns = sum(len(group["fractions"]) for group in table["groups"])
        assert {len(row) for row in table["rows"]} == {1 + columns}
        assert all(value is None or 5 < value < 100 for row in table["rows"] for value in row[1:])


def test_curves_of_a_resumed_run_count_a_step_once(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for part, (first, last) in enumerate(((1, 3), (2, 4))):
        with SummaryWriter(str(tmp_path), filename_suffix=str(part)) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("vl", 10.0 * part + step, step, walltime=part * 100 + step)
    steps, values = read_curves(tmp_path)["vl"]
    assert steps == [1, 2, 3, 4]
    assert values == [1, 12, 13, 14]
