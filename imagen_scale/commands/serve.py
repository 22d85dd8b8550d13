"""`imagen-scale serve`."""

import click

from imagen_scale.commands.console import say
from imagen_scale.commands.errors import user_errors
from imagen_scale.commands.listening import listen
from imagen_scale.commands.options import runtime_options, unet_limit_option, unfinished_option
from imagen_scale.errors import UsageError
from imagen_scale.sampling.runtimes.options import RuntimeOptions
from imagen_scale.serving.limits import Limits

COUNT = click.IntRange(min=1)
MOST = Limits()


@click.command(short_help="Answer requests for pictures over HTTP.")
@click.argument("run", required=False)
@click.option("--host", default="127.0.0.1", show_default=True,
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
@unet_limit_option
@unfinished_option
@user_errors
@runtime_options
def serve(
    run: str | None, host: str, port: int, max_batch: int, max_wait_ms: int, queue: int,
    max_n: int, max_steps: int, max_prompt: int, max_body: int, tile: int | None,
    unet_limit: int | None, allow_unfinished: bool, runtime: RuntimeOptions,
) -> None:  # fmt: skip
    """Hold a trained run, and answer requests for images as OpenAI's client sends them.

    RUN is the run's folder; by default the newest under runs/. Requests of several callers are
    computed together. The variable IMAGEN_SCALE_API_KEY holds the key that callers must know.

    \b
        imagen-scale serve
        imagen-scale serve runs/emoji_demo --port 8080 --max-batch 32
    """
    if max_n > queue:
        raise UsageError(
            f"--max-n {max_n}: does not fit into --queue {queue}; make one smaller or the other "
            f"larger."
        )
    from imagen_scale.serving.server import KEY_VARIABLE, LOOPBACK, api_key, hosts_of, require_extra
    from imagen_scale.serving.server import serve as serve_engine

    require_extra()
    from imagen_scale.runs.folders import find_run
    from imagen_scale.sampling.stages import TrainedStages
    from imagen_scale.serving.app import application
    from imagen_scale.serving.engine import Engine

    folder, key = find_run(run), api_key()
    stages = TrainedStages.load(
        folder, runtime=runtime, unet_limit=unet_limit, allow_unfinished=allow_unfinished, say=say
    )
    engine = Engine(
        stages, max_batch=max_batch, patience_s=max_wait_ms / 1000, queue=queue, tile=tile
    )
    limits = Limits(max_n, max_steps, max_prompt, max_body)
    model = folder.resolve().name
    app = application(engine, model, limits=limits, key=key, hosts=hosts_of(host))
    listener = listen(host, port)
    if host not in LOOPBACK and key is None:
        say(f"warning: whoever reaches {host} may use this server; set {KEY_VARIABLE} to ask "
            f"callers for a key")  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    say(f"{folder} at http://{shown}:{listener.getsockname()[1]}; Ctrl-C ends it")
    serve_engine(engine, app, listener, say=say)
