"""The command line: the only place that prints or exits.

The verbs stand in the order of a run's life. A verb imports its stage when it is called, never at the top: `--help`
must not wait for torch, and Unsloth has to be imported before transformers.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import click

from grpo_lite import __version__
from grpo_lite.commands import either, hint, hint_setup
from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.errors import GRPOLiteError, RecipeError, first_line
from grpo_lite.files.redact import redact, redact_logs, redact_tracebacks
from grpo_lite.screen import printable, quiet_on_broken_pipe, reader_has_left, ready_streams, silence

if TYPE_CHECKING:
    from grpo_lite.models.device import Card
    from grpo_lite.recipe.recipe import MergeOnto
    from grpo_lite.runs.run_dir import RunDir

INTERRUPTED = 130  # the shell's exit status for SIGINT
READER_LEFT = 141  # for SIGPIPE: `grpo-lite recipes | head -1`
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def _print(line: str) -> None:
    """Print a line above a live board: that replaces sys.stdout, and click.echo writes to the stream beneath it."""
    print(line, flush=True)


say = quiet_on_broken_pipe(_print)  # for lines that may quote data, completions or a library's message


class _Commands(click.Group):
    """Turns an error into one message and exit status 1, and suggests the nearest command for an unknown one."""

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
            click.echo("stopped at once. Run the same command again to resume from the last checkpoint.", err=True)
            sys.exit(INTERRUPTED)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:  # a fault of ours or of a library: one line, and how to see the rest
            if isinstance(error, BrokenPipeError) and reader_has_left():
                silence()
                sys.exit(READER_LEFT)
            if os.environ.get("GRPO_LITE_TRACEBACK"):
                raise
            click.echo(f"error: {_harmless(_explain(error))}", err=True)
            sys.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"no such command {args[0]!r}.{guess}", ctx) from None


def _harmless(text: str) -> str:
    """Return a message without secrets and control characters: it may quote data or a completion."""
    return printable(redact(text), keep="\n\t")


def _explain(error: Exception) -> str:
    """Return what a user can do about an error that is not one of ours."""
    name = type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}\nLower grpo.per_device_train_batch_size (and raise "
            "grpo.gradient_accumulation_steps by as much), or grpo.max_completion_length. What is saved stays."
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(("grpo_lite", "rewards")):
        return f"the Python package {error.name.partition('.')[0]} is not installed. Install it: {hint_setup()}"
    if type(error).__module__.partition(".")[0] == "wandb":
        return f"wandb: {first_line(error)} Log in with `wandb login`, set WANDB_MODE=offline or change grpo.report_to."
    if isinstance(error, OSError) and error.errno is not None:
        file = f": {error.filename}" if error.filename else ""
        advice = " Free some space, then run the same command again." if error.errno in (ENOSPC, EDQUOT) else ""
        return f"{error.strerror}{file}. What was saved before stays.{advice}"
    return (
        f"unexpected {name}: {str(error).strip()[:2000]}\nThis is a bug in grpo_lite or in a library that it "
        "uses. GRPO_LITE_TRACEBACK=1 shows the traceback."
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="grpo-lite")
@click.option("-v", "--verbose", is_flag=True, help="Also show the log messages of the libraries.")
def main(verbose: bool) -> None:
    """GRPO with LoRA/QLoRA on one small GPU or a CPU: from a recipe to a verified merged model.

    A recipe describes a whole run: `grpo-lite recipes` lists them, `grpo-lite train quickstart` runs one. Any value
    of a recipe can be overridden: `grpo-lite train gsm8k grpo.max_steps=50 data.train.path=my.jsonl`.
    """
    set_environment()
    quieten(verbose)


def set_environment() -> None:
    """Set the variables that torch and huggingface_hub read when they are imported."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):  # torch reads one
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # the name that torch 2.6 knows too
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "15")


