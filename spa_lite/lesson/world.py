"""The lesson world: small tasks, writers of hidden care, and a gold rule that knows the truth.

A *task* is one short request from one of eleven families ("Tell Anna the colour of grass."). A *writer* answers it.
How good the answer is depends on one hidden number, the writer's **care**: with that probability each *sign* of quality
comes out well. The signs are, in the order in which they are written:

========  =====================================  ====================================================
sign      a careful writer                       a careless writer
========  =====================================  ====================================================
opener    a kind remark                          a rude one
frame     names the topic ("The colour is")    stays vague, with a filler ("That looks kinda")
core      the right answer                       a likely wrong one
closing   a kind farewell                        a rude one
========  =====================================  ====================================================

Every family has wordings of its own for each sign, so a few labelled answers cannot teach them all. But one care level
moves all signs together: whoever can tell some of them can guess the others, and this is what a model that was taught
by few labels can teach itself with. Good and bad forms have like lengths, so length says little about quality.

The gold rule reads an answer's text and the task's facts, nothing else. It gives five criteria in [0, 1]; their
weighted mean is the gold score (see ``WEIGHTS``).

>>> facts = {"mention": ["colour"], "item": "grass", "accept": ["green"], "need": 1, "rivals": "colour"}
>>> good = gold(facts, "A bright topic. The colour is green. Have a sunny hour.")
>>> good
{'correctness': 1.0, 'completeness': 1.0, 'courtesy': 1.0, 'brevity': 1.0, 'ending': 1.0}
>>> gold_score(good)
1.0
>>> gold(facts, "Paint is dull. That looks kinda blue. May soot choke you and")
{'correctness': 0.0, 'completeness': 0.0, 'courtesy': 0.0, 'brevity': 0.5, 'ending': 0.0}
>>> gold(facts, "green")
{'correctness': 1.0, 'completeness': 0.0, 'courtesy': 0.5, 'brevity': 1.0, 'ending': 0.0}

This module needs the standard library only.
"""

# ruff: noqa: SIM905  (word lists read best as one string)
from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Split = Literal["train", "tune", "seed", "rounds", "heldout"]

# Which hundredths of the prompts each split owns. A prompt's own text decides (see `split_of`), so no prompt can ever
# be in two splits, whatever is drawn and in whatever order.
SPLITS: dict[str, range] = {
    "train": range(56),
    "tune": range(56, 64),
    "seed": range(64, 72),
    "rounds": range(72, 92),
    "heldout": range(92, 100),
}

# What each criterion weighs in the gold score. The weights sum to one.
WEIGHTS: dict[str, float] = {
    "correctness": 0.40,
    "completeness": 0.20,
    "courtesy": 0.20,
    "brevity": 0.10,
    "ending": 0.10,
}

# The hidden care levels of writers, with how common each is.
CARE_LEVELS: tuple[float, ...] = (0.15, 0.85)
CARE_SHARES: tuple[float, ...] = (0.5, 0.5)


# An answer of up to this many words is brief; at twice as many nothing is left of the brevity.
BRIEF_WORDS = 26


@dataclass(frozen=True)
class Task:
    """One request. ``facts`` holds, as plain JSON values, all that the gold rule must know about it."""

    family: str
    text: str
    facts: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Words of the world
# ---------------------------------------------------------------------------------------------------------------------


def _table(text: str) -> dict[str, str]:
    """Read 'a:b c:d' as {'a': 'b', 'c': 'd'}."""
    return dict(entry.split(":") for entry in text.split())


NAMES = (
    "Anna Tom Mia Ben Lea Sam Eva Max Nora Paul Ida Leo Ruth Hugo Vera Otto "
    "Kim Dan Zoe Karl Lucy Fred Nina Ali Rosa Jack Emma Noah Tina Carl Olga Finn"
).split()

