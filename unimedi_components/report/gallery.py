# SPDX-License-Identifier: Apache-2.0
"""The page's figures of an experiment and of runs: drawn or copied to one folder, with captions and alt texts."""

import json
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from unimedi_components.metrics.common_space import centroid_distance
from unimedi_components.report.figures import CT, XRAY, Array, draw_bars, draw_curves, draw_tsne
from unimedi_components.report.sources import Experiment, Run, read_curves
from unimedi_components.report.tables import COLUMNS, SHARES, boxed_table

_COMMON = (
    "Each point is a held-out study; the number is the distance of the 2D and 3D centroids over the spread within."
)
#: Heading, and whose X-ray and CT features are shown, of Fig. 2 and 7.
_METHODS = (("separate", "2d_only", "3d_only"), ("joint", "joint", "joint"), ("UniMedI", "ours", "ours"))
#: Colour and marker of X-rays and of CT, for a first and a second finding.
_MARKS = (((XRAY, "o"), (CT, "^")), (("#7a4fa3", "s"), ("#2a9d4a", "D")))
_KNOWN = {
    "slice_selection.png": "CT studies: the selected slices with CLS attention, a true lesion slice, the slab scores",
    "xray_attention.png": "X-rays beside the CLS attention over them",
    "missed_lesions.png": "CT studies none of whose selected slices shows the lesion",
    "loss_curves.png": "losses, learning rate and validation of the run",
}


