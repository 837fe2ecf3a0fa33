"""Secrets and personal data in a text, each replaced by a mark; nothing around them changes.

What comes in: a text and what to look for. What goes out: the text, and counts by kind. `<KEY>` stands for keys and tokens,
`<EMAIL>` for addresses, `<IP_ADDRESS>` for public IPv4 addresses. Formats of keys are those of Yelp's detect-secrets, whose
patterns are searched over the whole text; beside them are formats that it lacks, whole private keys (it looks for the first
line alone), and long random-looking values that are assigned to a name such as `api_key` or `password`.

The trade: formats and names only. Its detectors of mere entropy are left out: hashes, test vectors and embedded data are
far more common in code than keys are. Addresses of reserved domains (example.com), of noreply mailboxes and `git@` stay.
Names of people, telephone numbers and postal addresses are not looked for.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator

MARKS = {"keys": "<KEY>", "emails": "<EMAIL>", "ip_addresses": "<IP_ADDRESS>"}
# Detectors that find ordinary text in code: anything after AP..., a URL with a placeholder, hashes of any kind.
_LEFT_OUT = {"Artifactory Credentials", "Public IP (ipv4)", "Private Key", "NPM tokens", "Twilio API Key"}
_LEFT_OUT |= {"Azure Storage Account access key"}  # takes the name in front with it; ours is below
_MORE_KEYS = (
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----[\s\S]{20,10000}?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----",
    r"(?<=AccountKey=)[A-Za-z0-9+/]{86}==",
    r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    r"\bgithub_pat_[A-Za-z0-9_]{60,90}\b",
    r"\bnpm_[A-Za-z0-9]{36}\b",
    r"\bhf_[A-Za-z0-9]{30,40}\b",
    r"\bAIza[0-9A-Za-z_-]{35}(?![\w-])",
    r"\bsk-(?:ant-|proj-|svcacct-)[A-Za-z0-9_-]{20,200}(?![\w-])",
    r"\bsk-[A-Za-z0-9]{48}\b",
    r"\b(?:AC|SK)[0-9a-f]{32}\b",
    r"\bya29\.[0-9A-Za-z_-]{30,}",
    r"\bdop_v1_[0-9a-f]{64}\b",
    r"\bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}\b",
    r"\bglpat-[A-Za-z0-9_-]{20}\b",
    r"\b[rs]k_(?:live|test)_[0-9a-zA-Z]{24,99}\b",
)
# One cheap search decides whether a text can hold a key of a known format at all. None may be missing: a test says so.
_CUES = re.compile(
    r"AKIA|ASIA|A3T|ABIA|ACCA|[Aa][Ww][Ss]|AccountKey|://[^\s/]{1,200}@|[Cc][Ll][Oo][Uu][Dd]|gh[pousr]_|gl[a-z]{2,6}-|"
    r"GR1348941|[Ii][Bb][Mm]|[Cc][Oo][Ss]|eyJ|-us\d|T3BlbkFJ|pypi-Ag|SG\.|xox|hooks\.slack|[Ss][Oo][Ff][Tt]|sq0csp|"
    r"k_live|k_test|PRIVATE KEY|"
    r"github_pat_|npm_|hf_|AIza|sk-|\bAC[0-9a-f]{32}|\bSK[0-9a-f]{32}|ya29\.|dop_v1_|shp(?:at|ca|pa|ss)_|\d{8,10}:[\w-]{35}|"
    r"[MNO][\w-]{23,25}\.[\w-]{6}\."
)
_NAMED = re.compile(
    r"""(?ix)(?:api_?key|secret|token|passw(?:or)?d|passwd|pwd|private_?key|access_?key|client_?secret|credential)[a-z0-9_]*["']?
    \s*(?::\s*str\s*)?(?:=|:|=>|:=)\s*["']([^\s"'<>{}$()%]{12,200})["']"""
)
# A literal that is assigned to, or compared with, a name that ends in `password` and the like: also a key of a mapping, an
# argument, a constant with its type.
_PASSWORD = re.compile(
    r"""(?ix)(?:passw(?:or)?d|passphrase|passcode|pwd)\d*["'\]]*\s*(?::\s*&?(?:'static\s*)?str(?:ing)?\s*)?
    (?:[=!]==?|=>|:=|=|:)\s*[bru]?(["'`])([^\s"'`\\]{6,200})\1"""
)
_NO_PASSWORD = re.compile(  # a format, the value of a variable, a path, an address; words that say what would be there
    r"(?i)[{<\[(].*[}>\])]|\$\w|%[a-z(]|^(?:[/~.@#:\\]|[a-z]:\\|[a-z]+://)|\*\*|\.\.\.|pass|pwd|secret|token|credential|"
    r"example|sample|dummy|fake|mock|test|demo|default|change|replace|insert|enter|your|placeholder|redacted|hidden|masked|"
    r"required|missing|invalid|wrong|incorrect|mismatch|forgot|reset|login|sign-?in|user|e-?mail|field|input|text|form-|"
    r"prompt|none$|null$|undefined|env|config|setting|vault|file|hash|scram|sha-?\d|md5|crypt|x{4}"
)
_NAME = re.compile(r"[A-Za-z_]+(?:[.:][A-Za-z_]+)*[.:]?|[a-z]+(?:_[a-z0-9]+)+")  # swordfish, forms.PasswordInput, step_2
_EMAIL = re.compile(
    r"(?<![\w.+\-/@:])([A-Za-z0-9][\w.+-]{0,63})@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24})(?![\w@-])"
)
_IP = re.compile(r"(?<![\w.\-])(?:\d{1,3}\.){3}\d{1,3}(?![\w\-]|\.\d)")
_VERSION = re.compile(r"(?i)(?:version|release|ver|==|>=|<=|~=|\bv|\bsection|rfc|§)[\s\"':=(]*$")
_RESERVED = re.compile(r"(?i)(?:^|\.)(?:example\.(?:com|org|net|edu)|example|test|invalid|localhost|local)$")
_PLACEHOLDER = re.compile(r"(?i)noreply|no-reply|^git$|^user(?:name)?$|^you$|^your\W?name$")
_WORD_REST = re.compile(r"[\w-]*")
_ENTROPY_BITS = 3.3  # a character of a random hexadecimal value has 4, of English about 2.5 over so few letters


def redact(text: str, kinds: tuple[str, ...]) -> tuple[str, Counter[str]]:
    """The text with marks in place of what was found, and how much of each kind.

    Example: `mail = "ann@corp.io"` with ("emails",) gives `mail = "<EMAIL>"` and {"emails": 1}
    """
    found = sorted(_found(text, kinds), key=lambda span: (span[0], -span[1]))
    parts: list[str] = []
    counts: Counter[str] = Counter()
    end = 0
    for start, stop, kind in found:
        if start < end:
            continue  # inside of what was replaced already
        parts += [text[end:start], MARKS[kind]]
        counts[kind] += 1
        end = stop
    if not counts:
        return text, counts
    return "".join(parts) + text[end:], counts


def _found(text: str, kinds: tuple[str, ...]) -> Iterator[tuple[int, int, str]]:
    if "keys" in kinds:
        yield from ((start, stop, "keys") for start, stop in _keys(text))
    if "emails" in kinds and "@" in text:
        for match in _EMAIL.finditer(text):
            if not _RESERVED.search(match.group(2)) and not _PLACEHOLDER.search(match.group(1)):
                yield match.start(), match.end(), "emails"
    if "ip_addresses" in kinds:
        for match in _IP.finditer(text):
            if _is_public(match.group()) and not _VERSION.search(text, max(0, match.start() - 24), match.start()):
                yield match.start(), match.end(), "ip_addresses"


def _keys(text: str) -> Iterator[tuple[int, int]]:
    """Where values stand that have the format of a key, or a telling name and the looks of one."""
    if _CUES.search(text):
        for pattern in _key_patterns():
            for match in pattern.finditer(text):
                start, stop = _secret_part(match)
                if _looks_real(text[start:stop]):
                    yield start, stop
    for match in _NAMED.finditer(text):
        if _looks_random(match.group(1)) and _looks_real(match.group(1)):
            yield match.span(1)
    for match in _PASSWORD.finditer(text):
        if _looks_like_password(match.group(2)):
            yield match.span(2)


def _secret_part(match: re.Match[str]) -> tuple[int, int]:
    """The longest group that a pattern names as the secret, or all of it."""
    groups = [index for index in range(1, (match.re.groups or 0) + 1) if match.group(index)]
    best = max(groups, key=lambda index: len(match.group(index)), default=0)
    return match.span(best) if best and len(match.group(best)) >= 8 else _to_the_end(match)


def _to_the_end(match: re.Match[str]) -> tuple[int, int]:
    """A match and the rest of the word that it ends in: some patterns only find where a token starts."""
    if not match.group()[-1:].isalnum():
        return match.span()
    rest = _WORD_REST.match(match.string, match.end())
    return match.start(), rest.end() if rest else match.end()


def _looks_real(value: str) -> bool:
    """Not a run of one or two characters, as placeholders are: xxxxxxxx, 00000000."""
    return len(set(value)) > 4


def _looks_random(value: str) -> bool:
    """Letters and digits as a generator gives them: words have no digits, and change their case once or twice a word."""
    if _entropy(value) < _ENTROPY_BITS:
        return False
    changes = sum(a.islower() != b.islower() for a, b in itertools.pairwise(value) if a.isalpha() and b.isalpha())
    return any(character.isdigit() for character in value) or (len(value) >= 20 and changes >= 0.35 * len(value))


def _looks_like_password(value: str) -> bool:
    """Example: correct-horse-battery and hunter2 do; new_password, {password}, form-control and swordfish do not."""
    return not _NAME.fullmatch(value) and not _NO_PASSWORD.search(value) and _looks_real(value)


def _entropy(value: str) -> float:
    counts = Counter(value)
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())


def _is_public(text: str) -> bool:
    try:
        return ipaddress.IPv4Address(text).is_global
    except ValueError:
        return False  # 999.1.2.3, or a zero in front: no address


@functools.cache
def _key_patterns() -> tuple[re.Pattern[str], ...]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    found: list[re.Pattern[str]] = []
    for name, detector in sorted(get_mapping_from_secret_type_to_class().items()):
        patterns = getattr(detector, "denylist", None)
        if name not in _LEFT_OUT and isinstance(patterns, list | tuple):
            found += [re.compile(item) if isinstance(item, str) else item for item in patterns]
    return (*(re.compile(pattern) for pattern in _MORE_KEYS), *found)
