# SPDX-License-Identifier: Apache-2.0
"""The page: one static HTML file with its figures, from runs and experiments."""

import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from unimedi_components.engines.target_information import COLLAPSED, REMEDY
from unimedi_components.errors import ConfigError
from unimedi_components.files import replacing
from unimedi_components.provenance import provenance
from unimedi_components.report.gallery import Gallery
from unimedi_components.report.orderings import orderings, orderings_html
from unimedi_components.report.sources import Experiment, Run, collect
from unimedi_components.report.tables import (
    ablation_table,
    anchor,
    boxed_table,
    is_asked,
    measure_tables,
    paper_table,
    paper_tables,
)

Section = tuple[str, str, str]

_DATA = (
    "The paper's numbers are theirs, on licensed data with a ViT-B/16. Ours are marked and were measured on phantoms, "
    "synthetic images and reports, with the small default encoder, unless a row says real data: compare orderings, not "
    "levels."
)
_INTERVALS = (
    "Ours: mean ± standard deviation over training seeds, below it the 95% interval of the mean over seeds by "
    "Student's t; where there is one seed, the bootstrap interval over patients."
)
_FINDINGS = ("consolidation", "cardiomegaly")


def report(run_dirs: Sequence[str | Path], out: str | Path, tables: str | Path = "results") -> Path:
    """Write `index.html` and `figures/` from runs and experiments; the path of `index.html`, written last and whole.

    ``run_dirs``: folders of finished runs (with `eval/metrics.json`) and of experiments (with `experiment.json`).
    ``out``: folder of the page; its `figures` are replaced.
    Raises ConfigError: no folder is named. DataError: a folder holds neither a run nor an experiment.
    """
    if not run_dirs:
        raise ConfigError("report needs the folder of a run or of an experiment, such as results/experiment/small")
    runs, experiments = collect(run_dirs)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    gallery = Gallery(folder)
    sections: list[Section] = []
    for experiment in experiments:
        # which of several experiments
        among = f" ({experiment.content.get('size')})" if len(experiments) > 1 else ""
        sections += _experiment_sections(experiment, gallery, among)
    sections += [_run_section(run, gallery) for run in runs]
    sections.append(("tables", "Tables of downstream tasks", _downstream(Path(tables))))
    sections += [_origin_section(experiment) for experiment in experiments]
    page = folder / "index.html"
    with replacing(page) as temporary:
        temporary.write_text(_document(sections, _alarms(runs, experiments)), encoding="utf-8")
    print(f"{page}: {len(experiments)} experiments, {len(runs)} runs, {gallery.count} figures")
    return page


def _experiment_sections(experiment: Experiment, gallery: Gallery, among: str) -> list[Section]:
    size = experiment.content.get("size", "experiment")
    ours = experiment.cell("ours")
    theirs = paper_table("7", paper_tables()["tables"]["7"], None)
    parts: list[tuple[str, str, str]] = [
        ("measures", "What each part moves", f"<p>{_INTERVALS}</p>{measure_tables(experiment)}"),
        ("table7", "Table 7: ablation", f"<h3>The paper's</h3>{theirs}<h3>Ours</h3>{ablation_table(experiment)}"),
        ("orderings", "Do the paper's orderings come out?", orderings_html(orderings(experiment))),
        ("figure6", "Fig. 6: separate, joint, whole method", gallery.bars(experiment)),
        ("figure2", "Fig. 2: X-rays and CT with one finding", gallery.spaces(experiment, _FINDINGS[:1])),
        ("figure7", "Fig. 7: two findings", gallery.spaces(experiment, _FINDINGS)),
        ("figure1b", "Fig. 1b: reports", gallery.reports(experiment)),
        ("figure5", "Fig. 5: selected slices and attention", gallery.selection([ours / "eval"])),
        ("failures", "Failures", gallery.failures(ours)),
        ("curves", "Learning curves", _curves(experiment, gallery)),
    ]
    return [(f"{size}-{name}", f"{title}{among}", html) for name, title, html in parts]


def _curves(experiment: Experiment, gallery: Gallery) -> str:
    parts = []
    for name, measures in experiment.variants.items():
        folder = experiment.cell(name) / "eval"
        if folder.is_dir() and name not in ("untrained", "pixels"):
            title = escape(measures["title"])
            parts.append(f"<h3>{title}, seed {measures['seeds'][0]}</h3>{gallery.curves(measures['title'], folder)}")
    return "".join(parts) or '<p class="none">The cells\' folders are not here.</p>'


