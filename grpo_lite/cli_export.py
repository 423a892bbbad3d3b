"""The commands after training: export, push, chat, verify. Stages are imported inside the commands only."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grpo_lite.cli_options import say, trust_option
from grpo_lite.redact import redact
from grpo_lite.screen import printable

if TYPE_CHECKING:
    from grpo_lite.run_dir import RunDir

_run_argument = click.argument("run_path", metavar="RUN", type=click.Path())


def register(main: click.Group) -> None:
    """Add the commands to the command line."""
    for command in (export, push, chat, verify):
        main.add_command(command)


@click.command()
@_run_argument
@click.option(
    "--gguf", "kinds", multiple=True, metavar="KIND", help="Also a GGUF: f16, bf16, q8_0, q4_k_m …; repeatable."
)
@click.option("--nf4", is_flag=True, help="Also a 4-bit NF4 folder (bitsandbytes), with its measured loss.")
@click.option("--overwrite", is_flag=True, help="Replace a GGUF or NF4 export that is there already.")
@trust_option
def export(run_path: str, kinds: tuple[str, ...], nf4: bool, overwrite: bool) -> None:
    """Check a run's merged model file by file, merging first if need be; also as GGUF for Ollama, or in 4 bits."""
    run = _trained_run(run_path)
    from grpo_lite.merge_run import export_run

    with run.locked():
        files = export_run(run, say)
        say(f"{run.merged}: verified, {files} files intact. Load it as any local model:")
        say(f'  AutoModelForCausalLM.from_pretrained("{run.merged}")')
        if nf4:
            from grpo_lite.nf4_run import export_run_nf4

            for line in export_run_nf4(run, say, overwrite):
                say(line)
        if kinds:
            from grpo_lite.gguf_run import export_run_gguf

            for kind in kinds:
                for line in export_run_gguf(run, kind, say, overwrite):
                    say(line)


@click.command()
@_run_argument
@click.argument("repo_id", metavar="REPO")
@click.option("--what", type=click.Choice(["adapter", "merged", "gguf"]), default="merged", show_default=True)
@click.option("--private", is_flag=True, help="Refuse to be public.")
@click.option("--dry-run", is_flag=True, help="Print files, sizes and the card; send nothing.")
@click.option("--force", is_flag=True, help="Push in spite of doubts; the card tells of them.")
def push(run_path: str, repo_id: str, what: Any, private: bool, dry_run: bool, force: bool) -> None:
    """Push a run's adapter, merged model or GGUF files to REPO (user/name) on the Hub, with a model card."""
    run = _trained_run(run_path)
    from grpo_lite import hub

    with run.locked(), hub.stage(run, repo_id, what) as staged:
        if dry_run:
            say(f"dry run: nothing is sent. {repo_id} would get:")
            say("\n".join(staged.lines()))
            return
        address = hub.push(staged, say, private=private, force=force)
    say(f"pushed: {address}")


@click.command()
@_run_argument
@click.argument("prompt", required=False)
@click.option("--compare", is_flag=True, help="Show the base model's answer beside the trained one's.")
@click.option("--temperature", default=0.0, show_default=True, help="0: greedy, as the scores were measured.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0: off.")
@click.option("--max-new-tokens", type=int, help="Cap of an answer.  [default: the recipe's]")
@click.option("--seed", type=int, help="Makes sampled answers repeatable.")
@trust_option
def chat(run_path: str, prompt: str | None, compare: bool, **sampling: Any) -> None:
    """Ask a trained run one question (PROMPT), the lines piped in, or talk with it."""
    from grpo_lite.chat import HELP, Chat, Sampling, answer_lines, talk

    settings = Sampling(**sampling)
    run = _trained_run(run_path)
    interactive = prompt is None and sys.stdin.isatty()
    loaded = Chat(run, settings, compare)
    if prompt is not None:
        say("\n".join(answer_lines(loaded.ask(prompt))))
        return
    if interactive:
        say(f"{loaded.recipe.name}: {HELP}")
    lines = _typed() if interactive else sys.stdin
    talk(loaded, lines, say, interactive, _piece if interactive else None)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every file of an exported folder against its sha256 sums."""
    from grpo_lite.manifest import verify_manifest

    click.echo(f"{folder}: {verify_manifest(folder)} files intact")


def set_environment() -> None:
    """Set what has to stand before torch is imported."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "15")


def _trained_run(path: str) -> RunDir:
    from grpo_lite.run_dir import RunDir
    from grpo_lite.train import require_trained

    run = RunDir(path)
    require_trained(run)
    return run


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
