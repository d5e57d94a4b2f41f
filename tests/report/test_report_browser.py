# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium at 1400 and 400 px: nothing overlaps or sticks out, labels can be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]

# elements of a page's flow that share area with a sibling
OVERLAPS = """() => {
  const found = [];
  for (const parent of document.querySelectorAll('body, main, header, section, .panels, figure, ul')) {
    const boxes = [...parent.children].map(e => [e, e.getBoundingClientRect()]).filter(([e, b]) => b.width && b.height);
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && tall > 1) found.push([boxes[i][0], boxes[j][0]].map(e => e.outerHTML.slice(0, 80)));
    }
  }
  return found;
}"""
# text that is cut off or runs out of its element, outside the boxes that scroll
SPILLS = """() => [...document.querySelectorAll('h1, h2, h3, p, li, figcaption, summary, code, th, td, small')]
  .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')
  .map(e => e.outerHTML.slice(0, 80))"""
OUTSIDE = """() => [...document.querySelectorAll('main *, header *, nav *')]
  .filter(e => !e.closest('.wide') && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""
BROKEN = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
# a panel's smallest label has 10 points at 150 dpi: 21 pixels of 720
LABELS = "() => Math.min(...[...document.querySelectorAll('.panel img')].map(i => 21 * i.clientWidth / i.naturalWidth))"
TEXT = """() => Math.min(...[...document.querySelectorAll('main *')]
  .filter(e => e.children.length === 0 && e.textContent)
  .map(e => parseFloat(getComputedStyle(e).fontSize)))"""


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_reads_at(width: int, page_file: Path) -> None:
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        page.evaluate("for (const image of document.images) image.loading = 'eager'")
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        assert page.evaluate(BROKEN) == []
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(SPILLS) == []
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(LABELS) >= 9
        assert page.evaluate(TEXT) >= 12
        assert all(url.startswith(("file:", "data:")) for url in asked)
        browser.close()