def quieten(verbose: bool) -> None:
    """Keep the libraries' banners, progress bars and notices off the screen, unless `verbose`."""
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
    for name in ("transformers", "trl", "bitsandbytes", "datasets", "huggingface_hub", "accelerate", "peft", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _confirm(ctx: click.Context, parameter: click.Parameter, confirmed: bool) -> None:
    if confirmed:
        from grpo_lite.models.base import confirm

        confirm()


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_confirm,
    help="Allow code shipped with the model to run, if the recipe asks for it.",
)


def recipe_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Take RECIPE, any number of KEY=VALUE overrides, and --trust-remote-code."""
    function = trust_option(click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function))
    return click.argument("recipe", metavar="RECIPE")(function)


_run_argument = click.argument("run_path", metavar="RUN", type=click.Path())
_new_run_option = click.option("--run", "run_path", help="Run directory.  [default: runs/RECIPE]")
_budget_option = click.option(
    "--budget", metavar="TIME", help="3h, 90m, 2h30m: choose steps, evaluation and caps that fit into it."
)
_plain_option = click.option(
    "--plain", is_flag=True, help="Lines instead of a live board; the default outside a terminal."
)


def _run_dir(path: str) -> RunDir:
    from grpo_lite.runs.run_dir import RunDir

    return RunDir(path)


def _trained_run(path: str) -> RunDir:
    from grpo_lite.runs.run_dir import require_trained

    run = _run_dir(path)
    require_trained(run)
    return run


@main.command()
def recipes() -> None:
    """List the recipes: model, data, least GPU. Then those that stand beside a published result, with its figure."""
    from grpo_lite.recipe.find import anchor_names
    from grpo_lite.recipe.load import load_all

    loaded, faults = load_all()
    rows = [("RECIPE", "MODEL", "DATA", "LEAST GPU")]
    rows += [(n, f"{r.model.id} {r.model.load_in}", _source(r.data.train), r.least_gpu) for n, r in loaded.items()]
    anchors, of_anchors = load_all(names=anchor_names())
    beside = [("BESIDE A PUBLISHED RESULT", "MODEL", "PUBLISHED", "LEAST GPU")]
    for name, r in anchors.items():
        figure = (r.expected and r.expected.published) or ""
        beside.append((name, f"{r.model.id} {r.model.load_in}", figure, r.least_gpu))
    for table in (rows, beside):
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        for row in table:
            click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
        if table is rows:
            click.echo()
    for fault in [*faults, *of_anchors]:
        click.echo(f"not listed: {fault}", err=True)


def _source(source: Any) -> str:
    return str(source.hub or source.path or f"generated {source.generator}")


@main.command()
@recipe_argument
def show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print a resolved recipe. Every key, and where those of `grpo` come from."""
    from grpo_lite.recipe.load import build_recipe, read_recipe
    from grpo_lite.recipe.objective import with_origins
    from grpo_lite.runs.run_dir import dump_recipe

    raw, where = read_recipe(recipe, overrides)
    resolved = build_recipe(raw, where)
    click.echo(with_origins(dump_recipe(resolved), resolved, raw.get("grpo") or {}), nl=False)


@main.command()
@recipe_argument
@click.option("--previews", default=3, show_default=True, help="Rendered prompts to print.")
def check(recipe: str, overrides: tuple[str, ...], previews: int) -> None:
    """Validate a recipe without training. Shows prompts and scores the gold answers."""
    from grpo_lite.recipe.load import load_recipe
    from grpo_lite.recipe.objective import notes

    loaded = load_recipe(recipe, overrides)
    from grpo_lite.task.check import check_recipe

    for line in [*notes(loaded), *check_recipe(loaded, previews)]:
        say(line)


@main.group("rewards")
def rewards_group() -> None:
    """Check that rewards accept the right answer and nothing else."""


@rewards_group.command("check")
@recipe_argument
def rewards_check(recipe: str, overrides: tuple[str, ...]) -> None:
    """Score gold answers and cheats on a recipe's own rows. Exits 1 if a gold answer does not score."""
    from grpo_lite.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from grpo_lite.task.check import check_rewards_alone

    report, notes = check_rewards_alone(loaded)
    say("\n".join([*notes, report.table()]))
    if not report.gold_scores:
        sys.exit(1)


