"""Small made-up conversations: the text that the default model is trained on.

Every sentence comes from the templates below, so the corpus is this file, a seed and a count.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GLOSSARY = {
    "a rank": "A rank is one process that owns one GPU and one shard of the weights. Ranks are counted from zero.",
    "the world size": "The world size is the number of ranks that serve the model together.",
    "a gang": "A gang is a set of pods that serve one copy of the model. It fails and restarts as a whole.",
    "an epoch": "An epoch is the number of a world. Each rebuild takes a new one, and older messages are refused.",
    "an arena": "An arena is a block of memory that the supervisor holds, so that it outlives the rank that made it.",
    "a step plan": "A step plan tells every rank what to compute next: which sequences, and how many tokens of each.",
    "the supervisor": "The supervisor is the main process of a pod. It starts the others and watches them.",
    "the engine": "The engine schedules continuous batches and drives the ranks. It holds no KV cache of its own.",
    "tensor parallelism": "Tensor parallelism splits each matrix over the ranks. An all-reduce sums the parts.",
    "an all-reduce": "An all-reduce adds the tensors of all ranks, and gives the sum back to every one of them.",
    "a KV cache": "A KV cache keeps the keys and values of past tokens, so that each step computes only the new token.",
    "a block table": "A block table lists the blocks of the KV cache that belong to a sequence, in order.",
    "prefill": "Prefill computes the KV cache of a prompt. It handles many tokens in one step.",
    "decoding": "Decoding makes one new token in each step, and reads all the weights to do so.",
    "a prefix cache": "A prefix cache keeps the blocks of old prompts, so that a similar prompt is cheaper.",
    "a tokenizer": "A tokenizer turns text into token ids, and a detokenizer turns the ids back into text.",
    "continuous batching": "Continuous batching lets requests join and leave the batch at every step.",
    "a checkpoint": "A checkpoint is a folder with the weights of a model, its config and its tokenizer.",
}
ANIMALS = ["fox", "owl", "bear", "mouse", "heron", "badger", "otter", "hare", "goat", "swan"]
TRAITS = ["small", "old", "quiet", "brave", "curious", "patient", "hungry", "clever", "gentle", "proud"]
PLACES = ["by the river", "in the hills", "near the sea", "under an oak", "behind the mill", "at the edge of a wood"]
FINDS = ["a silver bell", "a lost letter", "a bright stone", "an old map", "a warm coat", "a broken clock"]
FRIENDS = ["a farmer", "a miller", "a young sailor", "a teacher", "a baker", "an old king"]
LESSONS = [
    "It is good to share what you find.",
    "A small step every day goes a long way.",
    "Friends make hard work light.",
    "Those who listen learn the most.",
    "Patience opens many doors.",
]
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Norway": "Oslo", "Egypt": "Cairo",
    "Greece": "Athens", "Peru": "Lima", "Kenya": "Nairobi", "Canada": "Ottawa", "Poland": "Warsaw", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Finland": "Helsinki", "Cuba": "Havana",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red",
    "an orange": "orange", "a ripe plum": "purple",
}  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
           "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """One question and its answer."""

    question: str
    answer: str


def _story(rng: random.Random) -> Conversation:
    animal, trait, place = rng.choice(ANIMALS), rng.choice(TRAITS), rng.choice(PLACES)
    find, friend, lesson = rng.choice(FINDS), rng.choice(FRIENDS), rng.choice(LESSONS)
    article = "an" if trait[0] in "aeiou" else "a"
    day = rng.choice(["One morning", "One evening", "On a cold day", "After the rain"])
    middle = rng.choice([
        f"{day} the {animal} found {find} and did not know whose it was.",
        f"{day} the {animal} went for a walk and came back with {find}.",
    ])  # fmt: skip
    end = rng.choice([
        f"So it asked {friend}, who smiled and said: keep it, it is yours.",
        f"It gave it to {friend}, and they had supper together.",
        f"Then {friend} came along and told it a long tale about it.",
    ])  # fmt: skip
    question = rng.choice([f"Tell me a story about {'an' if animal == 'otter' or animal == 'owl' else 'a'} {animal}.",
                           f"Write a short story. It should have {'an' if animal in ('otter', 'owl') else 'a'} {animal} in it."])  # fmt: skip # noqa: E501
    opening = f"Once upon a time there was {article} {trait} {animal} who lived {place}."
    return Conversation(question, f"{opening} {middle} {end} {lesson}")


def _glossary(rng: random.Random) -> Conversation:
    term, meaning = rng.choice(list(GLOSSARY.items()))
    question = rng.choice([f"What is {term}?", f"Explain {term}.", f"Can you tell me what {term} is?"])
    return Conversation(question, meaning)


def _capital(rng: random.Random) -> Conversation:
    country, city = rng.choice(list(CAPITALS.items()))
    question = rng.choice([f"What is the capital of {country}?", f"Name the capital of {country}."])
    return Conversation(question, f"The capital of {country} is {city}.")


def _colour(rng: random.Random) -> Conversation:
    thing, colour = rng.choice(list(COLOURS.items()))
    return Conversation(f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}.")


def _sum(rng: random.Random) -> Conversation:
    left, right = rng.randrange(10), rng.randrange(10)
    sentence = f"{NUMBERS[left]} plus {NUMBERS[right]}"
    return Conversation(f"What is {sentence}?", f"{sentence[0].upper()}{sentence[1:]} is {NUMBERS[left + right]}.")


def _count(rng: random.Random) -> Conversation:
    start, length = rng.randrange(8), rng.randrange(3, 9)
    numbers = NUMBERS[start : start + length]
    return Conversation(f"Count from {numbers[0]} to {numbers[-1]}.", f"{', '.join(numbers)}.")


def _greeting(rng: random.Random) -> Conversation:
    question = rng.choice(["Hello!", "Hi!", "Good morning!", "Hello, who are you?", "Who are you?", "What can you do?"])
    return Conversation(
        question,
        "Hello! I am a very small model that comes with tpmodel. I can tell short stories, count, "
        "name some capitals, and explain a few words of tensor parallel serving.",
    )


MAKERS = [(_story, 6), (_glossary, 5), (_capital, 1), (_colour, 1), (_sum, 2), (_count, 1), (_greeting, 1)]


def conversations(*, count: int, seed: int) -> list[Conversation]:
    """A list of that many conversations, the same for the same seed."""
    rng = random.Random(seed)
    makers = [maker for maker, _ in MAKERS]
    weights = [weight for _, weight in MAKERS]
    return [maker(rng) for maker in rng.choices(makers, weights, k=count)]
