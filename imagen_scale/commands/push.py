"""`imagen-scale push`."""

import sys

import click

from imagen_scale.commands.console import say
from imagen_scale.commands.errors import user_errors


@click.command(short_help="Share a finished run on the Hugging Face hub.")
@click.argument("run", required=False)
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Where to on the hub.")
@click.option("--private", is_flag=True, help="Of a new repository: only for those it is shown.")
@click.option("--dry-run", is_flag=True, help="Write the card, list the files, upload nothing.")
@user_errors
def push(run: str | None, repo: str, private: bool, dry_run: bool) -> None:
    """Share RUN, by default the newest under runs/, on the Hugging Face hub.

    Uploads the weights to sample from, configuration, measures, the last grids and newest pictures,
    and a card about them: RUN/README.md, which is written anew each time until you write or change
    it; then it is taken as it is. Checkpoints and your data stay here.

    \b
        imagen-scale push runs/birds --repo me/birds --dry-run
        imagen-scale push runs/birds --repo me/birds --private
    """
    from imagen_scale.config import load_config
    from imagen_scale.files.atomic import write_atomically
    from imagen_scale.report import publication
    from imagen_scale.report.model_card import is_untouched, model_card, signed
    from imagen_scale.runs.folders import config_path, find_run

    publication.check_repo(repo)
    run_dir = find_run(run)
    config = load_config(config_path(run_dir))
    stages = publication.finished_stages(run_dir, len(config.unets))
    files = publication.uploads(run_dir, stages)
    card = run_dir / publication.CARD
    if card.exists() and not is_untouched(card.read_text(encoding="utf-8", errors="replace")):
        say(f"{card} is taken as it is; delete it to have it written anew")
    else:
        text = signed(model_card(run_dir, repo, stages, files))
        write_atomically(card, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        say(f"{card} is written: look at it, add a licence, say what it is for")
    if places := publication.named_places([config, *(file.config for file in stages)]):
        say(f"config.json and the weights name places of this machine: {', '.join(places)}")
    files = [publication.Upload(publication.CARD, card), *files]
    for one in files:
        click.echo(f"{_bytes(one.num_bytes):>10}  {one.name}")
    total = _bytes(sum(one.num_bytes for one in files))
    if dry_run:
        click.echo(f"{len(files)} files, {total}, for {repo}; nothing is uploaded")
        return
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    url = publication.push(repo, files, private=private, message=f"Run {run_dir.resolve().name}")
    click.echo(f"{len(files)} files, {total}, are in {url}")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.1f} kB"
