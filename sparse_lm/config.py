"""The config: nested dataclasses, with units in the comments. Imports no jax.

A config file in `configs/` has a function `get_config()` that returns a `Config`. The command line overrides fields
(`--config.model.experts=16`). Then `resolve` derives values, checks all that needs no devices, and freezes the result.
0 or "" in a field with a derived value means "derive it".
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from ml_collections import ConfigDict, FrozenConfigDict

from sparse_lm.errors import UserError, nearest_divisor, suggest
from sparse_lm.ranges import (
    Devices,
    Factor,
    NotNegative,
    OneOf,
    Positive,
    Probability,
    Range,
    Seed,
    Size,
    SizeOr0,
    Steps,
    StepsOr0,
    explain_fault,
    strip_range,
)
from sparse_lm.stored_config import fill_config


class Node:
    """A section of a config, mutable until `freeze`."""

    def __init_subclass__(cls):
        # The dataclass is made of bare types, which those who read values from text understand.
        cls.ranges = dict(cls.__annotations__)
        cls.__annotations__ = {name: strip_range(kind) for name, kind in cls.ranges.items()}

    def __setattr__(self, name: str, value: Any):
        if name not in (names := type(self).__dataclass_fields__):
            raise AttributeError(f"{type(self).__name__} has no field {name!r}{suggest(name, names)}")
        if getattr(self, "_frozen", False):
            raise AttributeError(f"the config is frozen: {name} can't be set; use dataclasses.replace and resolve")
        kind = names[name].type  # tuple[str, …] is no class
        if isinstance(kind, type) and issubclass(kind, Node) and not isinstance(value, kind):
            raise TypeError(f"{type(self).__name__}.{name} is {value!r}; it must be a {kind.__name__}")
        object.__setattr__(self, name, value)

    def freeze(self) -> Self:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Node):
                value.freeze()
            elif isinstance(value, ConfigDict) and not isinstance(value, FrozenConfigDict):
                object.__setattr__(self, f.name, FrozenConfigDict(value))
        object.__setattr__(self, "_frozen", True)
        return self


@dataclass
class Choice(Node):
    """A registered class or function by name, and its options (`--config.model.router.options.jitter=0.1`)."""

    name: str
    options: ConfigDict = field(default_factory=ConfigDict)


def choice(name: str, **options) -> Choice:
    return Choice(name, ConfigDict(options))


@dataclass
class Model(Node):
    vocabulary: Size = 2048  # V, tokens
    width: Size = 128  # D
    layers: Annotated[int, Range(least=1, most=10_000)] = 4
    heads: Size = 4  # H
    kv_heads: SizeOr0 = 0  # key and value heads; 0: as many as heads
    head_width: SizeOr0 = 0  # 0: width / heads
    ffn_width: Size = 512  # hidden width of a dense feed-forward layer
    activation: Annotated[str, OneOf("gelu", "geglu", "swiglu")] = "gelu"  # the last two gate with a third matrix
    tied_embeddings: bool = True  # the output layer is the transposed embedding
    rope_base: Positive = 10_000.0
    init_scale: Positive = 1.0  # s in the standard deviation sqrt(s / fan_in) of every matrix; Switch uses 0.1
    dropout: Probability = 0.0  # on the embedding and on each residual branch
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"  # of the computation; parameters are float32
    attention: Choice = field(default_factory=lambda: choice("full"))  # the kind of attention: models/table.py
    # What the backward pass recomputes; dots: all but products with dense weights.
    remat: Annotated[str, OneOf("none", "dots", "full")] = "none"
    scan: bool = True  # layers in one compiled loop; False unrolls it

    # The last feed-forward layer of each period; auto: experts if there are any, blocks if there is a layout, otherwise
    # dense.
    feed_forward: Choice = field(default_factory=lambda: choice("auto"))
    experts: SizeOr0 = 0  # E in each expert layer; 0: a dense feed-forward layer of expert_width in its place
    layout: Choice = field(default_factory=lambda: choice("dense"))  # which blocks of that layer's matrices exist
    expert_width: SizeOr0 = 0  # F, hidden width of one expert; 0: ffn_width
    expert_every: Size = 2  # every n-th feed-forward layer is an expert layer
    dense_first: SizeOr0 = 0  # dense layers before the first period of expert_every layers
    top_k: Size = 1  # K, experts per token
    router: Choice = field(default_factory=lambda: choice("switch"))
    shared_experts: SizeOr0 = 0  # experts that every token passes, computed as one dense layer of their total width
    # Region in which losses and biases balance the load; batch: of a microbatch. Routers that assign the tokens of a
    # group together always balance the group.
    balance_over: Annotated[str, OneOf("group", "device", "batch")] = "group"
    executor: str = "auto"  # how the experts are computed: auto, einsum, gather, grouped (exchange_buffer is its)
    exchange_buffer: Factor = math.inf  # rows a device can receive in training, over an even share; inf: all
    capacity_factor: Factor = 1.25  # places per expert in training, over an even share; inf: dropless
    eval_capacity_factor: Factor = math.inf  # in evaluation, which also measures at the training factor
    group_size: SizeOr0 = 0  # S, tokens that compete for the same places; 0: one row of data.length
    expert_dropout: Probability = 0.0  # on the hidden units of experts

    @property
    def sparse(self) -> bool:
        """Whether a token uses only some of the parameters, or a matrix has only some of its blocks."""
        return self.experts > 0 or self.layout.name != "dense" or self.feed_forward.name not in ("auto", "dense")


def compute_capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Computes C, the places per expert and group: factor · K · S / E (Fedus et al. 2021, equation 3).

    Rounded up, so that a factor of 1 always has a place for every choice of an even routing.

    Args:
        tokens: S, of a group.
        experts: E.
        top_k: K, the choices of each token.
        factor: the capacity factor; inf is dropless.

    Returns:
        C, from 1 to S.
    """
    if math.isinf(factor):
        return tokens
    return min(tokens, max(1, math.ceil(round(factor * top_k * tokens / experts, 6))))