@main.command("check-env")
@recipe_argument
def check_env(recipe: str, overrides: tuple[str, ...]) -> None:
    """Play a recipe's environment: its gold policy, its cheats, random calls. Exits 1 if one earns what gold does.

    Exits 1 too where an instance keeps state from one episode to the next.
    """
    from grpo_lite.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from grpo_lite.task.check_environments import check_environments

    played = check_environments(loaded)
    say("\n".join(line for environment in played for line in environment.lines()))
    if not all(environment.passes for environment in played):
        sys.exit(1)


@main.command()
@click.argument("recipe", metavar="RECIPE", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpu", help="t4, rtx3060-12, rtx4060-8, rtx4070ti-16, rtx4090, l4, a10, a100-40, h100, or e.g. 11GiB.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="The longest prompt.  [default: data.max_prompt_tokens]")
@click.option("--all-gpus", is_flag=True, help="Print memory and hours on every GPU, of all recipes or of RECIPE.")
@_budget_option
def plan(
    recipe: str | None,
    overrides: tuple[str, ...],
    gpu: str | None,
    prompt_tokens: int | None,
    all_gpus: bool,
    budget: str | None,
) -> None:
    """Plan whether RECIPE fits a GPU. Shows what takes how much memory and what to change; loads nothing.

    With --budget it also says what of it fits into that time.
    """
    from grpo_lite.evaluation.statistics import chance_to_find, power_line
    from grpo_lite.memory.report import all_cards_tables, plan_recipe, report_lines
    from grpo_lite.models.device import find_card
    from grpo_lite.recipe.load import load_all, load_recipe

    if all_gpus:
        chosen = [load_recipe(recipe, overrides)] if recipe else list(load_all(overrides)[0].values())
        click.echo("\n".join(all_cards_tables([r for r in chosen if recipe or r.name != "smoke"], chance_to_find)))
        return
    from grpo_lite.memory.budget import budget_lines, plan_budget, read_duration
    from grpo_lite.memory.times import held_out_rows

    loaded = load_recipe(recipe or "quickstart", overrides)
    limit_s = None if budget is None else read_duration(budget)
    card = find_card(gpu) if gpu else _this_card(required=limit_s is None)
    memory = plan_recipe(loaded, card, prompt_tokens) if card else None
    rows = held_out_rows(loaded)
    if card and memory:
        click.echo("\n".join(report_lines(loaded, card, memory)))
    if limit_s and (memory is None or memory.fits):
        fitting = plan_budget(loaded, limit_s, _keys(overrides), card, memory)
        click.echo("\n".join(budget_lines(loaded, fitting)))
        rows = fitting.rows
    if rows:  # else the number of rows is known to `probe`
        click.echo(power_line(rows))
    if memory and not memory.fits:
        sys.exit(1)


def _keys(overrides: tuple[str, ...]) -> frozenset[str]:
    return frozenset(override.partition("=")[0].strip() for override in overrides)


def _this_card(required: bool) -> Card | None:
    from grpo_lite.errors import ModelError
    from grpo_lite.models.device import CARDS, Card, detect_device, published_speed

    device = detect_device()
    if device.kind != "cuda" and not required:
        return None
    if device.kind != "cuda":
        option = either("GPU=", "--gpu ")
        raise ModelError(f"gpu: there is none here. Name one: {option}{'|'.join(CARDS)}, or e.g. {option}11GiB.")
    return Card(device.name, device.memory_bytes, device.bfloat16, *published_speed(device.name))


