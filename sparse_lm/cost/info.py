"""The text of `sparse-lm info`: parameters, FLOPs and memory of a config."""

from collections.abc import Sequence

from sparse_lm.config import Config, Mesh, Model
from sparse_lm.cost.flops import Flops, count_flops
from sparse_lm.cost.memory import compute_memory
from sparse_lm.cost.parameters import Parameters, count_parameters
from sparse_lm.experts.auto import executor_name
from sparse_lm.routing import router_of
from sparse_lm.stack import decoder_stack

PLATFORM = "cpu"  # for which executed FLOPs are counted


def format_quantity(value: float, unit: str = "") -> str:
    """Formats three digits with a prefix: 1.57 T, 223 M. 10⁹ is B without a unit and G with one: 12.3 GB."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns of text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def info_table(config: Config) -> str:
    """Formats parameters, FLOPs per token, memory and layers of a resolved config.

    A mesh axis of -1 counts as 1, since the number of devices is unknown.
    """
    model, length = config.model, config.data.length
    counted, cost = count_parameters(model), count_flops(model, length, PLATFORM)
    sizes = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "expert", "tensor")}
    mesh = Mesh(**{axis: max(size, 1) for axis, size in sizes.items()})
    return "\n\n".join(
        (
            f"{config.name or 'model'}: {format_quantity(counted.total)} parameters, "
            f"{format_quantity(counted.active)} active per token",
            _flops_table(cost, model, length),
            _memory_table(config, mesh),
            _layers_table(model, counted, cost),
        )
    )


def _flops_table(cost: Flops, model: Model, length: int) -> str:
    rows = [
        ("FLOPs per token", "forward", "training"),
        ("model", format_quantity(cost.forward, "FLOP"), format_quantity(cost.training, "FLOP")),
        ("executed", format_quantity(cost.executed_forward, "FLOP"), format_quantity(cost.executed_training, "FLOP")),
    ]
    if model.experts:
        rows.insert(
            2, ("  of it the routers", format_quantity(cost.router / 3, "FLOP"), format_quantity(cost.router, "FLOP"))
        )
    counted = ["work per element", f"all {length} keys for each query"]
    if model.experts:
        router = router_of(model)
        name = executor_name(model, router.form, PLATFORM)
        if not router.skips_layers:
            counted += [f"executor {name}" + " (auto, on a CPU)" * (model.executor == "auto")]
        if name != "grouped":
            factor, size = model.capacity_factor, model.group_size
            counted += [f"places at a capacity factor of {factor:g} in groups of {size} tokens"]
        counted += ["dispatch and combine masks"] * (name == "einsum")
    counted += ["layers computed again in the backward pass"] * (model.remat == "full")
    return f"{format_table(rows)}\nexecuted, without the optimizer: {', '.join(counted)}"


def _memory_table(config: Config, mesh: Mesh) -> str:
    total, local = compute_memory(config), compute_memory(config, mesh)
    axes = " × ".join(f"{axis} {getattr(mesh, axis)}" for axis in ("data", "fsdp", "expert", "tensor"))
    rows = [("memory, float32", "total", "per device")]
    for part in ("parameters", "gradients", "optimizer", "total"):
        name = f"optimizer ({config.optimizer.algorithm.name})" if part == "optimizer" else part
        rows.append((name, format_quantity(getattr(total, part), "B"), format_quantity(getattr(local, part), "B")))
    return f"{format_table(rows)}\nper device on a mesh of {axes}; activations come on top"


def _layers_table(model: Model, counted: Parameters, cost: Flops) -> str:
    rows = [("layers", "attention", "feed-forward", "active", "model FLOPs", "executed FLOPs")]
    rows.append(("embedding", "", "", format_quantity(counted.embedding), "0", "0"))
    layers_by_spec: dict[str, list[int]] = {}
    for layer, spec in enumerate(decoder_stack(model).layers):
        layers_by_spec.setdefault(repr(spec), []).append(layer)
    for layers in layers_by_spec.values():
        counts, parts = count_parameters(model, layers[0]), [part for part in cost.parts if part.layer == layers[0]]
        dense = format_quantity(counts.feed_forward)
        rows.append(
            (
                format_ranges(layers),
                format_quantity(counts.attention),
                f"{model.experts} × {format_quantity(counts.experts // model.experts)}" if counts.experts else dense,
                format_quantity(counts.active),
                format_quantity(sum(part.model for part in parts), "FLOP"),
                format_quantity(sum(part.forward for part in parts), "FLOP"),
            )
        )
    output = format_quantity(2 * model.width * model.vocabulary, "FLOP")
    rows.append(("output" + " (tied)" * model.tied_embeddings, "", "", format_quantity(counted.output), output, output))
    return f"{format_table(rows)}\nparameters of one such layer, and its FLOPs per token in the forward pass"


def format_ranges(numbers: Sequence[int]) -> str:
    """Abbreviates ascending numbers: "0–3", "1, 3 … 23", "0–1, 3, 5"."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)) and step > 1 and len(numbers) > 3:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][-1] + 1:
            ranges[-1].append(n)
        else:
            ranges.append([n])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges)