@dataclass
class Data(Node):
    sources: tuple[str, ...] = ("stdlib",)  # stdlib, folder:PATH, tfds:NAME; ?weight=2&max_epochs=4&field=text follows
    tokenizer: str = ""  # a tokenizer.json or SentencePiece .model; "": byte-level BPE trained on the sources
    length: Size = 256  # L, tokens per row


@dataclass
class Mesh(Node):
    """Devices along each axis of the mesh; -1 takes what is left."""

    data: Devices = -1  # copies of the parameters, each with its share of the batch
    fsdp: Devices = 1  # the batch, and the parameters by width
    expert: Devices = 1  # the batch, and experts with the tokens sent to them
    tensor: Devices = 1  # heads, hidden units and vocabulary


@dataclass
class Group(Node):
    """Multiples of the optimizer's learning rate and weight decay for one group of parameters."""

    learning_rate: NotNegative = 1.0
    weight_decay: NotNegative = 1.0


@dataclass
class Optimizer(Node):
    algorithm: Choice = field(default_factory=lambda: choice("adamw"))  # adamw, adafactor, muon
    learning_rate: Positive = 3e-3  # peak
    weight_decay: NotNegative = 0.1  # per step, times the learning rate; norms and biases have none
    clip_norm: NotNegative = 1.0  # global gradient norm; 0: no clipping
    schedule: Choice = field(default_factory=lambda: choice("cosine"))  # cosine, rsqrt, wsd, constant
    warmup_steps: StepsOr0 = 100
    embedding: Group = field(default_factory=Group)
    router: Group = field(default_factory=Group)
    experts: Group = field(default_factory=Group)
    rest: Group = field(default_factory=Group)


@dataclass
class Anticipation(Node):
    """Choosing experts some steps ahead, after a spike of the loss; see `step.anticipation`."""

    ahead: StepsOr0 = 0  # steps between a choice and its use; 0: off
    spike: Positive = 1.0  # nats; a loss so far above its running mean is a spike
    steps: Steps = 200  # for which it stays on after the last spike


@dataclass
class Training(Node):
    steps: Steps = 1000
    batch: Size = 16  # B, rows per step over all devices
    accumulation: Size = 1  # microbatches that a step's gradient is summed over
    seed: Seed = 0  # of initial weights, order of the data, jitter and dropout
    max_skipped: Steps = 10  # steps in a row with a non-finite gradient before the run ends
    watchdog: NotNegative = 600.0  # seconds without a finished step after which the run says where it hangs; 0: never
    anticipation: Anticipation = field(default_factory=Anticipation)


@dataclass
class Evaluation(Node):
    every: Steps = 100  # steps; the last step is always evaluated
    rows: SizeOr0 = 256  # rows of each split; 0: all
    final_rows: SizeOr0 = 2048  # when training has ended; 0: all. The summary and verdicts are of these
    splits: tuple[str, ...] = ("validation", "heldout_domain")


@dataclass
class Checkpoints(Node):
    every: StepsOr0 = 200  # steps; 0: none but at the end and on a signal
    keep: Steps = 2  # newest ones, and besides the best by validation loss among those of a step that was evaluated


@dataclass
class Logging(Node):
    every: Steps = 10  # steps
    progress: bool = True  # a progress bar when the output is a terminal, a line now and then otherwise
    tensorboard: bool = False


@dataclass
class Config(Node):
    name: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mesh: Mesh = field(default_factory=Mesh)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    logging: Logging = field(default_factory=Logging)
    cache: str = "~/.cache/sparse_lm"  # prepared data, tokenizers and compiled programs


def resolve(config: Config) -> Config:
    """Copies a config, derives values, checks and freezes it; idempotent. Raises `UserError` for an invalid value."""
    config = from_dict(to_dict(config), file="")
    _check_ranges(config)
    model = config.model
    model.kv_heads = model.kv_heads or model.heads
    if not model.head_width:
        _check_divides("model.width", model.width, "model.heads", model.heads)
        model.head_width = model.width // model.heads
    model.expert_width = model.expert_width or model.ffn_width
    model.group_size = model.group_size or config.data.length
    _check_fit(config)
    return config.freeze()


