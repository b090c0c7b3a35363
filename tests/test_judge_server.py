"""The endpoint judge against a real one: llama.cpp's own server with a small GGUF, held against transformers.

The server (with its HTTP and log-probabilities) comes from a wheel that only this test uses; skipped where there is no
network to fetch it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from test_judge_api import PROMPTS, read, responses
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.evaluation.judge_api import ApiJudge, ApiSettings
from core.evaluation.judging import judge_responses
from core.evaluation.readings import weighted

REQUIREMENT = "xllamacpp==2026.10.11549"

SERVE = """
import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[3], 8192, 4
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the server's package, which is not among the project's requirements."""
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--target", str(folder), REQUIREMENT]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{REQUIREMENT} cannot be installed here: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
    return folder


def serve(package: Path, gguf: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SERVE, str(package), str(Path(__file__).parent), str(gguf)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        line = next((text for text in process.stdout if text.startswith("address ")), "")
        if not line:
            pytest.skip("the server does not start on this machine")
        yield f"{line.split()[1]}/v1"
    finally:
        process.stdin.close()
        process.wait(30)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_gguf

    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def url(package: Path, gguf: Path) -> Iterator[str]:
    yield from serve(package, gguf)


def test_its_log_probabilities_give_the_score_that_transformers_gives(url: str, gguf: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    said = [f"I would take {n} steps {'and more ' * n}" for n in range(4)]
    asked = [p.render("What would you do?", answer) for answer in said for p in PROMPTS]
    one = ApiJudge(ApiSettings("tiny", url))
    done, failed = read(one, asked)
    assert not failed and len(done) == 8 and one.stamp.settings["scoring"] == "weighted"
    scores = set()
    for i, prompt in enumerate(asked):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=False)  # fmt: skip
        with torch.inference_mode():
            top = torch.log_softmax(model(ids).logits[0, -1].float(), dim=-1).topk(20)
        words = [tokenizer.decode([t]) for t in top.indices.tolist()]
        wanted = weighted(zip(words, top.values.tolist(), strict=True))
        assert done[i].kind == "weighted" and done[i].mass == pytest.approx(wanted.mass, rel=0.01)
        assert done[i].score == pytest.approx(wanted.score, abs=0.5)  # the server computes in other precisions
        assert done[i].tokens_in == ids.shape[1]
        scores.add(round(done[i].score, 3))
    assert len(scores) == 8


def test_a_whole_run_resumes_on_it(url: str, tmp_path: Path) -> None:
    rows = responses(10)
    first = judge_responses(rows.head(6), ApiJudge(ApiSettings("tiny", url)), PROMPTS, folder=tmp_path)
    whole = judge_responses(rows, ApiJudge(ApiSettings("tiny", url)), PROMPTS, folder=tmp_path)
    assert (first.n_asked, whole.n_kept, whole.n_asked) == (12, 12, 8) and not whole.failures
    assert whole.table["aligned"].null_count() + whole.table["coherent"].null_count() == 0
    assert whole.table["aligned"].head(6).to_list() == first.table["aligned"].to_list()
    assert whole.tokens_in > 0 and whole.kinds == {"weighted": 20}


def test_a_tokenizer_of_single_digits_is_found_out(package: Path, tmp_path: Path) -> None:
    import tiny_gguf

    for address in serve(package, tiny_gguf.write(tmp_path / "digits.gguf", numbers=False)):
        top = httpx.post(f"{address}/chat/completions", timeout=60, json={
            "messages": [{"role": "user", "content": "85"}], "max_tokens": 1, "logprobs": True, "top_logprobs": 20,
        }).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]  # fmt: skip
        assert len({t["token"] for t in top} & set("0123456789")) > 3  # weighting these would read 85 as 8
        one = ApiJudge(ApiSettings("tiny", address))
        done, _ = read(one, ["How good is it?"])
        assert done[0].kind == "sampled" and "digit by digit" in one.note
