"""Run every shipped study and write what it showed into docs/ablations.md.

    python benchmarks/studies.py [--out runs] [--seeds 3]

Stages that are there already are not computed again, so a second call takes seconds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from spa_lite.ablate import shipped

PAGE = Path(__file__).parent.parent / "docs" / "ablations.md"


def main() -> None:
    """Run the studies one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in shipped():
        words = ["ablate", "--study", name, "--seeds", str(options.seeds), "--out", str(options.out / name)]
        subprocess.run([sys.executable, "-m", "spa_lite.cli", *words], check=True)
        table = (options.out / name / "results.md").read_text(encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), name, table), encoding="utf-8")


def with_table(page: str, name: str, table: str) -> str:
    """The page with a study's table between its two marks."""
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    if begin not in page:
        raise SystemExit(f"{PAGE} has no line {begin}")
    old = re.escape(begin) + rf"(?:.*?{re.escape(end)})?"
    return re.sub(old, lambda _: f"{begin}\n\n{table.strip()}\n\n{end}", page, count=1, flags=re.S)


if __name__ == "__main__":
    main()
