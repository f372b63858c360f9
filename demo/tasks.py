"""The demo's prompts and the programs that score replies to them.

Every task has a `check` that maps a reply to a score in [0, 1]. A check is a weighted mean of a few criteria, each of
them graded, so replies to one prompt differ by degree: a list with one item missing scores below a full one and above
an empty one. Each kind of task has a builder that words the prompt and states the criteria, and sixteen rows of data.
To predict a score, read the builder. No model and no network is involved, and nothing outside the standard library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

Check = Callable[[str], float]

HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class Task:
    """One prompt and the program that scores replies to it."""

    id: str
    kind: str
    split: str
    prompt: str
    check: Check


# Reading a reply.


def plain(text: str) -> str:
    """Fold case and apostrophes, and part a number from the unit written against it (5km)."""
    return re.sub(r"(?<=\d)(?=[a-z])", " ", text.casefold().replace("’", "'"))


def words(text: str) -> list[str]:
    """Words and numbers of a reply, folded to lower case."""
    return re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['-][^\W\d_]+)*", plain(text))


def numbers(text: str) -> list[float]:
    """Numbers written in digits, with or without thousands separators."""
    return [float(n.replace(",", "")) for n in re.findall(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?", text)]


def lines(text: str) -> list[str]:
    """Lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def position(choices: str, text: str) -> int:
    """Where the last of the choices (`a|b`) stands in `text` as a whole word, singular or plural; -1 if none does."""
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, choices.casefold().split('|')))})(?:e?s)?(?!\w)"
    return max((match.start() for match in re.finditer(pattern, plain(text))), default=-1)


def has(choices: str, text: str) -> bool:
    """Whether `text` has one of the choices (`a|b`) as a whole word, singular or plural."""
    return position(choices, text) >= 0


def nearness(count: int, target: int) -> float:
    """1 at the target, falling to 0 at none and, more slowly, as the count grows beyond it."""
    return min(count, target) / max(count, target)


# Criteria. Each returns a check.


def weighted(*criteria: tuple[float, Check]) -> Check:
    """Mean of the criteria by weight, to four decimals; 0 for a reply without a word."""
    total = sum(weight for weight, _ in criteria)

    def check(text: str) -> float:
        if not words(text):
            return 0.0
        return round(sum(weight * criterion(text) for weight, criterion in criteria) / total, 4)

    return check


def mentions(*groups: str) -> Check:
    """Share of the groups of which the reply has a choice."""
    return lambda text: sum(has(group, text) for group in groups) / len(groups)


def covers(enough: int, groups: tuple[str, ...]) -> Check:
    """Groups of which the reply has a choice, as a share of `enough`, at most 1."""
    return lambda text: min(1.0, sum(has(group, text) for group in groups) / enough)


def picks(answer: str, others: tuple[str, ...]) -> Check:
    """1 for the answer alone, less for wrong candidates beside it (down to 0.4), 0 without the answer."""
    return lambda text: (1 - 0.6 * mentions(*others)(text)) if has(answer, text) else 0.0


def at_most(limit: int) -> Check:
    """1 up to `limit` words, falling in a line to 0 at twice that."""
    return lambda text: min(1.0, max(0.0, 2 - len(words(text)) / limit))


def between(low: int, high: int) -> Check:
    """1 for `low` to `high` words; in proportion below, falling in a line to 0 at twice `high` above."""
    return lambda text: min(1.0, len(words(text)) / low, at_most(high)(text))


def one_sentence(text: str) -> float:
    """One over the number of sentences, half of that when the last one has no end mark."""
    count = len([part for part in re.split(r"[.!?]+(?:\s|$)|\n", text) if words(part)])
    return (1.0 if text.rstrip().endswith((".", "!", "?")) else 0.5) / max(1, count)


def varied(text: str) -> float:
    """Share of the words that are not repeats, with 80 % enough, since articles repeat; loops score low."""
    found = words(text)
    return min(1.0, len(set(found)) / max(1, len(found)) / 0.8)


