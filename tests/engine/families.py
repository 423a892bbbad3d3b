"""Whether packed and shared compute is what transformers computes for a family of models: the comparisons.

`test_families.py` (attention, output layers) and `test_hybrid.py` (recurrent layers) build a tiny random model of every
family from its real configuration class and call these. The reference is always transformers' own forward pass or
`generate`, run before `attention.install` has touched the model, in the dtype that the model has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from grpo_lite.engine import attention
from grpo_lite.engine.decode import GroupDecoder
from grpo_lite.engine.packing import pack, plan_microbatches, read_padded_batch, token_weights, unpack
from grpo_lite.engine.router_loss import RouterLoss, has_router_loss
from grpo_lite.engine.score import Scoring, score, self_check

VOCABULARY = 96
TEMPERATURE = 0.9
# Three groups: prompts of three lengths, ragged completions, some of one token, one row without any. In the first and
# the last all completions begin alike, as far as they go.
PROMPTS = (11, 3, 7)
COMPLETIONS = ((9, 1, 14), (6, 13), (1, 0, 5))
# The same sizes where a prompt and its completions cross borders at 64 tokens.
LONG_PROMPTS = (70, 3)
LONG_COMPLETIONS = ((66, 1, 130), (64, 5))

# Every family's config takes these; what a family calls otherwise, it overrides.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(config_class: str, model_class: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Return a random model of a family whose weights are large enough for every part to matter.

    Args:
        config_class: of transformers, such as "MistralConfig".
        model_class: of transformers, such as "MistralForCausalLM"; a registry of families holds `partial`s of this
            function, with which the table in docs/models.md is compared.
        dtype: of all weights.
        settings: of the configuration, over `SIZES`; None leaves a size out.
    """
    chosen = {name: value for name, value in (SIZES | settings).items() if value is not None}
    config = getattr(transformers, config_class)(**chosen)
    config._experts_implementation = "eager"  # grouped_mm multiplies no float64
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms, sinks and biases too: at 1 and 0 they would hide mistakes
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def padded_rows(
    prompts: Sequence[int] = PROMPTS, completions: Sequence[Sequence[int]] = COMPLETIONS, seed: int = 0
) -> tuple[Tensor, Tensor, int]:
    """Return ids and mask `(B, P + C)` as TRL pads them, and C; the groups' rows stand in turn, not in blocks.

    The completions of every second group begin with the same four tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    width, longest = max(prompts), max(max(lengths) for lengths in completions)
    rows = []
    for group, (prompt, lengths) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.randint(3, VOCABULARY, (prompt,), generator=generator)
        drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
        if group % 2 == 0:
            start = torch.randint(3, VOCABULARY, (4,), generator=generator)
            drawn = [torch.cat([start, own[4:]])[: len(own)] for own in drawn]
        rows.append([(ids, own) for own in drawn])
    order = [group[i] for i in range(max(map(len, rows))) for group in rows if i < len(group)]
    ids, mask = torch.zeros(len(order), width + longest, dtype=torch.long), torch.zeros(len(order), width + longest)
    for row, (prompt_ids, completion) in enumerate(order):
        begin, end = width - len(prompt_ids), width + len(completion)
        ids[row, begin:end], mask[row, begin:end] = torch.cat([prompt_ids, completion]), 1
    return ids, mask.long(), longest


@contextmanager
def widened(model: Any) -> Iterator[None]:
    """Let what transformers computes in float32 whatever the model's dtype be computed in float64, of a float64 model.

    Positions, norms and routers are; between padded and packed rows they differ by 1e-8, their gradients by 1e-7.
    """
    with pytest.MonkeyPatch.context() as patch:
        if model.dtype == torch.float64:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(Tensor, "float", Tensor.double)
        yield


def plain_logps(model: Any, ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies `(B, C)` of the padded rows, by the model's own forward pass."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -width - 1 : -1]
    log_p = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    return log_p.gather(-1, ids[:, -width:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def check_packed_equals_plain(
    model: Any,
    prompts: Sequence[int] = PROMPTS,
    completions: Sequence[Sequence[int]] = COMPLETIONS,
    *,
    dense: bool = False,
    budget: int | None = None,
    checkpointing: bool = False,
    tolerance: float | None = None,
) -> None:
    """Compare packed log-probabilities, entropies and the gradients of all weights but the embeddings with plain ones.

    Args:
        model: from `build`, not yet installed; it is afterwards.
        prompts: lengths, one a group.
        completions: lengths, of each group.
        dense: the masked call over whole groups, else a call for each completion.
        budget: tokens of one packed row; None: all groups in one.
        checkpointing: recompute activations in backward.
        tolerance: of the relative difference; None: 1e-9 in float64, 1e-4 in float32.
    """
    allowed = tolerance or (1e-9 if model.dtype == torch.float64 else 1e-4)
    ids, mask, width = padded_rows(prompts, completions)
    valid = mask[:, -width:].bool()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    frozen = {id(parameter) for end in ends for parameter in end.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    weights = torch.linspace(-1.0, 1.0, valid.numel(), dtype=torch.float64).view(valid.shape)
    model.train(checkpointing)  # transformers checkpoints in train mode only
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with widened(model):
        plain = plain_logps(model, ids, mask, width)
        expected = _gradients(model, plain, weights, valid)
        attention.install(model)
        packed = _packed_logps(model, (ids, mask, width), dense, budget)
        found = _gradients(model, packed, weights, valid)
    if checkpointing:
        model.gradient_checkpointing_disable()
    for mine, theirs in zip(packed, plain, strict=True):
        difference, scale = (
            float((mine - theirs).detach()[valid].abs().max()),
            float(theirs.detach()[valid].abs().max()),
        )
        assert difference <= allowed * max(1.0, scale), difference
    assert found.keys() == expected.keys()
    # Of the largest gradient: some, as a key's bias, are zero but for rounding.
    largest = max(float(gradient.norm()) for gradient in expected.values())
    differences = {name: float((found[name] - gradient).norm()) / largest for name, gradient in expected.items()}
    assert max(differences.values()) <= allowed, max(differences.items(), key=lambda item: item[1])


def _packed_logps(
    model: Any, rows: tuple[Tensor, Tensor, int], dense: bool, budget: int | None
) -> tuple[Tensor, Tensor]:
    batch = read_padded_batch(*rows)
    assert batch is not None
    logps, entropies = torch.zeros((2, len(rows[0]), rows[2]), dtype=model.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_lite.engine.attention.DENSE_TOKENS", 10**6 if dense else 0)
        for pieces in plan_microbatches(batch, range(len(rows[0])), budget):
            packed = pack(batch, pieces)
            scoring = Scoring(TEMPERATURE, entropy=True, entropy_grad=True)
            values, spread = score(model, packed, scoring, nullcontext)
            assert spread is not None
            logps, entropies = unpack(values, packed, logps), unpack(spread, packed, entropies)
    return logps, entropies


def _gradients(model: Any, values: tuple[Tensor, Tensor], weights: Tensor, valid: Tensor) -> dict[str, Tensor]:
    logps, entropies = values
    loss = ((logps * weights) + 0.1 * entropies)[valid].sum()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def check_loss_with_kl(model: Any, budget: int | None = 30, beta: float = 0.1) -> None:
    """Compare a loss with a KL term (`beta` > 0) and its gradients in a LoRA adapter with plain ones.

    The reference is the model without its adapter, as TRL computes it. A token's loss is
    -A p / p.detach() + beta (e^d - d - 1) with d = log p_ref - log p; the mean over each completion's tokens (`grpo`).
    """
    allowed = 1e-9 if model.dtype == torch.float64 else 1e-4
    head = model.get_output_embeddings()
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}
    targets = {name.rpartition(".")[2] for name in linear} - {"out_proj"}  # which PEFT refuses in Mamba layers
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .*_pattern keys did not match")  # PEFT's own, for experts
        policy = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=sorted(targets)))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:  # PEFT's B is zero and float32
            parameter.data = 0.2 * torch.randn(parameter.shape, dtype=model.dtype)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained
    rows = padded_rows()
    valid = rows[1][:, -rows[2] :].to(model.dtype)
    advantages = torch.linspace(-1.0, 1.0, len(valid), dtype=model.dtype).unsqueeze(1)

    def loss_and_gradients(logps: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad(), policy.disable_adapter():
            reference = logps()
        current = logps()
        d = reference - current
        tokens = -advantages * torch.exp(current - current.detach()) + beta * (torch.exp(d) - d - 1)
        loss = ((tokens * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return loss.detach(), {name: g for name, g in zip(trained, found, strict=True) if g is not None}

    with widened(model):
        expected, gradients = loss_and_gradients(lambda: plain_logps(policy, *rows)[0])
        attention.install(model)
        found, ours = loss_and_gradients(lambda: _packed_logps(policy, rows, False, budget)[0])
    assert abs(float(found - expected)) <= allowed
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    assert ours.keys() == gradients.keys()
    differences = {name: float((ours[name] - gradient).norm()) / largest for name, gradient in gradients.items()}
    assert max(differences.values()) <= allowed, max(differences.items(), key=lambda item: item[1])


def check_router_loss(model: Any, budget: int | None = 30) -> None:
    """Compare the auxiliary loss of a mixture of experts and its gradients with that of the padded rows.

    One group has no completion tokens at all, one has a row without. Where a budget divides the groups, the gradient is
    the sum of the parts'.
    """
    allowed = 1e-9 if model.dtype == torch.float64 else 1e-4
    ids, mask, width = padded_rows((*PROMPTS, 6), (*COMPLETIONS, (0, 0)))
    batch = read_padded_batch(ids, mask, width)
    assert batch is not None
    microbatches = plan_microbatches(batch, range(len(ids)), budget, every_prompt=True)
    assert (len(microbatches) > 1) == (budget is not None)
    if not has_router_loss(model):
        pytest.skip(f"transformers {transformers.__version__} does not return its router logits")
    parameters = dict(model.named_parameters())

    def differentiate(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    def read(index: int) -> None:
        score(model, pack(batch, microbatches[index]), Scoring(1.0), nullcontext, note_router=partial(loss.note, index))

    with widened(model):
        logits = model.base_model(
            input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True
        ).router_logits
        config = model.config
        expected = load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok, mask)
        gradients = differentiate(expected)
        attention.install(model)
        loss = RouterLoss(config, token_weights(batch, microbatches))
        with torch.no_grad():
            for index in range(len(microbatches)):
                read(index)
        found: dict[str, Tensor] = {}
        for index in range(len(microbatches)):
            read(index)
            assert abs(float((loss.value() - expected).detach())) <= allowed
            for name, gradient in differentiate(loss.value()).items():
                found[name] = found[name] + gradient if name in found else gradient
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    assert largest > 1e-3
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).norm()) <= allowed * largest, name


def prompt_rows(lengths: Sequence[int], repeats: int) -> dict[str, Tensor]:
    """Return what `generate` takes: each prompt `repeats` times, in turn, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids.repeat(repeats, 1), "attention_mask": mask.repeat(repeats, 1)}


