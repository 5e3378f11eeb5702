"""``compress completion``: the script that makes a shell complete compress."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from compress.completion import SHELLS

#: What the shell's script sets when it asks; click reads it before any command.
_VARIABLE = "_COMPRESS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print the script that makes SHELL complete commands, options, profiles, models, providers and artifacts.

    \b
    bash   eval "$(compress completion bash)"       in ~/.bashrc
    zsh    eval "$(compress completion zsh)"        in ~/.zshrc
    fish   compress completion fish | source        in ~/.config/fish/config.fish
    """  # noqa: D301 - click wants the control character
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these three"
    script = kind(context.find_root().command, {}, "compress", _VARIABLE)
    # Not source(): for bash that runs the bash that is found, which need not be the one that will read this.
    click.echo(script.source_template % script.source_vars())
    return 0
