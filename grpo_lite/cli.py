"""The command line: the only place that prints or exits. Stages are imported inside the commands, never at the top."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grpo_lite import __version__, cli_export, cli_plan, cli_report
from grpo_lite.cli_export import set_environment
from grpo_lite.cli_options import say, trust_option
from grpo_lite.errors import GRPOLiteError
from grpo_lite.out_of_memory import is_out_of_memory
from grpo_lite.redact import redact, redact_logs, redact_tracebacks
from grpo_lite.screen import printable, ready_streams

if TYPE_CHECKING:
    from grpo_lite.run_dir import RunDir

INTERRUPTED = 130  # the shell's exit status for SIGINT


class _Commands(click.Group):
    """Turns our errors into one message and exit status 1, and offers the nearest command."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        ready_streams()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GRPOLiteError as error:
            if os.environ.get("GRPO_LITE_TRACEBACK"):
                raise
            click.echo(f"error: {_harmless(str(error))}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("stopped at once. Give the same command again to go on from the last checkpoint.", err=True)
            sys.exit(INTERRUPTED)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:  # a fault of ours or of a library: one line, and how to see the rest
            if os.environ.get("GRPO_LITE_TRACEBACK"):
                raise
            click.echo(f"error: {_harmless(_explain(error))}", err=True)
            sys.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"no such command {args[0]!r}.{hint}", ctx) from None


def _harmless(text: str) -> str:
    """Return a message without secrets and control characters: it may quote data or a completion."""
    return printable(redact(text), keep="\n\t")


def _explain(error: Exception) -> str:
    name = type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory: {str(error).splitlines()[0]}\nLower grpo.per_device_train_batch_size (and raise "
            "grpo.gradient_accumulation_steps by as much), or grpo.max_completion_length. What was saved is kept."
        )
    if type(error).__module__.partition(".")[0] == "wandb":
        said = str(error).strip().splitlines() or [name]
        return (
            f"wandb: {said[0]} Log in by `wandb login`, keep it here by WANDB_MODE=offline, or change grpo.report_to."
        )
    if isinstance(error, OSError) and error.errno is not None:
        full = " Free some space, then give the same command again." if error.errno in (ENOSPC, EDQUOT) else ""
        return (
            f"{error.strerror}{f': {error.filename}' if error.filename else ''}. What was saved before is kept.{full}"
        )
    return (
        f"unexpected {name}: {str(error).strip()[:2000]}\nThis is a fault of grpo_lite or of a library below it. "
        "GRPO_LITE_TRACEBACK=1 shows where."
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="grpo-lite")
@click.option("-v", "--verbose", is_flag=True, help="Also show what the libraries below log.")
def main(verbose: bool) -> None:
    """GRPO with LoRA/QLoRA on one small GPU or a CPU: from a recipe to a verified merged model.

    A recipe is one whole run: `grpo-lite recipes` lists them, `grpo-lite train quickstart` runs one. Any value of a
    recipe can be overridden on the line: `grpo-lite train gsm8k grpo.max_steps=50 data.train.path=my.jsonl`.
    """
    set_environment()
    quieten(verbose)


def quieten(verbose: bool) -> None:
    """Keep the libraries' banners, bars and notices off the screen unless asked for."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    redact_logs()
    redact_tracebacks()
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("transformers", "trl", "bitsandbytes", "datasets", "huggingface_hub", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def recipe_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Take RECIPE and any number of KEY=VALUE overrides."""
    function = trust_option(click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function))
    return click.argument("recipe", metavar="RECIPE")(function)


def _run_dir(path: str) -> RunDir:
    from grpo_lite.run_dir import RunDir

    return RunDir(path)


@main.command()
@recipe_argument
@click.option("--run", "run_path", help="Run directory.  [default: runs/RECIPE]")
@click.option("--plain", is_flag=True, help="Lines instead of a live board (the default where this is no terminal).")
def train(recipe: str, overrides: tuple[str, ...], run_path: str | None, plain: bool) -> None:
    """Train a recipe, evaluate before and after, merge and verify; resumes an interrupted run."""
    from grpo_lite.recipe_load import load_recipe

    begun = time.monotonic()
    loaded = load_recipe(recipe, overrides)
    run = _run_dir(run_path or f"runs/{loaded.name}")
    click.echo(f"{loaded.name}: {loaded.description}\nrun directory: {run.path}")
    from grpo_lite.backend_choice import with_chosen_backend
    from grpo_lite.unsloth_backend import prepare

    loaded = with_chosen_backend(loaded, run, say)
    goes_on = run.recipe_file.is_file()
    if not (goes_on and run.read_run().get("trained_at")):  # what is left of a trained run is done without Unsloth
        prepare(loaded, begun=goes_on)
    from grpo_lite.ranks import this_process
    from grpo_lite.summary import interrupted_summary, run_summary
    from grpo_lite.train import train_run

    result = train_run(loaded, run, click.echo, view="plain" if plain else _view(), begun=begun)
    if not this_process().is_first:
        return
    if result.stopped_by:
        say(interrupted_summary(result))
        sys.exit(INTERRUPTED)
    say(run_summary(run))