def generate(model: Any, rows: dict[str, Tensor], decoder: Any = None, **settings: Any) -> Tensor:
    """Return ids `(B, P + C)` of `generate`, by transformers' loop or by a decoder of ours."""
    # A fifth of the vocabulary ends a completion, so that rows end at different steps, and some never do.
    config = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(range(77, 96))}
    with torch.no_grad():
        return model.generate(
            **rows, **(config | settings), **({} if decoder is None else {"custom_generate": decoder})
        )


def check_greedy_equals_generate(
    model: Any,
    decoders: Sequence[Any] | None = None,
    prompts: Sequence[int] = PROMPTS,
    repeats: int = 2,
    **settings: Any,
) -> None:
    """Compare greedy completions token for token with those of `generate` on the model as it came.

    Rows end at different steps; by the first decoder they also all go on to the cap.

    Args:
        model: from `build`, not yet installed; it is afterwards.
        decoders: of ours; None: all prompts at once, and in waves.
        prompts: lengths.
        repeats: rows of each prompt.
        settings: of the generation.
    """
    model.eval()
    rows = prompt_rows(prompts, repeats)
    expected = generate(model, rows, **settings)
    attention.install(model)
    assert torch.equal(generate(model, rows, **settings), expected), "installing changed transformers' own loop"
    decoders = decoders or (GroupDecoder(nullcontext), GroupDecoder(nullcontext, kv_tokens=60))
    for decoder in decoders:
        assert torch.equal(generate(model, rows, decoder, **settings), expected), decoder
    endless = settings | {"eos_token_id": None}
    assert torch.equal(generate(model, rows, decoders[0], **endless), generate(model, rows, **endless))


