"""Trains every stage of the cascades on the card at hand, within 12 GB of it and without a limit.

\b
    python benchmarks/gpu_memory.py                               both cascades, 10 child processes
    python benchmarks/gpu_memory.py --config FILE --memory 8GB    another cascade or another limit
    python benchmarks/gpu_memory.py --write docs/memory.md        into the document, between marks

For each stage the planner chooses what fits, the trainer's own engine and loss take real steps on
random pictures and text, and the prediction is printed beside what the allocator counted. Exits
with 1 if a stage does not fit or fails, with 2 where there is no card.
"""  # noqa: D301 - click reads the backspace

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from report import machine, publish, table, versions, write_option

from imagen_scale.config import Config, load_config, parse_bytes, parse_config
from imagen_scale.data.sequence import Batch
from imagen_scale.errors import ImagenScaleError
from imagen_scale.models.memory import apply_checkpointing, in_host_memory
from imagen_scale.models.unet import UNet
from imagen_scale.planning.cost import CARD_PROCESS, process_bytes, step_cost
from imagen_scale.planning.machine import this_machine
from imagen_scale.planning.planner import Planner
from imagen_scale.planning.report import in_words
from imagen_scale.planning.setup import Setup
from imagen_scale.training import launch_variables, ranks
from imagen_scale.training.building import make_engine
from imagen_scale.training.ema import Ema
from imagen_scale.training.memory_use import (
    forget_peaks,
    host_bytes,
    is_out_of_memory,
    peak_host_bytes,
    release_memory,
)
from imagen_scale.training.objective import Objective

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("cascade_64_256", "imagen_64_256_1024")
MARK = "gpu_memory"
PACKAGES = ("torch", "deepspeed")
COLUMNS = ("stage", "parameters", "limit", "planned", "accumulated here", "predicted", "in use",
           "allocated", "reserved", "host predicted", "host measured", "images/s")  # fmt: skip


# ------------------------------------------------------------------- one stage, in its own process


def left_to_planner(config: Config) -> Config:
    """The same cascade with everything unwritten that the planner may choose."""
    data = config.model_dump(mode="json")
    data["training"] |= {"micro_batch": None, "optimizer": None}
    data["memory"] = {}
    data["deepspeed"].pop("zero_optimization", None)
    return parse_config(json.dumps(data))


def random_batch(config: Config, unet_index: int, batch: int, text_embed_dim: int) -> Batch:
    """Pictures and text of one micro-batch as the data loader would give them."""
    size, tokens = config.imagen.image_sizes[unet_index], config.unets[unet_index].max_text_len
    return Batch(
        images=torch.randint(256, (batch, config.imagen.channels, size, size), dtype=torch.uint8),
        text_embeds=torch.randn(batch, tokens, text_embed_dim).half(),
        text_mask=torch.ones(batch, tokens, dtype=torch.bool),
        positions=torch.arange(batch),
        captions=[""] * batch,
    )


def measure_stage(task: dict[str, Any]) -> dict[str, Any]:
    """Plans one stage, trains it for some steps and says what that took.

    Args:
        task: `config` (a file), `unet_index`, `limit` (bytes or None), `steps` and
            `max_accumulation`.

    Returns:
        What `row` shows; bytes.
    """
    config, index = left_to_planner(load_config(task["config"])), task["unet_index"]
    launch_variables.fill_environment()
    ranks.check_machine()
    on_card, budget = torch.cuda.is_available(), this_machine(ranks=1)
    if task["limit"] is not None:
        # The fraction holds for torch's allocator; the context is outside of it.
        _, everything = torch.cuda.mem_get_info()
        if not CARD_PROCESS < task["limit"] <= everything:
            return {"fault": f"not to be tried on a card of {everything / 1e9:.1f} GB"}
        torch.cuda.set_per_process_memory_fraction((task["limit"] - CARD_PROCESS) / everything)
        budget = budget._replace(card=task["limit"])
    width = config.stage(index + 1).network.text_embed_dim
    plan = Planner(config.stage(index + 1), budget).plan()
    setup, activations = plan.choice.setup, plan.choice.activations
    planned = setup.accumulation
    found = {
        "card": card_name() if on_card else None,
        "parameters": activations.num_parameters,
        "planned": in_words(setup),
        "accumulation": [min(planned, task["max_accumulation"]), planned],
        "fault": plan.fault and f"does not fit: {plan.fault}",
    }
    if plan.fault:
        return found
    setup = setup._replace(accumulation=found["accumulation"][0])
    cost = step_cost(setup, activations, on_card=on_card)
    found |= {"predicted": cost.card, "host_predicted": cost.host - process_bytes(on_card=on_card)}
    ranks.join()
    try:
        return found | train(config, index, setup, width, task["steps"], planned)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return found | {"fault": f"out of memory: {str(error).splitlines()[0]}"}
    finally:
        ranks.stop()


