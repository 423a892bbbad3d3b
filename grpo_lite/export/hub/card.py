"""The model card: what a run's own files say, measured numbers with their intervals, and what was not measured.

Its section on use shows how the model is loaded and asked (transformers, vLLM, Ollama) and the form of the questions
it was trained on.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from grpo_lite import PROJECT_URL
from grpo_lite.errors import GRPOLiteError
from grpo_lite.export.hub.base_facts import BaseFacts
from grpo_lite.recipe.recipe import Recipe, without_paths
from grpo_lite.runs.provenance import starts_from
from grpo_lite.runs.run_dir import MERGED_MODELS, SCORE_COLUMNS, RunDir, dump_recipe
from grpo_lite.task.environments import load_toolkit
from grpo_lite.units import duration, size

# How the pushed model relates to its base, in the Hub's words. A GGUF of a trained model is a fine-tune too:
# "quantized" would list it as a copy of the base itself.
RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "finetune"}
CURVES = "curves.png"
RESULTS_FOLDER = ".eval_results"  # where the Hub looks for scores at its benchmarks
# By dataset and split: the id of its task on the Hub, and how many rows it has. Values there are in percent.
BENCHMARKS = {("openai/gsm8k", "test"): ("gsm8k", 1319)}
_PROJECT = f"[grpo_lite]({PROJECT_URL})" if PROJECT_URL else "grpo_lite"
_LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}


@dataclass(frozen=True)
class RunFacts:
    """Everything a card is written from."""

    recipe: Recipe
    base: BaseFacts
    record: Mapping[str, Any]  # run.json
    scores: Mapping[str, Any]  # metrics.json; empty: not measured
    merge: Mapping[str, Any]  # run.json's `merge`; empty: not merged
    gguf: Sequence[Mapping[str, Any]] = field(default=())  # gguf.json of each file
    curves: bool = False  # the report's curves.png is pushed too
    tasks: Sequence[Mapping[str, Any]] = field(default=())  # of lm-evaluation-harness

    @property
    def other_towers(self) -> Mapping[str, int]:
        """Tensors beside the text tower, by part, where the base is a multimodal model; else empty."""
        return self.merge.get("other_towers") or {}


def read_facts(run: RunDir, base: BaseFacts, gguf: Sequence[Mapping[str, Any]] = ()) -> RunFacts:
    """Collect a run's facts for its card."""
    scores = run.read_scores()
    record = run.read_run()
    curves = (run.path / CURVES).is_file()
    merge, tasks = record.get("merge") or {}, run.read_tasks()
    return RunFacts(run.load_recipe(), base, record, scores, merge, gguf, curves, tasks)


def model_card(facts: RunFacts, repo_id: str, what: str, doubts: Sequence[str] = ()) -> str:
    """Return README.md for a repository: metadata for the Hub, then text for people.

    Args:
        what: "adapter", "merged" or "gguf".
        doubts: why the push had to be forced; the card repeats them.
    """
    base, recipe = facts.base, facts.recipe
    title = repo_id.rpartition("/")[2]
    of = f"[{base.name}](https://huggingface.co/{base.hub_id})" if base.hub_id else base.name
    revision = f" at revision `{base.revision}`" if base.revision else ""
    how = "a supervised warm-up and then GRPO, on one LoRA adapter," if recipe.warmup else "GRPO and LoRA"
    parts = [
        f"---\n{_metadata(facts, title, what)}---\n",
        f"# {title}\n",
        f"{_article(what)} {of}{revision}, trained with {how} by {_PROJECT}: {recipe.description.rstrip('.')}.\n",
        f"The base is {base.note}.\n" if base.note else "",
        "".join(f"> **Pushed despite this:** {doubt}\n" for doubt in doubts),
        _measured(facts),
        _other_tasks(facts),
        _use(facts, repo_id, what),
        _tools(facts.recipe, repo_id, what),
        _training(facts),
        _not_measured(facts, what),
        _licence_text(base),
    ]
    return "\n".join(part for part in parts if part)


