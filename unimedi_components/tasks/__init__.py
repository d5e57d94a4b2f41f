# SPDX-License-Identifier: Apache-2.0
"""What each task predicts, measures and writes, over one frame."""

from unimedi_components.tasks.boxes import RoisOfBoxesd, SaveBoxes, ServedDetector, prepare_boxes
from unimedi_components.tasks.classification import SavePredictions
from unimedi_components.tasks.evaluate import evaluate_task, measure_run
from unimedi_components.tasks.organs import OrganInferer, SaveOrgans
from unimedi_components.tasks.xray_masks import SaveMasks, ServedMaskd