@main.command()
@recipe_argument
@click.option("--prompts", default=32, type=click.IntRange(1), show_default=True, help="Training prompts to sample.")
@click.option("--samples", type=click.IntRange(2), help="Samples per prompt.  [default: 8, or num_generations if more]")
def probe(recipe: str, overrides: tuple[str, ...], prompts: int, samples: int | None) -> None:
    """Estimate whether RECIPE can learn, and how long it takes.

    Samples the untrained model on its prompts: pass rates, equal groups, cut lengths, ETA.
    """
    from grpo_lite.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from grpo_lite.evaluation.probe import probe_base, probe_lines
    from grpo_lite.evaluation.statistics import power_line
    from grpo_lite.memory.times import keep_times
    from grpo_lite.models.base import Base
    from grpo_lite.models.driver import usable_device
    from grpo_lite.models.load import load_tokenizer
    from grpo_lite.task.prompts import load_prompts

    base = Base.resolve(loaded.model, usable_device(loaded, click.echo))
    rows = load_prompts(loaded, load_tokenizer(base))
    result, _ = probe_base(loaded, base, rows, count=prompts, samples=samples, show=say)
    keep_times(loaded, base.device.name, result.to_json())
    click.echo("\n".join(probe_lines(result)))
    if loaded.eval.enabled and rows.eval:
        click.echo(power_line(loaded.evaluated_rows(len(rows.eval))))


@main.command()
@recipe_argument
@click.option(
    "--steps",
    default=4,
    type=click.IntRange(2),
    show_default=True,
    help="Steps of each; the first round does not count.",
)
@click.option("--minutes", default=5.0, type=click.FloatRange(0.1, 1440), show_default=True, help="Time limit of each.")
def backends(recipe: str, overrides: tuple[str, ...], steps: int, minutes: float) -> None:
    """Time hf and unsloth on RECIPE. `model.backend: auto` then takes the faster one on this GPU."""
    from grpo_lite.models.unsloth import lacks
    from grpo_lite.recipe.load import load_recipe
    from grpo_lite.session.backend import card_with_both, measure_backends

    loaded = load_recipe(recipe, overrides)
    card = card_with_both()
    if card is None:
        needs = f"CUDA, one process and its package ({hint_setup('unsloth')})"
        click.echo(f"no choice here: unsloth needs {needs}. auto means hf")
        return
    if why_not := lacks(loaded):
        click.echo(f"no choice for this recipe: {why_not}. auto means hf")
        return
    click.echo(f"{loaded.name}: {steps} steps with each backend on {card}")
    outcome = measure_backends(loaded, card, say, steps, minutes * 60)
    say(f"auto takes {outcome['chosen']}: {outcome['why']}")


@main.command()
@recipe_argument
@_new_run_option
@_plain_option
@_budget_option
def train(recipe: str, overrides: tuple[str, ...], run_path: str | None, plain: bool, budget: str | None) -> None:
    """Train a recipe, or resume its run. Evaluates base and trained model, merges and verifies.

    With --budget it measures this machine's speed if none is known, and chooses what fits into that time.
    """
    _train(recipe, overrides, run_path, plain, budget=budget)


@main.command()
@recipe_argument
@_new_run_option
@_plain_option
def warmup(recipe: str, overrides: tuple[str, ...], run_path: str | None, plain: bool) -> None:
    """Run the warm-up of a recipe and stop before GRPO. `train` on the same run continues."""
    _train(recipe, overrides, run_path, plain, warmup_only=True)


@main.command("reproduce-anchor")
@recipe_argument
@_new_run_option
@_plain_option
def reproduce_anchor(recipe: str, overrides: tuple[str, ...], run_path: str | None, plain: bool) -> None:
    """Train a recipe that has `expected:`, and say in one line whether the result is inside the band. Resumes."""
    from grpo_lite.recipe.find import anchor_names
    from grpo_lite.recipe.load import load_all, load_recipe
    from grpo_lite.report.evidence import read_evidence
    from grpo_lite.report.expected import standing_line

    loaded = load_recipe(recipe, overrides)
    if loaded.expected is None:
        having = [*(name for name, other in load_all()[0].items() if other.expected), *anchor_names()]
        raise RecipeError(
            f"{loaded.name}: has no section `expected:`, so there is no band. These have one: {', '.join(having)}."
        )
    run = _run_dir(run_path or f"runs/{loaded.name}")
    if not run.read_run().get("finished_at"):
        _train(recipe, overrides, str(run.path), plain)
    line = standing_line(read_evidence(run))
    say(f"{loaded.name}: {line or 'no value to compare: the run logged too few steps, or has no score'}")


