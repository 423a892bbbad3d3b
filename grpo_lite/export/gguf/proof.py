"""Prove a GGUF: load the file with another program and compare it with the merged model on held-out prompts.

llama-cpp-python is used where it is installed: Ollama runs the same library, so tokenizer and stopping are proven too.
Otherwise transformers' GGUF loader proves the weights and the end token, but not llama.cpp's text splitting.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import importlib.metadata
import importlib.util
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo_lite.engine.generate import stop_ids
from grpo_lite.errors import ExportError, first_line
from grpo_lite.export.model_folder import dtype_that_fits, load_saved_tokenizer, load_whole
from grpo_lite.export.proof import DECIDED_LEAD, greedy_answers, last_logits

# Least share of positions at which the file and the merged model agree on the next token, given the same text before:
# everywhere, and where the merged model leads by DECIDED_LEAD. Rounding flips near ties only; wrong weights
# or orders agree on a few per cent. Measured on SmolLM2-135M (docs/measurements/export.md), everywhere and away from
# ties: f16, bf16 99.6 to 100 % and 100 %; q8_0 95.8 to 99 % and 100 %; q6_k 95.9 % and 100 %; q4_k_m 88.8 % and 94 %.
# The limits of K-quants leave room for smaller kinds: they catch wrong weights, not lost
# quality, which shows in answers that do not end.
LEAST_AGREEMENT = {"f16": 0.9, "bf16": 0.9, "q8_0": 0.85}
LEAST_AGREEMENT_K = 0.6
LEAST_DECIDED_AGREEMENT = {"f16": 0.97, "bf16": 0.97, "q8_0": 0.93}
LEAST_DECIDED_AGREEMENT_K = 0.75
LEAST_STOPPED = 0.5  # of the answers that the merged model ends; q6_k ended 6 of 7, q4_k_m of a 135M model 1 of 7


@dataclass(frozen=True)
class GgufProof:
    """How a GGUF file answers, compared with the merged model it was made from."""

    loader: str
    prompts: int
    tokens: int  # of the merged model's greedy answers, over all prompts
    top1_agreement: float  # over those tokens
    decided_agreement: float  # over those of them where the merged model leads clearly; 1 if nowhere
    same_answers: int  # greedy answers that are equal to the last character
    stopped_merged: int  # greedy answers that ended by an end token before the cap
    stopped: int
    tokenised_alike: bool | None  # None: the loader has no tokenizer of llama.cpp's
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """Return plain data, with `passed`."""
        return dataclasses.asdict(self) | {"passed": self.passed}

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"{self.loader}: next-token agreement {self.top1_agreement:.1%} over {self.tokens} tokens "
            f"({self.decided_agreement:.1%} away from ties), "
            f"{self.same_answers} of {self.prompts} greedy answers identical, {self.stopped} ended by themselves "
            f"(merged model: {self.stopped_merged})"
        )


@dataclass(frozen=True)
class _Answer:
    ids: list[int]  # with the end token, if it came
    text: str
    stopped: bool
    decided: list[bool] = field(default_factory=list)  # of each token: whether it led by DECIDED_LEAD


def prove_gguf(
    gguf_file: Path, kind: str, merged_dir: Path, prompts: Sequence[str], *, max_new_tokens: int = 32, loader: str = ""
) -> GgufProof:
    """Compare a GGUF file with the merged model it was made from.

    Args:
        prompts: held-out prompts as rendered text (special tokens are not added again).
        max_new_tokens: cap of the greedy answers.
        loader: "llama_cpp" or "transformers"; by default the first that is installed.

    Raises:
        ExportError: no prompts, or the file does not load.
    """
    if not prompts:
        raise ExportError("gguf: there are no prompts to prove the file on. Give held-out prompts as text.")
    loader = loader or ("llama_cpp" if importlib.util.find_spec("llama_cpp") else "transformers")
    if loader == "transformers" and (fault := _unread_by_transformers(gguf_file)):
        raise ExportError(fault)
    tokenizer, ids, answers = _merged_answers(merged_dir, prompts, max_new_tokens)
    compare = _by_llama_cpp if loader == "llama_cpp" else _by_transformers
    try:
        best, own_answers, alike = compare(gguf_file, tokenizer, list(prompts), ids, answers, max_new_tokens)
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        struct.error,
    ) as error:  # damaged files
        raise ExportError(f"{gguf_file}: {loader} does not load it: {first_line(error)}") from error
    hits = [a == b for answer, row in zip(answers, best, strict=True) for a, b in zip(answer.ids, row, strict=True)]
    agreement = sum(hits) / max(1, len(hits))
    stopped, stopped_merged = sum(a.stopped for a in own_answers), sum(a.stopped for a in answers)
    sure = [hit for hit, decided in zip(hits, (d for a in answers for d in a.decided), strict=True) if decided]
    decided_agreement = sum(sure) / len(sure) if sure else 1.0
    faults = list(_agreement_faults(kind, agreement, decided_agreement))
    if alike is False:
        faults.append("llama.cpp splits the prompts into other tokens than the tokenizer that the model was trained on")
    faults += stop_faults(stopped, stopped_merged, len(prompts))
    version = _version(loader)
    return GgufProof(
        loader=f"{loader} {version}".strip(),
        prompts=len(prompts),
        tokens=len(hits),
        top1_agreement=agreement,
        decided_agreement=decided_agreement,
        same_answers=sum(a.text == b.text for a, b in zip(answers, own_answers, strict=True)),
        stopped_merged=stopped_merged,
        stopped=stopped,
        tokenised_alike=alike,
        faults=tuple(faults),
    )


def _agreement_faults(kind: str, agreement: float, decided: float) -> Iterator[str]:
    for share, least, where in (
        (agreement, LEAST_AGREEMENT.get(kind, LEAST_AGREEMENT_K), ""),
        (decided, LEAST_DECIDED_AGREEMENT.get(kind, LEAST_DECIDED_AGREEMENT_K), " away from ties"),
    ):
        if share < least:
            yield f"agrees with the merged model on {share:.1%} of the next tokens{where}; the minimum is {least:.0%}"


def stop_faults(stopped: int, stopped_merged: int, prompts: int) -> list[str]:
    """Return what is wrong when far fewer answers end by themselves than the merged model's do."""
    if stopped >= LEAST_STOPPED * stopped_merged:
        return []
    return [
        f"answers do not end: of {prompts} the merged model ended {stopped_merged} by itself, the file {stopped}. A "
        "larger kind keeps what this one rounds away"
    ]


