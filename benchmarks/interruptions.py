"""Storms on training: killed, told to stop, out of disk, and started from damaged checkpoints.

Every trial is a real training on 1 or 2 CPU ranks (ZeRO-2, Adam offloaded), and its checkpoints
are compared file by file, by SHA-256, with those of a training that nothing happened to.
"""

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from forked import Training
from support.tiny import TINY

from imagen_scale.errors import CheckpointError
from imagen_scale.runs.checkpoint import MANIFEST, list_checkpoints, verify_checkpoint
from imagen_scale.runs.folders import inference_path, unet_dir

EVERY = 2
SILENCE = 5  # seconds, of a rank that stands still
SETTINGS = {
    "training.checkpoint_every": EVERY,
    "training.keep_checkpoints": 3,
    "training.val_every": 1000,
    "training.sample_every": 1000,
    "deepspeed.zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def length(trials: int) -> int:
    """Steps of a training that is interrupted so often."""
    return 60 if trials > 20 else 24


class Arena:
    """Where the trainings of one storm live, with the undisturbed one of each number of ranks."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.config = folder / "tiny.json"
        self.config.write_text(json.dumps(TINY))
        self.log = folder / "log.txt"
        self._states: dict[int, dict[int, dict]] = {}
        self._losses: dict[int, list[float]] = {}

    def start(
        self, run: Path, ranks: int, first: Callable[[], object] = int, **changed: object
    ) -> Training:
        """Starts or continues a training into `run`; `changed` by key of `training`."""
        values = SETTINGS | {"training.steps": self.steps, "training.micro_batch": 4 // ranks}
        values |= {f"training.{key}": value for key, value in changed.items()}
        options = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
        return Training(
            ["--config", str(self.config), "--run", str(run), "--unet", "1", *options],
            ranks, self.log, first,
        )  # fmt: skip

    def undisturbed(self, ranks: int) -> Path:
        """The run that nothing happened to, with the checkpoint of every step kept."""
        run = self.folder / f"undisturbed_{ranks}"
        if ranks not in self._states:
            training = self.start(run, ranks, checkpoint_every=1, keep_every=1)
            if any(training.end()):
                raise RuntimeError(training.said())
            places = list_checkpoints(unet_dir(run, 1))
            self._states[ranks] = {step_of(place): files_of(place) for place in places}
            self._losses[ranks] = list(losses(run))
        return run

    def beside(self, run: Path, ranks: int) -> list[str]:
        """Where the checkpoints of a run differ from the undisturbed training's."""
        self.undisturbed(ranks)
        found = []
        for place in list_checkpoints(unet_dir(run, 1)):
            try:
                verify_checkpoint(place)
            except CheckpointError as error:
                found.append(str(error))
                continue
            if files_of(place) != self._states[ranks][step_of(place)]:
                found.append(f"{place.name} is not the undisturbed training's")
        return found

    def ended_well(self, run: Path, ranks: int, *, is_saved: bool = True) -> list[str]:
        """What of a finished run is not as if nothing had happened."""
        found = self.beside(run, ranks)
        if is_saved and newest(run) != self.steps:
            found.append(f"ended at step {newest(run)}")
        if not same_weights(run, self.undisturbed(ranks)):
            found.append("other weights to sample from")
        if list(losses(run)) != self._losses[ranks]:
            found.append("other losses in metrics.jsonl")
        found += [f"left behind: {path.name}" for path in run.rglob(".*")]
        return found


def step_of(place: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(place.name.removeprefix("step_"))


def files_of(place: Path) -> dict:
    """Size and SHA-256 of a checkpoint's files, as its manifest has them."""
    return json.loads((place / MANIFEST).read_text())["files"]


def newest(run: Path) -> int:
    """The newest checkpoint's step, or 0."""
    return max(map(step_of, list_checkpoints(unet_dir(run, 1))), default=0)


def same_weights(run: Path, other: Path) -> bool:
    """Whether both hold the same tensors to sample from."""
    from safetensors.torch import load_file
    from torch import equal

    a, b = (load_file(inference_path(place, 1)) for place in (run, other))
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each line of metrics.jsonl."""
    lines = (unet_dir(run, 1) / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


class Chain:
    """Trainings on a number of ranks, each interrupted again and again until it ends."""

    def __init__(self, arena: Arena, ranks: int) -> None:
        arena.undisturbed(ranks)
        self.arena, self.ranks, self.ended = arena, ranks, 0
        self.failures: list[str] = []

    @property
    def run(self) -> Path:
        """The run at present."""
        return self.arena.folder / f"ranks_{self.ranks}_run_{self.ended}"

    def is_saving(self) -> bool:
        """Whether a save is under way, or was when all stopped."""
        return any(unet_dir(self.run, 1).glob(".staging_*")) or any(
            unet_dir(self.run, 1).glob(".inference*.tmp")
        )

    def start(self, **changed: object) -> Training:
        """Continues the run; returns when it trains."""
        self.before = newest(self.run)
        training = self.arena.start(self.run, self.ranks, **changed)
        said = f"continues at step {self.before} of" if self.before else "U-Net 1: "
        if not training.until(lambda: said in training.said(), 0.005):
            self.failures.append(f"not continued at step {self.before}: {training.said()[-500:]}")
        return training

    def at_a_moment(self, training: Training, draw: random.Random, *, in_save: bool) -> None:
        """Waits for some steps and a part of one; or for some saves and a part of one."""
        metrics = unet_dir(self.run, 1) / "metrics.jsonl"
        for count in range(draw.randrange(1, 5)):
            if in_save:
                if count:
                    training.until(lambda: not self.is_saving())
                training.until(self.is_saving)
            else:
                size = metrics.stat().st_size if metrics.is_file() else 0
                training.until(lambda s=size: metrics.is_file() and metrics.stat().st_size > s)
        time.sleep(draw.uniform(0, 0.005 if in_save else 0.05))

    def check(self, training: Training) -> None:
        """What may not be, now that all processes have ended; lets a run that is near it end."""
        found = self.arena.beside(self.run, self.ranks)
        if newest(self.run) < self.before:
            found.append(f"went back from {self.before} to {newest(self.run)}")
        if newest(self.run) > self.arena.steps - 5 * EVERY:
            training = self.arena.start(self.run, self.ranks)
            if any(codes := training.end()):
                found.append(f"ended with {codes}")
            found += self.arena.ended_well(self.run, self.ranks)
            self.ended += 1
        self.failures += [f"{self.ranks} ranks: {one}: {training.said()[-500:]}" for one in found]


def kills(trials: int, folder: Path) -> tuple[list[str], str]:
    """SIGKILL of all ranks, one soon after another; aimed at a save two times of three."""
    arena, draw = Arena(folder, length(trials)), random.Random(0)
    chains = {ranks: Chain(arena, ranks) for ranks in (1, 2)}
    in_save = 0
    for trial in range(trials):
        chain = chains[1 + trial % 2]
        training = chain.start()
        chain.at_a_moment(training, draw, in_save=trial // 2 % 3 > 0)
        for pid in draw.sample(training.pids, chain.ranks):
            training.send(signal.SIGKILL, pid)
            time.sleep(draw.uniform(0, 0.01) if chain.ranks > 1 else 0)
        if set(training.end()) != {-signal.SIGKILL}:
            chain.failures.append(f"not killed: {training.codes}: {training.said()[-500:]}")
        in_save += chain.is_saving()
        chain.check(training)
    ended = sum(chain.ended for chain in chains.values())
    return [one for chain in chains.values() for one in chain.failures], (
        f"{in_save} were inside a save; no checkpoint was lost, each was bit for bit that of the "
        f"undisturbed training, and so was all of the {ended} trainings that came to their end"
    )


def stops(trials: int, folder: Path) -> tuple[list[str], str]:
    """SIGTERM, SIGUSR1 or SIGINT to one rank or to all."""
    arena, draw = Arena(folder, length(trials)), random.Random(0)
    chains = {ranks: Chain(arena, ranks) for ranks in (1, 2)}
    slowest = 0
    for trial in range(trials):
        chain = chains[1 + trial % 2]
        signum = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[trial // 2 % 3]
        training = chain.start()
        chain.at_a_moment(training, draw, in_save=trial // 6 % 4 == 0)
        for pid in draw.sample(training.pids, draw.randrange(1, chain.ranks + 1)):
            training.send(signum, pid)
        done = losses(chain.run)[-1:]
        if set(training.end()) != {128 + signum}:
            chain.failures.append(f"{signum.name}: {training.codes}: {training.said()[-500:]}")
        last = losses(chain.run)[-1][0]
        if newest(chain.run) != last:
            chain.failures.append(f"{signum.name}: {newest(chain.run)} saved of {last} steps")
        slowest = max(slowest, last - (done[0][0] if done else 0))
        chain.check(training)
    ended = sum(chain.ended for chain in chains.values())
    return [one for chain in chains.values() for one in chain.failures], (
        f"all saved and left with 128 + the signal's number at most {slowest} steps later; "
        f"no step was lost or done twice, {ended} trainings ended as the undisturbed one"
    )


def lost_ranks(trials: int, folder: Path) -> tuple[list[str], str]:
    """One of two ranks is killed or stands still (SIGSTOP); the other has to find out."""
    arena, draw = Arena(folder, length(trials)), random.Random(0)
    chain = Chain(arena, 2)
    slowest = {signal.SIGKILL: 0.0, signal.SIGSTOP: 0.0}
    phases: set[str] = set()
    for trial in range(trials):
        signum = (signal.SIGKILL, signal.SIGSTOP)[trial % 2]
        training = chain.start(hang_timeout=SILENCE)
        if trial % 5 == 4:
            time.sleep(draw.uniform(0, 0.5))  # it continues: loading, building, the first step
        else:
            chain.at_a_moment(training, draw, in_save=trial // 2 % 4 == 0)
        victim = draw.randrange(2)
        training.send(signum, training.pids[victim])
        began, other = time.monotonic(), training.pids[1 - victim]
        training.until(lambda t=training, pid=other: pid in t.codes)
        slowest[signum] = max(slowest[signum], time.monotonic() - began)
        training.send(signal.SIGKILL, training.pids[victim])
        training.end()
        said = [line for line in training.said().splitlines() if line.startswith("error: ")]
        named = len(said) == 1 and f"rank {victim} (" in said[0] and "phase" in said[0]
        phases |= set(re.findall(r"phase '([^']+)'", " ".join(said)))
        if training.codes[other] != 1 or not named:
            chain.failures.append(f"{signum.name}: {training.codes}: {training.said()[-700:]}")
        if "Traceback" in training.said():
            chain.failures.append(f"{signum.name}: a traceback: {training.said()[-700:]}")
        chain.check(training)
    killed, stopped = slowest.values()
    return chain.failures, (
        f"named with its phase ({', '.join(sorted(phases))}) and left within {killed:.0f} s of a "
        f"kill, within {stopped:.0f} s of a standstill (training.hang_timeout {SILENCE} s); "
        f"{chain.ended} trainings ended as the undisturbed one"
    )


# -------------------------------------------------------------------------------------- damages


def flip(place: Path, draw: random.Random) -> None:
    """One bit."""
    file = a_share(place, draw)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def cut(place: Path, draw: random.Random) -> None:
    """A file that ends too early."""
    file = a_share(place, draw)
    os.truncate(file, draw.randrange(file.stat().st_size))


def lose(place: Path, draw: random.Random) -> None:
    """A file that is gone."""
    draw.choice([a_share(place, draw), place / MANIFEST]).unlink()


def swap(place: Path, draw: random.Random) -> None:
    """A file of another checkpoint."""
    other = draw.choice([p for p in list_checkpoints(place.parent) if p != place])
    file = a_share(place, draw)
    shutil.copy(other / file.name, file)


def scramble(place: Path, draw: random.Random) -> None:
    """A manifest that is no manifest."""
    texts = ["", "{", "[]", "null", "[" * 100_000, '{"step": 1}', '{"files": 3}', "\0\0\0\0",
             '{"files": {}, "step": 6}', '{"files": {"a": 1}, "step": 6}']  # fmt: skip
    (place / MANIFEST).write_text(draw.choice(texts))


def rename(place: Path, draw: random.Random) -> None:
    """A checkpoint under the name of a step that it is not of."""
    place.rename(place.with_name(f"step_{step_of(place) + draw.randrange(1, 9):08d}"))


def hollow(place: Path, draw: random.Random) -> None:
    """A folder where a file was."""
    file = a_share(place, draw)
    file.unlink()
    file.mkdir()


DAMAGES = (flip, cut, lose, swap, scramble, rename, hollow)


def a_share(place: Path, draw: random.Random) -> Path:
    """One rank's file."""
    return draw.choice(sorted(place.glob("*.safetensors")))


def damages(trials: int, folder: Path) -> tuple[list[str], str]:
    """The newest checkpoint damaged, sometimes the one before it too, or all three."""
    arena, draw, failures = Arena(folder, 10), random.Random(0), []
    last = arena.steps - EVERY
    by_age = {1: 0, 2: 0, 3: 0}
    whole = {}
    for ranks in (1, 2):
        whole[ranks] = folder / f"whole_{ranks}"
        shutil.copytree(arena.undisturbed(ranks), whole[ranks])
        (unet_dir(whole[ranks], 1) / "inference.safetensors").unlink()
        for place in list_checkpoints(unet_dir(whole[ranks], 1)):
            if step_of(place) not in (last, last - EVERY, last - 2 * EVERY):
                shutil.rmtree(place)
    for trial in range(trials):
        ranks, damage = 1 + trial % 2, DAMAGES[trial // 2 % len(DAMAGES)]
        count = 3 if trial % 10 == 9 else 2 if trial % 5 == 4 else 1
        by_age[count] += 1
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole[ranks], run)
        damaged = list_checkpoints(unet_dir(run, 1))[:count]
        for place in damaged:
            damage(place, draw)
        training = arena.start(run, ranks)
        codes, said = training.end(), training.said()
        found = []
        if said.count("damaged checkpoint passed over: ") != count:
            found.append("not every damaged one named")
        if count == 3:
            if set(codes) != {1} or "all 3 checkpoints are damaged" not in said:
                found.append(f"all are damaged and it ended with {codes}")
        else:
            if any(codes) or f"continues at step {last - count * EVERY} of" not in said:
                found.append(f"ended with {codes}")
            found += arena.ended_well(run, ranks)
        if "Traceback" in said:
            found.append("a traceback")
        failures += [f"{ranks} ranks, {damage.__name__}: {one}: {said[-500:]}" for one in found]
    return failures, (
        f"{by_age[1]} times the newest, {by_age[2]} times two: each named, the one before used and "
        f"the training ended bit for bit as the undisturbed one; {by_age[3]} times all: refused"
    )


# ------------------------------------------------------------------------------------ full disk


def refuse_files(limit: int) -> None:
    """Lets this process write no file larger than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def full_disk(trials: int, folder: Path) -> tuple[list[str], str]:
    """No file may grow beyond a size, from nothing to all that a training writes."""
    arena, failures = Arena(folder, 10), []
    saved = stopped = in_part = 0
    for trial in range(trials):
        ranks = 1 + trial % 2
        whole = arena.undisturbed(ranks)
        sizes = [p.stat().st_size for p in unet_dir(whole, 1).rglob("*") if p.is_file()]
        limit = round(1.1 * max(sizes) * (trial / max(1, trials - 1)) ** 2)
        run = folder / f"run_{trial}"
        if trial % 3:  # one that was under way
            training = arena.start(run, ranks)
            training.until(lambda r=run: newest(r) > 0)
            training.send(signal.SIGTERM, training.pids[0])
            training.end()
        before = newest(run)

        training = arena.start(run, ranks, functools.partial(refuse_files, limit))
        codes, said = training.end(), training.said()
        found = arena.beside(run, ranks) if run.is_dir() else []
        if not set(codes) <= {0, 1} or "Traceback" in said:
            found.append(f"ended with {codes}")
        if any(codes) and "error: " not in said:
            found.append("ended without a word")
        if newest(run) < before:
            found.append(f"went back from {before} to {newest(run)}")
        found += [f"left behind: {path.name}" for path in run.rglob(".*")]
        stopped += any(codes)
        saved += newest(run) > before
        # The weights to sample from fit where a checkpoint does not: then all is done.
        is_saved = not (any(codes) and "holds the weights of the last step" in said)
        in_part += not is_saved
        again = arena.start(run, ranks)
        if any(again.end()):
            found.append(f"with room again: {again.codes} {again.said()[-500:]}")
        found += arena.ended_well(run, ranks, is_saved=is_saved)
        failures += [f"{ranks} ranks, {limit} bytes: {one}: {said[-700:]}" for one in found]
        shutil.rmtree(run)
    return failures, (
        f"{stopped} ended with a sentence ({in_part} with the weights to sample from saved, "
        f"without the last checkpoint), {saved} saved something new; nothing saved before was "
        f"touched, nothing half written stayed, and with room again all {trials} ended as the "
        f"undisturbed training"
    )
