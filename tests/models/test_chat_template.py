"""The chat template of the recipe: which one is taken, and what the shipped one writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving

from grpo_lite.environments.calculator import Calculator
from grpo_lite.errors import ModelError
from grpo_lite.models.chat_template import set_chat_template
from grpo_lite.task.environments import tool_template
from grpo_lite.task.episodes import read_turn
from tests.conftest import SHARED

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = {"role": "user", "content": "What is 3*4?"}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "calculate", "arguments": arguments}}


@pytest.fixture
def tokenizer() -> Any:
    if not (SHARED / "tokenizers" / "smollm2").is_dir():
        pytest.skip("../shared/tokenizers/smollm2 is not here")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "smollm2")
    tokenizer.eos_token = "<|im_end|>"
    set_chat_template(tokenizer, "smollm2-tools")
    return tokenizer


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Add."}]])
@pytest.mark.parametrize("prompts", [True, False])
def test_without_tools_the_shipped_template_is_smollm2_s_own(tokenizer: Any, system: list[Any], prompts: bool) -> None:
    turns = [*system, QUESTION, {"role": "assistant", "content": "12"}, {"role": "user", "content": "And 3*5?"}]
    ours, theirs = (
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompts, chat_template=template)
        for template in (None, SMOLLM2)
    )
    assert ours == theirs


def test_trl_can_read_what_the_shipped_template_writes(tokenizer: Any) -> None:
    assert tool_template(tokenizer, "m") is None
    assert is_chat_template_prefix_preserving(tokenizer)
    tools = [Calculator().calculate]
    prompt = tokenizer.apply_chat_template([QUESTION], tools=tools, tokenize=False, add_generation_prompt=True)
    assert '{"name": "calculate", "description": "Calculate an arithmetic expression exactly.", "param' in prompt
    calls = [call(expression="3*4"), call(expression='"</tool_call"\n')]
    turn = {"role": "assistant", "content": "I calculate.", "tool_calls": calls}
    whole = tokenizer.apply_chat_template([QUESTION, turn], tools=tools, tokenize=False)
    prefix, ids = (tokenizer(text)["input_ids"] for text in (prompt, whole.removeprefix(prompt)))
    parsed = read_turn(tokenizer, ids, prefix, tools)
    assert (parsed["content"].strip(), parsed["tool_calls"]) == ("I calculate.", calls)


def test_programs_without_transformers_tags_render_the_shipped_template(tokenizer: Any) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    turns = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call(expression="3*4")]}]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(tokenizer.chat_template)
    assert plain.render(messages=turns) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_of_the_user_s_is_read_where_its_calls_are_qwen3_s(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(tokenizer.chat_template.replace("Tools:", "My tools:"))
    set_chat_template(tokenizer, str(file))
    assert tool_template(tokenizer, "m") is None
    del tokenizer.response_template
    file.write_text(tokenizer.chat_template.replace("<tool_call>", "<call>"))
    set_chat_template(tokenizer, str(file))
    with pytest.raises(ModelError, match=r"TRL does not know the chat template of m, .*chat_template=smollm2-tools"):
        tool_template(tokenizer, "m")
    assert getattr(tokenizer, "response_template", None) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("smollm2-tool", None, r"'smollm2-tool' is given, and there is no such template. Allowed: smollm2-tools, or"),
        ("no.jinja", None, r"no.jinja' is given, and there is no such template"),
        ("broken.jinja", "{% for %}", "broken.jinja does not render a message: TemplateSyntaxError"),
        ("binary.jinja", b"\xff\xfe", "binary.jinja cannot be read"),
    ],
)
def test_a_template_that_is_none_is_one_line(name: str, text: Any, message: str, tmp_path: Path) -> None:
    from tests.tiny import tiny_tokenizer

    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        name = str(tmp_path / name)
    with pytest.raises(ModelError, match=message) as error:
        set_chat_template(tiny_tokenizer(), name)
    assert "\n" not in str(error.value)
