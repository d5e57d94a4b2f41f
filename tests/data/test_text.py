# SPDX-License-Identifier: Apache-2.0
"""Report sections, cleaning against a slow reference, and the language check."""

from __future__ import annotations

import random
import re

import pytest

from unimedi_components.data.text import clean_report, report_language, split_sections

REPORT = (
    "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
    " INDICATION:  ___ year old woman with cough  // pneumonia?\n \n COMPARISON:  None.\n \n"
    " FINDINGS: \n \n The lungs are clear.  There is no effusion\n or pneumothorax.\n \n"
    " IMPRESSION: \n \n 1. No acute process.\n 2. Stable heart.\n"
)


def test_sections_of_a_full_report():
    found = split_sections(REPORT)
    assert found == {
        "findings": "The lungs are clear.  There is no effusion\n or pneumothorax.",
        "impression": "1. No acute process.\n 2. Stable heart.",
        "comparison": "None.",
        "last_paragraph": "",
    }
    assert split_sections(REPORT.replace("\n", "\r\n")) == found


def test_only_impression_and_repeated_headers():
    found = split_sections("\n IMPRESSION: First reading.\n \n IMPRESSION: Second reading.\n")
    assert (found["impression"], found["findings"]) == ("Second reading.", "")
    assert split_sections("\n FINDINGS AND IMPRESSION: Clear.\n")["findings"] == "Clear."
    assert split_sections("\n CONCLUSION: Normal chest.\n")["impression"] == "Normal chest."
    # an empty section never replaces a filled one
    assert split_sections("\n FINDINGS: Clear.\n \n FINDINGS:\n")["findings"] == "Clear."


def test_fallbacks():
    found = split_sections("\n INDICATION: cough\n \n Lungs are clear.\n Heart normal.\n")
    assert found["last_paragraph"] == "Lungs are clear.\n Heart normal."
    assert (found["impression"], found["findings"]) == ("", "")
    assert split_sections(" no header here")["last_paragraph"] == ""
    views = "\n PORTABLE AP CHEST: Tube in place.\n \n COMPARISON: Yesterday.\n"
    assert split_sections(views)["findings"] == "Tube in place."
    assert split_sections(views + "\n FINDINGS: Clear.\n")["findings"] == "Clear."


def test_what_is_no_header():
    # lower case, a line that starts without a blank, and a header-like word within a line
    text = "\n FINDINGS: Lines: IMPRESSION: none\nTUBES: two.\n Note: stable.\n"
    assert split_sections(text)["findings"] == "Lines: IMPRESSION: none\nTUBES: two.\n Note: stable."


def slow_clean(text):
    """Clean letter by letter: no regular expressions."""
    text = text.replace("\n", " ")
    pieces, piece, i = [], "", 0
    while i < len(text):
        digits = 0
        while i + digits < len(text) and text[i + digits] in "0123456789":
            digits += 1
        if digits and text[i + digits : i + digits + 1] == ".":
            pieces.append(piece)
            piece, i = "", i + digits + 1
        elif digits:
            piece, i = piece + text[i : i + digits], i + digits
        elif text[i] == ".":
            pieces.append(piece)
            piece, i = "", i + 1
        else:
            piece, i = piece + text[i], i + 1
    pieces.append(piece)
    kept = []
    for piece in pieces:
        words = "".join(c if c.isalnum() or c == "_" else " " for c in piece.lower()).split()
        if len(words) > 1:
            kept.append(words)
    return " ".join(w for words in kept for w in words), len(kept), sum(map(len, kept))


def test_cleaning_by_hand():
    report = clean_report("1. No acute process.\n2. Stable heart. Normal. 3.5 cm node, right-sided")
    # "Normal" is one token; "3." is cut off, so "5 cm node right sided" stays
    assert report.text == "no acute process stable heart 5 cm node right sided"
    assert (report.num_sentences, report.num_tokens) == (3, 10)
    assert clean_report("") == ("", 0, 0)
    assert clean_report("a.b.c") == ("", 0, 0)


def test_cleaning_against_the_slow_reference():
    rng = random.Random(0)
    alphabet = [
        "no",
        "Effusion",
        "12.",
        "3",
        ".",
        " ",
        "\n",
        ",",
        "___",
        "right-sided",
        "2.5",
        "CT",
        ":",
        "(",
        ")",
        "  ",
    ]
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40)))
        assert tuple(clean_report(text)) == slow_clean(text)


def test_keep_punct():
    report = clean_report("1. A 3.5 cm node, right-sided.\n2. No effusion! Normal.", keep_punct=True)
    assert report.text == "a 3.5 cm node, right-sided. no effusion."
    assert report.num_sentences == 2


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The lungs are clear and there is no pleural effusion.", "en"),
        ("no acute process . the heart is normal .", "en"),
        ("derrame pleural bilateral . opacidades en vidrio deslustrado .", "es"),
        ("sin hallazgos de interes .", "es"),
        ("Índice cardiotorácico normal. No se aprecia derrame.", "es"),
        ("Normal chest.", None),
        ("torax normal .", None),
        ("", None),
        ("Keine Infiltrate, kein Erguss.", None),
        ("Enlarged LA and LV; the en bloc resection is seen in the right lung.", "en"),
    ],
)
def test_language(text, language):
    assert report_language(text) == language


def test_sentences_split_like_the_documented_expression():
    text = "1. a b. 22. c d"
    pieces = [piece for part in re.split("[0-9]+\\.", text) for piece in part.split(".")]
    assert clean_report(text).num_sentences == sum(len(piece.split()) > 1 for piece in pieces) == 2


def test_headers_in_running_text_are_left_out():
    text = "Findings: The lungs are clear.  Impression: 1. No acute disease. 2. Stable heart."
    assert clean_report(text) == ("the lungs are clear no acute disease stable heart", 3, 9)
    lines = "FINDINGS:\n Heart is large\n\nIMPRESSION:\n Cardiomegaly only"
    assert clean_report(lines, keep_punct=True).text == "heart is large. cardiomegaly only."
    assert clean_report("Findings and Impression: Clear lungs.").text == "clear lungs"
    # words of a sentence stay
    for kept in ("No findings: of note.", "The impression is of edema.", "Findings of edema. Impression unchanged."):
        assert clean_report(kept).num_tokens == len(kept.split())
