"""Generate the completions of a batch with each prompt computed once per group: a decoding loop for `generate`.

`transformers.generate` prepares everything as always (generation config, logits processors, stopping criteria) and
hands over to `GroupDecoder` through its public `custom_generate` argument. The decoder prefills each distinct prompt
once and keeps one copy of its keys and values (`cache.py`), drops finished rows from the batch, works in waves
under a budget of cached tokens, and notes the entropy of every sampled distribution and the log-probability of the
token drawn from it on the way. Rows that are a further turn of a conversation (`conversations.py`) continue from the
keys and values of the turn before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerationMode

from grpo_lite.engine import states
from grpo_lite.engine.attention import Layout
from grpo_lite.engine.cache import GroupCache
from grpo_lite.engine.conversations import Conversations, Prompt
from grpo_lite.engine.logits import LogitTransform

# Rows leave the batch when at least this share of it has finished: moving the keys and values costs about as much as
# a few decoding steps of the rows it frees.
COMPACT_SHARE = 0.125
DRAW_BLOCK = 256  # entries of a distribution whose sum is taken first


Wave = list[tuple[Prompt, list[int]]]  # prompts, each with the rows that begin with it
Ended = Callable[[int, list[int]], None]  # gets a row of the batch and its completion's token ids


class DecodingCache(Layout, Protocol):
    """A `Layout` that hears of every pass over all layers."""

    def advance(self) -> None:
        """Note that a pass over all layers is complete."""


ROW_BY_ROW = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and at which temperature its log-probability is noted."""

    do_sample: bool
    temperature: float
    scoring: float
    processors: Any = None  # None: the temperature is all there is

    @classmethod
    def read(cls, config: GenerationConfig, processors: LogitsProcessorList, scoring: float | None) -> "Sampling":
        """Return the sampling that `generate` prepared; `scoring` None: at the temperature sampled at."""
        sampling = bool(config.do_sample)
        temperature = float(config.temperature) if sampling and config.temperature else 1.0
        plain = all(type(processor) is TemperatureLogitsWarper for processor in processors)
        return cls(sampling, temperature, temperature if scoring is None else scoring, None if plain else processors)

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for a captured step to be used again."""
        settings = [(type(p).__name__, str(vars(p))) for p in self.processors or ()]
        return (self.do_sample, self.temperature, self.scoring, *settings)

    def choose(
        self, logits: Tensor, draw: Callable[[Tensor], Tensor], process: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next token of every row, its log-probability, and the distribution's entropy.

        Args:
            logits: `(rows, V)`.
            draw: samples one index per row of probabilities.
            process: applies the processors to the logits, where there are any.
        """
        log_p = torch.log_softmax(logits if self.scoring == 1.0 else logits / self.scoring, dim=-1)
        p = log_p.exp()
        if self.processors is not None:
            scores = process(logits)
            tokens = draw(torch.softmax(scores, dim=-1)) if self.do_sample else scores.argmax(-1)
        elif self.do_sample:
            tokens = draw(p if self.scoring == self.temperature else torch.softmax(logits / self.temperature, dim=-1))
        else:
            tokens = logits.argmax(-1)
        return tokens, log_p.gather(1, tokens.unsqueeze(1)).squeeze(1), (p * log_p).sum(-1).neg_()


