"""Shared-prefix rollouts: token for token what `generate` does, and the same distribution when sampling."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig
from trl import GRPOTrainer

from grpo_lite.engine import attention
from grpo_lite.engine.attention import Rule
from grpo_lite.engine.cache import attend_with_weight
from grpo_lite.engine.decode import GroupDecoder, decoding_obstacle, draw, plan_waves
from grpo_lite.engine.options import EngineOptions
from grpo_lite.trainer.gradients import Gradients
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from tests.tiny import (
    OUR_METRICS,
    PROMPTS,
    relative_difference,
    tiny_args,
    tiny_lora,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

# With 60 of 320 tokens ending a completion, rows finish at different steps and some never do.
ENDS = list(range(200, 260))


def prepared(kind: str = "llama", **overrides: Any) -> Any:
    model = tiny_lora(tiny_model(kind, **({"tie_word_embeddings": False} | overrides)))
    attention.install(model.get_base_model())
    return model


def batch(repeats: int = 3) -> dict[str, torch.Tensor]:
    """Rows of four groups, not sorted by group."""
    tokens = tiny_tokenizer()(PROMPTS * repeats, return_tensors="pt", padding=True)
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def run(model: Any, decoder: GroupDecoder | None = None, repeats: int = 3, **settings: Any) -> torch.Tensor:
    defaults = {"max_new_tokens": 24, "pad_token_id": 2, "eos_token_id": ENDS, "do_sample": False}
    custom = {} if decoder is None else {"custom_generate": decoder}
    with torch.no_grad():
        return model.generate(**batch(repeats), **(defaults | settings), **custom)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_greedy_output_is_that_of_generate(kind: str):
    model = prepared(kind)
    expected = run(model)
    ends = torch.isin(expected[:, -24:], torch.tensor(ENDS)).int().argmax(1).tolist()
    assert len(set(ends)) > 1, "rows should end at different steps"
    assert torch.equal(run(model, GroupDecoder(nullcontext)), expected)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"repetition_penalty": 1.4}, id="repetition penalty"),
        pytest.param({"no_repeat_ngram_size": 2}, id="no repeated bigram"),
        pytest.param({"min_new_tokens": 9}, id="least new tokens"),
        pytest.param({"suppress_tokens": list(range(50, 199))}, id="suppressed tokens"),
        pytest.param({"max_new_tokens": 1}, id="one token"),
        pytest.param({"max_new_tokens": 40, "eos_token_id": 3}, id="long, past the first buffers"),
        pytest.param({"forced_eos_token_id": 5}, id="forced last token"),
    ],
)
def test_greedy_output_with_setting(settings: dict[str, Any]):
    model = prepared()
    assert torch.equal(run(model, GroupDecoder(nullcontext), **settings), run(model, **settings))


@pytest.mark.parametrize("kv_tokens", [None, 130])
def test_a_row_that_has_ended_is_told_at_once_with_its_completion(kv_tokens: int | None):
    told: dict[int, list[int]] = {}
    passes: list[int] = []  # decoded tokens when each row was told
    decoder = GroupDecoder(nullcontext, kv_tokens)

    def ended(row: int, ids: list[int]) -> None:
        assert row not in told
        told[row] = ids
        passes.append(decoder.rollout.decode_tokens)

    decoder.ended = ended
    completions = run(prepared(), decoder)[:, batch()["input_ids"].size(1) :].tolist()
    lengths = [len(row) for row in decoder.rollout.entropies]
    assert told == {row: ids[:length] for row, (ids, length) in enumerate(zip(completions, lengths, strict=True))}
    assert len(set(passes)) == 3, "rows end at different steps"
    assert passes == sorted(passes)


@pytest.mark.parametrize("kv_tokens", [1, 60, 130, 300])
def test_waves_do_not_change_the_output(kv_tokens: int):
    model = prepared()
    assert torch.equal(run(model, GroupDecoder(nullcontext, kv_tokens)), run(model))


def test_each_prompt_is_prefilled_once_and_finished_rows_stop_costing():
    decoder = GroupDecoder(nullcontext)
    completions = run(prepared(), decoder, repeats=8)[:, batch(8)["input_ids"].size(1) :]
    lengths = [len(row) for row in decoder.rollout.entropies]
    assert decoder.rollout.prefill_tokens == int(batch(1)["attention_mask"].sum())
    # Each row needs one pass fewer than its tokens; up to an eighth of the batch may wait for its removal.
    needed = sum(lengths) - len(lengths)
    assert needed <= decoder.rollout.decode_tokens <= needed * 8 / 7 + completions.size(1)


def test_a_group_larger_than_the_budget_is_divided_and_a_row_never():
    waves = plan_waves({(1, 2): [0, 1, 2], (3,): [3, 4]}, longest=4, kv_tokens=11)
    assert [[(len(prompt), rows) for prompt, rows in wave] for wave in waves] == [
        [(2, [0, 1])],  # 2 + 2 * 4 = 10 tokens
        [(2, [2])],  # 6 of 11; the second group needs 1 + 2 * 4 = 9
        [(1, [3, 4])],
    ]
    assert plan_waves({(1, 2): [0, 1]}, longest=4, kv_tokens=1) == [[((1, 2), [0])], [((1, 2), [1])]]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="temperature 1"),
        pytest.param({"temperature": 0.6}, id="temperature"),
        pytest.param({"top_k": 5}, id="top-k"),
        pytest.param({"top_p": 0.7}, id="top-p"),
        pytest.param({"min_p": 0.05}, id="min-p"),
        pytest.param({"repetition_penalty": 1.5, "temperature": 1.3}, id="repetition penalty"),
    ],
)
def test_sampled_pairs_of_tokens_follow_the_exact_distribution(settings: dict[str, Any]):
    vocabulary, rows = 14, 6000
    model = prepared(vocab_size=vocabulary, initializer_range=0.4)
    prompts = torch.tensor([[2, 2, 5, 9], [3, 4, 6, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    config = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 2, "eos_token_id": 13, **settings}
    torch.manual_seed(0)
    with torch.no_grad():
        sampled = model.generate(
            input_ids=prompts.repeat(rows, 1),
            attention_mask=mask.repeat(rows, 1),
            max_new_tokens=2,
            custom_generate=GroupDecoder(nullcontext),
            **config,
        )[:, 4:]
        for group in range(2):
            expected = exact_pairs(model, prompts[group : group + 1], mask[group : group + 1], vocabulary, config)
            found = Counter(map(tuple, sampled[group::2].tolist()))
            assert found.keys() <= {pair for pair, p in expected.items() if p > 0}
            common = [pair for pair, p in expected.items() if p * rows >= 5]
            observed = [found[pair] for pair in common]
            wanted = [expected[pair] * rows for pair in common]
            observed.append(rows - sum(observed))
            wanted.append(max(rows - sum(wanted), 1e-9))
            if wanted[-1] < 5:  # too few to be a cell of their own
                assert observed[-1] < 25
                observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
            if len(observed) == 1:
                assert observed == [rows]
                continue
            scale = sum(observed) / sum(wanted)
            assert chisquare(observed, [cell * scale for cell in wanted]).pvalue > 1e-3


def exact_pairs(
    model: Any, prompt: torch.Tensor, mask: torch.Tensor, vocabulary: int, config: dict[str, Any]
) -> dict[tuple[int, int], float]:
    """Read the probabilities of all first and second tokens off `generate`'s own scores."""

    def next_p(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
            **config,
        )
        return out.scores[0].softmax(-1)

    first = next_p(prompt, mask)[0]
    ids = torch.cat([prompt.repeat(vocabulary, 1), torch.arange(vocabulary).unsqueeze(1)], dim=1)
    second = next_p(ids, torch.cat([mask.repeat(vocabulary, 1), torch.ones(vocabulary, 1).long()], dim=1))
    pairs: dict[tuple[int, int], float] = Counter()
    for a in range(vocabulary):
        for b in range(vocabulary):
            after = b if a != 13 else 2  # a finished row is padded
            pairs[a, after] += float(first[a]) * (float(second[a, b]) if a != 13 else 1 / vocabulary)
    return pairs


