"""Throughput and correctness of the text rewards on one core.

    python bench/text_rewards.py [--data FOLDER] [--cases FOLDER]

Prints Markdown tables for docs/measurements/rewards.md. Answers that need computer algebra are timed on their first
pass with a fresh judge process, since in training they are new. math-verify alone is measured with its time-outs off
(as they are off the main thread). It is left out for the hostile answers, because some of them would hang it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import processor  # noqa: E402
from rewards import (  # noqa: E402
    accuracy_reward,
    choice_reward,
    countdown_reward,
    exact_match_reward,
    format_reward,
    honest_accuracy,
    repetition_penalty_reward,
)
from rewards.judge import stop_judge  # noqa: E402
from rewards.math.equivalence import equivalent  # noqa: E402
from rewards.math.reading import parse_answer  # noqa: E402

Row = dict[str, Any]
REASONING = "We first add the two numbers, then divide by three, and check the result. " * 8


def main() -> None:
    """Print the machine, then one table per question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--cases", type=Path, default=ROOT.parent / "shared" / "cases")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, children included
    print(f"Machine: {machine()}; one core; load {os.getloadavg()[0]:.1f} before the run.\n")
    print_throughput(arguments.data)
    print_hostile(arguments.cases)
    print_correctness(arguments.data, arguments.cases)