@dataclass
class Rollout:
    """What a rollout computed besides the token ids."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    # Per row and completion token, of the whole distribution at the decoder's temperature (no top-p and the like).
    entropies: list[list[float]] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)


@dataclass
class GroupDecoder:
    """A `custom_generate` callable for sampling and greedy decoding.

    Args:
        autocast: Makes the context to run the model in.
        kv_tokens: Most tokens whose keys and values are held at once; None for no limit.
        rollout: Filled while decoding.
        temperature: At which entropies and log-probabilities are noted; None for the one sampled at.
        stream: Called with the first row's tokens as they come.
        conversations: What is kept of the rows between turns; None where a row has one turn.
        ended: Called with a row of the batch and its completion when that has ended: on a CPU at once, elsewhere at the
            end of its wave, as reading waits for the device.
    """

    autocast: Callable[[], AbstractContextManager[Any]]
    kv_tokens: int | None = None
    rollout: Rollout = field(default_factory=Rollout)
    temperature: float | None = None
    stream: Callable[[list[int]], None] | None = None
    conversations: Conversations | None = None
    ended: Ended | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # naming `attention_mask` would keep `generate` from seeing it
    ) -> Tensor:
        """Return `input_ids` `(B, P)` followed by the completions, padded: `(B, P + C)`."""
        rows = [tuple(ids) for ids in unpadded(input_ids, model_kwargs.get("attention_mask"))]
        longest = int(cast(int, generation_config.max_length)) - input_ids.size(1)
        self.rollout.entropies = [[] for _ in range(input_ids.size(0))]
        self.rollout.logps = [[] for _ in range(input_ids.size(0))]
        pad = generation_config._pad_token_tensor
        finished: dict[int, Tensor] = {}
        with self.autocast():  # once, so that the adapter's weights are cast once
            for wave, is_held in self._turn(model, rows, longest):
                settings = (logits_processor, stopping_criteria, generation_config)
                finished |= self._decode(model, input_ids, rows, wave, is_held, *settings)
        width = max(len(ids) for ids in finished.values())
        out = input_ids.new_full((input_ids.size(0), width), 0 if pad is None else int(pad))
        for row, ids in finished.items():
            out[row, : len(ids)] = ids
        return out

    @torch.no_grad()
    def rehearse(self, model: PreTrainedModel, prompt_ids: list[list[int]], longest: int, capacity: int) -> None:
        """Decode one token of the largest wave behind full buffers; draws nothing.

        Args:
            model: as for a rollout.
            prompt_ids: of every row, all of one length.
            longest: the cap on a completion's tokens.
            capacity: tokens for which a row's buffer is laid out at that length.
        """
        with self.autocast():
            waves = self._waves(model, group_rows(prompt_ids), longest)
        wave = max(waves, key=lambda groups: sum(len(p) + len(members) * longest for p, members in groups))
        device, length = model.device, len(prompt_ids[0])
        groups = torch.tensor([group for group, (_, members) in enumerate(wave) for _ in members], device=device)
        flat = torch.tensor([token for ids, _ in wave for token in ids], device=device).unsqueeze(0)
        positions = torch.arange(length, device=device).repeat(len(wave)).unsqueeze(0)
        cache = GroupCache([length] * len(wave), groups)
        with self.autocast():
            hidden_states(model, flat, positions, cache)
            cache.fill(max(0, longest - 2), capacity)
            last = torch.full((len(groups), 1), length + cache.generated, device=device)
            hidden = hidden_states(model, torch.zeros_like(last), last, cache)[:, 0]
            log_p = torch.log_softmax(next_logits(model, hidden) / 0.9, dim=-1)
            (log_p.exp() * log_p).sum(-1)

    @torch.no_grad()
    def _waves(self, model: PreTrainedModel, prompts: dict[tuple[int, ...], list[int]], longest: int) -> list[Wave]:
        """Divide groups into waves; a row's recurrent states count beside its keys and values.

        memory/phases.py plans states for as many rows as `kv_tokens` hold at full length: the budget grows by those.
        """
        if self.kv_tokens is None or not states.has_mixers(model):
            return plan_waves(prompts, longest, self.kv_tokens)
        if self.conversations is None:
            held, longest_row = state_tokens(model), max(map(len, prompts)) + longest
        else:
            held, longest_row = self.conversations.state_tokens, self.conversations.most_tokens
        return plan_waves(prompts, longest + held, self._budget(self.kv_tokens, longest_row, held))

    def _budget(self, kv_tokens: int, longest_row: int, held: int) -> int:
        """Return `kv_tokens` with the states, worth `held` tokens each, of as many of the longest rows as it holds."""
        return kv_tokens + max(1, kv_tokens // longest_row) * held

    def _turn(self, model: PreTrainedModel, rows: list[Prompt], longest: int) -> Iterator[tuple[Wave, bool]]:
        """Yield the waves of a turn, and whether keys and values of their rows are held."""
        conversations = self.conversations
        if conversations is None:
            yield from ((wave, False) for wave in self._waves(model, group_rows(rows), longest))
            return
        conversations.begin(rows)
        if self.kv_tokens is not None and states.has_mixers(model) and not conversations.state_tokens:
            conversations.state_tokens = state_tokens(model)

        def waves(members: list[int]) -> list[Wave]:
            groups: dict[Prompt, list[int]] = {}
            for i in members:
                groups.setdefault(conversations.start(rows[i]), []).append(i)
            return self._waves(model, groups, conversations.longest) if groups else []

        rest = [i for i in range(len(rows)) if not conversations.is_held(i)]
        for wave in waves([i for i in range(len(rows)) if conversations.is_held(i)]):
            held = [(prompt, [i for i in own if conversations.is_held(i)]) for prompt, own in wave]
            rest += [i for _, own in wave for i in own if not conversations.is_held(i)]  # dropped for want of room
            if held := [(prompt, own) for prompt, own in held if own]:
                yield held, True
        for has_more in (False, True):
            members = [i for i in rest if (len(rows[i]) > len(conversations.start(rows[i]))) is has_more]
            yield from ((wave, False) for wave in waves(members))

    def _begin(
        self, model: PreTrainedModel, rows: list[Prompt], wave: Wave, is_held: bool
    ) -> tuple[GroupCache, Tensor]:
        """Read what is not held of a wave's rows; return the cache and the logits `(rows, V)` of what follows them."""
        conversations, members = self.conversations, [rows[i] for _, own in wave for i in own]
        if is_held and conversations is not None:
            cache, new = conversations.resume(wave, rows)
            self._make_room(cache.tokens, len(members))
            return cache, self._extend(model, cache, members, new)
        longest = max(len(rows[i]) - len(prompt) for prompt, own in wave for i in own)
        self._make_room(sum(len(prompt) for prompt, _ in wave) + len(members) * longest, len(members))
        device = model.device
        groups = torch.tensor([group for group, (_, own) in enumerate(wave) for _ in own], device=device)
        cache = GroupCache([len(prompt) for prompt, _ in wave], groups, keeps_prompts=conversations is not None)
        ends = torch.tensor([len(prompt) for prompt, _ in wave], device=device).cumsum(0) - 1
        flat = torch.tensor([token for prompt, _ in wave for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(prompt), device=device) for prompt, _ in wave])
        hidden = hidden_states(model, flat.unsqueeze(0), positions.unsqueeze(0), cache)[0, ends]
        self.rollout.prefill_tokens += len(flat)
        if conversations is not None:
            conversations.widest_pass = max(conversations.widest_pass, len(flat))
            new = [len(rows[i]) - len(prompt) for prompt, own in wave for i in own]
            if all(new):
                cache.make_place(new)
                return cache, self._extend(model, cache, members, new)
        return cache, next_logits(model, hidden)[groups]  # the rows of a group share their first distribution

    def _make_room(self, tokens: int, rows: int) -> None:
        """Drop what is kept between turns where a wave's tokens and its rows' states would not fit beside it."""
        conversations = self.conversations
        if conversations is not None and self.kv_tokens is not None:
            held = conversations.state_tokens
            budget = self._budget(self.kv_tokens, conversations.most_tokens, held)
            conversations.make_room(budget - tokens - rows * held)

    def _extend(self, model: PreTrainedModel, cache: GroupCache, rows: list[Prompt], new: list[int]) -> Tensor:
        """Read the last tokens of rows, no more at once than a pass over prompts has read; return what follows."""
        assert self.conversations is not None
        logits: list[Tensor] = []
        for first, last in _passes(new, self.conversations.widest_pass):
            counts = new[first:last]
            ids = [token for ids, count in zip(rows[first:last], counts, strict=True) for token in ids[-count:]]
            places = [
                place
                for ids, count in zip(rows[first:last], counts, strict=True)
                for place in range(len(ids) - count, len(ids))
            ]
            flat = torch.tensor([[ids], [places]], device=model.device)
            cache.extend(range(first, last), counts)
            ends = torch.tensor(counts, device=model.device).cumsum(0) - 1
            logits.append(next_logits(model, hidden_states(model, flat[0], flat[1], cache)[0, ends]))
            self.rollout.prefill_tokens += len(ids)
        return torch.cat(logits)

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        prompts: list[Prompt],
        wave: Wave,
        is_held: bool,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> dict[int, Tensor]:
        """Decode the rows of one wave to the end of their turn."""
        device, conversations = input_ids.device, self.conversations
        cache, logits = self._begin(model, prompts, wave, is_held)
        rows = torch.tensor([row for _, members in wave for row in members], device=device)
        positions = torch.tensor([len(prompts[row]) for _, members in wave for row in members], device=device)
        starts = {row: prompt for prompt, members in wave for row in members}
        ids = input_ids[rows]
        live = torch.ones(len(rows), dtype=torch.bool, device=device)
        left = None if conversations is None else torch.tensor([conversations.left(prompts[row]) for row in starts])
        finished: dict[int, Tensor] = {}
        noted: list[tuple[Tensor, Tensor]] = []  # rows, (2, rows); read at the end, as reading waits for the device
        while True:
            tokens, notes = self._choose(ids, logits, processors, config, rows)
            noted.append((rows[live], notes[:, live]))
            if self.stream is not None and bool(((rows == 0) & live).any()):
                self.stream(tokens[rows == 0].tolist())
            ids = torch.cat([ids, tokens.unsqueeze(1)], dim=1)
            stopped = criteria(ids, None) & live
            if left is not None:
                left = left - 1
                stopped |= (left == 0).to(device) & live
            for index in stopped.nonzero().squeeze(1).tolist():
                row = int(rows[index])
                finished[row] = ids[index]
                if self.ended is not None and device.type == "cpu":
                    self.ended(row, ids[index, input_ids.size(1) :].tolist())
                if conversations is not None and left is not None and left[index] > 0:  # it may get a further turn
                    own = ids[index, input_ids.size(1) - len(prompts[row]) + len(starts[row]) : -1]
                    conversations.keep(starts[row], tuple(own.tolist()), cache.contents(index))
            live = live & ~stopped
            count = int(live.sum())
            if count == 0:
                break
            if len(live) - count >= max(1, COMPACT_SHARE * len(live)):
                keep = live.nonzero().squeeze(1)
                cache.keep_rows(keep)
                ids, tokens, positions, rows, live = (x[keep] for x in (ids, tokens, positions, rows, live))
                left = None if left is None else left[keep.to(left.device)]
            self._make_room(cache.tokens + len(tokens), len(tokens))
            hidden = hidden_states(model, tokens.unsqueeze(1), positions.unsqueeze(1), cache)[:, 0]
            self.rollout.decode_tokens += len(tokens)
            logits = next_logits(model, hidden)
            positions = positions + 1
        for step_rows, values in noted:
            for row, entropy, logp in zip(step_rows.tolist(), *values.tolist(), strict=True):
                self.rollout.entropies[row].append(entropy)
                self.rollout.logps[row].append(logp)
        if self.ended is not None and device.type != "cpu":
            for row, row_ids in finished.items():
                self.ended(row, row_ids[input_ids.size(1) :].tolist())
        if conversations is not None:
            conversations.finish([prompt for prompt, _ in wave], cache)
        return finished

    def _choose(
        self, ids: Tensor, logits: Tensor, processors: LogitsProcessorList, config: GenerationConfig, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next token of every row, and `(2, rows)`: the distributions' entropies, the tokens' log-probs."""
        sampling = Sampling.read(config, processors, self.temperature)
        tokens, logps, entropies = sampling.choose(
            logits, draw, lambda logits: process(ids, logits, processors, rows, len(self.rollout.entropies))
        )
        return tokens, torch.stack([entropies, logps])


def unpadded(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Return the prompts of ids `(B, P)` that are padded on the left where the mask is 0."""
    if mask is None:
        mask = torch.ones_like(input_ids)
    rows = zip(input_ids.tolist(), mask.sum(1).tolist(), strict=True)
    return [ids[len(ids) - count :] for ids, count in rows]


def group_rows(prompts: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return the distinct prompts, each with its rows, in the order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, ids in enumerate(prompts):
        groups.setdefault(tuple(ids), []).append(row)
    return groups


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, cache: DecodingCache) -> Tensor:
    """Run the model on ids `(B, L)`, its attention by `cache`; return the last hidden states `(B, L, H)`."""
    no_mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=ids.device)  # see score.score
    out = model.base_model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=no_mask,
        use_cache=False,
        **states.arguments(model, cache),
    )
    cache.advance()
    hidden: Tensor = out.last_hidden_state
    return hidden


