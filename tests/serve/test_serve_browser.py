# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium: files are dropped and chosen, and what it shows is read from it.

With UNIMEDI_REAL_DATA (see `tests/test_real_data.py`) real X-rays and CTs are dropped, too.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unimedi_components.retrieval import Embedder, EmbeddingIndex, Embeddings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REAL = Path(os.environ.get("UNIMEDI_REAL_DATA", "/none"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """A page that has loaded, what it asked for, and what its console said."""

    def __init__(self, browser: Any, url: str, width: int, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page, self.url = self.context.new_page(), url
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"exception: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.until("document.getElementById('about').textContent")

    def until(self, expression: str, argument: Any = None, seconds: float = 60) -> None:
        """Wait until an expression holds; Playwright's own wait needs eval, which the page forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression, argument):
            assert time.monotonic() < end, f"never held: {expression}"
            self.page.wait_for_timeout(50)

    def drop(self, *paths: Path) -> None:
        """Drop files or folders from outside the browser, as a hand would."""
        session = self.context.new_cdp_session(self.page)
        self.page.locator("#upload").scroll_into_view_if_needed()
        box = self.page.locator("#upload").bounding_box()
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 20}
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})

    def choose(self, *paths: Path) -> None:
        """Choose files with the button."""
        self.page.set_input_files("#files", [str(path) for path in paths])

    def result(self, name: str) -> None:
        """Wait for the result of this file."""
        self.until(
            "name => !document.getElementById('result').hidden"
            " && document.getElementById('result-name').textContent === name",
            name,
            120,
        )

    def error(self) -> str:
        self.page.wait_for_selector("#error:not([hidden])", timeout=30_000)
        return str(self.page.inner_text("#error"))

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def findings(self) -> dict[str, tuple[str, float]]:
        """Name to percentage, and width of the bar over that of its track."""
        rows = self.page.evaluate(
            "[...document.querySelectorAll('#findings li')].map(row => [...[...row.children].map(c => c.textContent),"
            " row.querySelector('.track span').getBoundingClientRect().width"
            " / row.querySelector('.track').getBoundingClientRect().width])"
        )
        return {name: (value, width) for name, _, value, width in rows}

    def pictures_are_drawn(self) -> bool:
        self.until("[...document.querySelectorAll('#pictures img')].every(image => image.complete)")
        found = self.page.evaluate(
            "[...document.querySelectorAll('#pictures img')].map(image => image.naturalWidth * image.clientWidth)"
        )
        return bool(found) and all(found)

    def fits(self) -> bool:
        """Nothing sticks out to the side."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    def close(self, *expected: str) -> None:
        """Nothing was said but these, and nothing came from elsewhere."""
        said = [line for line in self.said if not any(word in line for word in expected)]
        assert said == []
        assert [url for url in self.asked if not url.startswith((self.url, "data:"))] == []
        self.context.close()


@pytest.fixture
def address(started: Any, index: EmbeddingIndex, tmp_path: Path) -> str:
    path = index.save(tmp_path / "index.npz")
    return str(started("--index", str(path))[1])


def check_xray(page: Page, prompts: int, neighbour: str | None) -> None:
    assert page.texts("#result-kind") == ["X-ray"]
    found = page.findings()
    assert len(found) == prompts
    shares = [int(value.removesuffix(" %")) for value, _ in found.values()]
    assert shares == sorted(shares, reverse=True)
    assert [width for _, width in found.values()] == pytest.approx([share / 100 for share in shares], abs=0.012)
    assert page.page.locator("#pictures figure").count() == 1 and page.pictures_are_drawn()
    assert not page.page.is_visible("#slabs")
    if neighbour is not None:
        assert page.texts("#neighbours section h3")[0] == "Nearest X-ray reports"
        nearest = page.page.locator("#neighbours section", has=page.page.locator("h3", has_text=re.compile("X-rays$")))
        assert nearest.locator("li b").first.inner_text() == neighbour
        assert "similarity 1.000" in nearest.locator("li").first.inner_text()


def check_ct(page: Page, prompts: int, slices: int, slabs: int, neighbour: str | None) -> None:
    assert page.texts("#result-kind") == ["CT"] and len(page.findings()) == prompts
    assert page.page.locator("#pictures figure").count() == slices and page.pictures_are_drawn()
    captions = page.texts("#pictures figcaption")
    assert all(re.match(r"Slice \d+ of the input, about \d+ in the file", caption) for caption in captions)
    assert page.page.locator("#slabs rect").count() == slabs
    assert page.page.locator("#slabs rect.selected").count() in range(1, slices + 1)
    assert "selected" in page.page.get_attribute("#slabs svg", "aria-label")
    assert "HU" in page.page.inner_text("#seen")
    if neighbour is not None:
        assert page.texts("#neighbours section h3")[0] == "Nearest CT reports"
        nearest = page.page.locator("#neighbours section", has=page.page.locator("h3", has_text=re.compile("CTs$")))
        assert nearest.locator("li b").first.inner_text() == neighbour


def prompt_counts() -> tuple[int, int]:
    from unimedi_components.retrieval import load_prompts

    return len(load_prompts("chest_xray").findings), len(load_prompts("chest_ct").findings)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_film_scan_and_fault(
    browser: Any, address: str, index: EmbeddingIndex, files: Any, width: int, scheme: str
) -> None:
    page, (flat, deep) = Page(browser, address, width, scheme), prompt_counts()
    assert "Not for clinical use" in page.page.inner_text("header") and page.page.is_visible("#sentence")
    film, scan = (Path(index.entries[row]["source"]) for row in (1, 3))
    page.drop(film)
    page.result("x1.png")
    check_xray(page, flat, "x1")
    assert page.page.evaluate("document.activeElement.id") == "result-name" and page.fits()
    # the report that came with the image in the index, as text and not as HTML
    page.choose(scan)
    page.result("v0.nii")
    check_ct(page, deep, 2, 4, "v0")
    assert "edema <b>number 0</b>." in page.page.inner_text("#neighbours") and page.fits()
    page.page.fill("#opacity", "0")
    shown = page.page.evaluate("getComputedStyle(document.querySelector('.overlay')).opacity")
    assert float(shown) == 0
    for path in (files.raw("film.dcm", b"text"), files.picture("photo.jpg", files.photo())):
        page.choose(path)
        message = page.error()
        assert message.startswith(f"{path.name}: is ") and not page.page.is_visible("#result")
        page.choose(film)
        page.result("x1.png")
        assert not page.page.is_visible("#error")
    page.drop(files.nifti("4d.nii", files.voxels((12, 12, 12, 2))))
    assert page.error().startswith("4d.nii: is 4D") and page.fits()
    page.close("status of 415", "status of 422")


def test_series_as_folder_and_search(browser: Any, address: str, files: Any) -> None:
    page, (_, deep) = Page(browser, address, 1280), prompt_counts()
    files.raw(".hidden", b"x")
    slices = files.series(count=24)
    page.drop(files.folder)
    page.page.wait_for_selector("#result:not([hidden])")
    assert re.fullmatch(r"slice\d{3}\.dcm and 23 more", page.page.inner_text("#result-name"))
    check_ct(page, deep, 2, 4, None)
    said = "words => document.getElementById('error').textContent.includes(words)"
    # of one folder, these would be one series and its doubles
    for name in "ab":
        shutil.copytree(files.folder, files.folder.with_name("copies") / name)
    page.drop(files.folder.with_name("copies"))
    page.until(said, "the files are of 2 DICOM series")
    page.drop(*slices[:2], files.picture("film.png"))
    page.until(said, "3 studies at once")
    page.page.focus("#sentence")
    page.page.keyboard.type("large pleural effusion.")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#hits li")
    reports = page.page.locator("#hits section").first
    assert reports.locator("b").first.inner_text() == "x1" and "similarity 1.000" in reports.inner_text()
    page.page.fill("#sentence", "123")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#query-error:not([hidden])")
    assert "holds no word" in page.page.inner_text("#query-error")
    page.close("status of 422", "status of 400")


def test_keyboard_and_names_that_are_html(browser: Any, address: str, files: Any) -> None:
    page = Page(browser, address, 1280)
    focused = []
    for _ in range(3):
        page.page.keyboard.press("Tab")
        focused.append(page.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert focused == ["skip", "files", "folder"]
    with page.page.expect_file_chooser() as chooser:
        page.page.focus("#files")
        page.page.keyboard.press("Enter")
    name = "<img src=x onerror=document.title='hit'>.png"
    content = {"name": name, "mimeType": "image/png", "buffer": files.picture("a.png").read_bytes()}
    chooser.value.set_files([content])
    page.result(name)
    assert page.page.inner_text("#result-name") == name and "hit" not in page.page.title()
    unnamed = page.page.evaluate(
        "[...document.querySelectorAll('img, input, button, progress, svg')].filter(e => e.checkVisibility()"
        " && !(e.hasAttribute('alt') || e.hasAttribute('aria-label') || e.labels?.length || e.textContent.trim()"
        " || e.closest('[aria-hidden]'))).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unnamed == []
    page.close()


def test_without_index_and_too_large(browser: Any, started: Any, files: Any) -> None:
    _, url, folder = started("--max_upload_mb", "1")
    page = Page(browser, url, 1280)
    assert not page.page.is_visible("#sentence") and "unimedi_components index" in page.page.inner_text("#no-index")
    assert "At most 1 MB" in page.page.inner_text("#limit")
    page.choose(files.raw("big.nii", bytes(2 * 2**20)))
    assert page.error().startswith("big.nii: 2.0 MB is larger than 1.0 MB")
    page.choose(files.picture("film.png"))
    page.result("film.png")
    assert page.page.locator("#neighbours section").count() == 0 and os.listdir(folder) == []
    page.close()


@pytest.mark.skipif(not (REAL / "ct3d").is_dir(), reason="UNIMEDI_REAL_DATA does not name a folder with ct3d")
def test_real_xray_and_real_ct(browser: Any, started: Callable[..., Any], embedder: Embedder, tmp_path: Path) -> None:
    film = sorted((REAL / "xray_text" / "images").glob("*.jpg"))[0]
    scan = REAL / "ct3d" / "lidc_0314" / "ct.nii.gz"
    items: list[dict[str, Any]] = [
        {"id": "film", "dim": 2, "image": str(film), "report": "an opacity."},
        {"id": "scan", "dim": 3, "image": str(scan), "report": "a nodule."},
    ]
    found = Embeddings.join([embedder.items(items, REAL, progress=False), embedder.reports(items)])
    page = Page(browser, started("--index", str(found.save(tmp_path / "real.npz")))[1], 1280)
    flat, deep = prompt_counts()
    page.drop(film)
    page.result(film.name)
    check_xray(page, flat, "film")
    assert page.texts("#warnings li") == [] and "pixels" in page.page.inner_text("#seen")
    assert {"an opacity.", "a nodule."} <= set(page.texts("#neighbours .text"))
    page.drop(scan)
    page.result(scan.name)
    check_ct(page, deep, 2, 4, "scan")
    assert page.texts("#warnings li") == []
    assert "256 × 256 × 137 voxels of 1.562 × 1.562 × 2 mm" in page.page.inner_text("#seen")
    # the small pictures of the index's own files
    thumbnails = page.page.locator("#neighbours img")
    assert thumbnails.count() == 2
    thumbnails.first.scroll_into_view_if_needed()
    page.until("[...document.querySelectorAll('#neighbours img')].some(i => i.naturalWidth > 100)")
    page.close()