def _train(
    recipe: str,
    overrides: tuple[str, ...],
    run_path: str | None,
    plain: bool,
    warmup_only: bool = False,
    budget: str | None = None,
) -> None:
    from grpo_lite.memory.budget import read_duration
    from grpo_lite.recipe.load import load_recipe
    from grpo_lite.units import duration

    begun = time.monotonic()
    limit_s = None if budget is None else read_duration(budget)
    loaded = load_recipe(recipe, overrides)
    if warmup_only and loaded.warmup is None:
        raise RecipeError(
            f"{loaded.name}: has no section `warmup:`, so there is no stage before GRPO. Add one (docs/warm-start.md), "
            f"or train: {hint('train', recipe=recipe)}"
        )
    run = _run_dir(run_path or f"runs/{loaded.name}")
    click.echo(f"{loaded.name}: {loaded.description}\nrun directory: {run.path}\nloading PyTorch and TRL")
    from grpo_lite.models.unsloth import prepare
    from grpo_lite.session.backend import with_chosen_backend

    loaded = with_chosen_backend(loaded, run, say)
    resumes = run.recipe_file.is_file()
    if not (resumes and run.read_run().get("trained_at")):  # evaluation and merge need no Unsloth
        prepare(loaded, begun=resumes)
    from grpo_lite.processes import this_process
    from grpo_lite.report.summary import interrupted_summary, run_summary, warmup_summary
    from grpo_lite.train import train_run

    record = None
    if limit_s and not (resumes and run.read_run().get("trained_at")):
        from grpo_lite.session.budget import fit_to_budget

        loaded, record = fit_to_budget(loaded, run, limit_s, _keys(overrides), begun, say)
    view = "plain" if plain else _view()
    result = train_run(loaded, run, _print, view, begun, warmup_only, record)
    if not this_process().is_first:
        return
    if result.stopped_by:
        say(interrupted_summary(run, result.steps, result.stopped_by))
        sys.exit(INTERRUPTED)
    say(warmup_summary(run) if warmup_only else run_summary(run))
    if limit_s:
        say(f"budget: {budget} given, {duration(time.monotonic() - begun)} taken by this command")


def _view() -> Literal["plain", "live", "notebook"]:
    """Return how training is shown: a board in a terminal or a notebook, lines everywhere else."""
    if "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        return "notebook"
    return "live" if sys.stdout.isatty() else "plain"


@main.command()
@click.argument("run_path", metavar="[RUN]", type=click.Path(), required=False)
@_plain_option
@click.option("--web", is_flag=True, help="Open a local page over all runs, or over RUN's folder, in the browser.")
@click.option("--port", default=8642, show_default=True, type=click.IntRange(0, 65535), help="Of the page; 0: any.")
def watch(run_path: str | None, plain: bool, web: bool, port: int) -> None:
    """Follow RUN from another terminal. Shows progress, reward parts, samples and findings."""
    if web:
        return _watch_web(Path(run_path or "runs"), port)
    if run_path is None:
        raise click.UsageError("give RUN, or --web for a page over all runs.")
    from grpo_lite.report.watch import watch_lines, watch_live

    run = _run_dir(run_path)
    run.load_recipe()
    if sys.stdout.isatty() and not plain:
        watch_live(run)
        return
    for line in watch_lines(run):
        say(line)


def _watch_web(folder: Path, port: int) -> None:
    """Serve the page until Ctrl-C; a run's own folder stands for the one that it lies in."""
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise GRPOLiteError(
            "watch --web: needs starlette and uvicorn, which are not installed here. Add them: `make ui` in a "
            "checkout, else pip install 'grpo-lite[ui]'. `grpo-lite watch RUN` needs neither."
        )
    from grpo_lite.ui.server import serve

    fragment = ""
    if (folder / "recipe.yaml").is_file():
        run = folder.resolve()
        folder, fragment = run.parent, f"#/run/{quote(run.name, safe='')}"
    click.echo(f"serving a page over {folder}/ until Ctrl-C. Open this address; its token is valid until then:")
    with contextlib.suppress(KeyboardInterrupt):
        serve(folder.resolve(), port, lambda address: click.echo(f"  {address}{fragment}"))


