"""The recipe's own chat template (`model.chat_template`), in place of the one that the model brings.

It is put on the tokenizer when that is loaded, so training, scores and `chat` use it, and it is saved with the adapter.
A merge takes it from there, and a GGUF from the merged model: what is served has the template that was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_lite.errors import ModelError

SHIPPED = Path(__file__).parent / "chat_templates"
FILE_NAME = "chat_template.jinja"  # transformers' name, beside a saved tokenizer


def read_chat_template(name: str) -> str:
    """Return a chat template: one that comes with the kit, by name, or a `.jinja` file.

    Raises:
        ModelError: there is none of that name, or it cannot be read.
    """
    path = Path(name).expanduser() if name.endswith(".jinja") else SHIPPED / f"{name}.jinja"
    shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.jinja")))
    if not path.is_file():
        raise ModelError(
            f"model.chat_template: {name!r} is given, and there is no such template. Allowed: {shipped}, or the path "
            "of a .jinja file. Correct it, or remove the key to use the model's own."
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model.chat_template: {name} cannot be read: {error}. Give a text file in UTF-8.") from None


def set_chat_template(tokenizer: Any, name: str) -> None:
    """Put a chat template on a tokenizer.

    Raises:
        ModelError: as `read_chat_template`, or it is no template.
    """
    tokenizer.chat_template = read_chat_template(name)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        raise ModelError(
            f"model.chat_template: {name} does not render a message: {type(error).__name__}: {error}. Correct the file."
        ) from None
