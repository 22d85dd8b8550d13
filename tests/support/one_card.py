"""A task to which srun shows a card of its own: which cards are taken, ours and DeepSpeed's way."""

import json


def main():
    import torch
    from deepspeed.accelerator import get_accelerator

    from imagen_scale.training import launch_variables, ranks
    from support.ranks import Small

    taken = []
    accelerator = type(get_accelerator())
    name, set_device = accelerator.device_name, torch.cuda.set_device
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = taken.append
    accelerator.device_name = lambda self, index=None: "cuda"
    launch_variables.fill_environment()
    ranks.check_machine()

    accelerator.device_name, torch.cuda.set_device = name, set_device  # there is no card here
    accelerator.set_device = lambda self, index: taken.append(index)
    ranks.join()
    Small(0).release()
    ranks.stop()
    print(json.dumps({"taken": taken, "local_rank": ranks.local_rank()}), flush=True)


if __name__ == "__main__":
    main()
