"""Configuration: the seed's blocks load, mistakes are explained, all at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from support import ROOT
from support.mutations import MISTAKES, VALID, Mutant, fault, mistake_fault, mutants
from support.tiny import TINY

from imagen_scale.config import dump_config, load_config, parse_bytes, parse_config
from imagen_scale.errors import ConfigError

SEED_IMAGEN = json.loads(
    '{"text_embed_dim": null, "channels": 3, "timesteps": 1000, "cond_drop_prob": 0.15, '
    '"loss_type": "l2", "lowres_sample_noise_level": 0.2, "auto_normalize_img": true, '
    '"dynamic_thresholding_percentile": 0.9, "only_train_unet_number": null, '
    '"image_sizes": [64], "text_encoder_name": "t5_small"}'
)
SEED_UNET = json.loads(
    '{"dim": 128, "dim_mults": [1, 2, 4], "channels": 3, "channels_out": null, '
    '"cond_dim": null, "text_embed_dim": 512, "num_resnet_blocks": 1, '
    '"layer_attns": [false, true, true], "layer_cross_attns": [false, true, true], '
    '"attn_heads": 8, "lowres_cond": false, "memory_efficient": false, '
    '"attend_at_middle": false}'
)
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


def test_the_seeds_two_blocks_load_unchanged():
    seed = {"imagen": SEED_IMAGEN, "unets": [SEED_UNET], "training": {"precision": "fp32"}}
    config = parse_config(json.dumps(seed))
    assert config.imagen.model_dump(mode="json") == SEED_IMAGEN
    loaded = config.unets[0].model_dump(mode="json")
    assert {key: loaded[key] for key in SEED_UNET} == SEED_UNET
    shipped = json.loads((ROOT / "configs" / "pokemon_64.json").read_text())
    assert shipped["imagen"] == SEED_IMAGEN
    assert shipped["unets"] == [SEED_UNET]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_survive_a_dump(path):
    config = load_config(path)
    assert parse_config(dump_config(config)) == config


def test_all_five_are_shipped():
    names = {path.stem for path in CONFIGS}
    assert names == {
        "cascade_64_256", "pokemon_64", "pokemon_64_256", "imagen_64_256_1024", "emoji_demo",
    }  # fmt: skip


def test_the_seeds_block_has_the_stage_above_it_that_was_dropped():
    shipped = json.loads((ROOT / "configs" / "pokemon_64_256.json").read_text())
    base, super_resolution = shipped["unets"]
    assert base == SEED_UNET
    assert shipped["imagen"]["image_sizes"] == [64, 256]
    assert {key: SEED_IMAGEN[key] for key in shipped["imagen"] if key != "image_sizes"} == {
        key: value for key, value in shipped["imagen"].items() if key != "image_sizes"
    }
    assert load_config(ROOT / "configs" / "pokemon_64_256.json").unets[1].pred_type != "eps"
    assert super_resolution["memory_efficient"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unets.0.dim_mult=[1,2]", r"unets.0.dim_mult: unknown key; did you mean dim_mults\?"),
        ("trainin={}", r"trainin: unknown key; did you mean training\?"),
        ('unets.0.dim="16"', r'unets.0.dim: "16" is not allowed: it should be a valid integer'),
        ("unets.0.dim=12", r"unets.0.dim: 12 is not divisible by 8; use 8 or 16"),
        ("unets.0.dim=4", r"unets.0.dim: 4 is not divisible by 8; use 8"),
        ("unets.0.dim_mults=[2,4]", r"unets.0.dim_mults: .* so the first is 1, not 2; multiply"),
        ("unets.0.dim_mults=2", r"unets.0.dim_mults: 2 is not allowed: it should be a valid array"),
        ("unets.0.num_resnet_blocks=[1,2,3]", "num_resnet_blocks: 3 values for 2 levels"),
        ("unets.0.lowres_cond=true", "lowres_cond: true, but U-Net 1 is not conditioned"),
        ("unets.1.lowres_cond=false", "lowres_cond: false, but U-Net 2 is conditioned"),
        ("unets.0.text_embed_dim=512", "text_embed_dim: 512, but the encoder 'minilm' gives 384"),
        ("unets.0.channels=1", "unets.0.channels: 1, but imagen.channels is 3"),
        ("imagen.image_sizes=[32,16]", r"image_sizes: \[32, 16\] does not increase"),
        ("imagen.image_sizes=[16,16]", r"image_sizes: \[16, 16\] does not increase"),
        ("imagen.image_sizes=[16]", "image_sizes: 1 sizes for 2 U-Nets"),
        ("imagen.image_sizes=[17,32]", "image_sizes.0: 17 is not divisible by 2"),
        ("imagen.timesteps=20", "timesteps: 20 is not allowed: .*greater than or equal to 21"),
        ("imagen.loss_type=l3", "loss_type: \"l3\" is not allowed: it should be 'l1', 'l2' or"),
        ("imagen.cond_drop_prob=1.5", "cond_drop_prob: 1.5 is not allowed"),
        ("imagen.only_train_unet_number=3", "only_train_unet_number: 3, but there are 2"),
        ("training.steps=[1,2,3]", "training.steps: 3 values for 2 U-Nets"),
        ("training.micro_batch=3", "global_batch: 8 is not a multiple of micro_batch 3"),
        ("training.warmup_steps=6", "warmup_steps: 6 is not below the 6 steps"),
        ("training.lowres_aug_max=0.1", "lowres_sample_noise_level: 0.2 is above"),
        (
            "data.cache_images_gb=1e300",
            "cache_images_gb: 1e.300 is not allowed: .*less than or equal",
        ),
        ("data.source=folder", "data.path: required for source 'folder'"),
        ("deepspeed.zero_optimisation={}", r"did you mean zero_optimization\?"),
        ("deepspeed.train_batch_size=8", "train_batch_size: is written from training.global_batch"),
        (
            'deepspeed.zero_optimization={"stage":5}',
            "stage: 5 is not allowed: it should be 0, 1, 2",
        ),
        (
            'deepspeed.zero_optimization={"stage":true}',
            "stage: true is not allowed: it should be 0, 1, 2",
        ),
        ("unets=[]", "unets: .* is not allowed: it should have at least 1 item"),
        ("data.path=2024", 'path: 2024 is not allowed: it should .* write it in quotes, "2024"'),
        (f"unets.0.dim={'9' * 400}", "unets.0.dim: 9.* is not allowed"),
        ("unets.0.dim=2147483640", "unets.0.dim: .* less than or equal to 65536"),
        ("imagen.image_sizes=[16,1073741824]", "image_sizes.1: .* less than or equal to 65536"),
        ("imagen.timesteps=1000000000000000", "timesteps: .* less than or equal to 1000000"),
        ('deepspeed.zero_optimization={"offload_optimizer":"cpu"}', "is not an object; its keys"),
        ("deepspeed.zero_optimization=2", "zero_optimization: 2 is not an object; its keys are"),
        (
            'deepspeed.zero_optimization={"stge":2}',
            r"zero_optimization.stge: .*did you mean stage\?",
        ),
        (
            'deepspeed.zero_optimization={"offload_optimizer":{"devcie":"cpu"}}',
            r"offload_optimizer.devcie: unknown key; did you mean device\?",
        ),
        ('deepspeed.aio={"blok_size":1}', r"deepspeed.aio.blok_size: .*did you mean block_size\?"),
        ("deepspeed.gradient_acumulation_steps=2", "gradient_acumulation_steps: unknown key"),
        ("deepspeed.elasticity={}", "deepspeed.elasticity: is not used by this trainer; remove it"),
        ("deepspeed.wandb={}", "deepspeed.wandb: is written from logging.wandb; set it there"),
        ("logging.wandb={}", "logging.wandb.project: this key is required"),
    ],
)
def test_mistakes_are_explained(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(json.dumps(TINY), source="run.json", overrides=(change,))
    assert caught.value.exit_code == 2
    assert all(line.startswith("run.json: ") for line in str(caught.value).splitlines())


IN_BACKWARD = ("memory.optimizer_in_backward=true", "training.grad_clip=null")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("training.precision=bf16", 'deepspeed.zero_optimization={"stage":0}'),
         "precision: bf16 needs fp32 master weights"),
        (("training.precision=bf16", "deepspeed.zero_optimization={}"), "needs fp32 master"),
        (('deepspeed.zero_optimization={"offload_optimizer":{"device":"cpu"}}',),
         "offload_optimizer: ZeRO-0 moves the optimizer nowhere; set .*stage to 1 or more"),
        (('deepspeed.zero_optimization={"stage":1,"offload_param":{"device":"cpu"}}',),
         "offload_param: ZeRO-1 moves the weights nowhere; set .*stage to 3, or leave it out"),
        (('deepspeed.zero_optimization={"stage":3,"offload_param":{"device":"nvme"}}',),
         "offload_param.nvme_path: null, with device nvme; name a folder"),
        (('deepspeed.zero_optimization={"stage":2,"cpu_offload":true}',),
         "cpu_offload: is a name that DeepSpeed gave up; write offload_optimizer"),
        (('deepspeed.zero_optimization={"stage":1,"legacy_stage1":true}',), "legacy_stage1: "),
        (('deepspeed.zero_optimization={"stage":2,"round_robin_gradients":true}',),
         "what is saved would be mixed up; leave it out"),
        (('deepspeed.zero_optimization={"stage":3,"offload_optimizer":{"device":"nvme"}}',),
         "offload_optimizer.device: averages and checkpoints .* set it to cpu"),
        (('deepspeed.zero_optimization={"stage":2,"zenflow":{}}',), "zenflow: keeps masters"),
        (('memory.checkpointing=[["norms"],"blocks"]',), "1 values for the 2 levels of U-Net 1"),
        (("memory.checkpointing=[\"norms\"]",), "checkpointing: 1 values for 2 U-Nets"),
        (("memory.checkpointing=all",), "checkpointing: \"all\" is not allowed"),
        (("memory.budget=12",), "budget: 12 is not allowed"),
        ((f"memory.budget={'9' * 400}GB",), "budget: .* is not allowed: '9+' is not a size"),
        (("memory.budget=12 gigs",), "budget: \"12 gigs\" is not allowed: .* is not a size"),
        (("unets.0.crop=8",), "unets.0.crop: U-Net 1 learns whole pictures"),
        (("unets.1.crop=32",), "unets.1.crop: 32 is not below the picture's side 32"),
        (("unets.1.crop=15",), "unets.1.crop: 15 is not divisible by 2"),
        (("training.optimizer=adafactor", 'deepspeed.zero_optimization={"stage":1}'),
         "adafactor takes whole matrices, which ZeRO flattens"),
        (("training.optimizer=adafactor", "training.precision=bf16"), "adafactor takes whole"),
        (("training.optimizer=adamw_bf16",), "adamw_bf16 is DeepSpeed's for a bf16 network"),
        (("memory.optimizer_in_backward=true",), "grad_clip 1.0 needs the norm of all gradients"),
        ((*IN_BACKWARD, "training.micro_batch=4"), "none can be accumulated"),
        ((*IN_BACKWARD, "training.precision=bf16"), "exact fp32 weights on one card"),
        ((*IN_BACKWARD, 'deepspeed.zero_optimization={"stage":2}'), "exact fp32 weights on one"),
    ],
)  # fmt: skip
def test_memory_that_cannot_be_traded_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(json.dumps(TINY), source="run.json", overrides=changes)
    assert all(line.startswith("run.json: ") for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("12GB", 12 * 10**9), ("11.5 GiB", int(11.5 * 2**30)), ("900MB", 9 * 10**8), ("1TB", 10**12)],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["0.0000000001MB", f"{'9' * 400}GB", "", "12", "GB", "0GB", "-1GB", "12G", "1e3GB", "nanGB"],
)
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_all_problems_come_at_once():
    broken = TINY | {"data": {"sorce": "emoji"}, "training": {"steps": 0, "lr": "abc"}}
    with pytest.raises(ConfigError) as caught:
        parse_config(json.dumps(broken))
    message = str(caught.value)
    for part in ("data.sorce", "training.steps", "training.lr"):
        assert message.count(part) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list; a configuration is an object"),
        ('{"imagen": {"image_sizes": [8], "image_sizes": [16]}}', "stands twice"),
        ('{"imagen": NaN}', "NaN is not allowed"),
        ('{"imagen": 1e999}', "1e999 is too large"),
        ('{"imagen": "\\ud800"}', "broken character"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 17 + "]" * 17, "nested too deeply; 16 levels are allowed"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
    ],
)
def test_broken_json_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(text)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        load_config(tmp_path / "none.json")


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="/dev/zero: longer than 1,000,000 characters"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.json").write_bytes('{"größe": 1}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load_config(tmp_path / "latin.json")
    (tmp_path / "windows.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TINY).encode())
    assert load_config(tmp_path / "windows.json") == parse_config(json.dumps(TINY))


def test_a_hundred_thousand_keys_are_no_reason_to_wait():
    text = json.dumps({f"key{i}": i for i in range(100_000)})[:-1] + ', "key7": 0}'
    with pytest.raises(ConfigError, match="'key7' stands twice"):
        parse_config(text)


@pytest.mark.parametrize(
    "change", ["unets.²=1", "unets.٣=1", f"unets.{'9' * 5000}=1", "unets.-1=1", "unets.01=1"]
)
def test_places_in_a_list_are_plain_numbers(change):
    with pytest.raises(ConfigError, match="does not exist; the list has 2 entries"):
        parse_config(json.dumps(TINY), overrides=(change,))


@pytest.mark.parametrize(
    "changed",
    [
        {"data": {"source": "folder", "path": "a\0b"}},
        {"training": {"sample_prompts": ["sun", "a\0b"]}},
        {"deepspeed": {"a\0b": {}}},
    ],
)
def test_a_nul_is_refused(changed):
    with pytest.raises(ConfigError, match=r"'a\\x00b': holds a NUL, as no path may; remove it"):
        parse_config(json.dumps(TINY | changed))


@pytest.mark.parametrize("value", ["NaN", "[" * 100_000, '{"a": 1, "a": 2}', "\udcff"])
def test_overrides_are_as_strict_as_the_file(value):
    with pytest.raises(ConfigError):
        parse_config(json.dumps(TINY), overrides=(f"deepspeed.steps_per_print={value}",))


def test_overrides_reach_lists_and_take_bare_words():
    overrides = ("unets.1.dim=16", "data.source=emoji", "training.lr=1e-3")
    config = parse_config(json.dumps(TINY), overrides=overrides)
    assert config.unets[1].dim == 16
    assert config.training.lr == 1e-3
    with pytest.raises(ConfigError, match="the list has 2 entries"):
        parse_config(json.dumps(TINY), overrides=("unets.2.dim=8",))
    with pytest.raises(ConfigError, match="write section.key=value"):
        parse_config(json.dumps(TINY), overrides=("seed",))


def test_the_valid_ones_are_valid():
    for config in VALID:
        assert fault(Mutant(json.dumps(config))) is None
        parse_config(json.dumps(config))


@settings(max_examples=200)  # `benchmarks/faults.py configs` tries a thousand
@given(mutants())
def test_mutations_are_accepted_or_explained_but_never_crash(mutant):
    assert fault(mutant) is None


@pytest.mark.parametrize("change", MISTAKES)
def test_common_mistakes_are_named(change):
    assert mistake_fault(change) is None


def test_a_wrong_configuration_is_explained_without_torch(tmp_path):
    wrong = TINY | {"deepspeed": {"zero_optimization": {"stge": 2}}}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    code = (
        "import sys; from click.testing import CliRunner;"
        "from imagen_scale.commands.main import main;"
        f"done = CliRunner().invoke(main, ['config', 'check', {str(tmp_path / 'wrong.json')!r}]);"
        "assert done.exit_code == 2 and 'did you mean stage?' in done.output, done.output;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_configuration_needs_no_torch():

    code = "import sys, imagen_scale.commands.main as m; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path("/")).returncode == 0


def test_a_section_that_is_null_takes_what_is_set_inside():
    written = TINY | {"logging": {**TINY.get("logging", {}), "wandb": None}}
    config = parse_config(json.dumps(written), overrides=("logging.wandb.project=birds",))
    assert config.logging.wandb.project == "birds"
    with pytest.raises(
        ConfigError, match="training.lr is a plain value, with nothing inside; set training.lr"
    ):
        parse_config(json.dumps(TINY), overrides=("training.lr=1", "training.lr.x=1"))
    with pytest.raises(ConfigError, match=r"--set a\.a.*: write section\.key=value"):
        parse_config(json.dumps(TINY), overrides=(".".join(["a"] * 5000) + "=1",))
