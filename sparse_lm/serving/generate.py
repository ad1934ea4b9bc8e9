"""Continuing prompts of token ids with keys and values cached: a pass over the prompts, then one token at a time."""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.mesh import RULES, constrain
from sparse_lm.models import Context, Functional, functional
from sparse_lm.serving.sampling import Sampling, sample

MIN_POSITIONS = 16  # positions that prompts are padded to at least


class Generator:
    """Continues batches of prompts.

    Experts take every token (dropless), so that rows do not meet: a continuation depends on its own prompt and seed and
    not, but for rounding, on the rows beside it. Prompts are padded to a power of two of positions and of rows, so that
    few programs are compiled.
    """

    def __init__(
        self,
        model: configs.Model,
        parameters: dict,
        router_state: Any,
        *,
        end_of_text: int,
        max_tokens: int,
        sampling: Sampling,
        vocabulary: int = 0,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Compiles nothing yet. Raises `UserError` for max_tokens below 1.

        model: of a resolved config. end_of_text: the id that begins every prompt and ends a continuation.
        max_tokens: at most so many are generated per prompt. vocabulary: ids below it can be generated, as many as the
        tokenizer has; 0: all of the model's. mesh: the one that the parameters are laid out on, if any.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
        self.end_of_text, self.max_tokens = end_of_text, max_tokens
        self._parameters, self._router_state, self._mesh = parameters, router_state, mesh
        # With a place for every token, groups change nothing; groups of one token divide every batch, and cost least.
        self._functional = functional(dataclasses.replace(model, group_size=1))
        self._sampling, self._vocabulary = sampling, vocabulary or model.vocabulary
        self._prefill = jax.jit(self._prefill_caches)
        self._step = jax.jit(self._next, donate_argnums=2)

    def stream(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Iterator[list[int | None]]:
        """The next token of each prompt, step after step; None once a row has ended, by end_of_text or at max_tokens.

        prompts: token ids, without the end_of_text that is put before them; they may be empty. seeds: one per prompt; a
        row's randomness is a function of its seed, its prompt and the position alone. end_of_text is not given out.
        """
        if not prompts:
            return
        rows = [[self.end_of_text, *prompt] for prompt in prompts]
        keys = [_row_seed(seed, row) for seed, row in zip(seeds, rows, strict=True)]
        parts = 1 if self._mesh is None else math.prod(self._mesh.shape[axis] for axis in RULES["batch"])
        idle = parts * _next_power_of_two(-(-len(rows) // parts)) - len(rows)
        rows, keys = rows + [[self.end_of_text]] * idle, np.array(keys + [0] * idle, np.uint32)

        # The first pass takes all but the last token of each prompt; the step that takes that one gives the first new.
        length = max(MIN_POSITIONS, _next_power_of_two(max(map(len, rows)) - 1))
        lengths = np.array([len(row) - 1 for row in rows], np.int32)
        ids = np.array([row[:-1] + [self.end_of_text] * (length - len(row) + 1) for row in rows], np.int32)
        caches = self._run(self._prefill, ids, lengths)
        ids = np.array([row[-1] for row in rows], np.int32)
        live = [True] * len(prompts)
        for step in range(self.max_tokens):
            new, caches = self._run(self._step, caches, ids, lengths + np.int32(step), keys)
            ids = np.asarray(new)
            live = [alive and token != self.end_of_text for alive, token in zip(live, ids)]
            if not any(live):
                return
            yield [int(token) if alive else None for alive, token in zip(live, ids)]

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """The whole continuation of each prompt, as `stream` gives it."""
        whole = [[] for _ in prompts]
        for step in self.stream(prompts, seeds):
            for row, token in zip(whole, step):
                if token is not None:
                    row.append(token)
        return whole

    def _run(self, compiled, *args):
        # The mesh is in force for the call alone: between two tokens of a stream the caller's own must be.
        if self._mesh is None:
            return compiled(self._parameters, self._router_state, *args)
        with jax.set_mesh(self._mesh):
            return compiled(self._parameters, self._router_state, *args)

    def _prefill_caches(self, parameters, router_state, ids: Int[Array, "B L"], lengths: Int[Array, "B"]) -> Any:
        caches = self._functional.init_caches(ids.shape[0], ids.shape[1] + self.max_tokens)
        start = jnp.zeros_like(lengths)
        return cached_logits(self._functional, parameters, router_state, caches, ids, start, lengths)[1]

    def _next(self, parameters, router_state, caches, ids: Int[Array, "B"], start: Int[Array, "B"], keys):
        one = jnp.ones_like(start)
        logits, caches = cached_logits(self._functional, parameters, router_state, caches, ids[:, None], start, one)
        keys = jax.vmap(lambda key, position: jax.random.fold_in(jax.random.key(key), position))(keys, start)
        return constrain(sample(logits[:, 0, : self._vocabulary], keys, self._sampling), None), caches


def cached_logits(
    functional: Functional,
    parameters: dict,
    router_state: Any,
    caches: Any,
    ids: Int[Array, "B L"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B L V"], Any]:
    """Logits of the next token after each id, dropless, and the caches with the ids added.

    Args:
        caches: hold the `start` tokens before in their first places, each row its own number; they are attended to.
        ids: of each row the first `lengths` are its next tokens, and the rest is padding, which gets no expert and is
            attended to by nobody.
    """
    index = jnp.arange(ids.shape[1])
    segments = (index < lengths[:, None]).astype(jnp.int32)
    context = Context(ids, segments, start[:, None] + index, math.inf, start, alone=True)
    logits, _, caches = functional.apply(parameters, ids, context, router_state, caches=caches)
    return logits, caches


def _row_seed(seed: int, row: list[int]) -> int:
    """32 bits that a row's randomness begins with: other ones for another seed, and for another prompt."""
    return zlib.crc32(np.array([seed % 2**63, *row], np.int64).tobytes())


def _next_power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
