"""What pdsh does with ssh, for machines without it (pdsh 2.35, src/common/pipecmd.c).

`%h`, `%n` and `%u` are replaced in each word, and ssh joins the words for a shell.
"""

import re
import subprocess
import sys


def main():
    at = sys.argv.index("-w")
    hosts, words = sys.argv[at + 1].split(","), sys.argv[at + 2 :]
    running = []
    for number, host in enumerate(hosts):
        meant = {"h": host, "n": str(number), "u": "root", "%": "%"}
        sent = [re.sub("%([hnu%])", lambda m, meant=meant: meant[m[1]], word) for word in words]
        running.append(subprocess.Popen(["ssh", host, *sent]))
    return max(process.wait() for process in running)


if __name__ == "__main__":
    sys.exit(main())