def _check_ranges(node: Node, prefix: str = "") -> None:
    """What is wrong with a field by itself."""
    for name, value in vars(node).items():
        if isinstance(value, Node):
            _check_ranges(value, f"{prefix}{name}.")
        elif wrong := explain_fault(node.ranges.get(name), value):
            raise UserError(f"{prefix}{name} is {value!r}{wrong}")


def check_mesh(mesh: Mesh) -> None:
    """Raises `UserError` for sizes that no number of devices has."""
    sizes = dataclasses.asdict(mesh)
    if 0 in sizes.values() or list(sizes.values()).count(-1) > 1 or min(sizes.values()) < -1:
        written = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UserError(f"{written}: each must be at least 1, and one of them may be -1 to take what is left")


def _check_fit(config: Config) -> None:
    """Raises `UserError` for fields that contradict each other."""
    model, training = config.model, config.training
    if "/" in config.name or config.name in (".", ".."):
        raise UserError(f"name is {config.name!r}; it must be without slashes (--workdir says where a run goes)")
    if 0 < training.watchdog < 1:
        raise UserError(f"training.watchdog is {training.watchdog}; it must be 0 or at least 1 second")
    if not config.cache:
        raise UserError("cache is empty; it must be a folder, as ~/.cache/sparse_lm")
    check_mesh(config.mesh)
    _check_divides("model.heads", model.heads, "model.kv_heads", model.kv_heads)
    if model.head_width % 2:
        raise UserError(f"model.head_width is {model.head_width}; rotary positions need an even number")
    after = model.layers - model.dense_first
    if after % model.expert_every or after < 1:
        fit = model.dense_first + max(1, round(after / model.expert_every)) * model.expert_every
        raise UserError(
            f"model.layers is {model.layers}: after model.dense_first={model.dense_first} it must be a multiple of "
            f"model.expert_every={model.expert_every}; the nearest is {fit}"
        )
    kind, found = model.feed_forward, (model.experts > 0, model.layout.name != "dense")
    if kind.name == "auto" and kind.options:
        raise UserError(f"model.feed_forward.options are {dict(kind.options)}; they need a model.feed_forward.name")
    wanted = {"dense": (False, False), "experts": (True, False), "blocks": (False, True)}
    if kind.name in wanted and wanted[kind.name] != found:
        raise UserError(
            f"model.feed_forward is {kind.name!r}, and model.experts={model.experts} with model.layout="
            f"{model.layout.name!r} is another kind of layer; 'auto' takes the one that they say"
        )
    if model.experts and model.layout.name != "dense":
        raise UserError(f"model.layout is {model.layout.name!r}, for a feed-forward layer; model.experts must be 0")
    if model.experts and model.top_k > model.experts:
        raise UserError(f"model.top_k is {model.top_k}, above model.experts={model.experts}")
    _check_divides("training.batch", training.batch, "training.accumulation", training.accumulation)
    if model.experts:
        tokens = training.batch // training.accumulation * config.data.length
        microbatch = "the tokens of a microbatch (training.batch / training.accumulation × data.length),"
        _check_divides(microbatch, tokens, "model.group_size", model.group_size)
    if training.anticipation.steps <= (ahead := training.anticipation.ahead):
        raise UserError(
            f"training.anticipation.steps is {training.anticipation.steps}; it must be above "
            f"training.anticipation.ahead={ahead}, since choices are used only {ahead} steps after they are made"
        )


def _check_divides(value_name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raises `UserError` unless value is a multiple of divisor, and suggests the nearest divisor."""
    if value % divisor:
        fit = nearest_divisor(divisor, value)
        raise UserError(
            f"{divisor_name} is {divisor}, which does not divide {value_name} {value}; the nearest that does is {fit}"
        )


def to_dict(config: Any) -> Any:
    """Converts a config to plain dicts, lists and numbers, as stored in config.json."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, ConfigDict):
        return config.to_dict()
    return list(config) if isinstance(config, tuple) else config


def from_dict(values: Any, file: str = "config.json", written_by: str = "") -> Config:
    """Converts what `to_dict` of this or an earlier version made to an unfrozen config.

    Args:
        values: the parsed JSON.
        file: its path, for messages; "" if it is in no file.
        written_by: the version that stored it, for messages; "" if unknown.

    Raises:
        UserError: for an unknown field, or a value of another type.
    """
    config = Config()
    fill_config(config, values, file, written_by)
    return config


def identity_fields(config: Config) -> dict[str, Any]:
    """Returns the fields by dotted path that can't change in a run; others (mesh, steps, logging, …) may."""
    values = to_dict(config)
    kept = ["batch", "seed", "anticipation"]
    if config.training.anticipation.ahead:
        kept.append("accumulation")  # choices made ahead are kept by microbatch
    values["training"] = {k: values["training"][k] for k in kept}
    del values["data"]["tokenizer"]  # a path, which may change; the data's fingerprint covers the tokenizer itself
    return flatten_fields({part: values[part] for part in ("model", "data", "optimizer", "training")})


def flatten_fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by dotted path."""
    flat = {}
    for name, value in values.items():
        flat |= flatten_fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def digest(values: Any) -> str:
    """Hashes JSON-able values to 16 hex digits, for cache keys and fingerprints."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
