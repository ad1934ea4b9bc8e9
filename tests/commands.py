"""Runs of the command line in processes of their own, on a small model and text."""

import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
from sparse_lm.config import *

def get_config():
    return Config(
        name="tiny",
        model=Model(vocabulary=320, width=32, layers=2, heads=4, ffn_width=64, experts=8, {model}),
        data=Data(sources=("folder:{text}",), length=32),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=3),
        training=Training(steps={steps}, batch=8),
        evaluation=Evaluation(every=10, rows=16),
        checkpoints=Checkpoints(every=5),
        logging=Logging(every=1, progress=False),
        cache="{cache}",
    )
"""


def write_config(folder: pathlib.Path, steps: int = 20, model: str = "") -> pathlib.Path:
    """A config file, and the text that it names, in a folder."""
    text, draw = folder / "text", random.Random(0)
    text.mkdir(exist_ok=True)
    words = "the cat sat on a mat and then went away to see what other cats do all day long".split()
    for i in range(200):
        (text / f"{i}.txt").write_text(" ".join(draw.choices(words, k=60)))
    file = folder / "config.py"
    file.write_text(CONFIG.format(text=text, cache=folder / "cache", steps=steps, model=model))
    return file


def copy_source(folder: pathlib.Path) -> pathlib.Path:
    """Copies what an installation is made of to a new folder."""
    shutil.copytree(ROOT / "sparse_lm", folder / "sparse_lm")
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(*arguments: str, devices: int = 1, **options) -> subprocess.Popen:
    """`sparse-lm` with the arguments, on so many CPU devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "sparse_lm", *arguments], env=environment, **streams | options)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What the process printed, stdout and stderr; fails unless it ends with the code."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, out + err
    return out + err


def run(*arguments: str, code: int = 0, devices: int = 1, **options) -> str:
    return finish(start(*arguments, devices=devices, **options), code)