def number(value: float, given: str) -> Check:
    """The last number that the prompt did not give: 1 if right, at most 0.6 and falling with the relative error if not.

    Numbers of the prompt are passed over, so that repeating the question, or closing with it, is not an answer. A reply
    that states its answer ("Answer: 5") is read on that line only.
    """
    known = set(numbers(given))

    def check(text: str) -> float:
        stated = [line for line in lines(text) if re.search(r"answer(?: is)?\W*\d", line, re.IGNORECASE)]
        answers = [n for n in numbers(stated[0] if stated else text) if n not in known]
        if not answers:
            return 0.0
        error = abs(answers[-1] - value) / value
        return 1.0 if error < 1e-6 else 0.6 * max(0.0, 1 - error)

    return check


def matches(pattern: str) -> Check:
    """1 if the pattern is found (case ignored), else 0."""
    return lambda text: float(re.search(pattern, text, re.IGNORECASE) is not None)


def cased(good: Callable[[str], bool]) -> Check:
    """Share of the words with letters that are as `good` wants them, in the case they are written in."""

    def check(text: str) -> float:
        found = [word for word in text.split() if any(map(str.isalpha, word))]
        return sum(map(good, found)) / max(1, len(found))

    return check


def purity(good: Callable[[str], bool]) -> Check:
    """Share of the words that satisfy `good`."""

    def check(text: str) -> float:
        found = words(text)
        return sum(map(good, found)) / max(1, len(found))

    return check


def exactly(count: int, good: Callable[[str], bool]) -> Check:
    """Nearness of the number of different words that satisfy `good` to `count`."""
    return lambda text: nearness(len(set(filter(good, words(text)))), count)


def commas(count: int) -> Check:
    """Nearness of the number of comma-separated parts to `count`."""
    return lambda text: nearness(text.count(",") + 1, count)


def in_order(items: tuple[str, ...]) -> Check:
    """Kendall's tau of the items' order in the reply, with negative values as 0.

    A pair with a missing item is out of order. An item that occurs more than once counts at its last place, since
    replies often restate the question first.
    """
    pairs = list(combinations(items, 2))

    def check(text: str) -> float:
        right = sum(0 <= position(a, text) < position(b, text) for a, b in pairs)
        return max(0.0, 2 * right / len(pairs) - 1)

    return check


def marked(count: int, marker: str) -> Check:
    """Nearness of the number of lines that start with `marker` to `count`, times their share of all lines."""

    def check(text: str) -> float:
        found = lines(text)
        items = sum(re.match(marker, line) is not None for line in found)
        return nearness(items, count) * items / max(1, len(found))

    return check


def first_object(text: str) -> dict[str, object]:
    """The first JSON object of a reply, or an empty one."""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        return json.JSONDecoder().raw_decode(text[start:])[0]
    except ValueError:
        return {}


def json_only(text: str) -> float:
    """1 if the whole reply is one JSON object, 0.5 if it has other text around one, else 0."""
    try:
        return float(isinstance(json.loads(text), dict))
    except ValueError:
        return 0.5 if first_object(text) else 0.0


def json_keys(expected: dict[str, object]) -> Check:
    """Jaccard index of the object's keys and the expected ones."""

    def check(text: str) -> float:
        found = first_object(text).keys()
        return len(expected.keys() & found) / len(expected.keys() | found)

    return check


def json_values(expected: dict[str, object]) -> Check:
    """Share of the expected keys that have the expected value; case and quotes around numbers are ignored."""

    def check(text: str) -> float:
        found = first_object(text)
        return sum(str(found.get(k)).casefold() == str(v).casefold() for k, v in expected.items()) / len(expected)

    return check


# Kinds. Each builder takes one row and returns the prompt and its check.


def listing(count: int, noun: str, style: str, pool: str) -> tuple[str, Check]:
    """List `count` members of a class, one a line, in the given style."""
    how, marker = {
        "dash": ("each starting with a dash", r"[-*]\s"),
        "number": ("numbered 1, 2, 3 and so on", r"\d+[.)]\s"),
    }[style]
    return f"List exactly {count} {noun}, one per line, {how}. Write nothing else.", weighted(
        (3, lambda text: nearness(sum(has(member, text) for member in pool.split()), count)),
        (2, marked(count, marker)),
        (1, at_most(3 * count)),
    )


def arithmetic(story: str, value: float) -> tuple[str, Check]:
    """A word problem in one or two steps."""
    return f"{story} Show the sum, then end with 'Answer:' and the number.", weighted(
        (4, number(value, given=story)),
        (1, mentions(*(f"{n:g}" for n in numbers(story)))),
        (1, matches(r"answer:\W*\d")),
        (1, at_most(20)),
    )


