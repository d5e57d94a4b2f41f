# SPDX-License-Identifier: Apache-2.0
"""Inference: what an `Embedder` makes of images, batch by batch in MONAI's engine, and what is written of it."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from monai.engines import IterationEvents
from monai.transforms import Compose, Orientationd, Transform
from torch import Tensor
from torch.nn import functional as F

from unimedi_components.arrays import Array
from unimedi_components.data.datalist import write_json
from unimedi_components.data.transforms import RAS_LABELS
from unimedi_components.data.volume_loading import LoadVolumed, Uprightd, with_part
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.figures.attention import CTView, XrayView, draw_selection, draw_xrays
from unimedi_components.figures.panels import draw_prediction
from unimedi_components.files import replacing
from unimedi_components.retrieval.embedder import Embedder
from unimedi_components.retrieval.embeddings import KINDS
from unimedi_components.retrieval.index import EmbeddingIndex
from unimedi_components.retrieval.prompts import load_prompt_sets
from unimedi_components.retrieval.zero_shot import ZeroShot
from unimedi_components.tasks.writer import PredictionWriter, check_finite

logger = logging.getLogger(__name__)

_SHOWN = ("similarity", "source", "text")
# bars that a figure has room for
_MOST_BARS = 12


def embed_batch(engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
    """One iteration of an evaluator over an `Embedder`, for MONAI's `iteration_update`.

    Returns "image", "pred" (B, E) of unit norm, "cls" (B, D), "attention" on the token grid (B, rows, columns) or (B,
    slabs, rows, columns), and for volumes "scores" (B, slabs) and "selected" (B, k).
    """
    image = batchdata["image"].to(engine.state.device)
    with engine.mode(engine.network), torch.autocast(image.device.type, enabled=engine.amp, **engine.amp_kwargs):
        found = engine.inferer(image, engine.network.encode)
    grid = engine.network.token_grid(image)
    output = {
        "image": image,
        "pred": F.normalize(found.embed.float(), dim=-1),
        "cls": found.cls.float(),
        "attention": found.attention.float().unflatten(1, grid),
    }
    if found.selected is not None:
        output |= {"scores": found.scores.float(), "selected": found.selected}
    engine.state.output = output
    engine.fire_event(IterationEvents.FORWARD_COMPLETED)
    engine.fire_event(IterationEvents.MODEL_COMPLETED)
    return engine.state.output


class SaveEmbeddings(Transform):
    """Write what was made of one image; a postprocessing step after `embed_batch`.

    - `<id>.npz`: "embed" (E,) of unit norm in the space of images and reports; "cls" (D,), for probes; "attention",
      Eq. 1's **v** on the token grid, summing to 1; "dim"; "source"; for X-rays "film_values", what was done to the
      file's values; and for volumes "scores", Eq. 2's for each slab,
      "selected", slices of the network's input from inferior to superior, and "selected_position", the same as
      fractions of the volume's extent.
    - `<id>.png`: the image with the attention over it.
    - `<id>_attention.nii.gz`, for volumes: the attention in the geometry of the file that came in, see
      `attention_in_file_geometry`.

    Args:
        figures: write the PNG files.
        volumes: write the NIfTI files, for which each volume is read once more.
    """

    def __init__(self, output_dir: str | Path, figures: bool = True, volumes: bool = True) -> None:
        self.folder = Path(output_dir)
        self.figures, self.volumes = figures, volumes

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        name, dim = str(data["id"]), int(data["dim"])
        values = {key: _array(data[key]) for key in ("cls", "attention", "scores", "selected") if key in data}
        values |= {"embed": _array(data["pred"]), "dim": np.asarray(dim), "source": np.asarray(str(data["source"]))}
        if "film_values" in data:
            values["film_values"] = np.asarray(str(data["film_values"]))
        image = _array(data["image"])[0]
        if dim == 3:
            values["selected_position"] = (values["selected"] + 0.5) / len(image)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{name}.npz") as temporary:
            np.savez_compressed(temporary, **values)  # type: ignore[arg-type]
        if self.figures:
            path, report = self.folder / f"{name}.png", str(data.get("report") or "")
            if dim == 3:
                selected, scores = values["selected"].tolist(), values["scores"]
                draw_selection([CTView(name, image, selected, scores, values["attention"], report)], path)
            else:
                draw_xrays([XrayView(name[-24:], image, values["attention"], report)], path)
        if self.volumes and dim == 3:
            item = with_part(data["source"], data.get("part"))
            attention, affine = attention_in_file_geometry(item, torch.as_tensor(values["attention"]))
            with replacing(self.folder / f"{name}_attention.nii.gz") as temporary:
                nib.save(nib.Nifti1Image(attention, affine), temporary)  # type: ignore[attr-defined]
        return data


def attention_in_file_geometry(item: Mapping[str, Any], attention: Tensor) -> tuple[Array, Array]:
    """Attention over a volume's tokens as a volume with the shape, axes and affine (RAS+) of its file, float32.

    ``attention``: Eq. 1's **v** on the token grid, (slabs, rows, columns). 1 is what even attention would be.
    """
    turn = Compose([Orientationd("image", axcodes="SPL", labels=RAS_LABELS), Uprightd("image")])
    volume = LoadVolumed("image")(item)["image"]
    oriented = turn({"image": volume})["image"]
    relative = attention.float() * attention.numel()
    fine = F.interpolate(relative[None, None], size=oriented.shape[1:], mode="trilinear", align_corners=False)[0]
    shown = MetaTensor(fine, meta=oriented.meta, applied_operations=oriented.applied_operations)
    back: Any = turn.inverse({"image": shown})
    back = back["image"]
    return back[0].numpy().astype(np.float32), np.asarray(volume.affine, dtype=np.float64)


def finish_embedding(dataset: Any, output_dir: str | Path) -> None:
    """Write `summary.json`, and say how many inputs could not be read. Raises DataError: not one could be."""
    skipped = [record._asdict() for record in dataset.skipped]
    left_out = {record["id"] for record in skipped}
    written = [{"id": item["id"], "source": item["source"]} for item in dataset.data if item["id"] not in left_out]
    write_json({"written": written, "skipped": skipped}, Path(output_dir) / "summary.json")
    if not written:
        raise DataError(
            f"none of {len(skipped)} inputs could be read, first {skipped[0]['file']}: "
            f"{skipped[0]['reason']}; see {output_dir}/summary.json"
        )
    logger.info("%s: embeddings of %d inputs; %d could not be read", output_dir, len(written), len(skipped))


class SaveNeighbours(PredictionWriter):
    """Search for each image and classify it zero-shot; a postprocessing step after `embed_batch`.

    - `predictions.json`: for each image "zero_shot", a probability for each finding, and "neighbours" by kind ("xray",
      "ct", "xray_report", "ct_report"), the nearest first, each with "similarity", "id", "source" and "text"; and the
      inputs that could not be read.
    - `neighbours.csv` and `zero_shot.csv`: the same, one line per neighbour and one per image and finding.
    - `<id>.png`: the image with Eq. 1's **v** over it and the highest probabilities; see `draw_prediction`.

    Args:
        index: npz of `EmbeddingIndex`, made with the same weights; None searches nothing.
        prompts: prompt sets, at most one for each dimension; without one for a dimension its images get no probability.

    Raises:
        ConfigError: the index is of another model, `neighbours` is below 1, or there are two sets for one dimension.
        DataError: the index or a prompt set is missing or damaged.
    """

    def __init__(
        self,
        output_dir: str | Path,
        embedder: Embedder,
        index: str | Path | None = None,
        prompts: Sequence[str | Path] = ("chest_xray", "chest_ct"),
        neighbours: int = 5,
        figures: bool = True,
    ) -> None:
        super().__init__(output_dir, figures)
        self.embedder, self.count = embedder, neighbours
        if index is not None and not Path(index).is_file():
            raise DataError(
                f"{index}: no such file; evaluate.json makes it, 'python -m unimedi_components index FILE PATH...' one "
                "of your own, and --index '$None' classifies without one"
            )
        self.index = None if index is None else EmbeddingIndex.load(index)
        if self.index is not None:
            self.index.check_model(embedder.model)
        if neighbours < 1:
            raise ConfigError(f"neighbours is {neighbours}; at least 1 is needed, and index None searches nothing")
        self.zero_shot = {dim: ZeroShot(embedder, found) for dim, found in load_prompt_sets(prompts).items()}

    def row(self, name: str, data: Mapping[Hashable, Any]) -> dict[str, Any]:
        """What the prompts say about an embedding (E,), and what is nearest."""
        dim = int(data["dim"])
        embed = torch.as_tensor(data["pred"]).float().cpu().numpy()[None]
        check_finite(name, embed, "values of an embedding")
        row: dict[str, Any] = {"dim": dim, "zero_shot": {}, "neighbours": {}}
        if dim in self.zero_shot:
            values = self.zero_shot[dim].probabilities(embed)[0]
            row["zero_shot"] = {
                finding: round(float(value), 6)
                for finding, value in zip(self.zero_shot[dim].names, values, strict=True)
            }
        if self.index is not None:
            row["neighbours"] = self._search(self.index, embed)
        if self.figures and row["zero_shot"]:
            image, attention = (torch.as_tensor(data[key]).float().cpu().numpy() for key in ("image", "attention"))
            likeliest = dict(sorted(row["zero_shot"].items(), key=lambda pair: -pair[1])[:_MOST_BARS])
            chosen = tuple(finding for finding, value in likeliest.items() if value >= 0.5)
            draw_prediction(name, image[0], attention, likeliest, chosen, self.folder / f"{name}.png")
        return row

    def _search(self, index: EmbeddingIndex, embed: np.ndarray) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for dim, modality in ((2, "xray"), (3, "ct")):
            for kind in KINDS:
                (hits,) = index.query(embed, self.embedder.model, self.count, kind, dim)
                name = modality if kind == "image" else f"{modality}_report"
                found[name] = [
                    {"similarity": round(hit.score, 6), **{key: hit.entry[key] for key in ("id", "source", "text")}}
                    for hit in hits
                ]
        return {name: hits for name, hits in found.items() if hits}

    def about(self) -> dict[str, Any]:
        return {
            "model": self.embedder.model,
            "index": None if self.index is None else {"entries": len(self.index)},
            "prompts": {f"{dim}d": zero_shot.prompts.name for dim, zero_shot in self.zero_shot.items()},
        }

    def tables(self, rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
        near = [
            {"id": row["id"], "kind": kind, "rank": rank, "neighbour": hit["id"], **{key: hit[key] for key in _SHOWN}}
            for row in rows
            for kind, hits in row["neighbours"].items()
            for rank, hit in enumerate(hits, 1)
        ]
        said = [
            {"id": row["id"], "finding": finding, "probability": value}
            for row in rows
            for finding, value in row["zero_shot"].items()
        ]
        return {
            "neighbours.csv": pd.DataFrame(near, columns=["id", "kind", "rank", "neighbour", *_SHOWN]),
            "zero_shot.csv": pd.DataFrame(said, columns=["id", "finding", "probability"]),
        }


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