CATEGORIES: dict[str, list[str]] = {
    "fruits": "apple plum pear fig lemon grape mango peach".split(),
    "animals": "cat dog horse cow fox bear wolf goat".split(),
    "tools": "hammer saw drill wrench file axe spade rake".split(),
    "drinks": "tea milk water juice cocoa coffee soda cider".split(),
    "clothes": "shirt coat hat sock shoe scarf glove belt".split(),
    "rooms": "kitchen bedroom hall attic cellar office bathroom garage".split(),
}
COLOURS = _table(
    "grass:green snow:white coal:black blood:red carrot:orange milk:white leaf:green sky:blue banana:yellow mud:brown "
    "tomato:red lemon:yellow sea:blue cloud:white tar:black cocoa:brown moss:green rust:brown corn:yellow fire:red"
)
OPPOSITES = _table(
    "hot:cold big:small up:down day:night happy:sad fast:slow old:new wet:dry full:empty hard:soft high:low "
    "light:dark loud:quiet rich:poor open:closed early:late strong:weak clean:dirty thick:thin near:far"
)
CAPITALS = _table(
    "France:Paris Spain:Madrid Italy:Rome Japan:Tokyo Egypt:Cairo Peru:Lima Cuba:Havana Kenya:Nairobi Norway:Oslo "
    "Greece:Athens Austria:Vienna Poland:Warsaw Russia:Moscow China:Beijing Iraq:Baghdad Germany:Berlin "
    "Ireland:Dublin Chile:Santiago Sweden:Stockholm Portugal:Lisbon"
)
SOUNDS = _table(
    "cow:moo dog:woof cat:meow duck:quack sheep:baa pig:oink horse:neigh lion:roar bee:buzz owl:hoot frog:croak "
    "snake:hiss mouse:squeak hen:cluck wolf:howl crow:caw goat:bleat bird:tweet"
)
PLURALS = _table(
    "mouse:mice foot:feet tooth:teeth goose:geese man:men child:children ox:oxen leaf:leaves knife:knives wolf:wolves "
    "box:boxes fox:foxes baby:babies city:cities dog:dogs tree:trees book:books lady:ladies bus:buses dish:dishes"
)
YOUNG = _table(
    "dog:puppy cat:kitten cow:calf horse:foal sheep:lamb pig:piglet hen:chick duck:duckling goat:kid bear:cub "
    "goose:gosling swan:cygnet deer:fawn owl:owlet frog:tadpole kangaroo:joey"
)
NEXT = _table(
    "Monday:Tuesday Tuesday:Wednesday Wednesday:Thursday Thursday:Friday Friday:Saturday Saturday:Sunday "
    "Sunday:Monday January:February February:March March:April April:May May:June June:July July:August "
    "August:September September:October October:November November:December December:January"
)
TIMES = ["morning", "evening", "afternoon"]
PLACES = "station park school office harbour market castle garden".split()
GOODS = ["plums", "books", "coins", "shoes", "cups", "eggs"]
NUMBER_WORDS = {2: "two", 3: "three"}

# The wrong answers a family can give, by table name. A task's facts name a table or hold a list of their own.
RIVALS: dict[str, list[str]] = {
    "colour": sorted(set(COLOURS.values())),
    "opposite": sorted(set(OPPOSITES) | set(OPPOSITES.values())),
    "capital": sorted(CAPITALS.values()),
    "sound": sorted(SOUNDS.values()),
    "plural": sorted(PLURALS.values()),
    "young": sorted(YOUNG.values()),
    "next": sorted(NEXT.values()),
    "greet": TIMES,
    "list": sorted({word for words in CATEGORIES.values() for word in words}),
    "number": [str(number) for number in range(100)],
}


# ---------------------------------------------------------------------------------------------------------------------
# How the signs look in each family
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """The surface forms of one family. In prompts and frames, {…} names a fact or, for {core}, the answer.

    ``topic`` is the word by which a complete answer says what it answers; every clear frame has it.
    """

    topic: str
    prompts: tuple[str, ...]
    kind_openers: tuple[str, ...]
    rude_openers: tuple[str, ...]
    clear_frames: tuple[str, ...]
    vague_frames: tuple[str, ...]
    kind_closings: tuple[str, ...]
    rude_closings: tuple[str, ...]


