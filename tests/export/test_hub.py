"""Pushing: over real HTTP to a small Hub on the loopback."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_lite.errors import ExportError
from grpo_lite.export.hub import push as hub
from grpo_lite.export.hub.card import BENCHMARKS
from grpo_lite.files.manifest import verify_manifest
from grpo_lite.runs.run_dir import RunDir
from tests.export.hub_server import TOKEN, Hub, Repo, hub_in_place
from tests.finished_run import make_recipe, make_run, set_recipe

REPO = "me/sums"

# huggingface_hub 1.33 hands httpx a file as `data=`, which httpx 0.28 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(finished.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_in_place(monkeypatch, tmp_path / "hub-cache") as state:
        yield state


def push(run: RunDir, what: hub.What = "merged", private: bool = False, force: bool = False) -> list[str]:
    lines: list[str] = []
    with hub.stage(run, REPO, what) as staged:
        lines.append(hub.push(staged, lines.append, private, force))
    return lines


def content(server: Hub, name: str) -> bytes:
    return server.stored[server.repos[REPO].files[name]]


def test_merged_model_arrives_whole_with_card_and_manifest(run: RunDir, server: Hub, tmp_path: Path) -> None:
    assert push(run)[-1] == f"{server.url}/{REPO}"
    for name in server.repos[REPO].files:
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content(server, name))
    assert verify_manifest(tmp_path / "got") == len(server.repos[REPO].files) - 1
    assert content(server, "model.safetensors") == (run.merged / "model.safetensors").read_bytes()
    assert b"license: mit" in content(server, "README.md")


def test_one_commit_makes_all_files_visible(run: RunDir, server: Hub) -> None:
    push(run)
    assert sum("/commit/" in path for _, path in server.requests) == 1
    assert not (run.path / "README.md").exists()
    assert not list(run.path.glob(".push-*"))


def test_adapter_names_its_base_without_a_path_of_this_machine(run: RunDir, server: Hub) -> None:
    before = (run.adapter / "adapter_config.json").read_bytes()
    push(run, "adapter", force=True)
    config = json.loads(content(server, "adapter_config.json"))
    assert config["base_model_name_or_path"] == "base-model"
    assert (run.adapter / "adapter_config.json").read_bytes() == before
    assert "training_args.bin" not in server.repos[REPO].files


def test_several_gguf_files_go_together_and_each_must_be_proven(run: RunDir, server: Hub) -> None:
    from grpo_lite.export.stages import RunInputs, export_run_gguf

    for kind in ("bf16", "q8_0"):
        export_run_gguf(run, kind, lambda line: None, RunInputs(run.load_recipe()))
    push(run, "gguf")
    assert {"sums-bf16.gguf", "sums-q8_0.gguf", "Modelfile-q8_0", "gguf-bf16.json", "params", "template"} <= set(
        server.repos[REPO].files
    )
    record = json.loads((run.path / "gguf/q8_0/gguf.json").read_text())
    (run.path / "gguf/q8_0/gguf.json").write_text(json.dumps(record | {"proof": None}))
    from grpo_lite.files.manifest import update_manifest

    update_manifest(run.path / "gguf/q8_0", ["gguf.json"])
    with pytest.raises(ExportError, match=r"sums-q8_0\.gguf is not proven"):
        push(run, "gguf")


def test_interrupted_push_shows_nothing_and_resumes_with_what_is_missing(run: RunDir, server: Hub) -> None:
    server.cut_uploads_after = 1  # of two large files: model.safetensors, tokenizer.json
    with pytest.raises(ExportError, match=r"connection to the Hub broke.*same command again.*files had been sent"):
        push(run)
    assert server.repos[REPO].files == {}
    assert server.uploads() == 1
    server.cut_uploads_after = None
    push(run)
    assert server.uploads() == 2  # the first large file was not sent again
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= server.repos[REPO].files.keys()


def test_second_push_of_the_same_files_sends_none_again(run: RunDir, server: Hub) -> None:
    push(run)
    again = server.uploads()
    push(run)
    assert server.uploads() == again


@pytest.mark.parametrize(
    "part, status, words",
    [
        ("/api/repos/create", 403, r"your token may not write to me \(403\)"),
        ("/preupload/", 404, r"there is no me on the Hub, or you may not see me/sums \(404\)"),
        ("/objects/batch", 403, r"may not write to me \(403\)"),
        ("/upload/", 403, r"\(403\)"),
        ("/commit/", 409, r"someone else is changing the repository.*\(409\)"),
        ("/commit/", 412, r"changed it meanwhile \(412\)"),
        ("/commit/", 500, r"busy or down \(500\).*same command again"),
        ("/commit/", 400, r"the Hub refused \(400\)"),
    ],
)
def test_refusal_of_the_hub_is_said_in_one_message(
    run: RunDir, server: Hub, part: str, status: int, words: str
) -> None:
    server.status[part] = status
    with pytest.raises(ExportError, match=words) as refusal:
        push(run)
    assert TOKEN not in str(refusal.value)
    assert "X-Signature" not in str(refusal.value)


def test_file_that_the_hub_does_not_take_is_said(run: RunDir, server: Hub) -> None:
    server.refuse_files = "Your storage is full"
    with pytest.raises(ExportError, match=r"refused a file:.*Your storage is full"):
        push(run)


def test_leftover_of_a_killed_push_is_cleared(run: RunDir, server: Hub) -> None:
    (run.path / ".push-killed").mkdir()
    push(run)
    assert not list(run.path.glob(".push-*"))


def test_wrong_token_is_refused_and_not_shown(run: RunDir, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(ExportError, match=r"does not accept your token \(401\).*hf auth login") as refusal:
        push(run)
    assert "hf_wrong" not in str(refusal.value)


def test_no_token_is_said_before_anything_is_asked(run: RunDir, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ExportError, match="not logged in"):
        push(run)
    assert server.requests == []


def test_offline_is_said(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
        push(run)


def test_no_server_is_said(run: RunDir, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match="connection to the Hub broke"):
        push(run)


def test_token_goes_to_the_hub_only(
    run: RunDir, server: Hub, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = push(run)
    assert server.tokens == {TOKEN}
    shown = capfd.readouterr()
    assert TOKEN not in "".join([*lines, shown.out, shown.err, caplog.text])
    assert not [path for path in run.path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not [name for name in server.repos[REPO].files if TOKEN.encode() in content(server, name)]


def test_private_repository_is_made_private(run: RunDir, server: Hub) -> None:
    push(run, private=True)
    assert server.repos[REPO].private


def test_private_push_into_a_public_repository_is_refused_before_anything_is_sent(run: RunDir, server: Hub) -> None:
    server.repos[REPO] = Repo(private=False)
    with pytest.raises(ExportError, match="exists and is public"):
        push(run, private=True)
    assert server.stored == {}


def test_the_score_at_a_benchmark_goes_with_the_model_and_those_of_others_stay(
    run: RunDir, finished: RunDir, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BENCHMARKS, ("openai/gsm8k", "test"), ("gsm8k", 20))
    gsm8k = {"hub": "openai/gsm8k", "config": "main"}
    sources = {"train": gsm8k, "eval": gsm8k | {"split": "test"}, "holdout": 0}
    set_recipe(run, make_recipe(finished.path.parent / "base-model", **sources))
    server.repos[REPO] = Repo(private=False, files={".eval_results/hle.yaml": "0" * 64})
    push(run, "adapter", force=True)
    assert b"value: 75.0" in content(server, ".eval_results/gsm8k.yaml")
    assert ".eval_results/hle.yaml" in server.repos[REPO].files
    assert b".eval_results/gsm8k.yaml" in content(server, "MANIFEST.sha256")


def test_repository_with_other_files_is_left_alone_unless_forced(run: RunDir, server: Hub) -> None:
    server.repos[REPO] = Repo(private=False, files={"precious.bin": "0" * 64, ".gitattributes": "1" * 64})
    with pytest.raises(ExportError, match=r"already holds other files \(precious.bin\)"):
        push(run)
    push(run, force=True)
    assert "precious.bin" in server.repos[REPO].files


def test_commit_by_somebody_else_in_between_is_a_conflict(run: RunDir, server: Hub) -> None:
    def meddle(line: str) -> None:
        if line.startswith("sent 1/"):
            server.repos[REPO].commits.append("f" * 40)

    with hub.stage(run, REPO, "merged") as staged, pytest.raises(ExportError, match=r"\(412\)"):
        hub.push(staged, meddle)


def test_unverified_merge_is_refused_and_forced_with_a_word_in_the_card(run: RunDir, server: Hub) -> None:
    merge = run.read_run()["merge"]
    run.update_run(merge=merge | {"passed": False})
    with pytest.raises(ExportError, match="the merge is not verified"):
        push(run)
    assert server.requests == []
    push(run, force=True)
    assert b"Pushed despite this:** the merge is not verified" in content(server, "README.md")


def test_run_that_was_never_merged_has_nothing_to_push(run: RunDir) -> None:
    shutil.rmtree(run.merged)
    with pytest.raises(ExportError, match="there is no merged model"):
        push(run)


def test_merge_of_an_earlier_adapter_is_refused(run: RunDir) -> None:
    record = json.loads((run.merged / "merge.json").read_text())
    (run.merged / "merge.json").write_text(json.dumps(record | {"adapter_sha256": "0" * 64}))
    from grpo_lite.files.manifest import update_manifest

    update_manifest(run.merged, ["merge.json"])
    with pytest.raises(ExportError, match="of another adapter"):
        push(run)


def test_run_below_its_base_is_refused(tmp_path: Path) -> None:
    worse = make_run(tmp_path, after=0)  # 5 of 20 before: too few to be a significant loss by six changed examples
    scores = json.loads(worse.scores_file.read_text())
    assert scores["lenient"]["verdict"]["label"] == "no significant gain"
    from grpo_lite.evaluation.evaluate import compare

    columns = {
        name: [{"lenient": i < right, "strict": i < right, "samples_right": 0} for i in range(20)]
        for name, right in (("base", 15), ("trained", 5))
    }
    worse.scores_file.write_text(json.dumps(compare(worse.load_recipe(), columns)))
    with pytest.raises(ExportError, match=r"worse than its base.*0\.750 to 0\.250"):
        push(worse)


def test_run_a_little_below_its_base_is_refused_too(tmp_path: Path) -> None:
    worse = make_run(tmp_path, after=4)  # 5 of 20 before: by luck perhaps, but nothing to publish
    with pytest.raises(ExportError, match=r"scored below its base.*0\.250 to 0\.200"):
        push(worse, "adapter")


def test_grpo_that_lost_what_the_warm_up_had_gained_is_refused(tmp_path: Path) -> None:
    worse = make_run(tmp_path, warm=18, after=8)  # above the base's 5 of 20
    with pytest.raises(ExportError, match=r"GRPO made the model worse than its warm-up had .*0\.900 to 0\.400"):
        push(worse, "adapter")


def test_merge_that_scores_below_the_base_is_refused_and_the_adapter_is_not(run: RunDir, server: Hub) -> None:
    scores = json.loads(run.scores_file.read_text())
    low = scores["lenient"]["base"] | {"rate": 0.2}
    run.scores_file.write_text(json.dumps(scores | {"merged": {"lenient": low, "strict": low}}))
    with pytest.raises(ExportError, match=r"merged 16-bit model scored 0\.200, below the base's 0\.250"):
        push(run)
    with hub.stage(run, REPO, "adapter") as staged:
        assert not [doubt for doubt in staged.doubts if "scored" in doubt]


def test_run_without_scores_is_refused(run: RunDir) -> None:
    run.scores_file.unlink()
    with pytest.raises(ExportError, match="was not evaluated"):
        push(run)


def test_base_without_a_licence_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "base-model" / "README.md").write_text("---\nlicense: license\n---\n")
    with pytest.raises(ExportError, match="licence of base-model could not be read"):
        push(run)


def test_altered_merge_is_named_and_never_pushed(run: RunDir) -> None:
    with (run.merged / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ExportError, match=r"model.safetensors: corrupted"):
        push(run, force=True)


def test_a_link_in_a_run_is_not_pushed(run: RunDir, tmp_path: Path) -> None:
    """A run of somebody else's: `tokenizer_extra.json` is a link to a file of this machine."""
    (tmp_path / "id_rsa").write_text("private")
    (run.adapter / "tokenizer_extra.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(ExportError, match=r"_extra\.json: is a symbolic link"), hub.stage(run, REPO, "adapter"):
        pass


def test_adapter_that_is_zero_is_named_and_never_pushed(run: RunDir) -> None:
    from safetensors.torch import load_file, save_file

    path = run.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ExportError, match=r"zero|no effect|nothing"):
        push(run, "adapter", force=True)


