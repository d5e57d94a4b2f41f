# SPDX-License-Identifier: Apache-2.0
"""The `evaluate` command and what follows a training run, end to end with a tiny network and few phantoms."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unimedi_components.data import bimcv, mimic_cxr
from unimedi_components.data.datalist import SPLITS, write_json
from unimedi_components.data.phantom.truth import labels_of, load_truth
from unimedi_components.data.prepare import merge_datalists
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.networks.pretrained import load_pretrained
from unimedi_components.retrieval import after_training, evaluate_datalist, features
from unimedi_components.retrieval.embedder import make_dataset
from unimedi_components.retrieval.evaluate import HEADLINE, evaluate, heldout_items, summary
from unimedi_components.retrieval.features import extract_features
from unimedi_components.retrieval.measuring import all_metrics
from unimedi_components.retrieval.slices import is_focal, lesion_mask

PATIENTS = 12
SEED = 77


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Phantoms of `SEED`, in the folder that `evaluate` may keep."""
    root = tmp_path_factory.mktemp("phantoms")
    for dim in (2, 3):
        heldout_items(dim, root, PATIENTS, SEED, workers=1, progress=False)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, folder, leave_network):
    reports = [item["report"] for item in mimic_cxr.DATASET.convert(folder / "mimic_cxr")["training"]]
    return leave_network(tmp_path_factory.mktemp("models"), reports, extra={"phantom_seed": 5})


@pytest.fixture(scope="module")
def datalist(folder):
    """Both sets in one datalist, as pre-training reads them, with four studies of each in the test split."""
    parts = {}
    for name, convert in (("mimic_cxr", mimic_cxr.DATASET.convert), ("bimcv", bimcv.DATASET.convert)):
        found = convert(folder / name)
        items = [item for split in SPLITS for item in found[split]]
        parts[name] = write_json(
            {**found, "training": items[4:], "validation": [], "test": items[:4]}, folder / f"{name}.json"
        )
    return merge_datalists(parts, folder / "pretrain.json", folder)


