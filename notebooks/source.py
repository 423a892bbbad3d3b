# The one source of the notebooks. `python notebooks/build.py` writes colab_gsm8k, kaggle_gsm8k and quickstart_cpu from
# it: a cell with tags goes into the notebooks it names, a cell without any into all three.

# %% [markdown] tags=["colab"]
# # GRPO on a free Colab T4: Qwen2.5-1.5B learns GSM8K
# *Runtime → Change runtime type → T4 GPU*, then *Runtime → Run all*. Checkpoints go to your Google Drive: after a
# disconnect run all cells again, and training resumes where it stopped.

# %% [markdown] tags=["kaggle"]
# # GRPO on Kaggle's free T4: Qwen2.5-1.5B learns GSM8K
# *Settings → Accelerator → GPU T4*, *Internet → On*, then *Run all*. One of two T4s is used. Checkpoints go to
# `/kaggle/working`: with *Persistence → Files*, run all cells again after a disconnect, and training resumes.

# %% [markdown] tags=["quickstart"]
# # GRPO on a laptop's CPU: SmolLM2-135M learns to think before it answers
# Every cell below ran as shown on two CPU cores without a GPU; the outputs are from that run.

# %% [markdown]
# ## What to run
# The only cell to edit. `OVERRIDES` takes any key of the recipe, such as `grpo.max_steps=50` or
# `data.train.path=my.jsonl`.

# %% tags=["parameters", "colab"]
SOURCE = "grpo_lite"  # folder of the project: a clone, or an upload
CLONE = ""  # the project's git address: cloned into SOURCE where that is not there
RECIPE = "gsm8k"
RUN = "/content/drive/MyDrive/grpo_lite/gsm8k"  # on Drive: survives a disconnect
DRIVE = True  # ask for Google Drive
BUDGET = "3h"  # as much of the recipe as fits into it, scores and merge included; "" for the whole recipe
OVERRIDES = []
QUESTION = "A shop sells pens at 3 for 2 dollars. How many dollars do 12 pens cost?"
GPU = "t4"  # the card to plan for; `grpo-lite plan --help` names others
PROBE = 32  # prompts that the untrained model is tried on
GGUF = "q8_0"  # "" for none
REPO_ID = ""  # user/name on the Hub; empty: a dry run that sends nothing

# %% tags=["parameters", "kaggle"]
SOURCE = "/kaggle/working/grpo_lite"  # folder of the project: a clone, or a dataset you attached
CLONE = ""  # the project's git address: cloned into SOURCE where that is not there
RECIPE = "gsm8k"
RUN = "/kaggle/working/gsm8k"
BUDGET = "8h"  # as much of the recipe as fits into it, scores and merge included; a session lasts 9 hours at most
OVERRIDES = []
QUESTION = "A shop sells pens at 3 for 2 dollars. How many dollars do 12 pens cost?"
GPU = "t4"  # the card to plan for; `grpo-lite plan --help` names others
PROBE = 32  # prompts that the untrained model is tried on
GGUF = "q8_0"  # "" for none
REPO_ID = ""  # user/name on the Hub; empty: a dry run that sends nothing

# %% tags=["parameters", "quickstart"]
SOURCE = ".."  # folder of the project
RECIPE = "quickstart"
RUN = "runs/notebook"
OVERRIDES = []  # a time budget: ["limits.max_minutes=30"]
QUESTION = "4+7+8+9"
GGUF = ""  # such as "q8_0"
REPO_ID = ""  # user/name on the Hub; empty: a dry run that sends nothing

# %% [markdown]
# ## Install
# The platform's own torch and numpy stay as they are: pip is pinned to exactly their versions.

# %% tags=["colab"]
if DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")

# %% tags=["kaggle"]
import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a 4-bit model cannot be spread over the two T4s

# %% tags=["colab", "kaggle"]
import subprocess
from pathlib import Path

if CLONE and not Path(SOURCE).is_dir():
    subprocess.run(["git", "clone", "-q", "--depth", "1", CLONE, SOURCE], check=True)

# %%
import importlib
import os
import sys
from pathlib import Path

root = Path(SOURCE).resolve()
assert (root / "recipes").is_dir(), f"{root} is not the project: set SOURCE to its folder"
sys.path.insert(0, str(root))
os.chdir(root)
bootstrap = importlib.import_module("grpo_lite.bootstrap")
assert bootstrap.install_here() == 0, "pip's last lines above say why"

