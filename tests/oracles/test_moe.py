import numpy as np
import pytest

from tests.oracles import moe


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients_by_hand_are_finite_differences(activation):
    random = np.random.default_rng(0)
    groups, size, width, count, hidden = 2, 5, 3, 3, 4
    shapes = {"into": (count, width, hidden), "out": (count, hidden, width), "gate": (count, width, hidden)}
    names = ("into", "out", "gate") if activation == "swiglu" else ("into", "out")
    given = {"x": random.normal(size=(groups, size, width)), "router": random.normal(size=(width, count))}
    given["experts"] = {name: random.normal(size=shapes[name]) for name in names}
    valid = random.random((groups, size)) < 0.8
    dy = random.normal(size=given["x"].shape)

    def run():
        return moe.switch(given["x"], valid, given["router"], given["experts"], activation, 1, 0.3, 0.2, dy)

    y, _, expert, lost, gradients = run()
    assert lost > 0
    for array, gradient in [(given[n], gradients[n]) for n in ("x", "router")] + [
        (given["experts"][n], gradients["experts"][n]) for n in names
    ]:
        for index in np.ndindex(array.shape):
            value, ends = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = value + step
                y, losses, again, *_ = run()
                assert (again == expert).all()
                ends.append((y * dy).sum() + sum(losses.values()))
            array[index] = value
            np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-6, atol=1e-7)
