"""Waiting jobs: first in, first out for each client, and the clients take turns."""

from collections import deque
from dataclasses import dataclass, field

from pipeline.serving.job import Job


@dataclass
class FairQueue:
    """Waiting jobs. A client with many of them delays the next job of another by at most one of its own."""

    _clients: dict[str, deque[Job]] = field(default_factory=dict)
    """In the order in which it is their turn; none without a job."""

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._clients.values())

    def put(self, job: Job) -> None:
        self._clients.setdefault(job.client, deque()).append(job)

    def remove(self, job: Job) -> None:
        """Remove a job, if it is there."""
        jobs = self._clients.get(job.client)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._clients[job.client]

    def first(self) -> Job | None:
        """Return the job whose turn it is; drop those before it that are over."""
        while self._clients:
            client, jobs = next(iter(self._clients.items()))
            while jobs and jobs[0].is_over:
                jobs.popleft()
            if jobs:
                return jobs[0]
            del self._clients[client]
        return None

    def pop(self) -> None:
        """Remove the job that `first` returned; it is then the next client's turn."""
        client, jobs = next(iter(self._clients.items()))
        jobs.popleft()
        del self._clients[client]
        if jobs:
            self._clients[client] = jobs

    def take_all(self) -> list[Job]:
        """Remove and return all jobs."""
        jobs = [job for waiting in self._clients.values() for job in waiting]
        self._clients.clear()
        return jobs