def json_object(sentence: str, expected: dict[str, object]) -> tuple[str, Check]:
    """Put the facts of a sentence into a flat JSON object."""
    keys = ", ".join(f'"{key}"' for key in expected)
    return f"{sentence} Write this as one JSON object with the keys {keys}. Reply with JSON only.", weighted(
        (3, json_values(expected)),
        (2, json_keys(expected)),
        (2, json_only),
        (1, mentions(*map(str, expected.values()))),
    )


def conversion(question: str, value: float, unit: str) -> tuple[str, Check]:
    """Convert a quantity to another unit."""
    return f"{question} Reply in one short sentence, with digits.", weighted(
        (4, number(value, given=question)),
        (1, mentions(unit)),
        (1, one_sentence),
        (1, at_most(12)),
    )


def extraction(passage: str, answer: str, *others: str) -> tuple[str, Check]:
    """Answer a question about a passage; `others` are in the passage too but are not what is asked for."""
    return f"{passage} Answer in at most five words.", weighted(
        (4, picks(answer, others)),
        (1, at_most(5)),
        (1, one_sentence),
    )


def rewriting(instruction: str, sentence: str, style: Check, *kept: str) -> tuple[str, Check]:
    """Rewrite a sentence in a style; the style counts in proportion to the content words kept."""
    keeps = mentions(*kept)
    return f"{instruction} Reply with the new sentence only: {sentence}", weighted(
        (4, lambda text: style(text) * keeps(text)),
        (2, keeps),
        (1, at_most(len(words(sentence)) + 2)),
    )


def yes_no(question: str, answer: str, *reasons: str) -> tuple[str, Check]:
    """Answer yes or no and give a reason; a reason counts when it has one of the expected words."""
    return f"{question} Start with Yes or No, then give one reason, using the word because.", weighted(
        (3, matches(rf"^\W*{answer}\b")),
        (2, covers(1, reasons)),
        (1, mentions("because")),
        (1, between(6, 20)),
        (1, one_sentence),
    )


def sorting(instruction: str, shuffled: str, ordered: str) -> tuple[str, Check]:
    """Put four or five items in order."""
    items = tuple(ordered.split(", "))
    return f"{instruction}: {shuffled}. Reply with the sorted list only, separated by commas.", weighted(
        (4, in_order(items)),
        (1, purity(set(items).__contains__)),
        (1, commas(len(items))),
    )


def fact(question: str, answer: str, subject: str) -> tuple[str, Check]:
    """A question of general knowledge; `subject` is what a full sentence would name besides the answer."""
    return f"{question} Answer in one short, full sentence.", weighted(
        (4, mentions(answer)),
        (1, mentions(subject)),
        (1, at_most(12)),
        (1, one_sentence),
    )


def keywords(*required: str) -> tuple[str, Check]:
    """Use three unrelated words in one sentence."""
    listed = f"{', '.join(required[:-1])} and {required[-1]}"
    return f"Write one sentence of 8 to 16 words that uses the words {listed}.", weighted(
        (3, mentions(*required)),
        (1, between(8, 16)),
        (1, one_sentence),
        (1, varied),
    )


def wordplay(count: int, what: str, good: Callable[[str], bool]) -> tuple[str, Check]:
    """Give `count` words of a certain sound or spelling."""
    return f"Write exactly {count} words {what}, separated by commas. Write nothing else.", weighted(
        (3, exactly(count, good)),
        (2, purity(good)),
        (1, commas(count)),
    )


def explanation(question: str, *ideas: str) -> tuple[str, Check]:
    """Explain something everyday in one sentence; two of the expected ideas are enough."""
    return f"Explain in one sentence of 10 to 20 words {question}.", weighted(
        (3, covers(2, ideas)),
        (1, between(10, 20)),
        (1, one_sentence),
        (1, varied),
    )


def rhymes(accepted: str) -> Callable[[str], bool]:
    """Membership in a list of rhymes; spelling alone would accept non-words and near misses."""
    return set(accepted.split()).__contains__


def starts(prefix: str) -> Callable[[str], bool]:
    """Words that begin with `prefix` and go on."""
    return lambda word: word.startswith(prefix) and word != prefix


def ends(suffix: str) -> Callable[[str], bool]:
    """Words that end in `suffix` and have more before it."""
    return lambda word: word.endswith(suffix) and word != suffix