def test_a_token_of_probability_zero_is_never_drawn():
    p = torch.zeros(70, 50)
    p[:, 7] = 1e-30
    p[:, 20] = 1.0
    torch.manual_seed(0)
    assert set(torch.cat([draw(p) for _ in range(50)]).tolist()) == {20}
    p[:, 20] = 0.0
    assert set(draw(p).tolist()) == {7}


@pytest.mark.parametrize("vocabulary", [7, 256, 1000])
def test_a_draw_is_where_the_cumulative_distribution_passes_the_level(vocabulary: int):
    p = torch.softmax(torch.randn(90, vocabulary, generator=torch.Generator().manual_seed(0)) * 3, dim=-1)
    for seed in range(20):
        torch.manual_seed(seed)
        found = draw(p)
        torch.manual_seed(seed)
        cumulative = p.cumsum(-1, dtype=torch.float64)
        level = torch.rand_like(cumulative[:, -1:]) * cumulative[:, -1:]
        assert torch.equal(found, torch.searchsorted(cumulative, level, right=True).squeeze(1))


def test_drawing_from_nan_is_an_error_as_in_torch():
    p = torch.full((2, 4), 0.25)
    p[1, 1] = torch.nan
    with pytest.raises(RuntimeError, match="inf or nan"):
        draw(p)


