"""Push a run's adapter, merged model or GGUF files to the Hub, with a card; only proven ones, unless forced.

Large files are sent first, one by one, and a single commit then makes everything visible: an interrupted push leaves
the repository as it was, and the next push sends only what is missing. The token comes from the environment or
`hf auth login`; only `huggingface_hub` holds it, and it is never printed or written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_lite import units
from grpo_lite.commands import either, hint
from grpo_lite.errors import ExportError
from grpo_lite.export.hub.base_facts import BaseFacts, base_facts
from grpo_lite.export.hub.card import CURVES, RESULTS_FOLDER, benchmark_results, model_card, read_facts
from grpo_lite.export.merge.adapter import open_adapter
from grpo_lite.files.hub import hub_message
from grpo_lite.files.manifest import MANIFEST_NAME, read_manifest, sha256_of, verify_manifest, write_manifest
from grpo_lite.models.adapter import CONFIG_NAME, WEIGHTS_NAME
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import Show

What = Literal["adapter", "merged", "gguf"]

_TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_*")
_SCRATCH = ".push-"
_OWN_NAMES = {".gitattributes", "README.md"}  # created by the Hub itself, or by a card alone


@dataclass(frozen=True)
class Staged:
    """What a push would send: a folder with exactly the repository's files, and the doubts about it."""

    folder: Path
    repo_id: str
    what: What
    card: str
    doubts: tuple[str, ...]

    @property
    def files(self) -> dict[str, int]:
        """Sizes in bytes by name, the card first."""
        names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        names.sort(key=lambda name: name != "README.md")
        return {name: (self.folder / name).stat().st_size for name in names}

    def lines(self) -> list[str]:
        """Return files, sizes, doubts and the card as lines for people."""
        files = self.files
        width = max(map(len, files))
        lines = [f"{name.ljust(width)}  {units.size(size)}" for name, size in files.items()]
        lines += [f"{'in all'.ljust(width)}  {units.size(sum(files.values()))}", ""]
        lines += [f"would be refused without --force: {doubt}" for doubt in self.doubts]
        return [*lines, *([""] if self.doubts else []), self.card]


