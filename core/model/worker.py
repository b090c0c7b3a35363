"""One thread that owns the model: jobs of several sessions take turns on it, one token (or one piece of work) each.

    worker = Worker(lambda: load_model(spec))             once a process; the model loads with the first job
    job = worker.generate(rows, owner=session, alive=is_open)              returns at once
    job.snapshot()                                        how far it has come, from any thread; None before it starts
    job.state, job.ahead, worker.status()                 waiting behind how many others
    job.cancel(); worker.cancel_owner(session)            frees the job before its next turn

Each generation has its own KV cache, dice and interventions, and its hooks are on the model only during its own turn,
so no session can see or disturb another's. A job whose `alive` says no (a closed browser tab) is cancelled; a job that
fails ends alone, with its `error`. `at_once` jobs are on their way together, the rest wait; when a place is free it
goes to the owner with the fewest jobs on their way.

`run` gives the model to other work that yields between its pieces (a measure, a sweep). While a worker is there,
nothing else may run or hook its model. Knows no browser.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from core.errors import MicroscopeError
from core.model.generation import Generation
from core.model.loading import LoadedModel
from core.model.probes import Probe
from core.model.rows import Row, Snapshot

State = Literal["waiting", "running", "finished", "cancelled", "failed"]

Work = Callable[[LoadedModel], Iterator[object]]
"""Starts with the model, yields after each turn; what it yields last is the job's `latest`."""

#: Seconds between two looks at whether a job's owner is still there.
LOOK = 1.0


@dataclass(frozen=True)
class Status:
    """How busy the worker is."""

    n_running: int
    n_waiting: int
    loaded: bool
    """Whether the model is in memory."""


class Job:
    """Work that was handed to a worker. Everything here may be called from any thread."""

    def __init__(self, worker: Worker, work: Work, owner: str, alive: Callable[[], bool]) -> None:
        self.owner = owner
        self.state: State = "waiting"
        self.error = ""
        """A sentence when it failed; else empty."""
        self.latest: object = None
        self._worker, self._work, self._alive = worker, work, alive
        self._turns: Iterator[object] | None = None
        self._generation: Generation | None = None
        self._cancelled, self._looked = False, time.monotonic()
        self._over = threading.Event()

    @property
    def over(self) -> bool:
        """Whether it will not go on: finished, cancelled or failed."""
        return self._over.is_set()

    @property
    def ahead(self) -> int:
        """How many jobs wait before it; 0 once it runs."""
        return self._worker._ahead(self)

    def snapshot(self) -> Snapshot | None:
        """How far a generation has come; None before it starts."""
        return self._generation.snapshot() if self._generation else None

    def cancel(self) -> None:
        """Stop before the next turn."""
        self._worker._cancel([self])

    def cancel_row(self, row: int) -> None:
        """Stop one row of a generation before its next token; the others go on."""
        if self._generation:
            self._generation.cancel(row)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is over; whether it is."""
        return self._over.wait(seconds)


class Worker:
    """Owns a model in a thread of its own."""

    def __init__(self, load: Callable[[], LoadedModel], *, at_once: int = 4) -> None:
        """load: called in the worker's thread, before the first job."""
        self._load, self._at_once = load, at_once
        self._loaded: LoadedModel | None = None
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)
        self._thread.start()

    def generate(
        self,
        rows: Sequence[Row],
        *,
        owner: str = "",
        alive: Callable[[], bool] = lambda: True,
        probes: Sequence[Probe] | None = None,
        lora_scalars: bool = False,
    ) -> Job:
        """Start a generation of `rows` (core.model.generation); returns at once."""

        def work(loaded: LoadedModel) -> Iterator[object]:
            generation = Generation(loaded, rows, probes=probes, lora_scalars=lora_scalars)
            job._generation = generation
            try:
                while generation.step():
                    yield None
            finally:
                generation.cancel()  # rows that still run when the job is given up say so
                generation.step()

        job = Job(self, work, owner, alive)
        return self._submit(job)

    def run(self, work: Work, *, owner: str = "", alive: Callable[[], bool] = lambda: True) -> Job:
        """Give the model to `work`, one turn at a time; returns at once."""
        return self._submit(Job(self, work, owner, alive))

    def cancel_owner(self, owner: str) -> None:
        """Stop all jobs of `owner`."""
        with self._changed:
            jobs = [job for job in (*self._running, *self._waiting) if job.owner == owner]
        self._cancel(jobs)

    def status(self) -> Status:
        with self._changed:
            return Status(len(self._running), len(self._waiting), self._loaded is not None)

    def close(self, seconds: float | None = None) -> None:
        """Cancel everything, let the model go and wait for the thread to end."""
        with self._changed:
            self._closed = True
            for job in (*self._running, *self._waiting):
                job._cancelled = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _submit(self, job: Job) -> Job:
        with self._changed:
            if self._closed:
                raise MicroscopeError("The model's worker was closed; start another.")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def _ahead(self, job: Job) -> int:
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else 0

    def _cancel(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in jobs:
                job._cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)
                    _end(job, "cancelled")
            self._changed.notify_all()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                self._admit()
                turns = list(self._running)
            for job in turns:
                self._turn(job)
            with self._changed:
                self._running = [job for job in self._running if not job.over]
        for job in (*self._running, *self._waiting):
            self._turn(job)
        with self._changed:
            self._running, self._waiting, self._loaded = [], [], None

    def _admit(self) -> None:
        """Fill the free places, each with the first waiting job of the owner who has the fewest on their way."""
        while self._waiting and len(self._running) < self._at_once:
            owners = [job.owner for job in self._running]
            job = min(self._waiting, key=lambda job: owners.count(job.owner))
            self._waiting.remove(job)
            self._running.append(job)

    def _turn(self, job: Job) -> None:
        """One turn of a job; whatever it raises is its own."""
        try:
            if job._cancelled or not _is_alive(job):
                if job._turns is not None:
                    job._turns.close()
                _end(job, "cancelled")
                return
            if job._turns is None:
                if self._loaded is None:
                    self._loaded = self._load()
                job.state = "running"
                job._turns = iter(job._work(self._loaded))
            try:
                job.latest = next(job._turns)
            except StopIteration:
                _end(job, "finished")
        except MicroscopeError as error:
            _end(job, "failed", str(error))
        except Exception as error:  # a job's own failure must not end the others
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _end(job, "failed", f"The model failed: {first.rstrip('.')}.")


def _is_alive(job: Job) -> bool:
    now = time.monotonic()
    if now - job._looked < LOOK:
        return True
    job._looked = now
    return job._alive()


def _end(job: Job, state: State, error: str = "") -> None:
    job.state, job.error = state, error
    job._turns = None
    job._over.set()
