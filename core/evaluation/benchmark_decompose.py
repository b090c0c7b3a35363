"""Time and memory of decomposing one direction over a large synthetic decoder, beside scikit-learn's pursuit."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from core.evaluation.measurement import Measurement, peak_bytes

D_MODEL, K = 3584, 64
#: d_sae, and whether scikit-learn, which wants float64 and a copy, takes its turn.
WIDTHS = ((16_384, True), (131_072, False))


def decompose_cost(say: Callable[[str], None]) -> list[Measurement]:
    """Matching pursuit to k = 64 at each width, in processes of their own."""
    found = []
    for d_sae, beside in WIDTHS:
        code = f"from core.evaluation.benchmark_decompose import once; once({d_sae}, {beside})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, above, other = map(float, done.stdout.split())
        name = f"decompose, omp to k = {K}, {d_sae:,} x {D_MODEL:,}"
        say(f"{name}: {seconds:.2f} s, {above / 2**20:,.0f} MiB above the decoder")
        reference = ("scikit-learn orthogonal_mp", other / seconds) if beside else (None, None)
        found += [Measurement(name, seconds, "s", *reference),
                  Measurement(f"{name}, peak memory above the decoder", above / 2**20, "MiB")]
    return found


def once(d_sae: int, beside: bool) -> None:
    """Prints seconds, peak bytes above those that hold the decoder, and scikit-learn's seconds (nan if left out)."""
    import numpy as np

    from core.analysis.decompose import decompose
    from core.dictionary import Dictionary
    from core.directions import Direction

    rng = np.random.default_rng(0)
    W = np.empty((d_sae, D_MODEL), dtype=np.float32)
    for start in range(0, d_sae, 4096):
        W[start : start + 4096] = rng.standard_normal((min(4096, d_sae - start), D_MODEL), dtype=np.float32)
    book = Dictionary(0, "synthetic", "synthetic", W, np.zeros((D_MODEL, 1), dtype=np.float32))
    direction = Direction("random", "synthetic", 0, rng.standard_normal(D_MODEL))
    before, begin = peak_bytes(), time.perf_counter()
    decompose(direction, book, "omp", k=K)
    seconds, above = time.perf_counter() - begin, peak_bytes() - before
    other = float("nan")
    if beside:
        from sklearn.linear_model import orthogonal_mp

        atoms = (W / book.norms[:, None]).T.astype(np.float64)
        begin = time.perf_counter()
        orthogonal_mp(atoms, direction.vector.astype(np.float64), n_nonzero_coefs=K, precompute=False)
        other = time.perf_counter() - begin
    print(seconds, above, other)
