"""While tests run, the shapes in signatures are enforced, and programs are compiled quickly rather than well."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes nearly all the time of tests this small; processes that tests start inherit this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from jaxtyping import install_import_hook  # noqa: E402

CHECKED = ("mesh", "parameter", "registry", "routing", "experts", "models", "training", "serving", "kernels")
install_import_hook([f"sparse_lm.{name}" for name in CHECKED], "beartype.beartype")
