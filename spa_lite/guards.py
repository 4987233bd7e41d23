"""Contradictions between the pieces of a recipe, found before any work. Each guard says what is wrong and the mend.

What is refused here would run and mean nothing: a reward that is 0 for every answer, a loss without what it compares
with, an option that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator

from spa_lite.errors import RecipeError
from spa_lite.recipe import Recipe

LABELLED = {"pairs", "fewshot"}
"""Prompt sources that read the labelled pairs."""
WRITTEN = {"persona", "fewshot", "keywords", "bare"}
"""Prompt sources that are written by the model."""
PROBABLE = {"implicit", "likelihood", "self-pair", "reward-model", "openai"}
"""Judges whose opinion is a probability."""


def check(recipe: Recipe) -> None:
    """Raise RecipeError for the first contradiction between the pieces of a recipe that has rounds."""
    if not recipe.rounds:
        return
    for guard in (_prompts, _candidates, _judge, _pairing, _loss, _noise, _cache):
        for problem in guard(recipe):
            raise RecipeError(problem)


def answers_per_prompt(recipe: Recipe) -> int:
    """How many answers to a prompt are judged."""
    several = {"sample": recipe.sampling.n, "pair": 2}
    return sum(several.get(kind, 1) for kind in recipe.candidates.kinds)


def is_written(recipe: Recipe) -> bool:
    """Whether the model writes the prompts of the rounds."""
    return recipe.rounds > 0 and recipe.prompts.source in WRITTEN


def needs_pool(recipe: Recipe) -> bool:
    """Whether the rounds read prompts that are given."""
    return recipe.rounds > 0 and recipe.prompts.source == "pool"


def needs_pairs(recipe: Recipe) -> str:
    """What the labelled pairs are needed for; nothing if a run of the recipe can do without them."""
    p = recipe.prompts
    if not recipe.inputs.no_seed_pairs and recipe.seed_dpo.by != "none":
        return f"the seed stage (seed_dpo.by={recipe.seed_dpo.by})"
    if not recipe.rounds:
        return ""
    if p.source in LABELLED or (p.source == "gold" and not recipe.inputs.gold):
        return f"prompts={p.source}"
    if p.source == "keywords" and (p.generator or not p.keywords):
        return "the keywords of prompts=keywords"
    return "candidates=improve" if "improve" in recipe.candidates.kinds else ""


def has_seed_stage(recipe: Recipe) -> bool:
    """Whether pi_0 is trained, on labelled pairs."""
    return recipe.seed_dpo.by != "none" and not recipe.inputs.no_seed_pairs


def starts_at_init(recipe: Recipe) -> bool:
    """Whether pi_0 is pi_init: nothing is trained before the first round, and no policy is given."""
    return not has_seed_stage(recipe) and not recipe.inputs.adapter_path


def _prompts(r: Recipe) -> Iterator[str]:
    p = r.prompts
    if needs_pairs(r) and r.inputs.no_seed_pairs:
        yield f"{needs_pairs(r)} needs labelled pairs, and inputs.no_seed_pairs says that there are none; leave it out"
    if p.source == "pool" and p.count:
        yield "prompts.count is for prompts that are written or gone through again; for a pool give --limit-prompts"
    for name, sources in {
        "personas": {"persona"},
        "keywords": {"keywords"},
        "template": WRITTEN,
    }.items():
        if getattr(p, name) and p.source not in sources:
            yield f"prompts.{name} is for prompts={' or '.join(sorted(sources))}, and prompts={p.source}; leave it out"
    if p.generator and p.source != "keywords":
        yield f"prompts.generator teaches a writer of keywords, and prompts={p.source}; leave it out"
    if r.inputs.gold and p.source != "gold":
        yield f"--gold is for prompts=gold, and prompts={p.source}; leave it out"


def _candidates(r: Recipe) -> Iterator[str]:
    kinds, source = r.candidates.kinds, r.prompts.source
    if len(set(kinds)) < len(kinds):
        yield f"candidates={','.join(kinds)} names a kind twice; for several samples raise sampling.n"
    if "gold" in kinds and source not in {"gold", "pairs"}:
        yield f"candidates=gold needs prompts with a good answer, and prompts={source}; choose prompts=gold"
    if "pair" in kinds and source != "pairs":
        yield f"candidates=pair needs labelled prompts, and prompts={source}; choose prompts=pairs"
    if answers_per_prompt(r) < 2:
        yield f"candidates={','.join(kinds)} gives one answer per prompt, and a pair needs two; raise --n or add a kind"
    if kinds == ["sample"] and r.sampling.temp == 0 and r.judge.identical == "drop":
        yield "sampling.temp=0 draws the same answer every time, so no pair is left; raise --temp"
    if r.sampling.by and (kinds != ["sample"] or is_written(r)):
        yield "--sampler draws plain answers to given prompts; leave it out, or use prompts=pool and candidates=sample"


def _judge(r: Recipe) -> Iterator[str]:
    j, kinds = r.judge, r.candidates.kinds
    judges = {j.by} | ({r.pairing.gap_judge} if r.pairing.gap_judge else set())
    own = j.reference != "none" and not (r.inputs.init_model or j.adapter)
    if "implicit" in judges and own and starts_at_init(r):
        yield (
            "the judge's policy would equal its reference, so every reward is 0; keep the seed stage (--seed-stage "
            "dpo), or give --adapter-path (the policy, with --no-seed-pairs), --init-model (the reference) or "
            "--judge-adapter"
        )
    if j.by == "order" and len(kinds) < 2:
        yield f"judge=order ranks kinds of candidates, and there is only {kinds[0]}; add a kind or choose another judge"
    if j.by == "label" and kinds != ["pair"]:
        yield f"judge=label knows nothing of candidates={','.join(kinds)}; choose candidates=pair or another judge"


def _pairing(r: Recipe) -> Iterator[str]:
    p, n = r.pairing, answers_per_prompt(r)
    if p.by == "two" and n != 2:
        yield f"pairing=two needs two answers per prompt and there are {n}; choose pairing=best-worst"
    if p.min_gap and r.judge.by in {"order", "label"} and not p.gap_judge:
        yield f"pairing.min_gap needs scores, and judge={r.judge.by} gives ranks; name a --gap-judge"
    if p.gap_judge and not p.min_gap:
        yield "pairing.gap_judge is for pairing.min_gap, which is 0; give --min-gap too"


def _loss(r: Recipe) -> Iterator[str]:
    from spa_lite import losses  # brings NumPy, and a help page can do without

    kind, reference = r.loss.kind, r.train.reference
    compares = kind in losses.NEEDS_REFERENCE
    if compares and reference == "none":
        yield f"loss={kind} compares with a reference, and reference=none; choose reference=prev or a loss without one"
    if not compares and reference in {"prev", "init"}:
        yield f"loss={kind} has no reference, so reference={reference} would change nothing; choose reference=none"
    if r.loss.optimism and not compares:
        yield f"loss.optimism compares with a reference, and loss={kind} has none; choose loss=dpo"
    if r.loss.optimism and not {"greedy", "sample"} & set(r.candidates.kinds):
        yield "loss.optimism needs an answer of the policy's own; add greedy to the candidates"


def _noise(r: Recipe) -> Iterator[str]:
    confident = r.noise.by == "perpair" or (r.noise.by == "weight" and r.noise.weight == "confidence")
    if confident and r.judge.by not in PROBABLE:
        yield (
            f"noise={r.noise.by} needs a judge that is more or less sure, and judge={r.judge.by} is not; choose "
            f"{', '.join(sorted(PROBABLE))}"
        )


def _cache(r: Recipe) -> Iterator[str]:
    if not r.train.cache_reference:
        return
    plain = r.candidates.kinds == ["sample"] and r.train.reference in {"auto", "prev"} and r.carry.data == "fresh"
    if not (plain and r.carry.start == "prev" and r.noise.by == "quantile"):
        yield (
            "train.cache_reference keeps the sampler's states for a loss that extrapolates from them: it needs "
            "candidates=sample, reference=prev, start=prev, carry=fresh and noise=quantile; leave it out"
        )
