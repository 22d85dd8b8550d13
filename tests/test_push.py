"""A finished run shared on the hub: what is uploaded, its card, and what is said where it cannot.

The hub is a server of this test: everything up to HTTP is the real thing.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from support import ROOT
from support.tiny import write_run, write_stage

from imagen_scale import Cascade
from imagen_scale.commands.main import main


@pytest.fixture
def finished(tmp_path):
    run = write_run(tmp_path / "runs" / "tiny")
    samples = run / "samples"
    samples.mkdir()
    for name in ("unet1_step_00000003.png", "unet1_step_00000006.png", "unet2_step_00000006.png",
                 *(f"{i:05d}_0123abcd.png" for i in range(1, 12)), "sheet_00012.png"):  # fmt: skip
        (samples / name).write_bytes(b"PNG")
        if name[0] in "0s":
            (samples / name).with_suffix(".json").write_text("{}")
    (run / "unet1" / "step_00000006").mkdir()
    (run / "unet1" / "step_00000006" / "rank_0000.safetensors").write_bytes(bytes(99))
    report = {"source": "emoji", "path": None, "used": 6, "skipped": [], "notes": []}
    (run / "data_report.json").write_text(json.dumps(report))
    return run


def push(run, *words, **env):
    return CliRunner(env={"HF_TOKEN": None, **env}).invoke(main, ["push", str(run), *words])


def test_a_dry_run_lists_files_and_writes_the_card(finished):
    done = push(finished, "--repo", "me/tiny", "--dry-run")
    assert done.exit_code == 0, done.output
    names = [line.split()[-1] for line in done.stdout.splitlines()[:-1]]
    assert names[:4] == ["README.md", "config.json", "unet1/inference.safetensors",
                         "unet2/inference.safetensors"]  # fmt: skip
    assert "samples/unet1_step_00000006.png" in names
    assert "samples/unet1_step_00000003.png" not in names  # the last grid of each stage
    pictures = [name for name in names if name.startswith("samples/0") and name.endswith("png")]
    assert pictures == [f"samples/{i:05d}_0123abcd.png" for i in range(4, 12)]
    assert "samples/sheet_00012.json" in names
    assert not [name for name in names if "step_00000006/" in name or "data_report" in name]
    assert "nothing is uploaded" in done.stdout
    card = (finished / "README.md").read_text()
    for part in ("library_name: imagen-scale", "# tiny", "16 px -> 32 px", "6 pictures",
                 "CC BY-SA 4.0", "hf download me/tiny --local-dir runs/tiny",
                 'imagen-scale sample "red heart" --run runs/tiny', "It was not measured",
                 "![What stage 1 draws](samples/unet1_step_00000006.png)",
                 "| 2 | 32 px |"):  # fmt: skip
        assert part in card, part
    assert str(finished.parent) not in card  # no path of this machine


def test_the_card_has_the_measures_and_one_that_is_there_stays(finished):
    done = CliRunner().invoke(main, ["evaluate", "--run", str(finished), "--num", "2",
                                     "--steps", "1"])  # fmt: skip
    assert done.exit_code == 0, done.output
    done = push(finished, "--repo", "me/tiny", "--dry-run")
    assert "  evaluation.json" in done.stdout
    card = (finished / "README.md").read_text()
    assert "On 2 captions of train pictures:" in card
    assert "| restores real pictures, PSNR in dB |  | " in card
    (finished / "README.md").write_text("mine")
    done = push(finished, "--repo", "me/tiny", "--dry-run")
    assert "is taken as it is" in done.stderr
    assert (finished / "README.md").read_text() == "mine"


def test_a_card_that_nobody_changed_is_written_anew(finished):
    card = finished / "README.md"
    push(finished, "--repo", "me/tiny", "--dry-run")
    first = card.read_text()
    done = push(finished, "--repo", "you/other", "--dry-run")
    assert "is written" in done.stderr
    assert card.read_text() != first and "hf download you/other --local-dir" in card.read_text()
    assert "me/tiny" not in card.read_text() and "It was not measured" in card.read_text()
    assert push(finished, "--repo", "me/tiny", "--dry-run").exit_code == 0
    assert card.read_text() == first
    evaluated = ["evaluate", "--run", str(finished), "--num", "2", "--steps", "1"]
    assert CliRunner().invoke(main, evaluated).exit_code == 0
    push(finished, "--repo", "me/tiny", "--dry-run")
    assert "On 2 captions of train pictures:" in card.read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("# tiny", "# tine"),
        lambda text: text + "\n",
        lambda text: "x" + text,
        lambda text: text.replace("imagen-scale: ", "imagen-scale: 0"),
    ],
)
def test_a_card_that_was_changed_by_a_letter_stays(finished, change):
    card = finished / "README.md"
    push(finished, "--repo", "me/tiny", "--dry-run")
    changed = change(card.read_text())
    card.write_text(changed)
    done = push(finished, "--repo", "you/other", "--dry-run")
    assert done.exit_code == 0 and "is taken as it is; delete it" in done.stderr
    assert card.read_text() == changed


def test_links_that_lead_nowhere_are_left_out(finished):
    for name in ("unet1_step_00000009.png", "00099_0123abcd.png", "sheet_00099.png"):
        (finished / "samples" / name).symlink_to("gone.png")
    done = push(finished, "--repo", "me/tiny", "--dry-run")
    assert done.exit_code == 0, done.output
    names = [line.split()[-1] for line in done.stdout.splitlines()[:-1]]
    assert not [name for name in names if "99" in name or "09.png" in name]
    assert "samples/unet1_step_00000006.png" in names and "samples/sheet_00012.png" in names
    assert len([name for name in names if name.startswith("samples/0")]) == 2 * 8


def test_places_of_this_machine_are_said(tmp_path):
    run = tmp_path / "tiny"
    for number in (1, 2):
        write_stage(run, number, overrides=["data.cache_dir=/somewhere/of/mine"])
    done = push(run, "--repo", "me/tiny", "--dry-run")
    assert "name places of this machine: data.cache_dir '/somewhere/of/mine'" in done.stderr


def test_places_that_only_the_file_of_a_stage_names_are_said(tmp_path):
    """It was taken over, or trained before the run's configuration was changed."""
    run = tmp_path / "tiny"
    section = {"teacher": "/runs/of/mine", "steps": [None, 2], "cond_scale": 1}
    write_stage(run, 2, overrides=(f"distill={json.dumps(section)}", 'text.encoder="/my/t5"'))
    write_stage(run, 1, overrides=('imagen.text_encoder_name="~/models/t5"',))
    done = push(run, "--repo", "me/tiny", "--dry-run")
    assert done.exit_code == 0, done.output
    for place in ("imagen.text_encoder_name '~/models/t5'", "text.encoder '/my/t5'",
                  "distill.teacher '/runs/of/mine'"):  # fmt: skip
        assert done.stderr.count(place) == 1, done.stderr


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("~/birds", None),
        ("/mnt/birds", None),  # not mounted now
        ("./sets/birds", None),
        ("../birds", None),
        ("me/birds", "[me/birds](https://huggingface.co/datasets/me/birds)"),
    ],
)
def test_a_folder_is_no_link_to_the_hub(tmp_path, path, said):
    data = {"source": "huggingface", "path": path}
    write_run(tmp_path / "tiny", overrides=(f"data={json.dumps(data)}",))
    done = push(tmp_path / "tiny", "--repo", "me/tiny", "--dry-run")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert (said or "A data set of pictures with captions. ") in card
    assert ("datasets" in card, path in card) == (said is not None,) * 2


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ("/home/me/models/t5", "t5"),
        ("~/models/t5/", "t5"),
        ("google/t5-v1_1-base", "google/t5-v1_1-base"),
        ("minilm", "minilm"),
    ],
)
def test_of_a_folder_with_the_encoder_the_name_is_told(tmp_path, encoder, said):
    changes = (f"text.encoder={encoder}", "imagen.text_embed_dim=384")
    write_run(tmp_path / "tiny", overrides=() if encoder == "minilm" else changes)
    assert push(tmp_path / "tiny", "--repo", "me/tiny", "--dry-run").exit_code == 0
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert f"Captions were read through {said}." in card


