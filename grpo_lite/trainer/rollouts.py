"""`Rollouts`: completions by our decoder, given to TRL's own call of `generate`, and what it noted on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from grpo_lite.engine.conversations import Conversations
from grpo_lite.engine.decode import Rollout
from grpo_lite.engine.lora import shorten_lora
from grpo_lite.engine.out_of_memory import trim_heap
from grpo_lite.engine.quantised import keep_weights_unpacked
from grpo_lite.engine.recompute import keep_less
from grpo_lite.engine.rollout_weights import rollout_weights
from grpo_lite.engine.score import base_model
from grpo_lite.engine.static_decode import choose_decoder, engine_of
from grpo_lite.task.tokens import (
    holds_markup,
    holds_special_tokens,
    plainly_named,
    tool_result_ids,
    without_markup,
)
from grpo_lite.task.tokens import prompt_ids as tokens_of_prompt

logger = logging.getLogger(__name__)


class Rollouts:
    """Generates with each prompt computed once per group, where `Support` allows it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.last: Rollout | None = None  # of the last generation; of episodes, with zeros where a tool wrote
        self._episodes: _Turns | None = None  # while episodes are played
        self._has_said_reread = False
        self._stage: int | None = None  # the last one shown: most tokens of a completion
        self._old_logps_wanted = False  # TRL's next request for log-probabilities is for those of the sampling policy
        keep_weights_unpacked(trainer.model)
        if not trainer.options.is_plain:
            shorten_lora(trainer.model)
            if not trainer.args.gradient_checkpointing:
                keep_less(trainer.model)

    def reread_special_tokens(self, prompts: list[Any], ids: list[list[int]]) -> None:
        """Replace the ids of prompts whose text spells special tokens, which TRL reads as markup."""
        trainer = self.trainer
        observed = trainer.environment_factories is not None
        for row, prompt in enumerate(prompts):
            if holds_special_tokens(prompt, trainer.processing_class, observed):
                tools = trainer.tools
                if trainer.environment_factories is not None:
                    tools = trainer._env_tools[trainer._batch_environments[row]]
                ids[row] = tokens_of_prompt(
                    prompt, trainer.processing_class, {**self._template(), "tools": tools or None}, observed
                )

    def tool_suffix(self, plain: Callable[[Any], list[int]], messages: list[dict[str, Any]]) -> list[int]:
        """Return the ids of results of tools, as `plain`, TRL's `_get_tool_suffix_ids`; markup in them is only text."""
        trainer = self.trainer
        tokenizer = trainer.processing_class
        messages = plainly_named(messages, tokenizer)
        if trainer._is_vlm or not holds_markup(messages, tokenizer):
            return plain(messages)
        ids = tool_result_ids(messages, tokenizer, self._template())
        return plain(without_markup(messages, tokenizer)) if ids is None else ids

    def _template(self) -> dict[str, Any]:
        return {"chat_template": self.trainer.chat_template, **self.trainer.chat_template_kwargs}

    def play(self, generate: Callable[[], Any]) -> Any:
        """Return what `generate`, TRL's `_generate`, does; keys and values are kept between the turns of its rows."""
        if not self.trainer.tools:
            return generate()
        inner = base_model(self.trainer.accelerator.unwrap_model(self.trainer.model))
        with ExitStack() as held:
            self._episodes = turns = _Turns(Conversations(self.trainer.max_completion_length), held)
            try:
                generated = generate()
            finally:
                self._episodes = None
                engine_of(inner).end_rollout()
        turns.conversations.clear()
        if inner.device.type == "cpu":
            trim_heap()  # the copies of the weights, keys and values
        if turns.conversations.reread_rows and not self._has_said_reread:
            self._has_said_reread = True
            logger.warning(
                "%d turns of this step's episodes were read again whole: between two turns their rows found no room. "
                "Raise memory.rollout_kv_tokens if the device has memory left; else generate fewer completions a step.",
                turns.conversations.reread_rows,
            )
        self.last = turns.whole(*generated[:3])
        return generated

    def generate(self, plain: Callable[..., Any], prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Return what `plain`, TRL's `_generate_single_turn`, does; its model may generate by our decoder."""
        self.last = None
        if not self.trainer.support.can_share_rollout(prompt_ids, *args, **kwargs):
            return plain(prompt_ids, *args, **kwargs)
        trainer = self.trainer
        inner = base_model(trainer.accelerator.unwrap_model(trainer.model))
        kv_tokens = trainer.options.rollout_kv_tokens
        turns = self._episodes
        kept = turns.conversations if turns else None
        autocast = trainer.accelerator.autocast
        ended = trainer.early.listener(prompt_ids)
        decoder = choose_decoder(inner, autocast, kv_tokens, trainer.temperature, kept, ended)
        previous = inner.__dict__.get("generate")
        inner.generate = partial(inner.generate, custom_generate=decoder)
        try:
            with turns.weights(inner, autocast) if turns else rollout_weights(inner, autocast):
                generated = plain(prompt_ids, *args, **kwargs)
        except BaseException:
            if kept is not None:
                kept.clear()  # a repetition reads everything again
            raise
        finally:
            del inner.__dict__["generate"]
            if previous is not None:
                inner.generate = previous
        if inner.device.type == "cpu" and turns is None:
            trim_heap()
        lengths = [len(row) for row in decoder.rollout.entropies]
        if turns is not None and len(lengths) == len(prompt_ids):
            # A row whose episode is at its limit ends before the others; TRL looks for an end token, not for padding.
            generated = [ids[:length] for ids, length in zip(generated[0], lengths, strict=True)], *generated[1:]
            turns.note(prompt_ids, generated[0], decoder.rollout)
        elif turns is None and [len(ids) for ids in generated[0]] == lengths:
            self.last = decoder.rollout
        return generated

    def score(self, plain: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        """Return what `plain`, TRL's `_generate_and_score_completions`, does, with the entropies noted on the way."""
        self._limit_length()
        # When TRL asks for old log-probabilities, it does so first (trl 1.14-1.16); see `sampled_logps`.
        args = self.trainer.args
        wanted = args.gradient_accumulation_steps % (args.steps_per_generation * self.trainer.num_iterations) != 0
        self._old_logps_wanted = wanted and self.trainer.options.compute == "packed" and not self.trainer.use_vllm
        try:
            output = plain(inputs)
        finally:
            self._old_logps_wanted = False
        if self.last is not None:
            output["rollout_entropies"] = _padded(self.last.entropies, output["completion_mask"])
            if self.trainer.options.replay:
                output["sampled_logps"] = _padded(self.last.logps, output["completion_mask"])
        return output

    def _limit_length(self) -> None:
        """Let completions be as long as this step's stage allows; a divisor of the loss stays the longest length.

        In an evaluation they may be of the longest length.
        """
        trainer = self.trainer
        if not trainer.options.length_stages:
            return
        longest, step = trainer.max_completion_length, trainer.state.global_step
        limit = trainer.options.longest_completion(step, longest) if trainer.model.training else longest
        trainer.generation_config.max_new_tokens = limit
        if trainer.model.training and limit != self._stage:
            self._stage = limit
            trainer.recovery.show(f"completions of up to {limit} tokens from step {step + 1} on")

    def sampled_logps(self, width: int, device: torch.device) -> Tensor | None:
        """Return the log-probabilities `(B, width)` noted while sampling, where TRL asks for the old policy's."""
        wanted, self._old_logps_wanted = self._old_logps_wanted, False
        if not wanted or self.last is None:
            return None
        return _padded(self.last.logps, torch.empty((len(self.last.logps), width), device=device))


class _Turns:
    """What the turns of some episodes noted, put together when all have been played."""

    def __init__(self, conversations: Conversations, held: ExitStack) -> None:
        self.conversations = conversations
        self._held = held  # until all turns are played
        self._has_weights = False
        # By what a turn continued: the tokens, their log-probabilities and entropies.
        self._noted: dict[tuple[int, ...], list[tuple[list[int], list[float], list[float]]]] = {}
        self._read = self._decoded = 0

    def weights(self, model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
        """Return the context for a turn: the copies of the first turn's weights serve all."""
        if not self._has_weights:
            self._held.enter_context(rollout_weights(model, autocast))
            self._has_weights = True
        return nullcontext()

    def note(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], rollout: Rollout) -> None:
        """Note a turn of some rows."""
        rows = zip(completion_ids, rollout.logps, rollout.entropies, strict=True)
        for prompt, turn in zip(prompt_ids, rows, strict=True):
            self._noted.setdefault(tuple(prompt), []).append(turn)
        self._read += rollout.prefill_tokens
        self._decoded += rollout.decode_tokens

    def whole(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], tool_mask: list[list[int]]
    ) -> Rollout | None:
        """Return the rollout of whole episodes, zeros where a tool wrote; None where a turn was not ours."""
        whole = Rollout(self._read, self._decoded)
        for prompt, ids, mask in zip(prompt_ids, completion_ids, tool_mask, strict=True):
            logps, entropies = [0.0] * len(ids), [0.0] * len(ids)
            end = 0
            for wrote, run in groupby(mask):
                begin, end = end, end + len(list(run))
                if not wrote:
                    continue
                context, own = (*prompt, *ids[:begin]), ids[begin:end]  # TRL may have cut off a turn's end
                turn = next((t for t in self._noted.get(context, ()) if t[0][: len(own)] == own), None)
                if turn is None:
                    return None
                logps[begin:end], entropies[begin:end] = turn[1][: len(own)], turn[2][: len(own)]
            whole.logps.append(logps)
            whole.entropies.append(entropies)
        return whole


def _padded(rows: list[list[float]], like: Tensor) -> Tensor:
    """Return the rows as a tensor of `like`'s shape and device, zeros behind each."""
    padded = torch.zeros(like.shape)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values)
    return padded.to(like.device)
