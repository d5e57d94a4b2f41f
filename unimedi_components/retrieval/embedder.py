# SPDX-License-Identifier: Apache-2.0
"""Images and sentences to vectors of the space that they share."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from unimedi_components.data.datalist import SPLITS, load_datalist, select
from unimedi_components.data.inputs import find_images
from unimedi_components.data.text import as_trained
from unimedi_components.data.transforms import input_transforms
from unimedi_components.errors import DataError
from unimedi_components.images.find import ImageList
from unimedi_components.loading import ImageDataset, ImageLoader
from unimedi_components.networks.cards import KINDS, load_network
from unimedi_components.networks.export import ScriptableByDimension, trace
from unimedi_components.networks.output import ImageFeatures
from unimedi_components.networks.pretrained import Pretrained, load_pretrained, read_card
from unimedi_components.retrieval.embeddings import Embeddings, entry_of

_BATCH = 64


def model_hash(network: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of a network's tensors: the same for the same weights in another file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_punct(pretrained: Pretrained, lists: Mapping[str, Any]) -> None:
    """Warn where a datalist's reports lack the punctuation that the network's training reports had."""
    meta = lists.get("meta", {})
    if pretrained.keep_punct and meta.get("keep_punct") is False:
        warnings.warn(
            f"{meta.get('dataset', 'the datalist')}: its reports lost their punctuation, which those that the network "
            "was trained on kept; prepare the data with --keep_punct for the values that it can reach",
            stacklevel=3,
        )


def make_dataset(
    pretrained: Pretrained,
    items: Sequence[Mapping[str, Any]],
    root: str | Path,
    cache_dir: str | Path | None = None,
    strict: bool = False,
) -> ImageDataset:
    """The items as the network was trained to see them, by its card, reports as well, without random transforms."""
    whole = []
    for item in items:
        text = as_trained(item.get("report") or "", pretrained.keep_punct)
        place = str(Path(root) / item["image"])
        whole.append({"source": place, "report": "", **item, **({"report": text} if text else {})})
    known = ImageList(whole, getattr(items, "left_out", ()))
    transform = input_transforms(pretrained.card["preprocessing"])
    return ImageDataset(known, transform, root, cache_dir=cache_dir, strict=strict)


class Embedder(nn.Module):
    """A trained network for embedding files and sentences; as a module it takes images and returns embeddings.

    MONAI's inferers, exports and checks take it as it is. Its state is the encoder's, as `model.pt` holds it, so that
    MONAI's tools save and load it; the projection stays as it was built. It is in evaluation mode. Raises
    CheckpointError: a file is missing or does not fit.

    Args:
        checkpoint: `models/model.pt` (or another weight file) of a pre-training run, with its card beside it, or a
            network that has been loaded.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        use_slices: feed a volume's selected slices beside it, as in pre-training.

    Attributes:
        card: how the network was built, and under "preprocessing" how its input was prepared.
        model: hash of the weights, see `model_hash`.
    """

    __jit_unused_properties__ = ("device",)

    def __init__(
        self, checkpoint: str | Path | Pretrained, device: str | torch.device = "auto", use_slices: bool = True
    ) -> None:
        super().__init__()
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(auto if device == "auto" else device)
        if not isinstance(checkpoint, Pretrained):
            checkpoint = load_pretrained(checkpoint, target)
        self.pretrained, self.card, self.use_slices = checkpoint, checkpoint.card, use_slices
        self.network = checkpoint.network.to(target)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.network.encoder.cls_token.device

    @cached_property
    def model(self) -> str:
        return model_hash(self.network)

    def encode(self, image: Tensor) -> ImageFeatures:
        """All that the network makes of X-rays (B, C, H, W) or volumes (B, C, D, H, W) in [-1, 1]."""
        return self.network.encode_image(image, self.use_slices)

    def token_grid(self, image: Tensor) -> tuple[int, ...]:
        """Rows and columns of an X-ray's tokens, or slabs, rows and columns of a volume's: the grid of **v**."""
        grid = self.network.encoder.token_grids(image)[0]
        return grid if image.ndim == 5 else grid[1:]

    def forward(self, image: Tensor) -> Tensor:
        """Images as in `encode` to unit vectors in the space that images and reports share, (B, E)."""
        return F.normalize(self.encode(image).embed, dim=-1)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.encoder.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.__dict__.pop("model", None)
        return self.network.encoder.load_state_dict(state_dict, strict, assign)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script`, and so `monai.bundle ckpt_export`, compiles in place of this network."""
        encoder, unused = self.network.encoder, ("network.report_encoder", "network.text_projection")
        channels = encoder.patch_embed.proj.in_channels
        empty = (torch.zeros(2, channels, *size, device=self.device) for size in (encoder.img_size, encoder.vol_size))
        two_d, three_d = (trace(self, image, unused) for image in empty)
        return ScriptableByDimension(two_d, three_d).eval()

    def run(
        self, dataset: ImageDataset, batch_2d: int, batch_3d: int, num_workers: int = 0, progress: bool = True
    ) -> Iterator[tuple[dict[str, Any], Tensor, ImageFeatures]]:
        """Batches of `ImageLoader`, their images and what `encode` makes of them, on the device; X-rays first."""
        with tqdm(total=len(dataset), desc="embedding", unit="image", disable=not progress) as bar:
            for batch in ImageLoader(dataset, (batch_2d, batch_3d), num_workers=num_workers, allow_empty=True):
                image = batch["image"].to(self.device)
                with torch.no_grad():
                    found = self.encode(image)
                yield batch, image, found
                bar.update(len(batch["id"]))

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
        dataset = make_dataset(self.pretrained, items, root, strict=strict)
        rows: list[dict[str, Any]] = []
        for batch, _, found in self.run(dataset, batch_2d, batch_3d, num_workers, progress):
            values = {"embed": F.normalize(found.embed.float(), dim=-1), "cls": found.cls.float()}
            if found.scores is not None and found.selected is not None:
                values |= {"scores": found.scores.float(), "selected": found.selected}
            arrays = {name: value.cpu().numpy() for name, value in values.items()}
            columns = zip(batch["id"], batch["dim"], batch["source"], batch["report"], strict=True)
            for i, (name, dim, source, report) in enumerate(columns):
                entry = entry_of(name, "image", int(dim), source, report or "")
                rows.append({"entry": entry, **{key: array[i] for key, array in arrays.items()}})
        skipped = [record._asdict() for record in dataset.skipped]
        if not rows:
            first = f", first {skipped[0]['file']}: {skipped[0]['reason']}" if skipped else ""
            raise DataError(f"none of {len(items)} images could be read{first}")
        more: dict[str, dict[str, Any]] = {
            item["id"]: {name: item[name] for name in ("label", "patient") if name in item} for item in items
        }
        return Embeddings(
            embed=np.stack([row["embed"] for row in rows]),
            entries=[{**row["entry"], **more[row["entry"]["id"]]} for row in rows],
            model=self.model,
            cls=np.stack([row["cls"] for row in rows]),
            scores=_padded([row.get("scores", ()) for row in rows], np.float32, np.nan),
            selected=_padded([row.get("selected", ()) for row in rows], np.int64, -1),
            card=self.card,
            skipped=skipped,
        )

    def sentences(self, texts: Sequence[str], dim: int) -> Tensor:
        """Embed sentences or reports in the form of the training reports: (N, E) float32 of unit norm, on the CPU.

        ``dim``: 2 for texts about X-rays, 3 for texts about volumes: the projection keeps statistics of either kind.
        Raises DataError: a text holds no word.
        """
        for text in texts:
            if not any(letter.isalpha() for letter in text):
                raise DataError(f"the text {' '.join(text.lower().split())!r} holds no word")
        read = [as_trained(text, self.pretrained.keep_punct, min_tokens=1) for text in texts]
        rows = [torch.empty(0, self.network.text_projection.output.out_features)]
        for start in range(0, len(read), _BATCH):
            embed = self.encode_reports(read[start : start + _BATCH], dim)
            rows.append(F.normalize(embed.float(), dim=-1).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def encode_reports(self, texts: Sequence[str], dim: int) -> Tensor:
        """Project reports in the form that the network was trained on: (B, E) on its device, not normalised."""
        length = self.card["preprocessing"].get("max_length", 112)
        tokens = self.pretrained.tokenizer(
            list(texts), truncation=True, max_length=length, padding=True, return_tensors="pt"
        ).to(self.device)
        modality = torch.full((len(texts),), dim - 2, device=self.device)
        return self.network.encode_text(tokens["input_ids"], tokens["attention_mask"], modality)

    def reports(self, items: Sequence[Mapping[str, Any]]) -> Embeddings:
        """Embed the reports of datalist items, {"id", "dim", "report"}, that have one. Raises DataError: none has."""
        known = [item for item in items if item.get("report")]
        if not known:
            raise DataError("no item has a report; give a datalist with reports")
        embed = np.zeros((len(known), self.network.text_projection.output.out_features), np.float32)
        for dim in (2, 3):
            own = [i for i, item in enumerate(known) if item["dim"] == dim]
            texts = [as_trained(known[i]["report"], self.pretrained.keep_punct) for i in own]
            embed[own] = self.sentences(texts, dim).numpy()
        entries = [entry_of(item["id"], "report", item["dim"], text=item["report"]) for item in known]
        return Embeddings(embed, entries, self.model, card=self.card)

    def datalist(self, path: str | Path, root: str | Path, split: str = "test", **options: Any) -> Embeddings:
        """Images and reports of a datalist, the images first."""
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


def load_trained(checkpoint: str | Path) -> nn.Module:
    """The network that `model.pt` of any bundle holds, on the CPU, in evaluation mode.

    That of a task, see `load_network`, or an `Embedder` of what pre-training left; errors as of these.
    """
    path = Path(checkpoint)
    return load_network(path) if KINDS.keys() & read_card(path) else Embedder(path, "cpu")
