"""The files under launch/ are read by the tools they are for; what needs several GPUs runs with one process."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["ddp", "fsdp_qlora"])
def test_accelerate_reads_every_key_of_a_config(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    file = ROOT / "launch" / f"{name}.yaml"
    config = load_config_from_file(str(file))  # unknown keys are an error
    expected = {"ddp": DistributedType.MULTI_GPU, "fsdp_qlora": DistributedType.FSDP}
    assert config.distributed_type == expected[name]
    known = set(vars(config))
    assert set(yaml.safe_load(file.read_text())) <= known


def test_accelerate_knows_every_key_of_the_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import ShardingStrategy, StateDictType

    given = yaml.safe_load((ROOT / "launch" / "fsdp_qlora.yaml").read_text())["fsdp_config"]
    options = set(vars(launch_command_parser().parse_args(["script.py"])))
    assert set(given) <= options
    assert given["fsdp_sync_module_states"] is given["fsdp_cpu_ram_efficient_loading"] is True
    off = {"fsdp_sync_module_states": False, "fsdp_cpu_ram_efficient_loading": False}  # they ask for a GPU at once
    for key, value in (given | off).items():  # as `accelerate launch` hands them over
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 1
    assert ShardingStrategy.FULL_SHARD in (plugin.sharding_strategy, plugin.reshard_after_forward)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT


def launched(file: Path) -> str:
    """Return the `accelerate launch` line of a SkyPilot task, its shell variables filled in."""
    run = yaml.safe_load(file.read_text())["run"]
    filled = subprocess.run(
        ["bash", "-euc", run.replace(".venv/bin/accelerate", "echo accelerate")],
        env={
            "PATH": os.environ["PATH"], "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "4", "SKYPILOT_NODE_RANK": "1",
        },
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return filled.stdout.strip()


def test_the_skypilot_task_launches_every_card_of_both_machines() -> None:
    from accelerate.commands.launch import launch_command_parser

    command = launched(ROOT / "launch" / "skypilot.yaml").split()
    assert command[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(command[2:])
    assert (args.num_machines, args.num_processes, args.machine_rank, args.main_process_ip) == (2, 8, 1, "10.0.0.7")
    assert args.module
    assert args.training_script_args == ["train", "math", "--run", "runs/math"]
    assert (ROOT / args.config_file).is_file()


@pytest.mark.slow
def test_hugging_face_jobs_takes_the_job(tmp_path: Path) -> None:
    """`--dry-run` is hf's own: it reads the options, sends nothing and needs no account."""
    hf = Path(sys.executable).with_name("hf")
    if not hf.is_file():
        pytest.skip("the command hf is not installed")
    git = subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], cwd=ROOT, capture_output=True)
    if git.returncode:
        pytest.skip("this is no git checkout")
    environment = {**os.environ, "PATH": f"{hf.parent}:{os.environ['PATH']}", "HF_TOKEN": "hf_none"}
    done = subprocess.run(
        ["bash", "launch/hf_jobs.sh", "gsm8k", "user/grpo-gsm8k", "--dry-run"],
        cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not submitted" in done.stdout
    assert "make train RECIPE=gsm8k GPUS=1 ARGS=push_checkpoints=user/grpo-gsm8k-checkpoints" in done.stdout
    assert re.search(r"flavor\s+t4-small", done.stdout)


def test_the_job_s_command_is_one_that_a_shell_runs(tmp_path: Path) -> None:
    """The kit's part of the job: what hf is given as the command, with make in the place of make."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in {
        "hf": 'for last; do :; done; printf %s "$last" > "$OUT/command"',
        "make": 'echo "$@" >> "$OUT/made"',
        "git": "tar -c -f - /dev/null 2>/dev/null",
    }.items():
        (place / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / name).chmod((place / name).stat().st_mode | stat.S_IEXEC)
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "OUT": str(tmp_path), "GPUS": "4"}
    subprocess.run(["bash", str(ROOT / "launch" / "hf_jobs.sh"), "math", "me/math"], env=environment, check=True)
    command = (
        (tmp_path / "command").read_text().replace("/source", str(place)).replace("/tmp/kit", str(tmp_path / "kit"))
    )
    subprocess.run(["bash", "-ec", command], env=environment, check=True)
    assert (tmp_path / "made").read_text().splitlines() == [
        "train RECIPE=math GPUS=4 ARGS=push_checkpoints=me/math-checkpoints",
        "push RUN=runs/math REPO=me/math PRIVATE=1",
    ]


@pytest.mark.slow
def test_modal_takes_the_file_and_its_options() -> None:
    pytest.importorskip("modal", reason="modal is not installed")
    command = [sys.executable, "-m", "modal", "run", "launch/modal_app.py", "--help"]  # reads the file, sends nothing
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"--recipe", "--args", "--repo"} <= set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The train function is executing locally")
def test_modal_trains_then_pushes_by_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our part of what runs there, with make in the place of make; the image gets the code and no environment."""
    pytest.importorskip("modal", reason="modal is not installed")
    spec = importlib.util.spec_from_file_location("modal_app", ROOT / "launch" / "modal_app.py")
    assert spec is not None
    assert spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    (tmp_path / "make").write_text('#!/bin/sh\nprintf "%s|" "$@" >> made\necho >> made\n')
    (tmp_path / "make").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(app, "KIT", str(tmp_path))
    app.train.local("math", 4, "grpo.max_steps=5 seed=7", "me/math")
    assert (tmp_path / "made").read_text().splitlines() == [
        "train|RECIPE=math|RUN=/runs/math|GPUS=4|ARGS=grpo.max_steps=5 seed=7|",
        "push|RUN=/runs/math|REPO=me/math|PRIVATE=1|",
    ]
    assert {".venv*", "runs", ".git"} <= set(app.LEFT_OUT)


@pytest.mark.slow
def test_the_script_for_sharded_bases_trains_a_recipe_that_merges(tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = [str(ROOT / "launch" / "fsdp_qlora.py"), "smoke", str(run), "grpo.max_steps=2", "grpo.learning_rate=1e-2"]
    reward = tmp_path / "varied.py"
    reward.write_text(
        "def varied(completions, **kwargs):\n    return [len(c[0]['content']) % 3 for c in completions]\n"
    )
    script += [f"rewards[0].function={reward}:varied", "rewards[0].kwargs={}"]
    for command in (script, ["-m", "grpo_lite.cli", "merge", str(run)]):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "merged" / "model.safetensors").is_file()


def test_our_trainer_refuses_to_be_sharded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from grpo_lite.trainer.trainer import PackedGRPOTrainer
    from tests.tiny import parity_reward, tiny_args, tiny_lora, tiny_model, tiny_prompts, tiny_tokenizer

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP), raising=False)
    with pytest.raises(ValueError, match=r"launch/fsdp_qlora\.py"):
        PackedGRPOTrainer(
            model=tiny_lora(tiny_model()), args=tiny_args(tmp_path), reward_funcs=parity_reward,
            train_dataset=tiny_prompts(4), processing_class=tiny_tokenizer(),
        )  # fmt: skip