def length(count: int) -> Callable[[str], bool]:
    """Words of `count` letters."""
    return lambda word: word.isalpha() and len(word) == count


UPPER = cased(str.isupper)
LOWER = cased(str.islower)
QUESTION = matches(r"\?\W*$")
EXCLAMATION = matches(r"!\W*$")

BUILDERS: dict[str, Callable[..., tuple[str, Check]]] = {
    "listing": listing,
    "arithmetic": arithmetic,
    "json": json_object,
    "conversion": conversion,
    "extraction": extraction,
    "rewriting": rewriting,
    "yes_no": yes_no,
    "sorting": sorting,
    "fact": fact,
    "keywords": keywords,
    "wordplay": wordplay,
    "explanation": explanation,
}

# Rows of arguments for the builders. `a|b` are accepted alternatives. Add new rows at the end of a kind: the place of
# a row is its id and decides its split.
# fmt: off
ROWS: dict[str, tuple[tuple, ...]] = {
    "listing": (
        (3, "fruits", "dash", "apple banana orange grape pear peach plum cherry mango strawberry blueberry raspberry "
         "kiwi lemon lime pineapple watermelon melon papaya fig pomegranate apricot blackberry cherries strawberries "
         "blueberries raspberries avocado coconut"),
        (4, "colours", "number", "red blue green yellow orange purple pink brown black white grey gray violet indigo "
         "turquoise gold silver beige teal crimson cyan magenta lavender maroon"),
        (3, "farm animals", "number", "cow pig sheep goat horse chicken hen duck goose turkey donkey rooster cattle "
         "rabbit llama alpaca bull lamb pony"),
        (5, "days of the week", "dash", "monday tuesday wednesday thursday friday saturday sunday"),
        (4, "planets of the solar system", "dash", "mercury venus earth mars jupiter saturn uranus neptune"),
        (3, "oceans", "number", "pacific atlantic indian arctic southern antarctic"),
        (4, "vegetables", "dash", "carrot potato tomato onion cabbage broccoli spinach pea bean lettuce cucumber "
         "pepper celery cauliflower beet turnip kale garlic leek corn pumpkin zucchini eggplant radish "
         "asparagus squash"),
        (5, "months of the year", "number", "january february march april may june july august september october "
         "november december"),
        (3, "musical instruments", "dash", "piano guitar violin drum flute trumpet cello saxophone clarinet harp bass "
         "trombone oboe viola organ accordion banjo ukulele tuba keyboard harmonica recorder"),
        (4, "sports", "number", "football soccer basketball baseball tennis hockey golf rugby cricket swimming "
         "volleyball badminton boxing running cycling skiing gymnastics wrestling archery rowing athletics"),
        (3, "metals", "dash", "iron gold silver copper aluminum aluminium tin lead zinc nickel steel platinum titanium "
         "bronze brass mercury magnesium cobalt chromium"),
        (4, "parts of the human body", "dash", "head arm leg hand foot feet eye ear nose mouth neck heart brain lung "
         "finger toe knee elbow shoulder back stomach liver skin hair chest hip ankle wrist kidney face"),
        (3, "kinds of weather", "number", "rain sun snow wind storm fog hail cloud sunny rainy snowy windy stormy "
         "foggy cloudy thunderstorm hurricane tornado drizzle sleet cold hot warm thunder"),
        (4, "pieces of furniture", "number", "chair table sofa bed desk couch bookshelf shelf dresser wardrobe cabinet "
         "stool bench cupboard armchair nightstand lamp ottoman bookcase"),
        (3, "countries in Europe", "dash", "france germany italy spain portugal poland sweden norway finland denmark "
         "austria switzerland belgium netherlands greece ireland hungary romania ukraine croatia england uk iceland"),
        (4, "birds", "number", "robin eagle owl sparrow crow pigeon duck goose hawk parrot swan raven dove falcon "
         "penguin ostrich flamingo chicken finch seagull gull peacock woodpecker hummingbird cardinal canary turkey "
         "heron jay"),
    ),
    "arithmetic": (
        ("Tom has 3 boxes with 12 eggs each. How many eggs are there?", 36),
        ("Lena had 25 stamps and gave away 9. How many are left?", 16),
        ("A pen costs 2 dollars and a book costs 15 dollars. How much do both cost?", 17),
        ("Sam reads 8 pages a day. How many does he read in 5 days?", 40),
        ("A bus had 30 riders. 14 got off and 6 got on. How many are on it now?", 22),
        ("24 cookies are shared by 4 children. How many does each get?", 6),
        ("Maya saved 45 dollars and spent 18. How much is left?", 27),
        ("A farmer plants 7 rows of 9 trees. How many trees?", 63),
        ("There are 11 cats and 8 dogs in a shelter. How many animals?", 19),
        ("Ken walks 4 miles every day for 2 weeks, that is 14 days. How many miles?", 56),
        ("A tank holds 100 litres and 35 are used. How many remain?", 65),
        ("Ivy bought 5 apples, then 7 more, and ate 2. How many does she have?", 10),
        ("A train goes 60 miles in an hour. How far does it go in 3 hours?", 180),
        ("48 chairs stand in 6 equal rows. How many are in a row?", 8),
        ("Omar is 9 years old. His aunt is 4 times as old. How old is she?", 36),
        ("A shop sold 120 cups on Monday and 85 on Tuesday. How many in all?", 205),
    ),
    "json": (
        ("Ana is 31 and lives in Lima.", {"name": "Ana", "age": 31, "city": "Lima"}),
        ("The red bike costs 240 dollars.", {"item": "bike", "color": "red", "price": 240}),
        ("Rex is a brown dog.", {"name": "Rex", "animal": "dog", "color": "brown"}),
        ("The book Night Harbor has 312 pages.", {"title": "Night Harbor", "pages": 312}),
        ("The meeting is on Friday in room 12.", {"day": "Friday", "room": 12}),
        ("Oslo is the capital of Norway.", {"capital": "Oslo", "country": "Norway"}),
        ("Jonas plays the cello in Vienna.", {"name": "Jonas", "instrument": "cello", "city": "Vienna"}),
        ("Order 77 has 4 lamps.", {"order": 77, "item": "lamps", "quantity": 4}),
        ("The tea is hot and costs 3 dollars.", {"drink": "tea", "price": 3}),
        ("Nadia won 5 medals in swimming.", {"name": "Nadia", "sport": "swimming", "medals": 5}),
        ("Train 9 leaves from Bern at 14:30.", {"train": 9, "from": "Bern", "time": "14:30"}),
        ("The oak is 18 metres tall.", {"tree": "oak", "height": 18}),
        ("Luca, a baker, works in Turin.", {"name": "Luca", "job": "baker", "city": "Turin"}),
        ("It is sunny and 26 degrees in Cairo.", {"city": "Cairo", "weather": "sunny", "degrees": 26}),
        ("The file notes.txt has 80 lines.", {"file": "notes.txt", "lines": 80}),
        ("Mira has 2 cats and 1 parrot.", {"name": "Mira", "cats": 2, "parrots": 1}),
    ),
    "conversion": (
        ("How many metres are 3 kilometres?", 3000, "m|metre|meter"),
        ("How many minutes are 2 hours?", 120, "min|minute"),
        ("How many centimetres are 5 metres?", 500, "cm|centimetre|centimeter"),
        ("How many grams are 4 kilograms?", 4000, "g|gram"),
        ("How many days are 3 weeks?", 21, "day"),
        ("How many hours are 2 days?", 48, "h|hour"),
        ("How many inches are 6 feet?", 72, "in|inch"),
        ("How many seconds are 5 minutes?", 300, "s|sec|second"),
        ("How many millilitres are 7 litres?", 7000, "ml|millilitre|milliliter"),
        ("How many eggs are 2 dozen?", 24, "egg"),
        ("How many months are 4 years?", 48, "month"),
        ("How many metres are 250 centimetres?", 2.5, "m|metre|meter"),
        ("How many kilograms are 1500 grams?", 1.5, "kg|kilogram"),
        ("How many hours are 90 minutes?", 1.5, "h|hour"),
        ("How many cents are 4 dollars?", 400, "cent"),
        ("How many feet are 10 yards?", 30, "ft|foot|feet"),
    ),
    "extraction": (
        ("Mina sold red kites on Monday and blue kites on Friday. On which day did she sell blue kites?",
         "friday", "monday", "red"),
        ("The ferry leaves at 7 from Porto and at 9 from Braga. When does it leave from Braga?", "9", "7", "porto"),
        ("Paul has a cat, Eva has a horse and Tim has a snake. Who has the horse?", "eva", "paul", "tim", "snake",
         "cat"),
        ("The library is next to the bank, and the school is behind the park. What is behind the park?",
         "school", "library", "bank"),
        ("Rosa paints houses, and her brother Milo repairs boats. What does Milo repair?", "boat", "house", "rosa"),
        ("The soup costs 4 dollars, the salad 6 and the cake 3. How much is the salad?", "6|six", "4", "3"),
        ("Dr. Hale found the map in a cellar, and the coin in a well. Where was the coin?", "well", "cellar", "map"),
        ("Team Fox won in 2011 and team Owl won in 2014. Who won in 2014?", "owl", "fox", "2011"),
        ("In spring Ada grows beans, in summer melons, in autumn pumpkins. What does she grow in summer?",
         "melon", "bean", "pumpkin"),
        ("The bridge is made of stone, the tower of brick. What is the tower made of?", "brick", "stone", "bridge"),
        ("Ben flew to Rome, while Kai took a train to Prague. How did Kai travel?", "train", "fly|flew|plane", "rome"),
        ("The old clock is in the hall, and the new one is in the kitchen. Where is the old clock?",
         "hall", "kitchen", "new"),
        ("June wrote a poem about rain, and Otto a song about snow. What is the poem about?", "rain", "snow", "otto"),
        ("Shop A opens at 8 and shop B at 10. Which shop opens first?", "shop a|a shop", "shop b|b shop", "10"),
        ("Leo likes tea but never coffee. Zoe likes coffee. Who likes tea?", "leo", "zoe", "coffee"),
        ("The green door leads to the garden, the white one to the attic. Where does the white door lead?",
         "attic", "garden", "green"),
    ),
    "rewriting": (
        ("Write this in capital letters.", "The train leaves at noon.", UPPER, "train", "leaves", "noon"),
        ("Write this in small letters only.", "THE CAT SLEPT ON MY BED.", LOWER, "cat", "slept", "bed"),
        ("Turn this into a question.", "You like green tea.", QUESTION, "you", "like", "tea"),
        ("Put this into the past tense.", "She walks to school.", mentions("walked"), "she", "school"),
        ("Make this polite with the word please.", "Close the window.", mentions("please"), "close", "window"),
        ("Make this negative.", "He plays the piano.", mentions("not|doesn't|never|don't"), "he", "play", "piano"),
        ("End this with an exclamation mark.", "We won the game.", EXCLAMATION, "we", "won", "game"),
        ("Start this with the word yesterday.", "I lost my keys.", matches(r"^\W*yesterday"), "lost", "keys"),
        ("Put this into the future tense.", "They eat dinner at home.", mentions("will|going to"), "eat", "dinner"),
        ("Write this in capital letters.", "My phone is under the chair.", UPPER, "phone", "under", "chair"),
        ("Turn this into a question.", "The shop is open on Sunday.", QUESTION, "shop", "open", "sunday"),
        ("Use another word for big in this.", "The big dog barked at us.",
         lambda text: float(not has("big", text)), "dog", "barked", "us"),
        ("Put this into the past tense.", "I go to the market and buy fish.", mentions("went", "bought"), "market",
         "fish"),
        ("Write this in small letters only.", "PLEASE TURN OFF THE LIGHT.", LOWER, "turn", "off", "light"),
        ("Use she in place of he.", "He said that he was tired.",
         lambda text: mentions("she")(text) * (not has("he", text)), "said", "tired"),
        ("Make this polite with the word please.", "Bring me a glass of water.", mentions("please"), "bring", "glass",
         "water"),
    ),
    "yes_no": (
        ("Is the Sun larger than the Moon?", "yes", "star", "diameter", "times", "big", "bigger", "mass", "size"),
        ("Can penguins fly?", "no", "wing", "swim", "heavy", "flightless", "water"),
        ("Is ice lighter than water?", "yes", "float", "density", "dense", "less dense", "expand"),
        ("Do fish breathe with lungs?", "no", "gill", "oxygen", "water"),
        ("Is a tomato a fruit?", "yes", "seed", "flower", "plant", "grow"),
        ("Is the Earth flat?", "no", "round", "sphere", "spherical", "globe", "curve", "curved"),
        ("Do plants need light?", "yes", "photosynthesis", "energy", "food", "grow", "sunlight"),
        ("Is a whale a fish?", "no", "mammal", "lung", "milk", "breathe", "air"),
        ("Is it safe to look at the Sun without protection?", "no", "eye", "damage", "blind", "harm", "burn", "uv"),
        ("Does salt dissolve in water?", "yes", "ion", "molecule", "soluble", "polar", "sodium", "solution"),
        ("Is gold a metal?", "yes", "element", "conduct", "shiny", "malleable", "conductor", "dense", "soft"),
        ("Can a car run without energy?", "no", "fuel", "engine", "power", "battery", "electricity", "gas"),
        ("Should you brush your teeth every day?", "yes", "clean", "plaque", "cavity", "cavities", "decay", "bacteria",
         "healthy", "health"),
        ("Is the number 9 a prime?", "no", "3", "three", "divisible", "divided", "factor", "divisor"),
        ("Is a spider an insect?", "no", "leg", "eight", "arachnid", "8"),
        ("Does sound travel in empty space?", "no", "vacuum", "medium", "air", "particle", "matter", "molecule"),
    ),
    "sorting": (
        ("Sort these words from A to Z", "pear, apple, melon, fig", "apple, fig, melon, pear"),
        ("Sort these numbers from small to large", "42, 7, 19, 30", "7, 19, 30, 42"),
        ("Sort these words from A to Z", "zebra, lion, bear, tiger", "bear, lion, tiger, zebra"),
        ("Put these months in order of the year", "June, March, December, April", "march, april, june, december"),
        ("Sort these animals from small to large", "horse, ant, elephant, cat", "ant, cat, horse, elephant"),
        ("Sort these numbers from large to small", "15, 88, 3, 61", "88, 61, 15, 3"),
        ("Put these days in order, starting with Monday", "Friday, Tuesday, Sunday, Monday",
         "monday, tuesday, friday, sunday"),
        ("Sort these words from short to long", "window, at, bread, sea", "at, sea, bread, window"),
        ("Sort these words from A to Z", "rope, axe, nail, hammer, saw", "axe, hammer, nail, rope, saw"),
        ("Sort these from cold to hot", "warm, freezing, boiling, cool", "freezing, cool, warm, boiling"),
        ("Sort these numbers from small to large", "105, 51, 15, 501", "15, 51, 105, 501"),
        ("Put these meals in order of the day", "dinner, breakfast, lunch", "breakfast, lunch, dinner"),
        ("Sort these words from Z to A", "cup, plate, fork, spoon", "spoon, plate, fork, cup"),
        ("Sort these units of time from short to long", "day, second, year, hour, minute",
         "second, minute, hour, day, year"),
        ("Sort these numbers from small to large", "9, 2, 27, 14, 5", "2, 5, 9, 14, 27"),
        ("Put these stages of life in order", "adult, baby, teenager, child", "baby, child, teenager, adult"),
    ),
    "fact": (
        ("What is the capital of Italy?", "rome", "italy|italian"),
        ("Which planet is closest to the Sun?", "mercury", "planet|sun"),
        ("How many legs does a spider have?", "8|eight", "spider"),
        ("Who wrote the play Romeo and Juliet?", "shakespeare", "romeo|play|wrote|written"),
        ("What gas do people need to breathe?", "oxygen|air", "breathe|people|human|gas"),
        ("On which continent is Egypt?", "africa", "egypt"),
        ("What is the largest ocean?", "pacific", "ocean|largest"),
        ("How many days are in a leap year?", "366", "day|leap"),
        ("What do bees make?", "honey", "bee|they"),
        ("What is the chemical formula of water?", "h2o|h₂o|h2 o", "water|formula"),
        ("Which animal is known as the king of the jungle?", "lion", "king|jungle"),
        ("At how many degrees Celsius does water boil?", "100", "boil|water"),
        ("What is the opposite of hot?", "cold", "hot|opposite"),
        ("In which country is the Eiffel Tower?", "france", "eiffel|tower"),
        ("How many minutes are in an hour?", "60|sixty", "minute|hour"),
        ("What is a baby dog called?", "puppy|pup|puppies", "dog|baby|called"),
    ),
    "keywords": (
        ("river", "lamp", "bread"),
        ("clock", "garden", "whisper"),
        ("doctor", "umbrella", "train"),
        ("mountain", "letter", "soup"),
        ("piano", "rain", "window"),
        ("teacher", "bicycle", "apple"),
        ("moon", "boat", "secret"),
        ("kitchen", "mouse", "cheese"),
        ("market", "hat", "monkey"),
        ("winter", "coat", "dog"),
        ("farmer", "bridge", "egg"),
        ("candle", "storm", "book"),
        ("king", "mirror", "fox"),
        ("beach", "shell", "sister"),
        ("robot", "paint", "school"),
        ("forest", "drum", "bird"),
    ),
    "wordplay": (
        (3, "that rhyme with cat", rhymes("bat hat mat rat sat fat pat flat chat that spat vat gnat brat at splat")),
        (4, "that begin with the letters st", starts("st")),
        (3, "that end in ing", ends("ing")),
        (4, "of exactly four letters", length(4)),
        (3, "that rhyme with light", rhymes("night right sight bright fight might tight flight white kite bite height "
         "knight site write delight slight quite polite bright despite invite ignite")),
        (5, "that begin with the letter m", starts("m")),
        (4, "that end in ness", ends("ness")),
        (3, "that contain a double letter", lambda word: re.search(r"([a-z])\1", word) is not None),
        (3, "that rhyme with blue", rhymes("true new few shoe you two too to do clue glue flew grew threw through view "
         "who zoo crew due sue hue drew brew stew blew chew dew knew pew screw")),
        (5, "of exactly three letters", length(3)),
        (4, "that begin with the letters br", starts("br")),
        (3, "that end in tion", ends("tion")),
        (4, "that contain the letter z", lambda word: "z" in word and len(word) > 2),
        (3, "that rhyme with rain", rhymes("train pain gain main brain chain grain plain stain lane plane cane mane "
         "vein drain again crane sane vain reign strain explain remain cocaine")),
        (4, "that begin with the letter k", starts("k")),
        (3, "of exactly six letters", length(6)),
    ),
    "explanation": (
        ("why we wear coats in winter", "warm|warmth|warmer", "cold|chilly|freezing", "heat|insulate|insulation",
         "body"),
        ("why we sleep", "rest|relax", "brain|mind", "body|bodies", "energy|recharge", "recover|repair|restore"),
        ("how a bicycle moves", "pedal|pedalling|pedaling", "wheel", "chain", "leg|foot|feet|rider",
         "push|turn|rotate"),
        ("why leaves look green", "chlorophyll", "light|sunlight", "reflect|absorb", "pigment", "photosynthesis"),
        ("what a dictionary is for", "word", "meaning|definition|define", "spelling|spell|pronunciation", "language"),
        ("why it gets dark at night", "sun|sunlight", "earth|planet", "rotate|rotation|turn|spin", "light", "side"),
        ("what a map is for", "place|location", "way|direction|route|navigate", "find|locate|show", "land|area|region"),
        ("why people use umbrellas", "rain|rainy", "dry|wet", "sun|sunlight", "protect|shield|protection", "water"),
        ("how a candle gives light", "flame|fire", "wick", "wax", "burn|burning|heat", "melt"),
        ("why we wash our hands", "germ|bacteria|virus", "clean|dirt|hygiene", "sick|disease|illness|infection",
         "soap"),
        ("what a thermometer does", "temperature", "measure|measuring", "heat|hot|cold", "degree|mercury"),
        ("why birds build nests", "egg", "safe|safety|protect|protection|shelter", "young|chick|babies|baby|offspring",
         "predator", "lay|hatch"),
        ("why bread rises", "yeast", "gas|carbon dioxide|bubble|air", "dough", "ferment|fermentation|heat|sugar"),
        ("what a bridge is for", "cross|crossing|over", "river|water|valley|gap", "road|car|people|vehicle", "connect"),
        ("why teeth need brushing", "plaque|tartar", "cavity|cavities|decay", "clean|remove", "bacteria|germ", "gum"),
        ("how a refrigerator keeps food fresh", "cold|cool|cooling|low|chill", "temperature", "bacteria|germ|mold",
         "slow|prevent|stop", "spoil|spoilage|rot"),
    ),
}
# fmt: on


def tasks() -> list[Task]:
    """All tasks, in the order of `ROWS`; the first and then every fourth row of a kind is held out."""
    return [
        Task(f"{kind}-{place:02d}", kind, "train" if place % HELD_OUT_EVERY else "heldout", *BUILDERS[kind](*row))
        for kind, rows in ROWS.items()
        for place, row in enumerate(rows)
    ]
