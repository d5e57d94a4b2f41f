# SPDX-License-Identifier: Apache-2.0
"""What Ignite and MONAI need beyond what they bring; here are the names that configs use."""

from unimedi_components.engines.fine_tune import choose_recipe
from unimedi_components.engines.handlers import EndWithLoader, ValidationLog, defined_handler, prepare_mixed_batch
from unimedi_components.engines.inference import SaveEmbeddings, embed_batch, finish_embedding
from unimedi_components.engines.optim import amp_dtype, build_optimizer, use_amp, warmup_cosine
from unimedi_components.engines.run import PretrainingRun, TaskRun, set_up

__all__ = [
    "EndWithLoader",
    "PretrainingRun",
    "SaveEmbeddings",
    "TaskRun",
    "ValidationLog",
    "amp_dtype",
    "build_optimizer",
    "choose_recipe",
    "defined_handler",
    "embed_batch",
    "finish_embedding",
    "prepare_mixed_batch",
    "set_up",
    "use_amp",
    "warmup_cosine",
]
