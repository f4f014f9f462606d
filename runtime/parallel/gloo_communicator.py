"""Sums over ranks, and what one pipeline stage hands to the next, over a network: by torch's gloo."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from trtforge.runtime.parallel.communicator import Array, Communicator, GroupShape, flat
from trtforge.runtime.parallel.signals import PeerFailedError, PeerTimeoutError

_NO_LIMIT_S = 10**6  # a timeout there has to be
_MEETING_S = 60.0  # all ranks are told at once to come
_TAG = 0


def open_meeting(host: str) -> TCPStore:
    """Where the ranks of a group find each other: a server in the first rank, at `host` and a port that is
    free, for as long as the object lives."""
    return TCPStore(host, 0, None, True, _seconds(_MEETING_S), False)


class GlooCommunicator(Communicator):
    """One rank's part in a group whose ranks may be on several machines.

    Sums are made in gloo's order, all ranks get them from the one that has added them up. Anybody on the
    network who finds the ports can take part: it has to be a private one.
    """

    def __init__(
        self,
        shape: GroupShape,
        rank: int,
        *,
        own_host: str,
        meeting: tuple[str, int],
        timeout_s: float = 0.0,
    ) -> None:
        """Meets the other ranks, which have to make theirs at the same time. `own_host` is the address at
        which they reach this one, `meeting` host and port of `open_meeting`. Waits last `timeout_s` at most;
        0: for ever.
        """
        super().__init__(shape, rank)
        self._host, port = meeting
        self._timeout_s = timeout_s
        self._store = TCPStore(self._host, port, None, False, _seconds(_MEETING_S))
        peers = shape.peers(rank)
        with self._errors():
            self._all = self._make_group("all", own_host, rank, shape.num_ranks)
            name = f"stage{shape.pp_rank(rank)}"
            self._stage = self._make_group(name, own_host, rank - peers.start, len(peers))

    def _make_group(self, name: str, own_host: str, rank: int, size: int) -> Any:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # By default gloo listens where the machine's name leads, which may be the machine itself alone.
        options._devices = [ProcessGroupGloo.create_device(hostname=own_host)]
        options._timeout = _seconds(self._timeout_s or _NO_LIMIT_S)
        return ProcessGroupGloo(PrefixStore(name, self._store), rank, size, options)

    @property
    def host(self) -> str:
        """That of the meeting."""
        return self._host

    def all_reduce(self, source: Array, target: Array) -> None:
        """In float32, whatever the type is."""
        given, wanted = flat(source), flat(target)
        total = given.astype(np.float32)
        if len(total):
            with self._errors():
                self._stage.allreduce([torch.from_numpy(total)]).wait()
        wanted[:] = total

    def send(self, array: Array) -> None:
        """Returns when it is on its way."""
        data = np.require(flat(array).view(np.uint8), requirements="W")  # torch warns of what is not
        if len(data):
            with self._errors():
                self._all.send([torch.from_numpy(data)], self.rank + self.shape.tp_size, _TAG).wait()

    def receive(self, array: Array) -> None:
        """Another size than the one that was sent ends both ranks."""
        data = flat(array).view(np.uint8)
        if len(data):
            with self._errors():
                self._all.recv([torch.from_numpy(data)], self.rank - self.shape.tp_size, _TAG).wait()

    def barrier(self) -> None:
        """Of all stages."""
        with self._errors():
            self._all.barrier().wait()

    def fail(self) -> None:
        """The others see it when the connections end."""

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise PeerTimeoutError(
                    f"a rank that rank {self.rank} waited for did not come within {self._timeout_s:g} s"
                ) from error
            raise PeerFailedError(f"the group failed while rank {self.rank} waited: {error}") from error


def _seconds(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)
