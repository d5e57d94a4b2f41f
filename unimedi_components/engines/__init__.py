# SPDX-License-Identifier: Apache-2.0
"""What Ignite and MONAI need beyond what they bring; here are the names that configs use."""

from unimedi_components.engines.handlers import EndWithLoader, ValidationLog, defined_handler, prepare_mixed_batch
from unimedi_components.engines.optim import (
    amp_dtype,
    build_optimizer,
    choose_recipe,
    total_steps,
    use_amp,
    warmup_cosine,
    warmup_poly,
)
from unimedi_components.engines.run import PretrainingRun, TaskRun, set_up
