"""Curation: planted near copies, benchmark items and secrets against what is there, each kind of change by itself.

Near copies: files of the standard library and four changed copies of each, against the exact similarity of every pair.
Benchmark items: HumanEval's 164 programs verbatim, reformatted by ast.unparse and with names changed, inside other
code; and everything in the standard library outside its tests, by file and by function, which holds none. Secrets: values
made here in the shapes that services give out, in lines of code; besides, passwords of two or three words drawn from a
list, in the ways that languages write them; and the same files of the standard library, in which every mark is one too many.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import random
import re
import string
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets
from loguru import logger

from codetune.problems import BenchmarkText, load_problems
from codetune.recipe import NearCopySettings
from data_pipelines.benchmark_overlap import index_of
from data_pipelines.near_copies import CodeSignature, alike_pairs, candidate_groups, minhash_config
from data_pipelines.redact import redact
from data_pipelines.shingles import code_tokens, jaccard, shingles

MINUTES = 1
FILES = 50
KINDS = ("original", "renamed", "reformatted", "comments", "joined")


def sources(count: int) -> list[str]:
    """Modules of the standard library between 2,000 and 20,000 characters that parse."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in str(path.relative_to(root)) or not 2000 < path.stat().st_size < 20_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib2to3's examples of Python 2
        found.append(text)
    random.Random(0).shuffle(found)
    return found[:count]


def renamed(text: str, share: float, draw: random.Random) -> str:
    """Some of the names that a text assigns, changed wherever they stand."""
    names = sorted({node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and len(node.id) > 2})
    for name in draw.sample(names, int(len(names) * share)):
        text = re.sub(rf"\b{name}\b", f"{name}_{draw.randrange(100)}", text)
    return text


def with_comments(text: str, draw: random.Random) -> str:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(line + (f"  # note {draw.randrange(10**6)}" if draw.random() < 0.05 else "") for line in lines)


def planted() -> list[tuple[str, str]]:
    """Documents with the kind of change that made them."""
    draw, found = random.Random(1), []
    texts = sources(FILES)
    for number, text in enumerate(texts):
        other = texts[(number + 1) % len(texts)]
        reformatted = "\n".join(line.replace("    ", "\t").rstrip() for line in text.splitlines() if line.strip())
        joined = text[: len(text) * 9 // 10] + other[: len(text) // 10]
        copies = (text, renamed(text, 0.05, draw), reformatted, with_comments(text, draw), joined)
        found += list(zip(KINDS, copies, strict=True))
    return found


def near_copies() -> dict[str, Any]:
    documents, settings = planted(), NearCopySettings()
    sets = {(0, place): shingles(code_tokens(text), 5) for place, (_, text) in enumerate(documents)}
    truth = {(a, b) for a, b in itertools.combinations(sorted(sets), 2) if jaccard(sets[a], sets[b]) >= settings.similarity}
    with tempfile.TemporaryDirectory() as folder:
        given: Any = (Document(text, str(place)) for place, (_, text) in enumerate(documents))
        signature = CodeSignature(f"{folder}/signatures", minhash_config(settings))
        signature.run(given, 0, 1)
        for bucket in range(settings.buckets):
            step: Any = MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=minhash_config(settings))
            step.run(None, bucket, settings.buckets)
        groups = list(candidate_groups(Path(folder) / "buckets"))
    candidates = {tuple(sorted(pair)) for group in groups for pair in itertools.combinations(set(group), 2)}
    found = alike_pairs(groups, sets.__getitem__, lambda node: b"%05d" % node[1], settings.similarity)
    recall: dict[str, list[int]] = {}
    for a, b in truth:
        kinds = {documents[a[1]][0], documents[b[1]][0]} - {"original"}
        counts = recall.setdefault(" and ".join(sorted(kinds)) or "original", [0, 0])
        counts[0] += (a, b) in found
        counts[1] += 1
    right = len(found.keys() & truth)
    print(f"near copies: {len(documents)} documents, {len(truth)} pairs with a Jaccard similarity of 0.7 or more")
    for kind, (hits, total) in sorted(recall.items()):
        print(f"  {kind:<28} {hits:>5} of {total:>5} found, {hits / total:.4f}")
    print(f"  recall {right / len(truth):.4f}, precision {right / len(found):.4f}, {len(candidates)} candidates")
    return {
        "pairs": len(truth),
        "recall": right / len(truth),
        "precision": right / len(found),
        "candidates": len(candidates),
        "by_kind": recall,
    }


def benchmark_items() -> dict[str, Any]:
    problems: Any = load_problems("humaneval", hub=False).problems
    index = index_of(
        (BenchmarkText("humaneval", item.id, kind, text) for item in problems for kind, text in item.texts()), 10
    )
    around, draw = "import os\n\n\ndef walk(folder):\n    return sorted(os.listdir(folder))\n\n\n", random.Random(2)
    found: Counter[str] = Counter()
    for problem in problems:
        program = problem.prompt + problem.reference
        plain = ast.unparse(ast.parse(program))
        changes = {"verbatim": program, "reformatted": plain, "half its names changed": renamed(program, 0.5, draw)}
        for kind, text in changes.items():
            found[kind] += problem.id in {hit.problem for hit in index.hits(around + text + "\n\n" + around, 0.5)}
    files = list(standard_library().values())
    pieces = [part for text in files for part in re.split(r"\n(?=def |class )", text) if len(part) >= 50]
    clean = [*files, *pieces]
    alarms = sum(bool(index.hits(part, 0.5)) for part in clean)
    bound = 1 - 0.05 ** (1 / len(clean))  # of the rate, with 95 % confidence, if there was no alarm
    print(f"benchmark items, of {len(problems)}: " + ", ".join(f"{kind} {count}" for kind, count in found.items()))
    told = f" (below {bound:.3%} with 95 % confidence)" if not alarms else ""
    print(
        f"  false alarms: {alarms} of {len(files):,} files of the standard library and {len(pieces):,} functions, classes "
        f"and heads in them{told}"
    )
    return {"problems": len(problems), "found": dict(found), "clean": len(clean), "false_alarms": alarms}


