"""Compare a run's GGUF files with its merged model, by kind: next tokens, greedy answers, held-out score.

    python bench/gguf_agreement.py runs/sums [--kinds f16 q8_0 q4_k_m] [--rows 150]

The evidence for the limits in grpo_lite/export/gguf/proof.py. Each kind is written to a folder, run by llama.cpp
(llama-cpp-python; K-quants need llama-quantize). Two controls follow: files that must fail, made of the base instead of
the merged model. The score comes from the run's own evaluation, greedy, on the same held-out rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grpo_lite.evaluation.evaluate import score_completions  # noqa: E402
from grpo_lite.export.gguf.file import KINDS, export_gguf  # noqa: E402
from grpo_lite.export.gguf.proof import llama_cpp_greedy, prove_gguf  # noqa: E402
from grpo_lite.models.base import Base  # noqa: E402
from grpo_lite.models.load import load_tokenizer  # noqa: E402
from grpo_lite.recipe.recipe import Recipe  # noqa: E402
from grpo_lite.runs.run_dir import RunDir  # noqa: E402
from grpo_lite.task.prompts import load_prompts  # noqa: E402
from grpo_lite.task.tokens import prompt_ids, prompt_text  # noqa: E402

QUESTIONS = (
    "What is 2+3?", "Name a fruit.", "Say yes or no: is snow white?", "What colour is the sky?", "Count to three.",
    "  3  4 what?\n\n 5", "Who wrote Hamlet?", "Is 7 prime?",
)  # fmt: skip


def main() -> None:
    """Measure and print a row of a Markdown table per kind and prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--controls", nargs="*", default=["bf16", "q4_k_m"], help="kinds to make of the base")
    parser.add_argument("--rows", type=int, default=150, help="held-out rows for the score")
    args = parser.parse_args()
    run = RunDir(args.run)
    recipe = run.load_recipe()
    resolved = Base.resolve(recipe.model)
    base, tokenizer = resolved.weights, load_tokenizer(resolved)
    rows = load_prompts(recipe, tokenizer).eval[: args.rows]
    kwargs = recipe.template_kwargs
    sets = {"held-out": ([prompt_text(row["prompt"], tokenizer, kwargs) for row in rows[:20]], 16)}
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        sets["chat"] = ([prompt_text(chat, tokenizer, kwargs) for chat in chats], 64)
    print("| kind | prompts | same next token | away from ties | identical answers | stopped (merged) | score |")
    print("|---|---|---|---|---|---|---|")
    jobs = [(kind, run.merged, "") for kind in args.kinds] + [(kind, base, "base as ") for kind in args.controls]
    for kind, source, label in jobs:
        with tempfile.TemporaryDirectory() as scratch:
            record = export_gguf(source, Path(scratch) / kind, kind)
            file = Path(scratch) / kind / record.file
            score = f"{held_out_score(file, recipe, tokenizer, rows):.3f} of {len(rows)}"
            for name, (texts, cap) in sets.items():
                p = prove_gguf(file, kind, run.merged, texts, max_new_tokens=cap, loader="llama_cpp")
                print(
                    f"| {label}{kind} | {name} | {p.top1_agreement:.1%} of {p.tokens} | {p.decided_agreement:.1%} | "
                    f"{p.same_answers} of {p.prompts} | {p.stopped} ({p.stopped_merged}) | {score} |",
                    flush=True,
                )
                score = ""


def held_out_score(file: Path, recipe: Recipe, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Return the lenient accuracy of a GGUF's greedy completions, by the run's own score function."""
    import llama_cpp

    cap = recipe.eval_completion_length
    prompts = [prompt_ids(row["prompt"], tokenizer, recipe.template_kwargs) for row in rows]
    model = llama_cpp.Llama(model_path=str(file), n_ctx=max(map(len, prompts)) + cap + 8, n_gpu_layers=0, verbose=False)
    completions = [llama_cpp_greedy(model, prompt, cap) for prompt in prompts]
    model.close()
    right = [score for score in score_completions(tokenizer, recipe, rows, completions)[0] if score is not None]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