def state_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens' keys and values take as much as the recurrent states of one row, rounded up."""
    cache = GroupCache([2], torch.zeros(1, dtype=torch.long, device=model.device))
    pair = torch.arange(2, device=model.device).unsqueeze(0)
    hidden_states(model, pair, pair, cache)
    per_token = sum(keys.nbytes + values.nbytes for keys, values in cache.prompts.values()) // 2
    return -(-sum(rows.num_bytes for rows in cache.states.values()) // max(1, per_token))


def next_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the next-token logits `(rows, V)` of hidden states `(rows, H)`, in float32."""
    head = cast(Callable[[Tensor], Tensor], model.get_output_embeddings())
    return LogitTransform.read(model.config).apply(head(hidden).float())


def process(ids: Tensor, logits: Tensor, processors: LogitsProcessorList, rows: Tensor, batch_size: int) -> Tensor:
    """Apply `generate`'s logits processors to the rows still in the batch.

    Some processors are bound to the rows of the whole batch (transformers 5.23's repetition penalty skips each row's
    own padding): unless all are known not to be, they see the batch at its full size.
    """
    if all(type(processor) in ROW_BY_ROW for processor in processors):
        return processors(ids, logits)
    all_ids, all_logits = ids[:1].repeat(batch_size, 1), logits[:1].repeat(batch_size, 1)
    all_ids[rows], all_logits[rows] = ids, logits
    return processors(all_ids, all_logits)[rows]


def decoding_obstacle(config: GenerationConfig) -> str | None:
    """Return which setting the decoder does not support, or None."""
    if config.get_generation_mode() not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        return f"the generation mode is {config.get_generation_mode().value}"
    for name in ("cache_implementation", "guidance_scale", "watermarking_config", "stop_strings"):
        if getattr(config, name, None) is not None:
            return f"generation_kwargs set {name}"
    if (config.num_return_sequences or 1) != 1:
        return "generation_kwargs set num_return_sequences"
    return None


def _passes(counts: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Divide rows with so many tokens into ranges of at most `budget` tokens, or of one row."""
    first = total = 0
    for row, count in enumerate(counts):
        if row > first and total + count > budget:
            yield first, row
            first, total = row, 0
        total += count
    yield first, len(counts)


def plan_waves(prompts: dict[Prompt, list[int]], longest: int, kv_tokens: int | None) -> list[Wave]:
    """Divide groups into waves whose keys and values stay within `kv_tokens` even if every row reaches its limit.

    `longest` is what a row takes besides its prompt: tokens, and what its recurrent states are worth in tokens.

    A group too large for a wave is divided, repeating its prompt; one row is never divided.
    """
    waves: list[Wave] = []
    room = -1
    for prompt, members in prompts.items():
        rest = list(members)
        while rest:
            if kv_tokens is None:
                fit = len(rest)
            else:
                fit = (room - len(prompt)) // longest
                if fit < 1 or (fit < len(rest) <= (kv_tokens - len(prompt)) // longest):
                    waves.append([])
                    room = kv_tokens
                    fit = max(1, (room - len(prompt)) // longest)
            if not waves:
                waves.append([])
            taken, rest = rest[:fit], rest[fit:]
            waves[-1].append((prompt, taken))
            room -= len(prompt) + len(taken) * longest
    return waves


def draw(p: Tensor) -> Tensor:
    """Sample one index per row of probabilities `(rows, V)`.

    On CPU by inverting the cumulative distribution, first of blocks, then within one: `torch.multinomial` draws an
    exponential variate per entry, which took 180 ms for 128 x 49152. In float64, so that the tail of the vocabulary
    keeps its share.
    """
    if p.device.type != "cpu":
        return race(p)
    if missing := -p.size(1) % DRAW_BLOCK:
        p = nn.functional.pad(p, (0, missing))
    blocks = p.reshape(p.size(0), -1, DRAW_BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()) or bool((total <= 0).any()):
        raise RuntimeError("the model's next-token probabilities contain inf or nan")
    level = _below(torch.rand_like(total) * total, total)
    block = torch.searchsorted(cumulative, level, right=True)
    within = blocks[torch.arange(len(p)), block.squeeze(1)].cumsum(-1, dtype=torch.float64)
    rest = (level - (cumulative - sums).gather(1, block)).clamp_(min=0.0)
    place = torch.searchsorted(within, _below(rest, within[:, -1:]), right=True)
    return (block * DRAW_BLOCK + place).squeeze(1)


def _below(level: Tensor, total: Tensor) -> Tensor:
    """Return levels strictly below the total, so that no entry of probability zero is reached."""
    return level.clamp_(max=torch.nextafter(total, torch.zeros_like(total)))


def race(p: Tensor) -> Tensor:
    """Sample one index per row of probabilities `(rows, V)`: the first to arrive, of exponential waiting times.

    What `torch.multinomial` computes, without its look at the probabilities, which waits for the device and, where one
    is not a number, ends the process. Draws the same numbers from the random state, and fits into a CUDA graph.
    """
    return (p / torch.empty_like(p).exponential_()).argmax(-1)
