"""The benchmark's parts that do not need a quiet machine: memory is this process's own, and ranking runs to its end."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from core.evaluation.benchmark import machine
from core.evaluation.measurement import peak_bytes
from core.paths import ROOT


def test_peak_memory_is_not_inherited_from_a_larger_parent() -> None:
    ballast = np.ones(100_000_000)  # 800 MB, touched
    code = "from core.evaluation.measurement import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 200e6 < ballast.nbytes < peak_bytes()


def test_a_synthetic_layer_is_ranked() -> None:
    code = "from core.evaluation.benchmark import rank_once; rank_once(1, 80, 50, 10)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, peak = map(float, done.stdout.split())
    assert seconds > 0 and peak > 1e7


def test_the_machine_is_named_in_one_line() -> None:
    assert "cores" in machine() and "\n" not in machine()


def test_a_synthetic_decoder_is_decomposed_as_scikit_learn_does_it() -> None:
    code = "from core.evaluation.benchmark_decompose import once; once(300, True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, above, other = map(float, done.stdout.split())
    assert seconds > 0 and above >= 0 and other > 0
