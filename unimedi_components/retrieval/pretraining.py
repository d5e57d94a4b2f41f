# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a datalist: metrics of its held-out split, and the figures that a run leaves behind."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimedi_components.arrays import Array
from unimedi_components.data.datalist import load_datalist, select, write_json, write_metrics
from unimedi_components.data.phantom.truth import load_truth
from unimedi_components.distributed import rank, wait_for_ranks
from unimedi_components.figures.attention import CTView, XrayView, draw_selection, draw_xrays
from unimedi_components.figures.curves import draw_loss_curves
from unimedi_components.networks.pretrained import Pretrained, load_pretrained
from unimedi_components.provenance import provenance
from unimedi_components.retrieval.embedder import check_punct, make_dataset
from unimedi_components.retrieval.features import Features, extract_features, features_of_all_ranks
from unimedi_components.retrieval.measuring import all_metrics
from unimedi_components.retrieval.slices import is_focal, lesion_mask

Datalist = dict[str, Any]
Studies = Mapping[str, Mapping[str, Any]]

_XRAYS = 4


def evaluate_datalist(
    pretrained: Pretrained,
    datalist: str | Path | Datalist,
    root: str | Path,
    truth: str | Path | None = None,
    split: str = "test",
    **options: Any,
) -> dict[str, Any]:
    """Measure a network on one split: retrieval, collapse, and where the truth is known all else.

    ``truth``: folder with the phantoms' truth, `root` by default, where it knows these items; real data have none.

    Returns:
        the values of `measuring.all_metrics`, with "split"; a split without items gives its name and counts of 0.
    """
    lists = _parsed(datalist)
    check_punct(pretrained, lists)
    items = select(lists, split)
    features = extract_features(pretrained, items, root, **options)
    known = load_truth(root, items) if truth is None else load_truth(truth)
    return {"split": split, **all_metrics(pretrained, features, known, **options)}


def after_training(
    checkpoint: str | Path,
    datalist: str | Path | Datalist,
    root: str | Path,
    output_dir: str | Path,
    history: Sequence[Mapping[str, float]] = (),
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Write what a finished training run has to show; on rank 0, with features to which every rank adds its share.

    `metrics.json` holds the values of the test split, or of the validation split if there is no test item, `run.json`
    the command, commit and machine. The figures show items of the first split that has any, in that order and training
    last; their titles say which: `loss_curves.png`, `slice_selection.png` (the paper's Fig. 5) and
    `xray_attention.png`. ``history``: one dict per iteration, see `draw_loss_curves`.

    Returns:
        the content of `metrics.json`; empty on other ranks.
    """
    wait_for_ranks()  # for the first one's checkpoint
    pretrained, lists = load_pretrained(checkpoint, device), _parsed(datalist)
    split = "test" if select(lists, "test") else "validation"
    out, truth = Path(output_dir), load_truth(root, select(lists, split))
    studies = None if truth is None else truth["studies"]
    with tempfile.TemporaryDirectory(prefix="unimedi-measured-") as scratch:
        # images are read once for all measures
        read = {"cache_dir": scratch, **options}
        features = features_of_all_ranks(pretrained, select(lists, split), root, **read)
        if rank() != 0:
            return {}
        values = {"split": split, **all_metrics(pretrained, features, truth, **read)}
    if history:
        values["training"] = {"iterations": history[-1]["iteration"], "loss": history[-1]["loss"]}
        draw_loss_curves(history, out / "loss_curves.png")
    write_json(provenance(), out / "run.json")
    write_metrics(values, out)
    for dim in (3, 2):
        shown, part = split, features.get(dim)
        # another split if the evaluated one lacks this dimension
        for other in ("test", "validation", "training") if part is None else ():
            items = select(lists, other, dim)
            if items and (found := extract_features(pretrained, items[: 4 * _XRAYS], root, **options)):
                shown, part = other, found[dim]
                break
        if part is not None and dim == 3:
            title = f"Slices selected by CLS attention ({shown} split)"
            draw_selection(ct_views(pretrained, part, root, studies), out / "slice_selection.png", title)
        elif part is not None:
            views = xray_views(pretrained, part, root)
            draw_xrays(views, out / "xray_attention.png", f"CLS attention ({shown} split)")
    return values


def ct_views(
    pretrained: Pretrained, features: Features, root: str | Path, studies: Studies | None = None, count: int = 3
) -> list[CTView]:
    """The first studies to draw; where lesions are known, the first focal ones."""
    truths = [(studies or {}).get(item["id"], {}) for item in features.items]
    rows = range(len(truths))
    focal = [i for i in rows if is_focal(truths[i].get("lesion_slices", ()), truths[i].get("n_slices", 0))]
    chosen = (focal or list(rows))[:count]
    assert features.selected is not None and features.scores is not None
    views = []
    for i, volume, attention in _images(pretrained, features, chosen, root):
        known = "n_slices" in truths[i]
        views.append(
            CTView(
                name=features.items[i]["id"],
                volume=volume,
                selected=features.selected[i].tolist(),
                scores=features.scores[i].numpy(),
                attention=attention,
                report=features.reports[i],
                lesions=lesion_mask(truths[i]["lesion_slices"], truths[i]["n_slices"], len(volume)) if known else None,
            )
        )
    return views


def xray_views(pretrained: Pretrained, features: Features, root: str | Path, count: int = _XRAYS) -> list[XrayView]:
    """The first X-rays to draw, one of a patient; arguments as for `ct_views`."""
    firsts = {item["patient"]: i for i, item in reversed(list(enumerate(features.items)))}
    shown = _images(pretrained, features, sorted(firsts.values())[:count], root)
    return [
        XrayView(features.items[i]["id"][-24:], image, attention[0], features.reports[i])
        for i, image, attention in shown
    ]


def _images(
    pretrained: Pretrained, features: Features, rows: Sequence[int], root: str | Path
) -> Iterator[tuple[int, Array, Array]]:
    """Row, image and attention on its token grid (slabs, rows, columns) of some of the features' items."""
    dataset = make_dataset(pretrained, [features.items[i] for i in rows], root)
    for place, i in enumerate(rows):
        image = dataset[place]["image"]
        grid = pretrained.network.encoder.token_grids(image[None])[0]
        yield i, image[0].numpy(), features.attention[i].view(grid).numpy()


def _parsed(datalist: str | Path | Datalist) -> Datalist:
    return datalist if isinstance(datalist, dict) else load_datalist(datalist)
