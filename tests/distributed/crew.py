"""Real processes with gloo between them, which stay from test to test."""

from __future__ import annotations

import queue
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

_LIMIT = 120  # seconds that a call may take


def _serve(rank: int, number: int, port: int, limit: int, calls: Any, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timedelta(seconds=limit), rank=rank, world_size=number)
    while (call := calls.get()) is not None:
        function, arguments = call
        torch.manual_seed(0)
        try:
            results.put((rank, function(*arguments), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Crew:
    """Some processes that run a function together, each with its rank.

    Args:
        number: of processes.
        limit: seconds that a collective may take.
    """

    def __init__(self, number: int, limit: int = 20) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self._results = context.Queue()
        self._calls = [context.Queue() for _ in range(number)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = [
            context.Process(target=_serve, args=(rank, number, port, limit, calls, self._results), daemon=True)
            for rank, calls in enumerate(self._calls)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a module in all processes.

        Args:
            function: called with the arguments.
            *arguments: the same for all.

        Returns:
            What it returned, by rank.

        Raises:
            AssertionError: it raised something in a process, or did not return.
        """
        for calls in self._calls:
            calls.put((function, arguments))
        found: dict[int, Any] = {}
        errors = []
        for _ in range(self.number):
            try:
                rank, result, error = self._results.get(timeout=_LIMIT)
            except queue.Empty:
                raise AssertionError(f"only {sorted(found)} of {self.number} processes returned") from None
            found[rank] = result
            errors += [f"process {rank}:\n{error}"] if error else []
        assert not errors, "\n".join(errors)
        return [found[rank] for rank in range(self.number)]

    def stop(self) -> None:
        """End the processes."""
        for calls in self._calls:
            calls.put(None)
        for process in self._processes:
            process.join(2)
            process.kill()
