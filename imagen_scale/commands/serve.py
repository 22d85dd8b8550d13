"""`imagen-scale serve`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from imagen_scale.commands.console import say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.listening import listen
from imagen_scale.commands.options import runtime_options, unet_limit_option, unfinished_option
from imagen_scale.data.network import LOCALHOST
from imagen_scale.errors import UsageError
from imagen_scale.sampling.options import SamplingOptions
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.serving.limits import Limits

if TYPE_CHECKING:
    from imagen_scale.serving.contract import ServedCascade

COUNT = click.IntRange(min=1)
MOST = Limits()


@click.command(short_help="Answer requests for pictures over HTTP.")
@click.argument("run", required=False, metavar="[RUN|BUNDLE]")
@click.option("--host", default=LOCALHOST, show_default=True,
              help="Where to listen; others than this machine want a key.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="0 takes any that is free.")  # fmt: skip
@click.option("--max-batch", type=COUNT, default=16, show_default=True,
              help="Pictures computed together at most.")  # fmt: skip
@click.option("--max-wait-ms", type=click.IntRange(min=0), default=20, show_default=True,
              help="How long a picture waits for company at most.")  # fmt: skip
@click.option("--queue", type=COUNT, default=256, show_default=True,
              help="Pictures that may wait; more are refused with 429.")  # fmt: skip
@click.option("--max-n", type=COUNT, default=MOST.pictures, show_default=True,
              help="Pictures of one request.")  # fmt: skip
@click.option("--max-steps", type=COUNT, default=MOST.steps, show_default=True,
              help="Steps of a stage.")  # fmt: skip
@click.option("--max-prompt", type=COUNT, default=MOST.prompt, show_default=True,
              help="Characters of a prompt.")  # fmt: skip
@click.option("--max-body", type=COUNT, default=MOST.body, show_default=True,
              help="Bytes of a request.")  # fmt: skip
@click.option("--tile", type=COUNT,
              help="Compute stages larger than this in tiles of this side, in pixels.")  # fmt: skip
@click.option("--provider", help="What ONNX Runtime computes a bundle with; default the CPU's.")
@click.option("--threads", type=COUNT, help="That a bundle is computed with on the CPU.")
@unet_limit_option
@unfinished_option
@user_errors
@runtime_options
def serve(
    run: str | None, host: str, port: int, max_batch: int, max_wait_ms: int, queue: int,
    max_n: int, max_steps: int, max_prompt: int, max_body: int, tile: int | None,
    provider: str | None, threads: int | None, unet_limit: int | None, allow_unfinished: bool,
    runtime: RuntimeOptions,
) -> None:  # fmt: skip
    """Hold a cascade, and answer requests for images as OpenAI's client sends them.

    RUN is the folder of a trained run; by default the newest under runs/. BUNDLE is a folder that
    `imagen-scale export --bundle` has written; it is served without torch. Requests of several
    callers are computed together. The variable IMAGEN_SCALE_API_KEY holds the key that callers must
    know.

    \b
        imagen-scale serve
        imagen-scale serve runs/emoji_demo --port 8080 --max-batch 32
        imagen-scale serve runs/emoji_demo/export/bundle-fp32
    """
    if max_n > queue:
        raise UsageError(
            f"--max-n {max_n}: does not fit into --queue {queue}; make one smaller or the other "
            f"larger."
        )
    from imagen_scale.serving.server import KEY_VARIABLE, LOOPBACK, api_key, hosts_of, require_extra
    from imagen_scale.serving.server import serve as serve_engine

    require_extra()
    from imagen_scale.runs.folders import bundle_path, find_run
    from imagen_scale.serving.app import application
    from imagen_scale.serving.engine import Engine

    if run is not None and bundle_path(Path(run)).is_file():
        folder = Path(run)
        cascade = _bundle(folder, runtime, provider, threads, unet_limit, allow_unfinished, tile)
    else:
        folder = find_run(run)
        cascade = _run(folder, runtime, provider, threads, unet_limit, allow_unfinished, tile)
    usual = max(one.steps for one in cascade.settings(SamplingOptions(), len(cascade.sizes)))
    if max_steps < usual:
        raise UsageError(
            f"--max-steps {max_steps}: a request that names no steps takes {usual}; give at least "
            f"so many."
        )
    engine = Engine(cascade, max_batch=max_batch, patience_s=max_wait_ms / 1000, queue=queue)
    limits = Limits(max_n, max_steps, max_prompt, max_body)
    model, key = folder.resolve().name, api_key()
    app = application(engine, model, limits=limits, key=key, hosts=hosts_of(host))
    listener = listen(host, port)
    if host not in LOOPBACK and key is None:
        say(f"warning: whoever reaches {host} may use this server; set {KEY_VARIABLE} to ask "
            f"callers for a key")  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    say(f"{folder} at http://{shown}:{listener.getsockname()[1]}; Ctrl-C ends it")
    serve_engine(engine, app, listener, say=say)


def _run(
    folder: Path, runtime: RuntimeOptions, provider: str | None, threads: int | None,
    unet_limit: int | None, allow_unfinished: bool, tile: int | None,
) -> "ServedCascade":  # fmt: skip
    for name, value in (("provider", provider), ("threads", threads)):
        if value is not None:
            raise UsageError(
                f"--{name} {value}: is a bundle's, and {folder} is a run; leave it out."
            )
    from imagen_scale.sampling.stages import TrainedStages
    from imagen_scale.serving.run import ServedRun

    stages = TrainedStages.load(
        folder, runtime=runtime, unet_limit=unet_limit, allow_unfinished=allow_unfinished, say=say
    )
    return ServedRun(stages, tile=tile)


def _bundle(
    folder: Path, runtime: RuntimeOptions, provider: str | None, threads: int | None,
    unet_limit: int | None, allow_unfinished: bool, tile: int | None,
) -> "ServedCascade":  # fmt: skip
    given = {
        "precision": runtime.precision,
        "channels-last": runtime.channels_last,
        "sequential": runtime.sequential,
        "allow-unfinished": allow_unfinished,
    }
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name}: is a run's, and {folder} is a bundle; leave it out.")
    from imagen_scale.serving.server import require_runtime

    require_runtime()
    from imagen_scale.serving.bundle import ServedBundle

    return ServedBundle(
        folder,
        unet_limit=unet_limit,
        tile=tile,
        runtime="onnx" if runtime.runtime == "auto" else runtime.runtime,
        provider=provider,
        threads=threads,
    )
