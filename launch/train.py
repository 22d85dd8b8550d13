"""Trains a cascade: deepspeed launch/train.py --config configs/cascade_64_256.json.

Also runs under torchrun, srun and plain python; `imagen-scale train` starts the same. Errors end
in one sentence; exit code 2 for wrong use, 1 for a failure.
"""

import sys

try:
    from imagen_scale.commands.train_process import main
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error}. Install the project first: pip install -c constraints.txt '.[train]'"
    )

if __name__ == "__main__":
    main()
