"""Crew: the executor that spreads groups of prompts over Ray actors; work is pulled.

Every actor has a group that it works on and at most one that waits. A group's outcomes come back whole, or not at all:
where an actor dies, its group is done once more, by another; what waited is handed out again. A group that costs two
actors their life is recorded as failed.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, final

from resid_surgery.errors import RunError
from resid_surgery.experiments.actors import Actor, Parcel
from resid_surgery.experiments.executors import Group
from resid_surgery.experiments.on_ray import OnRay, brief, join, room
from resid_surgery.experiments.work import Outcome, Worker

CHANCES = 2
WAITING = 1
POLL_SECONDS = 0.2


@dataclass(eq=False)
class _Job:
    """A group, the numbers of it that are left out, and how many actors died of it."""

    group: Group
    skip: frozenset[int]
    deaths: int = 0


@dataclass(eq=False)
class _Hand:
    """An actor, what it was asked for, oldest first, and whether its model is open."""

    actor: Any
    asked: deque[tuple[Any, _Job | None]]

    @property
    def open(self) -> bool:
        return not self.asked or self.asked[0][1] is not None


def _jobs(hand: _Hand) -> list[_Job]:
    return [job for _, job in hand.asked if job is not None]


@final
class Crew:
    """The executor that spreads groups over Ray actors.

    Attributes:
        engine: where and how many. worker: of this process, which runs no forward.
    """

    def __init__(self, engine: OnRay, worker: Worker) -> None:
        import ray

        self.ray, self.engine, self.worker = ray, engine, worker
        self.hands: list[_Hand] = []
        self.jobs: deque[_Job] = deque()
        self.unopened = 0
        self._joined = False

    def outcomes(self, groups: Sequence[Group], skip: Collection[int]) -> Iterator[Outcome]:
        """As `Executor` says; the outcomes of a group come together.

        Raises:
            RunError: no cluster can be reached, none has room, or an actor cannot open the model.
        """
        self.jobs = deque(_Job(one, frozenset(n for n, _ in one) & frozenset(skip)) for one in groups)
        if not self.jobs:
            return
        self._joined = join(self.engine)
        self._want = self.worker.model.weights.contents(), version("resid-surgery")
        self._parcel = self.ray.put(Parcel.of(self.worker, self.engine.place, self.ray.cloudpickle))
        self._workers = self.engine.workers or max(1, room(self.engine))
        try:
            yield from self._work()
        finally:
            self._dismiss()

    def close(self) -> None:
        """Leave the cluster, if this run joined it; end it, if this run began it."""
        self._dismiss()
        if self._joined:
            self._joined = False
            self.ray.shutdown()

    def _dismiss(self) -> None:
        """End every actor at once; what they still work on is lost."""
        while self.hands:
            self.ray.kill(self.hands.pop().actor)

    def _work(self) -> Iterator[Outcome]:
        while self.jobs or any(job for hand in self.hands for _, job in hand.asked):
            self._hire()
            self._hand_out()
            first = {hand.asked[0][0]: hand for hand in self.hands if hand.asked}
            for ref in self.ray.wait(list(first), timeout=POLL_SECONDS)[0]:
                yield from self._take(first[ref])

    def _hire(self) -> None:
        """As many actors as are wanted and have something to do; each is asked to open the model."""
        busy = sum(1 for hand in self.hands if hand.open and hand.asked)
        while len(self.hands) < min(self._workers, busy + len(self.jobs)):
            if not self.hands and not room(self.engine):
                asked = f"{self.engine.num_cpus:g} CPUs and {self.engine.num_gpus:g} GPUs"
                raise RunError(f"no machine of the Ray cluster has {asked} for a worker: ask for less, or add one.")
            actor = self._actor()
            self.hands.append(_Hand(actor, deque([(actor.open.remote(self._parcel), None)])))

    def _actor(self) -> Any:
        env = dict(self.engine.runtime_env or {}) if not self._joined else {}
        threads = str(self.engine.threads)
        env["env_vars"] = dict(env.get("env_vars") or {}) | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        wanted = {"num_cpus": self.engine.num_cpus, "num_gpus": self.engine.num_gpus, "runtime_env": env}
        return self.ray.remote(Actor).options(max_restarts=0, **wanted).remote(self.engine.threads)

    def _hand_out(self) -> None:
        """A group for every actor that has none, then one that waits, as long as there are enough for all.

        A group that an actor died of has one to itself: the answer of a group can be lost with an actor that dies of
        the next one.
        """
        for waiting in range(WAITING + 1):
            for hand in self.hands:
                enough = len(self.jobs) >= (len(self.hands) if waiting else 1)
                if waiting and enough and any(job.deaths for job in (self.jobs[0], *_jobs(hand))):
                    continue
                if enough and hand.open and len(hand.asked) == waiting:
                    job = self.jobs.popleft()
                    hand.asked.append((hand.actor.run.remote(job.group, job.skip), job))

    def _take(self, hand: _Hand) -> Iterator[Outcome]:
        """What an actor answered first."""
        ref, job = hand.asked[0]
        try:
            found = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            if job is None:
                raise self._cannot_open(error.cause) from error
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            yield from self._lost(hand, error)
            return
        hand.asked.popleft()
        if job is None:
            self._require_same(*found)
            self.unopened = 0
        else:
            yield from found

    def _lost(self, hand: _Hand, error: Exception) -> Iterator[Outcome]:
        """Hand out again what a dead actor had; give up a group that two have died of."""
        self.hands.remove(hand)
        self.ray.kill(hand.actor)
        jobs = [job for _, job in hand.asked if job is not None]
        if not hand.open:
            self.unopened += 1
            if self.unopened >= CHANCES:
                raise self._cannot_open(error) from error
        elif jobs:
            jobs[0].deaths += 1
        self.jobs.extendleft(reversed([job for job in jobs if job.deaths < CHANCES]))
        for job in jobs:
            if job.deaths >= CHANCES:
                yield from self._given_up(job, error)

    def _given_up(self, job: _Job, error: Exception) -> Iterator[Outcome]:
        together = ", ".join(str(number) for number, _ in job.group)
        said = RunError(f"{CHANCES} workers died of the group of prompts {together}; Ray says: {brief(error)}")
        for number, case in job.group:
            if number not in job.skip:
                yield self.worker.failed(number, case, "worker", said)

    def _cannot_open(self, error: BaseException) -> RunError:
        name, what = self.worker.model.name, type(error).__name__
        return RunError(f"a Ray worker cannot open {name}: {what}: {brief(error)}")

    def _require_same(self, weights: str, release: str) -> None:
        if (weights, release) != self._want:
            raise RunError(
                f"a Ray worker opened another {self.worker.model.name} than this process holds: weights {weights} of "
                f"resid-surgery {release} there, {self._want[0]} of {self._want[1]} here. Every machine must have the "
                "same files and the same version."
            )
