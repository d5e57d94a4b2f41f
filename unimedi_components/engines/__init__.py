# SPDX-License-Identifier: Apache-2.0
"""What Ignite and MONAI need beyond what they bring."""

from unimedi_components.engines.calibration import CalibrateProjection
from unimedi_components.engines.checkpoint import TaskCheckpoint, TrainingCheckpoint
from unimedi_components.engines.early_stop import EarlyStop, EarlyStopByScore
from unimedi_components.engines.handlers import (
    EndWithLoader,
    EpochSeed,
    GradientCare,
    History,
    SkippedStudies,
    TeacherUpdate,
    TensorBoardLosses,
    defined_handler,
    losses,
    prepare_mixed_batch,
)
from unimedi_components.engines.inference import SaveEmbeddings, embed_batch, finish_embedding
from unimedi_components.engines.optim import amp_dtype, build_optimizer, scaled_lr, warmup_cosine
from unimedi_components.engines.progress import TrainingProgress
from unimedi_components.engines.target_information import WatchTargets
from unimedi_components.engines.whitening import WhitenTokenizers

__all__ = [
    "CalibrateProjection",
    "EarlyStop",
    "EarlyStopByScore",
    "EndWithLoader",
    "EpochSeed",
    "GradientCare",
    "History",
    "SaveEmbeddings",
    "SkippedStudies",
    "TaskCheckpoint",
    "TeacherUpdate",
    "TensorBoardLosses",
    "TrainingCheckpoint",
    "TrainingProgress",
    "WatchTargets",
    "WhitenTokenizers",
    "amp_dtype",
    "build_optimizer",
    "defined_handler",
    "embed_batch",
    "finish_embedding",
    "losses",
    "prepare_mixed_batch",
    "scaled_lr",
    "warmup_cosine",
]
