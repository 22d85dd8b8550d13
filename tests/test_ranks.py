"""Checkpoints that fit any number of ranks and any ZeRO stage, and gradients that are NaN."""

import errno
import json

import pytest
import torch
from support import ranks

from imagen_scale.errors import CheckpointError, EnvironmentProblem
from imagen_scale.training.matrix_optimizers import divided
from imagen_scale.training.saving import check_space
from imagen_scale.training.telemetry import LineFile

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(private_folders, tmp_path_factory):
    """Checkpoints of two ranks at every stage."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.start("save", folder, 2, 5)
    return folder


def test_a_checkpoint_of_two_ranks_loads_on_one_at_any_stage(saved):
    found = ranks.start("load", saved, 1, "2_ranks_zero_1", "2_ranks_zero_3")
    assert len(found) == 8
    for saved_as, loaded_as, same, drift in found:
        assert same, f"{saved_as} -> {loaded_as}"
        assert drift <= 1e-5, f"{saved_as} -> {loaded_as}: {drift}"


@pytest.mark.parametrize("where", ["data", "loss", "gradient"])
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]
)
def test_a_gradient_that_is_not_a_number_reaches_nothing(stage, where, precision, process_group):
    *_, skipped, untouched, goes_on = ranks._spoiled(stage, precision, 1.0, where, rank=0)
    assert skipped and untouched and goes_on


def test_one_rank_at_fault_is_enough_for_all_to_leave_the_step_out(private_folders, tmp_path):
    found = ranks.start("nan", tmp_path, 2, 3, "2")
    assert [where for where, *_ in found] == ["data", "loss", "gradient"]
    for *how, skipped, untouched, goes_on in found:
        assert skipped and untouched and goes_on, how


def test_moments_survive_a_change_of_precision(process_group, tmp_path):
    """adamw -> adamw_8bit -> adamw: masters bit for bit, moments to 8 bits."""
    first = ranks.Small(2)
    for _ in range(3):
        first.step()
    (tmp_path / "exact").mkdir()
    first.save(tmp_path / "exact")
    masters, loss = first.masters(), first.step()[0]
    first.release()

    small = ranks.Small(2, optimizer="adamw_8bit")
    small.load(tmp_path / "exact", 3)
    assert ranks.equal(small.masters(), masters)
    (tmp_path / "8bit").mkdir()
    small.save(tmp_path / "8bit")
    small.release()

    last = ranks.Small(2)
    last.load(tmp_path / "8bit", 3)
    assert ranks.equal(last.masters(), masters)
    assert last.step()[0] == loss
    again = last.step()[0]
    last.release()
    exact = ranks.Small(2)
    exact.load(tmp_path / "exact", 3)
    exact.step()
    assert again == pytest.approx(exact.step()[0], rel=2e-3)
    exact.release()


def test_a_checkpoint_of_another_network_is_refused(process_group, tmp_path, monkeypatch):
    small = ranks.Small(0)
    small.step()
    small.save(tmp_path)
    other = ranks.Small(2)
    ((first, *others),) = other.engine.fragments()
    larger = first._replace(numel=first.numel + 1)  # as one of other sizes would say
    monkeypatch.setattr(other.engine, "fragments", lambda: [[larger, *others]])
    with pytest.raises(CheckpointError, match="other sizes than the network"):
        other.load(tmp_path, 1)
    small.release()


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(EnvironmentProblem, match=r"takes 1000000\.00 GB and .* GB are free"):
        check_space(tmp_path, 10**15)


def test_lines_that_a_full_disk_refuses_are_added_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file, real = LineFile(path), None

    class Full:
        def __init__(self, room):
            self.room = room

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = real.write(data[: self.room]), 0
            return written

    file.append("one\n")
    real, file._file = file._file, Full(room=2)
    for line in ("two\n", "three\n"):
        file.append(line)
    file._file = real
    file.append("four\n")
    file.close()
    assert path.read_text() == "one\ntwo\nthree\nfour\n"


def test_the_state_is_read_without_pickle(process_group, tmp_path, monkeypatch):
    small = ranks.Small(1)
    small.step()
    small.save(tmp_path)
    monkeypatch.setattr(torch, "load", None)
    small.load(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0000.safetensors"]
    header = (tmp_path / "rank_0000.safetensors").read_bytes()
    json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    small.release()


def test_ranks_that_share_the_matrices_step_as_one_does_bit_for_bit(private_folders, tmp_path):
    same, left_out = ranks.start("muon", tmp_path, 2)
    assert same == 2  # on both
    assert left_out == len(ranks.SHAPES)  # and each matrix was one rank's work


def test_the_work_on_matrices_is_divided_evenly():
    shapes = [(64, 64), (64, 64), (8, 8), (32, 64), (64, 32), (8, 8)]
    shares = divided(shapes, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert [sorted(shapes[i] for i in share) for share in shares] == [
        sorted([(64, 64), (32, 64), (8, 8)]), sorted([(64, 64), (64, 32), (8, 8)])
    ]  # fmt: skip
    assert divided([(8, 8)], 2) == [[0], []]
