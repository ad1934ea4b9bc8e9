"""The commands. Each parses its flags, calls one function, and prints the result."""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from sparse_lm.command_line import define_config, quote_text
from sparse_lm.config import Mesh, resolve
from sparse_lm.errors import RunFailed, Stopped, UserError, suggest
from sparse_lm.host_memory import keep_freed_memory


def _run_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir", "", "the run's folder, made where it does not exist (gs://… too)", flag_values=values
    )
    flags.DEFINE_string(
        "init_from", "", "RUN or RUN@STEP: begin with the parameters of another run", flag_values=values
    )
    _distributed_flags(values)


def _distributed_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "distributed", False, "one of several processes, which find each other (Cloud TPU, Slurm)", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0, where they do not find each other", flag_values=values
    )
    flags.DEFINE_integer("processes", 1, "how many processes, with --coordinator", flag_values=values)
    flags.DEFINE_integer("process", 0, "which one this is, with --coordinator", flag_values=values)


def _checkpoint_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "the run's folder", flag_values=values)
    flags.DEFINE_integer("step", None, "a saved step; by default the newest", flag_values=values)


def _mesh_flags(values: flags.FlagValues) -> None:
    for axis in dataclasses.fields(Mesh):
        about = "devices along this axis of the mesh; by default a mesh that fits"
        flags.DEFINE_integer(f"mesh.{axis.name}", None, about, flag_values=values)


def _replay_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "the run's folder", flag_values=values)
    flags.DEFINE_integer("step", None, "the step to run again, any that the run has done", flag_values=values)


def _profile_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("steps", 5, "profiled steps", flag_values=values)
    flags.DEFINE_string(
        "trace", "", "a folder to leave the trace in, for TensorBoard's profiler or Perfetto", flag_values=values
    )


def _evaluate_flags(values: flags.FlagValues) -> None:
    _checkpoint_flags(values)
    _mesh_flags(values)
    _distributed_flags(values)
    flags.DEFINE_float("capacity_factor", None, "of the evaluation; inf drops nothing", flag_values=values)
    flags.DEFINE_multi_string(
        "sources",
        None,
        "other text, written as --config.data.sources, to measure validation and test of; by default the run's",
        flag_values=values,
    )


def _compare_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "the comparison's folder", flag_values=values)
    flags.DEFINE_integer("seeds", 1, "runs of each side, which differ in the seed", flag_values=values, lower_bound=1)
    flags.DEFINE_bool("sweep_learning_rate", False, "find each side's own learning rate first", flag_values=values)
    flags.DEFINE_float(
        "price_per_hour", None, "of all devices together; adds what each side costs", 0, 1e9, flag_values=values
    )
    _distributed_flags(values)