def check_sampled_logps(
    model: Any, decoder: Any = None, prompts: Sequence[int] = PROMPTS, tokens: int = 20, tolerance: float = 1e-4
) -> None:
    """Compare the log-probabilities noted while sampling with those of a forward pass over the sampled rows.

    Args:
        model: from `build`; installed here.
        decoder: of ours, unused; None: a `GroupDecoder`.
        prompts: lengths.
        tokens: of every completion.
        tolerance: of the difference; a decoder notes float32.
    """
    model.eval()
    attention.install(model)
    decoder = decoder or GroupDecoder(nullcontext)
    rows = prompt_rows(prompts, 2)
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    torch.manual_seed(5)
    ids = generate(model, rows, decoder, max_new_tokens=tokens, **settings)
    mask = torch.cat([rows["attention_mask"], torch.ones(len(ids), tokens, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logps, entropies = plain_logps(model, ids, mask, tokens)
    for noted, expected in ((decoder.rollout.logps, logps), (decoder.rollout.entropies, entropies)):
        difference = float((torch.tensor(noted, dtype=expected.dtype) - expected).abs().max())
        assert difference <= tolerance, difference


def check_self_check(model: Any) -> None:
    """Let the trainer's own comparison, which decides on real weights, pass on this model."""
    model.eval()
    attention.install(model)

    with widened(model):
        reason = self_check(model, Scoring(TEMPERATURE), nullcontext, lambda *batch: plain_logps(model, *batch)[0])
    assert reason is None
