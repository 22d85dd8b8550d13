"""The example in C++ draws what the runtime draws.

Its compiler and the library are here; ONNX Runtime's headers are in no Python package: name their
folder in ONNXRUNTIME_INCLUDE.
"""

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from imagen_scale_runtime import Cascade
from imagen_scale_runtime.seeds import seeded
from PIL import Image
from support import ROOT
from tokenizers import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "ONNXRUNTIME_INCLUDE" not in os.environ, reason="ONNXRUNTIME_INCLUDE names no headers"
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (folder / "libonnxruntime.so").symlink_to(library)
    (folder / "libonnxruntime.so.1").symlink_to(library)
    subprocess.run(
        ["g++", "-std=c++17", "-O2", ROOT / "export/runtime/examples/sample.cpp",
         "-I", os.environ["ONNXRUNTIME_INCLUDE"], "-L", folder, "-lonnxruntime",
         f"-Wl,-rpath,{folder}", "-o", folder / "sample"], check=True,
    )  # fmt: skip
    return folder / "sample"


def test_it_draws_the_base_stage(program, bundled):
    tokens = Tokenizer.from_file(str(bundled / "tokenizer.json")).encode("red heart").ids
    seed = seeded("sample", 1, 0) & 0xFFFFFFFF
    done = subprocess.run(
        [program, bundled, str(seed), *map(str, tokens)], capture_output=True, check=True
    )
    theirs = np.asarray(Image.open(io.BytesIO(done.stdout))).astype(int)
    with Cascade(bundled) as cascade:
        (made,) = cascade.stream("red heart", sampler="ddim")
    assert np.abs(theirs - np.asarray(made.stages[0]).astype(int)).max() <= 1


def test_it_says_what_is_wrong(program, tmp_path):
    done = subprocess.run([program, tmp_path, "0", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/bundle.json cannot be read\n"
