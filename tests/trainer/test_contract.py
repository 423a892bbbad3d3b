"""What our trainers rely on in TRL, transformers and PEFT: fails loudly, by name, when one of them moves."""

import ast
import hashlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from trl import GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import split_tensor_dict

import grpo_lite.trainer
from grpo_lite.engine.options import EngineOptions
from grpo_lite.models.reference import REFERENCE_NAME
from grpo_lite.trainer import INTERNALS
from grpo_lite.trainer.trainer import PackedGRPOTrainer
from grpo_lite.trainer.unsloth import unsloth_trainer
from tests.tiny import relative_difference, tiny_args, tiny_lora, tiny_model, tiny_tokenizer, train_fixed

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

# Digests of the methods we replace, or whose behaviour we rely on line by line, in the versions that were read.
READ = {
    "1.14.0": {
        "_compute_loss": "75bd01badfb4",
        "_get_train_sampler": "36497afb4d31",
        "_prepare_inputs": "f824e7fb0714",
        "compute_loss": "025c54e3c20b",
        "training_step": "9e18632f7dd8",
    },
    "1.16.0": {
        "_compute_loss": "80295546bbdb",
        "_get_train_sampler": "36497afb4d31",
        "_prepare_inputs": "f824e7fb0714",
        "compute_loss": "a2d6ef8bd29c",
        "training_step": "9e18632f7dd8",
    },
}


# The same of SFTTrainer, for the warm-up.
SAME = {"training_step": "bba41f264647", "log": "0d4c8e5d64f8", "_save_checkpoint": "b6ee0a370c26"}
READ_OF_SFT = {
    "1.14.0": {"compute_loss": "87485cdebc7e", **SAME},
    "1.16.0": {"compute_loss": "ca448211ff65", **SAME},
}


def digest(function: Any) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    "name", ["_prepare_inputs", "_compute_loss", "compute_loss", "training_step", "_get_train_sampler"]
)
def test_method_is_as_it_was_read(name: str):
    if trl.__version__ not in READ:
        pytest.fail(
            f"trl {trl.__version__} was never read: compare GRPOTrainer.{name} with {max(READ)}, then add it to READ"
        )
    assert digest(getattr(GRPOTrainer, name)) == READ[trl.__version__][name], f"GRPOTrainer.{name} has changed"


@pytest.mark.parametrize("name", READ_OF_SFT["1.16.0"])
def test_method_of_the_warm_up_is_as_it_was_read(name: str):
    if trl.__version__ not in READ_OF_SFT:
        pytest.fail(f"trl {trl.__version__} was never read: compare SFTTrainer.{name}, then add it to READ_OF_SFT")
    assert digest(getattr(SFTTrainer, name)) == READ_OF_SFT[trl.__version__][name], f"SFTTrainer.{name} has changed"


def test_scoring_method_has_the_arguments_we_pass_on():
    method = GRPOTrainer._get_per_token_logps_and_entropies
    source = inspect.getsource(GRPOTrainer)
    parameters = inspect.signature(method).parameters
    assert {"model", "batch_size", "compute_aux_loss"} <= parameters.keys()
    for name in ("input_ids", "attention_mask", "logits_to_keep", "compute_entropy"):
        assert f"        {name}" in source


def test_generation_starts_from_lists_of_prompt_tokens():
    parameters = list(inspect.signature(GRPOTrainer._generate_single_turn).parameters)
    assert parameters[:4] == ["self", "prompt_ids", "images", "multimodal_fields"]
    assert "unwrapped_model.generate(" in inspect.getsource(GRPOTrainer._generate_single_turn)


def test_the_reference_is_the_adapter_named_ref_where_there_is_one():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert f'adapter_name="{REFERENCE_NAME}" if "{REFERENCE_NAME}" in model.peft_config else None' in source


def test_a_generation_batch_is_split_in_order():
    parts = split_tensor_dict({"a": torch.arange(4), "total": torch.tensor(7)}, 2)
    assert [part["a"].tolist() for part in parts] == [[0, 1], [2, 3]]
    assert [int(part["total"]) for part in parts] == [7, 7]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