def _run_section(run: Run, gallery: Gallery) -> Section:
    numbers = {key: value for key, value in run.metrics.items() if isinstance(value, float | int)}
    rows = [f"<tr class='ours'><th>{escape(key)}</th><td>{value:.4g}</td></tr>" for key, value in numbers.items()]
    summary = f"<summary>{len(numbers)} values of metrics.json</summary>"
    table = f"<details>{summary}{boxed_table(['<th>measure</th><th>value</th>'], rows)}</details>"
    name = f"run-{''.join(c if c.isalnum() else '-' for c in run.name)}-{gallery.count}"
    html = _origin(run.origin) + table + gallery.curves(run.name, run.folder) + gallery.run(run)
    return name, f"Run: {run.name}", html


def _downstream(folder: Path) -> str:
    content = paper_tables()
    parts = [f"<p>{_DATA}</p><p class='origin'>Source of the paper's numbers: {escape(content['source'])}.</p>"]
    for number, table in content["tables"].items():
        if number != "7":
            note = f"<p class='origin'>{escape(table['note'])}</p>" if "note" in table else ""
            heading = f"<h3>Table {number}: {escape(table['title'])}</h3>"
            parts.append(heading + paper_table(number, table, folder) + note)
    return "".join(parts)


def _origin(origin: Mapping[str, Any]) -> str:
    if not origin:
        return ""
    return (
        f'<p class="origin"><code>{escape(origin["command"])}</code><br>commit {escape(origin["commit"])}, '
        f"{escape(origin['machine'])}, torch {escape(origin['torch'])}</p>"
    )


def _origin_section(experiment: Experiment) -> Section:
    size = experiment.content.get("size", "experiment")
    settings = ", ".join(f"{key} {value}" for key, value in experiment.content["settings"].items())
    parts = [_origin(experiment.content.get("run", {})), f'<p class="origin">{escape(settings)}</p>']
    for name, measures in experiment.variants.items():
        cells = [cell for cell in experiment.cells if cell["variant"] == name]
        lines = "".join(
            f"<li>seed {cell['seed']}, config {escape(' + '.join(cell['config']))}, hash {escape(cell['key'])}, "
            f"measured at commit {escape(cell['measured_at'])}{_origin(cell)}</li>"
            for cell in cells
        )
        parts.append(f'<h3 id="{anchor(experiment, name)}">{escape(measures["title"])}</h3><ul>{lines}</ul>')
    return f"{size}-origin", f"Where the numbers of the {size} experiment come from", "".join(parts)


def _alarms(runs: Sequence[Run], experiments: Sequence[Experiment]) -> str:
    """Runs whose CLS targets carry too little information, with the remedy."""
    values: list[tuple[str, Mapping[str, Any]]] = [(run.name, run.metrics) for run in runs]
    for experiment in experiments:
        for variant, measures in experiment.variants.items():
            found = {k: v["values"] for k, v in measures.items() if isinstance(v, dict) and is_asked(variant, k)}
            for seed in measures["seeds"]:
                own = {key: value.get(str(seed)) for key, value in found.items()}
                values.append((f"{measures['title']}, seed {seed}", own))
    lines = [
        f"{name}: {kind} CLS targets carry {value:.2f} nats of information, less than {COLLAPSED}."
        for name, metrics in values
        for dim, kind in ((2, "X-ray"), (3, "CT"))
        if isinstance(value := metrics.get(f"sd_cls_information_{dim}d"), float | int) and value < COLLAPSED
    ]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="alarm"><b>Self-distillation collapsed.</b><ul>{items}</ul>Remedy: {escape(REMEDY)}.</div>'


def _document(sections: Sequence[Section], alarms: str) -> str:
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    contents = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>{html}</section>' for name, title, html in sections)
    origin = provenance()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>UniMedI results</title><style>{style}</style></head><body>"
        f"<header><h1>UniMedI results</h1><p>{_DATA}</p>{alarms}</header>"
        f'<nav aria-label="Sections"><ul>{contents}</ul></nav><main>{body}</main>'
        f"<footer>Written by <code>{escape(origin['command'])}</code>, commit {escape(origin['commit'])}. "
        "Not for clinical use.</footer></body></html>\n"
    )
