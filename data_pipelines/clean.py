"""Which raw documents are worth learning from: filters of code and of text, licences, language. Every drop has a reason.

What comes in: the text of a document, its language and its licences, and settings of a recipe's `curate`. What goes out:
None, or the name of the first rule that the document breaks; reasons are listed in docs/curate.md.
The rules look at characters and lines alone; nothing is parsed and nothing is run.

What it does not do: judge whether code is good, or correct. A rule is judged by what it throws away, which is why the
page of statistics shows examples under each reason.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

from codetune.recipe import CodeFilterSettings, CurateSettings, LicenseSettings, RawSourceSettings, TextFilterSettings
from data_pipelines.source_files import says_generated

IDENTIFIED_CHARACTERS = 4000  # of a text, in its middle, by which its language is told
# A line that holds literals and nothing else: numbers, quoted strings of no words, brackets, commas, hexadecimal bytes.
_DATA_LINE = re.compile(r"""[\s\d.,;:+\-(){}\[\]'"]*(?:(?:0x[0-9a-fA-F]+|\\x[0-9a-fA-F]{2}|[eE][+-]?\d+|[A-Za-z0-9+/=]{40,}|
    nan|inf|None|null|true|false|[uUlLfF])[\s\d.,;:+\-(){}\[\]'"]*)*""", re.VERBOSE)  # fmt: skip
_BINARY = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufffd\ue000-\uf8ff]")
_WHITESPACE = re.compile(r"\s")
_ALPHANUMERIC = re.compile(r"[^\W_]")
_ALPHABETIC = re.compile(r"[^\W\d_]")
NO_LICENSE = {"", "unknown", "noassertion", "none", "null", "no_license"}  # what a column says where it names none
SHORT_CHARACTERS = 500  # from so many on, whitespace and data are looked at: less says nothing


def why_dropped(text: str, language: str, source: RawSourceSettings, settings: CurateSettings) -> str | None:
    """The first rule that a document breaks, or None. Example: "x = 1" (5 characters, 50 wanted) gives `too_short`"""
    if source.treat_as == "text":
        return why_no_text(text, settings.text)
    return why_no_code(text, settings.code_by_language.get(language.lower(), settings.code))


def why_no_code(text: str, rules: CodeFilterSettings) -> str | None:
    """The first rule for code that a text breaks."""
    characters = len(text)
    lines = text.splitlines()
    if characters < rules.min_characters:
        return "too_short"
    if _count(_BINARY, text) > rules.max_binary_share * characters:
        return "binary"
    if rules.generated == "drop" and says_generated(text):
        return "generated_file"
    if max(map(len, lines)) > rules.max_line_characters:
        return "long_line"
    if sum(map(len, lines)) > rules.max_mean_line_characters * len(lines):
        return "long_lines_on_average"
    if _count(_ALPHANUMERIC, text) < rules.min_alphanumeric_share * characters:
        return "few_alphanumerics"
    if characters >= SHORT_CHARACTERS:
        if _count(_WHITESPACE, text) < rules.min_whitespace_share * characters:
            return "minified"
        if sum(len(line) for line in lines if _DATA_LINE.fullmatch(line)) > rules.max_data_share * characters:
            return "data_as_code"
    return None


def measured(text: str, reason: str) -> tuple[str, int]:
    """What a dropped document was found to be, in words, and where in it that shows.

    Example: two lines of 5 and 1,200 characters and `long_line` give "line 2 has 1,200 characters" and 6
    """
    lines = text.splitlines()
    if not lines:
        return "", 0
    if reason == "too_short":
        return f"{len(text):,} characters", 0
    if reason == "long_line":
        longest = max(range(len(lines)), key=lambda place: len(lines[place]))
        return f"line {longest + 1:,} has {len(lines[longest]):,} characters", _line_start(text, longest)
    if reason == "long_lines_on_average":
        return f"{sum(map(len, lines)) / len(lines):,.0f} characters a line", 0
    if reason == "data_as_code":
        data = [bool(_DATA_LINE.fullmatch(line)) for line in lines]
        runs = [list(run) for is_data, run in itertools.groupby(range(len(lines)), data.__getitem__) if is_data]
        longest_run = max(runs, key=lambda run: sum(len(lines[place]) for place in run), default=[0])
        share = sum(len(lines[place]) for run in runs for place in run) / len(text)
        return f"{share:.0%} in lines of literals", _line_start(text, longest_run[0])
    if reason == "binary":
        match = _BINARY.search(text)
        return f"{_count(_BINARY, text) / len(text):.1%} control characters", max(0, match.start() - 40) if match else 0
    shares = {"few_alphanumerics": (_ALPHANUMERIC, "letters and digits"), "minified": (_WHITESPACE, "whitespace")}
    shares["few_letters"] = (_ALPHABETIC, "letters")
    if reason in shares:
        pattern, name = shares[reason]
        return f"{_count(pattern, text) / len(text):.0%} {name}", 0
    return (f"its middle reads as {identify_language(text)}", 0) if reason == "language_not_kept" else ("", 0)


def _line_start(text: str, place: int) -> int:
    return sum(map(len, text.splitlines(keepends=True)[:place]))


def why_no_text(text: str, rules: TextFilterSettings) -> str | None:
    """The first rule for natural language that a text breaks."""
    characters = len(text)
    if characters < rules.min_characters:
        return "too_short"
    if _count(_BINARY, text) > rules.max_binary_share * characters:
        return "binary"
    if max(map(len, text.splitlines())) > rules.max_line_characters:
        return "long_line"
    if _count(_ALPHABETIC, text) < rules.min_alphabetic_share * characters:
        return "few_letters"
    if rules.languages and identify_language(text) not in rules.languages:
        return "language_not_kept"
    return None


def _count(pattern: re.Pattern[str], text: str) -> int:
    return len(pattern.findall(text))


def identify_language(text: str) -> str:
    """The language of a text by its middle, as ISO 639-1. Example: "Der Hund lief über die Straße." gives `de`"""
    start = max(0, (len(text) - IDENTIFIED_CHARACTERS) // 2)
    return str(_identifier().classify(text[start : start + IDENTIFIED_CHARACTERS])[0])


@functools.cache
def _identifier() -> Any:
    import py3langid

    return py3langid


def why_license(licenses: tuple[str, ...], rules: LicenseSettings) -> str | None:
    """Why a document's licences do not let it in, or None; what names none is unknown.

    Example: ("MIT", "GPL-3.0-only") with `allowed: [MIT]` gives `license_not_allowed`; () gives `license_unknown`
    """
    known = {item.strip().lower() for item in licenses} - NO_LICENSE
    if not known:
        return "license_unknown" if rules.unknown == "drop" else None
    allowed = {item.lower() for item in rules.allowed}
    return "license_not_allowed" if allowed and not known <= allowed else None
