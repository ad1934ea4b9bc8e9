"""What the processes of a run tell each other outside its steps, so that they decide alike and end together.

It goes through the coordination service of `jax.distributed`, not through the devices: it takes any JSON, needs no
compiled program, and waits as long as it is told to.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparse_lm.errors import RunFailed, UserError

TIMEOUT = 600.0  # seconds; longer than any process does without the others (waiting for a claim to lapse: 180 s)

_numbers = itertools.count()


def exchange(what: str, value: Any, timeout: float = TIMEOUT) -> list[Any]:
    """The JSON-able values that all processes give, in the order of the processes, in each of them.

    Every process calls it at the same point. Raises `RunFailed` where one does not answer within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return [value]
    client, key = ocp.multihost.get_jax_distributed_client(), f"sparse_lm/{next(_numbers)}/{what}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_wait_for(client, f"{key}/{i}", i, what, timeout)) for i in range(jax.process_count())]


def ask_primary(what: str, value: Any) -> Any:
    """The first process's value, in every process: what it sees of a folder is what holds."""
    return exchange(what, value)[0]


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """What raises in the block in one process raises in all at its end: there as it is, elsewhere on one line."""
    fault, user, raised = "", False, None
    try:
        yield
    except Exception as error:
        fault = " ".join(str(error).split()) or type(error).__name__
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
        raise RunFailed(f"{what}: process {number} does not answer ({' '.join(str(error).split())[:200]})") from error