def benchmark_results(facts: RunFacts, what: str) -> dict[str, str]:
    """Return the files that list the model's score at its benchmark on the Hub, by their name in the repository.

    There is one where the pushed model itself was scored on every row of a benchmark that we know; a part of it would
    stand beside whole scores. huggingface_hub has a class for its format since 1.4 (`EvalResultEntry`); we support 1.0.
    """
    source, scores = facts.recipe.data.eval, own_scores(facts, what)
    if source is None or not source.hub or not scores:
        return {}
    rate = scores["lenient"]
    task_id, rows = BENCHMARKS.get((source.hub, source.split), ("", 0))
    if rate["n"] != rows:
        return {}
    dataset = {"id": source.hub, "task_id": task_id}
    if source.revision and re.fullmatch("[0-9a-f]{40}", source.revision):
        dataset["revision"] = source.revision
    of = f", split {source.split}" if source.split else ""
    entry: dict[str, Any] = {"dataset": dataset, "value": round(100 * rate["rate"], 2)}
    if finished := facts.record.get("finished_at"):
        entry["date"] = finished
    entry["notes"] = f"share of right answers, greedy, {_interval(rate)}, n = {rate['n']}{of}; measured by grpo_lite"
    text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=1000)
    return {f"{RESULTS_FOLDER}/{source.hub.rpartition('/')[2]}.yaml": text}


def own_scores(facts: RunFacts, what: str) -> Mapping[str, Any]:
    """Return the rates of the very model that is pushed, by kind; empty where it was not scored itself.

    An adapter was scored on its base as it was trained (4 bits, say), and a merged model by a pass of its own. No GGUF
    file is scored.
    """
    kinds, scores = ("lenient", "strict"), facts.scores
    if what == "adapter" and scores:
        return {kind: scores[kind]["trained"] for kind in kinds}
    if what == "merged" and "merged" in scores:
        return {kind: scores["merged"][kind] for kind in kinds}
    return {}


def _article(what: str) -> str:
    return {"adapter": "A LoRA adapter for", "merged": "A fine-tune of", "gguf": "GGUF files of a fine-tune of"}[what]


def _metadata(facts: RunFacts, title: str, what: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    base, recipe = facts.base, facts.recipe
    metadata: dict[str, Any] = {
        "library_name": _LIBRARIES[what],
        "pipeline_tag": "image-text-to-text" if facts.other_towers and what == "merged" else "text-generation",
        "tags": ["grpo", "lora", "trl", "grpo_lite", "reinforcement-learning", *(["sft"] if recipe.warmup else [])],
    }
    if base.licence:
        metadata |= {"license": base.licence, "license_name": base.licence_name, "license_link": base.licence_link}
    if base.hub_id:
        metadata |= {"base_model": base.hub_id, "base_model_relation": RELATIONS[what]}
    if hubs := list(dict.fromkeys(source.hub for source in recipe.sources.values() if source.hub)):
        metadata["datasets"] = hubs
    results = []
    source = recipe.data.eval or recipe.data.train
    for kind, rate in own_scores(facts, what).items():
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=source.hub or _source_name(source),
                dataset_name=_source_name(source),
                dataset_config=source.config,
                dataset_split=source.split if source.hub else "held-out",
                dataset_revision=source.revision,
                metric_type="accuracy",
                metric_name=f"greedy {kind} accuracy ({_interval(rate)}, n = {rate['n']})",
                metric_value=round(rate["rate"], 4),
            )
        )
    metadata |= {"model_name": title, "eval_results": results} if results else {}
    return str(ModelCardData(**metadata).to_yaml()).rstrip() + "\n"


def _source_name(source: Any) -> str:
    if source.hub:
        return f"{source.hub}" + (f" ({source.config})" if source.config else "")
    return f"generated-{source.generator}" if source.generator else str(source.path).replace("\\", "/").split("/")[-1]


def _interval(rate: Mapping[str, Any]) -> str:
    return f"{rate['confidence']:.0%} interval {rate['low']:.3f}-{rate['high']:.3f}"


def _measured(facts: RunFacts) -> str:
    scores = facts.scores
    if not scores:
        return "## Measured\n\nNothing: this run was not evaluated.\n"
    lines = ["## Measured", "", *_verdicts(facts), "", *_table(scores)]
    lines += ["", f"{scores['n']} held-out prompts; lenient: the answer is right; strict: and has the required form."]
    if cut := scores.get("truncated"):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in cut.items())
        lines += [f"Greedy completions cut off by the cap of {facts.recipe.eval_completion_length} tokens: {shares}."]
    if episodes := scores.get("episodes"):
        means = episodes["trained"]
        lines += [
            f"Each answer is an episode with real calls of tools; the trained model took {means['turns']:.1f} turns "
            f"and {means['calls']:.1f} calls on average, of which {means['failed_calls']:.1f} failed."
        ]
    if merge := facts.merge:
        lines += ["", _merge_sentence(merge)]
    for record in facts.gguf:
        proof = record.get("proof") or {}
        if proof:
            lines += ["", f"`{record['file']}`: {_proof_sentence(proof)}"]
    return "\n".join(lines) + "\n"


