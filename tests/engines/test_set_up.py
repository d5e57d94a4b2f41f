# SPDX-License-Identifier: Apache-2.0
"""What a run sets for its process."""

import pytest
import torch

from tests.common import process_kept
from unimedi_components.engines import set_up
from unimedi_components.errors import ConfigError


def summed_by_threads() -> torch.Tensor:
    """The gradient of tokens that are picked many times, whose parts threads add up."""
    tokens = torch.linspace(-1, 1, 64).repeat(50, 1).requires_grad_()
    chosen = torch.arange(200_000) % 50
    (tokens[chosen] * torch.linspace(0.1, 3, 64 * 200_000).reshape(-1, 64)).sum().backward()
    return tokens.grad


def test_gradients_on_a_cpu_do_not_depend_on_the_order_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        with process_kept():
            set_up(0, "cpu")
            torch.set_num_threads(2)
            first = summed_by_threads()
            assert all(torch.equal(summed_by_threads(), first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_a_precision_that_torch_would_pass_over() -> None:
    with process_kept():
        set_up(0, "cpu", "high")
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ConfigError, match="matmul_precision is 'best'; use one of highest, high, medium"):
            set_up(0, "cpu", "best")