def _view() -> Any:
    """Return how training is watched: a board in a terminal or a notebook, lines everywhere else."""
    if "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        return "notebook"
    return "live" if sys.stdout.isatty() else "plain"


@main.command("eval")
@click.argument("run_path", metavar="RUN", type=click.Path())
@trust_option
def evaluate(run_path: str) -> None:
    """Measure base against trained (and merged) again, on the run's held-out prompts."""
    from grpo_lite.evaluate import evaluate_merged, evaluate_run
    from grpo_lite.summary import score_lines
    from grpo_lite.train import require_trained

    run = _run_dir(run_path)
    require_trained(run)
    with run.locked():
        scores = evaluate_run(run, say)
        if run.merged.is_dir():
            scores = evaluate_merged(run, say)
        say("\n".join(score_lines(scores)))
    say(f"records: {run.evaluation / 'records.jsonl'}")


@main.command()
@click.argument("run_path", metavar="RUN", type=click.Path())
@click.option("--overwrite", is_flag=True, help="Replace a merge that is there already.")
@trust_option
def merge(run_path: str, overwrite: bool) -> None:
    """Merge a run's adapter onto its 16-bit base, and verify the result."""
    from grpo_lite.merge_run import merge_and_score
    from grpo_lite.summary import merge_line
    from grpo_lite.train import require_trained

    run = _run_dir(run_path)
    require_trained(run)
    with run.locked():
        record = merge_and_score(run, say, overwrite=overwrite)
    say(merge_line(record))
    say(f"merged model: {run.merged}")


@main.command()
def recipes() -> None:
    """List the recipes: model, data, least GPU."""
    from grpo_lite.recipe_load import load_recipe, recipe_names

    loaded = [load_recipe(name) for name in recipe_names()]
    rows = [("RECIPE", "MODEL", "DATA", "LEAST GPU")]
    rows += [(r.name, f"{r.model.id} {r.model.load_in}", _source(r.data.train), r.least_gpu) for r in loaded]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


def _source(source: Any) -> str:
    return str(source.hub or source.path or f"generated {source.generator}")


@main.command()
@recipe_argument
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print a recipe as it resolves: every key, with defaults and overrides."""
    from grpo_lite.recipe_load import load_recipe
    from grpo_lite.run_dir import dump_recipe

    click.echo(dump_recipe(load_recipe(recipe, overrides)), nl=False)


@main.command()
@recipe_argument
@click.option("--previews", default=3, show_default=True, help="Rendered prompts to print.")
def check(recipe: str, overrides: tuple[str, ...], previews: int) -> None:
    """Validate a recipe, preview its prompts and pay its gold answers, without training."""
    from grpo_lite.recipe_load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from grpo_lite.check import check_recipe

    for line in check_recipe(loaded, previews):
        say(line)


@main.group("rewards")
def rewards_group() -> None:
    """Rewards: do they pay the right answer, and nothing else?"""


@rewards_group.command("check")
@recipe_argument
def rewards_check(recipe: str, overrides: tuple[str, ...]) -> None:
    """Try the gold answer and a battery of cheats on a recipe's own rows; exits 1 when the gold does not score."""
    from grpo_lite.recipe_load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from grpo_lite.reward_check import check_rewards_alone

    report, notes = check_rewards_alone(loaded)
    say("\n".join([*notes, report.table()]))
    if not report.gold_scores:
        sys.exit(1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
def schema(path: Path | None) -> None:
    """Write the recipes' JSON Schema (for completion in editors), to PATH or the screen."""
    from grpo_lite.recipe_schema import schema_text

    if path is None:
        click.echo(schema_text(), nl=False)
    else:
        path.write_text(schema_text(), encoding="utf-8")


cli_export.register(main)
cli_plan.register(main)
cli_report.register(main)

if __name__ == "__main__":
    main()