@main.command("eval")
@_run_argument
@click.option("--lm-eval", "tasks", metavar="TASKS", help="Score tasks of lm-evaluation-harness: gsm8k,arc_easy.")
@click.option("--limit", type=click.IntRange(1), help="Rows of each of these tasks.  [default: all]")
@trust_option
def evaluate(run_path: str, tasks: str | None, limit: int | None) -> None:
    """Evaluate a run again on its held-out prompts. Scores the base, the trained and the merged model.

    With --lm-eval it scores other tasks on the same models, and says of each whether training unlearned it.
    """
    if limit and not tasks:
        raise click.UsageError("--limit is for --lm-eval; the held-out prompts are the recipe's eval.limit.")
    if tasks:
        return _evaluate_tasks(run_path, tasks.split(","), limit)
    from grpo_lite.evaluation.evaluate import evaluate_merged, evaluate_run
    from grpo_lite.report.summary import score_lines

    run = _trained_run(run_path)
    _say_why_not_on_the_gpu()
    with run.locked():
        scores = evaluate_run(run, say)
        if run.merged.is_dir():
            scores = evaluate_merged(run, say)
        say("\n".join(score_lines(scores)))
    say(f"records: {run.evaluation / 'records.jsonl'}")


def _evaluate_tasks(run_path: str, tasks: list[str], limit: int | None) -> None:
    """Score a run's models on tasks of lm-evaluation-harness, and write the report again, which shows the result."""
    from grpo_lite.evaluation.lm_eval import evaluate_tasks, require_harness
    from grpo_lite.report.page import write_report

    require_harness()
    run = _trained_run(run_path)
    _say_why_not_on_the_gpu()
    with run.locked():
        for entry in evaluate_tasks(run, tasks, limit, say):
            say(entry["sentence"])
        report = write_report(run)
    say(f"rows: {run.evaluation / 'lm_eval.jsonl'}\nreport: {report}")


@main.command()
@_run_argument
@click.option("--overwrite", is_flag=True, help="Replace an existing merge.")
@click.option(
    "--onto",
    type=click.Choice(["auto", "original", "trained"]),
    help="The base's original 16-bit weights, or those that 4-bit training read. Default: the recipe's merge_onto.",
)
@trust_option
def merge(run_path: str, overwrite: bool, onto: MergeOnto | None) -> None:
    """Merge a run's adapter into a 16-bit model and verify it."""
    from grpo_lite.export.stages import RunInputs, merge_and_score
    from grpo_lite.report.summary import merge_line

    run = _trained_run(run_path)
    with run.locked():
        record = merge_and_score(run, say, RunInputs(run.load_recipe()), overwrite, onto)
    say(merge_line(record))
    say(f"merged model: {run.merged}")


@main.command()
@_run_argument
@click.option(
    "--gguf", "kinds", multiple=True, metavar="KIND", help="Also a GGUF: f16, bf16, q8_0, q4_k_m …; repeatable."
)
@click.option("--nf4", is_flag=True, help="Also a 4-bit NF4 folder (bitsandbytes), with its measured loss.")
@click.option("--overwrite", is_flag=True, help="Replace an existing GGUF or NF4 export.")
@trust_option
def export(run_path: str, kinds: tuple[str, ...], nf4: bool, overwrite: bool) -> None:
    """Export a run's model: merged, GGUF or 4 bits. Merges first if needed, and checks every file."""
    run = _trained_run(run_path)
    from grpo_lite.export.stages import RunInputs, export_run

    with run.locked():
        inputs = RunInputs(run.load_recipe())
        files = export_run(run, say, inputs)
        say(f"{run.merged}: verified, {files} files intact. Load it as any local model:")
        towers = (run.read_run().get("merge") or {}).get("other_towers")
        loader = "AutoModelForImageTextToText" if towers else "AutoModelForCausalLM"
        say(f'  {loader}.from_pretrained("{run.merged}")')
        if nf4:
            from grpo_lite.export.stages import export_run_nf4

            for line in export_run_nf4(run, say, inputs, overwrite):
                say(line)
        if kinds:
            from grpo_lite.export.stages import export_run_gguf

            for kind in kinds:
                for line in export_run_gguf(run, kind, say, inputs, overwrite):
                    say(line)


