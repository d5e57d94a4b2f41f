# SPDX-License-Identifier: Apache-2.0
"""Images and sentences to vectors of the space that they share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from unimedi_components.data.datalist import SPLITS, load_datalist, select
from unimedi_components.data.inputs import find_images
from unimedi_components.data.text import as_trained
from unimedi_components.errors import DataError
from unimedi_components.evaluation.features import check_punct, make_dataset
from unimedi_components.images.find import ImageList
from unimedi_components.loading import ImageLoader
from unimedi_components.networks.pretrained import Pretrained, load_pretrained
from unimedi_components.search.embeddings import Embeddings, entry_of

__all__ = ["Embedder", "model_hash"]

_BATCH = 64


def model_hash(network: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's tensors: the same for the same weights in another file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Embedder:
    """A trained network for embedding files and sentences.

    Args:
        checkpoint: `models/model.pt` (or another weight file) of a pre-training run, with its card beside it, or a
            network that has been loaded.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        use_slices: feed a volume's selected slices beside it, as in pre-training.

    Attributes:
        model: hash of the weights, see `model_hash`.

    Raises:
        CheckpointError: the checkpoint does not load.

    Example:
        >>> embedder = Embedder("bundles/pretrain/models/model.pt")  # doctest: +SKIP
        >>> embedder.images("scan.nii.gz").embed.shape  # doctest: +SKIP
        (1, 128)
    """

    def __init__(
        self, checkpoint: str | Path | Pretrained, device: str | torch.device = "auto", use_slices: bool = True
    ) -> None:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if device == "auto" else device)
        if not isinstance(checkpoint, Pretrained):
            checkpoint = load_pretrained(checkpoint, self.device)
        self.pretrained = checkpoint
        self.pretrained.network.to(self.device).eval()
        self.network, self.card, self.use_slices = self.pretrained.network, self.pretrained.card, use_slices
        self.model = model_hash(self.network)

    def images(
        self,
        inputs: str | Path | Sequence[str | Path],
        root: str | Path = ".",
        batch_2d: int = 16,
        batch_3d: int = 4,
        num_workers: int = 0,
        strict: bool = False,
        progress: bool = True,
        assume_hu: bool = False,
    ) -> Embeddings:
        """Embed X-rays and volumes.

        Args:
            inputs: files, DICOM folders, folders and patterns, see `find_images`.
            root: folder of relative inputs.
            batch_2d: X-rays at a time.
            batch_3d: volumes at a time.
            num_workers: loading processes.
            strict: an unreadable file is an error; otherwise it is left out and listed under `skipped`.
            progress: show a progress bar.
            assume_hu: take CT values for Hounsfield units that do not say how they are rescaled.

        Returns:
            a row per image that could be read, X-rays first.

        Raises:
            DataError: an input names nothing, or not one image could be read.
        """
        names = [str(inputs)] if isinstance(inputs, (str, Path)) else [str(name) for name in inputs]
        return self.items(find_images(names, root, assume_hu), root, batch_2d, batch_3d, num_workers, strict, progress)

    def items(
        self,
        items: Sequence[Mapping[str, Any]],
        root: str | Path,
        batch_2d: int = 16,
        batch_3d: int = 4,
        num_workers: int = 0,
        strict: bool = False,
        progress: bool = True,
    ) -> Embeddings:
        """Embed datalist items, {"id", "image", "dim"}; other arguments, result and errors as of `images`."""
        whole = ({"source": str(Path(root) / item["image"]), "report": "", **item} for item in items)
        known = ImageList(whole, getattr(items, "left_out", ()))
        dataset = make_dataset(self.pretrained, known, root, strict=strict)
        rows: list[dict[str, Any]] = []
        with tqdm(total=len(known), desc="embedding", unit="image", disable=not progress) as bar:
            for batch in ImageLoader(dataset, (batch_2d, batch_3d), num_workers=num_workers):
                rows += self._rows(batch)
                bar.update(len(batch["id"]))
        skipped = [record._asdict() for record in dataset.skipped]
        if not rows:
            first = f", first {skipped[0]['file']}: {skipped[0]['reason']}" if skipped else ""
            raise DataError(f"none of {len(known)} images could be read{first}")
        more: dict[str, dict[str, Any]] = {
            item["id"]: {name: item[name] for name in ("label", "patient") if name in item} for item in known
        }
        return Embeddings(
            embed=np.stack([row["embed"] for row in rows]),
            entries=[{**row["entry"], **more[row["entry"]["id"]]} for row in rows],
            model=self.model,
            cls=np.stack([row["cls"] for row in rows]),
            scores=_padded([row["scores"] for row in rows], np.float32, np.nan),
            selected=_padded([row["selected"] for row in rows], np.int64, -1),
            card=self.card,
            skipped=skipped,
        )

    @torch.no_grad()
    def _rows(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = self.network.encode_image(batch["image"].to(self.device), self.use_slices)
        embed, cls = F.normalize(found.embed.float(), dim=-1).cpu().numpy(), found.cls.float().cpu().numpy()
        columns = zip(batch["id"], batch["dim"], batch["source"], batch["report"], strict=True)
        empty = np.empty(0)
        return [
            {
                "entry": entry_of(name, "image", int(dim), source, report or ""),
                "embed": embed[i],
                "cls": cls[i],
                "scores": empty if found.scores is None else found.scores[i].float().cpu().numpy(),
                "selected": empty if found.selected is None else found.selected[i].cpu().numpy(),
            }
            for i, (name, dim, source, report) in enumerate(columns)
        ]

    @torch.no_grad()
    def sentences(self, texts: Sequence[str], dim: int) -> Tensor:
        """Embed sentences or reports in the form of the network's training reports, see `data.text.as_trained`.

        Args:
            dim: 2 for texts about X-rays, 3 for texts about volumes: the projection keeps statistics of either kind.

        Returns:
            (N, E) float32 of unit norm, on the CPU.

        Raises:
            DataError: a text holds no word.
        """
        length = self.card["preprocessing"].get("max_length", 112)
        for text in texts:
            if not any(letter.isalpha() for letter in text):
                raise DataError(f"the text {' '.join(text.lower().split())!r} holds no word")
        read = [as_trained(text, self.pretrained.keep_punct, min_tokens=1) for text in texts]
        rows = [torch.empty(0, self.network.text_projection.output.out_features)]
        for start in range(0, len(read), _BATCH):
            part = read[start : start + _BATCH]
            tokens = self.pretrained.tokenizer(
                part, truncation=True, max_length=length, padding=True, return_tensors="pt"
            ).to(self.device)
            modality = torch.full((len(part),), dim - 2, device=self.device)
            embed = self.network.encode_text(tokens["input_ids"], tokens["attention_mask"], modality)
            rows.append(F.normalize(embed.float(), dim=-1).cpu())
        return torch.cat(rows)

    def reports(self, items: Sequence[Mapping[str, Any]]) -> Embeddings:
        """Embed the reports of datalist items, {"id", "dim", "report"}; those without text are left out.

        Raises:
            DataError: there is no report.
        """
        known = [item for item in items if item.get("report")]
        if not known:
            raise DataError("no item has a report; give a datalist with reports")
        embed = np.empty((len(known), 0), np.float32)
        for dim in (2, 3):
            own = [i for i, item in enumerate(known) if item["dim"] == dim]
            if own:
                texts = [as_trained(known[i]["report"], self.pretrained.keep_punct) for i in own]
                found = self.sentences(texts, dim).numpy()
                embed = embed if embed.shape[1] else np.zeros((len(known), found.shape[1]), np.float32)
                embed[own] = found
        entries = [dict(entry_of(item["id"], "report", item["dim"], text=item["report"])) for item in known]
        return Embeddings(embed, entries, self.model, card=self.card)

    def datalist(self, path: str | Path, root: str | Path, split: str = "test", **options: Any) -> Embeddings:
        """Images and reports of a datalist, the images first.

        Args:
            root: folder that its image paths are relative to.
            split: "training", "validation", "test", or "all" of them.
            options: as of `images`.

        Raises:
            DataError: the datalist cannot be used, the split is empty, or not one image could be read.
        """
        content = load_datalist(path, root)
        check_punct(self.pretrained, content)
        items = [item for name in (SPLITS if split == "all" else (split,)) for item in select(content, name)]
        if not items:
            raise DataError(f"{path}: the split {split!r} is empty; choose another, or all")
        parts = [self.items(items, root, **options)]
        parts += [self.reports(items)] if any(item.get("report") for item in items) else []
        return Embeddings.join(parts)


def _padded(rows: Sequence[Any], dtype: Any, fill: float) -> Any:
    width = max(len(row) for row in rows)
    table = np.full((len(rows), width), fill, dtype)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