@pytest.mark.parametrize("name", ["tiny", "me/ti ny", "me/you/tiny", "/tiny", "me/.."])
def test_a_name_that_is_none_is_said(finished, name):
    done = push(finished, "--repo", name, "--dry-run")
    assert done.exit_code == 2 and "write OWNER/NAME" in done.stderr


def test_an_unfinished_run_is_not_shared(finished):
    write_stage(finished, 2, step=3)
    done = push(finished, "--repo", "me/tiny", "--dry-run")
    assert done.exit_code == 1 and "U-Net 2 is half-trained (3 of 6 steps)" in done.stderr
    (finished / "unet2" / "inference.safetensors").unlink()
    done = push(finished, "--repo", "me/tiny", "--dry-run")
    assert done.exit_code == 1 and "U-Net 2 is not trained yet" in done.stderr


# Over HTTP --------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    """A hub that keeps what it is sent; `refuse` is what it answers instead."""

    class Hub(BaseHTTPRequestHandler):
        asked, files, refuse = [], {}, None

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.asked.append((self.path, self.headers["Authorization"]))
            if isinstance(self.refuse, int):
                return self.answer({"error": "no"}, self.refuse)
            if self.refuse is not None:  # a page in between
                return self.answer(self.refuse)
            if self.path == "/api/repos/create":
                type(self).created = json.loads(body)
                return self.answer({"url": f"{url}/me/tiny"})
            if "/preupload/" in self.path:
                paths = [one["path"] for one in json.loads(body)["files"]]
                return self.answer({"files": [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False}
                    for path in paths
                ]})  # fmt: skip
            if self.path == "/api/validate-yaml":  # of the card
                assert "library_name" in json.loads(body)["content"]
                return self.answer({"errors": [], "warnings": []})
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url_of_it = f"{url}/me/tiny/commit/{'0' * 40}"
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url_of_it,
                                "hookOutput": ""})  # fmt: skip

        def answer(self, what, status=200):
            body = what if isinstance(what, bytes) else json.dumps(what).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.url = url
    yield Hub
    server.shutdown()
    server.server_close()