@pytest.fixture(scope="module")
def result(checkpoint, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("result") / "new" / "evaluation.json"
    returned = evaluate(checkpoint, PATIENTS, SEED, json=path, device="cpu", keep=folder, progress=False)
    written = json.loads(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
    assert written == json.loads(json.dumps(returned))
    return written


def test_evaluate_writes_what_others_rely_on(result):
    assert set(HEADLINE) <= result.keys()
    assert (result["patients"], result["seed"], result["training_phantom_seed"]) == (PATIENTS, SEED, 5)
    assert (result["studies_2d"], result["studies_3d"], result["reports"]) == (PATIENTS, PATIENTS, 2 * PATIENTS)
    unbounded = ("slice_distance_mm", "centroid_distance", "xray_attention_ratio", "probe_minus")
    for key, value in result.items():
        if isinstance(value, float) and not key.startswith(unbounded):
            assert 0.0 <= value <= 1.0, key
    for key, (low, high) in result["intervals"].items():
        assert low <= high, key
        assert isinstance(result[key], float), key


def test_evaluate_measures_every_part_beside_its_baseline(result):
    """Twelve studies are too few for most probes, and there is no self-distillation to look at; the rest is there."""
    missing = {key for key in HEADLINE if result[key] is None}
    assert all(key.startswith(("sd_", "probe_minus")) or "probe_auroc" in key for key in missing)
    assert {key for key in HEADLINE if not key.endswith("chance")} - missing <= {
        *result["intervals"],
        "temperature",
        "centroid_distance_cls",
        "centroid_distance_embed",
    }
    assert result["temperature"] == pytest.approx(0.07)
    assert result["cls_attention_3d"] + result["cls_attention_slices"] == pytest.approx(1.0)
    # 4 x 2 x 2 tokens of the volume and 2 x 2 of each of two slices
    assert result["cls_attention_slices_uniform"] == pytest.approx(8 / 24)
    assert result["drr_to_ct_recall_at_10_chance"] == pytest.approx(10 / PATIENTS)
    assert result["slice_precision_oracle"] >= result["slice_precision_fixed"]
    assert result["slice_distance_mm_oracle"] <= result["slice_distance_mm"]
    assert result["modality_accuracy_cls"] == 1.0


def test_the_printed_summary_names_every_baseline(result):
    lines = summary(result).splitlines()
    assert len({line[:31] for line in lines}) == len(lines)
    (precision,) = [line for line in lines if line.startswith("slice precision")]
    low, high = result["intervals"]["slice_precision"]
    assert f" {result['slice_precision']:.3f} [{low:.3f}, {high:.3f}] " in precision
    for end in ("chance", "permuted", "fixed", "oracle", "untrained"):
        assert f"{end} {result[f'slice_precision_{end}']:.3f}" in precision
    (distance,) = [line for line in lines if line.startswith("2D-3D centroid distance,")]
    assert f"chance {result['centroid_distance_chance']:.3f}" in distance


def test_evaluate_measures_random_weights_as_random(result):
    assert result["report_recall_at_5_strict_chance"] == pytest.approx(5 / 24)
    assert result["report_recall_at_5_chance"] >= 5 / 24
    assert result["report_recall_at_5"] < 0.7


def test_evaluate_equals_its_parts(result, checkpoint, folder):
    """The headline numbers again, straight from the network."""
    network = load_pretrained(checkpoint)
    precision, chance, pairs = [], [], []
    for dim in (2, 3):
        items, root, truth = heldout_items(dim, folder, PATIENTS, SEED, progress=False)
        dataset = make_dataset(network, items, root)
        for i, item in enumerate(items):
            image = dataset[i]["image"][None]
            tokens = network.tokenizer(item["report"], return_tensors="pt", truncation=True, max_length=64)
            with torch.no_grad():
                found = network.network.encode_image(image, use_slices=True)
                text = network.network.encode_text(
                    tokens["input_ids"], tokens["attention_mask"], torch.tensor([dim - 2])
                )
            pairs.append((nn.functional.normalize(found.embed), nn.functional.normalize(text), item["report"]))
            study = truth["studies"][item["id"]]
            if dim == 3 and is_focal(study["lesion_slices"], study["n_slices"]):
                mask = lesion_mask(study["lesion_slices"], study["n_slices"], 16)
                precision.append(mask[found.selected[0].numpy()].mean())
                chance.append(mask[[2, 6, 10, 14]].mean())
    assert result["slice_studies"] == len(precision) > 0
    assert result["slice_precision"] == pytest.approx(np.mean(precision))
    assert result["slice_precision_chance"] == pytest.approx(np.mean(chance))
    hits = 0
    for image, _, report in pairs:
        ranked = sorted(pairs, key=lambda pair: -float(image @ pair[1].T))
        hits += report in [pair[2] for pair in ranked[:5]]
    assert result["report_recall_at_5"] == pytest.approx(hits / len(pairs), abs=1e-9)


def test_evaluate_refuses_the_phantoms_of_the_training(checkpoint, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"trained on the phantoms of seed 5.*choose another --seed"):
        evaluate(checkpoint, PATIENTS, 5, json=tmp_path / "x.json", progress=False)
    with pytest.raises(ConfigError, match="patients is 1"):
        evaluate(checkpoint, 1, SEED, progress=False)
    assert not (tmp_path / "x.json").exists()


def test_features_do_not_depend_on_the_batch(checkpoint, datalist, folder):
    network = load_pretrained(checkpoint)
    items = datalist["test"]
    one = extract_features(network, items, folder, batch_2d=1, batch_3d=1, progress=False)
    all_at_once = extract_features(network, items[::-1], folder, progress=False)
    for dim in (2, 3):
        assert [item["id"] for item in one[dim].items] == [item["id"] for item in all_at_once[dim].items][::-1]
        for name in ("cls", "image_embed", "text_embed", "attention"):
            torch.testing.assert_close(getattr(one[dim], name), getattr(all_at_once[dim], name).flip(0))
    assert one[2].selected is None
    assert one[3].selected.shape == (4, 2)
    assert one[3].attention.shape == (4, 16)


def test_unreadable_studies_are_left_out(checkpoint, datalist, folder, tmp_path):
    items = [dict(item) for item in datalist["test"] if item["dim"] == 2]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    items[1]["image"] = str(broken)
    found = extract_features(load_pretrained(checkpoint), items, folder, progress=False)
    assert [item["id"] for item in found[2].items] == [items[i]["id"] for i in (0, 2, 3)]


def test_a_network_that_matches_reports_finds_them(checkpoint, datalist, folder):
    """Embeddings that are right by construction give full recall."""
    network = load_pretrained(checkpoint)
    found = extract_features(network, datalist["test"], folder, progress=False)
    perfect = {}
    for dim, part in found.items():
        rows = torch.eye(16)[4 * (dim - 2) : 4 * (dim - 2) + 4]
        perfect[dim] = type(part)(**{**part.__dict__, "image_embed": rows, "text_embed": rows})
    values = all_metrics(network, perfect)
    assert values["report_recall_at_1_strict"] == values["image_recall_at_1_strict"] == 1.0
    assert values["report_recall_3d_at_1"] == 1.0
    assert values["report_recall_2d_at_5_chance"] == 1.0  # four candidates
    assert values["collapse_modality"] == pytest.approx(0.5)


def test_evaluate_datalist_finds_the_truth(checkpoint, datalist, folder):
    values = evaluate_datalist(load_pretrained(checkpoint), datalist, folder, progress=False)
    assert values["split"] == "test"
    assert (values["studies_2d"], values["studies_3d"]) == (4, 4)
    assert values["slice_studies_known"] == 4
    assert values["drr_to_ct_recall_at_5_chance"] == 1.0  # four candidates
    assert {"xray_attention_studies", "modality_accuracy_chance", "intervals"} <= values.keys()
    empty = evaluate_datalist(load_pretrained(checkpoint), datalist, folder, split="validation", progress=False)
    assert (empty["studies_2d"], empty["studies_3d"]) == (0, 0)


def test_after_training_writes_metrics_and_figures(checkpoint, datalist, folder, tmp_path):
    history = [{"iteration": i, "epoch": 1, "loss": 4.0 / i, "vl": 1.0, "lr": 1e-3} for i in range(1, 9)]
    values = after_training(checkpoint, datalist, folder, tmp_path / "eval", history, progress=False)
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == json.loads(json.dumps(values))
    assert values["training"] == {"iterations": 8, "loss": 0.5}
    names = {"loss_curves.png", "slice_selection.png", "xray_attention.png"}
    assert {path.name for path in (tmp_path / "eval").iterdir()} == names | {"metrics.json", "run.json"}
    assert json.loads((tmp_path / "eval" / "run.json").read_text()).keys() == {"command", "commit", "machine", "torch"}
    for name in names:
        with Image.open(tmp_path / "eval" / name) as image:
            assert image.size[0] == 1200
            assert np.asarray(image.convert("L")).std() > 10


def test_ranks_share_the_items_and_join_the_features(checkpoint, datalist, folder, monkeypatch):
    network, items = load_pretrained(checkpoint), [*datalist["test"][:3], *datalist["test"][5:]]
    expected = extract_features(network, items, folder, progress=False)
    shares = []
    for number in (0, 1):
        replaced = {"is_distributed": lambda: True, "world_size": lambda: 2, "rank": lambda number=number: number}
        replaced["gather_objects"] = lambda mine: shares.append(mine) or shares
        for name, function in replaced.items():
            monkeypatch.setattr(features, name, function)
        found = features.features_of_all_ranks(network, items, folder, progress=False)
    assert [len(shares[0][dim].items) + len(shares[1][dim].items) for dim in (2, 3)] == [3, 3]
    for dim in (2, 3):
        assert found[dim].items == expected[dim].items
        for name in ("cls", "image_embed", "text_embed", "attention", "selected", "scores", "pooled"):
            ours, theirs = getattr(found[dim], name), getattr(expected[dim], name)
            assert (ours is theirs is None) or torch.allclose(ours, theirs, atol=1e-5), name


def test_after_training_without_held_out_items_says_so(checkpoint, datalist, folder, tmp_path):
    """Small sets of one dimension may have no test split."""
    only = {split: [] for split in SPLITS} | {"training": [i for i in datalist["training"] if i["dim"] == 3]}
    values = after_training(checkpoint, only, folder, tmp_path, progress=False)
    assert (values["split"], values["studies_3d"]) == ("validation", 0)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "run.json", "slice_selection.png"}


def test_data_beside_phantoms_are_measured_without_their_truth(checkpoint, datalist, folder, tmp_path, caplog):
    own = [{**item, "id": f"own-{item['id']}"} for item in datalist["training"] if item["dim"] == 2]
    values = after_training(checkpoint, {**datalist, "test": own}, folder, tmp_path, progress=False)
    assert (values["split"], values["studies_2d"]) == ("test", len(own))
    assert "report_recall_at_5" in values and "probe_auroc_2d" not in values
    assert f"does not know {own[0]['id']} ({len(own)} such)" in caplog.text
    assert load_truth(folder, datalist["test"]) == load_truth(folder)


def test_truth_files(folder, tmp_path):
    assert load_truth(tmp_path) is None
    joint, xray = load_truth(folder), load_truth(folder / "mimic_cxr")
    name = next(iter(xray["studies"]))
    assert joint["studies"][name] == joint["studies"][f"mimic_cxr-{name}"] == xray["studies"][name]
    assert labels_of([{"id": name}], xray["studies"]).tolist() == [xray["studies"][name]["labels"]]
    with pytest.raises(DataError, match="does not know elsewhere"):
        labels_of([{"id": "elsewhere"}], xray["studies"])
    (tmp_path / "truth.json").write_text("{}")
    with pytest.raises(DataError, match=r"truth\.json: no truth file"):
        load_truth(tmp_path)