def _generate_flags(values: flags.FlagValues) -> None:
    _checkpoint_flags(values)
    _mesh_flags(values)
    flags.DEFINE_string("prompt", "", "the text to continue", flag_values=values)
    flags.DEFINE_string(
        "prompts", "", "a folder of .txt files (or a .jsonl file) to continue, with --out", flag_values=values
    )
    flags.DEFINE_string("out", "", "the .jsonl file that continuations of --prompts go to", flag_values=values)
    flags.DEFINE_integer("tokens", 200, "the most new tokens", flag_values=values, lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0: always the most probable token", flag_values=values, lower_bound=0)
    flags.DEFINE_integer("top_k", 0, "draw among the k most probable tokens; 0: all", flag_values=values, lower_bound=0)
    flags.DEFINE_float(
        "top_p", 1.0, "draw among the fewest tokens with this probability together", 0, 1, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=values)


def _train(options: flags.FlagValues) -> None:
    from sparse_lm import runs

    config = resolve(options.config)
    workdir = options.workdir or f"runs/{config.name or 'run'}"
    summary = runs.train(config, workdir, options.init_from)
    if not _is_primary():
        return
    for split, measured in summary["evaluation"].items():
        print(f"{split}: loss {measured['loss']:.4f} nats per token, {measured['bits_per_byte']:.4f} bits per byte")
        if not measured["causal"]:
            _warn(f"{split}: the routing looks ahead; this loss is not that of a causal language model")
    print(
        f"{summary['steps']} steps, {summary['tokens']} tokens, {summary['seconds']:.0f} s of training "
        f"({summary['tokens_per_second']:.0f} tokens per second), goodput {summary['goodput']:.0%}; in {workdir}"
    )


def _evaluate(options: flags.FlagValues) -> None:
    from sparse_lm import runs

    sources = options.sources or ()
    measured = runs.evaluate(_workdir(options), options.step, options.capacity_factor, _mesh(options), sources)
    if _is_primary():
        print(json.dumps(measured, indent=2))
        if measured["leak"]:
            _warn(f"this loss is not that of a causal language model: {measured['leak']}")


def _compare(options: flags.FlagValues, folders: list[str]) -> None:
    from sparse_lm import runs
    from sparse_lm.scaling.compare import compare, compare_runs
    from sparse_lm.scaling.report import format_summary

    if options.price_per_hour is not None and math.isnan(options.price_per_hour):
        raise UserError("--price-per-hour is nan; it must be a number")
    if folders:
        if unused := [name for name in ("seeds", "sweep_learning_rate") if options[name].present]:
            raise UserError(
                f"--{unused[0].replace('_', '-')} is for runs to be trained; {' and '.join(folders)} are done"
            )
        print(format_summary(compare_runs(*folders, options.workdir, options.price_per_hour)))
        return
    config = resolve(options.config)
    workdir = options.workdir or f"runs/compare-{config.name or 'run'}"
    result = compare(config, runs.train, workdir, options.seeds, options.sweep_learning_rate, options.price_per_hour)
    if _is_primary():
        print(f"{format_summary(result)}\n\nwritten: {workdir}/comparison.md, comparison.json and comparison.png")


def _generate(options: flags.FlagValues) -> None:
    from sparse_lm import runs
    from sparse_lm.routing import router_of
    from sparse_lm.serving import Generator, Sampling, generate_folder, stream_text, warn_beyond_training

    if bool(options.prompt) == bool(options.prompts) or bool(options.prompts) != bool(options.out):
        raise UserError("give --prompt=TEXT, or --prompts=FOLDER and --out=FILE.jsonl, and not both")
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not UTF-8") from error
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    model = runs.load(_workdir(options), options.step, _mesh(options))
    tokenizer = model.tokenizer
    generator = Generator(
        model.config.model,
        model.parameters,
        model.router,
        end_of_text=tokenizer.end_of_text,
        max_tokens=options.tokens,
        sampling=sampling,
        vocabulary=tokenizer.vocabulary_size,
        mesh=model.program.mesh,
    )
    if options.prompts:
        longest = generate_folder(generator, tokenizer, options.prompts, options.out, seed=options.seed)
    else:
        print(options.prompt, end="", flush=True)
        for (piece,) in stream_text(generator, tokenizer, [options.prompt], [options.seed]):
            print(piece, end="", flush=True)
        print()
        longest = len(tokenizer.encode(options.prompt)) + options.tokens
    if warning := warn_beyond_training(longest, model.config.data.length):
        _warn(warning)
    if not model.config.model.experts:
        return
    router = router_of(model.config.model)
    if router.looks_ahead:
        _warn(f"while the model was trained, {router.looks_ahead}; in generation {router.in_generation}")


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)


def _info(options: flags.FlagValues) -> None:
    from sparse_lm.cost.info import info_table
    from sparse_lm.data.sources import parse_sources

    config = resolve(options.config)
    parse_sources(config.data.sources)
    print(info_table(config))


def _profile(options: flags.FlagValues) -> None:
    from sparse_lm.profile import profile_steps, profile_table

    print(profile_table(profile_steps(resolve(options.config), options.steps, options.trace)))


def _replay(options: flags.FlagValues) -> None:
    from sparse_lm.runs import replay

    if options.step is None:
        raise UserError("--step=N is missing, the step to run again")
    print(replay.describe(replay.replay(_workdir(options), options.step)))


def _workdir(options: flags.FlagValues) -> str:
    if not options.workdir:
        raise UserError("--workdir=DIR is missing, the folder of a run")
    return options.workdir


def _mesh(options: flags.FlagValues) -> Mesh | None:
    sizes = {axis.name: options[f"mesh.{axis.name}"].value for axis in dataclasses.fields(Mesh)}
    given = {axis: size for axis, size in sizes.items() if size is not None}
    return Mesh(**given) if given else None


def _join_processes(options: flags.FlagValues) -> contextlib.AbstractContextManager:
    import jax

    from sparse_lm.runs.peers import watch_peers
    from sparse_lm.runs.processes import join_processes

    join_processes(options.distributed, options.coordinator, options.processes, options.process)
    if jax.process_index() > 0:
        logging.getLogger("sparse_lm").setLevel(logging.WARNING)
    return watch_peers()


def _is_primary() -> bool:
    import jax

    return jax.process_index() == 0


class Command(NamedTuple):
    about: str
    define_flags: Callable[[flags.FlagValues], None]
    run: Callable[..., None]
    config: bool = False  # whether it takes --config
    distributed: bool = False  # whether several processes may run it together
    opens_runs: bool = True  # whether it reads or writes the folder of a run