def upload(run, endpoint, *words, **changes):
    """The command in a process of its own: the hub's address is read when its library starts."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test", "HF_HOME": str(run / "hf"),
            "HF_HUB_DISABLE_XET": "1"} | changes  # fmt: skip
    code = "from imagen_scale.commands.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "push", str(run), "--repo", "me/tiny", *words],
        env={key: value for key, value in env.items() if value}, cwd=ROOT, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip


def test_what_is_uploaded_is_a_run_again(finished, hub, tmp_path):
    done = upload(finished, hub.url, "--private")
    assert done.returncode == 0, done.stderr
    assert f"are in {hub.url}/me/tiny" in done.stdout
    assert hub.created.get("private") or hub.created["visibility"] == "private"
    assert {token for _, token in hub.asked} == {"Bearer hf_test"}
    again = tmp_path / "again"
    for name, content in hub.files.items():
        (again / name).parent.mkdir(parents=True, exist_ok=True)
        (again / name).write_bytes(content)
    for number in (1, 2):
        ours, theirs = (load_file(run / f"unet{number}" / "inference.safetensors")
                        for run in (finished, again))  # fmt: skip
        assert all((ours[name] == theirs[name]).all() for name in ours)
    assert Cascade.load(again).image_sizes == [16, 32]
    assert (again / "README.md").read_text() == (finished / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "refuse", "code", "message"),
    [
        ({"HF_TOKEN": ""}, None, 2, "run `hf auth login`, or set HF_TOKEN"),
        ({"HF_HUB_OFFLINE": "1"}, None, 2, "HF_HUB_OFFLINE is set"),
        ({}, 403, 2, "does not let this token write there (HTTP 403)"),
        ({}, 400, 1, "refuses the files (HTTP 400)"),
        ({}, {}, 1, "what answers is not the Hugging Face hub (KeyError in its answer)"),
        ({}, b"hello", 1, "what answers is not the Hugging Face hub (JSONDecodeError"),
        ({"HF_TOKEN": "hf_\u00e9"}, None, 2, "holds characters that no token has"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, None, 1, "cannot be reached (ConnectError)"),
    ],
)
def test_what_keeps_it_from_being_shared_is_one_sentence(
    finished, hub, changes, refuse, code, message
):
    hub.refuse = refuse
    done = upload(finished, hub.url, **changes)
    assert done.returncode == code and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "hf_test" not in done.stderr
    assert not hub.files
