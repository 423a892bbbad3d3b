"""Write the pages that come from the code: `python docs/build.py`."""

from pathlib import Path

from grpo_lite.report.doctor import troubleshooting

Path(__file__).with_name("troubleshooting.md").write_text(troubleshooting(), encoding="utf-8")