def _other_tasks(facts: RunFacts) -> str:
    """Return what training changed elsewhere, a line for each task of lm-evaluation-harness; empty if not measured."""
    if not facts.tasks:
        return ""
    lines = [f"- {_cell(task['sentence'])}" for task in facts.tasks]
    source = "Tasks of lm-evaluation-harness, each row compared with itself; 95 % intervals of a paired bootstrap."
    return "\n".join(["## What training unlearned", "", *lines, "", source, ""])


def _verdicts(facts: RunFacts) -> list[str]:
    """Return the verdict, GRPO's own first and then the warm-up's where there was one."""
    lenient = facts.scores["lenient"]
    if "grpo" not in lenient:
        return [lenient["verdict"]["sentence"]]
    return [lenient["grpo"]["verdict"]["sentence"], "", lenient["warmup"]["verdict"]["sentence"]]


def _table(scores: Mapping[str, Any]) -> list[str]:
    columns = [name for name in SCORE_COLUMNS if name in scores["lenient"]]
    stages = {"warmup": "gain of the warm-up (SFT)", "grpo": "gain of GRPO alone"} if "warm" in columns else {}
    head = ["held-out, greedy", *columns, *(stages.values() or ["difference"])]
    rows = [head]
    named = [(kind, scores[kind]) for kind in ("lenient", "strict")]
    for further, its_scores in scores.get("also", {}).items():
        named += [(f"{kind}, {_cell(further)}", its_scores[kind]) for kind in ("lenient", "strict")]
    for name, part in named:
        cells = [f"{part[column]['rate']:.3f} ({_interval(part[column])})" for column in columns]
        rows.append([name, *cells, *(_gain(part[stage] if stages else part) for stage in stages or ("",))])
    for key, name in MERGED_MODELS.items():
        if merged := scores.get(key):
            rate = f"{merged['lenient']['rate']:.3f} ({_interval(merged['lenient'])})"
            rows.append([f"lenient, {name}", *[""] * (len(columns) - 1), rate, *[""] * max(1, len(stages))])
    for name, rates in scores.get("pass_at_k", {}).items():
        cells = [f"{rates[column]:.3f}" for column in columns]
        rows.append([f"{name}, sampled", *cells, *[""] * max(1, len(stages))])
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _gain(part: Mapping[str, Any]) -> str:
    d = part["difference"]
    return f"{d['difference']:+.3f} ({d['confidence']:.0%} interval {d['low']:+.3f} to {d['high']:+.3f})"


def _merge_sentence(merge: Mapping[str, Any]) -> str:
    if skipped := merge.get("skipped"):
        return f"Not merged: {skipped}."
    state = "Verified" if merge.get("passed") else "NOT verified"
    if "prompts" not in merge:
        return f"{state}: the merged weights were not compared with base + adapter."
    first = " of episodes, up to the first answer" if merge.get("episodes") else ""
    return (
        f"{state}: the merged weights against base + adapter on {merge['prompts']} prompts{first}: top-1 "
        f"agreement {merge['top1_agreement']:.2%}, mean KL {merge['mean_kl']:.1e} nats, largest logit difference "
        f"{merge['max_logit_difference']:.2g}."
    )


def _proof_sentence(proof: Mapping[str, Any]) -> str:
    return (
        f"loaded with {proof['loader']}, it agrees with the merged model on {proof['top1_agreement']:.1%} of "
        f"{proof['tokens']} next tokens ({proof['decided_agreement']:.1%} away from ties); {proof['stopped']} of "
        f"{proof['prompts']} answers ended by themselves (merged model: {proof['stopped_merged']})."
    )


