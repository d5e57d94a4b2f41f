# SPDX-License-Identifier: Apache-2.0
"""The common space of images and reports: embeddings, search, zero-shot classification, and what it is worth.

Names are loaded when first used: a search needs nothing of what measures.
"""

from typing import Any

from unimedi_components.lazy import import_lazily

_HOMES = {
    "datalist_search": "draw_examples evaluate_search headline",
    "embedder": "Embedder load_trained model_hash",
    "embeddings": "Embeddings",
    "index": "EmbeddingIndex Hit",
    "inference": "SaveEmbeddings SaveNeighbours embed_batch finish_embedding",
    "pretraining": "after_training evaluate_datalist",
    "prompts": "PromptSet load_prompt_sets load_prompts shipped_prompts",
    "recall": "ContrastiveLossMetric RetrievalRecall recall_at_k",
    "zero_shot": "ZeroShot zero_shot_scores",
}


def __getattr__(name: str) -> Any:
    return import_lazily(globals(), _HOMES, name)
