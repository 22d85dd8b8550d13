"""The pictures expected at each step: told to whoever listens, and without effect on the result."""

from typing import get_args

import numpy as np
import pytest
import torch

from imagen_scale import Cascade as PythonCascade
from imagen_scale.diffusion.names import Sampler
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.sampling.stage import Listener
from imagen_scale.sampling.stages import TrainedStages

make = SamplingOptions.make


def listened(cascade, **options):
    """What is made with a listener that spoils all it is told, and copies from before that."""
    heard = []

    def hear(unet, step, steps, x_0):
        heard.append((unet, step, steps, x_0.clone()))
        x_0.zero_()

    return cascade.sample(["sun", "key"], make(**options), Listener(on_estimate=hear)), heard


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_listening_changes_no_bit(run, sampler):
    options = {"steps": [4, 3], "sampler": sampler, "seed": 3}
    cascade = TrainedStages.load(run)
    made, heard = listened(cascade, **options)
    for one, other in zip(made, cascade.sample(["sun", "key"], make(**options)), strict=True):
        assert torch.equal(one, other)
    assert [entry[:3] for entry in heard] == [
        *((1, step, 4) for step in range(1, 5)), *((2, step, 3) for step in range(1, 4))
    ]  # fmt: skip
    assert [entry[3].shape[-1] for entry in heard] == [16] * 4 + [32] * 3
    assert all(entry[3].abs().max() <= 1 for entry in heard)
    # The last step of a stage expects what it gives.
    assert torch.equal(heard[3][3], made[0])
    assert torch.equal(heard[-1][3], made[1])


def test_tiles_and_parts_are_heard_too(run):
    cascade = TrainedStages.load(run)
    options = {"steps": 2, "tile": 16, "at_once": 1}
    made, heard = listened(cascade, **options)
    for one, other in zip(made, cascade.sample(["sun", "key"], make(**options)), strict=True):
        assert torch.equal(one, other)
    assert [entry[0] for entry in heard] == [1] * 4 + [2] * 4
    assert all(len(entry[3]) == 1 for entry in heard)


@pytest.mark.parametrize("runtime", ["onnx", "compile"])
def test_every_runtime_tells(exported, runtime):
    cascade = TrainedStages.load(exported, runtime=RuntimeOptions(runtime=runtime), unet_limit=1)
    made, heard = listened(cascade, steps=2)
    assert torch.equal(made[0], cascade.sample(["sun", "key"], make(steps=2))[0])
    assert torch.equal(heard[-1][3], made[0])


def test_python_is_told_in_pictures(run):
    heard = []
    cascade = PythonCascade.load(run)
    (one,) = cascade.stream("sun", steps=[2, 1], on_estimate=lambda *told: heard.append(told))
    assert [told[:3] for told in heard] == [(1, 1, 2), (1, 2, 2), (2, 1, 1)]
    assert [[image.size for image in told[3]] for told in heard] == [[(16, 16)], [(16, 16)],
                                                                     [(32, 32)]]  # fmt: skip
    np.testing.assert_array_equal(np.asarray(heard[-1][3][0]), np.asarray(one.image))


def test_a_listener_may_end_it_and_the_network_is_freed(run):
    class EnoughError(Exception):
        pass

    def hear(unet, step, steps, x_0):
        if step == 2:
            raise EnoughError

    cascade = TrainedStages.load(run)
    with pytest.raises(EnoughError):
        cascade.sample(["sun"], make(steps=5), Listener(on_estimate=hear))
    assert len(cascade.sample(["sun"], make(steps=1))) == 2
