# SPDX-License-Identifier: Apache-2.0
"""Labelled images, the loaders over them, and the features in their place, in one process and in two."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from unimedi_components import distributed
from unimedi_components.data import xray_transforms
from unimedi_components.errors import DataError
from unimedi_components.loading import FeatureDataset, ImageDataset, ImageLoader, Skipped, sampler
from unimedi_components.networks import UnifiedViT
from unimedi_components.networks.classifier import ImageClassifier

NAMES = ["normal", "pneumonia", "COVID-19"]
COUNT, BROKEN = 7, 4


def write_images(folder):
    """Seven X-rays, of which number 4 cannot be read."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (20 + i, 24), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / f"{BROKEN}.png").write_bytes(b"no image")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


def items_of(count=COUNT):
    return [
        {"id": f"x{i}", "patient": f"p{i % 5}", "image": f"{i}.png", "dim": 2, "label": i % 3} for i in range(count)
    ]


def dataset_of(root, items=None, task="multiclass", names=NAMES, transform=None, **options):
    chain = xray_transforms(16) if transform is None else transform
    known = {"label_names": names, "task": task, "dim": 2, "target": "label"}
    return ImageDataset(items_of() if items is None else items, chain, root, **{**known, **options})


class CountingClassifier(ImageClassifier):
    """Counts the images that its encoder sees."""

    seen = 0

    def features(self, image):
        assert not self.training
        self.seen += len(image)
        return super().features(image)


def network_of():
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "patch_size_3d": (2, 8, 8), "embed_dim": 8, "depth": 1, "num_heads": 2}
    return CountingClassifier(UnifiedViT(16, (4, 16, 16), **sizes), 3)


def labels_of(root, values, task, names=NAMES):
    items = [{"id": f"i{n}", "image": f"{n}.png", "label": value} for n, value in enumerate(values)]
    return [item["label"] for item in dataset_of(root, items, task, names).data]


def test_labels_that_each_task_knows(root):
    assert labels_of(root, [0, 2, "pneumonia"], "multiclass") == [0, 2, 1]
    assert labels_of(root, [0, 1, "ill"], "binary", ["healthy", "ill"]) == [0, 1, 1]
    assert labels_of(root, [[0, 1, -1], (1, 1, 0)], "multilabel") == [[0, 1, -1], [1, 1, 0]]


def test_labels_by_name(root):
    named = ["pneumonia", ["Pneumonia"], {"pneumonia": 1}, {"pneumonia": True, "covid-19": 0}]
    assert labels_of(root, named, "multilabel") == [[0, 1, 0]] * 4
    assert labels_of(root, named, "multiclass") == [1] * 4
    several = [["normal", "COVID-19"], {"normal": 1, "pneumonia": -1}, {"normal": 0}, []]
    assert labels_of(root, several, "multilabel") == [[1, 0, 1], [1, -1, 0], [0, 0, 0], [0, 0, 0]]
    assert labels_of(root, [{"ILL": 1}, "healthy"], "binary", ["healthy", "ill"]) == [1, 0]


@pytest.mark.parametrize(
    ("task", "value"),
    [
        ("multiclass", 3),
        ("multiclass", -1),
        ("multiclass", True),
        ("multiclass", 1.0),
        ("multiclass", "covid"),
        ("multiclass", [0, 1, 0]),
        ("multilabel", 1),
        ("multilabel", [0, 1]),
        ("multilabel", [0, 1, 2]),
        ("multilabel", [0, [1], 0]),
        ("multilabel", [0, float("nan"), 0]),
        ("multilabel", "edema"),
        ("multilabel", ["pneumonia", "edema"]),
        ("multilabel", ["pneumonia", 1]),
        ("multilabel", {"pneumonia": 2}),
        ("multilabel", {"pneumonia": "1"}),
        ("multilabel", {"pneumonia": 1, "edema": 0}),
        ("multilabel", {"pneumonia": 1, "Pneumonia": 0}),
        ("multilabel", {}),
        ("multiclass", {}),
        ("multiclass", []),
        ("multiclass", ["normal", "pneumonia"]),
        ("multiclass", {"normal": 0, "pneumonia": 0}),
        ("multiclass", {"normal": 1, "pneumonia": -1}),
    ],
)
def test_labels_that_none_knows(root, task, value):
    wanted = "a list of 3 values 0, 1 or -1" if task == "multilabel" else "a whole number from 0 to 2, or one of the"
    fault = f"item 'i0' has the label .*; for this {task} task it must be {wanted}.*: normal, pneumonia, COVID-19$"
    with pytest.raises(DataError, match=fault):
        labels_of(root, [value], task)


