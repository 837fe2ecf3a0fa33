"""Realised shares of rehearsal in the rows of the tiny instruct recipe, at its own length and at ten times that.

Reference: the shares of the recipe, 6 % code and 2 % natural language of the tokens (paper Sec. 2.5). The rows are those of
`recipes/instruct/tiny.yaml`, built for the tokenizer of the tiny base, which lcft's is; tokens are counted in finished rows.
A source is off by one document at most, which is more of fewer rows.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bench.stage_runs import BASE, need_base
from codetune.artifacts import open_rows
from codetune.recipe import load_recipe
from data_pipelines.build import build

MINUTES = 2
PLANNED = {"code": 0.06, "text": 0.02}
TOKENS = (204_800, 2_048_000)


def main() -> None:
    need_base()
    figures = {}
    for tokens in TOKENS:
        with tempfile.TemporaryDirectory() as name:
            settings = [f"runs={Path(name)}", f"parent={BASE.resolve()}", f"training.train_tokens={tokens}"]
            # the base has not been lengthened; its rows are those of a model that was
            settings += ["model.context_tokens=1024", "model.rope_base=1.0e+6"]
            manifest = open_rows(build(load_recipe("recipes/instruct/tiny.yaml", settings))).manifest
        shares = dict.fromkeys(PLANNED, 0.0)
        for source in manifest["sources"].values():
            if source["group"] in shares:
                shares[source["group"]] += source["share_realised"]
        figures[tokens] = {"tokens": manifest["tokens"], **shares}
    for tokens, found in figures.items():
        told = ", ".join(f"{group} {found[group]:.3%} (asked for {share:.0%})" for group, share in PLANNED.items())
        print(f"{tokens:>9,} tokens of training, {found['tokens']:,} in rows: {told} (to reach: within 0.1 points)")
    print("RESULT " + json.dumps({str(tokens): found for tokens, found in figures.items()}))


if __name__ == "__main__":
    main()
