# SPDX-License-Identifier: Apache-2.0
"""Radiology reports: sections, sentences, cleaning and a language check."""

import re
import unicodedata
from typing import NamedTuple

# A header starts a line after one blank and ends with a colon (the layout of MIMIC-CXR 2.0.0 report files).
_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_VIEW_TITLE = re.compile(r"\b(chest|radiographs?|views?|frontal|lateral|portable|ap|pa)\b")
# A header in running text, as in tables with a whole report in a cell: at its start, on a new line, after a sentence.
_DOUBLE_PERIOD = re.compile(r"\.\s*\.(?=\s)")
_RUNNING_HEADER = re.compile(
    r"(?:^|(?<=[.!?])\s+|\n\s*)(?:findings? and impressions?|findings?|impressions?)\s*:(?=\s|$)", re.IGNORECASE
)
_ENUMERATION = re.compile(r"[0-9]+\.")
# Keeps the points inside numbers ("3.5 cm"), drops the enumeration "2. ", and ends sentences at . ! ?
_PUNCT_ENUMERATION = re.compile(r"(?:(?<=\s)|^)[0-9]+\.(?=\s)")
_PUNCT_SENTENCE = re.compile(r"[.!?](?=\s|$)")
_TOKEN = re.compile(r"\w+")

_ENGLISH = frozenset(
    _TOKEN.findall(
        "the of and is are with there was were in on for to this that has have which right left both "
        "lung lungs chest effusion opacity opacities consolidation heart within without seen pulmonary "
        "findings impression nodule not"
    )
)
_SPANISH = frozenset(
    _TOKEN.findall(
        "el la los las de del que en se y con sin por para una un lo al su como o e pulmon pulmonar "
        "pulmonares torax derrame derecho derecha izquierdo izquierda ambos ambas hallazgos opacidades "
        "consolidacion neumonia infiltrado infiltrados deslustrado vidrio lesiones estudio observan "
        "observa aprecia afectacion indice cardiotoracico"
    )
)


class CleanReport(NamedTuple):
    """A cleaned report: its text, and how many sentences and word tokens it holds."""

    text: str
    num_sentences: int
    num_tokens: int

    def lack(self, min_sentences: int, min_tokens: int) -> str:
        """The reason to drop it, or an empty string."""
        if self.num_tokens < min_tokens:
            return f"fewer than {min_tokens} tokens"
        return f"fewer than {min_sentences} sentences" if self.num_sentences < min_sentences else ""


def _section_kind(header: str) -> str:
    """Map a header to findings, impression, comparison, a view title, or itself."""
    name = " ".join(header.lower().split())
    words = {"finding": "findings", "impression": "impression", "conclusion": "impression", "comparison": "comparison"}
    kind = next((kind for word, kind in words.items() if word in name), None)
    return kind or ("view title" if _VIEW_TITLE.search(name) else name)


def split_sections(text: str) -> dict[str, str]:
    """Cut a MIMIC-CXR report into the four sections that matter.

    Matches the behaviour documented for MIT-LCP's ``create_section_files.py``: a header is ``\\n ([A-Z ()/,-]+):\\s``;
    of sections with the same name the last counts; ``FINDINGS AND IMPRESSION`` is findings, a header that only names
    the views (``PA AND LATERAL CHEST:``) stands for findings when no findings header does; a report with neither
    findings nor impression gives ``last_paragraph``, what follows the first blank line of its last section. Returns
    ``impression``, ``findings``, ``last_paragraph`` and ``comparison``; ``""`` where absent.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = {"impression": "", "findings": "", "last_paragraph": "", "comparison": ""}
    view_section, last = "", text
    match = _HEADER.search(text)
    while match:
        # Searching from the next line on keeps a header that starts the section's own first line inside it.
        newline = text.find("\n", match.end())
        following = _HEADER.search(text, newline) if newline >= 0 else None
        last = text[match.end() : following.start() if following else len(text)]
        kind = _section_kind(match.group(1))
        if kind in found and last.strip():
            found[kind] = last.strip()
        elif kind == "view title" and last.strip():
            view_section = last.strip()
        match = following
    found["findings"] = found["findings"] or view_section
    if not found["findings"] and not found["impression"]:
        parts = _PARAGRAPH.split(last.rstrip(), maxsplit=1)
        found["last_paragraph"] = parts[1].strip() if len(parts) == 2 else ""
    return found


def clean_report(text: str, keep_punct: bool = False, min_tokens: int = 2) -> CleanReport:
    """Clean a report as MGCA does, without the headers ``Findings:`` and ``Impression:`` that begin its sections.

    Line ends become blanks, the text is cut at ``[0-9]+\\.`` and at ``.``, each piece is lower-cased and
    reduced to its ``\\w+`` tokens, pieces of at most one token are dropped, and the rest is joined by blanks
    (MGCA ``pretrain_dataset.py``; like it, this cuts ``3.5`` in two).

    Args:
        keep_punct: keep the punctuation within sentences and decimal points, and end each sentence with a
            period, as BERT's own training text has it.
        min_tokens: fewest tokens of a piece that is kept.
    """
    text = _DOUBLE_PERIOD.sub(".", _RUNNING_HEADER.sub(". ", text.strip()))
    text = " ".join(text.replace("\ufffd", " ").split())
    sentences, num_tokens = [], 0
    if keep_punct:
        pieces = [piece for part in _PUNCT_ENUMERATION.split(text) for piece in _PUNCT_SENTENCE.split(part)]
    else:
        pieces = [piece for part in _ENUMERATION.split(text) for piece in part.split(".")]
    for piece in pieces:
        tokens = _TOKEN.findall(piece.lower())
        if len(tokens) < min_tokens:
            continue
        num_tokens += len(tokens)
        sentences.append(piece.strip().lower() + "." if keep_punct else " ".join(tokens))
    return CleanReport(" ".join(sentences), len(sentences), num_tokens)


def as_trained(text: str, keep_punct: bool, min_tokens: int = 2) -> str:
    """A report or typed text in the form of a network's training reports.

    What `clean_report` made with the same `keep_punct` stays as it is; punctuation that it left out does not come back.

    Args:
        keep_punct: whether the training reports kept their punctuation, see `Pretrained.keep_punct`.
        min_tokens: see `clean_report`; 1 keeps single words, which a query may be.
    """
    text = " ".join(text.lower().split())
    if not keep_punct:
        return clean_report(text, min_tokens=min_tokens).text or " ".join(_TOKEN.findall(text))
    return text if not text or text.endswith(".") else text.rstrip("!?") + "."


def report_language(text: str) -> str | None:
    """Guess by common words whether a report is English ("en") or Spanish ("es"); None where they do not tell."""
    folded = unicodedata.normalize("NFKD", text.lower())
    tokens = _TOKEN.findall("".join(char for char in folded if not unicodedata.combining(char)))
    english = sum(token in _ENGLISH for token in tokens)
    spanish = sum(token in _SPANISH for token in tokens)
    if spanish >= 2 and spanish > 2 * english:
        return "es"
    return "en" if english >= 2 and english > spanish else None