def test_a_4d_mask_and_unknown_keywords_reach_the_attention(kind: str, monkeypatch: pytest.MonkeyPatch):
    from grpo_lite.engine import attention

    seen: list[Any] = []
    model = tiny_model(kind)
    attention.install(model)

    class Recorder:
        def attend(self, layer: int, query: Any, key: Any, value: Any, scaling: Any) -> torch.Tensor:
            seen.append((layer, tuple(query.shape), tuple(key.shape)))
            return query.transpose(1, 2)

    mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool)
    model.base_model(torch.tensor([[3, 4, 5]]), attention_mask=mask, use_cache=False, packed_layout=Recorder())
    assert seen == [(layer, (1, 4, 3, 8), (1, 2, 3, 8)) for layer in range(2)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_run_resumed_from_a_checkpoint_ends_in_the_same_weights(reentrant: bool, tmp_path: Path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    options = EngineOptions(tokens_per_microbatch=60)

    def by_step(seed: int) -> Any:
        """Completions depend on the step, not on the number of calls, so that a resumed run sees the rest."""

        class ByStep(PackedGRPOTrainer):
            def _prepare_inputs(self, batch: Any) -> Any:
                torch.manual_seed(seed + self.state.global_step)
                return super()._prepare_inputs(batch)

        return ByStep

    args = tiny_args(tmp_path / "whole", **settings)
    whole, _ = train_fixed(by_step(5), tiny_lora(tiny_model()), args, same_completions=True, options=options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed, _ = train_fixed(
        by_step(5),
        tiny_lora(tiny_model()),
        tiny_args(tmp_path / "rest", **settings),
        same_completions=True,
        options=options,
        resume=str(checkpoint),
    )
    assert resumed.state.global_step == 4
    weights = [dict(trainer.model.named_parameters()) for trainer in (resumed, whole)]
    assert relative_difference(*weights) < 1e-5


@pytest.mark.parametrize("kind", [PackedGRPOTrainer, unsloth_trainer(GRPOTrainer, 3)], ids=["ours", "unsloth"])
def test_the_trained_adapter_is_loaded_beside_the_frozen_reference(kind: type, tmp_path: Path):
    """Transformers before 5.23 loads only the reference, and training would begin again."""
    args = tiny_args(tmp_path, beta=0.01, save_strategy="steps", save_steps=1)
    trainer, _ = train_fixed(kind, tiny_lora(tiny_model()), args)
    adapters = {name: weight for name, weight in trainer.model.named_parameters() if "lora" in name}
    saved = {name: weight.detach().clone() for name, weight in adapters.items()}
    assert any(not torch.equal(saved[name], saved[name.replace(".default.", ".ref.")]) for name in saved)
    for weight in adapters.values():
        weight.data.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for name, weight in trainer.model.named_parameters():
        if "lora" in name:
            assert torch.equal(weight, saved[name]), name
            assert weight.requires_grad == (".default." in name)


def used_of_the_trainer(module: str) -> set[str]:
    """Return what a part's code uses of `trainer` or `self.trainer`, and a trainer of `self`; "=": it writes it."""
    path = Path(grpo_lite.trainer.__file__).with_name(f"{module}.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    trainers = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer")]
    own = {id(node) for trainer in trainers for node in ast.walk(trainer)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        is_trainer = isinstance(owner, ast.Name) and owner.id == ("self" if id(node) in own else "trainer")
        is_trainer |= isinstance(owner, ast.Attribute) and owner.attr == "trainer"
        if is_trainer:
            names.add(node.attr + ("=" if isinstance(node.ctx, ast.Store) else ""))
    return {name for name in names if name.endswith("=") or f"{name}=" not in names}


OURS = {"options", "journal", "peers", "faults", "support", "order", "rollouts", "gradients", "recovery", "loss_scale"}
OURS |= {"exact", "checkpoints", "episodes", "replay", "early", "_was_the_last"}
# TRL makes these only for tools and environments (tests/trainer/test_tools.py).
WITH_TOOLS = {"_sync_tool_dicts", "_async_tool_dicts", "_env_tools", "_environment_pool", "_batch_environments"}
OURS_IN_THE_WARM_UP = {"options", "journal", "peers", "faults", "loss_scale", "checkpoints", "show", "recover", "held"}
OURS_IN_THE_WARM_UP |= {
    "_packable",
    "_is_packable",
    "_obstacle",
    "advice",
    "epochs",
    "held_out_loss",
    "_halve",
    "_in_parts",
    "_unlogged",
    "_log_figures",
}


@pytest.mark.parametrize("part", INTERNALS)
def test_what_a_part_uses_of_trl_is_declared(part: str):
    ours = OURS_IN_THE_WARM_UP if part == "warmup" else OURS
    used = {name for name in used_of_the_trainer(part) if name.removesuffix("=") not in ours}
    assert sorted(used) == sorted(INTERNALS[part].split())


def test_every_part_is_in_the_table():
    modules = {path.stem for path in Path(grpo_lite.trainer.__file__).parent.glob("*.py")} - {"__init__", "prompts"}
    assert modules == set(INTERNALS)


def test_what_is_declared_is_there_and_our_names_are_free(tmp_path: Path):
    args = tiny_args(tmp_path, max_steps=1)
    plain, _ = train_fixed(GRPOTrainer, tiny_lora(tiny_model()), args)
    parts = {part: line for part, line in INTERNALS.items() if part != "warmup"}
    names = {name.removesuffix("=") for line in parts.values() for name in line.split()}
    assert {name for name in names if not hasattr(plain, name)} == WITH_TOOLS
    assert {name for name in OURS if hasattr(plain, name)} == set()


# What the warm-up's trainer and the parts that it shares with GRPO's use of SFTTrainer.
SHARED = "parallel: accelerator= args model; state: accelerator args state; journal: _metrics model state; "
SHARED += "finite: _metrics accelerator add_callback args model state"


def test_what_the_warm_up_uses_is_there_and_its_names_are_free(tmp_path: Path):
    plain = sft_trainer(tmp_path)
    shared = [part.partition(":")[2] for part in SHARED.split(";")]
    names = {name.removesuffix("=") for line in [INTERNALS["warmup"], *shared] for name in line.split()}
    assert {name for name in names if not hasattr(plain, name)} == set()
    assert {name for name in OURS_IN_THE_WARM_UP if hasattr(plain, name)} == set()
    assert all(hasattr(SFTTrainer, name) for name in READ_OF_SFT["1.16.0"])


def test_the_warm_up_is_given_what_it_asks_for(tmp_path: Path):
    """No row is prepared, cut or dropped by TRL, and its own collator's tensors reach the loss."""
    plain = sft_trainer(tmp_path)
    assert plain.args.max_length is None
    assert plain.train_dataset[0] == {"rows": [0, 1]}
    (batch,) = plain.get_train_dataloader()
    assert batch == "collated"
    assert not plain.padding_free
    assert "num_items_in_batch" in inspect.signature(plain.compute_loss).parameters
    assert plain.model_accepts_loss_kwargs, "the step's tokens would not be counted over all processes"


def sft_trainer(folder: Path) -> Any:
    args = SFTConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=1, report_to="none", max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, bf16=False, remove_unused_columns=False,
    )  # fmt: skip
    return SFTTrainer(
        tiny_lora(tiny_model()), args, train_dataset=Dataset.from_list([{"rows": [0, 1]}]),
        processing_class=tiny_tokenizer(), data_collator=lambda rows: "collated",
    )  # fmt: skip


def test_a_subclass_may_still_override_the_loss(tmp_path: Path):
    calls: list[int] = []

    class Sub(PackedGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            calls.append(1)
            return super()._compute_loss(model, inputs)

    train_fixed(Sub, tiny_lora(tiny_model()), tiny_args(tmp_path))
    assert calls == [1]
