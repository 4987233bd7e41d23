"""Run the shipped studies and write what they showed into the pages that have a place for it.

    python benchmarks/studies.py [STUDY ...] [--out runs] [--seeds 3]

Stages that are there already are not computed again, so a second call takes seconds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from spa_lite.ablate import shipped

PAGES = [Path(__file__).parent.parent / "docs" / name for name in ("ablations.md", "recipes.md")]


def main() -> None:
    """Run the studies one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="all of them if none is named")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    pages = {name: page_of(name) for name in options.studies or shipped()}
    for name, page in pages.items():
        words = ["ablate", "--study", name, "--seeds", str(options.seeds), "--out", str(options.out / name)]
        subprocess.run([sys.executable, "-m", "spa_lite.cli", *words], check=True)
        table = (options.out / name / "results.md").read_text(encoding="utf-8")
        page.write_text(with_table(page.read_text(encoding="utf-8"), name, table), encoding="utf-8")


def page_of(name: str) -> Path:
    """The page with a place for a study's table, looked for before the study runs."""
    for page in PAGES:
        if f"<!-- table: {name} -->" in page.read_text(encoding="utf-8"):
            return page
    raise SystemExit(f"no page has a line <!-- table: {name} -->")


def with_table(page: str, name: str, table: str) -> str:
    """The page with a study's table between its two marks."""
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    old = re.escape(begin) + rf"(?:.*?{re.escape(end)})?"
    return re.sub(old, lambda _: f"{begin}\n\n{table.strip()}\n\n{end}", page, count=1, flags=re.S)


if __name__ == "__main__":
    main()
