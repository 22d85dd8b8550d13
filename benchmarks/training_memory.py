"""Memory and time of one training pass beside MinImagen and imagen-pytorch, on the same weights.

\b
    python benchmarks/training_memory.py                            both networks
    python benchmarks/training_memory.py --networks base            the seed's base U-Net alone
    python benchmarks/training_memory.py --write docs/memory.md     into the document, between marks

The super-resolution network takes about 15 GB of memory: weights of MinImagen's (which ours share),
of imagen-pytorch's and of ours in bf16, and two sets of gradients. Run it with nothing else on the
machine and read ratios, not seconds. Exits with 1 if a goal is missed.
"""  # noqa: D301 - click reads the backspace

import gc
import inspect
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import click
import peers
import torch
from report import machine, publish, table, write_option
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from imagen_scale.config import Config, load_config, parse_config
from imagen_scale.config import Network as UnetNetwork
from imagen_scale.config.section import CheckpointingLevel
from imagen_scale.models.memory import apply_checkpointing
from imagen_scale.models.unet import UNet
from imagen_scale.planning.activations import measure
from imagen_scale.planning.cost import step_cost
from imagen_scale.planning.live_bytes import LiveBytes
from imagen_scale.planning.setup import written_setup
from imagen_scale.training.in_backward import InBackwardEngine

TEXT_DIM, TOKENS, WORDS = 512, 256, 24  # T5-small's width; tokens in a batch, real ones among them
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative, fp32 against MinImagen
MARK = "training_memory"
MINIMAGEN, IMAGEN_PYTORCH = "MinImagen fp32", "imagen-pytorch fp32"
# `minimagen.Unet.Super`, the Imagen paper's 64 -> 256 px network.
SUPER = {
    "dim": 128,
    "dim_mults": [1, 2, 4, 8],
    "num_resnet_blocks": [2, 4, 8, 8],
    "layer_attns": [False, False, False, True],
    "layer_cross_attns": [False, False, False, True],
    "memory_efficient": True,
}


class Network(NamedTuple):
    """One of the networks that are compared."""

    index: int  # in the cascade of `config`
    size: int  # of the picture, pixels
    batch: int
    title: str


NETWORKS = {
    "base": Network(0, 64, 2, "the U-Net of `configs/pokemon_64.json`, 64 px, batch 2"),
    "super": Network(1, 256, 1, "MinImagen's `Super`, 64 -> 256 px, batch 1"),
}


class Ours(NamedTuple):
    """One way to train our U-Net."""

    name: str
    level: CheckpointingLevel
    is_bf16: bool


OURS = (
    Ours("ours none fp32", "none", False),
    Ours("ours norms fp32", "norms", False),
    Ours("ours blocks fp32", "blocks", False),
    Ours("ours norms bf16", "norms", True),
    Ours("ours blocks bf16", "blocks", True),
)


PLAIN = "ours none fp32"  # what recomputation has to equal
RECOMPUTED = ("ours norms fp32", "ours blocks fp32")
Gradients: TypeAlias = dict[str, Tensor]


class Measured(NamedTuple):
    """One way to train one network; bytes without weights."""

    parameters: int
    held: int  # alive between forward and backward
    peak: int  # at the worst moment of the pass, gradients included
    loss: float
    seconds: float  # of forward and backward, median


class Whole(NamedTuple):
    """All bytes of a training step with its optimizer."""

    card: int
    host: int
    how: str


class Verdict(NamedTuple):
    """One promise and whether the measured value keeps it."""

    text: str
    is_kept: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.is_kept else 'FAIL'}  {self.text}"


# ------------------------------------------------------------------------------- what is measured


def config(**sections: Any) -> Config:
    """A cascade of both networks, with sections of its own."""
    base = load_config(peers.ROOT / "configs" / "pokemon_64.json").unets[0]
    training = {
        "precision": "fp32", "grad_clip": None,
        "global_batch": [network.batch for network in NETWORKS.values()],
    }  # fmt: skip
    data = {
        "imagen": {"image_sizes": [network.size for network in NETWORKS.values()]},
        "unets": [base.model_dump(mode="json"), SUPER],
        "training": training | sections.pop("training", {}),
    }
    return parse_config(json.dumps(data | sections))


