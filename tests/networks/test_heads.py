# SPDX-License-Identifier: Apache-2.0
"""Projection heads against their parts written out, and the DINO head against DINO's weight normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unimedi_components.errors import ConfigError
from unimedi_components.networks.heads import DINOHead, ProjectionHead

MODALITY = torch.tensor([0, 1, 1, 0, 0, 1, 0])


def features() -> torch.Tensor:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x + 30 * MODALITY[:, None]


def parts(head: ProjectionHead) -> tuple[nn.Linear, nn.Linear]:
    assert head.hidden is not None
    return head.hidden, head.output


def test_batch_norm_kind_is_mgcas_embedding() -> None:
    head = ProjectionHead(6, hidden_dim=10, out_dim=4, norm="batch").double()
    hidden, output = parts(head)
    mgca = nn.Sequential(hidden, nn.BatchNorm1d(10), nn.ReLU(), output, nn.BatchNorm1d(4, affine=False)).double()
    torch.testing.assert_close(head(features(), MODALITY), mgca(features()))
    torch.testing.assert_close(head(features()), mgca(features()))
    head.eval(), mgca.eval()
    torch.testing.assert_close(head(features()), mgca(features()))


def test_default_normalises_each_modality_alone() -> None:
    head = ProjectionHead(6, hidden_dim=10, out_dim=4).double()
    hidden, output = parts(head)
    out = head(features(), MODALITY)
    for kind in (0, 1):
        alone = nn.Sequential(
            nn.BatchNorm1d(6, affine=False),
            hidden,
            nn.BatchNorm1d(10),
            nn.ReLU(),
            output,
            nn.BatchNorm1d(4, affine=False),
        ).double()
        expected = alone(features()[kind == MODALITY])
        torch.testing.assert_close(out[kind == MODALITY], expected, atol=1e-9, rtol=1e-9)


def test_a_shift_of_one_modality_changes_nothing() -> None:
    head = ProjectionHead(6, hidden_dim=10, out_dim=4).double()
    shifted = features() - 12 * MODALITY[:, None]
    torch.testing.assert_close(head(features(), MODALITY), head(shifted, MODALITY), atol=1e-8, rtol=1e-8)


def test_linear_kinds() -> None:
    head = ProjectionHead(6, hidden_dim=None, out_dim=4, norm="batch").double()
    expected = head.output(nn.BatchNorm1d(6, affine=False).double()(features()))
    torch.testing.assert_close(head(features()), expected)
    for norm in ("layer", "none"):
        head = ProjectionHead(6, hidden_dim=None, out_dim=4, norm=norm).double()
        torch.testing.assert_close(head(features()), head.output(features()))
    with pytest.raises(ValueError, match="modality"):
        ProjectionHead(6, hidden_dim=None, out_dim=4)(features().float())


def test_layer_norm_and_none() -> None:
    for norm in ("layer", "none"):
        head = ProjectionHead(6, hidden_dim=10, out_dim=4, norm=norm).double()
        hidden, output = parts(head)
        x = hidden(features()[:1])
        x = F.relu(F.layer_norm(x, (10,)) if norm == "layer" else x)
        x = output(x)
        expected = F.layer_norm(x, (4,)) if norm == "layer" else x
        torch.testing.assert_close(head(features()[:1]), expected)


def test_paper_sizes() -> None:
    head = ProjectionHead(768)
    counts = 768 * 2048 + 2048 + 2 * 2048 + 2048 * 128 + 128
    assert sum(p.numel() for p in head.parameters()) == counts
    assert head(torch.randn(4, 768), torch.tensor([0, 0, 1, 1])).shape == (4, 128)


def test_unknown_norm() -> None:
    with pytest.raises(ConfigError, match="batch_per_modality, batch, layer, none"):
        ProjectionHead(6, norm="group")


class _ReferenceDINOHead(nn.Module):
    """The head as DINO describes it, with torch's own weight normalisation."""

    def __init__(self, in_dim: int, out_dim: int, nlayers: int) -> None:
        super().__init__()
        if nlayers == 1:
            self.mlp: nn.Module = nn.Linear(in_dim, 4)
        else:
            layers = [nn.Linear(in_dim, 8), nn.GELU()]
            for _ in range(nlayers - 2):
                layers += [nn.Linear(8, 8), nn.GELU()]
            self.mlp = nn.Sequential(*layers, nn.Linear(8, 4))
        with pytest.warns(FutureWarning):
            self.last_layer = nn.utils.weight_norm(nn.Linear(4, out_dim, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_dino_head_loads_dinos_state_and_scores_alike(nlayers: int) -> None:
    reference = _ReferenceDINOHead(6, 9, nlayers)
    nn.init.uniform_(reference.last_layer.weight_g, 0.5, 2)
    head = DINOHead(6, 9, hidden_dim=8, bottleneck_dim=4, nlayers=nlayers, norm_last_layer=False)
    head.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 5, 6)
    bottleneck = head(x)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(bottleneck @ head.prototypes.T, reference(x))


def test_dino_head_defaults() -> None:
    head = DINOHead(12, out_dim=50)
    torch.testing.assert_close(head.prototypes.norm(dim=1), torch.ones(50))
    assert head.prototypes.shape == (50, 256)
    assert not head.last_layer.weight_g.requires_grad
    assert DINOHead(12, 50, norm_last_layer=False).last_layer.weight_g.requires_grad
    assert [tuple(m.weight.shape) for m in head.mlp if isinstance(m, nn.Linear)] == [
        (2048, 12),
        (2048, 2048),
        (256, 2048),
    ]
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert head.mlp[2].bias.abs().sum() == 0
    # The teacher starts as a deep copy, with the prototypes.
    assert torch.equal(copy.deepcopy(head).prototypes, head.prototypes)