def machine() -> str:
    """Return processor, system and Python in words."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rate(judge: Callable[[], object], count: int, repeat: int = 5) -> float:
    """Return items a second: the median of several runs, each over all items, with nothing remembered between them."""
    times = []
    for _ in range(repeat):
        parse_answer.cache_clear()
        stop_judge()
        accuracy_reward(["\\boxed{\\sqrt{18}}"], ["3\\sqrt{2}"])  # a fresh judge, started before the clock
        start = time.perf_counter()
        judge()
        times.append(time.perf_counter() - start)
    return count / statistics.median(times)


def print_throughput(data: Path) -> None:
    integers = [str(n * 7919 % 100_000 - 50_000) for n in range(20_000)]
    wrong = [str(int(n) + 1) for n in integers[:10_000]] + integers[10_000:]
    gsm8k = rows(data / "gsm8k_train.jsonl")
    golds, texts = mixed(data)
    open_golds, open_texts = needing_algebra()
    short = [f"<think>{REASONING}</think>\n<answer>{n}</answer>" for n in wrong]
    lines: list[tuple[str, int, Callable[[], object]]] = [
        ("integers, `\\boxed{n}`", 20_000, partial(accuracy_reward, [f"\\boxed{{{n}}}" for n in wrong], integers)),
        ("integers, think and answer tags, 600 characters", 20_000, partial(accuracy_reward, short, integers)),
        ("GSM8K solutions against themselves", len(gsm8k), both(accuracy_reward, [row["answer"] for row in gsm8k])),
        ("realistic mix, computer algebra included", len(golds), partial(accuracy_reward, texts, golds)),
        ("answers that all need computer algebra", len(open_golds), partial(accuracy_reward, open_texts, open_golds)),
        ("the realistic mix, `honest_accuracy`", len(golds), partial(honest_accuracy, texts, golds)),
        ("the realistic mix, math-verify alone, no limit", len(golds), partial(math_verify_alone, texts, golds)),
        ("`format_reward`", 20_000, partial(format_reward, short)),
        ("`exact_match_reward`", 20_000, partial(exact_match_reward, short, integers)),
        ("`choice_reward`", 20_000, partial(choice_reward, ["The answer is (B)."] * 20_000, ["B"] * 20_000)),
        ("`countdown_reward`", 5_000, countdown(data)),
        ("`repetition_penalty_reward`, 512 tokens", 500, penalty()),
    ]
    print("| throughput | items | items/s |\n|---|---|---|")
    for name, count, judge in lines:
        print(f"| {name} | {count} | {rate(judge, count, 3):,.0f} |")
    quick = sum(
        equivalent(parse_answer(g), parse_answer(t)) is not None for g, t in zip(golds, committed(texts), strict=True)
    )
    print(f"\nThe exact path decides {quick / len(golds):.0%} of the mix without computer algebra.\n")


def both(reward: Callable[..., object], texts: list[str]) -> Callable[[], object]:
    return lambda: reward(texts, texts)


def mixed(data: Path) -> tuple[list[str], list[str]]:
    """Return golds and completions like a policy's on MATH-500: half right in another spelling, half wrong."""
    golds = [row["answer"] for row in rows(data / "math500_test.jsonl")]
    others = golds[37:] + golds[:37]
    answers = []
    for index, (gold, other) in enumerate(zip(golds, others, strict=True)):
        right = [
            gold,
            gold.replace("\\frac", "\\dfrac"),
            f" {gold} ",
            gold.replace("\\left", "").replace("\\right", ""),
        ]
        wrong = [
            other,
            f"{gold}+1",
            f"2{gold}" if gold[0].isalpha() or gold[0] == "\\" else f"-{gold}",
            f"{gold}, {other}",
        ]
        answers.append((right if index % 2 else wrong)[index // 2 % 4])
    return golds, [f"{REASONING} So the answer is $\\boxed{{{answer}}}$." for answer in answers]


def needing_algebra() -> tuple[list[str], list[str]]:
    """Return pairs, half equal and half not, that the exact path leaves open: surds, functions, polynomials."""
    pairs = []
    for n in range(2, 42):
        pairs += [
            (f"{n}\\sqrt{{3}}", f"\\sqrt{{{3 * n * n}}}"),
            (f"\\frac{{\\pi}}{{{n}}}+1", f"\\frac{{\\pi+{n}}}{{{n}}}"),
            (f"x^2+{2 * n}x+{n * n}", f"(x+{n})^2"),
            (f"\\frac{{{n}}}{{\\sqrt{{5}}}}", f"\\frac{{{n}\\sqrt{{5}}}}{{5}}"),
            (f"{n}\\sqrt{{3}}", f"\\sqrt{{{3 * n * n + 1}}}"),
            (f"\\cos({n}x)", f"\\sin({n}x)"),
            (f"x^2+{2 * n}x+{n * n}", f"(x-{n})^2"),
            (f"e^{{{n}}}", f"e^{{{n + 1}}}"),
        ]
    return [gold for gold, _ in pairs], [f"{REASONING} \\boxed{{{given}}}" for _, given in pairs]


def committed(texts: Sequence[str]) -> list[str]:
    from rewards.extraction import extract_answer

    return [extract_answer(text) or "" for text in texts]


def math_verify_alone(texts: Sequence[str], golds: Sequence[str]) -> list[bool]:
    from math_verify import parse, verify

    parsed = [parse(f"\\boxed{{{gold}}}", parsing_timeout=None) for gold in golds]
    return [
        verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None)
        for gold, text in zip(parsed, texts, strict=True)
    ]


def countdown(data: Path) -> Callable[[], object]:
    problems = (rows(data / "countdown_3to4_train.jsonl") * 2)[:5000]
    texts = [f"<answer>{row['example_solution']}</answer>" for row in problems]
    return partial(countdown_reward, texts, [row["nums"] for row in problems], [row["target"] for row in problems])


def penalty() -> Callable[[], object]:
    ids = [[(i * 31 + j * j) % 997 for j in range(512)] for i in range(500)]
    return partial(repetition_penalty_reward, [""] * 500, ids)


def print_hostile(cases: Path) -> None:
    """Time each hostile completion alone in a batch with 15 ordinary ones: what does it cost the batch?"""
    ordinary = ["\\boxed{\\sqrt{12}}"] * 15
    slowest: list[tuple[float, str]] = []
    for row in rows(cases / "math_hostile.jsonl"):
        start = time.perf_counter()
        accuracy_reward([row["completion"], *ordinary], [row["gold"], *["2\\sqrt{3}"] * 15])
        slowest.append((time.perf_counter() - start, row["name"]))
    slowest.sort(reverse=True)
    print("| one hostile completion in a batch of 16 (limit 2 s) | seconds |\n|---|---|")
    for seconds, name in slowest[:4]:
        print(f"| {name} | {seconds:.2f} |")
    print(f"| median of {len(slowest)} | {statistics.median(seconds for seconds, _ in slowest):.3f} |\n")


def print_correctness(data: Path, cases: Path) -> None:
    """Print cases judged right of cases tried, by source."""
    print("| source | judged right | tried |\n|---|---|---|")
    for name in ("math_equiv", "math_hostile"):
        judged = [row for row in rows(cases / f"{name}.jsonl") if row["expect"] is not None]
        scores = accuracy_reward([row["completion"] for row in judged], [row["gold"] for row in judged])
        report(f"shared cases, {name}", [score == row["expect"] for score, row in zip(scores, judged, strict=True)])
    forms = rows(cases / "format_hack.jsonl")
    scores = format_reward([row["completion"] for row in forms])
    report("shared cases, format_hack", [score == row["expect"] for score, row in zip(scores, forms, strict=True)])
    own_cases()
    for split in ("train", "test"):
        solutions = [row["answer"] for row in rows(data / f"gsm8k_{split}.jsonl")]
        report(f"GSM8K {split}, gold solutions paid", [score == 1 for score in accuracy_reward(solutions, solutions)])
    for name in ("math500_test", "math_train_answers"):
        golds = [row["answer"] for row in rows(data / f"{name}.jsonl")]
        report(
            f"{name}, boxed golds paid", [s == 1 for s in accuracy_reward([f"\\boxed{{{g}}}" for g in golds], golds)]
        )
        shifted = golds[1:] + golds[:1]
        different = [(g, o) for g, o in zip(golds, shifted, strict=True) if g.replace(" ", "") != o.replace(" ", "")]
        scores = accuracy_reward([f"\\boxed{{{o}}}" for _, o in different], [g for g, _ in different])
        report(f"{name}, other neighbour's gold not paid", [score == 0 for score in scores])
        paid = [pair for pair, score in zip(different, scores, strict=True) if score]
        print(f"<!-- paid: {paid} -->")


def own_cases() -> None:
    try:
        from tests.rewards.test_extraction import CLAUSES, NO_CLAUSES
        from tests.rewards.test_math import DIFFERENT, EQUAL
    except ImportError:  # pytest is not installed
        return
    for name, table, want in (("own cases, equal", EQUAL, 1.0), ("own cases, different", DIFFERENT, 0.0)):
        scores = accuracy_reward([f"\\boxed{{{given}}}" for _, given, _ in table], [gold for gold, _, _ in table])
        report(name, [score == want for score in scores])
    scores = accuracy_reward(list(CLAUSES), list(CLAUSES.values()))
    report('own cases, a clause behind "Final answer:" paid', [score == 1 for score in scores])
    scores = accuracy_reward(NO_CLAUSES, ["34"] * len(NO_CLAUSES))
    report("own cases, a clause that commits to no value not paid", [score == 0 for score in scores])
    cases = rows(ROOT / "tests" / "rewards" / "math_acceptance.jsonl")
    scores = accuracy_reward([case["completion"] for case in cases], [case["gold"] for case in cases])
    report("own cases, whole completions", [s == case["expect"] for s, case in zip(scores, cases, strict=True)])


def report(source: str, right: Sequence[bool]) -> None:
    print(f"| {source} | {sum(right)} | {len(right)} |")


if __name__ == "__main__":
    main()