@main.command()
@_run_argument
@click.argument("prompt", required=False)
@click.option("--compare", is_flag=True, help="Show the base model's answer beside the trained one's.")
@click.option("--temperature", default=0.0, show_default=True, help="0: greedy, as the scores were measured.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0: off.")
@click.option("--max-new-tokens", type=int, help="Longest answer in tokens.  [default: the recipe's]")
@click.option("--seed", type=int, help="Makes sampled answers repeatable.")
@trust_option
def chat(run_path: str, prompt: str | None, compare: bool, **sampling: Any) -> None:
    """Ask a trained model: one PROMPT, piped lines, or a chat."""
    from grpo_lite.ui.chat import HELP, Chat, Sampling, answer_lines, talk

    settings = Sampling(**sampling)
    run = _trained_run(run_path)
    _say_why_not_on_the_gpu()
    interactive = prompt is None and sys.stdin.isatty()
    loaded = Chat(run, settings, compare)
    if prompt is not None:
        say("\n".join(answer_lines(loaded.ask(prompt))))
        return
    if interactive:
        say(f"{loaded.recipe.name}: {HELP}")
    lines = _typed() if interactive else sys.stdin
    talk(loaded, lines, say, interactive, _piece if interactive else None)


def _say_why_not_on_the_gpu() -> None:
    """Print, beside the output, why a GPU that this machine has is not used."""
    from grpo_lite.models.device import detect_device
    from grpo_lite.models.driver import machine_notes

    for note in machine_notes(detect_device()):
        click.echo(f"device: {note}", err=True)


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # line editing and history for input()
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return


def _piece(text: str) -> None:
    if text:
        click.echo(printable(redact(text), keep="\n\t"), nl=False)


@main.command()
@_run_argument
@click.argument("repo_id", metavar="REPO")
@click.option("--what", type=click.Choice(["adapter", "merged", "gguf"]), default="merged", show_default=True)
@click.option("--private", is_flag=True, help="Push to a private repository; refuse a public one.")
@click.option("--dry-run", is_flag=True, help="Print files, sizes and the card; send nothing.")
@click.option("--force", is_flag=True, help="Push in spite of doubts; the card lists them.")
def push(run_path: str, repo_id: str, what: Any, private: bool, dry_run: bool, force: bool) -> None:
    """Push a run's model to REPO (user/name) on the Hub. Sends adapter, merged model or GGUF, and a card."""
    run = _trained_run(run_path)
    from grpo_lite.export.hub import push as hub

    with run.locked(), hub.stage(run, repo_id, what) as staged:
        if dry_run:
            say(f"dry run: nothing is sent. {repo_id} would get:")
            say("\n".join(staged.lines()))
            return
        address = hub.push(staged, say, private=private, force=force)
    say(f"pushed: {address}")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every file of an exported folder against its sha256 sums."""
    from grpo_lite.files.manifest import verify_manifest

    click.echo(f"{folder}: {verify_manifest(folder)} files intact")


@main.command()
@_run_argument
def report(run_path: str) -> None:
    """Write RUN's report.html and curves.png. The page is self-contained; the run may still be training."""
    from grpo_lite.report.page import write_report

    click.echo(f"report: {write_report(_run_dir(run_path))}")


@main.command()
@click.argument("run_paths", metavar="RUN RUN...", nargs=-1, type=click.Path())
@click.option("--out", default="compare.html", show_default=True, type=click.Path(path_type=Path))
def compare(run_paths: tuple[str, ...], out: Path) -> None:
    """Compare runs on one page. It has scores, figures, curves and the differences between the recipes."""
    from grpo_lite.report.page import write_comparison

    click.echo(f"comparison: {write_comparison([_run_dir(path) for path in run_paths], out)}")