def _version(loader: str) -> str:
    return importlib.metadata.version({"llama_cpp": "llama-cpp-python"}.get(loader, loader))


def _merged_answers(merged_dir: Path, prompts: Sequence[str], cap: int) -> tuple[Any, list[list[int]], list[_Answer]]:
    tokenizer = load_saved_tokenizer(merged_dir)
    model = load_whole(merged_dir, dtype_that_fits(merged_dir))
    ids = [list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    answers = _answers(model, tokenizer, ids, cap)
    for prompt, answer in zip(ids, answers, strict=True):
        best = _answer_logits(model, prompt, answer).topk(2, dim=-1).values
        answer.decided.extend((best[:, 0] - best[:, 1] >= DECIDED_LEAD).tolist())
    del model
    gc.collect()
    return tokenizer, ids, answers


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], cap: int) -> list[_Answer]:
    stops = stop_ids(model, tokenizer)
    return [
        _Answer(new, tokenizer.decode(new, skip_special_tokens=True), bool(new) and new[-1] in stops)
        for new in greedy_answers(model, prompts, cap, stops)
    ]


def _answer_logits(model: Any, prompt: list[int], answer: _Answer) -> torch.Tensor:
    """Return the logits that predict each token of an answer, (tokens, V)."""
    return last_logits(model, torch.tensor([prompt + answer.ids]), len(answer.ids) + 1)[:-1]


