"""A run, or several, as one page that explains itself: `write_report`.

`collect` reads run folders into plain values, `figures` draws, `examples` chooses what is shown of answers and
judgements, `page` renders.
"""

from spa_lite.report.page import write_report

__all__ = ["write_report"]
