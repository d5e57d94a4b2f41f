# SPDX-License-Identifier: Apache-2.0
"""Information of targets against sums written out, and known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unimedi_components.metrics.information import TargetInformation


def entropy(p: np.ndarray) -> float:
    return float(-sum(x * math.log(x) for x in p if x > 0))


def test_equals_the_sums_written_out() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(6, 0.3), size=(9, 4))
    targets = TargetInformation()
    for part in (p[:5], p[5:]):
        targets.add(torch.from_numpy(part))
    result = targets.result()
    mean_entropy = np.mean([[entropy(row) for row in sample] for sample in p])
    assert result.entropy == pytest.approx(mean_entropy, abs=1e-9)
    assert result.marginal_entropy == pytest.approx(entropy(p.mean((0, 1))), abs=1e-9)
    assert result.information == pytest.approx(entropy(p.mean((0, 1))) - mean_entropy, abs=1e-9)
    by_position = [entropy(p[:, i].mean(0)) for i in range(4)]
    assert result.given_position == pytest.approx(np.mean(by_position) - mean_entropy, abs=1e-9)
    assert result.prototypes == pytest.approx(math.exp(entropy(p.mean((0, 1)))), abs=1e-9)


def test_known_cases() -> None:
    same, position, apart = TargetInformation(), TargetInformation(), TargetInformation()
    same.add(torch.tensor([[0.25, 0.75]] * 8))
    assert same.result().information == pytest.approx(0, abs=1e-9)
    # every position has its own prototype, whatever the sample: all information is of the position
    position.add(torch.eye(4).expand(8, 4, 4))
    assert position.result().information == pytest.approx(math.log(4)) and position.result().prototypes == 4
    assert position.result().given_position == pytest.approx(0, abs=1e-9)
    apart.add(torch.eye(8))
    assert apart.result().information == apart.result().given_position == pytest.approx(math.log(8))


def test_without_samples() -> None:
    with pytest.raises(ValueError, match="no targets"):
        TargetInformation().result()
