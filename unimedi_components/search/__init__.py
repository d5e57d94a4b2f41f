# SPDX-License-Identifier: Apache-2.0
"""What the common space is for: embeddings of files and sentences, search among them, zero-shot classification."""

from unimedi_components.search.embedder import Embedder, model_hash
from unimedi_components.search.embeddings import Embeddings
from unimedi_components.search.index import EmbeddingIndex, Hit
from unimedi_components.search.prompts import PromptSet, load_prompts, shipped_prompts
from unimedi_components.search.zero_shot import ZeroShot, zero_shot_scores

__all__ = [
    "Embedder",
    "EmbeddingIndex",
    "Embeddings",
    "Hit",
    "PromptSet",
    "ZeroShot",
    "load_prompts",
    "model_hash",
    "shipped_prompts",
    "zero_shot_scores",
]
