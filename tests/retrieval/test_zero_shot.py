# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification against the same written out, one cosine at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from unimedi_components.errors import ConfigError, DataError
from unimedi_components.retrieval import Embeddings, PromptSet, ZeroShot, zero_shot_scores

WIDTH, SCALE = 6, 11.0
PROMPTS = PromptSet(
    "own",
    3,
    {
        "effusion": {"positive": ("fluid.", "much fluid.", "an effusion."), "negative": ("no fluid.",)},
        "nodule": {"positive": ("a nodule.",), "negative": ("no nodule.", "no mass or nodule.")},
    },
)


class Stub:
    """An embedder with a random but fixed vector for each sentence and dimension."""

    model = "m1"
    network = SimpleNamespace(logit_scale=torch.tensor(SCALE))

    def sentences(self, texts, dim):
        return torch.from_numpy(np.stack([self.vector(text, dim) for text in texts]))

    def vector(self, text, dim):
        vector = np.random.default_rng([dim, *text.encode()]).normal(size=WIDTH).astype(np.float32)
        return vector / np.linalg.norm(vector)


@pytest.fixture
def images():
    rows = np.random.default_rng(0).normal(size=(7, WIDTH)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embeddings(rows, kinds, dims, model="m1"):
    entries = [
        {"id": f"s{i}", "kind": kind, "dim": dim, "source": "", "text": ""}
        for i, (kind, dim) in enumerate(zip(kinds, dims, strict=True))
    ]
    return Embeddings(rows, entries, model)


def one_by_one(image, finding):
    logits = []
    for side in ("positive", "negative"):
        total = [0.0] * WIDTH
        for text in PROMPTS.findings[finding][side]:
            vector = Stub().vector(text, 3)
            total = [a + float(b) for a, b in zip(total, vector, strict=True)]
        norm = math.sqrt(sum(a * a for a in total))
        logits.append(SCALE * sum(float(a) * b / norm for a, b in zip(image, total, strict=True)))
    return math.exp(logits[0]) / (math.exp(logits[0]) + math.exp(logits[1]))


def test_probabilities_equal_a_slow_loop(images):
    zero_shot = ZeroShot(Stub(), PROMPTS, sentences=1)
    assert (zero_shot.names, zero_shot.dim, zero_shot.logit_scale) == (("effusion", "nodule"), 3, SCALE)
    found = zero_shot.probabilities(images)
    expected = [[one_by_one(image, finding) for finding in PROMPTS.findings] for image in images]
    assert found.dtype == np.float32 and np.ptp(found) > 0.2
    np.testing.assert_allclose(found, expected, atol=1e-5)


JOINED = {
    2: {
        "effusion": ("fluid. much fluid.", "much fluid. an effusion.", "an effusion. fluid."),
        "nodule": ("no nodule. no mass or nodule.", "no mass or nodule. no nodule."),
    },
    # no side is long enough for four different ones
    4: {
        "effusion": (
            "fluid. much fluid. an effusion.",
            "much fluid. an effusion. fluid.",
            "an effusion. fluid. much fluid.",
        ),
        "nodule": ("no nodule. no mass or nodule.", "no mass or nodule. no nodule."),
    },
}


@pytest.mark.parametrize("sentences", [2, 4])
def test_phrasings_are_joined_with_the_next_ones(images, sentences):
    written = PromptSet(
        "own",
        3,
        {
            "effusion": {"positive": JOINED[sentences]["effusion"], "negative": ("no fluid.",)},
            "nodule": {"positive": ("a nodule.",), "negative": JOINED[sentences]["nodule"]},
        },
    )
    found = ZeroShot(Stub(), PROMPTS, sentences=sentences).probabilities(images)
    np.testing.assert_allclose(found, ZeroShot(Stub(), written, sentences=1).probabilities(images), atol=1e-6)


def test_images_of_the_prompts_dimension_are_classified(images):
    zero_shot = ZeroShot(Stub(), PROMPTS)
    kinds, dims = ["image", "report", "image", "image", "image", "report", "image"], [3, 3, 2, 3, 2, 2, 3]
    ids, found = zero_shot.classify(embeddings(images, kinds, dims))
    assert ids == ["s0", "s3", "s6"]
    np.testing.assert_array_equal(found, zero_shot.probabilities(images[[0, 3, 6]]))


def test_a_two_dimensional_set_asks_for_sentences_about_films(images):
    flat = PromptSet("own", 2, PROMPTS.findings)
    assert (
        np.abs(ZeroShot(Stub(), flat).probabilities(images) - ZeroShot(Stub(), PROMPTS).probabilities(images)).max()
        > 0.1
    )


def test_scores_are_scikit_learns_over_the_known_labels():
    rng = np.random.default_rng(3)
    labels = rng.integers(-2, 2, size=(60, 3))
    labels[:, 2] = np.where(labels[:, 2] == 0, -1, labels[:, 2])
    probabilities = rng.uniform(size=(60, 3)) * 0.5 + 0.3 * (labels == 1)
    found = zero_shot_scores(probabilities, labels, ["a", "b", "c"], bootstrap=50)
    expected = [roc_auc_score(y[y >= 0], p[y >= 0]) for p, y in zip(probabilities.T[:2], labels.T[:2], strict=True)]
    assert found["auroc"] == {"a": pytest.approx(expected[0]), "b": pytest.approx(expected[1]), "c": None}
    assert found["macro_auroc"] == pytest.approx(np.mean(expected)) and found["skipped"] == {"c": "no negative case"}
    assert found["uncertain"]["a"] == int((labels[:, 0] < 0).sum())
    low, high = found["intervals"]["auroc"]["a"]
    assert low < expected[0] < high and "accuracy" not in found["intervals"]
    assert "intervals" not in zero_shot_scores(probabilities, labels, ["a", "b", "c"], bootstrap=0)


def test_faults(images):
    zero_shot = ZeroShot(Stub(), PROMPTS)
    for wrong in (images[:, :5], images[0], np.full((1, WIDTH), np.nan)):
        with pytest.raises(DataError, match="not finite rows of 6 values"):
            zero_shot.probabilities(wrong)
    with pytest.raises(ConfigError, match="prompts were embedded with model m1, the images with m2"):
        zero_shot.classify(embeddings(images, ["image"] * 7, [3] * 7, "m2"))
    with pytest.raises(DataError, match="no volume among the embeddings; the prompt set 'own' is for volumes"):
        zero_shot.classify(embeddings(images, ["image"] * 6 + ["report"], [2] * 6 + [3]))
    with pytest.raises(ValueError, match="do not fit"):
        zero_shot_scores(np.zeros((2, 2)), np.zeros((2, 3), int), ["a", "b"])
