"""``compress push``: an artifact to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli_options import artifact_argument
from compress.sizes import format_size


@click.command()
@artifact_argument
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private; refuse one that exists and is public.")
@click.option("--revision", metavar="BRANCH", help="The branch to commit to, made where it is missing; default main.")
@click.option("--message", metavar="TEXT", help="The commit's message; default: the artifact's name.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent; needs neither network nor token.")
@click.option("--allow-rejected", is_flag=True, help="Push what its budget rejected, or what nobody measured.")
def push(
    artifact: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    allow_rejected: bool,
) -> int:
    """Upload an ARTIFACT to the Hugging Face hub's REPO_ID (owner/name), as one commit.

    The digest of every file is compared with the manifest's first; files that the manifest does not list stay here.
    """
    from compress import push as uploading

    uploading.check_repo_id(repo_id)
    uploads = uploading.planned(artifact, allow_rejected=allow_rejected)
    if dry_run:
        for item in uploads:
            click.echo(f"{format_size(item.size):>10}  {'LFS' if item.large else '   '}  {item.name}")
        for name in uploading.left_out(artifact, uploads):
            click.echo(f"{'stays here':>15}  {name}")
        large = sum(item.size for item in uploads if item.large)
        total = sum(item.size for item in uploads)
        click.echo(
            f"{len(uploads)} files, {format_size(total)} ({format_size(large)} of it as LFS, if the hub sees it so), "
            f"to {repo_id}{'' if revision is None else f' at {revision}'}"
        )
        return 0
    address = uploading.push(
        artifact,
        repo_id,
        uploads,
        private=private,
        revision=revision,
        message=message or f"compress: {artifact.resolve().name}",
        say=lambda step: click.echo(step, err=True),
    )
    click.echo(address)
    return 0
