"""The commands that say beforehand what a run will need: `plan`, `probe` and `backends`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from grpo_lite.cli_options import say, trust_option

if TYPE_CHECKING:
    from grpo_lite.hardware import Card


def register(main: click.Group) -> None:
    """Add the commands to the command line."""
    main.add_command(plan)
    main.add_command(probe)
    main.add_command(backends)


@click.command()
@click.argument("recipe", metavar="RECIPE", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpu", help="t4, rtx3060-12, rtx4060-8, rtx4070ti-16, rtx4090, l4, a10, a100-40, h100, or e.g. 11GiB.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="The longest prompt.  [default: data.max_prompt_tokens]")
@click.option("--all-gpus", is_flag=True, help="Print the recipe × GPU table (of every recipe, or of RECIPE).")
def plan(
    recipe: str | None, overrides: tuple[str, ...], gpu: str | None, prompt_tokens: int | None, all_gpus: bool
) -> None:
    """Say where a card's memory would go, whether RECIPE fits, and what to change if not; loads nothing."""
    from grpo_lite.hardware import find_card
    from grpo_lite.plan_report import all_cards_table, plan_recipe, report_lines
    from grpo_lite.recipe_load import load_recipe, recipe_names

    if all_gpus:
        names = [recipe] if recipe else [name for name in recipe_names() if name != "smoke"]
        click.echo("\n".join(all_cards_table([load_recipe(name, overrides) for name in names])))
        return
    loaded = load_recipe(recipe or "quickstart", overrides)
    card = find_card(gpu) if gpu else _this_card()
    made = plan_recipe(loaded, card, prompt_tokens)
    click.echo("\n".join(report_lines(loaded, card, made)))
    if not made.fits:
        raise SystemExit(1)


@click.command()
@click.argument("recipe", metavar="RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--prompts", default=32, type=click.IntRange(1), show_default=True, help="Training prompts to sample.")
@click.option("--samples", type=click.IntRange(2), help="Samples a prompt.  [default: 8, or num_generations if more]")
@trust_option
def probe(recipe: str, overrides: tuple[str, ...], prompts: int, samples: int | None) -> None:
    """Will it learn? Samples the untrained model on RECIPE's prompts: pass rates, equal groups, cut lengths, ETA."""
    from grpo_lite.recipe_load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from grpo_lite.data import load_prompts
    from grpo_lite.hardware import detect_device
    from grpo_lite.model import load_for_sampling, load_tokenizer
    from grpo_lite.probe import probe_lines, probe_recipe
    from grpo_lite.probe_record import keep_times

    tokenizer = load_tokenizer(loaded)
    rows = load_prompts(loaded, tokenizer)
    device = detect_device()
    model = load_for_sampling(loaded, device)
    made = probe_recipe(loaded, model, tokenizer, rows, count=prompts, samples=samples)
    keep_times(loaded, device.name, made.to_json())
    click.echo("\n".join(probe_lines(made)))


@click.command()
@click.argument("recipe", metavar="RECIPE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--steps", default=4, type=click.IntRange(2), show_default=True, help="Of each; the first round is left out."
)
@click.option("--minutes", default=5.0, type=click.FloatRange(0.1, 1440), show_default=True, help="Most for each.")
@trust_option
def backends(recipe: str, overrides: tuple[str, ...], steps: int, minutes: float) -> None:
    """Race hf against unsloth on RECIPE's shape; `model.backend: auto` takes the winner on this card from then on."""
    from grpo_lite.backend_choice import card_of_a_choice, keep_race
    from grpo_lite.backend_race import race
    from grpo_lite.recipe_load import load_recipe
    from grpo_lite.unsloth_backend import lacks

    loaded = load_recipe(recipe, overrides)
    card = card_of_a_choice()
    if card is None:
        click.echo("no choice here: it takes CUDA and the package unsloth (make setup). auto is hf")
        return
    if why_not := lacks(loaded):
        click.echo(f"no choice for this recipe: {why_not}. auto is hf")
        return
    click.echo(f"{loaded.name}: {steps} steps of each on {card}")
    found = race(loaded, say, steps, minutes * 60)
    keep_race(loaded, card, found)
    say(f"auto takes {found['chosen']}: {found['why']}")


def _this_card() -> Card:
    from grpo_lite.errors import ModelError
    from grpo_lite.hardware import CARDS, Card, detect_device

    device = detect_device()
    if device.kind != "cuda":
        raise ModelError(f"gpu: there is none here. Name one: --gpu (GPU= in make) {', '.join(CARDS)}, or e.g. 11GiB.")
    return Card(device.name, device.memory_bytes, device.bfloat16)
