# SPDX-License-Identifier: Apache-2.0
"""A step in micro-batches, with recomputed blocks, and compiled: the same as the plain one, in less memory."""

import pytest
import torch
from torch import nn

from tests.networks.test_unimedi import build, make_batch
from unimedi_components.losses import UniMediLoss
from unimedi_components.networks.micro_batches import in_micro_batches


def step(dtype=torch.float64, loss=None, amp=False, **options):
    """Loss, its parts, gradients and buffers of one step on 6 X-rays and 5 volumes."""
    network = build(**options).to(dtype).train()
    loss_function = UniMediLoss(out_dim=20, **(loss or {})).to(dtype)
    batch = {n: v.to(dtype) if v.is_floating_point() else v for n, v in make_batch(6, 5).items()}
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        value = loss_function(network(batch))
    value.backward()
    found = {"loss": value.detach(), **loss_function.last}
    found |= {f"gradient {n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    return found | {n: b for module in (network, loss_function) for n, b in module.named_buffers()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_mode": "drop", "selector": "random", "loss": {"targets": "center", "within_modality": True}},
        {"segment_dropout": 0.8, "vl_on_full": True, "selector": "student", "patch_loss_on": "masked"},
        {"self_distillation": False},
    ],
)
def test_accumulation_is_the_whole_batch(options, dtype):
    expected = step(dtype, **options)
    names = [name for name in expected if name.startswith("gradient")]
    scale = max(expected[name].abs().max() for name in names)
    for parts in (2, 4):
        found = step(dtype, **options, accumulation=parts)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            size = scale if name in names else value.abs().max()
            assert (found[name] - value).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-5) * size, name


def test_a_part_is_recomputed_under_its_autocast():
    # the student selects: what autocast casts there has no history
    expected, found = (step(torch.float32, amp=True, selector="student", accumulation=parts) for parts in (1, 3))
    gradients = [name for name in expected if name.startswith("gradient")]
    largest = max(expected[name].abs().max() for name in gradients)
    assert gradients == [name for name in found if name.startswith("gradient")]
    for name in gradients:
        assert (found[name] - expected[name]).abs().max() <= 1e-3 * largest, name


def test_a_part_is_recomputed_in_the_random_state_of_its_first_pass():
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.manual_seed(3)
    parts = torch.cat([module(part) for part in (x[:2], x[2:4], x[4:])])
    parts.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    torch.manual_seed(3)
    joint = in_micro_batches(module, 3, x)
    assert torch.equal(joint, parts)
    torch.manual_seed(99)  # what comes between the passes must not matter
    joint.square().sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-12)


def test_recomputed_blocks_give_the_same_gradients():
    expected = step(mask_mode="drop")
    for parts in (1, 2):
        found = step(mask_mode="drop", grad_checkpointing=True, accumulation=parts)
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-9), name


def saved_bytes(**options):
    network, batch = build(**options).train(), make_batch(8, 8)
    sizes: dict[int, int] = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(batch)
    assert output.student_cls is not None
    return sum(sizes.values())


def test_less_is_kept_for_the_backward():
    assert saved_bytes(accumulation=4) < 0.5 * saved_bytes()
    assert saved_bytes(grad_checkpointing=True) < 0.6 * saved_bytes()


def test_compiled_passes_are_compiled_once_and_keep_the_checkpoint():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    plain, compiled = build(mask_mode="drop").train(), build(mask_mode="drop", compile="eager").train()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    loss = UniMediLoss(out_dim=20)
    graphs = []
    counters.clear()
    for _ in range(3):
        batch = make_batch()
        assert torch.allclose(loss.eval()(compiled(batch)), loss(plain(batch)), atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    # selection, teacher and student of a volume, teacher and student of an X-ray
    assert graphs == [5, 5, 5] and not counters["graph_break"]
    compiled.eval()(make_batch(1, 1))
    assert counters["stats"]["unique_graphs"] == 5
    torch._dynamo.reset()


def test_accumulation_below_one_is_refused():
    with pytest.raises(ValueError, match="accumulation must be at least 1, not 0"):
        build(accumulation=0)
