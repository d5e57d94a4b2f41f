# SPDX-License-Identifier: Apache-2.0
"""The unified ViT, the report encoder, heads, and UniMedI itself."""

from unimedi_components.networks.cards import load_network, network_card
from unimedi_components.networks.classifier import ImageClassifier, load_classifier, task_encoder
from unimedi_components.networks.heads import DINOHead, ProjectionHead
from unimedi_components.networks.output import EncoderOutput, ImageFeatures, UniMediOutput
from unimedi_components.networks.pretrained import Pretrained, load_encoder, load_pretrained, untrained
from unimedi_components.networks.report_encoder import ReportEncoder, load_tokenizer
from unimedi_components.networks.setr_pup import SETRPUP
from unimedi_components.networks.sizes import SIZES, encoder_sizes
from unimedi_components.networks.unified_vit import UnifiedViT
from unimedi_components.networks.unimedi import UniMedI
from unimedi_components.networks.vitdet import ViTDet
from unimedi_components.networks.weights import create_encoder, load_strict, load_weights
