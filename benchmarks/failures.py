# SPDX-License-Identifier: Apache-2.0
"""Where a network fails: CT studies whose lesions its selection missed, reports that it ranks last."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from unimedi_components.data.datalist import write_json
from unimedi_components.figures.attention import draw_selection
from unimedi_components.networks.pretrained import Pretrained
from unimedi_components.retrieval.features import Features
from unimedi_components.retrieval.pretraining import ct_views
from unimedi_components.retrieval.recall import first_correct_rank
from unimedi_components.retrieval.slices import is_focal, lesion_mask

Studies = Mapping[str, Mapping[str, Any]]

MISSED, FAILURES = "missed_lesions.png", "failures.json"


def missed_studies(features: Features, studies: Studies, depth: int) -> tuple[list[int], int]:
    """Rows of the focal CT studies none of whose selected slices shows a lesion, and how many studies are focal.

    Args:
        depth: slices of the network's input, D.
    """
    assert features.selected is not None
    missed, focal = [], 0
    for row, item in enumerate(features.items):
        truth = studies.get(item["id"], {})
        if is_focal(truth.get("lesion_slices", ()), truth.get("n_slices", 0)):
            focal += 1
            mask = lesion_mask(truth["lesion_slices"], truth["n_slices"], depth)
            if not mask[features.selected[row].numpy()].any():
                missed.append(row)
    return missed, focal


def lowest_retrievals(features: Features, count: int = 4) -> list[dict[str, Any]]:
    """The images whose own report is ranked lowest among the reports of their dimension, the worst first.

    Args:
        features: of N images of one dimension, each with a report.

    Returns:
        "id", "rank" (1 is the best), "of", "report", and "found", the report that is ranked first.
    """
    ranks = first_correct_rank(features.image_embed, features.text_embed, features.reports)
    image, text = (F.normalize(embed.double(), dim=-1) for embed in (features.image_embed, features.text_embed))
    rows = ranks.argsort(descending=True, stable=True)[:count].tolist()
    first = (image[rows] @ text.T).argmax(1).tolist() if rows else []
    return [
        {
            "id": features.items[row]["id"],
            "rank": int(ranks[row]),
            "of": len(ranks),
            "report": features.reports[row],
            "found": features.reports[best],
        }
        for row, best in zip(rows, first, strict=True)
    ]


def write_failures(
    pretrained: Pretrained,
    features: Mapping[int, Features],
    root: str | Path,
    studies: Studies,
    folder: str | Path,
    count: int = 3,
) -> None:
    """Write `failures.json` and, where the selection missed a lesion, `missed_lesions.png`."""
    path = Path(folder) / MISSED
    path.unlink(missing_ok=True)
    content: dict[str, Any] = {"retrieval": {f"{dim}d": lowest_retrievals(part) for dim, part in features.items()}}
    part = features.get(3)
    if part is not None and part.selected is not None and part.scores is not None:
        depth = part.scores.shape[1] * pretrained.network.encoder.patch_depth
        rows, focal = missed_studies(part, studies, depth)
        found = [studies[part.items[row]["id"]].get("findings", ()) for row in rows]
        names = Counter(name for study in found for name in {finding["name"] for finding in study})
        content["selection"] = {"missed": len(rows), "focal": focal, "findings": dict(names.most_common())}
        if rows:
            views = ct_views(pretrained, part.take(rows[:count]), root, studies, count)
            draw_selection(views, path, "Studies whose lesions the selection missed")
    write_json(content, Path(folder) / FAILURES)
