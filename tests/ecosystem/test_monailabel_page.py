# SPDX-License-Identifier: Apache-2.0
"""The lines of docs/monai-label.md, read by MONAI Label's own command line."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def test_monailabels_lines_of_the_page(monailabel: Any) -> None:
    page = (REPOSITORY / "docs" / "monai-label.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [shlex.split(line) for line in page.splitlines() if line.startswith("monailabel ")]
    parser = importlib.import_module("monailabel.main").Main().args_parser()
    apps, server = (parser.parse_args(words[1:]) for words in lines)
    assert (apps.action, apps.download, apps.name, apps.output) == ("apps", True, "monaibundle", "apps")
    conf = dict(server.conf)
    assert (server.app, server.host, conf["zoo_source"], conf["sam2"]) == (
        "apps/monaibundle",
        "127.0.0.1",
        "local",
        "false",
    )
    served = set(conf["models"].split(","))
    assert served == {path.parent.name for path in REPOSITORY.glob("bundles/chest_*/configs")} | {
        "abdomen_ct_segmentation"
    }
    # each of them is unpacked, asked, and its labels are described
    assert served == set(re.findall(r"unzip -d apps/monaibundle/model dist/(\w+)_v", page))
    assert served == set(re.findall(r"/infer/(\w+)\?image=", page)) == set(re.findall(r"^\| `(\w+)` \|", page, re.M))
