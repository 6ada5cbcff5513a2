"""What figures call the parts of a run."""


def part_label(part: str) -> str:
    """Return the name that a figure shows for `large_batch`, `group-003` or `swap`."""
    if part.startswith("group-"):
        return f"group {int(part.removeprefix('group-'))}"
    return {"large_batch": "end of phase 1", "swap": "average"}[part]