def test_rows_drawn_follow_their_own_probabilities():
    # Row i can only draw i; 300 entries are two blocks.
    assert draw(torch.eye(300)).tolist() == list(range(300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("keys", [10, 100])
def test_both_kernels_return_attention_and_log_sum_exp(dtype: torch.dtype, keys: int):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 4, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    mask = torch.zeros(2, keys)
    mask[1, 7:] = -torch.inf
    scores = query.double() @ key.double().transpose(2, 3) * 0.3 + mask[:, None, None]
    out, weight = attend_with_weight(query.to(dtype), key.to(dtype), value.to(dtype), mask, Rule(0.3))
    precision = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ value.double(), rtol=precision, atol=precision)
    torch.testing.assert_close(weight.double(), scores.logsumexp(-1), rtol=precision, atol=precision)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 2}, "beam"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
    ],
)
def test_settings_the_decoder_does_not_know_are_named(settings: dict[str, Any], named: str):
    assert named in str(decoding_obstacle(GenerationConfig(do_sample=True, **settings)))
    assert decoding_obstacle(GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=20)) is None


def first_letter_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 3) + 0.5 * (text[:1].lower() < "n") for text in completions]


def train(trainer_class: type[GRPOTrainer], tmp_path: Path, **kwargs: Any) -> GRPOTrainer:
    settings = {
        "max_completion_length": 10,
        "max_steps": 3,
        "generation_kwargs": {"do_sample": False},
        "entropy_coef": 0.05,  # the completions of a greedy group are alike, so that only this has a gradient
        "learning_rate": 3e-3,
    } | kwargs.pop("settings", {})
    model = kwargs.pop("model", None) or tiny_lora(tiny_model(tie_word_embeddings=False))
    model.generation_config.eos_token_id = ENDS  # TRL 1.14 knows only the tokenizer's; then all rows run to the limit
    trainer = trainer_class(
        model=model,
        args=tiny_args(tmp_path, **settings),
        reward_funcs=first_letter_reward,
        train_dataset=tiny_prompts(16),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )
    trainer.train()
    return trainer


