# SPDX-License-Identifier: Apache-2.0
"""Shards that many processes fill and read, what 8 bits keep of an image, and items and tokens as arrays."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unimedi_components.data.vocabulary import build_wordpiece
from unimedi_components.loading import MixedCollate
from unimedi_components.loading.store import ImageStore, ItemList, pack, unpack

IMAGE = torch.linspace(-1, 1, 3001).reshape(1, 1, 3001)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def block(number: int) -> bytes:
    return pack({"image": torch.full((1, 4, 4), number / 255 * 2 - 1)})


def level(found: dict[str, torch.Tensor] | None) -> int:
    assert found is not None
    return round(float((found["image"].mean() + 1) * 127.5))


def test_images_keep_half_a_grey_level_and_all_else_every_bit():
    packed = pack({"image": IMAGE})
    found = unpack(packed)["image"]
    assert found.dtype == torch.float32 and found.shape == IMAGE.shape and len(packed) < 3001 + 100
    assert 0.0038 < float((found - IMAGE).abs().max()) <= 1 / 255 + 1e-6
    assert float(found.min()) == -1 and float(found.max()) == 1
    assert torch.equal(unpack(pack({"image": found}))["image"], found)
    other = {
        "image": IMAGE * 1.5,
        "mask": torch.randint(0, 14, (1, 5, 6, 7), dtype=torch.uint8),
        "painted": (IMAGE > 0).float(),
        "boxes": torch.tensor([[0.25, 3.5, 70.125, 1e5]]),
        "none": torch.zeros(0, 4),
        "affine": torch.eye(4, dtype=torch.float64) / 3,
        "labels": torch.tensor([-5, 2**40]),
    }
    back = unpack(pack(other))
    assert back.keys() == other.keys()
    assert all(torch.equal(back[name], other[name]) and back[name].dtype == other[name].dtype for name in other)


def fill(folder: Path, start: int) -> None:
    store = ImageStore(folder)
    for number in [*range(start, 120), *range(start)]:
        if store.get(key(number)) is None:
            store.put(key(number), block(number))
            time.sleep(0.001)


def test_processes_fill_one_store_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        workers = [context.Process(target=fill, args=(tmp_path, start)) for start in (0, 60)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        shards = sorted(tmp_path.glob("*.shard"))
        # the second time all is there, and nothing is added
        assert len(shards) == 2
    store = ImageStore(tmp_path)
    assert [level(store.get(key(number))) for number in range(120)] == list(range(120))
    assert store.get(key(120)) is None


def test_a_killed_process_leaves_only_whole_images(tmp_path):
    lines = (
        "from tests.loading.test_store import *",
        "store = ImageStore(sys.argv[1])",
        "big = pack({'image': torch.rand(1, 16, 256, 256)})",
        "for number in range(10**6): store.put(key(number), big); number == 3 and print('begun', flush=True)",
    )
    command = [sys.executable, "-c", "\n".join(lines), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGKILL)
    (index,), (shard,) = tmp_path.glob("*.index"), tmp_path.glob("*.shard")
    # as if it had been stopped within an image, and within a record
    with open(index, "ab") as file:
        file.write(b"\1" * 31)
    with open(shard, "ab") as file:
        file.write(b"\1" * 1000)
    count = index.stat().st_size // 32
    store = ImageStore(tmp_path)
    assert all(store.get(key(number)) is not None for number in range(count)) and store.get(key(count)) is None
    store.put(key(count), block(9))
    assert level(ImageStore(tmp_path).get(key(count))) == 9


def test_a_forked_or_pickled_store_goes_on(tmp_path):
    store = ImageStore(tmp_path)
    store.put(key(1), block(1))
    child = multiprocessing.get_context("fork").Process(target=store.put, args=(key(2), block(2)))
    child.start()
    child.join()
    copy = pickle.loads(pickle.dumps(store))
    copy.put(key(3), block(3))
    time.sleep(store._pause)
    assert [level(one.get(key(number))) for one in (store, copy) for number in (1, 2, 3)] == [1, 2, 3] * 2
    assert len(list(tmp_path.glob("*.shard"))) == 3


def test_a_place_that_cannot_be_written_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = ImageStore(tmp_path / "file" / "store")
    for number in range(3):
        store.put(key(number), block(number))
        assert store.get(key(number)) is None
    assert caplog.text.count("could not cache in") == 1


def test_keys_that_share_a_half_are_told_apart(tmp_path):
    store = ImageStore(tmp_path)
    keys = [b"12345678" + bytes([number] * 8) for number in range(3)]
    for number in (0, 1):
        store.put(keys[number], block(number + 7))
    store.look()
    assert [level(store.get(keys[number])) for number in (0, 1)] == [7, 8] and store.get(keys[2]) is None


def test_items_are_bytes_and_come_back():
    items = [{"id": f"é{i}", "dim": 2, "label": [0, -1], "center": [0.5, 1.0]} for i in range(5)]
    listed = ItemList(items)
    assert list(listed) == items and listed[1:3] == items[1:3] and listed[-1] == items[4] and len(listed) == 5
    with pytest.raises(IndexError):
        listed[5]
    assert list(pickle.loads(pickle.dumps(listed))) == items and list(ItemList([])) == []
    listed[0]["id"] = "other"
    assert listed[0] == items[0]


def test_tokens_are_made_once_for_all_processes(tmp_path):
    reports = ["no effusion . ", "a nodule in the left lobe", "no effusion . " * 20]
    items = [
        {"id": str(i), "dim": 2 + i % 2, "report": text, "index": i, "image": torch.zeros(1)}
        for i, text in enumerate(reports)
    ]
    collate = MixedCollate(build_wordpiece(reports * 3, tmp_path, 100), max_length_2d=12, max_length_3d=6)
    wanted = collate(items)
    remembering = collate.remembering(3)
    child = multiprocessing.get_context("fork").Process(target=remembering, args=(items,))
    child.start()
    child.join()
    assert child.exitcode == 0 and remembering._rows[:, 1].tolist() == [5, 6, 12]
    calls = []

    class Counting:
        pad_token_id = 0

        def __call__(self, report, **kwargs):
            calls.append(report)
            return {"input_ids": [2, 3]}

    remembering.tokenizer = Counting()
    found = remembering(items)
    assert torch.equal(found["input_ids"], wanted["input_ids"]) and calls == []
    assert torch.equal(found["attention_mask"], wanted["attention_mask"])
    # another report in an item's place is no known one, nor is an item beyond the data set
    remembering([{**items[0], "report": "new"}, {**items[1], "index": 7}])
    assert calls == ["new", reports[1]]
