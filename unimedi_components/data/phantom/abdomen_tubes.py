# SPDX-License-Identifier: Apache-2.0
"""Where the tube-like abdominal organs run: corners (z, y, x, radius) in mm of the reference body."""

from __future__ import annotations

from .abdomen_shapes import Curve

__all__ = ["TUBES"]

TUBES: tuple[tuple[str, tuple[float, float, float], float, bool, Curve, Curve | None], ...] = (
    (
        "duodenum",
        (4.0, 3.0, 3.0),
        0.07,
        False,
        (
            (99, -44, -30, 10),
            (106, -32, -46, 12),
            (94, -8, -56, 12),
            (60, 0, -56, 12),
            (44, -2, -36, 11),
            (46, -14, -4, 10.5),
            (52, -14, 22, 10.5),
            (76, -22, 32, 10),
        ),
        None,
    ),
    (
        "pancreas",
        (3.0, 2.0, 3.0),
        0.08,
        False,
        (
            (78, -14, -30, 10),
            (94, -16, -34, 15),
            (106, -24, -16, 13),
            (114, -32, 4, 11),
            (124, -28, 26, 12),
            (134, -8, 54, 12),
            (145, 14, 78, 10),
        ),
        ((1.15, 0.9, 1.0),),
    ),
    (
        "inferior vena cava",
        (0.0, 1.0, 1.5),
        0.08,
        True,
        (
            (245, -14, -26, 12),
            (200, -2, -23, 12.5),
            (150, 4, -21, 12),
            (100, 5, -19, 11),
            (40, 7, -17, 10.5),
            (0, 10, -14, 10),
        ),
        ((1.0, 0.85, 1.15),),
    ),
    (
        "aorta",
        (0.0, 1.0, 2.0),
        0.08,
        True,
        ((250, 26, 20, 12), (200, 20, 17, 11.5), (150, 14, 13, 11), (100, 8, 11, 10.5), (50, 4, 9, 10), (6, 4, 5, 9.5)),
        None,
    ),
    (
        "portal and splenic veins",
        (2.0, 1.5, 2.0),
        0.06,
        True,
        (
            (150, 24, 84, 5.5),
            (140, 10, 58, 6.2),
            (130, -8, 28, 6.5),
            (116, -16, 0, 8),
            (126, -15, -22, 8.5),
            (142, -18, -44, 8),
            (150, -24, -62, 6.5),
        ),
        None,
    ),
    (
        "gallbladder",
        (5.0, 4.0, 4.0),
        0.14,
        False,
        ((112, -26, -46, 6.5), (98, -42, -56, 13), (80, -58, -62, 17)),
        None,
    ),
    (
        "esophagus",
        (0.0, 1.0, 2.0),
        0.07,
        False,
        ((250, 6, 6, 8.5), (215, 2, 10, 9), (190, -4, 18, 9), (176, -6, 30, 9.5), (172, -6, 40, 10)),
        None,
    ),
)
"""Name, deviation of the position (z, y, x), of the calibre, whether blood fills it, curve, squash; by priority."""
