#!/usr/bin/env bash
# Train a recipe on Hugging Face Jobs and push the result; needs `hf auth login` and a paid account.
#   bash launch/hf_jobs.sh gsm8k user/grpo-gsm8k                 one T4, six hours at most
#   bash launch/hf_jobs.sh gsm8k user/grpo-gsm8k --dry-run       what would be submitted
#   FLAVOR=l4x4 GPUS=4 bash launch/hf_jobs.sh math user/grpo-math --detach
# The job gets the committed files. Checkpoints are kept in the bucket user/REPO-checkpoints: the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=$1 repo=$2
shift 2
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
git archive HEAD | tar -x -C "$source"
hf jobs run --flavor "${FLAVOR:-t4-small}" --timeout "${TIMEOUT:-6h}" --secrets HF_TOKEN -v "$source:/source" "$@" \
  python:3.12 bash -c "cp -r /source /tmp/kit && cd /tmp/kit \
&& make train RECIPE=$recipe GPUS=${GPUS:-1} ARGS=push_checkpoints=$repo-checkpoints \
&& make push RUN=runs/$recipe REPO=$repo PRIVATE=1"
