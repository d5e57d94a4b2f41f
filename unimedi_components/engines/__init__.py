# SPDX-License-Identifier: Apache-2.0
"""What Ignite and MONAI need beyond what they bring."""

from unimedi_components.engines.checkpoint import TrainingCheckpoint
from unimedi_components.engines.handlers import (
    EpochSeed,
    GradientCare,
    History,
    TeacherUpdate,
    TensorBoardLosses,
    TrainingProgress,
    losses,
    prepare_mixed_batch,
)
from unimedi_components.engines.optim import build_optimizer, warmup_cosine

__all__ = [
    "EpochSeed",
    "GradientCare",
    "History",
    "TeacherUpdate",
    "TensorBoardLosses",
    "TrainingCheckpoint",
    "TrainingProgress",
    "build_optimizer",
    "losses",
    "prepare_mixed_batch",
    "warmup_cosine",
]
