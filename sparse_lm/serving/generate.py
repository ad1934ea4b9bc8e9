"""Continues prompts of token ids: a pass over the prompts fills caches, then tokens are sampled one at a time."""

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

MIN_POSITIONS = 16  # to which prompts are padded at least


class Generator:
    """Continues batches of prompts.

    Experts are dropless, so that a continuation depends on its own prompt and seed, and on other rows by rounding only.
    Positions and rows are padded to powers of two, so that few programs are compiled.
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
        """Compiles nothing yet.

        Args:
            model: of a resolved config.
            end_of_text: the id that begins every prompt and ends a continuation.
            max_tokens: the most new tokens per prompt.
            sampling: how tokens are drawn.
            vocabulary: only ids below it are generated, since a tokenizer may have fewer tokens than the model; 0: all.
            mesh: on which the parameters are laid out, if any.

        Raises:
            UserError: for max_tokens below 1.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
        self.end_of_text, self.max_tokens = end_of_text, max_tokens
        self._parameters, self._router_state, self._mesh = parameters, router_state, mesh
        # Without drops the group size changes no output; groups of one token divide every batch, and are cheapest.
        self._functional = functional(dataclasses.replace(model, group_size=1))
        self._sampling, self._vocabulary = sampling, vocabulary or model.vocabulary
        self._prefill = jax.jit(self._fill_caches)
        self._step = jax.jit(self._sample_next, donate_argnums=2)

    def stream(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Iterator[list[int | None]]:
        """Generates one token of each prompt per step.

        Args:
            prompts: token ids, maybe empty, without the end_of_text that is put before them.
            seeds: one per prompt. Randomness is a function of seed, prompt and position.

        Yields:
            The next token of each prompt; None after its end_of_text, which is not yielded itself.
        """
        if not prompts:
            return
        rows = [[self.end_of_text, *prompt] for prompt in prompts]
        row_seeds = [_row_seed(seed, row) for seed, row in zip(seeds, rows, strict=True)]
        shards = 1 if self._mesh is None else math.prod(self._mesh.shape[axis] for axis in RULES["batch"])
        padding = shards * _next_power_of_two(-(-len(rows) // shards)) - len(rows)
        rows, row_seeds = rows + [[self.end_of_text]] * padding, np.array(row_seeds + [0] * padding, np.uint32)

        # The first pass takes all but the last token of each prompt, from which the first step samples a new one.
        length = max(MIN_POSITIONS, _next_power_of_two(max(map(len, rows)) - 1))
        lengths = np.array([len(row) - 1 for row in rows], np.int32)
        ids = np.array([row[:-1] + [self.end_of_text] * (length - len(row) + 1) for row in rows], np.int32)
        caches = self._run(self._prefill, ids, lengths)
        ids = np.array([row[-1] for row in rows], np.int32)
        live = [True] * len(prompts)
        for step in range(self.max_tokens):
            new, caches = self._run(self._step, caches, ids, lengths + np.int32(step), row_seeds)
            ids = np.asarray(new)
            live = [alive and token != self.end_of_text for alive, token in zip(live, ids)]
            if not any(live):
                return
            yield [int(token) if alive else None for alive, token in zip(live, ids)]

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """Generates the whole continuation of each prompt; see `stream`."""
        continuations = [[] for _ in prompts]
        for step in self.stream(prompts, seeds):
            for continuation, token in zip(continuations, step):
                if token is not None:
                    continuation.append(token)
        return continuations

    def _run(self, compiled, *args):
        # The mesh is active during the call only: between two tokens of a stream the caller may have another.
        if self._mesh is None:
            return compiled(self._parameters, self._router_state, *args)
        with jax.set_mesh(self._mesh):
            return compiled(self._parameters, self._router_state, *args)

    def _fill_caches(self, parameters, router_state, ids: Int[Array, "B L"], lengths: Int[Array, "B"]) -> Any:
        caches = self._functional.init_caches(ids.shape[0], ids.shape[1] + self.max_tokens)
        start = jnp.zeros_like(lengths)
        return cached_logits(self._functional, parameters, router_state, caches, ids, start, lengths)[1]

    def _sample_next(self, parameters, router_state, caches, ids: Int[Array, "B"], start: Int[Array, "B"], row_seeds):
        lengths = jnp.ones_like(start)
        logits, caches = cached_logits(self._functional, parameters, router_state, caches, ids[:, None], start, lengths)
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(row_seeds, start)
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
    """Computes the logits of the next token after each id, dropless.

    Args:
        caches: of the tokens before `ids`, with room for `ids`.
        ids: the next tokens of each row, then padding, which gets no expert and no attention.
        start: how many tokens of each row the caches hold.
        lengths: how many of the ids of each row are tokens.

    Returns:
        The logits, and the caches with the ids added.
    """
    index = jnp.arange(ids.shape[1])
    segments = (index < lengths[:, None]).astype(jnp.int32)
    context = Context(ids, segments, start[:, None] + index, math.inf, start, alone=True)
    logits, _, caches = functional.apply(parameters, ids, context, router_state, caches=caches)
    return logits, caches


def _row_seed(seed: int, row: list[int]) -> int:
    """Hashes the seed and prompt of a row to 32 bits."""
    return zlib.crc32(np.array([seed % 2**63, *row], np.int64).tobytes())


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
