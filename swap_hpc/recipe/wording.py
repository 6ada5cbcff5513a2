"""Words for people."""


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one: "1 rank", "4,096 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