def test_labels_in_json_files(root, tmp_path):
    (tmp_path / "a.json").write_text('{"label": "COVID-19"}')
    (tmp_path / "b.json").write_text("1")
    assert labels_of(root, [str(tmp_path / "a.json"), str(tmp_path / "b.json")], "multiclass") == [2, 1]
    (tmp_path / "c.json").write_text('{"label": [1, 0, -1]}')
    assert labels_of(root, [str(tmp_path / "c.json")], "multilabel") == [[1, 0, -1]]
    # relative ones lie below the root, as the images do
    (root / "own.json").write_text('{"label": 2}')
    assert labels_of(root, ["own.json"], "multiclass") == [2]
    (tmp_path / "d.json").write_text("{")
    for name, fault in (("d.json", "cannot be read as the label of 'i0'"), ("e.json", "No such file")):
        with pytest.raises(DataError, match=fault):
            labels_of(root, [str(tmp_path / name)], "multiclass")
    (tmp_path / "f.json").write_text('{"name": 1}')
    with pytest.raises(DataError, match=r"has the label \{'name': 1\}"):
        labels_of(root, [str(tmp_path / "f.json")], "multiclass")
    (tmp_path / "g.json").write_text('{"pneumonia": 1}')
    (tmp_path / "h.json").write_text('{"label": ["pneumonia", "normal"]}')
    files = [str(tmp_path / "g.json"), str(tmp_path / "h.json")]
    assert labels_of(root, files, "multilabel") == [[0, 1, 0], [1, 1, 0]]


def test_an_item_without_a_label(root):
    items = [{"image": "0.png"}]
    with pytest.raises(DataError, match="item '0' has no label; prepare the data for this task"):
        dataset_of(root, items)
    dataset = dataset_of(root, items, target=None)
    batch = dataset.collate([dataset[0]])
    assert "label" not in batch
    assert batch["image"].shape == (1, 1, 16, 16)


def test_monai_labels_items_are_filled_in(root, tmp_path):
    (tmp_path / "0.png").write_bytes((root / "0.png").read_bytes())
    items = [{"image": str(root / "0.png"), "label": 1}, {"image": str(tmp_path / "0.png"), "label": 2}]
    dataset = dataset_of(root, items)
    assert [item["id"] for item in dataset.data] == ["0", "0-2"]
    assert [item["patient"] for item in dataset.data] == ["0", "0"]
    assert [item["dim"] for item in dataset.data] == [2, 2]
    assert dataset[1]["label"] == 2
    assert torch.equal(dataset[0]["image"], dataset[1]["image"])
    assert "id" not in items[0]


def test_equal_ids_become_different_ones_whatever_others_are_called(root):
    names = ["a", "a-2", "a", "a", "b"]
    data = dataset_of(root, [{"id": name, "image": "0.png", "label": 0} for name in names]).data
    assert [item["id"] for item in data] == ["a", "a-2", "a-3", "a-4", "b"]


def test_an_item_without_an_image_is_named(root):
    with pytest.raises(DataError, match=r"item 0 .*lacks .*image"):
        dataset_of(root, [{"id": "a", "label": 0}])


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_yields_every_readable_item_once_and_in_order(root, workers, tmp_path):
    dataset = dataset_of(root, cache_dir=tmp_path)
    batches = list(ImageLoader(dataset, 3, num_workers=workers))
    assert [batch["id"] for batch in batches] == [["x0", "x1", "x2"], ["x3", "x5"], ["x6"]]
    assert [batch["label"].tolist() for batch in batches] == [[0, 1, 2], [0, 2], [0]]
    assert [batch["patient"] for batch in batches] == [["p0", "p1", "p2"], ["p3", "p0"], ["p1"]]
    assert batches[0]["label"].dtype == torch.int64
    assert [record.id for record in dataset.skipped] == ["x4"]
    assert dataset.collate([Skipped("a", "b", "c")]) is None


def test_a_batch_of_unreadable_images_is_left_out(root):
    items = [items_of()[BROKEN], *items_of(2)]
    assert [batch["id"] for batch in ImageLoader(dataset_of(root, items), 1)] == [["x0"], ["x1"]]
    # in training the next readable image stands in, so that every step has a batch
    loader = ImageLoader(dataset_of(root, items), 1, shuffle=True)
    assert len(list(loader)) == len(loader) == 3


def test_the_order_is_a_function_of_seed_and_epoch(root):
    items = [item for item in items_of() if item["id"] != f"x{BROKEN}"]

    def order(seed, epoch, **options):
        loader = ImageLoader(dataset_of(root, items), 4, shuffle=True, seed=seed, **options)
        torch.rand(5)
        loader.set_epoch(epoch)
        return [batch["id"] for batch in loader]

    first = order(0, 0)
    assert [len(batch) for batch in first] == [4, 2]
    assert sorted(name for batch in first for name in batch) == [f"x{i}" for i in (0, 1, 2, 3, 5, 6)]
    assert order(0, 0) == first
    assert order(0, 0, num_workers=1) == first
    assert order(0, 1) != first
    assert order(1, 0) != first
    assert [len(batch) for batch in order(0, 0, drop_last=True)] == [4]


