"""The worker: sessions take turns on one model without meeting; closing, failing and cancelling stay with one job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from steering_setup import PROMPTS, direction, hooks, lora

from core.errors import MicroscopeError, ModelError
from core.model import worker as workers
from core.model.dice import Sampling
from core.model.generation import Generation
from core.model.interventions import AddDirection, ApplyLora
from core.model.loading import LoadedModel
from core.model.rows import Row
from core.model.worker import Worker

Tiny = Callable[[str], LoadedModel]


@pytest.fixture
def made(tiny_model: Tiny) -> Iterator[tuple[Worker, LoadedModel]]:
    loaded = tiny_model("qwen2")
    before = hooks(loaded)
    worker = Worker(lambda: loaded, at_once=2)
    yield worker, loaded
    worker.close(30)
    assert not worker._thread.is_alive() and hooks(loaded) == before


def steering(loaded: LoadedModel, strength: float, n: int = 12) -> list[Row]:
    d = direction(loaded)
    sampling = Sampling(max_new_tokens=n)
    return [
        Row(PROMPTS[1], (AddDirection(d, strength),), 3, sampling),
        Row("Why?", (ApplyLora(lora(loaded)),), 4, sampling),
    ]


def said(job_or_generation) -> list[list[int]]:
    return [answer.ids.tolist() for answer in job_or_generation.snapshot().answers]


def blocking(gate: threading.Event, started: threading.Event | None = None):
    """Work that holds the model's thread until the gate opens, then takes two turns more."""

    def work(loaded: LoadedModel) -> Iterator[str]:
        if started:
            started.set()
        gate.wait(30)
        yield "one"
        yield "two"

    return work


def test_two_threads_steering_oppositely_get_what_each_gets_alone(made: tuple[Worker, LoadedModel]) -> None:
    worker, loaded = made
    alone = {s: said(g) for s in (2.0, -2.0) for g in [Generation(loaded, steering(loaded, s))] if g.run()}
    assert alone[2.0][0] != alone[-2.0][0]
    found: dict[float, list] = {}

    def session(strength: float) -> None:
        jobs = [worker.generate(steering(loaded, strength), owner=str(strength)) for _ in range(3)]
        assert all(job.wait(60) for job in jobs)
        found[strength] = [said(job) for job in jobs]

    threads = [threading.Thread(target=session, args=(s,)) for s in (2.0, -2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {s: [alone[s]] * 3 for s in (2.0, -2.0)}


def test_jobs_take_turns_token_by_token(tiny_model: Tiny) -> None:
    worker = Worker(lambda: tiny_model("qwen2"), at_once=3)
    seen: list[str] = []
    gate, started = threading.Event(), threading.Event()
    hold = worker.run(blocking(gate, started))

    def counting(name: str):
        def work(_: LoadedModel) -> Iterator[None]:
            for _ in range(4):
                seen.append(name)
                yield

        return work

    assert started.wait(30)
    jobs = [worker.run(counting(name), owner=name) for name in "ab"]
    gate.set()
    assert all(job.wait(30) for job in (hold, *jobs)) and hold.latest == "two"
    assert "".join(seen) == "abababab" and [job.state for job in jobs] == ["finished"] * 2
    worker.close(30)


def test_who_waits_sees_how_many_are_ahead_and_no_owner_takes_every_place(made: tuple[Worker, LoadedModel]) -> None:
    worker, _ = made
    gate, started = threading.Event(), threading.Event()
    first = worker.run(blocking(gate, started), owner="greedy")
    assert started.wait(30)
    more = [worker.run(blocking(gate), owner="greedy") for _ in range(3)]
    other = worker.run(blocking(gate), owner="other")
    assert [job.ahead for job in (first, *more, other)] == [0, 0, 1, 2, 3]
    assert (worker.status().n_running, worker.status().n_waiting, worker.status().loaded) == (1, 4, True)
    assert [job.state for job in (first, *more, other)] == ["running"] + ["waiting"] * 4
    more[1].cancel()
    assert more[1].state == "cancelled" and more[1].over and other.ahead == 2
    order: list[str] = []
    for job in (more[0], other):
        job._over.set = lambda job=job, own=job._over.set: (order.append(job.owner), own())
    gate.set()
    assert other.wait(30) and more[2].wait(30)
    assert order[0] == "other", "the place goes to the owner with the fewest jobs on their way"


def test_a_failing_job_fails_alone(made: tuple[Worker, LoadedModel]) -> None:
    worker, loaded = made
    good = worker.generate(steering(loaded, 1.0))

    def broken(error: Exception):
        def work(model: LoadedModel) -> Iterator[None]:
            yield
            raise error

        return work

    jobs = [worker.run(broken(RuntimeError("out of memory\nmore"))), worker.run(broken(MicroscopeError("A sentence.")))]
    empty = worker.generate([])
    assert all(job.wait(30) for job in (good, *jobs, empty))
    assert [job.error for job in jobs] == ["The model failed: out of memory.", "A sentence."]
    assert empty.state == "failed" and "no row" in empty.error and empty.snapshot() is None
    assert (
        good.state == "finished"
        and not good.error
        and {a.stopped for a in good.snapshot().answers} <= {"end", "length"}
    )


def test_a_closed_tab_and_a_cancelled_owner_free_their_jobs(
    made: tuple[Worker, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, loaded = made
    monkeypatch.setattr(workers, "LOOK", 0.0)
    tab_open = threading.Event()
    tab_open.set()
    long = steering(loaded, 0.1, 400)
    job = worker.generate(long, owner="a", alive=tab_open.is_set)
    while not (job.snapshot() and job.snapshot().n_tokens > 4):
        assert not job.wait(0.01)
    tab_open.clear()
    assert job.wait(30) and job.state == "cancelled"
    assert "cancelled" in {answer.stopped for answer in job.snapshot().answers}
    one, two = worker.generate(long, owner="b"), worker.generate(steering(loaded, 0.5), owner="c")
    worker.cancel_owner("b")
    assert one.wait(30) and one.state == "cancelled"
    assert two.wait(30) and two.state == "finished"


def test_one_row_can_be_stopped(made: tuple[Worker, LoadedModel]) -> None:
    worker, loaded = made
    job = worker.generate([Row(PROMPTS[1], (), s, Sampling(max_new_tokens=300)) for s in (1, 2)])
    while not (job.snapshot() and job.snapshot().n_tokens > 4):
        assert not job.wait(0.01)
    job.cancel_row(0)
    job.wait(60)
    assert job.snapshot().answers[0].stopped == "cancelled" and job.snapshot().answers[1].stopped in ("end", "length")


def test_a_model_that_does_not_load_is_a_sentence_and_is_tried_again() -> None:
    calls: list[int] = []

    def load() -> LoadedModel:
        calls.append(1)
        raise ModelError("The model is not here; fetch it.")

    worker = Worker(load)
    jobs = [worker.generate([Row("Why?")]) for _ in range(2)]
    assert all(job.wait(30) for job in jobs) and {job.error for job in jobs} == {"The model is not here; fetch it."}
    assert len(calls) == 2 and not worker.status().loaded
    worker.close(30)
    with pytest.raises(MicroscopeError, match="closed"):
        worker.generate([Row("Why?")])
