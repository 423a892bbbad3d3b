"""Write the pages and the picture that come from the code: `python docs/build.py`."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from house import picture, tables  # noqa: E402
from reference import reference  # noqa: E402

from grpo_lite.recipe.expected import Expected  # noqa: E402
from grpo_lite.recipe.find import anchor_names  # noqa: E402
from grpo_lite.recipe.load import load_all  # noqa: E402
from grpo_lite.report.doctor import troubleshooting  # noqa: E402

TABLE = re.compile(r"(?<=<!-- written by docs/build.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return every file that is written from the code, with its text."""
    architecture, results = HERE / "architecture.md", HERE / "results.md"
    return {
        HERE / "troubleshooting.md": troubleshooting(),
        HERE / "reference.md": reference(),
        HERE / "images" / "architecture.svg": picture(),
        architecture: TABLE.sub(lambda _: tables(), architecture.read_text(encoding="utf-8")),
        results: TABLE.sub(lambda _: anchors(), results.read_text(encoding="utf-8")),
    }


def anchors() -> str:
    """Return the table of the recipes that stand beside a published result."""
    rows = ["| recipe | published | expected | measured here |", "|---|---|---|---|"]
    for name, recipe in load_all(names=anchor_names())[0].items():
        found = recipe.expected
        if found is not None:
            said = f"{found.published}: [{found.source}]({found.link})"
            rows.append(f"| `{name}` | {said} | {_band(found)} | {found.measured or 'not yet: needs a GPU'} |")
    return "\n".join(rows) + "\n"


def _band(expected: Expected) -> str:
    step, low, high = expected.points[-1]
    if expected.of_scores:
        return f"{100 * low:.1f} to {100 * high:.1f} % after {step} steps"
    return f"{low:.2f} to {high:.2f} mean reward at step {step}"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