def train(
    config: Config, index: int, setup: Setup, text_embed_dim: int, steps: int, planned: int
) -> dict[str, Any]:
    """Takes optimizer steps as the trainer does; returns peaks in bytes and the speed."""
    release_memory()
    forget_peaks()
    baseline = host_bytes()
    torch.manual_seed(0)
    unet = UNet(config.stage(index + 1, text_embed_dim).network)
    hold = in_host_memory if setup.offload_activations else nullcontext
    apply_checkpointing(unet, setup.checkpointing, hold=hold).train()
    engine = make_engine(unet, config.stage(index + 1, 384), setup)
    ema = Ema(engine, config.training.ema_decay, offload=setup.ema_offload)
    objective = Objective(config.stage(index + 1), engine.device)
    batch = random_batch(config, index, setup.micro_batch, text_embed_dim)
    micro_s: list[float] = []
    step_s: list[float] = []
    position = 0
    for step in range(1, steps + 1):
        start = now()
        for micro_step in range(setup.accumulation):
            micro_start = now()
            loss = objective.loss(engine, batch._replace(positions=batch.positions + position))
            engine.backward(loss)
            engine.step()
            position += setup.micro_batch
            if micro_step < setup.accumulation - 1:  # the last one updates the weights
                micro_s.append(now() - micro_start)
        ema.update(step)
        step_s.append(now() - start)
        say(f"step {step} of {steps}: loss {loss.item():.4f}, {step_s[-1]:.2f} s")
    if not loss.isfinite():
        return {"fault": f"the loss is {loss.item()}"}
    warm_micro = micro_s[setup.accumulation - 1 :]
    seconds = full_step_seconds(step_s[1:], warm_micro, setup.accumulation, planned)
    found = {
        "images_per_s": planned * setup.micro_batch / seconds,
        "host_measured": peak_host_bytes() - baseline,
    }
    if torch.cuda.is_available():
        free, everything = torch.cuda.mem_get_info()
        context = everything - free - torch.cuda.memory_reserved()
        reserved = torch.cuda.max_memory_reserved()
        found |= {
            "in_use": reserved + context,
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": reserved,
        }
    return found


def full_step_seconds(
    step_s: list[float], micro_s: list[float], accumulated: int, planned: int
) -> float:
    """Seconds of an optimizer step with the planned accumulation.

    Args:
        step_s: Of the steps taken, each with `accumulated` micro-batches.
        micro_s: Of their micro-batches without an update.
        accumulated: Micro-batches in each step that was taken.
        planned: Micro-batches in a step of a real run.
    """
    seconds = sum(step_s) / len(step_s)
    if planned > accumulated:
        seconds += (planned - accumulated) * sum(micro_s) / len(micro_s)
    return seconds


def now() -> float:
    """The time when all that was asked of the card is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def card_name() -> str:
    """The card, its memory, its driver and the libraries that come with torch."""
    _, everything = torch.cuda.mem_get_info()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        driver = "unknown"
    return (
        f"{torch.cuda.get_device_name()} ({everything / 1e9:.1f} GB), driver {driver}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )


def say(message: str) -> None:
    """One line for the person watching; stdout is the table's."""
    click.echo(message, err=True)


# -------------------------------------------------------------------------------------- the table


