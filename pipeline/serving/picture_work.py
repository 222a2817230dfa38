"""The pictures of running jobs: decoded one at a time in a thread, encoded together with those of other
jobs."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.serving.fair_queue import FairQueue
from pipeline.serving.pictures import Picture
from pipeline.serving.running import Running
from vico.inference.picture_encoding import PendingPicture, PictureCache, encode_batch
from vico.model.internvl import VicoModel
from vico.tiling import Tiling, pixel_values

_MAX_DECODED = 2
"""Pictures whose pixels are in memory at once: while some are encoded, the next is decoded."""


@dataclass(frozen=True, eq=False)
class _Undecoded:
    """One picture of a job, by its number."""

    running: Running
    number: int

    @property
    def client(self) -> str:
        return self.running.job.client

    @property
    def is_over(self) -> bool:
        return self.running.job.is_over


class PictureWork:
    """Decodes and encodes pictures, those of a client in the order of `add`, one of each client in turn.

    Only `wake` is called from another thread.

    Equal pictures at the same tiling are encoded once, as long as the cache has room.
    """

    def __init__(self, model: VicoModel, cache_bytes: int, wake: Callable[[], object]):
        self._model, self._wake = model, wake
        self.cache = PictureCache(cache_bytes)
        self._todo: FairQueue[_Undecoded] = FairQueue()
        self._decoding: deque[tuple[Running, int, Future[np.ndarray]]] = deque()
        self._pending: list[tuple[Running, int, PendingPicture]] = []
        self._failures: list[tuple[Running, BaseException]] = []
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    def add(self, running: Running) -> None:
        """Take on the pictures of a job."""
        pictures = running.job.chat.pictures
        running.pictures = [None] * len(pictures)
        for number in range(len(pictures)):
            self._todo.put(_Undecoded(running, number))

    def forget(self, running: Running) -> None:
        """Drop what was decoded for a job that ended; what was not is over with the job."""
        self._pending = [entry for entry in self._pending if entry[0] is not running]

    def take_failures(self) -> list[tuple[Running, BaseException]]:
        """Return the jobs with a picture that does not decode, each once, with the error."""
        failures = {id(running): (running, error) for running, error in reversed(self._failures)}
        self._failures = []
        return list(failures.values())

    def work(self) -> bool:
        """Take decoded pictures, run one pass of the vision tower, start to decode more.

        Return whether there was a pass.
        """
        while self._decoding and self._decoding[0][2].done():
            running, number, future = self._decoding.popleft()
            error = future.exception()
            if running.job.is_over:
                continue
            if error is not None:
                self._failures.append((running, error))
            else:
                self._pending.append((running, number, PendingPicture(future.result())))
        self._start_decoding()
        encode_batch(self._model, [picture for _, _, picture in self._pending])
        worked = bool(self._pending)
        for running, number, picture in [entry for entry in self._pending if entry[2].is_complete]:
            encoded = picture.encoded()
            running.pictures[number] = encoded
            self.cache.put(running.picture_key(number), encoded)
        self._pending = [entry for entry in self._pending if not entry[2].is_complete]
        return worked

    def close(self) -> None:
        self._decoder.shutdown(cancel_futures=True)

    def _start_decoding(self) -> None:
        while (undecoded := self._todo.first()) is not None:
            running, number = undecoded.running, undecoded.number
            cached = self.cache.get(running.picture_key(number))
            if cached is not None:
                running.pictures[number] = cached
            elif len(self._decoding) + len(self._pending) < _MAX_DECODED:
                picture, tiling = running.job.chat.pictures[number], running.job.prompt.tilings[number]
                future = self._decoder.submit(_pixels, picture, tiling)
                future.add_done_callback(lambda _: self._wake())
                self._decoding.append((running, number, future))
            else:
                return
            self._todo.pop()


def _pixels(picture: Picture, tiling: Tiling) -> np.ndarray:
    return pixel_values(picture.decoded(), tiling)