COMMANDS = {
    "train": Command("train a model, or continue its training", _run_flags, _train, True, True),
    "evaluate": Command("measure a saved model on held-out text", _evaluate_flags, _evaluate, distributed=True),
    "compare": Command(
        "train a sparse model and its dense twin, or compare RUN_A RUN_B", _compare_flags, _compare, True, True
    ),
    "generate": Command("continue a text", _generate_flags, _generate),
    "info": Command("parameters, FLOPs and memory of a config", lambda values: None, _info, True, opens_runs=False),
    "profile": Command("show where a training step's time goes", _profile_flags, _profile, True, opens_runs=False),
    "replay": Command("run one step of a run again and look into it", _replay_flags, _replay),
}


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exits with 2 for a mistake of the user's, 1 for a failed run, and 128 + n after signal n."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparse_lm").setLevel(logging.INFO)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # warnings of XLA, no information
    try:
        _dispatch(argv)
        sys.stdout.flush()
    except UserError as error:
        _exit(error, 2)
    except RunFailed as error:
        _exit(error, 1)
    except Stopped as error:
        _exit(error, error.exit_code)
    except BrokenPipeError:  # nobody reads on, as after `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno is None:
            raise
        full = "the disk is full; free some space, or choose another --workdir or --config.cache"
        message = full if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        _exit(f"{message} ({error.filename})" if error.filename else message, 2)
    except MemoryError as error:
        _exit(f"there is too little memory: {error}", 2)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(error: Any, code: int) -> None:
    print(f"sparse-lm: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        os._exit(code)  # jax would wait for the other processes, which may be gone
    sys.exit(code)


def _format_help(name: str, command: Command, values: flags.FlagValues) -> str:
    lines = [f"usage: sparse-lm {name} --FLAG=VALUE …", command.about, ""]
    if command.config:
        lines.append("  --config=FILE: a Python file with get_config(), see configs/")
        lines.append("  --config.PART.FIELD=VALUE: a field of it, see sparse_lm/config.py")
    for flag in values.get_flags_for_module(__name__):
        default = f" (by default {flag.value})" if flag.value not in (None, "", False) else ""
        lines.append(f"  --{flag.name.replace('_', '-')}: {flag.help}{default}")
    return "\n".join(lines)


def _use_underscores(argument: str) -> str:
    """Replaces dashes in a flag's name by underscores, not in its value."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _check_flags(name: str, command: Command, values: flags.FlagValues, arguments: list[str]) -> None:
    known = [*values, *["config"] * command.config]
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-").removeprefix("no")
        if argument.startswith("-") and flag not in known and not flag.startswith("config."):
            raise UserError(f"--{flag.replace('_', '-')} is not a flag of {name}{suggest(flag, known)}")


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: sparse-lm COMMAND --FLAG=VALUE …   (sparse-lm COMMAND --help lists the flags)\n")
        print("\n".join(f"  {name:9} {command.about}" for name, command in COMMANDS.items()))
        sys.exit(0 if argv else 2)
    name, *arguments = argv
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command{suggest(name, COMMANDS)}")
    command = COMMANDS[name]
    arguments = [_use_underscores(a) for a in arguments]
    arguments.sort(key=lambda a: not a.startswith("--config="))  # the file before the fields that override it
    values = flags.FlagValues()
    command.define_flags(values)
    if "--help" in arguments or "-h" in arguments:
        print(_format_help(name, command, values))
        return
    plain = [a for a in arguments if not a.startswith("-")]
    folders = plain if name == "compare" and "--config" not in arguments else []
    if plain and not folders:
        raise UserError(
            f"{plain[0]!r} is not understood; flags are written --flag=value, as in --config=configs/quickstart.py"
        )
    _check_flags(name, command, values, arguments)
    line = [name, *arguments]
    if command.config and not folders:
        line = [quote_text(argument) for argument in line]
        define_config(values, line)
    try:
        values(line)
    except flags.Error as error:
        message = str(error).replace("invalid literal for int() with base 10:", "it must be a whole number, not")
        not_boolean = r"\('Non-boolean argument to boolean flag', (.*)\)"
        message = re.sub(not_boolean, r"it must be true or false, not \1", message)
        message = message.replace("could not convert string to float:", "it must be a number, not")
        raise UserError(message) from error
    if name == "compare" and len(folders) not in (0, 2):
        got = f"{len(folders)} given: {' '.join(folders)}"
        raise UserError(f"compare takes --config=FILE, or the folders of two runs; {got}")
    keep_freed_memory()
    with contextlib.ExitStack() as contexts:
        if command.opens_runs:
            from sparse_lm.runs.quiet import quiet_orbax

            if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # since `__main__`; now there is something to tidy
                signal.signal(signal.SIGINT, signal.default_int_handler)
            contexts.enter_context(quiet_orbax())
        if command.distributed and not folders:
            contexts.enter_context(_join_processes(values))
        command.run(values, *([folders] if name == "compare" else []))
