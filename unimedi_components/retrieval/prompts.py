# SPDX-License-Identifier: Apache-2.0
"""Phrasings that affirm and deny findings, for zero-shot classification."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from unimedi_components.data.sources import nearest_hint, unrepeated
from unimedi_components.errors import ConfigError, DataError

SIDES = ("positive", "negative")
_FORMAT = 1
_KEYS = ("format", "name", "dim", "findings")
_FINDING_KEYS = (*SIDES, "aliases")


@dataclass(frozen=True)
class PromptSet:
    """Prompts for images of one dimension.

    Raises DataError: there is no finding, a side has no phrasing or one without a word, both sides hold the same
    phrasing, or a name stands for two findings.

    Args:
        findings: by finding its phrasings, {"positive": (...), "negative": (...)}, in the order of the results.
        aliases: by finding other names of it, as data sets write them.
    """

    name: str
    dim: int
    findings: Mapping[str, Mapping[str, tuple[str, ...]]]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or self.dim not in (2, 3):
            raise DataError(f"prompt set {self.name!r}: dim is {self.dim!r}; use 2 for X-rays or 3 for volumes")
        if not self.findings:
            raise DataError(f"prompt set {self.name!r}: holds no finding; give at least one with both sides")
        for finding, sides in self.findings.items():
            self._check_phrasings(finding, sides)
        self._by_name()

    def _check_phrasings(self, finding: str, sides: Mapping[str, Sequence[str]]) -> None:
        where = f"prompt set {self.name!r}, finding {finding!r}"
        for side in SIDES:
            phrasings = sides.get(side, ())
            if not phrasings:
                raise DataError(f"{where}: no {side} phrasing; give at least one")
            for text in phrasings:
                if not any(letter.isalpha() for letter in text):
                    raise DataError(f"{where}: the {side} phrasing {text!r} holds no word")
        both = {_fold(text) for text in sides["positive"]} & {_fold(text) for text in sides["negative"]}
        if both:
            raise DataError(f"{where}: {min(both)!r} is on both sides; leave it on one")

    def _by_name(self) -> dict[str, str]:
        known: dict[str, str] = {}
        for finding in self.findings:
            for name in (finding, *self.aliases.get(finding, ())):
                other = known.setdefault(_fold(name), finding)
                if other != finding:
                    raise DataError(
                        f"prompt set {self.name!r}: the name {name!r} stands for {other!r} and {finding!r}; keep one"
                    )
        return known

    def finding_of(self, name: str) -> str | None:
        """The finding that a name or alias stands for; None where the set has no prompts for it."""
        return self._by_name().get(_fold(name))

    def select(self, names: Sequence[str]) -> "PromptSet":
        """The prompts of some findings, in this order and under these names: results have a data set's label names.

        ``names``: findings or aliases; case, underscores and hyphens do not matter.
        Raises ConfigError: a name is unknown or comes twice, or there is none.
        """
        known = self._by_name()
        findings: dict[str, Mapping[str, tuple[str, ...]]] = {}
        aliases: dict[str, tuple[str, ...]] = {}
        for name in names:
            finding = known.get(_fold(name))
            if finding is None:
                raise ConfigError(
                    f"no prompts for {name!r} in the set {self.name!r}; {_hint(name, known)}it knows "
                    f"{', '.join(self.findings)}; write prompts of your own in a JSON file"
                )
            if _fold(name) in map(_fold, findings):
                raise ConfigError(f"the finding {name!r} comes twice; name it once")
            findings[name] = self.findings[finding]
            others = {_fold(other): other for other in (finding, *self.aliases.get(finding, ()))}
            aliases[name] = tuple(other for folded, other in others.items() if folded != _fold(name))
        if not findings:
            raise ConfigError(f"no finding named; the set {self.name!r} knows {', '.join(self.findings)}")
        # two names of one finding may be asked for together; their aliases would clash
        shared = len({known[_fold(name)] for name in findings}) < len(findings)
        return PromptSet(self.name, self.dim, findings, {} if shared else aliases)


def shipped_prompts() -> tuple[str, ...]:
    """Names of the prompt sets that come with the package."""
    return tuple(sorted(path.name.removesuffix(".json") for path in _shipped() if path.name.endswith(".json")))


def load_prompts(source: str | Path) -> PromptSet:
    """Read a prompt set. Raises DataError: there is no such set or file, or it holds something else.

    ``source``: a shipped set's name, see `shipped_prompts`, or a JSON file {"format": 1, "name", "dim": 2 or 3,
    "findings": {NAME: {"positive": [...], "negative": [...], "aliases": [...]}}}; aliases may be left out.
    """
    if str(source) in shipped_prompts():
        (path,) = (path for path in _shipped() if path.name == f"{source}.json")
        return _read(path.read_text(encoding="utf-8"), str(source))
    try:
        text = Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{source}: is no text file; give a JSON file of prompts") from None
    except OSError as error:
        hint = nearest_hint(str(source), shipped_prompts())
        raise DataError(
            f"{source}: neither a JSON file that can be read ({error.strerror}) nor a shipped prompt set; "
            f"{hint}there are {', '.join(shipped_prompts())}"
        ) from None
    return _read(text, str(source))


def load_prompt_sets(sources: Sequence[str | Path]) -> dict[int, PromptSet]:
    """Prompt sets, see `load_prompts`, by the dimension that they are for. Raises ConfigError: two are for one."""
    sets: dict[int, PromptSet] = {}
    for source in sources:
        found = load_prompts(source)
        if found.dim in sets:
            raise ConfigError(
                f"the prompt sets {sets[found.dim].name!r} and {found.name!r} are both for {found.dim}D; give one"
            )
        sets[found.dim] = found
    return sets


def _shipped() -> Iterator[Any]:
    return files("unimedi_components.retrieval").joinpath("prompt_sets").iterdir()


def _read(text: str, where: str) -> PromptSet:
    try:
        content = json.loads(text, object_pairs_hook=unrepeated)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error}); see a shipped prompt set for the format") from None
    _check_keys(content, _KEYS, _KEYS, where)
    if content["format"] != _FORMAT:
        raise DataError(f"{where}: format {content['format']!r}; this version reads format {_FORMAT}")
    if not isinstance(content["name"], str) or not isinstance(content["findings"], dict):
        raise DataError(f'{where}: "name" must be a text and "findings" an object, see a shipped prompt set')
    findings, aliases = {}, {}
    for name, entry in content["findings"].items():
        here = f"{where}: finding {name!r}"
        _check_keys(entry, SIDES, _FINDING_KEYS, here)
        texts = {key: _texts(entry.get(key, []), f"{here}, {key}") for key in _FINDING_KEYS}
        findings[name], aliases[name] = {side: texts[side] for side in SIDES}, texts["aliases"]
    try:
        return PromptSet(content["name"], content["dim"], findings, aliases)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _check_keys(content: Any, needed: Sequence[str], known: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise DataError(f"{where}: must be a JSON object with {', '.join(needed)}")
    for key in needed:
        if key not in content:
            raise DataError(f"{where}: lacks {key!r}; it needs {', '.join(needed)}")
    for key in content:
        if key not in known:
            raise DataError(f"{where}: unknown key {key!r}; {nearest_hint(key, known)}it takes {', '.join(known)}")


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: must be a list of texts")
    return tuple(value)


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _hint(name: str, known: Mapping[str, str]) -> str:
    # folded names are what is compared, and an alias is as good an answer as the name itself
    return nearest_hint(_fold(name).replace(" ", "_"), [folded.replace(" ", "_") for folded in known]).replace("_", " ")
