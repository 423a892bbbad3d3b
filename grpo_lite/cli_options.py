"""Options that several commands share."""

from __future__ import annotations

import click


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