@main.command()
@click.argument("run_path", metavar="[RUN]", type=click.Path(), required=False)
def doctor(run_path: str | None) -> None:
    """Diagnose RUN, or describe this machine. Each finding comes with its figures and what to change."""
    if run_path is None:
        return _describe_machine()
    from grpo_lite.report.doctor import examine, nothing_found
    from grpo_lite.report.evidence import read_evidence
    from grpo_lite.report.expected import standing_line

    run = _run_dir(run_path)
    findings = examine(run)
    for finding in findings:
        say(finding.line())
    evidence = read_evidence(run)
    if not findings:
        say(f"doctor: {run_path}: {nothing_found(evidence)}")
    if (line := standing_line(evidence)) and not any(finding.key == "below_expected" for finding in findings):
        say(f"doctor: {line}")


def _describe_machine() -> None:
    """Print the device, why a GPU is not used, the versions, and what isolates model-written code."""
    from grpo_lite.models.device import detect_device
    from grpo_lite.models.driver import machine_notes
    from grpo_lite.rewards.sandbox import layers
    from grpo_lite.runs.provenance import environment_record

    record = environment_record()
    if importlib.util.find_spec("torch") is None:
        click.echo(f"device: unknown, because PyTorch is not installed. Install it: {hint_setup()}")
    else:
        device = detect_device()
        click.echo(f"device: {device.describe()}")
        for note in machine_notes(device):
            click.echo(f"  {note}")
    click.echo(", ".join(f"{name} {v}" for name, v in {"python": record["python"], **record["versions"]}.items()))
    click.echo("sandbox for model-written code:")
    for layer in layers():
        click.echo(f"  {'yes' if layer.available else 'no ':<4}{layer.name:<22}{layer.why}")


@main.command()
@_run_argument
@click.option("--into", help="Run directory of the new run.  [default: RUN-again]")
@click.option("--dry-run", is_flag=True, help="Only list which versions or hardware differ.")
@trust_option
def reproduce(run_path: str, into: str | None, dry_run: bool) -> None:
    """Run RUN's recipe again and compare the results. Uses its seed, and lists which versions or hardware differ."""
    from grpo_lite.reproduce import differences, result_lines

    run = _run_dir(run_path)
    recipe = run.load_recipe()
    for line in differences(run) or ["same versions, same hardware, same commit"]:
        say(f"reproduce: {line}")
    if dry_run:
        return
    from grpo_lite.models.unsloth import prepare

    prepare(recipe, begun=True)
    from grpo_lite.train import train_run

    again = _run_dir(into or f"{Path(run_path) if run.path.name else run.path.resolve()}-again")
    click.echo(f"run directory: {again.path}")
    if train_run(recipe, again, say).stopped_by:
        sys.exit(INTERRUPTED)
    for line in result_lines(run, again):
        say(line)


@main.command()
@click.argument("path", metavar="TRL_YAML", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The recipe's file.  [default: the screen]")
def convert(path: Path, out: Path | None) -> None:
    """Turn a `trl grpo` YAML into a recipe. Comments name each key that is left out or changed, and why."""
    from grpo_lite.recipe.convert import convert_trl

    conversion = convert_trl(path)
    if out is None:
        say(conversion.text().rstrip())
        return
    if out.exists():
        raise RecipeError(f"{out}: exists already, and is not overwritten. Give another name to -o.")
    out.write_text(conversion.text(), encoding="utf-8")
    for note in conversion.notes:
        say(f"  {note}")
    click.echo(f"recipe: {out}; next: {hint('check', recipe=str(out))}")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """Write a small project into DIR: recipe, reward, rows, README. It trains on a laptop; change it into yours."""
    from grpo_lite.recipe.project import create_project

    for path in create_project(folder):
        click.echo(f"written: {path}")
    click.echo(f"next:\n  cd {shlex.quote(str(folder))}\n  grpo-lite check recipe.yaml\n  grpo-lite train recipe.yaml")


@main.command()
@click.argument("path", type=click.Path(path_type=Path), required=False)
def schema(path: Path | None) -> None:
    """Write the JSON Schema of recipes to PATH or the screen. Editors use it for completion."""
    from grpo_lite.recipe.checks import schema_text

    if path is None:
        click.echo(schema_text(), nl=False)
    else:
        path.write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
