"Small documents for the tests of text and tokens: always the same ones."

WORDS = "the cat sat on a mat while 12 dogs and 345 birds watched, didn't they? naïve café — 日本 🎉".split()
WORDS += [a + b + c for a in ("ka", "lo", "mi", "tre") for b in ("na", "sto", "rel")
          for c in ("", "dor", "ly", "ing")]


def story(i: int) -> str:
    "A document of 5 to 405 words, the same for the same number."
    return " ".join(WORDS[(i * k * k + k) % len(WORDS)] for k in range(5 + (i * 37) % 401))


STORIES = [story(i) for i in range(150)]
