# SPDX-License-Identifier: Apache-2.0
"""The command zero_shot: probabilities of findings from sentences alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimedi_components.command_options import CHECKPOINT, check_options
from unimedi_components.errors import ConfigError
from unimedi_components.lazy import importing
from unimedi_components.search_commands import print_skipped

if TYPE_CHECKING:
    from unimedi_components.images.find import ImageList
    from unimedi_components.retrieval.prompts import PromptSet

_LINE = 110


def zero_shot(
    *paths: str,
    prompts: str | None = None,
    finding: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
    checkpoint: str = CHECKPOINT,
    device: str = "auto",
    out: str | None = None,
    assume_hu: bool = False,
    **options: Any,
) -> None:
    """Say how probable findings are in X-rays and volumes, from sentences alone.

    The values rank images; they are not calibrated probabilities.

    Args:
        paths: files, folders or patterns.
        prompts: a shipped prompt set or a JSON file; by default chest_xray for X-rays and chest_ct for volumes.
        finding: findings of the prompt sets, separated by |; or the name of one of your own.
        positive: with it, sentences that affirm the finding of your own, separated by |.
        negative: likewise, sentences that deny it.
        checkpoint: weights that a pre-training run left.
        device: cpu, cuda, or auto for a GPU where there is one.
        out: csv to write: id, dim, source, and a column for each finding.
        assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.
        options: --batch_2d, --batch_3d, --num_workers, --strict (an unreadable file is an error).
    """
    with importing():
        import pandas as pd

        from unimedi_components.data.inputs import find_images
        from unimedi_components.retrieval.embedder import Embedder
        from unimedi_components.retrieval.zero_shot import ZeroShot
        from unimedi_components.tasks.writer import write_csv

    if not paths:
        raise ConfigError("zero_shot: name at least one file or folder")
    check_options("zero_shot", Embedder.items, options)
    sets = _prompt_sets(*(None if word is None else str(word) for word in (prompts, finding, positive, negative)))
    items = _fitting(find_images([str(path) for path in paths], assume_hu=assume_hu), sets)
    embedder = Embedder(str(checkpoint), str(device))
    images = embedder.items(items, ".", **options)
    print_skipped(images)
    table: list[dict[str, Any]] = []
    for dim in sorted(set(images.dims.tolist())):
        classifier = ZeroShot(embedder, sets[dim])
        entries = [entry for entry in images.entries if entry["dim"] == dim]
        for entry, row in zip(entries, classifier.classify(images)[1].tolist(), strict=True):
            named = dict(zip(classifier.names, row, strict=True))
            table.append({"id": entry["id"], "dim": dim, "source": entry["source"], **named})
            print("\n".join(_finding_lines(entry, named)))
    if out is not None:
        Path(str(out)).parent.mkdir(parents=True, exist_ok=True)
        write_csv(pd.DataFrame(table), Path(str(out)))


def _fitting(items: ImageList, sets: Mapping[int, PromptSet]) -> ImageList:
    """The images that there are prompts for; the others are left out."""
    from unimedi_components.images.find import ImageList, LeftOut

    what = {2: "X-rays", 3: "volumes"}
    kept = [item for item in items if item["dim"] in sets]
    if not kept:
        raise ConfigError(f"the prompts are for {what[min(sets)]}, and none was named; choose other prompts")
    reason = f"is one of the {what[5 - min(sets)]}, and the prompts are for {what[min(sets)]}"
    others = [LeftOut(item["source"], reason, False) for item in items if item["dim"] not in sets]
    return ImageList(kept, [*items.left_out, *others])


def _prompt_sets(
    prompts: str | None, finding: str | None, positive: str | None, negative: str | None
) -> Mapping[int, PromptSet]:
    """Prompt sets by dimension."""
    from unimedi_components.retrieval.prompts import PromptSet, load_prompts

    if positive is not None or negative is not None:
        if prompts is not None or not (finding and positive and negative):
            raise ConfigError("prompts of your own are --finding NAME --positive 'A.|B.' --negative 'C.|D.'")
        sides = {"positive": _parts(positive), "negative": _parts(negative)}
        return {dim: PromptSet("command line", dim, {finding: sides}) for dim in (2, 3)}
    sets = [load_prompts(source) for source in (("chest_xray", "chest_ct") if prompts is None else (prompts,))]
    if finding is None:
        return {chosen.dim: chosen for chosen in sets}
    faults, chosen = [], {}
    for candidate in sets:
        try:
            chosen[candidate.dim] = candidate.select(_parts(finding))
        except ConfigError as error:
            faults.append(error)
    if not chosen:
        raise faults[0]
    return chosen


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|") if part.strip())


def _finding_lines(entry: Mapping[str, Any], probabilities: Mapping[str, float]) -> list[str]:
    """The file, and below it its findings, the likeliest first, in columns."""
    cells = [f"{value:.3f} {name}" for name, value in sorted(probabilities.items(), key=lambda pair: -pair[1])]
    width = max(map(len, cells)) + 3
    columns = max(1, _LINE // width)
    rows = (cells[start : start + columns] for start in range(0, len(cells), columns))
    return [f"\n{entry['source']}", *("  " + "".join(f"{cell:<{width}}" for cell in row).rstrip() for row in rows)]
