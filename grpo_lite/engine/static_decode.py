"""Generate on a GPU without waiting for it: rows and buffers of fixed size, a step that a CUDA graph can hold.

On a GPU a decoding step of a small model costs what its kernel launches cost, thousands a token, and every look at a
result waits for all of them. Here a step launches few kernels (`decoding_layers.py`), samples, notes log-probability
and entropy and marks ended rows on the device. The host looks every `LOOK` tokens, gives the rows that have ended to
the prompts that wait, and halves the batch when none do. `graphs.py` replays the step as one launch.

The ladder: graph, the same step launched kernel by kernel, `decode.GroupDecoder`; each step down is one log line.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from grpo_lite.engine.attention import is_explicit, narrowed
from grpo_lite.engine.cache import GroupCache
from grpo_lite.engine.conversations import Conversations, Holder, Place, Prompt
from grpo_lite.engine.decode import (
    ROW_BY_ROW,
    Ended,
    GroupDecoder,
    Rollout,
    Sampling,
    group_rows,
    hidden_states,
    next_logits,
    race,
    unpadded,
)
from grpo_lite.engine.decoding_layers import DecodingLayers
from grpo_lite.engine.graphs import StepGraphs, Switch
from grpo_lite.engine.out_of_memory import is_out_of_memory
from grpo_lite.engine.row_cache import Kept, RowCache, row_length, seen_length

logger = logging.getLogger(__name__)

LOOK = 8  # steps between the host's looks at which rows have ended
FEWEST_ROWS = 8  # the batch is not halved below: a step of fewer rows takes as long
KEPT_SHARE = 0.125  # buffers that take less of the card's memory stay between rollouts, and the graphs with them
REFILL_SHARE = 0.125  # rows are filled again when at least this share of them has ended
READ_AT_ONCE = 1024  # tokens of a further turn, padding counted
SCORED_AT_ONCE = 128  # the same where attention is computed score by score


@dataclass
class StaticDecoder:
    """A `custom_generate` callable for a GPU; takes and returns what `GroupDecoder` does.

    Args:
        autocast: makes the context that `GroupDecoder` runs the model in, where this decoder steps aside.
        kv_tokens: most tokens whose keys and values are held at once; None for no limit.
        rollout: filled while decoding.
        temperature: at which entropies and log-probabilities are noted; None for the one sampled at.
        stream: called with the first row's tokens, up to `LOOK` at a time.
        conversations: as for `GroupDecoder`; here the rows stay in their buffers, for which `Engine.end_rollout` has to
            be called when the last turn is over.
        ended: called with a row of the batch and its completion when that has ended, `LOOK` tokens later: with the next
            look, so that the host waits no more often. Not called for rows that end last.
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
        **model_kwargs: Any,
    ) -> Tensor:
        """Return `input_ids` `(B, P)` followed by the completions, padded: `(B, P + C)`."""
        engine = engine_of(model)
        arguments = (model, input_ids, logits_processor, stopping_criteria, generation_config)
        random_state = torch.cuda.get_rng_state_all() if input_ids.device.type == "cuda" else None
        streamed = _Counted(self.stream) if self.stream else None
        try:
            with torch.inference_mode(False), torch.no_grad():
                if engine.serves(self.autocast, logits_processor, stopping_criteria):
                    return self._generate(engine, *arguments[1:], model_kwargs.get("attention_mask"), streamed)
        except Exception as error:  # whatever it is: the other decoder has none of these kernels
            engine.release()
            if is_out_of_memory(error) or isinstance(error, NotFiniteError):
                raise
            engine.step_aside(f"{type(error).__name__}: {error}")
            if random_state is not None:
                torch.cuda.set_rng_state_all(random_state)
        rest = streamed.rest if streamed else None
        settings = (self.autocast, self.kv_tokens, self.rollout, self.temperature, rest, self.conversations, self.ended)
        return GroupDecoder(*settings)(*arguments, **model_kwargs)

    def _generate(
        self,
        engine: Engine,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        mask: Tensor | None,
        stream: Callable[[list[int]], None] | None,
    ) -> Tensor:
        cap = int(cast(int, config.max_length)) - input_ids.size(1)
        stops = config.eos_token_id if any(isinstance(c, EosTokenCriteria) for c in criteria) else ()
        rows = [tuple(ids) for ids in unpadded(input_ids, mask)]
        conversations = self.conversations
        turn = None if conversations is None else Turn.read(rows, conversations, cap)
        job = Job(
            prompts=group_rows(rows if conversations is None else [conversations.start(ids) for ids in rows]),
            rows=len(rows),
            cap=cap,
            stops=(stops,) if isinstance(stops, int) else tuple(stops or ()),
            sampling=Sampling.read(config, processors, self.temperature),
            kv_tokens=self.kv_tokens,
            stream=stream,
            turn=turn,
            ended=self.ended,
        )
        with torch.autocast(input_ids.device.type, enabled=False):
            held = {}
            if conversations is not None:
                conversations.begin(rows, engine.buffers(job).holder)
                held = conversations.places(job.at_once)
            results = engine.run(job, held)
        if conversations is None or turn is None:
            engine.end_rollout()
        else:
            engine.keep(turn, rows, results, conversations)
        self.rollout.prefill_tokens += results.prefill_tokens
        self.rollout.decode_tokens += results.decode_tokens
        lengths = results.lengths.tolist()
        self.rollout.entropies, self.rollout.logps = (
            [row[:n] for row, n in zip(values.tolist(), lengths, strict=True)]
            for values in (results.entropies, results.logps)
        )
        if not all(math.isfinite(logp) for row in self.rollout.logps for logp in row):
            raise NotFiniteError("the model's next-token probabilities contain inf or nan")
        width = max(lengths)
        behind = torch.arange(width, device=input_ids.device) >= results.lengths.unsqueeze(1)
        pad = config._pad_token_tensor
        tokens = results.tokens[:, :width].masked_fill(behind, 0 if pad is None else int(pad))
        return torch.cat([input_ids, tokens], dim=1)

    @torch.no_grad()
    def rehearse(self, model: PreTrainedModel, prompt_ids: list[list[int]], longest: int, capacity: int) -> None:
        """Lay out the largest buffers, read the prompts and take three steps; the random state stays.

        Args:
            model: as for a rollout.
            prompt_ids: of every row, all of one length.
            longest: the cap on a completion's tokens.
            capacity: as for `GroupDecoder.rehearse`, which takes over where this decoder steps aside.
        """
        engine = engine_of(model)
        prompts, sampling = group_rows(prompt_ids), Sampling(True, 0.9, 0.9)
        job = Job(prompts, len(prompt_ids), longest, (), sampling, self.kv_tokens, steps=3)  # one, captured, replayed
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.autocast(model.device.type, enabled=False):
                if engine.serves(self.autocast, LogitsProcessorList(), StoppingCriteriaList()):
                    engine.run(job)
                    return
        except Exception as error:
            if is_out_of_memory(error):
                raise
            engine.step_aside(f"{type(error).__name__}: {error}")
        finally:
            engine.release()
        GroupDecoder(self.autocast, self.kv_tokens).rehearse(model, prompt_ids, longest, capacity)


