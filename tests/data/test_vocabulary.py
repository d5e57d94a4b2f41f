# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.common import digests
from unimedi_components.data.vocabulary import SPECIAL_TOKENS, build_wordpiece
from unimedi_components.errors import DataError

WORDS = ["pleural", "effusion", "left", "right", "no", "pneumothorax", "cardiomegaly", "base", "upper", "lobe"]


def make_reports(n: int = 120) -> list[str]:
    rng = random.Random(5)
    syllables = ["ba", "xo", "qué", "ri", "7", "st", "um", "pneu", "lo", "ka-"]
    made_up = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(150)]
    return [" ".join(rng.choices(WORDS + made_up, k=25)) + "." for _ in range(n)]


def test_loads_offline_with_special_ids_and_known_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = build_wordpiece(make_reports(), tmp_path / "vocab", vocab_size=400)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and len(tokenizer) <= 400
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, 2, 3)
    assert tokenizer.tokenize("Pleural EFFUSION") == ["pleural", "effusion"]
    ids = tokenizer("no pneumothorax")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "no", "pneumothorax", "[SEP]"]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize("漢")) == [1]
    lines = (tmp_path / "vocab" / "vocab.txt").read_text().splitlines()
    assert [tokenizer.convert_tokens_to_ids(t) for t in lines] == list(range(len(tokenizer)))


def test_same_reports_same_bytes_in_another_process(tmp_path):
    reports = make_reports()
    here = digests(Path(build_wordpiece(reports, tmp_path / "a", vocab_size=400)))
    (tmp_path / "reports.json").write_text(json.dumps(reports))
    code = (
        "import json, sys; from unimedi_components.data.vocabulary import build_wordpiece;"
        "build_wordpiece(json.load(open(sys.argv[1])), sys.argv[2], vocab_size=400)"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "reports.json"), str(tmp_path / "b")]
    subprocess.run(command, check=True, cwd=root, timeout=60)
    assert digests(tmp_path / "b") == here
    assert len(here) >= 4


def test_reuse_and_rebuild(tmp_path):
    reports, folder = make_reports(), tmp_path / "v"
    build_wordpiece(reports, folder, vocab_size=300)
    inode = folder.stat().st_ino
    build_wordpiece(reports, folder, vocab_size=300)
    assert folder.stat().st_ino == inode
    build_wordpiece([*reports, "words never seen before, never seen"], folder, vocab_size=300)
    assert folder.stat().st_ino != inode
    assert json.loads((folder / "vocabulary.json").read_text())["reports"] == len(reports) + 1
    assert [p.name for p in tmp_path.iterdir()] == ["v"]


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match="no report text"):
        build_wordpiece(["", "  "], tmp_path / "v")
    with pytest.raises(DataError, match="no room for words"):
        build_wordpiece(make_reports(), tmp_path / "v", vocab_size=10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("precious")
    with pytest.raises(DataError, match="choose another folder"):
        build_wordpiece(make_reports(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.doc").read_text() == "precious"
