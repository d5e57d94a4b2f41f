# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of networks at their smallest sizes: what they check holds, and what they measure is what it says."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, recipe
from benchmarks.literal import LiteralStep
from unimedi_components.losses import UniMediLoss

CPU = torch.device("cpu")
# bars that hold at any size, by a word of their names
EXACT = {
    "attention": ("v against", 1),
    "encoder": ("", 0),
    "patch_loss": (": gradients", 1),
    "step": ("gradients of equal work", 1),
    "accumulation": (": gradients", 2),
    "segmentation": ("", 0),
    "scaling": ("gradients", 0),
    "startup": ("", 0),
}
SMALLER: dict[str, dict[str, Any]] = {"step": {"dtypes": "float32"}, "scaling": {"kinds": "tokens,k,batch"}}


# three fresh interpreters take their seconds
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "startup" else n for n in EXACT])
def test_a_result_has_rows_bars_and_versions(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / f"{name}.json"
    getattr(import_module(f"benchmarks.{name}"), name)(json=str(out), quick=True, **SMALLER.get(name, {}))
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert (result["benchmark"], result["quick"]) == (name, True)
    assert (result["machine"]["device"], result["machine"]["threads"]) == ("cpu", 1)
    assert result["machine"]["torch"] == torch.__version__
    assert result["rows"] and all("name" in row for row in result["rows"])
    for bar in result["bars"]:
        assert {"name", "value", "limit", "holds"} <= bar.keys() <= {"name", "value", "limit", "holds", "least", "most"}
    word, count = EXACT[name]
    exact = [bar for bar in result["bars"] if word and word in bar["name"]]
    assert len(exact) == count and all(bar["holds"] for bar in exact)


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_their_joint_batch() -> None:
    bars = import_module("benchmarks.scaling").scaling(quick=True, kinds="ranks")["bars"]
    (bar,) = (bar for bar in bars if bar["name"] == "ranks: averaged gradients against the whole batch's")
    assert bar["holds"]


def test_the_literal_port_keeps_whole_matrices_and_the_step_does_not() -> None:
    network = recipe.network("quick", prototypes=4096, vl_on_full=True)
    batch = recipe.batch("quick", 2, 2)
    loss = UniMediLoss(out_dim=4096, targets="center", center_momentum=1.0, chunk_size=32)
    port = LiteralStep(network)
    assert loss(network(batch)).item() == pytest.approx(port(batch).item(), abs=1e-5)
    rows = 2 * 16 + 2 * (64 + 2 * 16)  # patch tokens of the X-rays, and of the volumes with their slices
    whole = rows * 4096 * 4
    runs = {"port": (network, measure.step(network, lambda: port(batch)))}
    runs["ours"] = (network, measure.step(network, lambda: loss(network(batch))))
    found = measure.peaks(runs, CPU)
    gradients = sum(p.numel() * 4 for p in network.parameters() if p.requires_grad)
    # targets, logits and log-probabilities at least; ours has a chunk of them at a time
    assert found["port"] - gradients > 3 * whole > found["ours"] - gradients


def test_peak_counts_what_is_there_at_one_time() -> None:
    mebi = 2**20

    def run() -> None:
        first = torch.zeros(mebi, dtype=torch.uint8)
        second = torch.zeros(2 * mebi, dtype=torch.uint8)
        del first
        third = torch.zeros(mebi // 2, dtype=torch.uint8)
        del second, third

    assert 3 * mebi <= measure.peak(run, CPU) < 3.1 * mebi


def test_turns_alternate_and_ratios_are_of_one_round() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.by_turns(runs, CPU, rounds=3, least=0.0)
    assert "".join(calls) == "ababab" and [len(seconds) for seconds in times.values()] == [3, 3]
    calls.clear()
    measure.by_turns(runs, CPU, rounds=1, least=60.0)
    assert "".join(calls) == "ab"
    calls.clear()
    measure.by_turns(runs, CPU, rounds=2, least=60.0)  # too short: once to see, then 50 at a time
    assert "".join(calls) == "ab" + 2 * (50 * "a" + 50 * "b")
    found = measure.ratio({"a": [2.0, 9.0, 5.0], "b": [1.0, 3.0, 5.0]}, "a", "b")
    assert found == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert measure.at_most(found, 1.5) == {"value": 2.0, "least": 1.0, "most": 3.0, "limit": 1.5, "holds": False}
    assert measure.at_least(2.0, 2.0) == {"value": 2.0, "limit": 2.0, "holds": True}