def choose_decoder(
    model: PreTrainedModel,
    autocast: Callable[[], AbstractContextManager[Any]],
    kv_tokens: int | None = None,
    temperature: float | None = None,
    conversations: Conversations | None = None,
    ended: Ended | None = None,
) -> StaticDecoder | GroupDecoder:
    """Return the decoder for the model's device: static rows on a GPU, one copy of each prompt on a CPU."""
    kind = StaticDecoder if model.device.type == "cuda" else GroupDecoder
    return kind(autocast, kv_tokens, temperature=temperature, conversations=conversations, ended=ended)


class _Counted:
    """Passes tokens on, and knows how many."""

    def __init__(self, stream: Callable[[list[int]], None]) -> None:
        self._stream = stream
        self._passed = 0
        self._seen_again = 0

    def __call__(self, tokens: list[int]) -> None:
        self._passed += len(tokens)
        self._stream(tokens)

    def rest(self, tokens: list[int]) -> None:
        """Pass on what another decoder, which starts over, generates beyond that."""
        skipped = min(len(tokens), self._passed - self._seen_again)
        self._seen_again += skipped
        if tokens[skipped:]:
            self._stream(tokens[skipped:])


class NotFiniteError(RuntimeError):
    """The model's probabilities are not numbers; no other way of decoding would change that."""


