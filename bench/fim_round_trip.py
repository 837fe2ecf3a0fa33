"""Infilled documents taken apart again: every document of the embedded corpus, in PSM and in SPM.

Reference: the document's own text, character by character. Also counted: documents that a tokenizer cannot give back at all
(a literal U+2581 in a SentencePiece-like vocabulary), which the build refuses and counts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bench.corpus import embedded_recipe
from codetune.artifacts import LAYOUTS
from codetune.recipe import FimSettings
from codetune.tokens import open_codec
from data_pipelines.documents import Document, Drops, plan_source, read_documents
from data_pipelines.fim import encode_documents

MINUTES = 5
NO_LIMIT = 10**9


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        recipe = embedded_recipe(Path(name), [])
        codec = open_codec(recipe.parent_path)
        total = recovered = refused = 0
        layouts = dict.fromkeys(LAYOUTS, 0)
        for source, settings in recipe.need_data().sources.items():
            plan = plan_source(source, settings, 1, Path(name) / "work", False)
            batch: list[Document] = []
            documents = read_documents(plan, 0, 1, 0, Drops(), None)
            while True:
                document = next(documents, None)
                batch += [] if document is None else [document]
                if batch and (document is None or len(batch) == 256):
                    for spm_rate in (0.0, 1.0):
                        samples = encode_documents(batch, codec, FimSettings(spm_rate=spm_rate), 1.0, 0, NO_LIMIT)
                        for one, sample in zip(batch, samples, strict=True):
                            total += 1
                            if sample is None:
                                refused += 1
                                continue
                            layouts[LAYOUTS[sample.layout]] += 1
                            recovered += codec.unfim(sample.input_ids.tolist(), LAYOUTS[sample.layout]) == one.text
                    batch = []
                if document is None:
                    break
            print(f"{source}: so far {total:,} samples, {recovered:,} recovered, {refused:,} refused", flush=True)
    share = recovered / (total - refused)
    print(f"\nrecovered exactly: {share:.6%} of {total - refused:,} samples {layouts} (to reach: 100 %)")
    print(f"refused and counted: {refused:,} samples")
    print("RESULT " + json.dumps({"recovered": share, "samples": total - refused, "refused": refused}))


if __name__ == "__main__":
    main()
