"""Options that several commands share."""

from __future__ import annotations

import click

from grpo_lite.screen import steadfast

say = steadfast(click.echo)  # lines that may quote data, completions or a library's message


def _confirm(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        from grpo_lite.trust import confirm

        confirm()


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_confirm,
    help="Confirm that code shipped with the model may run, where the recipe asks for it.",
)
