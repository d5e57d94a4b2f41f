# SPDX-License-Identifier: Apache-2.0
"""How near X-rays and CT volumes of one disease lie to each other in a space of features.

Letters: N X-rays, M volumes, D width of the features, F findings, R resamples.
"""

import numpy as np
import numpy.typing as npt

from unimedi_components.arrays import Array


def unit_rows(rows: npt.ArrayLike) -> Array:
    """Rows (N, D) divided by their L2 norm; a row of zeros stays."""
    array = np.asarray(rows, dtype=np.float64)
    norm = np.linalg.norm(array, axis=1, keepdims=True)
    return np.divide(array, norm, out=np.zeros_like(array), where=norm > 0)


def centred(rows: npt.ArrayLike) -> Array:
    """Rows (N, D) minus their mean, so that what a modality's images share does not decide a cosine."""
    array = np.asarray(rows, dtype=np.float64)
    return array - array.mean(0)


def centroid_distance(
    xray: Array,
    ct: Array,
    xray_labels: Array,
    ct_labels: Array,
    xray_weights: Array | None = None,
    ct_weights: Array | None = None,
) -> Array:
    """Distance of the 2D and the 3D centroid of a finding over the within-class spread: the number behind Fig. 2.

    For a finding, mu_2D and mu_3D are the means of the L2-normalised features of the X-rays and of the volumes that
    have it, whatever else they have, and s_2D^2 and s_3D^2 the mean squared distances to their own mean (over n - 1).
    The value is ||mu_2D - mu_3D|| / sqrt((s_2D^2 + s_3D^2) / 2), (R, F), or (1, F) without weights; NaN where a
    finding has fewer than two images in a dimension, or no spread. Two samples of n and m images of one distribution
    have an expected square of 1 / n + 1 / m, not 0. Resampling adds as much once more, which is taken off in resamples,
    so that they scatter about the value.
    ``xray``: features, (N, D), normalised here. ``xray_labels``: 1 where a finding is present, (N, F).
    ``xray_weights``: how often each case counts, (R, N); None counts each once.
    """
    sides = []
    for rows, labels, weights in ((xray, xray_labels, xray_weights), (ct, ct_labels, ct_weights)):
        unit = unit_rows(rows)
        counts = np.ones((1, len(unit))) if weights is None else weights
        sides.append([_moments(unit, counts * (column == 1)) for column in labels.T])
    found = []
    for (mean_2d, spread_2d, count_2d), (mean_3d, spread_3d, count_3d) in zip(*sides, strict=True):
        spread = (spread_2d + spread_3d) / 2
        square = ((mean_2d - mean_3d) ** 2).sum(1)
        if xray_weights is not None:
            square = (square - spread_2d / count_2d - spread_3d / count_3d).clip(min=0)
        found.append(np.sqrt(np.divide(square, spread, out=np.full_like(square, np.nan), where=spread > 1e-12)))
    return np.stack(found, axis=1)


def _moments(unit: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Weighted means (R, D) of rows of unit norm, variances (R,), NaN for fewer than two rows, and numbers (R,)."""
    total = weights.sum(1)
    enough = total > 1
    mean = (weights @ unit) / np.maximum(total, 1)[:, None]
    square = (weights @ (unit**2).sum(1)) / np.maximum(total, 1)
    variance = (square - (mean**2).sum(1)).clip(min=0) * total / np.maximum(total - 1, 1)
    return mean, np.where(enough, variance, np.nan), np.maximum(total, 1)
