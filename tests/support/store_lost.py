"""A rank asks the store for a word while rank 0, which keeps it, is killed; its argument: PORT."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta

from imagen_scale.commands.torch_log import settle_torch_log


def main():
    settle_torch_log()
    from torch.distributed import TCPStore

    port = int(sys.argv[1])
    keeper = os.fork()
    if keeper == 0:
        store = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
        store.set("word", "here")
        time.sleep(600)
    store = TCPStore("127.0.0.1", port, 2, timeout=timedelta(seconds=60), wait_for_workers=False)
    print(store.get("word").decode())
    os.kill(keeper, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (keeper, signal.SIGKILL)).start()
    try:
        store.get("word")
    except RuntimeError:  # all of torch's errors are
        print("lost")


if __name__ == "__main__":
    main()
