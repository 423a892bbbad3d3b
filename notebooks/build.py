"""Write the notebooks from source.py: `python notebooks/build.py`. Outputs of a cell whose code is unchanged are kept.

`python notebooks/build.py --run quickstart_cpu` also executes one and keeps its outputs. The notebooks for a GPU show
the output of one cell, the plan of memory and time: arithmetic, which needs no GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat

from grpo_lite import PROJECT_URL

HERE = Path(__file__).resolve().parent
NOTEBOOKS = {"colab_gsm8k": "colab", "kaggle_gsm8k": "kaggle", "quickstart_cpu": "quickstart"}
_OPENERS = {
    "colab_gsm8k": ("https://colab.research.google.com/github", "https://github.com"),
    "kaggle_gsm8k": ("https://kaggle.com/kernels/welcome?src=https://github.com", "https://github.com"),
}


def address(name: str, project_url: str = PROJECT_URL) -> str:
    """Return where a notebook's badge leads: to the platform for a project on GitHub, else to the file."""
    file = f"notebooks/{name}.ipynb"
    opener, host = _OPENERS.get(name, ("", ""))
    if not host or not project_url.startswith(f"{host}/"):
        return file
    return f"{opener}{project_url.removeprefix(host).rstrip('/')}/blob/main/{file}"


def build(name: str) -> Any:
    """Return a notebook without outputs: the source's cells for its platform."""
    source = jupytext.read(HERE / "source.py")
    for cell in source.cells:
        cell.source = cell.source.replace('CLONE = ""', f'CLONE = "{PROJECT_URL}"')
    platform = NOTEBOOKS[name]
    cells = []
    for index, cell in enumerate(source.cells[1:]):  # the first one is the comment at the top
        tags = cell.metadata.get("tags", [])
        platforms = [tag for tag in tags if tag in NOTEBOOKS.values()]
        if platforms and platform not in platforms:
            continue
        make = nbformat.v4.new_markdown_cell if cell.cell_type == "markdown" else nbformat.v4.new_code_cell
        kept = {"tags": ["parameters"]} if "parameters" in tags else {}
        identity = hashlib.sha256(f"{index} {cell.source}".encode()).hexdigest()[:8]
        cells.append(make(cell.source, id=identity, metadata=kept))
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    if platform != "quickstart":
        notebook.metadata["accelerator"] = "GPU"
    return notebook


def with_outputs(notebook: Any, old: Any) -> Any:
    """Put the outputs of an older notebook into the cells whose code is the same."""
    outputs = {cell.source: cell for cell in old.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source in outputs:
            cell.outputs, cell.execution_count = outputs[cell.source].outputs, outputs[cell.source].execution_count
    return notebook


def with_plan(notebook: Any) -> Any:
    """Run the cell that plans for the GPU, with the notebook's own parameters, and put its output there."""
    from click.testing import CliRunner

    from grpo_lite.cli import main as grpo_lite

    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    (plan,) = [cell for cell in notebook.cells if cell.source.startswith('grpo_lite("plan"')]
    values: dict[str, Any] = {}
    exec(parameters.source, values)
    words = ["plan", values["RECIPE"], *values["OVERRIDES"], "--gpu", values["GPU"], "--budget", values["BUDGET"]]
    with contextlib.chdir(HERE.parent):  # as the notebook does: its hints name the commands of a checkout
        done = CliRunner().invoke(grpo_lite, words)
    assert done.exit_code == 0, done.output
    plan.outputs = [nbformat.v4.new_output("stream", name="stdout", text=done.output)]
    return notebook


def overridden(notebook: Any, **parameters: Any) -> Any:
    """Put a cell with other parameters behind the one tagged `parameters`, as papermill does."""
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    text = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(text))
    return notebook


def execute(notebook: Any, folder: Path, timeout_s: int = 3600) -> Any:
    """Run every cell in a kernel of this Python that starts in a folder; a cell that fails ends it with its error."""
    from nbclient import NotebookClient

    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=timeout_s, resources=place, coalesce_streams=True).execute()
    return notebook


def main(arguments: list[str]) -> None:
    """Write all notebooks; execute those named after --run."""
    for name in NOTEBOOKS:
        path = HERE / f"{name}.ipynb"
        notebook = build(name)
        if name in arguments[1:] and arguments[0] == "--run":
            execute(notebook, HERE)
            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # times of each message
        elif path.is_file():
            notebook = with_outputs(notebook, nbformat.read(path, as_version=4))
        if NOTEBOOKS[name] != "quickstart":
            notebook = with_plan(notebook)
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