@contextlib.contextmanager
def stage(run: RunDir, repo_id: str, what: What) -> Iterator[Staged]:
    """Lay out what a push would send, in a temporary folder of hard links inside the run directory.

    Args:
        run: locked by this process (`run.locked()`).

    Raises:
        ExportError: the run has nothing of that kind, a file was altered, or the repository's name is not valid.
    """
    _check_repo_id(repo_id)
    base = base_facts(run.load_recipe().model)
    sources, records = _sources(run, what)
    if (run.path / CURVES).is_file():
        sources[CURVES] = run.path / CURVES
    for stale in run.path.glob(f"{_SCRATCH}*"):  # of a push that was killed
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=run.path) as scratch:
        folder = Path(scratch)
        known: dict[str, str] = {}
        for name, path in sources.items():
            _link(path, folder / name)
            if what != "adapter" and path.parent.joinpath(MANIFEST_NAME).is_file():
                known[name] = read_manifest(path.parent)[path.name].sha256
        if what == "adapter":
            _name_base(folder / CONFIG_NAME, base)
        facts = read_facts(run, base, records)
        doubts = tuple(_doubts(run, what, base, records, folder))
        card = model_card(facts, repo_id, what, doubts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for name, text in benchmark_results(facts, what).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        write_manifest(folder, known)
        yield Staged(folder, repo_id, what, card, doubts)


def push(staged: Staged, show: Show, private: bool = False, force: bool = False) -> str:
    """Create the repository if necessary, send what is missing, commit, and return the address.

    Args:
        private: the repository must not be public.
        force: push despite doubts and other files in the repository. The card states the doubts.

    Raises:
        ExportError: doubts; not logged in, not allowed, unknown owner, a conflict, or the connection broke.
    """
    if staged.doubts and not force:
        raise ExportError(
            f"push {staged.repo_id}: refused:\n"
            + "\n".join(f"  {doubt}" for doubt in staged.doubts)
            + f"\nFix it, or push anyway with {either('FORCE=1', '--force')}: the card then says so."
        )
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise ExportError(
            f"push {staged.repo_id}: you are not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN to a token "
            "with write access."
        )
    api, sent, files = HfApi(), 0, staged.files
    try:
        parent = _open_repo(api, staged, private, force, show)
        operations = [CommitOperationAdd(name, str(staged.folder / name)) for name in files]
        for number, operation in enumerate(operations, 1):
            api.preupload_lfs_files(staged.repo_id, [operation], free_memory=False)
            sent = number
            name = operation.path_in_repo
            show(f"sent {number}/{len(operations)} {name} ({units.size(files[name])})")
        message = f"Upload {staged.what} with grpo_lite"
        info = api.create_commit(staged.repo_id, operations, commit_message=message, parent_commit=parent)
    except Exception as error:
        text = hub_message(error, staged.repo_id)
        if text is None:
            raise
        progress = f" {sent} of {len(files)} files had been sent." if sent else ""
        raise ExportError(f"push {staged.repo_id}: {text}{progress}") from None
    return str(info.commit_url).partition("/commit/")[0]


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repo_id.count("/") != 1:
            raise HFValidationError("it needs an owner and a name, such as user/name")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(f"push: {repo_id!r} is not a valid repository name: {error}.") from None


def _sources(run: RunDir, what: What) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Return the files by their name in the repository, and the records of GGUF files."""
    if what == "adapter":
        missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (run.adapter / name).is_file()]
        if missing:
            raise ExportError(f"{run.adapter}: has no {missing[0]}. Train first: {hint('train', run=run.path)}")
        open_adapter(run.adapter)  # refuses a damaged, zero or NaN adapter by name
        tokenizer_files = [p.name for pattern in _TOKENIZER_PATTERNS for p in run.adapter.glob(pattern)]
        names = [CONFIG_NAME, WEIGHTS_NAME, *tokenizer_files]
        return {name: run.adapter / name for name in names}, []
    if what == "merged":
        if not run.merged.is_dir():
            raise ExportError(f"{run.merged}: there is no merged model. Make it: {hint('merge', run=run.path)}")
        verify_manifest(run.merged)
        return {name: run.merged / name for name in read_manifest(run.merged)}, []
    folders = sorted(path.parent for path in (run.path / "gguf").glob(f"*/{MANIFEST_NAME}"))
    if not folders:
        command = hint("export", run=run.path, gguf="q8_0")
        raise ExportError(f"{run.path / 'gguf'}: there is no GGUF. Make one: {command}")
    sources: dict[str, Path] = {}
    records = []
    for folder in folders:
        verify_manifest(folder)
        records.append(json.loads((folder / "gguf.json").read_text(encoding="utf-8")))
        for name in read_manifest(folder):
            own = name in ("Modelfile", "gguf.json") and len(folders) > 1
            stem, suffix = Path(name).stem, Path(name).suffix
            sources[f"{stem}-{folder.name}{suffix}" if own else name] = folder / name
    return sources, records


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():  # in another person's run it could send any file of this machine to the Hub
        raise ExportError(f"{source}: is a symbolic link, and only files of the run are pushed. Copy the file there.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _name_base(path: Path, base: BaseFacts) -> None:
    """Write the base's public name where PEFT recorded a path of the training machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.hub_id or base.name
    config["revision"] = base.revision
    path.unlink()  # a hard link: the run's own file stays as it is
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _doubts(run: RunDir, what: What, base: BaseFacts, records: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    record = run.read_run()
    merge = record.get("merge") or {}
    if what != "adapter" and not merge.get("passed"):
        yield f"the merge is not verified ({hint('merge', run=run.path, overwrite=True)})"
    if what != "adapter" and run.merged_adapter() not in (None, sha256_of(run.adapter / WEIGHTS_NAME)):
        yield "the merged model is of another adapter than the run's: merge again"
    for gguf in records:
        if gguf.get("merged_sha256") not in (None, sha256_of(run.merged / MANIFEST_NAME)):
            yield f"{gguf['file']} was made from an earlier merge: export it again"
        if not (gguf.get("proof") or {}).get("passed"):
            yield f"{gguf['file']} is not proven to answer as the merged model does: export it again"
    scores = run.read_scores()
    yield from _doubts_by_scores(run, what, scores.get("lenient", {}), scores.get("merged", {}).get("lenient", {}))
    if not base.licence:
        yield f"the licence of {base.name} could not be read from its metadata, and it applies to this model too"
    if base.hub_id is None and what == "adapter":
        yield f"an adapter is useless without its base, and {base.name} is {base.note or 'not on the Hub'}"
    yield from _paths_of_this_machine(folder)


def _doubts_by_scores(run: RunDir, what: What, scores: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[str]:
    if "verdict" not in scores:
        yield f"the run was not evaluated ({hint('eval', run=run.path)})"
        return
    verdict, before = scores["verdict"], scores["base"]["rate"]
    if verdict["label"] == "significant loss":
        yield "the trained model is worse than its base: " + verdict["sentence"]
    elif scores["trained"]["rate"] < before:
        yield "the trained model scored below its base: " + verdict["sentence"]
    if scores.get("grpo", {}).get("verdict", {}).get("label") == "significant loss":
        yield "GRPO made the model worse than its warm-up had made it: " + scores["grpo"]["verdict"]["sentence"]
    if what != "adapter" and merged and merged["rate"] < before:
        yield f"the merged 16-bit model scored {merged['rate']:.3f}, below the base's {before:.3f}"


def _paths_of_this_machine(folder: Path) -> Iterator[str]:
    home = str(Path.home())
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size < 1 << 20 and len(home) > 1 and f'"{home}/' in path.read_text(encoding="utf-8"):
            yield f"{path.name} holds a path of this machine ({home}/…)"


def _open_repo(api: Any, staged: Staged, private: bool, force: bool, show: Show) -> str | None:
    """Create the repository or check the existing one; return the commit to build on."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(staged.repo_id, private=private, exist_ok=False)
        show(f"created {staged.repo_id} ({'private' if private else 'public'})")
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
    info = api.repo_info(staged.repo_id)
    if private and not info.private:
        raise ExportError(
            f"push {staged.repo_id}: it exists and is public, but a private one was asked for. Make it private on its "
            "page, or choose another name."
        )
    present = {file.rfilename for file in info.siblings or ()}
    results = {name for name in present if name.startswith(f"{RESULTS_FOLDER}/")}  # others may have added theirs
    strange = sorted(present - results - set(staged.files) - _OWN_NAMES)
    if strange and not force:
        raise ExportError(
            f"push {staged.repo_id}: it already holds other files ({', '.join(strange[:5])}), and this push would be "
            "mixed with them. Choose another name, or use --force to add to it."
        )
    return str(info.sha) if info.sha else None
