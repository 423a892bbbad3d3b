"""Modelfiles: the chat template as Ollama's, the stop tokens, the settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from grpo_lite.errors import ExportError
from grpo_lite.export.gguf.ollama import OllamaSettings, Prompting, ollama_settings, take_apart
from grpo_lite.export.gguf.tokenizer import TokenizerFacts, read_tokenizer
from tests.finished_run import CHATML, bpe_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen3: thinking is put before the last answer only, so that an answer in the history looks different.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
COUNTING = (
    "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}{{ messages | length }}>"
)

TEMPLATES = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "zephyr": ZEPHYR,
    "no-system": NO_SYSTEM,
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+3="},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "and {{ 4 }}?"},
]


def tokenizer_with(template: str) -> Any:
    tokenizer = bpe_tokenizer(template=template)
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """Run the part of Go's template language that a Modelfile of ours uses: range, if eq/ne, else if, end, strings."""
    pieces = re.split(r"\{\{ (.*?) \}\}", template)

    def block(at: int, message: dict[str, str] | None, live: bool) -> tuple[str, int]:
        out = ""
        while at < len(pieces):
            if at % 2 == 0:
                out += pieces[at] if live else ""
                at += 1
                continue
            action = pieces[at]
            if action == "end" or action.startswith("else"):
                return out, at
            if action == "range .Messages":
                for number, one in enumerate(messages):
                    text, end = block(at + 1, one, live)
                    out += text
                    assert pieces[end] == "end", number
                at = end + 1
            elif action.startswith("if "):
                text, at = branches(at, message, live)
                out += text
            else:
                value = {".Content": (message or {}).get("content"), '"{{"': "{{"}[action]
                out += str(value) if live else ""
                at += 1
        return out, at

    def branches(at: int, message: dict[str, str] | None, live: bool) -> tuple[str, int]:
        out, taken = "", False
        while pieces[at] != "end":
            test = re.fullmatch(r'(?:else )?if (eq|ne) (.+) "(\w+)"', pieces[at])
            assert test, pieces[at]
            subject = messages[0] if test[2] == "(index .Messages 0).Role" else message
            assert subject is not None
            holds = (subject["role"] == test[3]) == (test[1] == "eq")
            text, at = block(at + 1, message, live and holds and not taken)
            out, taken = out + text, taken or holds
        return out, at + 1

    return block(0, None, True)[0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("start", [0, 1, 3], ids=["system", "no-system", "one-question"])
def test_go_template_makes_the_same_text_as_the_chat_template(name: str, start: int) -> None:
    if name == "no-system" and start == 0:
        pytest.skip("this template has no system role")
    tokenizer = tokenizer_with(TEMPLATES[name])
    taken = take_apart(tokenizer)
    assert taken is not None
    expected = tokenizer.apply_chat_template(TALK[start:], tokenize=False, add_generation_prompt=True)
    assert run_go(taken.to_go(), TALK[start:]) == expected


def test_begin_token_is_left_out_where_the_runner_adds_it() -> None:
    taken = take_apart(tokenizer_with(LLAMA3))
    assert taken is not None
    assert run_go(taken.to_go("<|endoftext|>"), TALK[3:]).startswith("<|start_header_id|>user")


def test_template_kwargs_of_the_recipe_are_used() -> None:
    taken = take_apart(tokenizer_with(QWEN3), {"enable_thinking": False})
    assert taken is not None
    assert taken.prompt == "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_template_that_counts_is_not_guessed(caplog: pytest.LogCaptureFixture) -> None:
    assert take_apart(tokenizer_with(COUNTING)) is None
    settings = settings_of(tokenizer_with(COUNTING))
    assert settings.template is None
    assert "could not be converted to Ollama's" in caplog.text
    assert "# No TEMPLATE" in settings.modelfile("m.gguf")
    assert "template" not in settings.hub_files()


def facts(**values: Any) -> TokenizerFacts:
    known: dict[str, Any] = {
        "tokens": ["<|endoftext|>", "<|im_end|>"], "types": [3, 3], "merges": [], "pre": "gpt-2", "eos_id": 1,
        "eot_id": None, "bos_id": 0, "pad_id": 0, "unk_id": None, "add_bos": False, "chat_template": None,
        "stop_ids": (1, 0),
    }  # fmt: skip
    return TokenizerFacts(**(known | values))


def settings_of(tokenizer: Any, prompting: Prompting | None = None, context: int = 32768, **f: Any) -> OllamaSettings:
    return ollama_settings(tokenizer, facts(**f), prompting or Prompting(), context)


def test_modelfile_stops_at_every_end_token_and_is_greedy() -> None:
    text = settings_of(tokenizer_with(CHATML)).modelfile("sums-q8_0.gguf")
    assert text.startswith("FROM ./sums-q8_0.gguf\n")
    for line in ('stop "<|im_end|>"', 'stop "<|endoftext|>"', "temperature 0", "repeat_penalty 1", "num_ctx 4096"):
        assert f"PARAMETER {line}\n" in text


def test_context_is_large_enough_for_long_answers_and_never_more_than_the_model_has() -> None:
    long = Prompting(max_completion_tokens=8000)
    assert settings_of(tokenizer_with(CHATML), long).parameters["num_ctx"] == 16000
    assert settings_of(tokenizer_with(CHATML), long, context=2048).parameters["num_ctx"] == 2048


def test_system_prompt_examples_and_form_of_the_question_stand_in_it() -> None:
    prompting = Prompting(system="Think.", examples=(("1+1=", "2"),), question="{question}=")
    text = settings_of(tokenizer_with(CHATML), prompting).modelfile("m.gguf")
    assert text.startswith('# Trained on questions of this form: "{question}="\n')
    assert 'SYSTEM """Think."""\n' in text
    assert 'MESSAGE user """1+1="""\nMESSAGE assistant """2"""\n' in text


def test_text_recipe_puts_system_and_examples_before_the_prompt_and_stops_at_the_line() -> None:
    prompting = Prompting("text", system="Sums:", examples=(("1+1=", "2"),), max_completion_tokens=8)
    settings = settings_of(tokenizer_with(CHATML), prompting)
    assert settings.template == "Sums:\n1+1=2\n{{ .Prompt }}"
    assert settings.parameters["stop"] == ["<|im_end|>", "<|endoftext|>", "\n"]
    assert settings.parameters["num_predict"] == 8
    assert settings.system is None


def test_examples_of_several_lines_do_not_stop_at_the_first() -> None:
    prompting = Prompting("text", examples=(("1+1=", "first\nsecond"),))
    assert "\n" not in settings_of(tokenizer_with(CHATML), prompting).parameters["stop"]


@pytest.mark.parametrize("system", ['say """no"""', 'he said "no"'])
def test_text_that_a_modelfile_cannot_hold_is_refused(system: str) -> None:
    with pytest.raises(ExportError, match=r"data\.system"):
        settings_of(tokenizer_with(CHATML), Prompting(system=system)).modelfile("m.gguf")


def test_hub_files_say_the_same_as_the_modelfile() -> None:
    import json

    files = settings_of(tokenizer_with(CHATML), Prompting(system="Think.")).hub_files()
    assert json.loads(files["params"])["stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert files["system"] == "Think."
    assert ".Messages" in files["template"]


@pytest.mark.weights
def test_embedded_model_comes_apart(smollm2_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    settings = ollama_settings(tokenizer, read_tokenizer(smollm2_dir, 49152), Prompting(), 8192)
    assert settings.parameters["stop"] == ["<|im_end|>"]
    expected = tokenizer.apply_chat_template(TALK[1:], tokenize=False, add_generation_prompt=True)
    assert run_go(settings.template or "", TALK[1:]) == expected
