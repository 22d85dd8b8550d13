"""`imagen-scale config ...`: what a configuration holds, and whether it is valid."""

import json

import click

from imagen_scale.commands.errors import user_errors
from imagen_scale.errors import UsageError

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key, e.g. data.flip=true.",
)


@click.group(short_help="Check or show a configuration, or what it may hold.")
def config() -> None:
    """Check or show a configuration, or print what one may hold.

    \b
        imagen-scale config check configs/emoji_demo.json
        imagen-scale config show configs/emoji_demo.json --set training.seed=1
    """


@config.command("check")
@click.argument("file")
@set_option
@user_errors
def config_check(file: str, overrides: tuple[str, ...]) -> None:
    """Say whether FILE is a valid configuration; every problem is listed at once.

    \b
        imagen-scale config check configs/cascade_64_256.json
    """
    from imagen_scale.config import load_config, told_of_recipe

    checked = load_config(file, overrides)
    sizes = " -> ".join(map(str, checked.imagen.image_sizes))
    click.echo(f"{file}: valid; {len(checked.unets)} U-Net(s), {sizes} px.")
    if recipe := told_of_recipe(checked):
        click.echo(recipe)


@config.command("show")
@click.argument("file", required=False)
@click.option("--run", help="Show the configuration of this run.")
@set_option
@user_errors
def config_show(file: str | None, run: str | None, overrides: tuple[str, ...]) -> None:
    """Print the configuration in FILE, or of a run, with every default written out.

    \b
        imagen-scale config show configs/emoji_demo.json --set training.seed=1
        imagen-scale config show --run runs/emoji_demo
    """
    from imagen_scale.config import dump_config, load_config

    if (file is None) == (run is None):
        raise UsageError("give a FILE, or a run with --run; one of the two.")
    if run is not None:
        from imagen_scale.runs.folders import config_path, find_run

        file = str(config_path(find_run(run)))
    click.echo(dump_config(load_config(str(file), overrides)), nl=False)


@config.command("schema")
@user_errors
def config_schema() -> None:
    """Print the JSON schema of a configuration, for editors.

    \b
        imagen-scale config schema > imagen-scale.schema.json
    """
    from imagen_scale.config import Config

    click.echo(json.dumps(Config.model_json_schema(), indent=2))


@config.command("reference")
@user_errors
def config_reference() -> None:
    """Print every key with its values, default and meaning, in Markdown.

    \b
        imagen-scale config reference > docs/configuration.md
    """
    from imagen_scale.config.reference import reference

    click.echo(reference(), nl=False)