def _use(facts: RunFacts, repo_id: str, what: str) -> str:
    """Return the card's section on loading and asking the model.

    Args:
        what: "adapter", "merged" or "gguf".
    """
    recipe, base, gguf = facts.recipe, facts.base, facts.gguf
    base_name = base.hub_id or base.name
    title = repo_id.rpartition("/")[2]
    lines = ["## Use", ""]
    lines += _asked(recipe)
    if what == "gguf":
        kinds = [str(record["kind"]) for record in gguf] or ["q8_0"]
        lines += ["```sh", *(f"ollama run hf.co/{repo_id}:{kind.upper()}" for kind in kinds), "```", ""]
        lines += ["or download the file with its `Modelfile` and run", "", "```sh"]
        modelfile = f"Modelfile-{kinds[0]}" if len(kinds) > 1 else "Modelfile"  # as push names them
        lines += [f"ollama create {title.lower()} -f {modelfile} && ollama run {title.lower()}", "```", ""]
        file = gguf[0]["file"] if gguf else f"{recipe.name}-q8_0.gguf"
        lines += ["```python", "from transformers import AutoModelForCausalLM  # needs the package gguf", ""]
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", gguf_file="{file}")', "```", ""]
        lines += ["For vLLM, prefer the merged 16-bit model: `grpo-lite push RUN … --what merged`."]
        return "\n".join(lines) + "\n"
    lines += _loaded(facts, base_name, repo_id, what)
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")', "```", ""]
    if what == "merged":
        lines += ["```sh", f"vllm serve {repo_id}", "```", ""]
    elif not facts.other_towers:
        served = f"--enable-lora --max-lora-rank {recipe.lora.get('r', 8)} --lora-modules {title}={repo_id}"
        lines += ["```sh", f"vllm serve {base_name} {served}", "```", ""]
    else:
        lines += ["For vLLM, use the merged model: `grpo-lite push RUN … --what merged`.", ""]
    if what == "adapter" and (original := facts.scores.get("merged_onto_original")):
        lines += [
            "The adapter was trained on the base in 4 bits (bitsandbytes NF4, double-quantised), and fits that. On the "
            f"16-bit base, as loaded above, it scored {original['lenient']['rate']:.3f}. Load the base with "
            '`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`, or '
            "publish the merged model: `grpo-lite push RUN … --what merged`.",
            "",
        ]
    lines += [f"For Ollama, make a GGUF of the run: `grpo-lite export RUN --gguf q8_0` ({recipe.name})."]
    if what == "merged":
        lines += ["Without the run, use llama.cpp's `convert_hf_to_gguf.py` on a download of this repository."]
    return "\n".join(lines) + "\n"


def _loaded(facts: RunFacts, base_name: str, repo_id: str, what: str) -> list[str]:
    """Return the lines that load the model, up to the tokenizer."""
    revision = f', revision="{facts.base.revision}"' if facts.base.revision else ""
    if what == "merged":
        loader = "AutoModelForImageTextToText" if facts.other_towers else "AutoModelForCausalLM"
        lines = ["```python", f"from transformers import {loader}, AutoTokenizer"]
        lines += ["", f'model = {loader}.from_pretrained("{repo_id}", dtype="auto")']
        if facts.other_towers:
            lines = ["The text tower was trained, on text alone; the other weights are the base's.", "", *lines]
        return lines
    if facts.other_towers:
        base = f'load_causal(snapshot_download("{base_name}"{revision}), dtype="auto")'
        before = ["from huggingface_hub import snapshot_download", "from peft import PeftModel"]
        before += ["from transformers import AutoTokenizer", ""]
        before += ["from grpo_lite.models.text_tower import load_causal  # the adapter is of the text tower alone"]
    else:
        base = f'AutoModelForCausalLM.from_pretrained("{base_name}"{revision}, dtype="auto")'
        before = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "from peft import PeftModel"]
    return ["```python", *before, "", f"base = {base}", f'model = PeftModel.from_pretrained(base, "{repo_id}")']


def _asked(recipe: Recipe) -> list[str]:
    """Return how questions were asked in training, which is how the model should be asked."""
    data = recipe.data
    form = f"Trained on questions of the form {_code(data.prompt)}"
    if data.format == "text":
        before = (f"{data.system}\n" if data.system else "") + "".join(f"{e.prompt}{e.answer}\n" for e in data.examples)
        form += " in plain text, without the chat template (vLLM: `/v1/completions`)"
        return [form + (f", after this text: {_code(before)}." if before else "."), ""]
    if not data.system and not data.examples and data.prompt == "{prompt}":
        return []
    shots = f", after {len(data.examples)} examples (`data.examples` in the recipe below)" if data.examples else ""
    return [form + (f" under the system prompt {_code(data.system)}" if data.system else "") + shots + ".", ""]


def _code(text: str) -> str:
    return f"`{json.dumps(text, ensure_ascii=False)}`"


