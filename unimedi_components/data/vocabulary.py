# SPDX-License-Identifier: Apache-2.0
"""WordPiece vocabulary of the training reports, for the small report encoder that is trained from scratch."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.models.bert.tokenization_bert import BertTokenizer

from unimedi_components.errors import DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MIN_FREQUENCY = 2
_MAX_LENGTH = 512
_RECORD = "vocabulary.json"


def build_wordpiece(reports: Sequence[str], out_dir: str | os.PathLike[str], vocab_size: int = 2000) -> str:
    """Learn a WordPiece vocabulary, uncased and without accents, and save it as a tokenizer folder of `transformers`.

    The folder is written whole or not at all, and equal reports give equal bytes. A folder that was built from the same
    reports with the same settings is left as it is, so this may run at the start of every training, on every rank. Pass
    the reports of the training split only: words of the held-out reports must not leak into the vocabulary. Raises
    DataError: there is no report text, `vocab_size` has no room for words, or `out_dir` holds something else.

    Args:
        out_dir: folder to make; `transformers.AutoTokenizer.from_pretrained(out_dir)` loads it without a network.
        vocab_size: largest number of tokens, with the five special ones ([PAD] is 0) and the characters.
    """
    texts = [text for text in reports if text and text.strip()]
    if not texts:
        raise DataError("no report text to build a vocabulary from; check the datalist's `report` fields")
    folder = Path(out_dir)
    record = {
        "sha256": hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest(),
        "reports": len(texts),
        "vocab_size": vocab_size,
        "lowercase": True,
        "min_frequency": _MIN_FREQUENCY,
    }
    if _recorded(folder) == record:
        return str(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and _recorded(folder) is None)):
        raise DataError(f"{folder} exists and holds no vocabulary of ours; choose another folder or remove it")
    vocab = _train(texts, vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        _write(new, vocab, record)
        _install(new, folder, Path(scratch) / "old", record)
    return str(folder)


def _recorded(folder: Path) -> dict | None:
    try:
        return json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return None


def _train(texts: Sequence[str], vocab_size: int) -> list[str]:
    """Tokens in the order of their ids."""
    # the library numbers the ##characters in a hash map's order, which also decides ties between merges;
    # a first pass without merges finds the characters, and naming them in sorted order fixes all ids
    alphabet = sorted(set(_run_trainer(texts, 0, [])))
    if vocab_size <= len(SPECIAL_TOKENS) + len(alphabet):
        raise DataError(
            f"vocab_size {vocab_size} leaves no room for words: {len(SPECIAL_TOKENS)} special tokens and "
            f"{len(alphabet)} characters come first; make it larger"
        )
    return _run_trainer(texts, vocab_size, [*SPECIAL_TOKENS, *alphabet])


def _run_trainer(texts: Sequence[str], vocab_size: int, first: list[str]) -> list[str]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=_MIN_FREQUENCY, special_tokens=first, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def _write(folder: Path, vocab: list[str], record: dict) -> None:
    tokenizer = BertTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, do_lower_case=True, model_max_length=_MAX_LENGTH
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _install(new: Path, folder: Path, old: Path, record: dict) -> None:
    """Put `new` in the place of `folder`; another rank may be doing the same."""
    for _ in range(3):
        if _recorded(folder) == record:
            return
        shutil.rmtree(old, ignore_errors=True)
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            return
        except OSError:
            continue
    raise DataError(f"could not write the vocabulary to {folder}; check the folder's permissions and free space")
