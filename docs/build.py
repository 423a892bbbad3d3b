"""Write the pages and the picture that come from the code: `python docs/build.py`."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from house import picture, tables  # noqa: E402
from reference import reference  # noqa: E402

from grpo_lite.report.doctor import troubleshooting  # noqa: E402

TABLE = re.compile(r"(?<=<!-- written by docs/build.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return every file that is written from the code, with its text."""
    architecture = HERE / "architecture.md"
    return {
        HERE / "troubleshooting.md": troubleshooting(),
        HERE / "reference.md": reference(),
        HERE / "images" / "architecture.svg": picture(),
        architecture: TABLE.sub(lambda _: tables(), architecture.read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
