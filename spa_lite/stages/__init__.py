"""What the page `spa.py` calls: each step of the method as one stage of a run folder, a file per axis.

A stage has a key (all that its result depends on) and files. It binds the roles it needs, calls what its axis is made
of, and writes what came out.
"""

from __future__ import annotations

from spa_lite.stages.candidates import Candidates
from spa_lite.stages.judge import Judging
from spa_lite.stages.measure import Measuring
from spa_lite.stages.prompts import Prompts
from spa_lite.stages.start import Start
from spa_lite.stages.train import Training


class Workshop(Start, Prompts, Candidates, Judging, Training, Measuring):
    """The stages of one run. Methods are named as the page `spa.py` calls them."""