def test_file_with_a_path_of_this_machine_is_refused(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_lite.files.manifest import update_manifest

    monkeypatch.setenv("HOME", "/home/somebody")
    config = json.loads((run.merged / "config.json").read_text())
    (run.merged / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/models/x"}))
    update_manifest(run.merged, ["config.json"])
    with pytest.raises(ExportError, match=r"config\.json holds a path of this machine"):
        push(run)


@pytest.mark.parametrize("name", ["sums", "me/sums/more", "me/su ms", "", "me/"])
def test_name_that_is_no_repository_is_refused(run: RunDir, name: str) -> None:
    with pytest.raises(ExportError, match="is not a valid repository name"), hub.stage(run, name, "merged"):
        pass


def test_dry_run_lists_files_sizes_and_card_without_a_token_or_network(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub.stage(run, REPO, "merged") as staged:
        text = "\n".join(staged.lines())
        size = (run.merged / "model.safetensors").stat().st_size
    assert f"{size / 1024:.1f} KiB" in text
    assert "library_name: transformers" in text  # the card; this merged model was not scored itself
    assert "README.md" in text.splitlines()[0]


def test_xet_is_used_where_it_is_installed_and_not_switched_off(
    run: RunDir, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("hf_xet") is None:
        pytest.skip("hf_xet is not installed")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.status["xet-write-token"] = 403
    with pytest.raises(ExportError, match=r"\(403\)|connection"):
        push(run)
    assert any("xet-write-token" in path for _, path in server.requests)
