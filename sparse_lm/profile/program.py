"""Finds the part of the model that each instruction of a compiled program belongs to, and the bytes it moves.

The model and the step name their parts by `jax.named_scope`. Differentiation and compilation keep the names in each
instruction's metadata: op_name="jit(step)/transpose(jvp(attention))/dot_general" is a product in the backward pass of
attention.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

PARTS = (
    "embedding", "attention", "feed_forward", "router", "dispatch", "experts", "combine", "output", "optimizer"
)  # fmt: skip
REST = "rest"
FREE = "parameter constant tuple get-tuple-element bitcast while conditional call after-all".split()
SLICING = ("dynamic-slice", "slice", "gather")


class Scope(NamedTuple):
    """The part of the model that an instruction belongs to, in the forward or the backward pass."""

    part: str  # one of PARTS, or REST
    backward: bool


@dataclass(frozen=True, eq=False)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[tuple[float, int], ...]  # (bytes per element, elements) of each array of its result
    arguments: str  # the text after the opcode
    root: bool
    operands: tuple["Instruction", ...] = ()
    called: tuple["Computation", ...] = ()

    @property
    def bytes(self) -> float:
        return sum(width * size for width, size in self.arrays)

    @property
    def elements(self) -> int:
        return sum(size for _, size in self.arrays)

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.arguments)
        return match[1] if match else ""

    @property
    def trip_count(self) -> int:
        """How often a loop runs; 1 if the compiler does not know it."""
        match = re.search(r'known_trip_count":\{"n":"(\d+)"', self.arguments)
        return int(match[1]) if match else 1


@dataclass
class Computation:
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def find_users(self, operand: Instruction) -> list[Instruction]:
        return [i for i in self.instructions.values() if operand in i.operands]


@dataclass(frozen=True)
class Program:
    scopes: dict[str, Scope]  # of each instruction, by its name
    bytes: dict[Scope, float]  # that the instructions of a scope move, per run of the program on one device


def read_program(text: str) -> Program:
    """Reads the text of `jax.stages.Compiled.as_text`.

    Bytes are those of each instruction's operands and results: an upper bound without caches. Only the slices of an
    operand that is sliced count, only the update of a result that is updated in place, and all iterations of a loop.
    """
    computations, entry = parse_computations(text)
    scopes: dict[str, Scope] = {}
    for computation in computations.values():
        scopes |= _assign_scopes(computation)
    moved: dict[Scope, float] = defaultdict(float)

    def count(computation: Computation, times: int) -> None:
        for instruction in computation.instructions.values():
            if instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
                moved[scopes[instruction.name]] += times * memory_traffic(instruction)
            if instruction.opcode in ("while", "conditional", "call"):
                for called in instruction.called:
                    count(called, times * instruction.trip_count)

    count(entry, 1)
    return Program(scopes, dict(moved))


def parse_computations(text: str) -> tuple[dict[str, Computation], Computation]:
    """Parses the computations of a module by name, and its entry."""
    computations: dict[str, Computation] = {}
    entry = current = Computation()
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = computations[match[2]] = Computation()
            entry = current if match[1] else entry
        elif match := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*?)(?<=[\])}]) ([a-z][\w-]*)\((.*)", line):
            root, name, result, opcode, arguments = match.groups()
            operands = re.findall(r"%([\w.-]+)", arguments.split("), ", 1)[0])
            references = re.findall(r"%([\w.-]+)", arguments)
            current.instructions[name] = Instruction(
                name,
                opcode,
                tuple(_parse_array(*array) for array in re.findall(r"(pred|[a-z]+\d\w*)\[([\d,]*)\]", result)),
                arguments,
                bool(root),
                tuple(current.instructions[n] for n in operands if n in current.instructions),
                tuple(computations[n] for n in references if n in computations),
            )
    return computations, entry


def _parse_array(dtype: str, shape: str) -> tuple[float, int]:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return bits / 8, math.prod(int(size) for size in shape.split(",") if size)


def _assign_scopes(computation: Computation) -> dict[str, Scope]:
    """Finds the scope of each instruction. One that the compiler added, such as a copy, gets that of its first user or
    operand with a scope."""
    scopes = {name: _vote_scope(instruction) for name, instruction in computation.instructions.items()}
    users = defaultdict(list)
    for instruction in computation.instructions.values():
        for operand in instruction.operands:
            users[operand.name].append(instruction.name)
    for name in reversed(computation.instructions):
        scopes[name] = scopes[name] or next((scopes[user] for user in users[name] if scopes[user]), None)
    for name, instruction in computation.instructions.items():
        scopes[name] = scopes[name] or next((scopes[o.name] for o in instruction.operands if scopes[o.name]), None)
    return {name: scope or Scope(REST, False) for name, scope in scopes.items()}


def _vote_scope(instruction: Instruction) -> Scope | None:
    """Finds the scope of most of the work in an instruction. The op_name of a fusion is only that of its last one."""
    votes: Counter[Scope] = Counter()

    def count_vote(part: Instruction) -> None:
        if scope := parse_scope(part.op_name):
            votes[scope] += _estimate_work(part)
        for called in part.called:
            for inner in called.instructions.values():
                count_vote(inner)

    count_vote(instruction)
    return votes.most_common(1)[0][0] if votes else None


def parse_scope(op_name: str) -> Scope | None:
    """Finds the innermost part in an op_name; REST if there is none, None for an op_name that is no path of scopes."""
    if "/" not in op_name:
        return None
    words = re.split(r"[/();]+", op_name)
    return Scope(next((w for w in reversed(words) if w in PARTS), REST), "transpose(" in op_name)


def _estimate_work(instruction: Instruction) -> float:
    """Estimates work in proportion to FLOPs; never 0, so that every instruction has a vote."""
    operands = instruction.operands
    if instruction.opcode in ("dot", "ragged-dot", "convolution") and len(operands) > 1:
        return math.sqrt(operands[0].elements * operands[1].elements * instruction.elements)
    if instruction.opcode in FREE or instruction.called:
        return 1e-3
    return instruction.elements


def memory_traffic(instruction: Instruction) -> float:
    """Counts the bytes that one run of an instruction reads and writes."""
    fused = instruction.called[0] if instruction.opcode == "fusion" and instruction.called else None
    if fused is None:
        reads = sum(_bytes_read(o, [instruction]) for o in instruction.operands)
        return reads + _bytes_written(instruction)
    parameters = [i for i in fused.instructions.values() if i.opcode == "parameter"]
    return sum(_bytes_read(p, fused.find_users(p)) for p in parameters) + _bytes_written(fused.root)


def _bytes_read(array: Instruction, users: list[Instruction]) -> float:
    """Counts the bytes read of an array: only those of its slices if it is sliced, none if a part of it is replaced."""
    read = 0.0
    for user in users:
        if user.operands[:1] == (array,) and user.opcode in SLICING:
            read += user.bytes
        elif not (user.operands[:1] == (array,) and user.opcode == "dynamic-update-slice"):
            return array.bytes
    return min(read, array.bytes)


def _bytes_written(result: Instruction) -> float:
    if result.opcode == "dynamic-update-slice" and len(result.operands) > 1:
        return result.operands[1].bytes
    if result.opcode == "tuple":
        return sum(_bytes_written(o) for o in result.operands)
    return result.bytes
