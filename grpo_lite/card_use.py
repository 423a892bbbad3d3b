"""How the model of a card is loaded and asked: transformers, vLLM, Ollama, and the form of the questions it learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lite.base_facts import BaseFacts
from grpo_lite.recipe import Recipe


def use_section(recipe: Recipe, base: BaseFacts, gguf: Sequence[Mapping[str, Any]], repo_id: str, what: str) -> str:
    """Return the card's section on loading and asking the model.

    Args:
        gguf: gguf.json of each file that is pushed.
        what: "adapter", "merged" or "gguf".
    """
    base_name = base.hub_id or base.name
    title = repo_id.rpartition("/")[2]
    lines = ["## Use", ""]
    lines += _asked(recipe)
    if what == "gguf":
        kinds = [str(record["kind"]) for record in gguf] or ["q8_0"]
        lines += ["```sh", *(f"ollama run hf.co/{repo_id}:{kind.upper()}" for kind in kinds), "```", ""]
        lines += ["or download the file with its `Modelfile` and run", "", "```sh"]
        modelfile = f"Modelfile-{kinds[0]}" if len(kinds) > 1 else "Modelfile"  # as push names them
        lines += [f"ollama create {title.lower()} -f {modelfile} && ollama run {title.lower()}", "```", ""]
        file = gguf[0]["file"] if gguf else f"{recipe.name}-q8_0.gguf"
        lines += ["```python", "from transformers import AutoModelForCausalLM  # needs the package gguf", ""]
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", gguf_file="{file}")', "```", ""]
        lines += ["vLLM is better served by the merged 16-bit model: `grpo-lite push RUN … --what merged`."]
        return "\n".join(lines) + "\n"
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    revision = f', revision="{base.revision}"' if base.revision else ""
    if what == "adapter":
        lines += [
            "from peft import PeftModel",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{base_name}"{revision}, dtype="auto")',
            f'model = PeftModel.from_pretrained(base, "{repo_id}")',
        ]
    else:
        lines += ["", f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", dtype="auto")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")', "```", "", "```sh"]
    if what == "adapter":
        rank = recipe.lora.get("r", 8)
        lines += [f"vllm serve {base_name} --enable-lora --max-lora-rank {rank} --lora-modules {title}={repo_id}"]
    else:
        lines += [f"vllm serve {repo_id}"]
    lines += ["```", ""]
    lines += [f"For Ollama make a GGUF of the run: `grpo-lite export RUN --gguf q8_0` ({recipe.name})."]
    if what == "merged":
        lines += ["Without the run: llama.cpp's `convert_hf_to_gguf.py` on a download of this repository."]
    return "\n".join(lines) + "\n"


def _asked(recipe: Recipe) -> list[str]:
    """Return how a question was put in training, which is how the model wants to be asked."""
    data = recipe.data
    form = f"Trained on questions of the form {_code(data.prompt)}"
    if data.format == "text":
        before = (f"{data.system}\n" if data.system else "") + "".join(f"{e.prompt}{e.answer}\n" for e in data.examples)
        form += " in plain text, without the chat template (vLLM: `/v1/completions`)"
        return [form + (f", after this text: {_code(before)}." if before else "."), ""]
    if not data.system and not data.examples and data.prompt == "{prompt}":
        return []
    shots = f", after {len(data.examples)} examples (`data.examples` in the recipe below)" if data.examples else ""
    return [form + (f" under the system prompt {_code(data.system)}" if data.system else "") + shots + ".", ""]


def _code(text: str) -> str:
    return f"`{json.dumps(text, ensure_ascii=False)}`"
