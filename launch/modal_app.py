"""Train a recipe on Modal. The run lies on a volume, so the same command resumes it.

    pip install modal && modal setup                                     once
    modal run launch/modal_app.py --recipe gsm8k                         one T4, a day at most
    GPU=L4:4 modal run --detach launch/modal_app.py --recipe math        four cards, your terminal may close
    modal run launch/modal_app.py --recipe gsm8k --args "grpo.max_steps=50"
    HF_TOKEN=hf_… modal run launch/modal_app.py --recipe gsm8k --repo user/grpo-gsm8k    pushes it, privately
    modal volume get grpo-lite-runs gsm8k runs/                          the run, on your machine

The image is built on the GPU of the job, because set-up chooses PyTorch by the driver. Not yet run on Modal: its
package accepts the file and calls our part as written here (tests/test_launch.py).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import modal

GPU = os.environ.get("GPU", "T4")  # L4, A10, A100-40GB …; `L4:4` is four cards
DAY_S = 24 * 60 * 60  # Modal's longest
KIT, RUNS, CACHE = "/kit", "/runs", "/root/.cache/huggingface"
LEFT_OUT = [".git", ".venv*", ".gpu", ".cache", "runs", "**/__pycache__"]

image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("git", "make")
    .add_local_dir(Path(__file__).resolve().parent.parent, KIT, copy=True, ignore=LEFT_OUT)
    .run_commands(f"cd {KIT} && make setup", gpu=GPU)
)
app = modal.App("grpo-lite", image=image)
volumes = {
    RUNS: modal.Volume.from_name("grpo-lite-runs", create_if_missing=True),
    CACHE: modal.Volume.from_name("grpo-lite-hub", create_if_missing=True),  # models and data, downloaded once
}
secrets = [modal.Secret.from_dict({"HF_TOKEN": os.environ["HF_TOKEN"]})] if "HF_TOKEN" in os.environ else []


@app.function(gpu=GPU, timeout=DAY_S, volumes=volumes, secrets=secrets)
def train(recipe: str, gpus: int, args: str, repo: str) -> None:
    """Train, score and merge on Modal's machine, and push the merged model where a repository is named."""
    run = f"{RUNS}/{recipe}"
    words = [f"RECIPE={recipe}", f"RUN={run}", f"GPUS={gpus}", f"ARGS={args}"]
    subprocess.run(["make", "train", *words], cwd=KIT, check=True)
    if repo:
        subprocess.run(["make", "push", f"RUN={run}", f"REPO={repo}", "PRIVATE=1"], cwd=KIT, check=True)


@app.local_entrypoint()
def main(recipe: str = "quickstart", args: str = "", repo: str = "") -> None:
    """Start the training from this machine."""
    train.remote(recipe, int(GPU.partition(":")[2] or 1), args, repo)