@dataclass(frozen=True)
class Turn:
    """A turn of rows that may have further ones, by row of the batch."""

    behind: list[Prompt]  # what earlier turns have put behind the prompt of the first
    limits: list[int]  # most tokens that it gets now
    longest: int  # tokens of the longest row, over all turns

    @classmethod
    def read(cls, rows: list[Prompt], conversations: Conversations, cap: int) -> Turn:
        """Return the turn of rows that get at most `cap` tokens each."""
        conversations.meet(rows)
        behind = [ids[len(conversations.start(ids)) :] for ids in rows]
        limits = [min(cap, conversations.left(ids)) for ids in rows]
        longest = max(len(ids) + limit for ids, limit in zip(rows, limits, strict=True))
        return cls(behind, limits, max(conversations.most_tokens, longest))


@dataclass(frozen=True)
class Job:
    """Rows to generate."""

    prompts: dict[Prompt, list[int]]  # token ids (in a turn: of the first one's prompt) -> rows of the batch
    rows: int
    cap: int  # most tokens of a completion
    stops: tuple[int, ...]  # token ids that end a completion
    sampling: Sampling
    kv_tokens: int | None = None
    steps: int | None = None  # stop after so many, for a rehearsal
    stream: Callable[[list[int]], None] | None = None  # gets the tokens of row 0
    turn: Turn | None = None  # where rows may have further ones
    ended: Ended | None = None  # gets rows that have ended

    @property
    def length(self) -> int:
        """Tokens of the longest row, as the buffers count them."""
        return row_length(self.turn.longest if self.turn else max(map(len, self.prompts)) + self.cap)

    @property
    def at_once(self) -> int:
        """Rows decoded at once."""
        return self.rows if self.kv_tokens is None else max(1, min(self.rows, self.kv_tokens // self.length))


@dataclass
class Results:
    """What a job generated, by row of the batch; on the device."""

    tokens: Tensor  # (rows, cap)
    logps: Tensor  # (rows, cap)
    entropies: Tensor  # (rows, cap)
    lengths: Tensor  # (rows,)
    prefill_tokens: int = 0
    decode_tokens: int = 0
    places: dict[int, int] = field(default_factory=dict)  # by row: where it still lies in the buffers


class Engine:
    """One model's static rows: its short layers, and the last job's buffers with the graphs captured on them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.obstacle: str | None = None
        self.is_checked = False
        self._layers: dict[tuple[Any, ...], DecodingLayers] = {}
        self._batch: Batch | None = None
        self._keeps_buffers = True
        self._said: set[str] = set()
        self._reference = weakref.ref(model)  # which holds the engine
        self._graphs = Switch(model.device.type == "cuda")

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model gets an engine of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_no_engine, ())

    @property
    def _model(self) -> PreTrainedModel:
        model = self._reference()
        assert model is not None
        return model

    def serves(
        self,
        autocast: Callable[[], AbstractContextManager[Any]],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ) -> bool:
        """Return whether static rows compute what these settings ask for."""
        if self.obstacle is not None:
            return False
        if not all(type(processor) in ROW_BY_ROW for processor in processors):
            return False
        if not all(type(criterion) in (EosTokenCriteria, MaxLengthCriteria) for criterion in criteria):
            return False
        dtype = self.dtype
        with autocast():
            kind = self._model.device.type
            if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
                self._say_once(f"the model is {dtype}, and computes in {torch.get_autocast_dtype(kind)}")
                return False
        reason = DecodingLayers.obstacle(self._model)
        if reason is not None:  # for now: dropout is off in an evaluation, and adapters come and go
            self._say_once(reason)
            return False
        if not self.is_checked:
            reason = self._self_check(autocast)
            self.is_checked = True
            if reason is not None:
                self.step_aside(reason)
        return self.obstacle is None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight.dtype

    def step_aside(self, reason: str) -> None:
        """Leave decoding to `GroupDecoder` from now on, and say why."""
        self.obstacle = reason
        self._say_once(reason)

    def _say_once(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("Decoding without CUDA graphs, which is several times slower: %s.", reason)

    def release(self) -> bool:
        """Give the buffers and graphs back; return whether there were any."""
        had_some, self._batch = self._batch is not None, None
        return had_some

    def release_for_good(self) -> bool:
        """Give them back after every rollout from now on; return whether there were any."""
        self._keeps_buffers = False
        return self.release()

    def end_rollout(self) -> None:
        """Keep the buffers for the next rollout, with the graphs captured on them, or give them back if large."""
        if self._batch is None:
            return
        is_large = False
        if self._model.device.type == "cuda":
            card = torch.cuda.get_device_properties(self._model.device).total_memory
            is_large = self._batch.cache.num_bytes > KEPT_SHARE * card
        if is_large or not self._keeps_buffers:
            self.release()

    def layers(self) -> DecodingLayers:
        """Return the short layers for the adapters that are on now."""
        key = (
            DecodingLayers.state(self._model),
            self.dtype,
            *(parameter.data_ptr() for parameter in self._model.parameters()),
        )
        if key not in self._layers:
            self.release()  # graphs hold the addresses of the old ones
            layers = DecodingLayers(self._model, self.dtype)
            prompt = (1 % self._model.config.vocab_size,) * 2
            rows = RowCache(1, row_length(2), self.dtype, self._model.device)
            rows.begin_prefill([len(prompt)], [(0, 0)])
            layers.join(lambda: _read(self._model, rows, [prompt]))
            self._layers = {key: layers}
        return self._layers[key]

    def buffers(self, job: Job) -> Batch:
        """Return buffers for a job: those of the last one, where it fits in."""
        self.layers()
        if self._batch is None or not self._batch.holds(job):
            self.release()
            self._batch = Batch(self._model, job, self.dtype, self._graphs)
        return self._batch

    def run(self, job: Job, held: dict[int, tuple[int, int]] | None = None) -> Results:
        """Generate all rows of a job; of those in `held`, by row: where they lie, and how many tokens are there."""
        batch = self.buffers(job)
        with self.layers().installed():
            return batch.run(self._model, job, held or {})

    def keep(self, turn: Turn, rows: list[Prompt], results: Results, conversations: Conversations) -> None:
        """Let rows that may get a further turn stay in the buffers; drop those whose place was given away."""
        assert self._batch is not None
        holder, is_recurrent = weakref.ref(self._batch.holder), bool(self._batch.cache.recurrent)
        generated = results.tokens.tolist()
        for row, count in enumerate(results.lengths.tolist()):
            if count >= conversations.left(rows[row]):
                continue
            # The last token has not been through the model, or what it left there is written over.
            own = (*turn.behind[row], *generated[row][: count - 1])
            prompt = conversations.start(rows[row])
            if row in results.places:
                conversations.keep(prompt, own, Place(holder, results.places[row], is_recurrent))
            else:
                conversations.drop(prompt, own)

    def _self_check(self, autocast: Callable[[], AbstractContextManager[Any]]) -> str | None:
        """Compare the next-token probabilities of three steps with those of `GroupDecoder`'s computation."""
        model, device = self._model, self._model.device
        prompts = [(5, 7, 11, 13, 9, 3), (3, 2, 4)]
        vocabulary = model.config.vocab_size
        prompts = [tuple(token % vocabulary for token in prompt) for prompt in prompts]
        steps = ([6, 9, 8], [7, 10, 8])
        following = [torch.tensor(tokens, device=device) % vocabulary for tokens in steps]
        begun = [
            (*prompts[group], *(tokens[row] % vocabulary for tokens in steps)) for row, group in enumerate((0, 0, 1))
        ]
        more = ((4, 6, 12), (5,), (7, 2))  # of a further turn
        new = [(row, len(ids), tokens) for row, (ids, tokens) in enumerate(zip(begun, more, strict=True))]
        whole = [ids + tokens for ids, tokens in zip(begun, more, strict=True)]
        with torch.no_grad(), narrowed(model):
            with autocast():
                cache = GroupCache([len(prompt) for prompt in prompts], torch.tensor([0, 0, 1], device=device))
                expected = [_read(model, cache, prompts)[[0, 0, 1]]]
                for step, tokens in enumerate(following):
                    positions = torch.tensor([[len(prompts[group]) + step] for group in (0, 0, 1)], device=device)
                    hidden = hidden_states(model, tokens.unsqueeze(1), positions, cache)[:, 0]
                    expected.append(next_logits(model, hidden))
                cache = GroupCache([len(ids) for ids in whole], torch.arange(3, device=device))
                expected.append(_read(model, cache, whole))
            with torch.autocast(device.type, enabled=False), self.layers().installed():
                rows = RowCache(3, row_length(8), self.dtype, device)
                rows.begin_prefill([len(prompt) for prompt in prompts], [(0, 0), (1, 0), (2, 1)])
                found = [_read(model, rows, prompts)[[0, 0, 1]]]
                rows.end_prefill()
                for tokens in following:
                    found.append(_step_logits(model, rows, tokens, 3, row_length(8)))
                    rows.position.add_(1)
                found.append(_read_behind(model, rows, new))
        for one, other in zip(expected, found, strict=True):
            difference = float((one.softmax(-1) - other.softmax(-1)).abs().max())
            allowed = 1e-4 if self.dtype in (torch.float32, torch.float64) else 0.15
            if not difference <= allowed:
                return f"its probabilities differ from those of the usual way by {difference:.2g} (allowed {allowed:g})"
        return None


def engine_of(model: PreTrainedModel) -> Engine:
    """Return the model's engine; it lives as long as the model."""
    if model.__dict__.get("_static_rows") is None:
        model.__dict__["_static_rows"] = Engine(model)
    engine: Engine = model.__dict__["_static_rows"]
    return engine


def _no_engine() -> None:
    """What a pickled engine is read back as."""


def _read(model: PreTrainedModel, cache: GroupCache | RowCache, prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """Run the model over prompts in one flat row; return the logits `(prompts, V)` of what follows each."""
    device = model.device
    ids = [token for prompt in prompts for token in prompt]
    positions = [t for prompt in prompts for t in range(len(prompt))]
    flat = torch.tensor([[ids], [positions]]).to(device)
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).sub(1).to(device)
    return next_logits(model, hidden_states(model, flat[0], flat[1], cache)[0, ends])


def _read_behind(model: PreTrainedModel, cache: RowCache, new: Sequence[tuple[int, int, Prompt]]) -> Tensor:
    """Run the model over new tokens of rows; return the logits `(rows, V)` of what follows.

    Args:
        model: whose rows they are.
        cache: holds the rows.
        new: row of the cache, how many tokens it holds, and those that are read behind them.
    """
    rows, held, tokens = zip(*new, strict=True)
    counts = [len(ids) for ids in tokens]
    places = [start + t for start, count in zip(held, counts, strict=True) for t in range(count)]
    flat = torch.tensor([[[token for ids in tokens for token in ids]], [places]]).to(model.device)
    ends = torch.tensor(counts).cumsum(0).sub(1).to(model.device)
    cache.begin_reading(rows, held, counts)
    return next_logits(model, hidden_states(model, flat[0], flat[1], cache)[0, ends])


def _passes(new: Sequence[tuple[int, int, Prompt]], at_once: int) -> Iterator[list[tuple[int, int, Prompt]]]:
    """Divide what `_read_behind` takes into passes of at most so many tokens, padding counted."""
    batch: list[tuple[int, int, Prompt]] = []
    for row, held, tokens in new:
        for begin in range(0, len(tokens), at_once):
            part = row, held + begin, tokens[begin : begin + at_once]
            if batch and (len(batch) + 1) * max(len(ids) for *_, ids in (*batch, part)) > at_once:
                yield batch
                batch = []
            batch.append(part)
    if batch:
        yield batch


def _step_logits(
    model: PreTrainedModel, cache: RowCache, tokens: Tensor, rows: int, seen: int, frozen: Tensor | None = None
) -> Tensor:
    """Feed one token to each of the first rows; return the logits `(rows, V)` of the next."""
    cache.begin_step(rows, seen, frozen)
    hidden = hidden_states(model, tokens.unsqueeze(1), cache.position[:rows].unsqueeze(1), cache)
    return next_logits(model, hidden[:, 0])


@dataclass
class _Kept:
    """A prompt that has been read and whose rows did not all find a place."""

    prompt: Prompt | None = None
    states: Kept = field(default_factory=dict)
    logits: Tensor | None = None  # (1, V)


class Batch:
    """The buffers of a job, and the loop that decodes in them."""

    def __init__(self, model: PreTrainedModel, job: Job, dtype: torch.dtype, switch: Switch) -> None:
        device = model.device
        self.rows, self.total, self.cap, self.stops = job.at_once, job.rows, job.cap, job.stops
        self.holder = Holder()
        self.cache = RowCache(self.rows, job.length, dtype, device)
        vocabulary = cast(Tensor, model.get_output_embeddings().weight).size(0)
        self.logits = torch.zeros((self.rows, vocabulary), device=device)
        self.live = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self.count = torch.zeros(self.rows, dtype=torch.long, device=device)  # tokens generated
        self.limit = torch.zeros(self.rows, dtype=torch.long, device=device)  # most of them
        self.owner = torch.zeros(self.rows, dtype=torch.long, device=device)  # the row of the batch it decodes
        self.base = torch.zeros(self.rows, dtype=torch.long, device=device)  # where that row's results begin
        # One place more than there are results: rows that have ended write there.
        self.tokens = torch.zeros(self.total * self.cap + 1, dtype=torch.long, device=device)
        self.logps = torch.zeros(self.total * self.cap + 1, device=device)
        self.entropies = torch.zeros(self.total * self.cap + 1, device=device)
        self.lengths = torch.zeros(self.total + 1, dtype=torch.long, device=device)  # the last one for unused rows
        self._stops = torch.tensor(job.stops, dtype=torch.long).to(device)
        by_row = [self.logits, self.live, self.count, self.limit, self.owner, self.base]
        self._by_row = by_row
        results = [self.tokens, self.logps, self.entropies, self.lengths]
        state = [*by_row, *results, self.cache.position, self.cache.mask]
        self.graphs = StepGraphs(lambda: [*state, *self.cache.recurrent_tensors], results, switch)

    def holds(self, job: Job) -> bool:
        """Return whether a job runs in these buffers as it would in its own."""
        fits = job.length <= self.cache.length and job.rows <= self.total and job.at_once <= self.rows
        within = job.kv_tokens is None or self.rows * self.cache.length <= max(job.kv_tokens, self.cache.length)
        return fits and within and (job.cap, job.stops) == (self.cap, self.stops)

    def run(self, model: PreTrainedModel, job: Job, held: dict[int, tuple[int, int]]) -> Results:
        """Decode all rows to their ends, or so many steps.

        Args:
            model: whose rows they are.
            job: the rows.
            held: by row of an earlier turn: where it lies here, and how many of its tokens are held.
        """
        new_rows = (_Slot.of(job, prompt, row) for prompt, members in job.prompts.items() for row in members)
        every = {slot.row: slot for slot in new_rows}
        waiting = deque(slot for slot in every.values() if slot.row not in held)
        slots: dict[int, _Slot] = {}  # by row of the buffers: what it decodes
        ended: dict[int, int] = {}  # by row of the buffers: the row of the batch that has ended there
        untold: list[tuple[int, int]] = []  # rows of the batch that have ended since the last look, with most tokens
        # Its own number of rows, whatever the buffers have: what is drawn must not depend on earlier jobs.
        kept, rows, done, read, decoded = _Kept(), job.at_once, 0, 0, 0
        freezes = job.turn is not None  # states of ended rows
        sampling_key = (*job.sampling.key, freezes)
        self.holder = Holder()
        self.live.zero_()
        self.owner.fill_(self.total)  # what an earlier job left there would be noted as lengths of this one's rows
        while True:
            free = sorted((slot for slot in range(rows) if slot not in slots), key=lambda slot: slot in ended)
            if (waiting or held) and len(free) >= max(1, REFILL_SHARE * rows):
                count = min(len(free) - len(held), len(waiting))
                chosen = [*(every[row] for row in held), *(waiting.popleft() for _ in range(count))]
                # In the order of the batch: where all rows have a place, the draws are those of `generate`.
                fresh = dict(zip(free, sorted(chosen, key=lambda slot: slot.row), strict=False))
                for slot in fresh:
                    ended.pop(slot, None)
                read += self._begin(model, fresh, held, waiting[0].prompt if waiting else None, kept)
                slots |= fresh
                held = {}
            if not slots or (job.steps is not None and done >= job.steps):
                break
            while not waiting and rows > FEWEST_ROWS and len(slots) <= rows // 2:
                rows = -(-rows // 2)
                slots, ended = self._compact(slots, ended, rows)
            steps = min(LOOK, max(slot.limit - slot.tokens for slot in slots.values()), job.steps or LOOK)
            longest = max(len(slot.ids) + slot.tokens for slot in slots.values()) + steps
            seen = min(self.cache.length, seen_length(longest))
            step = partial(self._step, model, job.sampling, rows, seen, freezes)
            for _ in range(steps):
                self.graphs.run((rows, seen, sampling_key), step)
            done, decoded = done + steps, decoded + steps * rows
            live = self._look(rows, untold, job.ended)  # the only wait
            if job.stream is not None:
                self._stream_first(slots, job.stream)
            untold = []
            for slot in [slot for slot in slots if not live[slot]]:
                untold.append((slots[slot].row, slots[slot].tokens + steps))
                row = slots.pop(slot).row
                if job.turn is not None:  # it may get a further one
                    ended[slot] = row
            for state in slots.values():
                state.tokens += steps
        shape = (self.total, self.cap)
        tokens, logps, entropies = (v[:-1].view(shape) for v in (self.tokens, self.logps, self.entropies))
        tokens, logps, entropies, lengths = (values[: job.rows] for values in (tokens, logps, entropies, self.lengths))
        places = {row: slot for slot, row in ended.items()}
        return Results(tokens, logps, entropies, lengths, read, decoded, places)

    def _look(self, rows: int, untold: list[tuple[int, int]], ended: Ended | None) -> list[bool]:
        """Return which rows are live, and tell of those that were not at the last look: one wait for both."""
        if ended is None or not untold:
            return cast(list[bool], self.live[:rows].tolist())
        width, count = min(self.cap, max(tokens for _, tokens in untold)), len(untold)
        index = torch.tensor([row for row, _ in untold]).to(self.tokens.device)
        tokens = self.tokens[:-1].view(self.total, self.cap)[:, :width].index_select(0, index)
        seen = torch.cat([self.live[:rows].long(), self.lengths.index_select(0, index), tokens.flatten()]).tolist()
        for (row, _), length, begin in zip(untold, seen[rows:], range(rows + count, len(seen), width), strict=False):
            ended(row, seen[begin : begin + length])
        return [bool(flag) for flag in seen[:rows]]

    def _stream_first(self, slots: dict[int, _Slot], stream: Callable[[list[int]], None]) -> None:
        """Pass on what row 0 has generated since the last look."""
        for slot in slots.values():
            if slot.row == 0:
                stream(self.tokens[slot.tokens : int(self.lengths[0])].tolist())

    def _step(self, model: PreTrainedModel, sampling: Sampling, rows: int, seen: int, freezes: bool) -> None:
        """Choose a token for every row, note it, and compute the logits of the next; fixed addresses, no wait."""
        live, count = self.live[:rows], self.count[:rows]
        tokens, logps, entropies = sampling.choose(
            self.logits[:rows],
            race,
            lambda logits: sampling.processors(None, logits),  # none looks at earlier tokens
        )
        place = torch.where(live, self.base[:rows] + count, self.tokens.numel() - 1)
        self.tokens.index_copy_(0, place, tokens)
        self.logps.index_copy_(0, place, logps)
        self.entropies.index_copy_(0, place, entropies)
        count.add_(live)
        self.lengths.index_copy_(0, self.owner[:rows], count)
        live.logical_and_(count < self.limit[:rows])
        if self.stops:
            live.logical_and_((tokens.unsqueeze(1) != self._stops).all(1))
        frozen = ~live if freezes and self.cache.recurrent else None
        self.logits[:rows].copy_(_step_logits(model, self.cache, tokens, rows, seen, frozen))
        self.cache.position[:rows].add_(live)

    def _begin(
        self,
        model: PreTrainedModel,
        fresh: dict[int, _Slot],
        held: dict[int, tuple[int, int]],
        following: Prompt | None,
        kept: _Kept,
    ) -> int:
        """Let rows begin, and return how many tokens were read.

        Args:
            model: whose rows they are.
            fresh: by row of the buffers: what it decodes from now on.
            held: as for `run`.
            following: the prompt that waits for a place.
            kept: a prompt that was read before, or is from now on.
        """
        moves = {held[row.row][0]: slot for slot, row in fresh.items() if row.row in held}
        self._move({source: target for source, target in moves.items() if source != target})
        read = self._fill(model, {slot: row for slot, row in fresh.items() if row.row not in held}, following, kept)
        present = {slot: held[row.row][1] if row.row in held else len(row.prompt) for slot, row in fresh.items()}
        new = [(slot, present[slot], row.ids[present[slot] :]) for slot, row in fresh.items()]
        for batch in _passes(sorted(new), SCORED_AT_ONCE if is_explicit(model) else READ_AT_ONCE):
            places = torch.tensor([slot for slot, *_ in batch]).to(self.logits.device)
            self.logits.index_copy_(0, places, _read_behind(model, self.cache, batch))
            read += sum(len(ids) for *_, ids in batch)
        columns = [list(fresh), [row.row for row in fresh.values()], [row.limit for row in fresh.values()]]
        index, owner, limit = torch.tensor(columns).to(self.owner.device)
        self.owner.index_copy_(0, index, owner)
        self.base.index_copy_(0, index, owner * self.cap)
        self.limit.index_copy_(0, index, limit)
        self.count.index_fill_(0, index, 0)
        self.live.index_fill_(0, index, True)
        return read

    def _fill(self, model: PreTrainedModel, fresh: dict[int, _Slot], following: Prompt | None, kept: _Kept) -> int:
        """Read the prompts of rows, and return how many tokens were read."""
        rest = [slot for slot, row in fresh.items() if row.prompt == kept.prompt]
        if rest and kept.prompt is not None and kept.logits is not None:
            self.cache.fill_rest(kept.states, len(kept.prompt), rest)
            self.logits[rest] = kept.logits
        others = {slot: row.prompt for slot, row in fresh.items() if slot not in set(rest)}
        prompts = list(dict.fromkeys(others.values()))
        if prompts:
            last = prompts.index(following) if following in prompts else None
            chosen = [(slot, prompts.index(prompt)) for slot, prompt in others.items()]
            self.cache.begin_prefill([len(prompt) for prompt in prompts], chosen, last)
            logits = _read(model, self.cache, prompts)
            kept.states = self.cache.end_prefill()
            self.logits[[slot for slot, _ in chosen]] = logits[[prompt for _, prompt in chosen]]
            kept.prompt, kept.logits = (
                (None, None) if last is None else (prompts[last], logits[last : last + 1].clone())
            )
        elif kept.prompt != following:
            kept.prompt, kept.logits, kept.states = None, None, {}
        return sum(map(len, prompts))

    def _compact(
        self, slots: dict[int, _Slot], ended: dict[int, int], rows: int
    ) -> tuple[dict[int, _Slot], dict[int, int]]:
        """Move what is decoded into the first rows, where it fits, and what has ended there out of them."""
        targets = [slot for slot in range(rows) if slot not in slots]
        moves = dict(zip([slot for slot in slots if slot >= rows], targets, strict=False))
        moves |= {target: source for source, target in moves.items() if target in ended}
        self._move(moves)
        return (
            {moves.get(slot, slot): row for slot, row in slots.items()},
            {moves.get(slot, slot): row for slot, row in ended.items()},
        )

    def _move(self, moves: dict[int, int]) -> None:
        """Move rows of the buffers, by where they lie: where to, all at once."""
        if moves:
            source, target = torch.tensor([list(moves), list(moves.values())]).to(self.owner.device)
            self.cache.move(source, target)
            for values in self._by_row:
                values.index_copy_(0, target, values.index_select(0, source))


@dataclass
class _Slot:
    """What a row of the buffers decodes."""

    prompt: Prompt  # of its first turn
    ids: Prompt  # of this one: the prompt, and what earlier turns have put behind it
    row: int  # of the batch
    limit: int  # most tokens that are generated
    tokens: int = 0  # generated

    @classmethod
    def of(cls, job: Job, prompt: Prompt, row: int) -> _Slot:
        """Return what decodes a row of a job."""
        if job.turn is None:
            return cls(prompt, prompt, row, job.cap)
        return cls(prompt, prompt + job.turn.behind[row], row, job.turn.limits[row])
