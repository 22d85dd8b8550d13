"""Runs a module where nothing but what the runtime asks for can be imported; its arguments are

MODULE [ARGUMENT ...]
"""

import runpy
import sys

ALLOWED = {"imagen_scale_runtime", "numpy", "onnxruntime", "openvino", "PIL", "tokenizers"}


class Gate:
    """Finds nothing, and lets others look only for what is allowed."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Gate())
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
