"""Hostile input and secrets: what docs/security.md promises."""

from __future__ import annotations

import ast
import html
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
import torch

from grpo_lite.errors import GRPOLiteError, ModelError, RecipeError
from grpo_lite.files.manifest import write_manifest
from grpo_lite.files.redact import HIDDEN, RedactingFormatter, planted_secret, redact, redact_logs, secret_in, secrets
from grpo_lite.models import base as trust
from grpo_lite.models.base import Base
from grpo_lite.models.load import load_model, load_tokenizer
from grpo_lite.recipe.load import load_recipe, read_yaml
from grpo_lite.runs.run_dir import RunDir
from grpo_lite.screen import quiet_on_broken_pipe
from tests.command_line import in_process
from tests.command_server import Server
from tests.finished_run import make_base, make_recipe, replaced
from tests.killing import ALONE, FAST

ROOT = Path(__file__).resolve().parent.parent
SECRET = "hf_" + "Zq7" * 11


@pytest.mark.parametrize("path", sorted((ROOT / "grpo_lite").glob("*.py")) + sorted((ROOT / "rewards").glob("*.py")),
                         ids=lambda path: path.name)  # fmt: skip
def test_no_pickle_is_loaded_and_yaml_builds_plain_data_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "shelve", "marshal", "joblib"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path.name}:{node.lineno}"
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                assert keywords.get("Loader") == "_Loader", f"{path.name}:{node.lineno}"


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.write_text, (self.target, "executed"))


