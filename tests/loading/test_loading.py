# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Transform
from PIL import Image

from unimedi_components.data.fingerprint import describe, fingerprint
from unimedi_components.data.transforms import ByDimension, ct_transforms, xray_transforms
from unimedi_components.data.vocabulary import build_wordpiece
from unimedi_components.errors import ConfigError, DataError
from unimedi_components.loading import ImageDataset, ImageLoader, MixedBatchSampler, MixedCollate, Skipped

N2, N3 = 10, 5


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A root with 10 X-rays and 5 CT volumes, their items and a vocabulary folder."""
    root, rng, items = tmp_path_factory.mktemp("root"), np.random.default_rng(0), []
    for i in range(N2):
        Image.fromarray(rng.integers(0, 256, (40, 48), dtype=np.uint8)).save(root / f"x{i}.jpg")
        report = "no effusion . " * (i + 1)
        items.append({"id": f"x{i}", "patient": f"p{i}", "image": f"x{i}.jpg", "dim": 2, "report": report})
    for i in range(N3):
        volume = rng.integers(-900, 900, (8, 9, 6)).astype(np.int16)
        nib.Nifti1Image(volume, np.eye(4)).to_filename(root / f"c{i}.nii.gz")
        report = f"nodule {i} in the left lobe"
        items.append({"id": f"c{i}", "patient": f"q{i}", "image": f"c{i}.nii.gz", "dim": 3, "report": report})
    vocabulary = build_wordpiece([item["report"] for item in items] * 2, root / "vocab", vocab_size=100)
    return root, items, vocabulary


def transforms(size: int = 16, crop: bool = True, depth: int = 4) -> ByDimension:
    return ByDimension(xray_transforms(size, random_crop=crop), ct_transforms((depth, 8, 8)))


def images(items: list, transform: ByDimension, root: Path, cache: Path | None = None, **options) -> ImageDataset:
    return ImageDataset(items, transform, root, "report", cache_dir=cache, **options)


def training_loader(dataset: ImageDataset, vocabulary: str, *sizes: int, workers: int = 0, **options) -> ImageLoader:
    sampler = MixedBatchSampler(dataset.dims, *sizes, **options)
    return ImageLoader(dataset, batch_sampler=sampler, collate_fn=MixedCollate(vocabulary), num_workers=workers)


def records(cache: Path) -> int:
    """Images in a cache."""
    return sum(path.stat().st_size // 32 for path in cache.glob("*d-*/*.index"))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


# ---- sampler


def epoch_of(sampler: MixedBatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_sampler_counts_and_passes():
    dims = [2] * 50 + [3] * 7
    sampler = MixedBatchSampler(dims, batch_2d=12, batch_3d=3)
    batches = epoch_of(sampler)
    assert len(sampler) == len(batches) == 4
    assert all([dims[i] for i in batch] == [2] * 12 + [3] * 3 for batch in batches)
    seen_2d = [i for batch in batches for i in batch[:12]]
    assert len(set(seen_2d)) == 48
    seen_3d = [i for batch in batches for i in batch[12:]]  # 12 of 7: a whole pass, then 5 of the next
    assert set(seen_3d[:7]) == set(range(50, 57)) and len(set(seen_3d[7:])) == 5
    assert epoch_of(sampler) == batches and epoch_of(sampler, 1) != batches
    assert epoch_of(MixedBatchSampler(dims, 12, 3, seed=1)) != batches


def test_sampler_no_item_twice_in_a_batch_and_each_pass_whole():
    for n3, batch_3d in ((7, 3), (5, 4), (4, 4), (9, 5), (3, 8)):
        sampler = MixedBatchSampler([2] * 120 + [3] * n3, batch_2d=2, batch_3d=batch_3d)
        stream = []
        for batch in epoch_of(sampler, epoch=3):
            assert len(set(batch)) == len(batch) == 2 + min(batch_3d, n3)
            stream += batch[2:]
        for start in range(0, len(stream) - n3, n3):
            assert set(stream[start : start + n3]) == set(range(120, 120 + n3))


@pytest.mark.parametrize("drop_last", [True, False])
def test_sampler_replicas_are_disjoint_and_equal(drop_last):
    dims = [2] * 53 + [3] * 11
    parts = [epoch_of(MixedBatchSampler(dims, 4, 2, num_replicas=3, rank=r, drop_last=drop_last), 5) for r in range(3)]
    # 53 = 4 * 12 + 5: five more items are one each, two are left over
    assert [len(part) for part in parts] == [4 if drop_last else 5] * 3
    for step, batches in enumerate(zip(*parts, strict=True)):
        joint = [i for batch in batches for i in batch]
        assert len(set(joint)) == len(joint)
        assert {len(batch) for batch in batches} == {6 if step < 4 else 3}
    seen_2d = {i for part in parts for batch in part for i in batch if dims[i] == 2}
    assert len(seen_2d) == (48 if drop_last else 51)


def test_sampler_alone_small_and_alternate():
    assert epoch_of(MixedBatchSampler([2] * 5, 2, 2, shuffle=False)) == [[0, 1], [2, 3]]
    assert epoch_of(MixedBatchSampler([2] * 5, 2, 2, shuffle=False, drop_last=False)) == [[0, 1], [2, 3], [4]]
    assert epoch_of(MixedBatchSampler([3] * 4, 2, 2, shuffle=False)) == [[0, 1], [2, 3]]
    assert epoch_of(MixedBatchSampler([2, 3, 3], 0, 1, shuffle=False)) == [[1], [2]]
    assert epoch_of(MixedBatchSampler([2, 2, 3], 12, 6, shuffle=False)) == [[0, 1, 2]]
    alternate = MixedBatchSampler([2] * 4 + [3] * 3, 2, 1, shuffle=False, mode="alternate")
    assert epoch_of(alternate) == [[0, 1], [4], [2, 3], [5]] and len(alternate) == 4
    over_3d = MixedBatchSampler([2] * 4 + [3] * 3, 2, 1, shuffle=False, epoch_over="3d")
    assert (
        epoch_of(over_3d)
        == [[0, 1, 4], [2, 3, 5], [0, 1, 6]]
        == epoch_of(MixedBatchSampler([2] * 4 + [3] * 3, 2, 1, shuffle=False, epoch_over="longest"))
    )


def test_sampler_errors():
    with pytest.raises(DataError, match="no items to draw batches from: 0 2D items"):
        MixedBatchSampler([])
    with pytest.raises(DataError, match="1 3D items cannot be shared by 2 replicas"):
        MixedBatchSampler([2, 2, 3], num_replicas=2, rank=0)
    with pytest.raises(ConfigError, match="must be 'mixed' or 'alternate'"):
        MixedBatchSampler([2], mode="both")


# ---- data set and cache


def test_same_batches_for_any_workers_and_after_a_restart(study, tmp_path):
    root, items, vocabulary = study
    epochs = {}
    for workers in (0, 2):
        dataset = images(items, transforms(), root, tmp_path / f"cache{workers}", seed=4)
        loader = training_loader(dataset, vocabulary, 4, 2, seed=4, workers=workers)
        state = torch.get_rng_state()
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            epochs[workers, epoch] = list(loader)
        assert torch.equal(torch.get_rng_state(), state)
    assert [len(batches) for batches in epochs.values()] == [2] * 4
    for epoch in (0, 1):
        assert all(map(equal, epochs[0, epoch], epochs[2, epoch]))
    assert not equal(epochs[0, 0][0], epochs[0, 1][0])

    restarted = images(items, transforms(), root, tmp_path / "cache0", seed=4)
    loader = training_loader(restarted, vocabulary, 4, 2, seed=4)
    loader.set_epoch(1)
    assert all(map(equal, loader, epochs[0, 1]))


def test_crops_depend_on_epoch_and_index_alone(study, tmp_path):
    root, items, _ = study
    dataset = images(items, transforms(12), root, tmp_path, seed=0)
    first = [dataset[i]["image"] for i in range(N2)]
    assert all(torch.equal(dataset[i]["image"], first[i]) for i in reversed(range(N2)))
    dataset.set_epoch(1)
    assert any(not torch.equal(dataset[i]["image"], first[i]) for i in range(N2))
    uncached = images(items, transforms(12), root, seed=0)
    # half a grey level of 8 bits
    assert 0 < max(float((uncached[i]["image"] - first[i]).abs().max()) for i in range(N2)) <= 1 / 255 + 1e-6


def test_parts_of_one_file_are_images_of_their_own(tmp_path):
    """Two items of one folder differ in their slices, two of one volume in their centre."""

    class Fill(Transform):
        def __call__(self, data):
            part = data.get("slices") or data.get("center") or [9]
            return {**data, "image": torch.full((1, 2, 2, 2), float(sum(part)))}

    (tmp_path / "v.raw").write_bytes(b"0")
    parts = [{"slices": [1, 2]}, {"slices": [3, 4]}, {"center": [2, 2, 1]}, {}]
    items = [{"id": str(i), "patient": "p", "image": "v.raw", "dim": 3, **part} for i, part in enumerate(parts)]
    for _ in range(2):
        dataset = ImageDataset(items, ByDimension((), [Fill()]), tmp_path, cache_dir=tmp_path / "cache")
        for _ in range(2):
            assert [float(dataset[i]["image"].mean()) for i in range(4)] == [3, 7, 5, 9]
    assert records(tmp_path / "cache") == 4


def test_cache_follows_parameters_and_files(study, tmp_path):
    root, items, _ = study
    (tmp_path / "root").mkdir()
    image = tmp_path / "root" / "x0.jpg"
    image.write_bytes((root / "x0.jpg").read_bytes())
    data, cache = items[:1], tmp_path / "cache"

    def get(transform: ByDimension) -> torch.Tensor:
        return images(data, transform, tmp_path / "root", cache)[0]["image"]

    before = get(transforms(16, crop=False))
    used = transforms(16, crop=False)
    assert all(torch.equal(get(used), before) for _ in range(2)) and records(cache) == 1
    assert get(transforms(20, crop=False)).shape == (1, 20, 20) and records(cache) == 2
    get(transforms(16, crop=False, depth=5))  # the other dimension's chain does not matter
    assert records(cache) == 2
    image.write_bytes((root / "x1.jpg").read_bytes())
    os.utime(image, (time.time() + 5,) * 2)
    assert not torch.equal(get(transforms(16, crop=False)), before) and records(cache) == 3


def test_damaged_cache_is_made_again(study, tmp_path, caplog):
    root, items, _ = study

    whole = None
    for damage in (lambda good: b"", lambda good: good[:100], lambda good: good[:-1] + bytes([good[-1] ^ 1])):
        cache = tmp_path / str(len(list(tmp_path.iterdir())))
        for said in (0, 1, 0):
            caplog.clear()
            dataset = images(items[:1], transforms(crop=False), root, cache)
            found = dataset[0]["image"]
            whole = found if whole is None else whole
            assert torch.equal(found, whole) and dataset.skipped == [] and caplog.text.count("is damaged") == said
            if records(cache) == 1:
                (file,) = cache.glob("2d-*/*.shard")
                file.write_bytes(damage(file.read_bytes()))


def test_an_older_cache_is_named_and_not_read(study, tmp_path, caplog):
    root, items, _ = study
    (tmp_path / f"{0:064x}.pt").write_bytes(b"an image of an earlier version")
    assert images(items[:1], transforms(), root, tmp_path)[0]["image"].shape == (1, 16, 16)
    older = f"{0:064x}.pt is of another version and not read; `python -m unimedi_components cache CONFIG --clean`"
    assert caplog.text.count(older) == 1


def test_fingerprint_sees_every_parameter_and_no_state(study):
    root, items, _ = study

    def of(**kwargs) -> str:
        return ByDimension(three_d=ct_transforms((4, 8, 8), **kwargs)).fingerprints[3]

    assert of() == of()
    assert len({of(), of(window=(-1000, 900)), of(spacing=(1, 1, 1)), transforms(depth=5).fingerprints[3]}) == 4
    assert of() == transforms().fingerprints[3] != transforms().fingerprints[2]
    double, triple = (lambda x: x * 2), (lambda x: x * 3)
    assert describe(double)[1:] != describe(triple)[1:] and fingerprint([double]) != fingerprint([triple])
    used = transforms()
    before = dict(used.fingerprints)
    used({**items[0], "image": str(root / items[0]["image"])})
    assert used.fingerprints == before
    # nothing that another process would number or order differently
    assert " at 0x" not in json.dumps(describe([used.cached_transforms(dim) for dim in (2, 3)]))
    assert describe({"b", "a", "c"}) == ["a", "b", "c"]


# ---- unreadable files


@pytest.fixture
def broken(study, tmp_path):
    root, items, vocabulary = study
    copy = tmp_path / "root"
    copy.mkdir()
    for item in items:
        (copy / item["image"]).write_bytes((root / item["image"]).read_bytes())
    (copy / "x3.jpg").write_bytes((copy / "x3.jpg").read_bytes()[:700])
    (copy / "c2.nii.gz").write_bytes((copy / "c2.nii.gz").read_bytes()[:300])
    (copy / "x7.jpg").unlink()
    return copy, items, vocabulary


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_items_are_skipped_and_listed(broken, tmp_path, workers):
    root, items, vocabulary = broken
    dataset = images(items, transforms(), root, tmp_path / "cache")
    loader = training_loader(dataset, vocabulary, 5, 5, shuffle=False, workers=workers)
    batches = list(loader)
    assert [batch["id"] for batch in batches] == [
        ["x0", "x1", "x2", "x4", "c0", "c1", "c3", "c4"],
        ["x5", "x6", "x8", "x9", "c0", "c1", "c3", "c4"],
    ]
    assert [record.id for record in dataset.skipped] == ["c2", "x3", "x7"]
    by_id = {record.id: record for record in dataset.skipped}
    assert "truncated" in by_id["x3"].reason and by_id["x3"].file == str(root / "x3.jpg")
    assert by_id["x7"].reason == "no such file. Correct the path or fetch the file"
    listed = [json.loads(line) for line in (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()]
    assert {record["id"] for record in listed} == {"c2", "x3", "x7"}
    (tmp_path / "cache" / "skipped.jsonl").open("a").write('{"id": "half')
    again = images(items, transforms(), root, tmp_path / "cache")
    assert again.skipped == [] and isinstance(again[3], Skipped) and len(again.skipped) == 1


def test_processes_prepare_what_the_cache_lacks(broken, tmp_path, monkeypatch, caplog):
    """The same images as one by one; what cannot be read is named once, and random numbers stay."""
    root, items, _ = broken
    lone = images(items, transforms(crop=False), root, tmp_path / "lone")
    expected = [lone[index] for index in range(len(items))]
    dataset = images(items, transforms(crop=False), root, tmp_path / "cache")
    dataset[0], dataset[13]
    assert dataset.missing() == [index for index in range(len(items)) if index not in (0, 13)]
    state = torch.get_rng_state()
    found = dataset.prepare(dataset.missing(), workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(record.id for record in found) == ["c2", "x3", "x7"]
    assert [items[index]["id"] for index in dataset.missing()] == ["x3", "x7", "c2"]
    assert records(tmp_path / "cache") == records(tmp_path / "lone") == len(items) - 3
    caplog.clear()
    kept = [dataset[index] for index in range(len(items))]
    assert not caplog.records and dataset.skipped == lone.skipped
    assert [isinstance(item, Skipped) for item in kept] == [isinstance(item, Skipped) for item in expected]
    assert all(
        torch.equal(a["image"], b["image"]) for a, b in zip(kept, expected, strict=True) if not isinstance(a, Skipped)
    )
    assert images(items, transforms(), root).missing() == []
    with pytest.raises(DataError, match=r"x3\.jpg: truncated JPEG"):
        images(items, transforms(), root, tmp_path / "strict", strict=True).prepare(range(len(items)), workers=2)


def test_strict_names_the_file(broken, tmp_path):
    root, items, _ = broken
    dataset = images(items, transforms(), root, tmp_path / "cache", strict=True)
    with pytest.raises(DataError, match=r"x3\.jpg: truncated JPEG.*; repair or remove it or its report"):
        dataset[3]


def test_a_dimension_without_readable_item_gets_a_stand_in(broken):
    root, items, vocabulary = broken
    dataset = images(items, transforms(), root)
    fetched = dataset.__getitems__([0, 1, 12])
    batch = MixedCollate(vocabulary)(fetched)
    assert batch["id"] == ["x0", "x1", "c3"] and batch["image3d"].shape == (1, 1, 4, 8, 8)
    for item in items:
        (root / item["image"]).unlink(missing_ok=True)
    with pytest.raises(
        DataError, match=r"no file of a batch could be read: .*x0\.jpg \(no such file.*x3\.jpg.*and 5 more"
    ):
        MixedCollate(vocabulary)(dataset.__getitems__([0]))


def test_eval_loader_gives_each_readable_item_once(broken):
    root, items, vocabulary = broken
    dataset = images(items, transforms(crop=False), root)
    batches = list(ImageLoader(dataset, (4, 1), collate_fn=MixedCollate(vocabulary)))
    assert [batch["id"] for batch in batches] == [
        ["x0", "x1", "x2"],
        ["x4", "x5", "x6"],
        ["x8", "x9"],
        *[["c0"], ["c1"], ["c3"], ["c4"]],
    ]
    assert dataset.refill and [record.id for record in dataset.skipped] == ["c2", "x3", "x7"]


def test_missing_root_and_bad_items(study, tmp_path):
    root, items, _ = study
    with pytest.raises(DataError, match="nowhere is not a folder; set `dataset_dir`"):
        images(items, transforms(), tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"item 1 \('x1'\) of the datalist lacks report"):
        images([items[0], {**items[1], "report": ""}], transforms(), root)
    ImageDataset([{**items[1], "report": ""}], transforms(), root)
    with pytest.raises(DataError, match='has "dim" 4'):
        images([{**items[1], "dim": 4}], transforms(), root)
    with pytest.raises(DataError, match="no items to draw batches from"):
        training_loader(images([], transforms(), root), "unused")


# ---- collate


def test_collate_orders_pads_and_truncates(study):
    root, items, vocabulary = study
    # data sets that are trained on together have labels of their own
    items = [{**item, "label": [1] * (i + 1)} for i, item in enumerate(items)]
    dataset = images(items, transforms(), root)
    collate = pickle.loads(pickle.dumps(MixedCollate(Path(vocabulary), max_length_2d=9, max_length_3d=20)))
    batch = collate([dataset[12], dataset[0], dataset[9], dataset[10]])
    assert batch["id"] == ["x0", "x9", "c2", "c0"] and batch["dim"] == [2, 2, 3, 3]
    assert batch["image2d"].shape == (2, 1, 16, 16) and batch["image3d"].shape == (2, 1, 4, 8, 8)
    assert torch.equal(batch["image3d"][1], dataset[10]["image"])
    assert "label" not in batch
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64 and mask.sum(1).tolist()[:2] == [5, 9]
    assert ids.shape[1] == max(9, *mask.sum(1).tolist()) < 20
    assert ids[0, :5].tolist() == [2, *collate.tokenizer.convert_tokens_to_ids(["no", "effusion", "."]), 3]
    assert (ids[0, 5:] == 0).all() and ids[1, 8] == 3
    only = collate([dataset[0]])
    assert "image3d" not in only and only["input_ids"].shape == (1, 5)
    assert equal(collate([dataset[0], Skipped("x", "f", "r")]), only)
