# SPDX-License-Identifier: Apache-2.0
"""Losses: contrastive, self-distillation and their weighted sum for pre-training; classification."""

from unimedi_components.losses.classification import ClassificationLoss, probabilities
from unimedi_components.losses.contrastive import contrastive_loss
from unimedi_components.losses.detection import DetectionLoss
from unimedi_components.losses.distillation import balanced_center, distillation_loss, update_center
from unimedi_components.losses.pretrain import UniMediLoss
from unimedi_components.losses.segmentation import FocalDiceLoss
