"""Our list of DeepSpeed's keys is DeepSpeed's own, and is checked before it is imported."""

import re
from pathlib import Path

import pytest

from imagen_scale.config import deepspeed as ours
from imagen_scale.config.deepspeed import DeepSpeedConfig, deepspeed_problems


def deepspeed_models():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return [
        (ours.CommsLogger, CommsLoggerConfig),
        (ours.FileMonitor, CSVConfig),
        (ours.FileMonitor, TensorBoardConfig),
        (ours.LeafModule, DeepSpeedZeroLeafModuleConfig),
        (ours.OffloadOptimizer, DeepSpeedZeroOffloadOptimizerConfig),
        (ours.OffloadParam, DeepSpeedZeroOffloadParamConfig),
        (ours.ThroughputTimer, DeepSpeedThroughputTimerConfig),
        (ours.ZenFlow, ZenFlowConfig),
        (ours.ZeroOptimization, DeepSpeedZeroConfig),
    ]


def test_sections_have_deepspeeds_keys():
    for section, theirs in deepspeed_models():
        names = {field.alias or name for name, field in theirs.model_fields.items()}
        assert set(section.model_fields) == names, section


def test_sections_without_a_model_have_the_keys_that_are_read():
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert set(ours.Aio.model_fields) == set(AIO_DEFAULT_DICT)
    names = {
        value
        for name, value in vars(profiling).items()
        if name.startswith("FLOPS_PROFILER_") and not name.endswith(("DEFAULT", "FORMAT"))
    }
    assert set(ours.FlopsProfiler.model_fields) == names


def test_every_key_is_one_that_deepspeed_reads():
    import deepspeed

    root = Path(deepspeed.__file__).parent
    files = ["runtime/config.py", "runtime/constants.py", "monitor/config.py", "comm/config.py",
             "comm/constants.py", "utils/config.py", "runtime/zero/config.py",
             "profiling/constants.py", "runtime/swap_tensor/constants.py"]  # fmt: skip
    read = set(re.findall(r"""["'](\w+)["']""", "".join((root / f).read_text() for f in files)))
    read |= set(re.findall(r"^    (\w+): ", (root / "monitor/config.py").read_text(), re.M))
    unknown = {*DeepSpeedConfig.model_fields, *ours.OWNED_KEYS} - read
    assert unknown == set()


@pytest.mark.parametrize(
    "section",
    [
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": None}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
        {"zero_optimization": {"offload_optimizer": None}, "wall_clock_breakdown": True},
        {"tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"}},
        {},
    ],
)
def test_what_deepspeed_takes_is_taken(section):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert deepspeed_problems(section) == []
    DeepSpeedZeroConfig(**section.get("zero_optimization", {}))


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {"timers": {"throughput": {"enable": True}}},
            "timers.throughput.enable: unknown key; did",
        ),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, '"fp64" is not allowed: it should be'),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 2}}}, "ratio: 2 is not allowed"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "bucket_size: 0 is not allowed"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, "'none', 'cpu' or 'nvme'"),
        ({"zero_optimization": {"reduce_bucket_size": "5 MB"}}, "should be a valid integer"),
        ({"zero_optimization": {"stage": "auto"}}, '"auto" is not allowed: it should be 0, 1, 2'),
        ({"flops_profiler": [1]}, "is not an object; its keys are enabled, "),
        ({"zero_optimization": None}, "zero_optimization: null is not an object"),
        ({"fp16": {"enabled": True}}, "fp16: is written from training.precision; set it there"),
    ],
)
def test_what_deepspeed_would_ignore_or_find_too_late_is_named(section, problem):
    (told,) = deepspeed_problems(section)
    assert told.startswith("deepspeed.") and problem in told
