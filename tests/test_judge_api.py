"""The endpoint judge against a server that fails in every way: no response lost, none scored twice, resumes."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from pathlib import Path

import httpx
import polars as pl
import pytest
from stub_judge import choice, serving, true_score
from test_rates import table

from core.errors import JudgeError
from core.evaluation.judge_api import PROBE, ApiJudge, ApiSettings
from core.evaluation.judging import Price, judge_responses, judged_rows
from core.evaluation.readings import Reading
from core.evaluation.responses import judges, load_responses
from core.paths import write_jsonl
from core.questions import JudgePrompt

PROMPTS = (JudgePrompt("aligned", "A? {question} {answer}"), JudgePrompt("coherent", "C? {question} {answer}"))


def judge(url: str, **settings: object) -> ApiJudge:
    return ApiJudge(ApiSettings("m", url, **{"first_wait": 0.01, "timeout": 0.4, "concurrency": 4, **settings}))


def read(one: ApiJudge, prompts: list[str]) -> tuple[dict[int, Reading], dict[int, str]]:
    done, failed = {}, {}
    with one:
        one.read(prompts, done.__setitem__, failed.__setitem__)
    return done, failed


def responses(n: int = 12):
    return table([(None, None)] * n).with_columns(
        pl.Series("response", [f"answer {i}" for i in range(n)])
    )


FAULTS = ("429", "500", "503", "slow", "truncated", "empty", "no logprobs", "wait 0.05")


def test_every_fault_passes_and_every_prompt_is_scored_once() -> None:
    prompts = [f"p{i}" for i in range(40)]

    def faults(prompt: str, n: int) -> str | None:
        return FAULTS[(int(prompt[1:]) + n) % len(FAULTS)] if prompt != PROBE and 0 <= n < int(prompt[1:]) % 4 else None

    with serving(faults) as stub:
        done, failed = read(judge(stub.url), prompts)
    assert not failed and sorted(done) == list(range(40))
    for i, prompt in enumerate(prompts):
        assert done[i].score == pytest.approx(true_score(prompt)) and done[i].kind == "weighted"
        assert done[i].mass == pytest.approx(0.8)
        assert stub.asked[prompt] == i % 4 + 1  # once more than it failed
    assert stub.asked[PROBE] == 1
    assert {b["top_logprobs"] for b in stub.bodies} == {20} and {b["temperature"] for b in stub.bodies} == {0.0}


def test_requests_run_side_by_side_and_no_more_than_asked() -> None:
    with serving() as stub:
        stub.delay = 0.02
        read(judge(stub.url, timeout=5.0), [f"p{i}" for i in range(24)])
        assert stub.most_running == 4


def test_refusals_are_readings_without_a_score() -> None:
    with serving(lambda p, n: {"a": "refusal", "b": "filtered", "c": "says REFUSAL"}.get(p)) as stub:
        done, failed = read(judge(stub.url), ["a", "b", "c", "d"])
        assert [(done[i].score, done[i].why) for i in range(3)] == [
            (None, "refusal"), (None, "filtered"), (None, "refusal")
        ]  # fmt: skip
        assert done[3].score is not None and not failed and all(stub.asked[p] == 1 for p in "abcd")


def test_what_never_passes_is_a_failure_with_its_reason_and_the_others_go_on() -> None:
    bad = {"a": "500", "b": "truncated", "c": "slow", "d": "413", "e": "drops"}
    with serving(lambda p, n: bad.get(p)) as stub:
        done, failed = read(judge(stub.url, attempts=3, timeout=0.2), [*"abcde", "fine"])
        assert sorted(done) == [5] and sorted(failed) == [0, 1, 2, 3, 4]
        assert failed[0] == "status 500" and "no whole JSON" in failed[1] and "within 0.2 s" in failed[2]
        assert "413" in failed[3]
        assert [stub.asked[p] for p in "abd"] == [3, 3, 1]  # a prompt that is too long is not asked again


def test_retry_after_is_honoured_as_seconds_and_as_a_date() -> None:
    with serving(lambda p, n: "wait 0.6" if p == "a" and n == 0 else None) as stub:
        read(judge(stub.url), ["a"])
        first, second = stub.times["a"]
        assert second - first >= 0.6
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    with serving(lambda p, n: None) as stub:
        asked = []

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(time.monotonic())
            if len(asked) == 1:
                return httpx.Response(429, headers={"Retry-After": date})
            return httpx.Response(200, json={"choices": [{"message": {"content": "5"}}]})

        one = ApiJudge(ApiSettings("m", stub.url, scoring="sampled", first_wait=0.01), httpx.MockTransport(answer))
        done, _ = read(one, ["a"])
        assert done[0].score == 5 and asked[1] - asked[0] >= 0.9  # dates have whole seconds


def test_a_server_without_log_probabilities_or_whole_numbers_is_sampled_and_said_to_be() -> None:
    with serving(lambda p, n: "no logprobs") as stub:
        one = judge(stub.url)
        done, _ = read(one, ["a"])
        assert done[0].kind == "sampled" and done[0].score == true_score("a") and done[0].mass is None
        assert one.stamp.settings["scoring"] == "sampled" and "no log-probabilities" in one.note
    with serving(lambda p, n: "422" if p == PROBE and n == 0 else "no logprobs") as stub:  # knows no such parameter
        assert read(judge(stub.url), ["a"])[0][0].kind == "sampled"

    def digits(request: httpx.Request) -> httpx.Response:
        top = [{"token": t, "logprob": -1.0} for t in ("8", "9", "The")]
        content = [{"token": "8", "top_logprobs": top}, {"token": "5", "top_logprobs": top}]
        return httpx.Response(200, json={"choices": [{"message": {"content": "85"}, "logprobs": {"content": content}}]})

    one = ApiJudge(ApiSettings("m", "http://x/v1"), httpx.MockTransport(digits))
    done, _ = read(one, ["a"])
    assert done[0].score == 85 and done[0].kind == "sampled" and "digit by digit" in one.note  # not 8


def test_a_server_that_calls_the_limit_by_its_new_name_is_understood() -> None:
    def newer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if "max_tokens" in body:
            return httpx.Response(400, json={"error": {"message": "Use 'max_completion_tokens' instead."}})
        return httpx.Response(200, json={"choices": [choice(body["messages"][0]["content"])]})

    done, failed = read(ApiJudge(ApiSettings("m", "http://x/v1"), httpx.MockTransport(newer)), ["a", "b"])
    assert not failed and done[1].score == pytest.approx(true_score("b")) and done[1].kind == "weighted"


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    with serving(lambda p, n: "401" if p == PROBE else None) as stub:
        one = judge(stub.url, key_env="MY_KEY")
        with pytest.raises(JudgeError, match="status 401: busy with Bearer \\*\\*\\*") as caught:
            read(one, ["a"])
        assert "secret-key" not in str(caught.value) and "secret-key" not in str(one.stamp)
        assert stub.headers == ["Bearer secret-key"]
    monkeypatch.delenv("MY_KEY")
    with serving() as stub:
        read(judge(stub.url, key_env="MY_KEY"), ["a"])
        assert set(stub.headers) == {None}


@pytest.mark.parametrize("url", ("", "localhost:80", "ftp://x/v1", "http://", "http://user:pass@x/v1", "http://[::1"))
def test_a_bad_address_is_one_sentence(url: str) -> None:
    with pytest.raises(JudgeError) as caught:
        ApiSettings("m", url)
    assert "pass@" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_is_gone_ends_the_run_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """No response lost, none scored twice: over two runs, every prompt has exactly one good answer."""
    up, answered = threading.Event(), []
    up.set()

    def faults(prompt: str, n: int) -> str | None:
        if prompt == PROBE:
            return None
        if not up.is_set():
            return "500"
        if n >= 0:
            answered.append(prompt)
        if len(answered) == 9:
            up.clear()
        return None

    rows = responses(30)
    with serving(faults) as stub:
        one = judge(stub.url, attempts=2)
        with pytest.raises(JudgeError, match="20 times in a row .* run the same command again"):
            judge_responses(rows, one, PROMPTS, folder=tmp_path)
        kept = sum(len(p.read_text().splitlines()) for p in tmp_path.glob("*.jsonl"))
        assert kept == sum(stub.answered.values()) - stub.answered[PROBE] > 0
        answered.extend("-" * 1000)
        up.set()
        with open(next(tmp_path.glob("*.jsonl")), "a") as file:
            file.write('{"key": "half')  # as a kill leaves it
        found = judge_responses(rows, judge(stub.url), PROMPTS, folder=tmp_path)
        assert (found.n_kept, found.n_asked) == (kept, 60 - kept) and not found.failures
        assert {n for p, n in stub.answered.items() if p != PROBE} == {1} and len(stub.answered) == 61
        again = judge_responses(rows, judge(stub.url), PROMPTS, folder=tmp_path)
        assert (again.n_kept, again.n_asked, again.tokens_in) == (60, 0, 0)
    for name, letter in (("aligned", "A"), ("coherent", "C")):
        assert found.table[name].to_list() == pytest.approx(
            [true_score(f"{letter}? Q {r}") for r in rows["response"]]
        )
    assert again.table.equals(found.table)


def test_a_stop_keeps_what_was_under_way(tmp_path: Path) -> None:
    rows = responses(20)
    with serving() as stub:
        stub.delay = 0.05

        def stop(done: int, total: int) -> None:
            if done == 7 and threading.current_thread() is not threading.main_thread():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            judge_responses(rows, judge(stub.url, timeout=5.0), PROMPTS, folder=tmp_path, on_progress=stop)
        kept = len(next(tmp_path.glob("*.jsonl")).read_text().splitlines())
        assert kept == sum(n for p, n in stub.answered.items() if p != PROBE) >= 7
        judge_responses(rows, judge(stub.url, timeout=5.0), PROMPTS, folder=tmp_path)
        assert {n for p, n in stub.answered.items() if p != PROBE} == {1}


def test_failures_stay_missing_and_are_asked_again(tmp_path: Path) -> None:
    broken = {"A? Q answer 3"}
    with serving(lambda p, n: "500" if p in broken else None) as stub:
        first = judge_responses(responses(), judge(stub.url, attempts=2), PROMPTS, folder=tmp_path)
        assert first.failures == {"status 500": 1} and first.table["aligned"].null_count() == 1
        assert first.table["aligned_said"][3] == "no answer from the judge"
        broken.clear()
        second = judge_responses(responses(), judge(stub.url), PROMPTS, folder=tmp_path)
        assert (second.n_asked, second.n_kept) == (1, 23) and second.table["aligned"].null_count() == 0


def test_what_is_kept_beside_every_score(tmp_path: Path) -> None:
    rows = responses(3).with_columns(pl.Series("response", ["same", "same", ""]))
    own = {"q1": (JudgePrompt("aligned", "Mine? {answer}"),)}
    with serving() as stub:
        found = judge_responses(rows, judge(stub.url), PROMPTS, own, folder=tmp_path, price=Price(1.0, 10.0))
    assert (found.n_asked, found.tokens_in, found.tokens_out) == (3, 30, 6)  # the coherence of equal texts once
    assert found.cost == pytest.approx((30 * 1 + 6 * 10) / 1e6)
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {p.hash for p in (*PROMPTS, *own["q1"])}
    assert all(line["judge"] == "api:m" and line["settings"]["top_logprobs"] == 20 for line in lines)
    assert all(line["settings"]["base_url"] == stub.url and line["distribution"] for line in lines)
    assert found.table["aligned"][2] is None and found.table["aligned_said"][2] == "empty response"
    write_jsonl(tmp_path / "judged.jsonl", judged_rows(found.table))
    back = load_responses([tmp_path / "judged.jsonl"]).table
    assert back.drop("category").equals(found.table.drop("category").with_columns(back["n_words"]))
    (who,) = judges(back)
    assert who["id"] == "api:m" and who["reading"] == "weighted"
    assert who["prompts"] == {"aligned": [PROMPTS[0].hash, own["q1"][0].hash], "coherent": [PROMPTS[1].hash]}
    with pytest.raises(JudgeError, match="no judge prompt called 'coherent'"):
        judge_responses(rows, judge("http://127.0.0.1:1/v1", scoring="weighted"), PROMPTS[:1], folder=tmp_path)


def test_another_judge_prompt_or_setting_is_another_score(tmp_path: Path) -> None:
    with serving() as stub:
        judge_responses(responses(), judge(stub.url), PROMPTS, folder=tmp_path)
        other = (JudgePrompt("aligned", "Other? {answer}"), PROMPTS[1])
        assert judge_responses(responses(), judge(stub.url), other, folder=tmp_path).n_asked == 12
        assert judge_responses(responses(), judge(stub.url, seed=1), PROMPTS, folder=tmp_path).n_asked == 24
        assert judge_responses(responses(), judge(stub.url, concurrency=1), PROMPTS, folder=tmp_path).n_asked == 0
