"""Which executor is the fastest: the rule behind `model.executor = "auto"`, from shapes alone.

`python -m experiments.benchmarks.dense_twin` shows on a machine whether the rule still holds.
"""


def automatic(platform: str, form: str, *, size: int, experts: int, top_k: int, capacity: int, width: int) -> str:
    """The executor of a layer of `experts` experts of hidden width `width` that routes `size` tokens at a time.

    platform: cpu, gpu or tpu. form: token, expert or slots, the form of the router's choice. capacity: places per
    expert.

    Slots are mixtures, which masks alone express, and experts that choose tokens fill every place. Where tokens choose:
    on a CPU sorted rows are the fastest throughout (docs/lab_notebook.md). A TPU multiplies by masks at next to nothing
    as long as they cost less than a tenth of the experts, size / width; on it and on a GPU indices are best where few
    places stay empty, and sorted rows where a capacity would leave most of them empty. Neither has been timed yet.
    """
    if form == "slots":
        return "einsum"
    if form == "expert":
        return "gather"
    if platform == "cpu":
        return "grouped"
    if platform == "tpu" and experts * capacity <= 2 * top_k * size and size <= width / 10:
        return "einsum"
    return "gather" if experts * capacity <= 2 * top_k * size else "grouped"