def build_peer(unet_class: Any, stage: UnetNetwork) -> Any:
    """A peer's U-Net with our configuration's values and its own defaults for the rest."""
    known = inspect.signature(unet_class).parameters
    return unet_class(**{key: value for key, value in stage if key in known})


def build_ours(stage: UnetNetwork, level: CheckpointingLevel, weights: dict[str, Tensor]) -> UNet:
    """Our U-Net on given weights, which it shares rather than copies."""
    with torch.device("meta"):
        unet = UNet(stage)
    unet.load_state_dict(weights, assign=True)
    return apply_checkpointing(unet, (level,) * stage.num_levels).train()


class Pass:
    """Forward and backward over one random batch, the same for every network given to it."""

    def __init__(self, network: Network) -> None:
        torch.manual_seed(0)
        batch, side = network.batch, network.size
        self.x_t, self.eps = torch.randn(2, batch, 3, side, side)
        self.t = torch.randint(0, 1000, (batch,))
        self.text_embeds = torch.randn(batch, TOKENS, TEXT_DIM)
        self.text_mask = (torch.arange(TOKENS) < WORDS).expand(batch, -1)
        self.keep_mask = torch.ones(batch, dtype=torch.bool)  # no caption is dropped
        self.lowres = ()
        if network.index > 0:
            self.lowres = (torch.randn_like(self.x_t), torch.randint(0, 1000, (batch,)))

    def ours(self, unet: Any) -> Tensor:
        """The loss of our U-Net."""
        text = self.text_embeds, self.text_mask, self.keep_mask
        return self._loss(unet(self.x_t, self.t, *text, *self.lowres))

    def peer(self, unet: Any) -> Tensor:
        """The loss of a peer's U-Net."""
        names = ("lowres_cond_img", "lowres_noise_times")
        lowres = dict(zip(names, self.lowres, strict=False))
        text = {"text_embeds": self.text_embeds, "text_mask": self.text_mask}
        return self._loss(unet(self.x_t, self.t, **text, **lowres, cond_drop_prob=0.0))

    def _loss(self, prediction: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(prediction.float(), self.eps)


def measure_bytes(loss_of: Callable[[], Tensor]) -> tuple[int, int, float]:
    """Bytes held after forward, the peak over forward and backward, and the loss."""
    gc.collect()  # nothing of another network may die while this one is counted
    with LiveBytes() as live:
        loss = loss_of()
        held = live.now
        loss.backward()
        return held, live.peak, loss.item()


def take_gradients(unet: Any) -> Gradients:
    """The gradients by parameter, which the network then no longer has."""
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad(set_to_none=True)
    return gradients


def gradient_error(gradients: Gradients, reference: Gradients) -> float:
    """Largest difference over all parameters, relative to the parameter's largest gradient."""
    if gradients.keys() != reference.keys():
        return math.inf
    return max(
        ((gradients[name] - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        for name, theirs in reference.items()
    )


def build_all(network: Network) -> dict[str, tuple[Any, Callable[[], Tensor]]]:
    """Every way to train one network: the U-Net, and what gives its loss."""
    stage = config().stage(network.index + 1, TEXT_DIM).network
    minimagen, imagen_pytorch = peers.import_unets()
    run = Pass(network)
    theirs = {
        MINIMAGEN: build_peer(minimagen, stage).train(),
        IMAGEN_PYTORCH: build_peer(imagen_pytorch, stage).train(),
    }
    weights = theirs[MINIMAGEN].state_dict()
    halves = {key: value.bfloat16() for key, value in weights.items()}
    ours = {
        way.name: build_ours(stage, way.level, halves if way.is_bf16 else weights) for way in OURS
    }
    return {way: (unet, partial(run.peer, unet)) for way, unet in theirs.items()} | {
        way: (unet, partial(run.ours, unet)) for way, unet in ours.items()
    }


def compare(name: str, repeats: int) -> tuple[dict[str, Measured], list[Verdict]]:
    """Measures every way to train one network.

    Returns:
        Measured values by the way's name, and the verdicts on equality.
    """
    ways = build_all(NETWORKS[name])
    verdicts, bytes_and_loss = [], {}
    reference: Gradients = {}
    for way, (unet, loss_of) in ways.items():
        say(f"{name}: bytes of {way}")
        bytes_and_loss[way] = measure_bytes(loss_of)
        gradients = take_gradients(unet)
        if way == PLAIN:
            error = gradient_error(gradients, reference)
            text = f"{name}: gradients as MinImagen's, largest relative difference {error:.1e}"
            verdicts.append(Verdict(text, error < GRADIENT_TOLERANCE))
        elif way in RECOMPUTED:
            is_equal = all(torch.equal(gradients[key], reference[key]) for key in reference)
            text = f"{name}: gradients of {way} are those of {PLAIN}, bit for bit"
            verdicts.append(Verdict(text, is_equal))
        if way in (MINIMAGEN, PLAIN):
            reference = gradients
        del gradients
    del reference
    theirs, ours = bytes_and_loss[MINIMAGEN][-1], bytes_and_loss[PLAIN][-1]
    error = abs(ours / theirs - 1)
    text = f"{name}: same weights, loss {theirs:.6f}, relative difference {error:.1e}"
    verdicts.append(Verdict(text, error < LOSS_TOLERANCE))
    seconds = time_interleaved(name, ways, repeats)
    measured = {
        way: Measured(num_parameters(unet), *bytes_and_loss[way], seconds[way])
        for way, (unet, _) in ways.items()
    }
    return measured, verdicts


def num_parameters(unet: Any) -> int:
    """Elements of all weights."""
    return sum(parameter.numel() for parameter in unet.parameters())


def time_interleaved(
    name: str, ways: dict[str, tuple[Any, Callable[[], Tensor]]], repeats: int
) -> dict[str, float]:
    """Median seconds of forward and backward, measured A B C A B C.

    A slow minute of the machine meets all of them. Each has run once before, when its bytes were
    counted.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(repeats):
        for way, (unet, loss_of) in ways.items():
            start = time.perf_counter()
            loss_of().backward()
            seconds[way].append(time.perf_counter() - start)
            unet.zero_grad(set_to_none=True)
        say(f"{name}: timed {number + 1} of {repeats}")
    return {way: statistics.median(times) for way, times in seconds.items()}


def say(message: str) -> None:
    """One line for the person watching."""
    click.echo(message, err=True)


# ------------------------------------------------------------------------------------- whole step


def whole_steps(*, real: bool) -> dict[str, Whole]:
    """All that stays on the device in a training step of `Super`, optimizer included.

    Args:
        real: Run the steps that are measured on real tensors, 14 GB; else on tensors without
            memory.
    """
    how = f"live bytes of two steps on {'real' if real else 'fake'} tensors"
    index = NETWORKS["super"].index
    offloaded = config(training={"precision": "bf16"}, memory={"checkpointing": "blocks"})
    setup = written_setup(offloaded.stage(index + 1), 1, on_card=True)
    cost = step_cost(
        setup,
        measure(
            offloaded.stage(index + 1, TEXT_DIM), micro_batch=1, checkpointing=setup.checkpointing
        ),
    )
    return {
        "MinImagen, fp32, Adam": Whole(minimagen_step(real=real), 0, how),
        "ours, fp32, AdamW inside backward, blocks": Whole(in_backward_step(real=real), 0, how),
        "ours, bf16, ZeRO-2 with the optimizer in host memory, blocks": Whole(
            cost.card - cost.workspace, cost.host, "accounting: `imagen_scale/planning/cost.py`"
        ),
    }


def minimagen_step(*, real: bool) -> int:
    """Peak of MinImagen's training step as the torch 1.12 that it pins runs it.

    There `zero_grad` keeps the gradients, and Adam updates one tensor after another.
    """
    unet_class, _ = peers.import_unets()
    network = NETWORKS["super"]
    stage = config().stage(network.index + 1, TEXT_DIM).network
    with nullcontext() if real else FakeTensorMode():
        run = Pass(network)
        gc.collect()
        with LiveBytes() as live:
            unet = build_peer(unet_class, stage).train()
            optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4, foreach=False)
            for _ in range(2):  # the moments are there from the second step on
                optimizer.zero_grad(set_to_none=False)
                run.peer(unet).backward()
                optimizer.step()
            return live.peak


def in_backward_step(*, real: bool) -> int:
    """Peak of our fp32 step with each gradient used and freed as it appears."""
    network = NETWORKS["super"]
    ours = config(memory={"checkpointing": "blocks", "optimizer_in_backward": True})
    setup = written_setup(ours.stage(network.index + 1), 1, on_card=True)
    with nullcontext() if real else FakeTensorMode():
        run = Pass(network)
        gc.collect()
        with LiveBytes() as live:
            unet = UNet(ours.stage(network.index + 1, TEXT_DIM).network)
            apply_checkpointing(unet, setup.checkpointing).train()
            if not real:  # fake weights cannot be moved, not even to where they are (torch 2.13)
                unet.to = lambda device: unet  # type: ignore[method-assign]
            engine = InBackwardEngine(
                unet, ours.stage(network.index + 1, TEXT_DIM), setup, torch.device("cpu")
            )
            for _ in range(2):
                engine.backward(run.ours(engine))
            return live.peak


# ------------------------------------------------------------------------------ tables and verdicts


class Goal(NamedTuple):
    """What one way has to reach, against MinImagen."""

    network: str
    way: str
    quantity: str  # a key of RATIOS
    bound: float


# How a goal reads, the ratio it is about, and whether the bound is the least or the most.
RATIOS: dict[str, tuple[str, Callable[[Measured, Measured], float], bool]] = {
    "less held": ("x less held", lambda own, theirs: theirs.held / own.held, True),
    "step time": ("x the step time", lambda own, theirs: own.seconds / theirs.seconds, False),
    "faster": ("x faster", lambda own, theirs: theirs.seconds / own.seconds, True),
}
GOALS = (
    Goal("base", "ours norms fp32", "less held", 3.5),
    Goal("base", "ours norms fp32", "step time", 1.05),
    Goal("base", "ours blocks fp32", "less held", 9),
    Goal("base", "ours blocks fp32", "step time", 1.15),
    Goal("base", "ours blocks bf16", "less held", 19),
    Goal("base", "ours norms bf16", "faster", 1.6),
    Goal("super", "ours blocks bf16", "less held", 10),
    Goal("super", "ours norms bf16", "faster", 2),
)
WHOLE_GOAL = 5  # times less on the card under ZeRO-2 offload


def judge(network: str, measured: dict[str, Measured]) -> list[Verdict]:
    """The goals of one network against what was measured."""
    verdicts = []
    for goal in GOALS:
        if goal.network == network:
            words, ratio_of, is_least = RATIOS[goal.quantity]
            ratio = ratio_of(measured[goal.way], measured[MINIMAGEN])
            is_kept = ratio >= goal.bound if is_least else ratio <= goal.bound
            wanted = f"at {'least' if is_least else 'most'} {goal.bound:g}{words}"
            verdicts.append(Verdict(f"{network}, {goal.way}: {wanted}: {ratio:.3g}x", is_kept))
    return verdicts


def judge_whole(steps: dict[str, Whole]) -> Verdict:
    """The goal of the whole step."""
    theirs, *_, ours = steps.values()
    ratio = theirs.card / ours.card
    wanted = f"at least {WHOLE_GOAL}x less on the card"
    return Verdict(
        f"super, whole step, ZeRO-2 offload: {wanted}: {ratio:.3g}x", ratio >= WHOLE_GOAL
    )


def pass_table(measured: dict[str, Measured]) -> str:
    """One line per way; every ratio is MinImagen's value over that way's."""
    theirs = measured[MINIMAGEN]
    columns = ["", "parameters", "loss", "held for backward", "less", "peak with gradients",
               "less", "forward + backward", "faster"]  # fmt: skip
    rows = [
        [
            way,
            f"{own.parameters:,}",
            f"{own.loss:.6f}",
            f"{own.held / 1e6:,.1f} MB",
            f"{theirs.held / own.held:.2f}x",
            f"{own.peak / 1e6:,.1f} MB",
            f"{theirs.peak / own.peak:.2f}x",
            f"{own.seconds:.2f} s",
            f"{theirs.seconds / own.seconds:.2f}x",
        ]
        for way, own in measured.items()
    ]
    return table(columns, rows)


def whole_table(steps: dict[str, Whole]) -> str:
    """One line per way; ratios against the first."""
    theirs = next(iter(steps.values()))
    rows = [
        [
            way,
            f"{own.card / 1e9:.2f} GB",
            f"{theirs.card / own.card:.2f}x",
            f"{own.host / 1e9:.2f} GB" if own.host else "0",
            own.how,
        ]
        for way, own in steps.items()
    ]
    return table(["", "on the card", "less", "host memory", "known by"], rows)


def measure_all(
    networks: list[str], repeats: dict[str, int], *, real: bool
) -> tuple[str, list[Verdict]]:
    """All measurements, as Markdown and verdicts; in a process that sees the peers."""
    parts = [
        f"{machine('torch', 'minimagen', 'imagen-pytorch')} "
        f"{torch.get_num_threads()} threads, bound to cores.",
        f"Text: {TOKENS} tokens, {WORDS} of them words. Bytes are those of tensors alive beyond "
        "the weights. Ratios are MinImagen's value over that line's. imagen-pytorch is another "
        "network: same arguments, its own defaults for the rest. Our fp32 lines have MinImagen's "
        "weights, our bf16 lines the same rounded to bf16.",
    ]
    verdicts: list[Verdict] = []
    for name in networks:
        measured, equalities = compare(name, repeats[name])
        verdicts += equalities + judge(name, measured)
        parts += [
            f"`{name}`: {NETWORKS[name].title}; median of {repeats[name]} interleaved passes.",
            pass_table(measured),
        ]
        gc.collect()
    if "super" in networks:
        say("super: whole step")
        steps = whole_steps(real=real)
        verdicts.append(judge_whole(steps))
        parts += [
            "`super`, everything that stays on the card in a training step: weights, gradients, "
            "optimizer, activations, buckets. Context, workspace and allocator slack, which come "
            "on top of each, and averaged weights, which MinImagen does not keep, are left out.",
            whole_table(steps),
        ]
    verdict_lines = "\n".join(str(verdict) for verdict in verdicts)
    return "\n\n".join([*parts, f"```\n{verdict_lines}\n```"]), verdicts


@click.command(help=__doc__)
@click.option("--networks", default="base,super", show_default=True, help="Which, with commas.")
@click.option("--base-repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--super-repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--whole-step", is_flag=True, help="Run whole steps of super on real tensors, 14 GB.")
@click.option("--peers", "folder", default=".benchmarks/peers", show_default=True,
              type=click.Path(path_type=Path), help="Where the peers are installed.")  # fmt: skip
@write_option(MARK)
@click.option("--inside", "is_inside", is_flag=True, hidden=True)
def main(
    networks: str,
    base_repeats: int,
    super_repeats: int,
    threads: int | None,
    whole_step: bool,
    folder: Path,
    write: Path | None,
    is_inside: bool,
) -> None:
    """Installs the peers, measures in a process that sees them, prints tables and verdicts."""
    names = networks.split(",")
    if not set(names) <= NETWORKS.keys():
        raise click.UsageError(f"--networks {networks}: give {' or '.join(NETWORKS)}, or both.")
    if not is_inside:
        peers.install(folder)
        command = [sys.executable, __file__, *sys.argv[1:], "--inside"]
        done = subprocess.run(command, env=peers.environment(folder, threads))
        sys.exit(done.returncode)
    repeats = {"base": base_repeats, "super": super_repeats}
    text, verdicts = measure_all(names, repeats, real=whole_step)
    publish(text, write, MARK)
    sys.exit(not all(verdict.is_kept for verdict in verdicts))


if __name__ == "__main__":
    main()