def _tools(recipe: Recipe, repo_id: str, what: str) -> str:
    """Return which tools the model was trained to call and how they are served; empty without tools."""
    if not recipe.has_tools:
        return ""
    classes = recipe.environment if isinstance(recipe.environment, dict) else {None: recipe.environment}
    named = [*recipe.tools, *(reference for reference in classes.values() if reference)]
    sources = ", ".join(f"`{reference.rpartition('/')[2]}`" for reference in named)
    most = recipe.grpo.get("max_tool_calling_iterations")
    limit = f", in at most {most} turns with calls" if most else ""
    serve = {
        "gguf": "`llama-server --jinja -m FILE.gguf` reads its calls.",
        "merged": f"`vllm serve {repo_id} --enable-auto-tool-choice --tool-call-parser hermes` reads its calls, where "
        "they are written as by Qwen2.5 and Qwen3. Qwen3.5 needs the parser `qwen3_coder`, Llama 3 `llama3_json`.",
        "adapter": "Load it onto its base, and give the schemas to the chat template as `tools=[…]`.",
    }[what]
    lines = ["## Tools", "", f"It was trained to call tools of {sources}{limit}:", "", *_tool_lines(recipe)]
    results = 'Results go back as messages with `"role": "tool"`.'
    lines += ["", f"Give it the same names, arguments and descriptions. {serve} {results}"]
    lines[-1] += " A tool runs where you run it, and its arguments are the model's words: do not trust them."
    return "\n".join(lines) + "\n"


def _tool_lines(recipe: Recipe) -> list[str]:
    """Return a line for each tool, or one that says why its code cannot be read here."""
    try:
        toolkit = load_toolkit(recipe)
    except GRPOLiteError as error:
        return [f"- their code is not on the machine that wrote this card ({str(error).partition(':')[0]})"]
    assert toolkit is not None
    tools = {tool.__name__: tool for tool in toolkit.tools}
    for methods in toolkit.methods.values():
        tools |= {method.__name__: method for method in methods}
    lines = []
    for name, tool in tools.items():
        first = (inspect.getdoc(tool) or " ").splitlines()[0]
        lines.append(f"- `{name}({', '.join(inspect.signature(tool).parameters)})`: {_cell(first)}")
    return lines


def _training(facts: RunFacts) -> str:
    record = facts.record
    device = record.get("device") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    rows = {
        "device": device.get("name"),
        "starts from": starts_from(without_paths(facts.recipe), record),
        "steps": record.get("steps"),
        "training time": duration(record.get("training_seconds")),
        "peak memory": size(record.get("peak_memory_bytes")),
        "seed": record.get("seed"),
        "versions": versions or None,
        "python": record.get("python"),
        "grpo_lite": " ".join(str(v) for v in (record.get("grpo_lite"), record.get("git_commit")) if v) or None,
        "finished": record.get("finished_at"),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    recipe = dump_recipe(without_paths(facts.recipe))
    picture = [f"![Reward and other figures over the training steps]({CURVES})", ""] if facts.curves else []
    return "\n".join(
        ["## Training", "", *picture, "| | |", "|---|---|", *table, "", "```yaml", recipe.rstrip(), "```", ""]
    )


def _not_measured(facts: RunFacts, what: str) -> str:
    scores, recipe = facts.scores, facts.recipe
    source = _source_name(recipe.data.eval or recipe.data.train)
    lines = [f"- Anything but {source}: other tasks, languages, safety, and what training may have unlearnt."]
    if facts.tasks:
        lines = [f"- Anything but {source} and the tasks above: languages, safety and more."]
    if not scores:
        lines = ["- The task itself: there is no score before or after training."]
    if scores and not recipe.eval.strict:
        lines.append("- The form of the answers: this recipe has no strict score of its own.")
    if scores:
        lines.append("- Spread over seeds: one run; the intervals are over prompts only.")
    if scores and what == "gguf" and "merged" in scores:
        lines.append("- The task score of these files: the scores were measured on the model they were made from.")
    elif scores and (what == "gguf" or (what == "merged" and "merged" not in scores)):
        loaded = f"the {recipe.model.load_in} base with the adapter on it"
        lines.append(f"- The task score of these files: the scores were measured on {loaded}.")
    if what == "gguf" and not all((record.get("proof") or {}).get("passed") for record in facts.gguf):
        lines.append("- Whether every GGUF file answers as the merged model does.")
    lines.append("- Whether held-out prompts were in the base model's own training data.")
    return "\n".join(["## Not measured", "", *lines, ""])


def _licence_text(base: BaseFacts) -> str:
    if not base.licence:
        return f"## Licence\n\nUnknown: the metadata of {base.name} names none. Ask its authors before you use it.\n"
    name = base.licence_name or base.licence
    link = f" ({base.licence_link})" if base.licence_link else ""
    return f"## Licence\n\n{name}{link}, according to the base model's metadata; it applies to models made from it.\n"