def run_stage(task: dict[str, Any], *, cpu: bool) -> dict[str, Any]:
    """`measure_stage` in a fresh process: nothing of another stage is left on the card."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--inside", json.dumps(task | {"answer": str(answer)})]
        done = subprocess.run(command, env=environment, stdout=sys.stderr)
        if answer.is_file():
            return json.loads(answer.read_text())
    return {"fault": f"the process ended with {done.returncode}; its reason is printed above"}


def row(name: str, limit: int | None, found: dict[str, Any]) -> list[str]:
    """One stage under one limit; a dash where there is no figure."""

    def gb(key: str) -> str:
        return f"{found[key] / 1e9:.2f} GB" if key in found else "-"

    planned = found.get("planned", "-")
    if found.get("fault"):
        planned = f"**{found['fault']}** ({planned})"
    ran, asked = found.get("accumulation", ["-", "-"])
    return [
        name,
        f"{found['parameters'] / 1e6:.1f} M" if "parameters" in found else "-",
        "none" if limit is None else f"{limit / 1e9:g} GB",
        planned,
        f"{ran} of {asked}",
        *map(gb, ("predicted", "in_use", "allocated", "reserved")),
        *map(gb, ("host_predicted", "host_measured")),
        f"{found['images_per_s']:.2f}" if "images_per_s" in found else "-",
    ]


def page(title: str, rows: list[list[str]], steps: int) -> str:
    """The machine, how to read the table, the table."""
    notes = (
        f"Each line: {steps} optimizer steps in a process of its own, the first of them not "
        "timed. Under a limit torch's allocator may take the limit less 0.6 GB, which are left to "
        "the CUDA context. *Predicted* is the planner's; *in use* is the allocator's peak with "
        "the context; *allocated* is the peak of live tensors. Where fewer micro-batches than "
        "planned were accumulated, images/s counts the missing ones at the measured time of one. "
        "Everything that the planner may choose was left to it."
    )
    return f"{title}\n\n{notes}\n\n{table(COLUMNS, rows)}"


def tasks(
    configs: tuple[str, ...], unets: tuple[int, ...], limits: list[int | None], **options: int
) -> list[tuple[str, dict[str, Any]]]:
    """The name and the task of every stage under every limit.

    Args:
        configs: Files.
        unets: Numbers of the stages, from 1; none means all.
        limits: In bytes, None for no limit.
        options: Passed on to `measure_stage`.
    """
    found = []
    for path in configs:
        config = load_config(path)
        for index, size in enumerate(config.imagen.image_sizes):
            name = f"`{Path(path).stem}` U-Net {index + 1}, {size} px"
            for limit in limits if not unets or index + 1 in unets else ():
                task = {"config": path, "unet_index": index, "limit": limit}
                found.append((name, task | options))
    return found


def card_limit(memory: str) -> int:
    """The limit in bytes.

    Raises:
        click.UsageError: If it is not a size.
    """
    try:
        return parse_bytes(memory)
    except ValueError as error:
        raise click.UsageError(f"--memory: {error}.") from None


@click.command(help=__doc__)
@click.option("--config", "configs", multiple=True, type=click.Path(dir_okay=False),
              help="A cascade; repeatable. Default: the two large ones of configs/.")  # fmt: skip
@click.option("--unet", "unets", multiple=True, type=int, help="Only this stage; repeatable.")
@click.option("--memory", default="12GB", show_default=True, help="The limit.")
@click.option("--steps", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--max-accumulation", type=click.IntRange(min=2), default=4, show_default=True,
              help="Micro-batches per step at most, to save time.")  # fmt: skip
@click.option("--cpu", is_flag=True, help="Train on the CPU, without limits: for small U-Nets.")
@write_option(MARK)
@click.option("--inside", hidden=True)
def main(
    configs: tuple[str, ...],
    unets: tuple[int, ...],
    memory: str,
    steps: int,
    max_accumulation: int,
    cpu: bool,
    write: Path | None,
    inside: str | None,
) -> None:
    """Runs every stage in its own process, prints the table, exits with 1 if one failed."""
    if inside is not None:
        task = json.loads(inside)
        Path(task["answer"]).write_text(json.dumps(measure_stage(task)))
        return
    limit = card_limit(memory)
    if not cpu and not torch.cuda.is_available():
        say("gpu_memory needs an NVIDIA card and torch finds none; --cpu trains on the CPU.")
        sys.exit(2)
    paths = configs or tuple(str(ROOT / "configs" / f"{name}.json") for name in CONFIGS)
    limits = [None] if cpu else [limit, None]
    options = {"steps": steps, "max_accumulation": max_accumulation}
    rows, names, failed = [], set(), False
    for name, task in tasks(paths, unets, limits, **options):
        say(f"{name}, limit {'none' if task['limit'] is None else memory}")
        found = run_stage(task, cpu=cpu)
        failed |= bool(found.get("fault"))
        names |= {found["card"]} if found.get("card") else set()
        rows.append(row(name, task["limit"], found))
    title = f"{'; '.join(names)}; {versions(*PACKAGES)}." if names else machine(*PACKAGES)
    text = page(title, rows, steps)
    publish(text, write, MARK)
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except ImagenScaleError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
