"""Reading in grain's worker processes, in the order of the elements, so that what comes out depends on no schedule.

What stays of our own is what grain leaves open: workers that end with a parent that was killed, signals that the parent
alone answers, one line for a worker that died, and results sent through pipes (grain's usual way is shared memory, of
which a container has 64 MB, and which outlives a killed run).
"""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from queue import Empty
from typing import Any

import grain
from absl import flags

from scaling_perception.support.errors import UserError

# What is read ahead is in the queue of a thread or worker. grain's pool of reading threads, its default, took 1.4 times
# the processor time for latents.
_ALONE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


_ANSWERED = (signal.SIGINT, signal.SIGTERM)  # they reach the whole group: the parent alone answers them


def _start(index: int, count: int) -> None:
    """What each worker does first."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # grain imports JAX: the accelerator is the parent's
    for number in _ANSWERED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    Finalize(None, _leave, exitpriority=1000)


def _leave() -> None:
    # A worker that is asked to stop ends without a flush: its queue would wait for a parent that no longer reads. But
    # the parent, which empties the queue, would wait for ever for the rest of a message of which a part is written.
    queues: list[Any] = [one for one in gc.get_objects() if isinstance(one, Queue)]
    for queue in queues:
        if getattr(queue, "_thread", None) is None:  # this worker writes nothing to it
            continue
        queue._buffer.clear()
        while not queue._wlock.acquire(timeout=0.1):  # held while a message is written
            with contextlib.suppress(Empty):
                queue.get_nowait()  # nobody else reads
    os._exit(1)


def _follow_parent() -> None:
    # Queues keep a worker waiting for ever when its parent is killed: end with it instead.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def spread(elements: grain.MapDataset, workers: int, ahead: int) -> grain.IterDataset:
    """The elements in their order, made in ``workers`` processes, or in a thread where that is 0 or 1.

    Of processes each is at most twice ``ahead`` elements further than what is taken, and dataset and elements must
    pickle.
    """
    if workers <= 1:
        return in_thread(elements.to_iter_dataset(_ALONE), ahead)
    if not flags.FLAGS.is_parsed():  # grain reads absl's flags, of which this program has none
        flags.FLAGS.mark_as_parsed()
    piped = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    dataset = grain.experimental.WithOptionsIterDataset(elements.to_iter_dataset(_ALONE), piped)
    return dataset.mp_prefetch(grain.MultiprocessingOptions(workers, ahead), _start)


def in_thread(dataset: grain.IterDataset, ahead: int) -> grain.IterDataset:
    """A dataset that a thread reads, ``ahead`` elements further than what is taken."""
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=ahead)


class Reading(grain.DatasetIterator):
    """``then`` of each element of a dataset, or of what reads one.

    ``close`` ends the threads and processes behind it, also while another thread waits for an element.

    Raises:
        UserError: a worker process died. Whatever the dataset itself raises is passed on.
    """

    def __init__(self, source: grain.IterDataset | grain.DatasetIterator, then: Callable[[Any], Any] | None = None):
        super().__init__(iter(source))
        self._then = then
        if isinstance(source, grain.IterDataset):
            starting = threading.Thread(target=_begin, args=(self._parent,))
            starting.start()
            starting.join()

    def __next__(self) -> Any:
        try:
            element = next(self._parent)
            return element if self._then is None else self._then(element)
        except RuntimeError as error:
            if not str(error).startswith("Worker process was terminated"):
                raise
            raise UserError(
                "a worker process ended early (out of memory, or a script without `if __name__ == '__main__'`): "
                "use fewer workers, or 0 to work in one process"
            ) from None

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


def _begin(iterator: grain.DatasetIterator) -> None:
    """Start reading ahead, in a thread of its own, whose workers inherit that interrupts are held back."""
    iterator.get_state()  # makes what starts below; multiprocessing lifts the mask meanwhile
    signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED)
    iterator.start_prefetch()


class Made:
    """``make(*args)``, made when the first job comes: once in each process."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
        self._made_of, self._work = (make, args), None

    def __reduce__(self) -> tuple[Any, ...]:
        return Made, self._made_of

    def __call__(self, job: Any) -> Any:
        if self._work is None:
            make, args = self._made_of
            self._work = make(*args)
        return self._work(job)


def ordered_map(
    make: Callable[..., Callable[[Any], Any]],
    args: tuple[Any, ...],
    jobs: Iterable[Any],
    workers: int,
    ahead: int = 4,
) -> Generator[Any, None, None]:
    """Yield ``make(*args)(job)``, never None, for each job, in order.

    ``make`` runs once in each process and may be slow (it opens a dataset). With ``workers`` of 0 or 1 all happens in
    this process, else in that many others; then ``make``, its arguments, jobs and results must pickle, and each process
    is at most twice ``ahead`` jobs further than what was taken.

    Raises:
        UserError: a worker process died. Whatever the work itself raises is passed on.
    """
    work = Made(make, args)
    if workers <= 1:
        yield from map(work, jobs)
        return
    results = Reading(spread(grain.MapDataset.source(list(jobs)).map(work), workers, ahead))
    try:
        yield from results
    finally:
        results.close()


def default_workers() -> int:
    """Processes to use when nobody says: the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
