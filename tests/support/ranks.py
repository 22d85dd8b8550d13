"""Small trainings on several CPU ranks without the launcher: what storms and tests share.

    start("save", folder, 2)
    start("load", folder, 1)

`save` leaves one checkpoint for each ZeRO stage and trains on; `load` reads every checkpoint that
is there at every stage, compares weights and average bit for bit, and the losses that follow.
`nan` spoils data, loss and gradients at every stage and precision. Rank 0 prints JSON.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from support.environment import rank_variables, reserved_port
from support.forker import fork

STAGES = (0, 1, 2, 3)
SHAPES = [(8, 8), (16, 4, 3, 3), (4, 32), (6, 6), (32, 8)]  # of matrices for Muon
GLOBAL_BATCH = 8
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


def start(mode, folder, processes, *arguments, timeout=600):
    """Runs this file on so many ranks; what rank 0 printed as JSON."""
    argv = [__file__, mode, folder, *arguments]
    with reserved_port() as port, contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        ranks = [
            fork(argv, os.environ | rank_variables(rank, processes, port), stdout=out, stderr=out)
            for rank, out in enumerate(outputs)
        ]
        for rank in ranks:
            rank.join(timeout)
            if rank.exitcode is None:
                rank.kill()
        said = [out.seek(0) or out.read() for out in outputs]
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError("\n".join(output[-3000:] for output in said))
    return json.loads(said[0].splitlines()[-1])


class Small:
    """A tiny U-Net with its engine, stepped on invented pictures that depend on the step alone."""

    def __init__(self, stage, precision="fp32", offload=True, optimizer="adamw", clip=1.0):
        from imagen_scale.config import parse_config
        from imagen_scale.models.unet import UNet
        from imagen_scale.planning.setup import written_setup
        from imagen_scale.training import ranks
        from imagen_scale.training.building import make_engine
        from imagen_scale.training.ema import Ema
        from imagen_scale.training.objective import Objective
        from imagen_scale.training.stepping import Stepper
        from support.tiny import TINY

        self.ranks, self.rank = ranks.world_size(), ranks.rank()
        self.micro = max(1, GLOBAL_BATCH // self.ranks // 2)  # two are accumulated
        zero = {"stage": stage} | (OFFLOADED if stage > 1 and offload else {})
        training = {
            "precision": precision, "micro_batch": self.micro, "optimizer": optimizer,
            "grad_clip": clip,
        }  # fmt: skip
        changed = {
            "training": TINY["training"] | training,
            "deepspeed": {"zero_optimization": zero},
        }
        config = parse_config(json.dumps(TINY | changed))
        torch.manual_seed(0)
        self.optimizer = optimizer
        setup = written_setup(config.stage(1), self.ranks, on_card=False)
        self.engine = make_engine(UNet(config.stage(1, 384).network), config.stage(1, 384), setup)
        self.ema = Ema(self.engine, 0.9)
        self.objective = Objective(config.stage(1), torch.device("cpu"))
        self.stepper = Stepper(self.engine, self.objective, setup.accumulation)
        self.done = 0

    def batch(self, first):
        from imagen_scale.data.sequence import Batch

        samples = []
        for position in range(first, first + self.micro):
            generator = torch.Generator().manual_seed(position)
            samples.append(
                (
                    torch.rand(3, 16, 16, generator=generator) * 2 - 1,
                    torch.rand(8, 384, generator=generator),
                )
            )
        images, text = (torch.stack(part) for part in zip(*samples, strict=True))
        mask = torch.ones(self.micro, 8, dtype=torch.bool)
        positions = torch.arange(first, first + self.micro)
        return Batch(images, text, mask, positions, ["x"] * self.micro)

    def step(self, spoil=lambda batch, micro_step: batch):
        """(mean loss over all ranks, whether the step was applied)."""
        from imagen_scale.training.feed import Feed

        start = self.done * GLOBAL_BATCH
        batches = [
            spoil(self.batch(start + (i * self.ranks + self.rank) * self.micro), i)
            for i in range(self.stepper.accumulation)
        ]
        stepped = self.stepper.step(Feed(iter(batches), self.engine.device), lr=1e-3)
        self.done += 1
        if stepped.applied:
            self.ema.update(self.done)
        loss = stepped.loss.clone()
        torch.distributed.all_reduce(loss)
        return loss.item() / self.ranks, stepped.applied

    def masters(self):
        from imagen_scale.training.ema import Ema

        return dict(Ema(self.engine, 0.9).named_weights())

    def average(self):
        return dict(self.ema.named_weights())

    def save(self, folder):
        from imagen_scale.training.shards import file_name, save_shard

        if self.rank == 0 or self.engine.zero_stage > 0:
            save_shard(self.engine, [self.ema], self.optimizer, folder / file_name(self.rank))
        torch.distributed.barrier()

    def load(self, folder, done):
        from imagen_scale.training.shards import load_shards

        load_shards(self.engine, [self.ema], self.optimizer, folder)
        self.engine.publish()
        self.done = done

    def release(self):
        self.engine.release()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save(folder, after=20):
    from safetensors.torch import save_file

    for stage in STAGES:
        small = Small(stage)
        for _ in range(3):
            small.step()
        place = folder / f"{small.ranks}_ranks_zero_{stage}"
        place.mkdir(parents=True, exist_ok=True)
        small.save(place)
        masters, average = small.masters(), small.average()
        losses = [small.step()[0] for _ in range(int(after))]
        if small.rank == 0:
            save_file(masters, place / "masters.safetensors")
            save_file(average, place / "average.safetensors")
            (place / "losses.json").write_text(json.dumps(losses))
        small.release()
    return []


def load(folder, *names):
    from safetensors.torch import load_file

    found = []
    for place in sorted(p for p in folder.iterdir() if not names or p.name in names):
        losses = json.loads((place / "losses.json").read_text())
        for stage in STAGES:
            small = Small(stage)
            small.load(place, 3)
            same = equal(small.masters(), load_file(place / "masters.safetensors"))
            same &= equal(small.average(), load_file(place / "average.safetensors"))
            drift = max(abs(small.step()[0] - loss) for loss in losses)
            found.append([place.name, f"{small.ranks}_ranks_zero_{stage}", same, drift])
            small.release()
    return found


def nan(folder, limit="1000", stages=STAGES):
    """[where, stage, precision, skipped, untouched, goes on] of each way to spoil a step."""
    from imagen_scale.training.ranks import world_size

    found = []
    last = world_size() - 1  # one rank only is at fault
    for stage in map(int, stages):
        for precision in ("fp32", "bf16")[: 1 if stage == 0 else 2]:
            for clip in (1.0, None):
                for where in ("data", "loss", "gradient"):
                    if len(found) < int(limit):
                        found.append(_spoiled(stage, precision, clip, where, last))
    return found


def _spoiled(stage, precision, clip, where, rank):
    small = Small(stage, precision, clip=clip)
    small.step()
    before, average = small.masters(), small.average()
    is_here = small.rank == rank
    losses = small.objective.timed_losses
    handle = None

    def spoil(batch, micro_step):
        if where == "data" and is_here and micro_step == 0:
            batch.images[-1, 0, 3, 3] = float("nan")
        return batch

    def infinite(*inputs):
        found = losses(*inputs)
        return found._replace(values=found.values * float("inf"))

    if where == "loss" and is_here:
        small.objective.timed_losses = infinite
    if where == "gradient" and is_here:
        out = [module for module in small.engine.module.modules()][-1]
        handle = out.register_full_backward_hook(
            lambda module, into, from_: tuple(None if g is None else g * float("nan") for g in into)
        )
    _, applied = small.step(spoil)
    small.objective.timed_losses = losses
    if handle is not None:
        handle.remove()
    untouched = equal(before, small.masters()) and equal(average, small.average())
    loss, goes_on = small.step()
    goes_on &= loss == loss and not equal(before, small.masters())
    goes_on &= all(bool(value.isfinite().all()) for value in small.masters().values())
    small.release()
    return [where, stage, precision, clip, not applied, untouched, bool(goes_on)]


def muon(folder):
    """(whether the ranks together step as one does, on all of them; what each left to others)."""
    from imagen_scale.training.matrix_optimizers import Muon
    from imagen_scale.training.ranks import rank, sum_over_ranks, world_size

    def trained(ranks):
        generator = torch.Generator().manual_seed(0)
        matrices, others = (
            [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
            for shapes in (SHAPES, [(5,)])
        )
        options = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}
        optimizer = Muon(matrices, [{"params": others}], options, ranks)
        for step in range(3):
            for i, parameter in enumerate([*matrices, *others]):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                if (i, step) == (3, 0):
                    parameter.grad = None  # it comes later
            optimizer.step()
        state = [optimizer.state[parameter]["momentum_buffer"] for parameter in matrices]
        return [*matrices, *others, *state], optimizer._shares[rank()] if ranks > 1 else []

    alone, _ = trained(1)
    shared, mine = trained(world_size())
    same = all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    found = torch.tensor([float(same), len(SHAPES) - len(mine)])
    return sum_over_ranks(found)


def main():
    from imagen_scale.training import launch_variables, ranks

    launch_variables.fill_environment()
    ranks.check_machine()
    ranks.join()
    mode, folder, *names = sys.argv[1:]
    result = {"save": save, "load": load, "nan": nan, "muon": muon}[mode](Path(folder), *names)
    if ranks.rank() == 0:
        print(json.dumps(result), flush=True)
    ranks.stop()


if __name__ == "__main__":
    main()