def test_a_greedy_run_with_shared_rollouts_is_the_run_with_generate(tmp_path: Path):
    plain, shared = train(GRPOTrainer, tmp_path), train(PackedGRPOTrainer, tmp_path)
    assert relative_difference(dict(shared.model.named_parameters()), dict(plain.model.named_parameters())) < 1e-4
    assert all(log["grad_norm"] > 0 for log in plain.state.log_history[:-1]), "something should be learned"
    keys = {key for log in plain.state.log_history for key in log}
    assert keys == {key for log in shared.state.log_history for key in log} - OUR_METRICS
    for mine, theirs in zip(shared.state.log_history, plain.state.log_history, strict=True):
        for key in theirs.keys() & {"reward", "entropy", "completions/mean_length", "completions/clipped_ratio"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_plain_options_are_plain_trl_bit_for_bit(tmp_path: Path):
    sampling = {"generation_kwargs": None}
    options = EngineOptions(compute="plain", rollout="generate")
    runs = [
        train(GRPOTrainer, tmp_path, settings=sampling),
        train(PackedGRPOTrainer, tmp_path, settings=sampling, options=options),
    ]
    plain, ours = (dict(trainer.model.named_parameters()) for trainer in runs)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert runs[1].model.config._attn_implementation == "sdpa"


def test_generate_is_untouched_after_a_rollout(tmp_path: Path):
    trainer = train(PackedGRPOTrainer, tmp_path)
    assert "generate" not in trainer.model.get_base_model().__dict__


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"top_p": 0.8, "temperature": 0.7}, id="sampled"),
        pytest.param({"gradient_checkpointing": True, "num_iterations": 2}, id="gradient checkpointing"),
        pytest.param({"generation_kwargs": {"do_sample": False}, "temperature": 0.6}, id="greedy"),
        pytest.param({"generation_kwargs": {"temperature": 1.4}, "temperature": 0.6}, id="sampled at another"),
    ],
)
def test_what_is_noted_in_the_rollout_is_what_training_computes(settings: dict[str, Any], tmp_path: Path):
    seen: list[list[torch.Tensor]] = []

    class Watched(PackedGRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
            with torch.no_grad(), self.support.no_checkpointing(self.model):
                logps, entropies, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, output["completion_ids"].size(1), compute_entropy=True
                )
            noted = torch.zeros_like(logps)
            assert self.rollouts.last is not None
            for row, values in enumerate(self.rollouts.last.logps):
                noted[row, : len(values)] = torch.tensor(values)
            seen.append([output["rollout_entropies"], entropies, noted, logps])
            return output

    train(Watched, tmp_path, settings={"generation_kwargs": None, "max_steps": 2} | settings)
    assert seen
    for entropies, computed_entropies, logps, computed_logps in seen:
        torch.testing.assert_close(entropies, computed_entropies, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logps, computed_logps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_iterations": 2, "beta": 0.1, "temperature": 0.8}, id="two iterations, greedy, kl"),
        pytest.param({"num_iterations": 2, "generation_kwargs": None}, id="two iterations"),
        pytest.param(
            {"steps_per_generation": 2, "generation_kwargs": None, "per_device_train_batch_size": 4},
            id="two steps a round",
        ),
    ],
)
def test_the_old_policy_needs_no_forward_after_a_shared_rollout(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"max_steps": 4, **settings}
    frozen: list[int] = []
    score_into = Gradients.score_into

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            frozen.append(1)
        return score_into(self, *args, **more)

    monkeypatch.setattr(Gradients, "score_into", counted)
    ours = train(PackedGRPOTrainer, tmp_path, settings=settings)
    # Two rounds of generation: without KL nothing is computed without a gradient, with it the reference alone.
    assert len(frozen) == (2 if settings.get("beta") else 0)
    if settings.get("beta"):
        plain = train(GRPOTrainer, tmp_path, settings=settings)
        assert relative_difference(dict(ours.model.named_parameters()), dict(plain.model.named_parameters())) < 1e-4


def test_rows_without_advantage_are_not_computed_again_after_a_shared_rollout(tmp_path: Path, monkeypatch):
    from grpo_lite.trainer import gradients as module

    tokens: list[int] = []
    score = module.score
    monkeypatch.setattr(
        module, "score", lambda model, packed, *a: tokens.append(packed.num_tokens) or score(model, packed, *a)
    )
    # Greedy groups are uniform, so that nothing has an advantage.
    settings = {"weight_decay": 0.1, "entropy_coef": 0.0}
    trainer = train(PackedGRPOTrainer, tmp_path, settings=settings)
    assert tokens == []
    plain = train(GRPOTrainer, tmp_path, settings=settings)
    assert relative_difference(dict(trainer.model.named_parameters()), dict(plain.model.named_parameters())) < 1e-5
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(plain.state.log_history[0]["entropy"], rel=1e-4)


def test_scores_are_computed_in_float32_under_autocast_too():
    """On a GPU decoding runs under autocast: scores in 16 bit would be rounded, and could not be joined in float32."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator).half() for n in (3, 70, 70))
    expected, weights = attend_with_weight(query, key, value, None, Rule(3.0))
    with torch.autocast("cpu", torch.float16):
        out, weight = attend_with_weight(query, key, value, None, Rule(3.0))
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weights)
    assert torch.equal(out, expected)