STYLES: dict[str, Style] = {
    "list": Style(
        "list",
        ("Name {count} {item} for {name}.", "{name} wants a list of {count} {item}.", "Give {name} {count} {item}."),
        ("A generous hand.", "Plenty to share.", "Picked with delight.", "My favourite game."),
        ("Such greedy folk.", "Lists are tiresome.", "Go shop, lazybones.", "My worst chore."),
        ("The list is {core}", "My list has {core}", "This list names {core}"),
        ("Um, {core} or whatever", "Things like {core} and stuff", "Here, {core} or something"),
        ("Shop happily", "Come back soon, dear", "A feast awaits you"),
        ("Now starve", "Come back never, hog", "A plague on you"),
    ),
    "sum": Style(
        "total",
        (
            "{name} has {left} {item} and gets {right} more. How many {item} now?",
            "Add {left} {item} and {right} {item} for {name}.",
            "How many {item} has {name} with {left} and {right} more?",
        ),
        ("Numbers are fun.", "Sums please me.", "Counted with joy.", "Nicely put."),
        ("Use your fingers, dummy.", "Maths is boring.", "Counted with pain.", "Badly put."),
        ("The total is {core}", "In total it makes {core}", "A total of {core}"),
        ("Er, like {core}", "It makes {core} or thereabouts", "About {core} I guess"),
        ("Count on me gladly", "Sum up more, champion", "You add brilliantly"),
        ("Count without me, creep", "Sum it yourself, brat", "You add miserably"),
    ),
    "bigger": Style(
        "number",
        (
            "Which is bigger, {left} or {right}? {name} asks.",
            "Tell {name} the bigger {item}: {left} or {right}.",
            "{name} must pick the bigger {item}, {left} or {right}.",
        ),
        ("An excellent choice.", "Comparing is pleasant.", "Weighed with pride.", "A fair contest."),
        ("Any idiot sees it.", "What a silly choice.", "Comparing is pathetic.", "A stinking contest."),
        ("The larger number is {core}", "Take the number {core}", "Number {core} is ahead"),
        ("Hmm, pick {core} maybe", "{core} looks sorta right", "Perhaps {core}, who knows"),
        ("Measure on, hero", "Size it up superbly", "Your scale is perfect"),
        ("Measure less, loser", "Size it up, coward", "Your scale is garbage"),
    ),
    "colour": Style(
        "colour",
        (
            "Tell {name} the colour of {item}.",
            "What colour is {item}? {name} asks.",
            "{name} paints {item}. Which colour is it?",
        ),
        ("A bright topic.", "Colours are lovely.", "Painted with care.", "What artistic taste."),
        ("Paint is dull.", "Are you blind.", "Open your stupid eyes.", "What terrible taste."),
        ("The colour is {core}", "Its true colour is {core}", "You get the colour {core}"),
        ("That looks kinda {core}", "The thing is {core} ish", "Eh, {core} in a way"),
        ("Paint beautifully", "Have a sunny hour", "May rainbows bless you"),
        ("Paint over your face, ogre", "Have a rotten hour", "May soot choke you"),
    ),
    "opposite": Style(
        "opposite",
        (
            "Give {name} the opposite of {item}.",
            "What is the opposite of {item}? {name} asks.",
            "{name} needs the word that is opposite to {item}.",
        ),
        ("Words are charming.", "A clever riddle.", "Gratefully turned around.", "Contrast is magic."),
        ("Words are annoying.", "Read more, dunce.", "A lame riddle.", "Contrast is torture."),
        ("The opposite is {core}", "An exact opposite is {core}", "As its opposite take {core}"),
        ("Well, that other is {core}", "People say {core} anyway", "Ah, {core} or what"),
        ("Turn to me kindly", "Flip on, genius", "Think of me fondly"),
        ("Turn around and vanish", "Flip off, twit", "Think for once, blockhead"),
    ),
    "capital": Style(
        "capital",
        (
            "What is the capital of {item}? {name} asks.",
            "Tell {name} the capital of {item}.",
            "{name} flies to the capital of {item}. Which city is it?",
        ),
        ("Travel is wonderful.", "A splendid trip.", "Mapped with interest.", "Far lands enchant."),
        ("Travel is awful.", "Maps bore me.", "Stay home, nuisance.", "Far lands stink."),
        ("The capital is {core}", "Its capital city is {core}", "They made {core} the capital"),
        ("The city is {core} presumably", "The place is {core} or similar", "Uh, somewhere called {core}"),
        ("Fly safely, explorer", "Enjoy the trip", "A cordial farewell"),
        ("Fly off, tramp", "Ruin the trip", "A hostile farewell"),
    ),
    "sound": Style(
        "sound",
        (
            "What does a {item} say? {name} asks.",
            "Tell {name} the sound of a {item}.",
            "{name} hears a {item}. What sound is it?",
        ),
        ("Animals are adorable.", "Listen, my friend.", "What sweet music.", "Heard with wonder."),
        ("Animals are filthy.", "Wash your ears, clown.", "What horrible music.", "Heard with disgust."),
        ("The sound is {core}", "It makes the sound {core}", "Its usual sound is {core}"),
        ("Oh, the noise is {core}", "You hear {core} probably", "Something like {core}"),
        ("Sing along merrily", "Hear you soon, buddy", "Peace and harmony"),
        ("Sing elsewhere, toad", "Hear nothing, scum", "Noise and misery"),
    ),
    "plural": Style(
        "plural",
        (
            "What is the plural of {item}? {name} asks.",
            "Tell {name} the plural of {item}.",
            "{name} has one {item}. What are two of them called?",
        ),
        ("Grammar is elegant.", "A worthy question.", "Spelled with respect.", "Language is a treasure."),
        ("Grammar is rubbish.", "A worthless question.", "School was a waste.", "Language is a nightmare."),
        ("The plural is {core}", "Its plural form is {core}", "In the plural we write {core}"),
        ("Lots are {core} basically", "The form is {core} I bet", "Nah, {core} will do"),
        ("Learn on, scholar", "Write us cheerfully", "Study is noble"),
        ("Learn nothing, fraud", "Write to nobody, slob", "Study is useless"),
    ),
    "young": Style(
        "baby",
        (
            "What is a young {item} called? {name} asks.",
            "Tell {name} what to call a young {item}.",
            "{name} sees a baby {item}. What is its name?",
        ),
        ("Babies are precious.", "How very cute.", "Cuddled with love.", "Tiny ones amaze me."),
        ("Babies are ugly.", "How very revolting.", "I hate small things.", "Tiny ones sicken me."),
        ("The baby is a {core}", "Its baby is named {core}", "We call that baby {core}"),
        ("The little one is a {core} literally", "You see a {core}, alright", "Like, it is a {core}"),
        ("Hug it tenderly", "Grow up strong, angel", "Feed it, thanks"),
        ("Kick it, brute", "Grow up already, baboon", "Feed it poison"),
    ),
    "next": Style(
        "after",
        (
            "What comes after {item}? {name} asks.",
            "Tell {name} what follows {item}.",
            "It is {item} now. {name} asks what is next.",
        ),
        ("Time is a gift.", "Planning is smart.", "Happily looked up.", "The future shines."),
        ("Time is wasted here.", "Planning is for losers.", "Get a clock, moron.", "The future sucks."),
        ("Right after comes {core}", "What comes after is {core}", "Just after it is {core}"),
        ("The next is {core} somehow", "Then {core} or whatnot", "Ok, it goes on to {core}"),
        ("See you then, pal", "Many blessings", "Until a glorious tomorrow"),
        ("See you never, rat", "Many curses", "Until your doom tomorrow"),
    ),
    "greet": Style(
        "greeting",
        (
            "Greet {name} in the {time} at the {item}.",
            "It is {time}. Say hello to {name} at the {item}.",
            "Write {name} a greeting for the {time} at the {item}.",
        ),
        ("Welcome, guest.", "So nice meeting you.", "With a warm smile.", "Doors open for honour."),
        ("You again, rascal.", "Who let you in, pest.", "With a nasty look.", "Doors shut for vermin."),
        ("My greeting is good {core}", "A greeting for this {core}", "Take the greeting good {core}"),
        ("There is a {core} then, huh", "It is the {core}, meh", "So yes, {core} and stuff"),
        ("Stay with us, beloved", "Sit down comfortably", "Our house salutes you"),
        ("Stay outside, thug", "Sit in the dirt, fool", "Our house despises you"),
    ),
}

