# SPDX-License-Identifier: Apache-2.0
"""The common space of images and reports: embeddings, search, zero-shot classification, and what it is worth.

Names are loaded when first used: a search needs nothing of what measures.
"""

import importlib
from typing import Any

_EXPORTS = {
    "ContrastiveLossMetric": "recall",
    "Embedder": "embedder",
    "EmbeddingIndex": "index",
    "Embeddings": "embeddings",
    "Hit": "index",
    "PromptSet": "prompts",
    "RetrievalRecall": "recall",
    "SaveEmbeddings": "inference",
    "SaveNeighbours": "inference",
    "ZeroShot": "zero_shot",
    "after_training": "pretraining",
    "draw_examples": "examples",
    "embed_batch": "inference",
    "evaluate_datalist": "pretraining",
    "evaluate_search": "datalist_search",
    "finish_embedding": "inference",
    "headline": "datalist_search",
    "load_prompt_sets": "prompts",
    "load_prompts": "prompts",
    "load_trained": "embedder",
    "model_hash": "embedder",
    "recall_at_k": "recall",
    "shipped_prompts": "prompts",
    "zero_shot_scores": "zero_shot",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