def test_ranks_share_what_is_not_shuffled(root, monkeypatch):
    items = [item for item in items_of() if item["id"] != f"x{BROKEN}"]
    monkeypatch.setattr(sampler, "world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(sampler, "current_rank", lambda rank=rank: rank)
        seen.append([batch["id"] for batch in ImageLoader(dataset_of(root, items), 2, share=True)])
        assert sum(map(len, ImageLoader(dataset_of(root, items), 2).batch_sampler)) == len(items)
    assert seen == [[["x0", "x2"], ["x5"]], [["x1", "x3"], ["x6"]]]
    with pytest.raises(DataError, match="1 items cannot be shared by 2 ranks"):
        ImageLoader(dataset_of(root, items[:1]), 2, share=True)


def test_features_equal_direct_encoding_and_are_computed_once(root):
    network = network_of().train()
    dataset = FeatureDataset(dataset_of(root), network, "cpu", batch_size=2)
    assert network.seen == 0
    loader = ImageLoader(dataset, 4, shuffle=True, num_workers=2)
    assert loader.num_workers == 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
    assert network.seen == COUNT - 1
    assert network.training
    found = {name: row for batch in batches for name, row in zip(batch["id"], batch["image"], strict=True)}
    assert sorted(found) == ["x0", "x1", "x2", "x3", "x5", "x6"]
    labels = {name: int(row) for batch in batches for name, row in zip(batch["id"], batch["label"], strict=True)}
    assert labels == {item["id"]: item["label"] for item in items_of() if item["id"] != "x4"}
    images = dataset_of(root)
    network.eval()
    for index, name in ((0, "x0"), (6, "x6")):
        assert torch.allclose(found[name], network.features(images[index]["image"][None])[0], atol=1e-6)
    assert len(dataset) == len(dataset.dims) == 6
    assert [record.id for record in dataset.skipped] == ["x4"]
    assert torch.equal(dataset[0]["image"], found["x0"])


def test_features_can_be_switched_off(root):
    network = network_of()
    dataset = FeatureDataset(dataset_of(root), network, "cpu", enabled=False)
    loader = ImageLoader(dataset, 4)
    assert [tuple(batch["image"].shape) for batch in loader] == [(4, 1, 16, 16), (2, 1, 16, 16)]
    assert len(dataset) == COUNT
    assert network.seen == 0
    # none stood in, and the data set itself still lets one do so
    assert [record.id for record in dataset.skipped] == ["x4"]
    assert dataset.dataset.refill
    dataset.set_epoch(3)
    assert int(dataset.dataset._epoch) == 3


def test_nothing_to_compute_features_of(root):
    dataset = FeatureDataset(dataset_of(root, [items_of()[BROKEN]]), network_of(), "cpu")
    with pytest.raises(DataError, match=rf"none of 1 images can be read, first .*{BROKEN}.png: .*"):
        len(dataset)


def test_an_empty_split_is_named(root):
    for enabled in (False, True):
        empty = FeatureDataset(dataset_of(root, []), network_of(), "cpu", enabled=enabled)
        with pytest.raises(DataError, match="no images to evaluate: the split is empty"):
            ImageLoader(empty, 2)
        with pytest.raises(DataError, match="no items to draw batches from"):
            ImageLoader(empty, 2, shuffle=True)


def test_strict_names_the_unreadable_file(root):
    with pytest.raises(DataError, match=r"4\.png: is named as a picture but holds text"):
        len(FeatureDataset(dataset_of(root, strict=True), network_of(), "cpu"))


def share_of(root):
    network = network_of()
    dataset = FeatureDataset(dataset_of(root), network, "cpu", batch_size=2, share=True)
    rows = {item["id"]: item["image"] for item in dataset.data}
    batches = [batch["id"] for batch in ImageLoader(dataset, 2, shuffle=True)]
    alone = FeatureDataset(dataset_of(root, items_of(1)), network, "cpu", share=True)
    return {"rows": rows, "batches": batches, "alone": alone.data[0]["image"], "seen": network.seen}


def one_rank(root, folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(share_of(root), folder / f"{rank}.pt")
    dist.barrier()
    distributed.stop()


def test_two_processes_share_the_work_and_have_all_features(root, tmp_path):
    expected = share_of(root)
    # forked, as the loaders' workers are: the libraries need no second import
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(root, tmp_path, rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    # rank 0 has items 0, 2, 4 (unreadable) and 6, and of a single item all, which leaves rank 1 without any
    assert [own["seen"] for own in (expected, *found)] == [6 + 1, 3 + 1, 3]
    for own in found:
        assert list(own["rows"]) == list(expected["rows"])
        assert all(torch.allclose(own["rows"][name], row, atol=1e-6) for name, row in expected["rows"].items())
        assert torch.allclose(own["alone"], expected["alone"], atol=1e-6)
    drawn = [name for own in found for batch in own["batches"] for name in batch]
    assert sorted(drawn) == sorted(expected["rows"])


def test_items_survive_json(root):
    """What a datalist holds is all that a data set needs."""
    items = json.loads(json.dumps(items_of()))
    assert list(dataset_of(root, items).data) == list(dataset_of(root).data)
