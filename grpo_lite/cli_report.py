"""The commands that look at runs: report, compare, watch, reproduce, doctor. Stages are imported inside them only."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from grpo_lite.cli_options import say, trust_option

_run_argument = click.argument("run_path", metavar="RUN", type=click.Path())


def register(main: click.Group) -> None:
    """Add the commands to the command line."""
    for command in (report, compare, watch, reproduce, doctor):
        main.add_command(command)


@click.command()
@_run_argument
def report(run_path: str) -> None:
    """Write RUN's report.html (one self-contained page) and curves.png; the run may still be going on."""
    from grpo_lite.report import write_report
    from grpo_lite.run_dir import RunDir

    click.echo(f"report: {write_report(RunDir(run_path))}")


@click.command()
@click.argument("run_paths", metavar="RUN RUN...", nargs=-1, type=click.Path())
@click.option("--out", default="compare.html", show_default=True, type=click.Path(path_type=Path))
def compare(run_paths: tuple[str, ...], out: Path) -> None:
    """Put runs side by side on one page: scores, figures, curves, differences of the recipes."""
    from grpo_lite.report import write_comparison
    from grpo_lite.run_dir import RunDir

    click.echo(f"comparison: {write_comparison([RunDir(path) for path in run_paths], out)}")


@click.command()
@_run_argument
@click.option("--plain", is_flag=True, help="Lines instead of a board (the default where this is not a terminal).")
def watch(run_path: str, plain: bool) -> None:
    """Follow RUN from another terminal: progress, reward parts, samples, findings."""
    from grpo_lite.run_dir import RunDir
    from grpo_lite.watch import watch_lines, watch_live

    run = RunDir(run_path)
    run.load_recipe()
    if sys.stdout.isatty() and not plain:
        watch_live(run)
        return
    for line in watch_lines(run):
        say(line)


@click.command()
@_run_argument
@click.option("--into", help="Run directory of the new run.  [default: RUN-again]")
@click.option("--dry-run", is_flag=True, help="Only say which versions or hardware differ.")
@trust_option
def reproduce(run_path: str, into: str | None, dry_run: bool) -> None:
    """Run RUN's recipe again with its seed, say what differs from then, and compare the results."""
    from grpo_lite.reproduce import differences, result_lines
    from grpo_lite.run_dir import RunDir

    run = RunDir(run_path)
    recipe = run.load_recipe()
    for line in differences(run) or ["same versions, same hardware, same commit"]:
        say(f"reproduce: {line}")
    if dry_run:
        return
    from grpo_lite.unsloth_backend import prepare

    prepare(recipe, begun=True)
    from grpo_lite.train import train_run

    again = RunDir(into or f"{Path(run_path) if run.path.name else run.path.resolve()}-again")
    click.echo(f"run directory: {again.path}")
    if train_run(recipe, again, say).stopped_by:
        sys.exit(130)
    for line in result_lines(run, again):
        say(line)


@click.command()
@click.argument("run_path", metavar="[RUN]", type=click.Path(), required=False)
def doctor(run_path: str | None) -> None:
    """Say what is wrong with RUN and what to type; without RUN, what this machine has."""
    if run_path is None:
        return _describe_machine()
    from grpo_lite.doctor import clean_bill, examine
    from grpo_lite.evidence import read_evidence
    from grpo_lite.run_dir import RunDir

    run = RunDir(run_path)
    findings = examine(run)
    for line in [finding.line() for finding in findings] or [f"doctor: {run_path}: {clean_bill(read_evidence(run))}"]:
        say(line)


def _describe_machine() -> None:
    """Print device, versions, and what isolates the code that models write."""
    from grpo_lite.environment import environment_record
    from grpo_lite.hardware import detect_device
    from rewards.sandbox import layers

    record = environment_record()
    click.echo(f"device: {detect_device().describe()}")
    click.echo(f"python {record['python']}, " + ", ".join(f"{name} {v}" for name, v in record["versions"].items()))
    click.echo("sandbox for model-written code:")
    for layer in layers():
        click.echo(f"  {'yes' if layer.available else 'no ':<4}{layer.name:<22}{layer.why}")
