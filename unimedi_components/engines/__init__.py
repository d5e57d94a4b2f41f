# SPDX-License-Identifier: Apache-2.0
"""What Ignite and MONAI need beyond what they bring."""

from unimedi_components.engines.calibration import CalibrateProjection
from unimedi_components.engines.checkpoint import TaskCheckpoint, TrainingCheckpoint
from unimedi_components.engines.early_stop import EarlyStop
from unimedi_components.engines.handlers import (
    EndWithLoader,
    EpochSeed,
    GradientCare,
    History,
    SkippedStudies,
    TeacherUpdate,
    TensorBoardLosses,
    ValidationLog,
    defined_handler,
    losses,
    prepare_mixed_batch,
)
from unimedi_components.engines.optim import (
    amp_dtype,
    build_optimizer,
    choose_recipe,
    scaled_lr,
    use_amp,
    warmup_cosine,
    warmup_poly,
)
from unimedi_components.engines.progress import TrainingProgress
from unimedi_components.engines.run import PretrainingRun, TaskRun, set_up
from unimedi_components.engines.target_information import WatchTargets
from unimedi_components.engines.whitening import WhitenTokenizers

__all__ = [
    "CalibrateProjection",
    "EarlyStop",
    "EndWithLoader",
    "EpochSeed",
    "GradientCare",
    "History",
    "PretrainingRun",
    "SkippedStudies",
    "TaskCheckpoint",
    "TaskRun",
    "TeacherUpdate",
    "TensorBoardLosses",
    "TrainingCheckpoint",
    "TrainingProgress",
    "ValidationLog",
    "WatchTargets",
    "WhitenTokenizers",
    "amp_dtype",
    "build_optimizer",
    "choose_recipe",
    "defined_handler",
    "losses",
    "prepare_mixed_batch",
    "scaled_lr",
    "set_up",
    "use_amp",
    "warmup_cosine",
    "warmup_poly",
]
