"""The `imagen-scale` command; torch is imported only inside the commands that need it."""

import click

from imagen_scale.commands.config import config
from imagen_scale.commands.distill import distill
from imagen_scale.commands.doctor.command import doctor
from imagen_scale.commands.ema import ema
from imagen_scale.commands.evaluate import evaluate
from imagen_scale.commands.export import export
from imagen_scale.commands.group import CommandGroup
from imagen_scale.commands.importing import import_config, import_run
from imagen_scale.commands.init import init
from imagen_scale.commands.plan import plan
from imagen_scale.commands.prepare import prepare
from imagen_scale.commands.push import push
from imagen_scale.commands.report import report
from imagen_scale.commands.runs import runs
from imagen_scale.commands.sample import sample
from imagen_scale.commands.serve import serve
from imagen_scale.commands.sheet import sheet
from imagen_scale.commands.terminal import settle_output
from imagen_scale.commands.train import train
from imagen_scale.commands.ui import ui
from imagen_scale.commands.upscale import upscale
from imagen_scale.commands.waiting import wait_asleep
from imagen_scale.files.caches import settle_caches
from imagen_scale.version import __version__

COMMANDS = (
    config, distill, doctor, ema, evaluate, export, import_config, import_run, init, plan,
    prepare, push, report, runs, sample, serve, sheet, train, ui, upscale,
)  # fmt: skip


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train, on the hardware you have, a cascade that turns text into pictures; then sample it.

    \b
        imagen-scale doctor                           # is this machine ready?
        imagen-scale train configs/emoji_demo.json    # train every stage
        imagen-scale sample "red heart"               # make a picture

    Exit codes: 0 done, 1 a failure, 2 wrong use, 3 an export differs from the network, 130
    interrupted. NO_COLOR turns colours off; output that is piped is plain.
    """
    wait_asleep()
    settle_output()
    settle_caches()


for command in COMMANDS:
    main.add_command(command)