# %% [markdown]
# ## This machine
# Device, versions, and what isolates code that a model writes.

# %%
from grpo_lite.cli import main


def grpo_lite(*words):
    """The command line, in this process: `grpo_lite("train", "gsm8k")` is `grpo-lite train gsm8k`."""
    main([str(word) for word in words], standalone_mode=False)


grpo_lite("doctor")

# %% [markdown] tags=["colab", "kaggle"]
# How its memory will be used and what fits into the budget, before anything is loaded. *The output below is no run on a
# GPU: a plan is arithmetic, and it was printed by a machine without one. All other cells are empty until you run them.*

# %% tags=["colab", "kaggle"]
grpo_lite("plan", RECIPE, *OVERRIDES, "--gpu", GPU, *(["--budget", BUDGET] if BUDGET else []))

# %% [markdown]
# ## What it will train on
# The prompts as the model sees them, their lengths, and whether the rewards pay the right answer and nothing else.

# %%
grpo_lite("check", RECIPE, *OVERRIDES, "--previews", "1")
grpo_lite("rewards", "check", RECIPE, *OVERRIDES)

# %% [markdown] tags=["colab", "kaggle"]
# And will it learn? The untrained model on some of the prompts: how many it solves already, how many groups teach. It
# also measures this card, for the budget.

# %% tags=["colab", "kaggle"]
grpo_lite("probe", RECIPE, *OVERRIDES, "--prompts", PROBE)

# %% [markdown] tags=["colab", "kaggle"]
# ## Train
# The budget chooses steps and scores by this card's speed, once. Run this cell again after a disconnect, or if training
# paused to stay within the budget: it resumes from the last checkpoint, with the same numbers. The board is redrawn in
# place. The doctor says what is wrong, if anything, and what to type.

# %% tags=["colab", "kaggle"]
from grpo_lite.runs.run_dir import RunDir

run = RunDir(RUN)
if run.read_run().get("finished_at"):
    print(f"{RUN} is finished already")
else:
    grpo_lite("train", RECIPE, *OVERRIDES, "--run", RUN, *(["--budget", BUDGET] if BUDGET else []))

# %% [markdown] tags=["quickstart"]
# ## Train
# Run this cell again after a disconnect, or after the time budget (`limits.max_minutes`) has ended it: it resumes from
# the last checkpoint. The board is redrawn in place. The doctor says what is wrong, if anything, and what to type.

# %% tags=["quickstart"]
from grpo_lite.runs.run_dir import RunDir

run = RunDir(RUN)
if run.read_run().get("finished_at"):
    print(f"{RUN} is finished already")
else:
    grpo_lite("train", RECIPE, *OVERRIDES, "--run", RUN)

# %% [markdown]
# ## Report
# Verdict, curves, completions, time; also as one file, `report.html`, to keep.

# %%
grpo_lite("report", RUN)
grpo_lite("doctor", RUN)

# %% tags=["colab", "kaggle"]
from IPython.display import display

from grpo_lite.report.page import inline_report

display(inline_report(run))

# %% tags=["quickstart"]
from IPython.display import Image, display

display(Image(str(run.path / "curves.png")))

# %% [markdown]
# ## Base and trained, side by side

# %%
grpo_lite("chat", RUN, QUESTION, "--compare")

# %% [markdown]
# ## Merge and export
# Training has already merged the adapter onto the 16-bit base and proven the result. Export checks the files again, and
# makes a GGUF for Ollama if `GGUF` names a kind. A run whose update is too small to merge says so.

# %%
if run.merged.is_dir():
    grpo_lite("export", RUN, *(["--gguf", GGUF] if GGUF else []))
else:
    print("nothing was merged:", run.read_run().get("merge"))

# %% [markdown]
# ## Push
# Without `REPO_ID` this only shows what would be sent: files, sizes and the card with the measured scores. To send
# them, set `REPO_ID` and log in (`from huggingface_hub import login; login()`).

# %%
what = "merged" if run.merged.is_dir() else "adapter"
if REPO_ID:
    grpo_lite("push", RUN, REPO_ID, "--what", what)
else:
    grpo_lite("push", RUN, "me/my-model", "--what", what, "--dry-run")
