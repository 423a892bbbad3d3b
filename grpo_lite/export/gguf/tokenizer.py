"""The tokenizer's part of a GGUF: tokens and their types, merges, pre-tokenizer, end tokens, chat template.

llama.cpp re-implements each model's text splitting under a name (`tokenizer.ggml.pre`). Its own converter finds the
name by a hash of one vocabulary's ids; here the splitting itself is compared on a text of hard cases, so that a
fine-tune with added tokens is recognised and an unknown splitting is refused rather than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from grpo_lite.errors import ExportError, first_line
from grpo_lite.export.gguf.tensors import OTHER_WAY, NotWrittenHereError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# llama.cpp's name -> (its regular expressions, one after the other; whether it looks a whole piece up before merging).
# Source: llama.cpp src/llama-vocab.cpp.
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "llama-bpe": ((_LLAMA3 % "1,3",), True),
    "smaug-bpe": ((_LLAMA3 % "1,3",), False),
    "qwen2": ((_LLAMA3 % "1",), False),
}
_PROBE = (
    "Hello world's  end, it'll I'VE 3 12 123 1234567 x1y22 a  7   8\n\n  9 \t10\t\n\r\n end.\n !!! ?!\n\n==> #### -5 "
    "1,000.50 can't  CAN'T\u00a0\u00e9t\u00e9 na\u00efve \u4f60\u597d\uff01 \u0663\u0664 \u216b \u00bd "
    "\U0001f600\U0001f600 </think>\n\n\\boxed{42} $x^2$   "
)


@dataclass(frozen=True)
class TokenizerFacts:
    """What a GGUF stores of a tokenizer."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    eos_id: int
    eot_id: int | None  # what ends a turn, where the template uses another token than eos
    bos_id: int | None
    pad_id: int | None
    unk_id: int | None
    add_bos: bool
    chat_template: str | None
    stop_ids: tuple[int, ...]

    @property
    def stop_tokens(self) -> list[str]:
        """The texts that end a generation."""
        return [self.tokens[i] for i in self.stop_ids]


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerFacts:
    """Read a folder's tokenizer and generation config.

    Args:
        vocab_size: rows of the embedding; ids without a token become unused ones.

    Raises:
        NotWrittenHereError: no byte-level BPE, or a splitting that llama.cpp has no name for.
        ExportError: no fast tokenizer, no merges, or no end token.
    """
    tokenizer, raw = _load(folder)
    model = raw["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or (raw.get("decoder") or {}).get("type") != "ByteLevel":
        raise NotWrittenHereError(
            f"{folder}: its tokenizer is {model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}; "
            f"only byte-level BPE (Llama 3, SmolLM2, Qwen, LFM2) can be exported to GGUF here. {OTHER_WAY}"
        )
    if not model["merges"]:
        raise ExportError(
            f"{folder}: its tokenizer has no merges (a test model), which llama.cpp does not load. Use a real one."
        )
    tokens, types = _tokens(folder, raw, vocab_size)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return _facts(folder, tokenizer, tokens, types, merges, pre_tokenizer_name(tokenizer.backend_tokenizer, folder))


def read_written_tokenizer(folder: Path, pre: str) -> TokenizerFacts:
    """Read what a Modelfile needs of a folder's tokenizer, whose file another program has written.

    Args:
        pre: the name under which that program wrote its splitting.

    Raises:
        ExportError: no fast tokenizer, or no end token.
    """
    tokenizer, _ = _load(folder)
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    return _facts(folder, tokenizer, tokens, [], [], pre)


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{folder}: has no fast tokenizer ({first_line(error)}). {OTHER_WAY}") from None


def _facts(
    folder: Path, tokenizer: Any, tokens: list[str], types: list[int], merges: list[str], pre: str
) -> TokenizerFacts:
    turn_end = turn_end_id(tokenizer)
    stops = _stop_ids(folder, tokenizer, turn_end)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stops[0]
    others = [turn_end] if turn_end is not None else [i for i in stops if i != eos]
    return TokenizerFacts(
        tokens=tokens,
        types=types,
        merges=merges,
        pre=pre,
        eos_id=eos,
        eot_id=others[0] if others and others[0] != eos else None,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        unk_id=tokenizer.unk_token_id,
        add_bos=_adds_bos(tokenizer),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        stop_ids=stops,
    )


def add_tokenizer_keys(writer: Any, facts: TokenizerFacts) -> None:
    """Write a tokenizer into a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts.pre)
    writer.add_token_list(facts.tokens)
    writer.add_token_types(facts.types)
    writer.add_token_merges(facts.merges)
    writer.add_eos_token_id(facts.eos_id)
    if facts.eot_id is not None:
        writer.add_eot_token_id(facts.eot_id)
    if facts.bos_id is not None:
        writer.add_bos_token_id(facts.bos_id)
    if facts.pad_id is not None:
        writer.add_pad_token_id(facts.pad_id)
    if facts.unk_id is not None:
        writer.add_unk_token_id(facts.unk_id)
    writer.add_add_bos_token(facts.add_bos)
    writer.add_add_space_prefix(False)
    if facts.chat_template:
        writer.add_chat_template(facts.chat_template)


def pre_tokenizer_name(backend: Any, where: Path | str) -> str:
    """Return llama.cpp's name for the way a `tokenizers.Tokenizer` splits text.

    Raises:
        NotWrittenHereError: no known way splits the probe text alike.
    """
    raw = json.loads(backend.to_str())
    ignore_merges = bool(raw["model"].get("ignore_merges"))
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(_PROBE)] if backend.pre_tokenizer else []
    for name, (patterns, looks_up) in PRE_TOKENIZERS.items():
        if looks_up == ignore_merges and _split(patterns) == pieces:
            return name
    raise NotWrittenHereError(
        f"{where}: no way of splitting text that llama.cpp knows matches this tokenizer's (tried: "
        f"{', '.join(PRE_TOKENIZERS)}), and a wrong one silently gives worse answers. {OTHER_WAY}"
    )


@cache
def _split(patterns: tuple[str, ...]) -> list[str]:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [piece for piece, _ in pre_tokenizers.Sequence([*steps, byte_level]).pre_tokenize_str(_PROBE)]


def _tokens(folder: Path, raw: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    by_id = {number: (token, TokenType.NORMAL) for token, number in raw["model"]["vocab"].items()}
    for added in raw.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    if max(by_id) >= vocab_size:
        raise ExportError(
            f"{folder}: the tokenizer has ids up to {max(by_id)}, the model only {vocab_size} embeddings. They are of "
            "different models: merge again."
        )
    rows = [by_id.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(vocab_size)]
    return [token for token, _ in rows], [int(kind) for _, kind in rows]


def _stop_ids(folder: Path, tokenizer: Any, turn_end: int | None) -> tuple[int, ...]:
    declared: Any = []
    path = folder / "generation_config.json"
    if path.is_file():
        declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
        declared = [declared] if isinstance(declared, int) else declared
    order = [turn_end, tokenizer.eos_token_id, *declared]
    stops = tuple(dict.fromkeys(i for i in order if i is not None))
    if not stops:
        raise ExportError(
            f"{folder}: neither the tokenizer nor generation_config.json names an end token, so a GGUF would never "
            "stop generating. Set eos_token in tokenizer_config.json."
        )
    return stops


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the special token with which the chat template ends an assistant's turn, if it does."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER-MARK"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may raise anything; then eos alone stops
        return None
    tail = tokenizer(text.rpartition("ANSWER-MARK")[2], add_special_tokens=False)["input_ids"]
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in tail if i in specials), None)


def _adds_bos(tokenizer: Any) -> bool:
    """Whether a begin token goes before what is served, as it did in training: what the chat template renders."""
    if tokenizer.bos_token_id is None:
        return False
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
        # A template that starts each turn with the "begin" token (ChatML) is no reason to add one more.
        return text.startswith(tokenizer.bos_token) and text.count(tokenizer.bos_token) == 1
    return list(tokenizer("Q")["input_ids"])[:1] == [tokenizer.bos_token_id]
