"""Installation of sparse_lm; what it needs and what the extras add."""

import pathlib
import sys

from setuptools import find_packages, setup

if not sys.platform.startswith("linux"):
    sys.exit(f"sparse_lm runs on Linux; this is {sys.platform} (on Windows use WSL, on a Mac a Linux container)")

HERE = pathlib.Path(__file__).parent

setup(
    name="sparse_lm",
    version="0.3.0",
    description="Train sparse mixture-of-experts language models in JAX and compare them with their dense twins",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["sparse_lm", "sparse_lm.*"]),
    python_requires=">=3.11",
    install_requires=[
        # jax 0.10 is the last for Python 3.11 and 0.12 the newest tested; pip picks by the interpreter.
        "jax>=0.10,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "tensorflow-datasets>=4.9.9",
        "absl-py",
        "grain>=0.2.18",
        "array-record",
        "tensorstore",
        "etils[epath]",
        "numpy",
        "scipy",
        "tokenizers",
        "ml-collections>=1.1",
        "jaxtyping",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "gcs": ["gcsfs"],
        "hf": ["transformers", "sentencepiece", "torch==2.13.0"],
        "sentencepiece": ["sentencepiece"],
        "tensorboard": ["tensorboard"],
        "notebooks": ["jupyterlab"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "beartype", "sentencepiece", "importlib_resources", "gcsfs"],
    },
    entry_points={"console_scripts": ["sparse-lm=sparse_lm.__main__:main"]},
    classifiers=["Programming Language :: Python :: 3", "Operating System :: POSIX :: Linux"],
)
