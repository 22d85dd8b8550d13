"""A small sample of each storm of benchmarks/faults.py, and the table it writes."""

import importlib.util
import re
import subprocess
import sys

import pytest
from support import ROOT

SCRIPT = ROOT / "benchmarks" / "faults.py"


def faults(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


TRAINED = ("kills=4", "damages=10", "full_disk=4", "stops=4", "lost_ranks=4", "elastic=12", "nan=4",
           "trackers=1")  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [*(pytest.param(row, marks=pytest.mark.slow) for row in TRAINED),
     "pictures=90", "largest=1", "captions=40", "configs=60", "prompts=30"],
)  # fmt: skip
def test_a_small_storm_leaves_no_fault(row):
    done = faults(row)
    assert done.returncode == 0, done.stdout + done.stderr
    name = row.partition("=")[0]
    assert re.search(rf"^\| [\d-]+ \| {name} \| .* \| \d+ \| 0 \| .+ \|$", done.stdout, re.M)


def test_the_table_is_written_between_its_marks_and_other_rows_stay(module, tmp_path):
    document = tmp_path / "reliability.md"
    document.write_text(f"before\n{module.BEGIN}\n{module.END}\nafter\n")
    module.write_between_marks(document, "machine A.", {"configs": "| 13 | configs | old |"})
    module.write_between_marks(document, "machine A.", {"captions": "| 12 | captions | new |"})
    text = document.read_text()
    assert text.startswith(f"before\n{module.BEGIN}\nmachine A.\n\n| row | storm |")
    assert "| 12 | captions | new |\n| 13 | configs | old |\n" in text
    assert text.endswith(f"{module.END}\nafter\n")
    module.write_between_marks(document, "machine B.", {"captions": "| 12 | captions | x |"})
    assert "configs" not in document.read_text() and "machine A" not in document.read_text()


def test_a_fault_is_a_failure(module):
    def crash():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    assert module.in_own_process(crash).fault == "killed by SIGKILL"
    assert module.in_own_process(lambda: 1 / 0).fault.startswith("ZeroDivisionError")
    slow = module.Outcome(seconds=3, bytes=600_000_000, error=None, fault=None)
    assert module.faults_of("a.png", slow) == ["a.png: took 3.0 s", "a.png: took 600 MB"]
    assert module.in_own_process(lambda: "refused").error == "refused"


def test_the_document_holds_every_row_and_its_command(module):
    text = (ROOT / "docs" / "reliability.md").read_text()
    table = text.partition(module.BEGIN)[2].partition(module.END)[0]
    assert "python benchmarks/faults.py --write docs/reliability.md" in text
    for name in module.ROWS:
        (trials, failures) = re.search(
            rf"^\| [\d-]+ \| {name} \| .* \| (\d+) \| (\d+) \| .* \|$", table, re.M
        ).groups()
        assert int(trials) >= module.ROWS[name].trials and failures == "0"


def test_unknown_rows_are_refused():
    done = faults("picture=3")
    assert done.returncode == 2 and "rows are kills, damages, full_disk" in done.stderr