Compared = tuple[list[list[int]], list[_Answer], bool | None]  # best next tokens, own answers, tokenised alike


def _by_transformers(
    path: Path, tokenizer: Any, prompts: list[str], ids: list[list[int]], answers: list[_Answer], cap: int
) -> Compared:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = dtype_that_fits(Path(tokenizer.name_or_path)) or torch.bfloat16
    known: dict[str, Any] = {}
    config = AutoConfig.from_pretrained(tokenizer.name_or_path)  # the merged folder's
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        known["config"] = config  # transformers 5.23 does not read rope_freqs.weight, which llama.cpp applies
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **known).eval()
    own = _own_tokenizer(path, tokenizer)
    model.generation_config.eos_token_id = None  # the file's own end token has to stop it
    best = [
        _answer_logits(model, prompt, answer).argmax(-1).tolist() for prompt, answer in zip(ids, answers, strict=True)
    ]
    own_answers = _answers(model, own, ids, cap)
    return best, own_answers, None


def _unread_by_transformers(path: Path) -> str | None:
    """Return what to do where transformers' loader does not know a file's architecture; None where it does."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    try:
        field = GGUFReader(path).get_field("general.architecture")
    except (OSError, ValueError, LookupError, struct.error):  # damaged: the loader says how
        return None
    arch = "" if field is None else str(field.contents())
    if not arch or arch in GGUF_SUPPORTED_ARCHITECTURES:
        return None
    return (
        f"{path}: is written, and not proven: transformers does not load GGUF files of architecture {arch}. Install "
        "llama-cpp-python (pip install llama-cpp-python), which proves it, and export again."
    )


def _own_tokenizer(path: Path, merged: Any) -> Any:
    """Return the file's tokenizer; where transformers cannot build it, the merged model's with the file's end token."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except AttributeError:  # transformers 5.17 asks a Llama file that has no beginning token for its id
        own, field = copy.deepcopy(merged), GGUFReader(path).get_field("tokenizer.ggml.eos_token_id")
        own.eos_token = None if field is None else merged.convert_ids_to_tokens(int(field.contents()))
        return own


def llama_cpp_greedy(model: Any, prompt: list[int], cap: int) -> list[int]:
    """Return llama.cpp's greedy continuation of token ids, its end token included if it comes before the cap.

    Not create_completion: it waits for whole characters, past every cap if a model never completes one.
    """
    lib = importlib.import_module("llama_cpp")
    vocabulary = lib.llama_model_get_vocab(model.model)
    new: list[int] = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        new.append(int(token))
        if len(new) == cap or lib.llama_vocab_is_eog(vocabulary, token):
            break
    return new


def _by_llama_cpp(
    path: Path, tokenizer: Any, prompts: list[str], ids: list[list[int]], answers: list[_Answer], cap: int
) -> Compared:
    lib = importlib.import_module("llama_cpp")
    longest = max(len(prompt) for prompt in ids) + cap + 8
    model = lib.Llama(
        model_path=str(path), n_ctx=longest, n_batch=longest, logits_all=True, n_gpu_layers=0, verbose=False
    )
    vocabulary = lib.llama_model_get_vocab(model.model)
    best, own_answers = [], []
    for prompt, answer in zip(ids, answers, strict=True):
        model.reset()
        model.eval(prompt + answer.ids)
        first, last = len(prompt) - 1, len(prompt) + len(answer.ids) - 1
        best.append([int(row.argmax()) for row in model.scores[first:last]])
        model.reset()
        new = llama_cpp_greedy(model, prompt, cap)
        stopped = bool(lib.llama_vocab_is_eog(vocabulary, new[-1]))
        own_answers.append(_Answer(new, tokenizer.decode(new, skip_special_tokens=True), stopped))
    own = [model.tokenize(text.encode("utf-8"), add_bos=False, special=True) for text in prompts]
    model.close()
    return best, own_answers, own == ids
