# SPDX-License-Identifier: Apache-2.0
"""Does the CLS attention on an X-ray lie where the findings are? Needs known boxes.

Letters: N X-rays, P patch tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose
from torch.nn import functional as F

from unimedi_components.arrays import Array
from unimedi_components.data.films import film_transforms
from unimedi_components.metrics.bootstrap import Measures, others_mean
from unimedi_components.networks.pretrained import Pretrained
from unimedi_components.retrieval.features import Features
from unimedi_components.retrieval.slices import FOCAL_SHARE


def xray_attention_metrics(
    kept: Measures, pretrained: Pretrained, features: Features, studies: Mapping[str, Mapping[str, Any]]
) -> None:
    """Attention inside the true boxes of the X-rays whose boxes fill at most a third of what the network sees.

    Keeps: "xray_attention_ratio": mean of `attention_ratios` of an image's own attention, 1 for even attention, and
        "..._permuted", that of other patients' attention; each also "_per_finding"; "xray_attention_studies", how many
        X-rays count. Without any, the count alone.
    """
    known = [studies.get(item["id"], {}).get("findings", ()) for item in features.items]
    boxes = [[box for finding in findings for box in finding["boxes"]] for findings in known]
    tried = [i for i, found in enumerate(boxes) if found]
    cover = box_cover(pretrained, features, [boxes[i] for i in tried], tried)
    focal = [place for place, row in enumerate(cover) if 0 < row.mean() <= FOCAL_SHARE]
    kept.add("xray_attention_studies", len(focal))
    if focal:
        rows = [tried[place] for place in focal]
        ratios = attention_ratios(features.attention[rows].double().numpy(), cover[focal])
        patients = [features.patients[i] for i in rows]
        findings = [[finding["name"] for finding in known[i]] for i in rows]
        for key, values in (("", np.diag(ratios)), ("_permuted", others_mean(ratios, patients))):
            if np.isfinite(values).all():
                kept.mean(f"xray_attention_ratio{key}", values, patients)
                kept.per_finding(f"xray_attention_ratio{key}", values, findings)


def attention_ratios(attention: Array, cover: Array) -> Array:
    """Share of the attention of image j inside the boxes of image i, over the boxes' share of the image, (N, N).

    ``attention``: Eq. 1's **v**, (N, P). ``cover``: share of each patch that the boxes cover, (N, P); some in each row.
    """
    share = attention / attention.sum(1, keepdims=True)
    return (cover @ share.T) / cover.mean(1, keepdims=True)


def box_cover(
    pretrained: Pretrained, features: Features, boxes: Sequence[Sequence[Sequence[int]]], rows: Sequence[int]
) -> Array:
    """Share of each patch of the network's input that lies in boxes, (N, P).

    Args:
        pretrained: its card says how images are resized and cropped.
        boxes: of each X-ray, [x0, y0, x1, y1] in pixels of the file, the last pixel included.
    """
    options = pretrained.card["preprocessing"]["xray"]
    size = options.get("size", 224)
    long_side = options.get("long_side") or round(size * 256 / 224)
    chain = Compose(film_transforms(size, long_side, target="mask"))
    found = []
    for i, corners in zip(rows, boxes, strict=True):
        within = [[x0, y0, x1 + 1, y1 + 1] for x0, y0, x1, y1 in corners]
        mask = torch.as_tensor(chain({"image": str(features.files[i]), "boxes": within})["mask"])
        _, height, width = pretrained.network.encoder.token_grids(mask[None])[0]
        found.append(F.adaptive_avg_pool2d(mask, (height, width)).flatten().double().numpy())
    return np.stack(found) if found else np.empty((0, features.attention.shape[1]))
