# SPDX-License-Identifier: Apache-2.0
"""What the common space is for: embeddings of files and sentences, search among them, zero-shot classification."""

from unimedi_components.search.embedder import Embedder, model_hash
from unimedi_components.search.embeddings import Embeddings
from unimedi_components.search.examples import draw_examples
from unimedi_components.search.index import EmbeddingIndex, Hit
from unimedi_components.search.prompts import PromptSet, load_prompt_sets, load_prompts, shipped_prompts
from unimedi_components.search.report import HEADLINE, evaluate_search, headline
from unimedi_components.search.save_neighbours import SaveNeighbours
from unimedi_components.search.zero_shot import ZeroShot, zero_shot_scores

__all__ = [
    "HEADLINE",
    "Embedder",
    "EmbeddingIndex",
    "Embeddings",
    "Hit",
    "PromptSet",
    "SaveNeighbours",
    "ZeroShot",
    "draw_examples",
    "evaluate_search",
    "headline",
    "load_prompt_sets",
    "load_prompts",
    "model_hash",
    "shipped_prompts",
    "zero_shot_scores",
]
