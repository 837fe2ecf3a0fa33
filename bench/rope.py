"""RoPE frequencies of a lengthened model: after load, after save and reload, and as transformers 4 reads the files.

Reference: the formula base^(-2i/d) at base 10^6 in Python's arithmetic, and for linear scaling the same at 10^4 over 4. The
previous major of transformers is installed into a virtual environment of its own below `runs/bench-rope`, which sees this
environment's packages (torch) behind its own. Beside it, what that reader makes of the same files without the older dialect.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

MINUTES = 3
OLD = "transformers==4.57.6"
WORK = Path("runs/bench-rope")
SIZE = 128  # of a head, as in Llama
KINDS = {"new base": {"rope_base": 1e6}, "linear 1/4": {"rope_linear_factor": 4.0}}
READ = """
import json, sys, transformers
from transformers import AutoModelForCausalLM
found = {name: AutoModelForCausalLM.from_pretrained(name).model.rotary_emb.inv_freq.tolist() for name in sys.argv[1:]}
print(json.dumps({"version": transformers.__version__, "found": found}))
"""


def save_parent(folder: Path) -> None:
    """A one-layer Llama with heads of 128 and base 10^4; the tokenizer does not matter here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"hidden_size": 2 * SIZE, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=rope)
    ).save_pretrained(folder)


def lengthen(parent: Path, target: Path, changes: dict[str, float]) -> dict[str, list[float]]:
    """Load with other positions as training does, save as export does; the frequencies on the way."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from codetune import rope
    from codetune.recipe import ModelSettings

    config = AutoConfig.from_pretrained(parent)
    rope.change_positions(config, ModelSettings(**changes, context_tokens=16384))  # pyright: ignore[reportArgumentType]
    model: Any = AutoModelForCausalLM.from_pretrained(parent, config=config)
    rope.check_frequencies(model, config, changed=True)
    model.save_pretrained(target)
    rope.write_older_dialect(target)
    rope.check_saved(model, target)
    again: Any = AutoModelForCausalLM.from_pretrained(target)
    again.save_pretrained(target.with_name(f"{target.name} again"))
    return {
        "after load": model.model.rotary_emb.inv_freq.tolist(),
        "after save and reload": again.model.rotary_emb.inv_freq.tolist(),
    }


def old_python() -> Path:
    """The environment with the previous major, made once."""
    folder = WORK / "venv"
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
        # what transformers 4 needs in versions of its own; torch and the rest come from here
        subprocess.run([*pip, OLD, "numpy", "safetensors"], check=True)
        inside = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (inside / "zz_outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        (folder / ".ready").touch()
    return python


def largest_error(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def main() -> None:
    shutil.rmtree(WORK / "models", ignore_errors=True)
    parent = WORK / "models" / "parent"
    save_parent(parent)
    found: dict[str, dict[str, list[float]]] = {}
    folders = {}
    for kind, changes in KINDS.items():
        folders[kind] = WORK / "models" / kind.replace("/", " over ")
        found[kind] = lengthen(parent, folders[kind], changes)
        newer_only = WORK / "models" / f"{folders[kind].name} newer dialect only"
        shutil.copytree(folders[kind], newer_only)
        config = json.loads((newer_only / "config.json").read_text())
        older = ("rope_theta", "rope_scaling")
        (newer_only / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in older}))
    names = [
        str(path)
        for kind in KINDS
        for path in (folders[kind], folders[kind].with_name(f"{folders[kind].name} newer dialect only"))
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(old_python()), "-c", READ, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    old = json.loads(done.stdout.splitlines()[-1])
    figures: dict[str, Any] = {"older_version": old["version"], "largest_relative_error": {}}
    print(f"largest relative error against the formula, {SIZE // 2} frequencies; the older reader is {old['version']}")
    right = True
    for kind, changes in KINDS.items():
        base, factor = changes.get("rope_base", 1e4), changes.get("rope_linear_factor", 1.0)
        expected = [base ** (-2 * pair / SIZE) / factor for pair in range(SIZE // 2)]
        found[kind][f"read by {old['version']}"] = old["found"][names[2 * list(KINDS).index(kind)]]
        errors = {place: largest_error(values, expected) for place, values in found[kind].items()}
        without = largest_error(old["found"][names[2 * list(KINDS).index(kind) + 1]], expected)
        figures["largest_relative_error"][kind] = {**errors, "older reader, newer dialect only": without}
        right = right and max(errors.values()) < 1e-6
        cells = "   ".join(f"{place} {error:.1e}" for place, error in errors.items())
        print(f"{kind:12} {cells}   (without the older dialect: {without:.1e})")
    figures["equal"] = right
    print(f"equal to the formula in fp32 (relative error below 1e-6): {'yes' if right else 'NO'}")
    print("RESULT " + json.dumps(figures))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
