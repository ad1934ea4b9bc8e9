"""Training tokens per second beside Hugging Face transformers' Mixtral, on the same cores.

    python -m experiments.benchmarks.hugging_face --torch-python=PATH [--rounds=20] [--executor=auto] [--only=0,1]

PATH is a Python with torch and transformers. Each side has a process of its own, since their pools of threads would
disturb each other in one; they take turns, and the other sleeps. A step is forward pass, backward pass, clipping and
AdamW (PyTorch's is the fused one), in float32, with untied embeddings and a balance loss on both sides. transformers
runs the fastest of its implementations of experts, which is measured first, and drops nothing; what sparse_lm drops is
printed. A single expert's weight is the constant 1 there and its probability here, a multiplication more.

On a busy machine --cores=1 --clock=cpu compares the processor time of one core, which neighbours disturb little.
sparse_lm keeps the memory that a step frees; --keep-memory has the C library do the same for PyTorch, whose users can
ask for it by environment variables.

Prints for each shape the median ratio with its quartiles, and the share of the machine's matrix-product speed (the
faster side's in each round) at which each side does the model FLOPs of `sparse_lm.cost.flops`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time

import numpy as np

ROWS, LENGTH, LAYERS, VOCABULARY = 32, 128, 4, 2048
# width, heads, expert width, experts, experts per token
SHAPES = [(128, 4, 512, 8, 1), (128, 4, 512, 8, 2), (128, 4, 512, 64, 1), (512, 8, 2048, 8, 1), (512, 8, 2048, 8, 2)]
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
PRODUCT = 1024  # the machine's speed is that of products of matrices of this size, in float32
LEARNING_RATE, DECAY, CLIP, BALANCE = 1e-3, 0.1, 1.0, 0.01

KEEP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--torch-python", help="a Python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--only", default="", help="shapes by number, from 0, with commas between; all by default")
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--capacity-factor", type=float, default=math.inf)
    parser.add_argument("--group-size", type=int, default=0, help="tokens in a routing group; 0: a row")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve({"torch": torch_programs, "jax": jax_programs}[options.side])
        return
    for number in [int(n) for n in options.only.split(",")] if options.only else range(len(SHAPES)):
        compare(SHAPES[number], options)


def compare(shape: tuple[int, ...], options: argparse.Namespace) -> None:
    print("width {}, {} heads, expert width {}, {} experts, {} per token".format(*shape), flush=True)
    setup = {"shape": shape} | vars(options)
    with Side(options.torch_python, "torch", setup) as theirs, Side(sys.executable, "jax", setup) as ours:
        trials = {name: theirs.fastest(name) for name in theirs.programs if name != "product"}
        best = min(trials, key=trials.get)
        print("  theirs:", ", ".join(f"{name} {seconds:.3f} s" for name, seconds in trials.items()), flush=True)
        ours.fastest("step")
        steps = max(1, round(0.5 / trials[best]))
        order = [(theirs, best), (ours, "step")]
        step = {theirs: [], ours: []}
        product = {theirs: [], ours: []}
        for _ in range(options.rounds):
            for side, program in order:
                product[side].append(side.seconds("product", 10))
                step[side].append(side.seconds(program, steps))
            order.reverse()
        dropped = ours.value
    step, product = ([np.array(of[side]) for side in (theirs, ours)] for of in (step, product))
    machine = 2 * PRODUCT**3 / np.minimum(*product)
    tokens, needed = ROWS * LENGTH, model_flops(setup)
    for name, seconds in zip(("theirs, " + best, f"ours, {options.executor}, {dropped:.2%} dropped"), step):
        rate, share = tokens / np.median(seconds), np.median(tokens * needed / seconds / machine)
        print(f"  {name}: {rate:,.0f} tokens/s, {share:.0%} of {np.median(machine) / 1e9:.0f} GFLOP/s")
    low, middle, high = np.quantile(step[0] / step[1], [0.25, 0.5, 0.75])
    print(f"  ours / theirs: {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {options.rounds} rounds)", flush=True)


class Side:
    """A process that runs one side's programs when told to."""

    def __init__(self, python: str, side: str, setup: dict):
        command = [python, os.path.abspath(__file__), f"--side={side}"]
        environment = os.environ | (KEEP if setup["keep_memory"] else {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.programs = self._ask(setup)
        self.value = None  # what the program gave that ran last

    def _ask(self, message: dict):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def seconds(self, program: str, times: int) -> float:
        seconds, self.value = self._ask({"program": program, "times": times})
        return seconds / times

    def fastest(self, program: str) -> float:
        return min(self.seconds(program, 1) for _ in range(4))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def serve(make) -> None:
    """The other end of a `Side`: the programs, then their seconds, on the standard output that nothing else uses."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    reply = lambda value: print(json.dumps(value), file=replies, flush=True)
    setup = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setup["cores"]])
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[setup["clock"]]
    programs = make(setup)
    reply(list(programs))
    for line in sys.stdin:
        request = json.loads(line)
        start = clock()
        value = programs[request["program"]](request["times"])
        reply((clock() - start, value))


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH + 1))


def torch_programs(setup: dict) -> dict:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    width, heads, hidden, experts, k = setup["shape"]
    torch.set_num_threads(setup["cores"])
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_local_experts=experts,
            num_experts_per_tok=k,
            max_position_embeddings=LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            use_cache=False,
            output_router_logits=True,
            router_aux_loss_coef=BALANCE,
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
    )
    inputs, targets = (torch.from_numpy(ids.copy()) for ids in (token_ids()[:, :-1], token_ids()[:, 1:]))
    square = torch.randn(PRODUCT, PRODUCT)

    def train(implementation: str, steps: int) -> None:
        model.set_experts_implementation(implementation)
        for _ in range(steps):
            model(input_ids=inputs, labels=targets, shift_labels=targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    # batched_mm copies an expert's matrices for each choice of a token
    copies = 4 * ROWS * LENGTH * k * 3 * width * hidden * LAYERS
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or copies < memory / 2]
    programs = {name: lambda steps, name=name: train(name, steps) for name in names}
    return programs | {"product": lambda times: [torch.mm(square, square) for _ in range(times)] and None}


def jax_config(setup: dict):
    from sparse_lm import config as configs

    width, heads, hidden, experts, k = setup["shape"]
    model = configs.Model(
        vocabulary=VOCABULARY,
        width=width,
        layers=LAYERS,
        heads=heads,
        ffn_width=hidden,
        activation="swiglu",
        tied_embeddings=False,
        scan=False,
        experts=experts,
        expert_every=1,
        top_k=k,
        router=configs.choice("topk", balance_loss=BALANCE, z_loss=0.0),
        balance_over="batch",
        executor=setup["executor"],
        capacity_factor=setup["capacity_factor"],
        group_size=setup["group_size"],
    )
    return configs.resolve(
        configs.Config(
            model=model,
            data=configs.Data(length=LENGTH),
            optimizer=configs.Optimizer(learning_rate=LEARNING_RATE, weight_decay=DECAY, clip_norm=CLIP),
            training=configs.Training(batch=ROWS),
        )
    )


def model_flops(setup: dict) -> float:
    """Of a token in training."""
    from sparse_lm.cost.flops import count_flops

    return count_flops(jax_config(setup).model, LENGTH).training


def jax_programs(setup: dict) -> dict:
    import jax
    import jax.numpy as jnp

    from sparse_lm.host_memory import keep_freed_memory
    from sparse_lm.mesh import make_mesh
    from sparse_lm.step.build import build

    keep_freed_memory()
    config = jax_config(setup)
    program = build(config, make_mesh(config.mesh))
    ids = token_ids()
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": np.ones((ROWS, LENGTH)),
        "positions": np.tile(np.arange(LENGTH), (ROWS, 1)),
        "bytes": np.full(ROWS, LENGTH),
    }
    batch = {n: jax.device_put(v.astype(np.int32), program.abstract_batch[n].sharding) for n, v in batch.items()}
    held = [program.init()]
    square = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
    multiply = jax.jit(jnp.matmul)

    def train(steps: int) -> float:
        for _ in range(steps):
            held[0], metrics = program.step(held[0], batch)
        return float(metrics["routing"]["dropped"].mean())

    def product(times: int) -> None:
        for _ in range(times):
            multiply(square, square).block_until_ready()

    return {"step": train, "product": product}


if __name__ == "__main__":
    main()