@pytest.mark.parametrize("name", ["grpo_lite_state.pt", "optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path, name: str) -> None:
    """The manifest is no protection here: whoever can write the file can write the manifest."""
    torch.save({"x": Bomb(tmp_path / "owned")}, tmp_path / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / name, weights_only=True)
    assert not (tmp_path / "owned").exists()


slow = [pytest.param(name, marks=pytest.mark.slow) for name in ("grpo_lite_state.pt", "rng_state.pth", "scheduler.pt")]


@pytest.mark.parametrize("name", ["optimizer.pt", *slow])
def test_a_resume_from_a_forged_checkpoint_runs_no_code_and_says_why(server: Server, tmp_path: Path, name: str) -> None:
    """Sealed with a right manifest, so that only the way of loading protects: ours and transformers'."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["train", "smoke", "--run", str(run), *FAST, *ALONE, "grpo.max_steps=2"]
    assert server.run(command, log, "optimizer step", 2) == -9, log.read_text()
    checkpoint = run / "checkpoint-1"
    assert (checkpoint / name).is_file()
    torch.save({"x": Bomb(tmp_path / "owned")}, checkpoint / name)
    write_manifest(checkpoint)
    assert server.run(command, log) == 1
    assert "checkpoint-1 holds a file with more than numbers in it" in log.read_text()
    assert not (tmp_path / "owned").exists()


def test_code_of_a_model_runs_only_with_recipe_and_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()\nclass EvilConfig: pass\n")
    recipe = make_recipe(base)
    with pytest.raises(ModelError):
        load_model(Base.resolve(recipe.model))
    asking = replaced(recipe, "model", trust_remote_code=True)
    for load in (load_tokenizer, load_model):
        with pytest.raises(ModelError, match=r"confirm with .*--trust-remote-code"):
            load(Base.resolve(asking.model))
    assert not (tmp_path / "owned").exists()
    monkeypatch.setenv(trust.VARIABLE, "1")
    assert trust.trusts_remote_code(asking.model)
    assert not trust.trusts_remote_code(recipe.model)


@pytest.mark.parametrize("key", ["output_dir", "logging_dir", "push_to_hub", "hub_model_id", "hub_token"])
def test_a_recipe_cannot_write_outside_its_run_directory(root: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"grpo\.{key}: (not set here|unknown key)"):
        load_recipe("smoke", [f"grpo.{key}=/tmp/elsewhere"])


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".hidden", "a\x00b", ""])
def test_a_recipe_s_name_is_no_path(root: Path, name: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("smoke", [f"name={json.dumps(name)}"])


def test_yaml_tags_and_floods_of_aliases_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml(path)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="aliases"):
        read_yaml(path)


def test_secrets_are_found_by_their_names_and_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact(f"a {SECRET} b falsefalse abc") == f"a {HIDDEN} b falsefalse abc"
    (tmp_path / "token").write_text("hf_login_" + "x" * 20)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "hf_login_" + "x" * 20 in secrets().values()


@pytest.mark.parametrize("name", ["PGPASSWORD", "HFTOKEN", "githubToken", "DB_PASSWD", "AWS_SECRET_ACCESS_KEY",
                                  "MY_KEY", "SERVICE_CREDENTIALS", "APIKEY", "GITHUB_PAT", "accessKey"])  # fmt: skip
def test_names_of_secrets_in_many_spellings(name: str) -> None:
    assert secrets({name: SECRET}) == {f"${name}": SECRET}


@pytest.mark.parametrize("name", ["KEYBOARD_LAYOUT", "PATH", "TOKENIZERS_PARALLELISM", "MONKEY_TYPE", "PWD", "AUTHOR"])
def test_names_that_only_look_like_secrets(name: str) -> None:
    assert secrets({name: "a-long-harmless-value"}) == {}


def test_base64_that_begins_with_a_slash_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "key.pem").touch()
    given = {"AWS_SECRET_ACCESS_KEY": "/bPxRfiCYEXAMPLE/K7MDENG", "SSL_KEY": str(tmp_path / "key.pem")}
    assert secrets(given) == {"$AWS_SECRET_ACCESS_KEY": "/bPxRfiCYEXAMPLE/K7MDENG"}


def test_a_secret_is_hidden_however_a_file_spells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'pä"ss\\wo&rd <1>'
    monkeypatch.setenv("SERVICE_PASSWORD", value)
    run = RunDir(tmp_path)
    run.update_run(command=["train", f"x={value}"])
    assert json.loads(run.run_file.read_text())["command"] == ["train", f"x={HIDDEN}"]
    for spelled in (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value), html.escape(value),
                    urllib.parse.quote(value, safe="")):  # fmt: skip
        assert HIDDEN in redact(f"… {spelled} …"), spelled
        assert secret_in(spelled) == "$SERVICE_PASSWORD"


def test_libraries_with_handlers_of_their_own_log_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())  # restored afterwards
    redact_logs()
    stream = io.StringIO()
    logger = logging.Logger("a library's")
    logger.addHandler(logging.StreamHandler(stream))
    logger.warning("sent %s with %d", SECRET, 3)
    assert stream.getvalue() == f"sent {HIDDEN} with 3\n"


def test_a_traceback_that_was_asked_for_shows_no_secret(tmp_path: Path) -> None:
    code = (
        "from grpo_lite.cli import quieten; quieten(False)\n"
        "import os; raise ValueError('sent ' + os.environ['HF_TOKEN'])"
    )
    environment = {**os.environ, "HF_TOKEN": SECRET, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert SECRET not in result.stderr
    assert f"ValueError: sent {HIDDEN}" in result.stderr


def test_a_reward_s_own_message_shows_no_secret(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    lines: list[str] = []
    quiet_on_broken_pipe(lines.append)(f"reward failed: mine raised HTTPError: 401 for key {SECRET}")
    assert lines == [f"reward failed: mine raised HTTPError: 401 for key {HIDDEN}"]


def test_secrets_reach_neither_run_json_nor_logs_nor_errors(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = RunDir(tmp_path)
    run.update_run(command=["train", f"x={SECRET}"], note=SECRET)
    assert SECRET not in run.run_file.read_text()
    record = logging.LogRecord("x", logging.WARNING, "", 1, "sent %s", (SECRET,), None)
    assert SECRET not in RedactingFormatter().format(record)
    assert SECRET not in in_process("show", f"no-{SECRET}", expect=1)


def test_a_secret_in_a_recipe_is_refused_before_it_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    recipe = load_recipe("smoke", [f"rewards[0].kwargs={{api_key: {SECRET}}}"])
    with pytest.raises(GRPOLiteError, match=r"\$JUDGE_API_KEY") as caught:
        RunDir(tmp_path / "run").prepare(recipe)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


TOKENS = {
    "Hub": "hf_" + "aB3" * 11, "GitHub": "ghp_" + "aB3" * 12, "OpenAI": "sk-proj-" + "aB3-" * 8,
    "AWS": "AKIA" + "ABCDEFGH12345678", "Slack": "xoxb-1234567890-abc",
}  # fmt: skip


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS.keys())
def test_a_token_of_known_form_is_hidden_and_refused_without_any_environment(root: Path, token: str) -> None:
    assert redact(f"401 for {token}: no") == f"401 for {HIDDEN}: no"
    recipe = load_recipe("smoke", [f"rewards[0].kwargs={{header: 'Bearer {token}'}}"])
    assert planted_secret(recipe.model_dump()) == "rewards[0].kwargs.header"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://bob:hunter22@host/x.jsonl", "https://[secret]@host/x.jsonl"),
        ("https:/bob:hunter22@host/x.jsonl", "https:/[secret]@host/x.jsonl"),  # as pathlib writes it
        ("proxy http://:pw@10.0.0.1:3128 refused", "proxy http://[secret]@10.0.0.1:3128 refused"),
        ("https://host/a:b@c and git@github.com:me/x, 3:4@5", None),
        ("scikit: risk-averse-behaviour-in-2024, task-force-of-2025-and-more", None),
    ],
)
def test_passwords_in_addresses_are_hidden_and_nothing_else(text: str, shown: str | None) -> None:
    assert redact(text) == (shown or text)


@pytest.mark.parametrize("override", ["data.train.path=https://bob:hunter22@host/x.jsonl",
                                      "rewards[0].kwargs.api_key=0123456789abcdef",
                                      "rewards[0].kwargs={judge: {access_token: abcdefgh}}",
                                      "model.id=https://bob:hunter22@host/model"])  # fmt: skip
def test_a_secret_on_the_line_is_refused_before_anything_is_written(root: Path, tmp_path: Path, override: str) -> None:
    text = in_process("train", "smoke", "--run", str(tmp_path / "run"), override, expect=1)
    assert "what looks like one" in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    for word in ("hunter22", "0123456789abcdef", "abcdefgh"):
        assert word not in text


@pytest.mark.parametrize("override", ["rewards[0].kwargs={api_key: JUDGE_API_KEY}", "rewards[0].kwargs={key: question}",
                                      "rewards[0].kwargs={max_tokens: 12345678}",
                                      "rewards[0].kwargs={eos_token: '<|endoftext|>'}",
                                      "data.system='Connect to postgres://user:password@localhost/db'",
                                      "rewards[0].kwargs={password: short}"])  # fmt: skip
def test_what_only_resembles_a_secret_is_let_through(root: Path, override: str) -> None:
    assert planted_secret(load_recipe("smoke", [override]).model_dump()) is None


def test_few_aliases_that_grow_without_bound_are_refused_at_once(root: Path, tmp_path: Path) -> None:
    """18 aliases, below the number allowed: 3**6 copies of a list of 20,000, 15 million values once written out."""
    path = tmp_path / "bomb.yaml"
    chain = ["q0: &a0 [" + ", ".join(["x"] * 20_000) + "]"]
    chain += [f"q{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 7)]
    path.write_text("\n".join(chain))
    begun = time.process_time()
    with pytest.raises(RecipeError, match="make it too large"):
        read_yaml(path)
    assert time.process_time() - begun < 5  # PyYAML reads 20,000 values in about one


@pytest.mark.parametrize("text", ["lora: &a [*a]", "lora: &a {x: *a}", "lora: &a {x: [1, {y: *a}]}"])
def test_data_that_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="endless"):
        read_yaml(path)


def test_an_honest_alias_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("a: &a [1, 2]\nb: *a\nc: {d: *a}\n")
    assert read_yaml(path) == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_an_address_is_no_file_of_rows(root: Path, tmp_path: Path) -> None:
    text = in_process("check", "smoke", "data.train.path=https://host/rows.jsonl", expect=1)
    assert "is an address, and files are read from disks only. Download it." in text


@pytest.mark.parametrize("text", ["9" * 5000, "2026-13-45", "[" * 3000], ids=["digits", "date", "depth"])
def test_values_that_only_look_like_yaml_s_are_told(root: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"seed: {text}\n")
    with pytest.raises(RecipeError):
        read_yaml(path)
    with pytest.raises(RecipeError):
        load_recipe("smoke", [f"seed={text}"])
