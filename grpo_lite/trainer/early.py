"""`Early`: a reward that waits is asked about a completion when that has ended, while others are still being generated.

The weights that sample stay the same, so this changes when a question is asked, and nothing else: TRL's call for the
whole round gets the answers that are there, waits for those under way, and asks for the rest. Only rewards that score
each row by itself take part (`begin`: `judge_reward`, `each_row`). With tools a completion is over when its episode is:
there nothing is asked early, nor where TRL or vLLM generates.

A round that is generated again, after memory ran out, may end in other completions. Answers to the first ones are not
used then, though they are paid for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from trl.data_utils import is_conversational
from trl.trainer import grpo_trainer

logger = logging.getLogger(__name__)

_NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL passes them under names of its own


class Early:
    """Lets the rewards of a trainer begin with the rows of a round that have ended."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._inputs: list[dict[str, Any]] | None = None  # of the round that is generated and scored now
        self._is_off = False

    def round(self, score: Callable[[Any], dict[str, Any]], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `score`, which generates for a round's examples and scores them, does; nothing outlives it."""
        self._inputs = inputs
        try:
            return score(inputs)
        finally:
            self._inputs = None
            for guard in self._guards():
                guard.end_head_start()

    def listener(self, prompt_ids: list[list[int]]) -> Callable[[int, list[int]], None] | None:
        """Return what to call with a row and its completion's ids when that has ended; None: nobody wants to know."""
        trainer, inputs, guards = self.trainer, self._inputs, self._guards()
        plays = trainer.tools or trainer.environment_factories is not None
        if inputs is None or len(inputs) != len(prompt_ids) or plays or not guards or self._is_off:
            return None

        def ended(row: int, ids: list[int]) -> None:
            if self._is_off:
                return
            example = inputs[row]
            columns = {name: [value] for name, value in example.items() if name not in _NOT_COLUMNS}
            try:
                completion = self._completion(example["prompt"], prompt_ids[row], ids)
                for guard in guards:
                    guard.begin(
                        [completion], prompts=[example["prompt"]], completion_ids=[ids], trainer_state=trainer.state,
                        **columns,
                    )  # fmt: skip
            except Exception as error:  # it must not end the generation
                self._is_off = True
                logger.warning("Rewards are asked when all completions are there: %s: %s", type(error).__name__, error)

        return ended

    def _guards(self) -> list[Any]:
        guards = [getattr(reward, "guard", reward) for reward in self.trainer.reward_funcs]
        return [guard for guard in guards if getattr(guard, "can_begin", False)]

    def _completion(self, prompt: Any, prompt_ids: list[int], ids: list[int]) -> Any:
        """Return a completion as TRL 1.16's `_generate` gives it to rewards."""
        trainer = self.trainer
        tokenizer = trainer._tokenizer
        if is_conversational({"prompt": prompt}) and any(
            getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")
        ):
            return [grpo_trainer.parse_response(tokenizer, ids, prefix=prompt_ids, tools=trainer.tools)]
        text = trainer.processing_class.batch_decode([ids], skip_special_tokens=True)[0]
        return [{"role": "assistant", "content": text}] if is_conversational({"prompt": prompt}) else text