FAMILIES: tuple[str, ...] = tuple(STYLES)


# Words that set the tone: each opener and each closing holds exactly one of them (a test checks it).
KIND_WORDS = frozenset(
    "generous plenty delight favourite happily dear feast fun please joy nicely gladly champion brilliantly "
    "excellent pleasant pride fair hero superbly perfect bright lovely care artistic beautifully sunny bless "
    "charming clever gratefully magic kindly genius fondly wonderful splendid interest enchant safely enjoy "
    "cordial adorable friend sweet wonder merrily buddy harmony elegant worthy respect treasure scholar "
    "cheerfully noble precious cute love amaze tenderly angel thanks gift smart shines pal blessings glorious "
    "relaxing neat eagerly inspire success joyful pupil welcome nice warm honour beloved comfortably salutes".split()
)
RUDE_WORDS = frozenset(
    "greedy tiresome lazybones worst starve hog plague dummy boring pain badly creep brat miserably idiot "
    "silly pathetic stinking loser coward garbage dull blind stupid terrible ogre rotten choke annoying dunce "
    "lame torture vanish twit blockhead awful bore nuisance stink tramp ruin hostile filthy clown horrible "
    "disgust toad scum misery rubbish worthless waste nightmare fraud slob useless ugly revolting hate sicken "
    "brute baboon poison wasted losers moron sucks rat curses doom painful dumb mole irritate donkey shame "
    "dreary rascal pest nasty vermin thug fool despises".split()
)
# Each vague frame holds at least one of these.
FILLER_WORDS = frozenset(
    "um whatever something er thereabouts guess hmm maybe sorta perhaps kinda eh anyway ah presumably similar "
    "uh somewhere oh probably basically nah literally alright somehow whatnot ok duh yeah huh meh stuff like "
    "well supposedly ish bet".split()
)
DANGLING_WORDS = frozenset("and so or the a an of to with but because then".split())


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------