class Gallery:
    """Figures of one page. ``folder``: of the page; PNG files go to `figures` in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def _path(self, name: str) -> Path:
        self.count += 1
        return self.folder / "figures" / f"{self.count:02d}_{name}.png"

    def _figure(self, path: Path, alt: str, caption: str, wide: bool = False) -> str:
        source = path.relative_to(self.folder).as_posix()
        image = f'<img src="{escape(source)}" alt="{escape(alt)}" loading="lazy">'
        if wide:
            image = f'<div class="wide" tabindex="0">{image}</div>'
        style = "whole" if wide else "panel"
        return f'<figure class="{style}">{image}<figcaption>{escape(caption)}</figcaption></figure>'

    def copied(self, path: Path, caption: str) -> str:
        """A figure that a run left, 1200 pixels wide; it scrolls in its box on narrow screens."""
        target = self._path(path.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return self._figure(target, _KNOWN.get(path.name, path.stem.replace("_", " ")), caption, wide=True)

    def reports(self, experiment: Experiment) -> str:
        """Fig. 1b: report embeddings of both dimensions."""
        arrays = experiment.features("ours") or {}
        if not arrays:
            return _not_run("Fig. 1b needs the features of the cell ours/0")
        xray, ct = arrays["text_embed_2d"], arrays["text_embed_3d"]
        path, number = self._path("reports"), _distance(xray, ct)
        groups = {"X-ray reports": (xray, *_MARKS[0][0]), "CT reports": (ct, *_MARKS[0][1])}
        draw_tsne(groups, path, "report embeddings, t-SNE")
        caption = f"Reports of held-out X-rays and CT in the common space; centroid distance {number:.2f}. {_COMMON}"
        return self._figure(path, f"t-SNE of report embeddings, centroid distance {number:.2f}", caption)

    def spaces(self, experiment: Experiment, findings: Sequence[str]) -> str:
        """Fig. 2 (one finding) and Fig. 7 (two): X-ray and CT features by method."""
        parts = []
        for title, two, three in _METHODS:
            xray, ct = experiment.features(two), experiment.features(three)
            if xray is None or ct is None:
                parts.append(_not_run(f"{title}: not run ({' and '.join(dict.fromkeys((two, three)))})"))
                continue
            groups: dict[str, tuple[Array, str, str]] = {}
            numbers = []
            for finding, (first, second) in zip(findings, _MARKS, strict=False):
                pair = _with(xray, finding, 2), _with(ct, finding, 3)
                if min(map(len, pair)) >= 2:
                    groups |= {f"X-ray, {finding}": (pair[0], *first), f"CT, {finding}": (pair[1], *second)}
                    numbers.append(f"{finding} {_distance(*pair):.2f}")
            if not groups:
                parts.append(_not_run(f"{title}: too few held-out studies have {' or '.join(findings)}"))
                continue
            path, text = self._path(f"space_{title}"), ", ".join(numbers)
            draw_tsne(groups, path, title)
            alt = f"t-SNE of CLS features of X-rays and CT, {title}; centroid distance: {text}"
            parts.append(self._figure(path, alt, f"{title}; centroid distance: {text}."))
        return f"<p>{_COMMON}</p>{_row(parts)}"

    def bars(self, experiment: Experiment) -> str:
        """Fig. 6: separate, joint and the whole method, with intervals over seeds."""
        parts = []
        for prefix, (name, label, single) in COLUMNS.items():
            keys = [f"{prefix}_{share}" for share in SHARES]
            chosen = {"separate": single, "joint": "joint", "UniMedI": "ours"}
            bars = {title: [experiment.summary(v, key) for key in keys] for title, v in chosen.items()}
            if not any(value for values in bars.values() for value in values):
                continue
            path = self._path(f"bars_{prefix}")
            draw_bars(list(SHARES.values()), bars, path, name, label)
            ends = (f"{title} {values[-1]['mean']:.3f}" for title, values in bars.items() if values[-1])
            alt = f"{name}, {label} at 1, 10 and 100% of the labels; at 100%: {', '.join(ends)}"
            caption = f"{alt}. Lines are 95% intervals over training seeds; the axis does not begin at 0."
            parts.append(self._figure(path, alt, caption))
        return _row(parts) if parts else _not_run("Fig. 6 needs the cells 2d_only, 3d_only, joint and ours")

    def curves(self, name: str, folder: Path) -> str:
        """Learning curves from the event files of a run."""
        curves = read_curves(folder)
        losses: Mapping[str, Any] = {tag: curves[tag] for tag in ("vl", "icl", "pcl") if tag in curves}
        parts = []
        panels: list[tuple[str, Mapping[str, Any], str]] = [
            ("parts of the loss, unweighted", losses, "iteration"),
            ("information of the targets, nats", {t: c for t, c in curves.items() if "information" in t}, "epoch"),
            ("validation", {t: c for t, c in curves.items() if t.startswith("val_") and "loss" not in t}, "epoch"),
            ("validation loss", {t: c for t, c in curves.items() if t.startswith("val_") and "loss" in t}, "epoch"),
        ]
        for title, lines, x in panels:
            if lines:
                path = self._path(f"curves_{x}")
                draw_curves(lines, path, title, x)
                ends = ", ".join(f"{tag} {values[-1]:.2f}" for tag, (_, values) in lines.items())
                parts.append(self._figure(path, f"{name}: {title}; at the end {ends}", f"{title}; at the end {ends}."))
        return _row(parts) if parts else _not_run(f"{name}: no event files")

    def selection(self, folders: Sequence[Path]) -> str:
        """Fig. 5: selected slices and attention that trainings left."""
        parts = [
            self.copied(folder / name, f"{text}.")
            for folder in folders
            for name, text in _KNOWN.items()
            if name in ("slice_selection.png", "xray_attention.png") and (folder / name).is_file()
        ]
        return "".join(parts) or _not_run("no run left figures of its selection")

    def failures(self, folder: Path) -> str:
        """Missed lesions and lowest-ranked reports of a cell."""
        path = folder / "failures.json"
        if not path.is_file():
            return _not_run("no cell left its failures")
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = []
        if chosen := content.get("selection"):
            by_finding = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in chosen["findings"].items())
            line = f"{chosen['missed']} of {chosen['focal']} focal CT studies have no selected slice with a lesion"
            parts.append(f"<p>{escape(line + (f' (findings: {by_finding})' if by_finding else ''))}.</p>")
        if (folder / "missed_lesions.png").is_file():
            parts.append(self.copied(folder / "missed_lesions.png", "The first of the missed studies."))
        for dim, rows in content["retrieval"].items():
            kind = {"2d": "X-rays", "3d": "CT"}[dim]
            cells = [(f"{row['rank']} of {row['of']}", row["report"], row["found"]) for row in rows]
            body = [f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>" for texts in cells]
            head = "<th>rank of its report</th><th>its report</th><th>ranked first instead</th>"
            parts.append(f"<h3>Lowest-ranked reports, {kind}</h3>{boxed_table([head], body, 'texts')}")
        return "".join(parts)

    def run(self, run: Run) -> str:
        """What a plain run left: its figures."""
        return "".join(self.copied(png, _KNOWN.get(png.name, png.stem.replace("_", " ")) + ".") for png in run.figures)


def _distance(xray: Array, ct: Array) -> float:
    """Distance of two sets' centroids over the spread within, on normalised features."""
    labels = (np.ones((len(rows), 1)) for rows in (xray, ct))
    return float(centroid_distance(xray, ct, *labels)[0, 0])


def _with(arrays: Mapping[str, Array], finding: str, dim: int) -> Array:
    names = [str(name) for name in arrays["findings"]]
    if finding not in names:
        return arrays[f"cls_{dim}d"][:0]
    return arrays[f"cls_{dim}d"][arrays[f"labels_{dim}d"][:, names.index(finding)] == 1].astype(float)


def _row(parts: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(parts)}</div>'


def _not_run(text: str) -> str:
    return f'<p class="none">{escape(text)}.</p>'
