"""Learning rate over steps: warm-up from 0, then one of four shapes."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.ranges import Share
from sparse_lm.registry import create


def cosine(peak: float, warmup: int, steps: int, *, final: Share = 0.1) -> optax.Schedule:
    """Down to `final` times the peak along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    return optax.cosine_decay_schedule(peak, max(steps - warmup, 1), final)


def rsqrt(peak: float, warmup: int, steps: int, *, cooldown: Share = 0.0) -> optax.Schedule:
    """Down by the inverse square root of the step, as T5 and Switch; linearly to 0 over the last share `cooldown`."""
    falling = lambda count: peak * jnp.sqrt(max(warmup, 1) / (count + max(warmup, 1)))
    if not cooldown:
        return falling
    end = _last(1.0, 0.0, cooldown, warmup, steps)
    return lambda count: falling(count) * end(count)


def wsd(peak: float, warmup: int, steps: int, *, decay: Share = 0.2, final: Share = 0.0) -> optax.Schedule:
    """Warm-up–stable–decay: at the peak, then linearly to `final` of it over the last share `decay` of the steps
    (Hu et al. 2024, arXiv 2404.06395)."""
    return _last(peak, peak * final, decay, warmup, steps)


def _last(start: float, end: float, share: float, warmup: int, steps: int) -> optax.Schedule:
    """Linear over the last share of the steps, at most those after the warm-up, from which counts begin."""
    length = min(max(round(share * steps), 1), steps - warmup)
    return optax.linear_schedule(start, end, length, steps - warmup - length)


def constant(peak: float, warmup: int, steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "cosine": cosine,
    "rsqrt": rsqrt,
    "wsd": wsd,
    "constant": constant,
}


def schedule(config: configs.Config) -> optax.Schedule:
    """Learning rate as a function of the steps done; the first step of a warm-up of n has 1/n of the peak."""
    optimizer, steps = config.optimizer, config.training.steps
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if warmup >= steps and warmup:
        raise UserError(
            f"optimizer.warmup_steps is {warmup}; it must be below training.steps={steps}; "
            f"--config.optimizer.warmup_steps={steps // 10} would do"
        )
    after = create("optimizer.schedule", SCHEDULES, optimizer.schedule, peak, warmup, steps)
    return lambda count: jnp.where(
        count < warmup, peak * (count + 1) / max(warmup, 1), after(jnp.maximum(count - warmup, 0))
    )
