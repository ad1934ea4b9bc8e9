"""What the processes of a run tell each other outside its steps, so that they decide alike and end together.

It goes through the coordination service of `jax.distributed`, not through the devices: it takes any JSON, needs no
compiled program, and waits as long as it is told to.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparse_lm.errors import RunFailed, UserError, one_line

log = logging.getLogger("sparse_lm")

JOINED_WITHIN = 300  # seconds
TIMEOUT = 3600.0  # seconds; longer than any process does without the others; one that is gone is noticed by `peers`

_numbers = itertools.count()


def join_processes(distributed: bool, coordinator: str, processes: int, process: int) -> None:
    """Joins the other processes; must run before jax starts its devices.

    Args:
        distributed: they find each other (Cloud TPU, Slurm).
        coordinator: HOST:PORT of process 0, where they do not; "": they do, or this one is alone.
        processes: how many there are, with a coordinator.
        process: which one this is.

    Raises `UserError` for what can't be, and where the others are not found.
    """
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT, as 10.0.0.1:8476")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process} and --processes {processes}; they are numbered from 0")
    if not coordinator and processes > 1:
        raise UserError(f"--processes is {processes}; it needs --coordinator=HOST:PORT, where process 0 is found")
    try:
        if coordinator:
            log.info("process %d of %d waits for the others, %s", process, processes, coordinator)
            jax.distributed.initialize(coordinator, processes, process, initialization_timeout=JOINED_WITHIN)
        elif distributed:
            jax.distributed.initialize(initialization_timeout=JOINED_WITHIN)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the other processes are not found ({one_line(error)}); see --coordinator") from error


def exchange(what: str, value: Any, timeout: float = TIMEOUT) -> list[Any]:
    """The JSON-able values that all processes give, in the order of the processes, in each of them.

    Every process calls it at the same point. Raises `RunFailed` where one does not answer within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return [value]
    client, key = ocp.multihost.get_jax_distributed_client(), f"sparse_lm/{next(_numbers)}/{what}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_wait_for(client, f"{key}/{i}", i, what, timeout)) for i in range(jax.process_count())]


def ask_primary(what: str, ask: Callable[[], Any]) -> Any:
    """What `ask` gives in the first process, the only one to call it, in every process: what that one sees of a folder
    is what holds."""
    return exchange(what, ask() if jax.process_index() == 0 else None)[0]


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """What raises in the block in one process raises in all at its end: there as it is, elsewhere on one line."""
    fault, user, raised = "", False, None
    try:
        yield
    except Exception as error:
        fault = one_line(error, longest=None)
        user, raised = isinstance(error, UserError), error
    faults = exchange(what, [fault, user])
    if raised is not None:
        raise raised
    for number, (fault, user) in enumerate(faults):
        if fault:
            raise UserError(fault) if user else RunFailed(f"{what}: process {number} failed: {fault}")


def _wait_for(client: Any, key: str, number: int, what: str, timeout: float) -> str:
    try:
        return client.blocking_key_value_get(key, int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise RunFailed(f"{what}: process {number} does not answer ({one_line(error)})") from error