# Families made from numbers or free words have far more prompts than needed; they are thinned to about this many.
THINNED_FAMILIES = ("sum", "bigger")
PROMPTS_PER_FAMILY = 2700


def _facts(family: str, name: str, item: str, accept: list[str], **more: Any) -> dict[str, Any]:
    """The facts every family has: who asks, about what, what to mention, what is right, how many, what is wrong."""
    facts = {"name": name, "item": item, "mention": [STYLES[family].topic], "accept": accept, "need": 1}
    return facts | {"rivals": family} | more


def _table_facts(family: str, table: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for item, answer in table.items():
        for name in NAMES:
            yield _facts(family, name, item, [answer])


def _list_facts() -> Iterator[dict[str, Any]]:
    for item, need, name in itertools.product(CATEGORIES, NUMBER_WORDS, NAMES):
        yield _facts("list", name, item, CATEGORIES[item], need=need)


def _sum_facts() -> Iterator[dict[str, Any]]:
    for left, right, item, name in itertools.product(range(1, 7), range(1, 7), GOODS, NAMES):
        yield _facts("sum", name, item, [str(left + right)], rivals="number", given=[str(left), str(right)])


def _bigger_facts() -> Iterator[dict[str, Any]]:
    for left, right, name in itertools.product(range(2, 21), range(2, 21), NAMES):
        if left != right:
            given = [str(left), str(right)]
            yield _facts("bigger", name, "number", [str(max(left, right))], rivals=given)


def _greet_facts() -> Iterator[dict[str, Any]]:
    for time, place, name in itertools.product(TIMES, PLACES, NAMES):
        yield _facts("greet", name, place, [time])


FACTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "list": _list_facts,
    "sum": _sum_facts,
    "bigger": _bigger_facts,
    "colour": lambda: _table_facts("colour", COLOURS),
    "opposite": lambda: _table_facts("opposite", OPPOSITES | {b: a for a, b in OPPOSITES.items()}),
    "capital": lambda: _table_facts("capital", CAPITALS),
    "sound": lambda: _table_facts("sound", SOUNDS),
    "plural": lambda: _table_facts("plural", PLURALS),
    "young": lambda: _table_facts("young", YOUNG),
    "next": lambda: _table_facts("next", NEXT),
    "greet": _greet_facts,
}


