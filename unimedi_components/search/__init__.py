# SPDX-License-Identifier: Apache-2.0
"""What the common space is for: embeddings of files and sentences, and search among them."""

from unimedi_components.search.embedder import Embedder, model_hash
from unimedi_components.search.embeddings import Embeddings
from unimedi_components.search.index import EmbeddingIndex, Hit

__all__ = ["Embedder", "EmbeddingIndex", "Embeddings", "Hit", "model_hash"]
