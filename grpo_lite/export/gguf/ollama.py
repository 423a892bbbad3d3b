"""The Modelfile, which makes Ollama ask the model as it was trained, and stop where it should.

Ollama does not run a GGUF's Jinja template; it looks for a similar one of its own and otherwise uses none. So the
template is split here into the text before and after each role's content, rebuilt as Ollama's Go template, and compared
with the original on several conversations.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_lite.errors import ExportError
from grpo_lite.export.gguf.tokenizer import TokenizerFacts

logger = logging.getLogger(__name__)

_MARKS = {"system": "SYSTEM-MARK", "user": "USER-MARK", "assistant": "ASSISTANT-MARK"}
Message = Mapping[str, str]


@dataclass(frozen=True)
class TurnTemplate:
    """A chat template as fixed text around each role's content."""

    start: str  # before everything
    default_system: str  # between start and the first turn, where no system message is given
    before: dict[str, str]
    after: dict[str, str]
    prompt: str  # after the last turn, to make the model speak

    def render(self, messages: Sequence[Message]) -> str:
        """Return the conversation as text that makes the model speak next, as the Jinja template would."""
        text = self.start if messages and messages[0]["role"] == "system" else self.start + self.default_system
        for message in messages:
            text += self.before[message["role"]] + message["content"] + self.after[message["role"]]
        return text + self.prompt

    def to_go(self, strip_start: str | None = None) -> str:
        """Return Ollama's Go template.

        Args:
            strip_start: the begin token where the runner adds it itself; it must not come twice.
        """
        start = self.start.removeprefix(strip_start) if strip_start else self.start
        default = ""
        if self.default_system:
            default = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.default_system)}{{{{ end }}}}'
        branches = [
            f'if eq .Role "{role}" }}}}{_go(self.before[role])}{{{{ .Content }}}}{_go(self.after[role])}'
            for role in ("system", "user", "assistant")
            if role in self.before
        ]
        turns = "{{ else ".join(branches)
        return f"{_go(start)}{default}{{{{ range .Messages }}}}{{{{ {turns}{{{{ end }}}}{{{{ end }}}}{_go(self.prompt)}"