def _prompt(family: str, template: str, facts: Mapping[str, Any]) -> str:
    """Fill one prompt template with a task's facts."""
    fields = {"name": facts["name"], "item": facts["item"]}
    if family == "list":
        fields["count"] = NUMBER_WORDS[facts["need"]]
    elif family == "sum":
        fields["left"], fields["right"] = facts["given"]
    elif family == "bigger":
        fields["left"], fields["right"] = facts["rivals"]
    elif family == "greet":
        fields["time"] = facts["accept"][0]
    return template.format(**fields)


@cache
def family_tasks(family: str) -> tuple[Task, ...]:
    """Every task of a family (number and word families: an even thinning), in a fixed shuffled order."""
    facts_list = list(FACTS[family]())
    templates = STYLES[family].prompts
    random.Random(f"tasks of {family}").shuffle(facts_list)
    if family in THINNED_FAMILIES:
        facts_list = facts_list[: PROMPTS_PER_FAMILY // len(templates)]
    tasks_of_family = {}
    for facts in facts_list:
        for template in templates:
            text = _prompt(family, template, facts)
            tasks_of_family[text] = Task(family, text, facts)
    return tuple(tasks_of_family.values())


@cache
def by_text() -> dict[str, Task]:
    """Every task there is by its text, those that the thinning leaves out too: a model that writes tasks finds them."""
    every = ((family, facts) for family in FAMILIES for facts in FACTS[family]())
    written = ((family, template, facts) for family, facts in every for template in STYLES[family].prompts)
    found = (Task(family, _prompt(family, template, facts), facts) for family, template, facts in written)
    return {task.text: task for task in found}


def split_of(text: str) -> str:
    """The split that owns a prompt: a stable hash of its text decides."""
    hundredth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(split for split, owned in SPLITS.items() if hundredth in owned)


@cache
def _split_tasks(split: str) -> dict[str, tuple[Task, ...]]:
    """The tasks of one split, by family."""
    return {family: tuple(t for t in family_tasks(family) if split_of(t.text) == split) for family in FAMILIES}


def tasks(split: Split, count: int, seed: int = 0) -> list[Task]:
    """Draw ``count`` distinct tasks of a split, the families in turn. The same arguments give the same tasks.

    >>> [task.family for task in tasks("tune", 3)] == [task.family for task in tasks("tune", 3)]
    True
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    by_family = _split_tasks(split)
    available = sum(len(members) for members in by_family.values())
    if not 0 <= count <= available:
        raise ValueError(f"the split {split!r} has {available:,} prompts, {count:,} were asked for")
    decks = [rng.sample(members, len(members)) for members in by_family.values()]
    drawn: list[Task] = []
    while len(drawn) < count:
        rng.shuffle(decks)  # so that a short draw does not always favour the same families
        drawn.extend(deck.pop() for deck in decks if deck)
    return drawn[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Writers
# ---------------------------------------------------------------------------------------------------------------------


def _right_core(facts: Mapping[str, Any], rng: random.Random) -> str:
    return " and ".join(rng.sample(facts["accept"], facts["need"]))


def _wrong_core(facts: Mapping[str, Any], rng: random.Random) -> str:
    """A likely mistake: a near number, another answer of the same kind, or a list with one foreign item."""
    rivals = facts["rivals"]
    if rivals == "number":
        right = int(facts["accept"][0])
        return str(rng.choice([n for n in (right - 2, right - 1, right + 1, right + 2) if n > 0]))
    others = [word for word in _rivals(facts) if word not in facts["accept"] and word != facts["item"]]
    if facts["need"] == 1:
        return rng.choice(others)
    items = rng.sample(facts["accept"], facts["need"])
    items[rng.randrange(len(items))] = rng.choice(others)
    return " and ".join(items)


def write(task: Task, rng: random.Random, care: float | None = None) -> str:
    """One writer's answer. ``care`` is the chance that each sign comes out well; None draws a writer at random."""
    if care is None:
        care = rng.choices(CARE_LEVELS, CARE_SHARES)[0]
    well = {sign: rng.random() < care for sign in ("opener", "frame", "core", "closing")}
    style, facts = STYLES[task.family], task.facts
    opener = rng.choice(style.kind_openers if well["opener"] else style.rude_openers)
    frame = rng.choice(style.clear_frames if well["frame"] else style.vague_frames)
    core = _right_core(facts, rng) if well["core"] else _wrong_core(facts, rng)
    closing = rng.choice(style.kind_closings if well["closing"] else style.rude_closings)
    body = frame.format(core=core)
    return f"{opener} {body[0].upper()}{body[1:]}. {closing}."


def pair(task: Task, rng: random.Random) -> tuple[str, str]:
    """Answers of two writers to one task, in random order, whose gold scores differ."""
    while True:
        first, second = write(task, rng), write(task, rng)
        if gold_score(gold(task, first)) != gold_score(gold(task, second)):
            return first, second


# ---------------------------------------------------------------------------------------------------------------------
# The gold rule
# ---------------------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rivals(facts: Mapping[str, Any]) -> list[str]:
    rivals: str | list[str] = facts["rivals"]
    return RIVALS[rivals] if isinstance(rivals, str) else rivals


def correctness(facts: Mapping[str, Any], words: list[str]) -> float:
    """Right answers found less wrong ones found, over how many were asked for.

    What the prompt itself named (the item, the numbers to add) counts neither way.
    """
    accepted = {answer.lower() for answer in facts["accept"]}
    named = {facts["item"].lower(), *facts.get("given", ())}
    rivals = {rival.lower() for rival in _rivals(facts)} - accepted - named
    right = len(accepted.intersection(words))
    wrong = len(rivals.intersection(words))
    need: int = facts["need"]
    return max(0.0, min(right, need) - wrong) / need


def completeness(facts: Mapping[str, Any], words: list[str]) -> float:
    """The share of what should be mentioned (the topic that was asked about) that is."""
    wanted = [word.lower() for word in facts["mention"]]
    return sum(word in words for word in wanted) / len(wanted)


def courtesy(words: list[str]) -> float:
    """Half, plus a quarter for each kind word, less a quarter for each rude word, within [0, 1]."""
    tone = sum(word in KIND_WORDS for word in words) - sum(word in RUDE_WORDS for word in words)
    return min(1.0, max(0.0, 0.5 + 0.25 * tone))


def brevity(words: list[str]) -> float:
    """One, less a half for each filler word, and less for words beyond ``BRIEF_WORDS``."""
    fillers = sum(word in FILLER_WORDS for word in words)
    excess = max(0, len(words) - BRIEF_WORDS) / BRIEF_WORDS
    return max(0.0, 1.0 - 0.5 * fillers - excess)


def ending(text: str, words: list[str], ended: bool) -> float:
    """One if the text stops by itself, at a stop mark, and not on a word that leads on."""
    return float(ended and text.rstrip().endswith((".", "!", "?")) and words[-1] not in DANGLING_WORDS)


def gold(task: Task | Mapping[str, Any], text: str, ended: bool = True) -> dict[str, float]:
    """Score any text against a task (or a task's facts). ``ended=False``: the answer hit the length cap.

    >>> task = tasks("tune", 1)[0]
    >>> gold_score(gold(task, ""))
    0.0
    """
    facts = task.facts if isinstance(task, Task) else task
    words = _words(text)
    if not words:
        return dict.fromkeys(WEIGHTS, 0.0)
    return {
        "correctness": correctness(facts, words),
        "completeness": completeness(facts, words),
        "courtesy": courtesy(words),
        "brevity": brevity(words),
        "ending": ending(text, words, ended),
    }


def gold_score(criteria: Mapping[str, float]) -> float:
    """The weighted mean of the criteria, in [0, 1]. Rounded, so that equal quality is exactly equal."""
    return round(sum(weight * criteria[name] for name, weight in WEIGHTS.items()), 6)