@functools.cache
def standard_library() -> dict[str, str]:
    """Every module of it outside its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    places = {path.relative_to(root): path for path in sorted(root.rglob("*.py"))}
    return {
        str(place): path.read_bytes().decode(errors="replace")
        for place, path in places.items()
        if "site-packages" not in place.parts and "test" not in str(place)
    }


def made_secrets(draw: random.Random) -> dict[str, tuple[str, str]]:
    """A value and a line of code for it, by kind."""

    def some(count: int, characters: str = string.ascii_letters + string.digits) -> str:
        return "".join(draw.choice(characters) for _ in range(count))

    upper, hexadecimal = string.ascii_uppercase + string.digits, "0123456789abcdef"
    call = 'client = make("{}", timeout=3)\n'
    return {
        "AWS access key": ("AKIA" + some(16, upper), call),
        "AWS secret key": (some(40), 'aws_secret_key = "{}"\n'),
        "GitHub token": ("ghp_" + some(36), call),
        "GitHub fine-grained token": ("github_pat_" + some(82), call),
        "GitLab token": ("glpat-" + some(20), call),
        "Slack token": ("xoxb-" + some(12, string.digits) + "-" + some(24), call),
        "Stripe key": ("sk_live_" + some(24), call),
        "Google API key": ("AIza" + some(35), call),
        "SendGrid key": (f"SG.{some(22)}.{some(43)}", call),
        "Twilio key": ("SK" + some(32, hexadecimal), call),
        "npm token": ("npm_" + some(36), call),
        "Hugging Face token": ("hf_" + some(34), call),
        "OpenAI key": ("sk-proj-" + some(60), call),
        "JSON web token": (f"eyJ{some(20)}.eyJ{some(40)}.{some(43)}", call),
        "private key": (f"-----BEGIN RSA PRIVATE KEY-----\n{some(300)}\n-----END RSA PRIVATE KEY-----", 'key = """{}"""\n'),
        "named value": (some(32), 'API_KEY = "{}"\n'),
        "password in a URL": (some(16), 'engine = connect("postgres://admin:{}@db.corp.io/main")\n'),
        "password of words": ("correct-horse-battery", 'password = "{}"\n'),
    }


def secrets() -> dict[str, Any]:
    found: dict[str, int] = {}
    rounds, changed, total = 20, 0, 0
    files = sources(rounds)
    for seed, text in enumerate(files):
        before, after = text[: len(text) // 2].rpartition("\n")[0] + "\n", text[len(text) // 2 :].partition("\n")[2]
        known = functools.partial(redact, kinds=("keys",))
        before, after = known(before)[0], known(after)[0]  # what it finds in the file itself is not counted
        for kind, (value, line) in made_secrets(random.Random(seed)).items():
            out = known(before + line.replace("{}", value) + after)[0]
            found[kind] = found.get(kind, 0) + (value not in out)
            total += 1
            changed += value not in out and out != before + line.replace("{}", "<KEY>") + after
    hits = sum(found.values())
    print(f"secrets: {hits} of {total} found ({hits / total:.1%}); code around them changed in {changed}")
    for kind, count in found.items():
        if count < rounds:
            print(f"  {kind}: {count} of {rounds}")
    return {"secrets": total, "found": hits, "around_changed": changed, "by_kind": found, **passwords(), **clean_code()}


WORDS = (
    "amber basil cedar delta ember fjord glade heron ivory jasper kestrel lemon maple north otter piano quartz river".split()
)
PASSWORD_LINES = (
    'password = "{}"\n',
    '    "db_password": "{}",\n',
    "connect(user=name, passwd='{}')\n",
    'PWD: str = "{}"\n',
)


def passwords() -> dict[str, Any]:
    """Words alone, joined by a mark, or followed by a digit."""
    draw, found, total = random.Random(3), Counter[str](), Counter[str]()
    ways = {
        "words joined by a mark": lambda: draw.choice("-.!+#_").join(draw.sample(WORDS, 3)),
        "a word and digits": lambda: draw.choice(WORDS).title() + str(draw.randrange(10, 10_000)),
        "a word alone": lambda: draw.choice(WORDS) + draw.choice(WORDS),
    }
    for way, make in ways.items():
        for line in PASSWORD_LINES * 25:
            value = make()
            total[way] += 1
            found[way] += redact(line.replace("{}", value), ("keys",))[0] == line.replace("{}", "<KEY>")
    print("passwords: " + ", ".join(f"{way} {found[way]} of {count}" for way, count in total.items()))
    return {"passwords": dict(total), "passwords_found": dict(found)}


def clean_code() -> dict[str, Any]:
    """Marks in code that holds no secret."""
    marks = {place: redact(text, ("keys",))[1]["keys"] for place, text in standard_library().items()}
    files, marked = len(marks), {place: count for place, count in marks.items() if count}
    print(f"  marks in {files:,} files of the standard library that hold no secret: {marked or 'none'}")
    return {"clean_files": files, "clean_marks": marked}


def main() -> None:
    logger.disable("datatrove")
    figures = {"near_copies": near_copies(), "benchmark_items": benchmark_items(), "secrets": secrets()}
    print(f"RESULT {json.dumps(figures)}")


if __name__ == "__main__":
    main()