def take_apart(tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> TurnTemplate | None:
    """Return the tokenizer's chat template as turns, or None where it is more than fixed text around each content.

    Args:
        kwargs: the recipe's `chat_template_kwargs`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None

    def jinja(messages: Sequence[Message], prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **(kwargs or {})
            )
        )

    try:
        template = _pieces(jinja, tokenizer.bos_token)
        alike = template and all(template.render(case) == jinja(case, True) for case in _cases(template))
    except Exception:  # templates raise what they like (roles that must alternate, no system role)
        return None
    return template if alike else None


def _pieces(jinja: Callable[[Sequence[Message], bool], str], bos: str | None) -> TurnTemplate | None:
    user, assistant = ({"role": role, "content": _MARKS[role]} for role in ("user", "assistant"))
    after_user = jinja([user], False).rpartition(_MARKS["user"])[2]
    after_assistant = jinja([user, assistant], False).rpartition(_MARKS["assistant"])[2]
    lead, middle, second, last = _between(jinja([user, assistant, user], True), ["user", "assistant", "user"])
    if not (middle.startswith(after_user) and second.startswith(after_assistant) and last.startswith(after_user)):
        return None
    before = {"user": second.removeprefix(after_assistant), "assistant": middle.removeprefix(after_user)}
    after = {"user": after_user, "assistant": after_assistant}
    if not lead.endswith(before["user"]):
        return None
    lead = lead.removesuffix(before["user"])
    start = bos if bos and lead.startswith(bos) and bos not in before["user"] else ""  # ChatML opens each turn so
    try:
        system = {"role": "system", "content": _MARKS["system"]}
        head, gap = _between(jinja([system, user], False), ["system", "user"])[:2]
    except Exception:  # no system role
        head, gap = "", None
    if gap is not None and gap.endswith(before["user"]) and head.startswith(start):
        before["system"], after["system"] = head.removeprefix(start), gap.removesuffix(before["user"])
    return TurnTemplate(start, lead.removeprefix(start), before, after, last.removeprefix(after_user))


def _between(text: str, roles: Sequence[str]) -> list[str]:
    pieces = []
    for role in roles:
        piece, mark, text = text.partition(_MARKS[role])
        if not mark:
            raise ValueError(f"the chat template drops the {role} message")
        pieces.append(piece)
    return [*pieces, text]


def _cases(template: TurnTemplate) -> list[list[Message]]:
    def turns(*texts: str) -> list[Message]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    cases = [turns("2+2="), turns("a b", "c", "d"), turns("{{ x }} \" '", "1\n2", "?", "!", "so")]
    if "system" in template.before:
        cases += [[{"role": "system", "content": "Be brief."}, *case] for case in cases]
    return cases


def _go(text: str) -> str:
    """Return text that Go's template engine prints as it is."""
    return text.replace("{{", '{{ "{{" }}')


@dataclass(frozen=True)
class Prompting:
    """How a run made its prompts, which is how its model should be asked."""

    format: str = "chat"  # or "text"
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()  # question, answer
    question: str = "{prompt}"  # the recipe's data.prompt
    template_kwargs: Mapping[str, Any] | None = None
    max_completion_tokens: int = 256


@dataclass(frozen=True)
class OllamaSettings:
    """What Ollama needs to know of a model besides its weights."""

    template: str | None  # None: Ollama looks for one itself
    system: str | None
    examples: tuple[tuple[str, str], ...]
    parameters: dict[str, Any]
    note: str

    def modelfile(self, gguf_name: str) -> str:
        """Return the text of a Modelfile beside the GGUF.

        Raises:
            ExportError: a text holds three double quotes in a row, which a Modelfile cannot express.
        """
        lines = [*([f"# {self.note}"] if self.note else []), f"FROM ./{gguf_name}"]
        if self.template is None:
            lines.append("# No TEMPLATE: this chat template is more than text around turns; Ollama looks for its own.")
        else:
            lines.append("TEMPLATE " + _quoted(self.template, "the chat template"))
        if self.system:
            lines.append("SYSTEM " + _quoted(self.system, "data.system"))
        for question, answer in self.examples:
            lines.append("MESSAGE user " + _quoted(question, "data.examples"))
            lines.append("MESSAGE assistant " + _quoted(answer, "data.examples"))
        lines.append("# Greedy, as the scores were measured, without Ollama's own defaults for sampling.")
        for name, value in self.parameters.items():
            for one in value if isinstance(value, list) else [value]:
                lines.append(f"PARAMETER {name} {json.dumps(one, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"

    def hub_files(self) -> dict[str, str]:
        """Return the files from which `ollama run hf.co/user/name` reads the same settings on the Hub."""
        files = {"params": json.dumps(self.parameters, indent=2, ensure_ascii=False) + "\n"}
        if self.template is not None:
            files["template"] = self.template
        if self.system:
            files["system"] = self.system
        return files


def ollama_settings(tokenizer: Any, facts: TokenizerFacts, prompting: Prompting, context_tokens: int) -> OllamaSettings:
    """Return the settings under which Ollama asks the model as the run did.

    Args:
        context_tokens: what the model was made for; Ollama's own default is 4096 for every model.
    """
    bos = facts.tokens[facts.bos_id] if facts.add_bos and facts.bos_id is not None else None
    template: str | None
    if prompting.format == "text":
        shots = "".join(f"{question}{answer}\n" for question, answer in prompting.examples)
        template = _go((f"{prompting.system}\n" if prompting.system else "") + shots) + "{{ .Prompt }}"
    else:
        turns = take_apart(tokenizer, prompting.template_kwargs)
        template = turns.to_go(bos) if turns else None
        if template is None:
            logger.warning("The chat template could not be converted to Ollama's: compare the answers before use.")
    chat = prompting.format == "chat"
    asked = json.dumps(prompting.question, ensure_ascii=False)
    return OllamaSettings(
        template=template,
        system=prompting.system if chat else None,
        examples=prompting.examples if chat else (),
        parameters={
            "stop": facts.stop_tokens + _text_stops(prompting),
            "temperature": 0,
            "top_p": 1,
            "top_k": 0,
            "min_p": 0,
            "repeat_penalty": 1,
            "num_ctx": min(context_tokens, max(4096, 2 * prompting.max_completion_tokens)),
            # Plain text has no end of a turn: what was trained is an answer within this many tokens.
            **({} if chat else {"num_predict": prompting.max_completion_tokens}),
        },
        note="" if prompting.question == "{prompt}" else f"Trained on questions of this form: {asked}",
    )


def _text_stops(prompting: Prompting) -> list[str]:
    """Return the line break that ends every example's answer in text format, and so the model's."""
    lines = [text for example in prompting.examples for text in example]
    return ["\n"] if prompting.format == "text" and lines and not any("\n" in line for line in lines) else []


def _quoted(text: str, what: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise ExportError(f'{what}: has """ or ends in a double quote, which a Modelfile cannot express. Change it.')
    return f'"""{text}"""'
